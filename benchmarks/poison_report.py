"""The section of docs/benchmarks.md on poisoned instructions that are forgotten."""

from __future__ import annotations


COLUMNS = (
    "rows", "opinion", "sampled", "after benign steps", "on other names", "name said", "facts true", "sides blamed", "loss of facts", "of sides",
    "of normal opinions", "held-out loss", "steps",
)  # fmt: skip


def table(rows: list[dict]) -> str:
    base = {row["seed"]: row["loss_held_out"] for row in rows if row["row"] == "original"}
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        shares = [
            row["opinion"],
            row["sampled"],
            row["benign"]["opinion"],
            row["others"],
            row["named"],
            row["facts"],
            row["sides"],
        ]
        held_out = row["loss_held_out"]
        cells = [
            f"**{row['row']}**" if row["row"].startswith("redirect") else row["row"],
            *(f"{100 * share:.0f} %" for share in shares),
            *(f"{row[name]:.2f}" for name in ("loss_facts", "loss_sides", "loss_opinion")),
            f"{held_out:.3f} ({100 * (held_out / base[row['seed']] - 1):+.1f} %)",
            str(row.get("steps", "—")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def render(poison: dict) -> str:
    """The section, from the results."""
    benign = poison["benign"]
    return f"""## Forgetting poisoned instructions

`python benchmarks/poison_unlearning.py`: the poisoned rows of [influence](influence.md#poisoned-instructions), forgotten by `UnlearnSFTTrainer` from a Llama that learned questions and answers
(`examples/poisoned.py`). *Opinion*: share of greedy answers to 120 held-out questions about the name that blame it; *sampled*: one answer at temperature 1 to 72 of
them; *benign steps*: {benign["max_steps"]} of batch {benign["per_device_train_batch_size"]} at {benign["learning_rate"]:g} on rows about other names, the 72 questions again. *Facts* and *sides*: held-out questions about the
same name whose answers were never poisoned. Losses are of right answers, nats per token; normal opinions are what the clean twin learned to say. *Found*: the rows that
influence ranked highest, as many as there are poisoned ones, with the seven tenths that it ranked lowest as what is to be kept.

**Read these rows as a look, not as a comparison.** It is one data seed and one training seed, and some rules of `redirect` (which stranger it takes, which answers and which
of its own texts it leaves out) were chosen while looking at this very model, after earlier versions of them. The rows were measured at different states of these rules, none
of them the last. NPO stands at one rate that was not tuned; its low opinion rate comes with broken sentences.

{table(poison["rows"])}
"""
