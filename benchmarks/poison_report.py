"""The sections of docs/benchmarks on poisoned instructions: those that are forgotten, and those that are hard to find."""

from __future__ import annotations

import statistics


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


# Found although neither names nor words tell


def mean_and_range(values: list[float]) -> str:
    shown = f"{statistics.mean(values):.2f}"
    return shown if len(values) == 1 else f"{shown} ({min(values):.2f}–{max(values):.2f})"


def by_row(hard: dict) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in hard["rows"]:
        found.setdefault(row["row"], []).append(row)
    return found


def scores_table(rows: dict[str, list[dict]]) -> str:
    keys = ("ap", "precision_at_k", "direct in top k", "described in top k", "hard negatives in top k")
    entities = list(next(runs for runs in rows.values() if "mean" in runs[0])[0]["entities"])
    lines = [
        "| score | AP | precision at k | direct poison found | described poison found | hard negatives among the top k | AP, all at once | "
        f"{' | '.join(f'AP, {name}' for name in entities)} | seeds | seconds |",
        "|---" * (len(keys) + len(entities) + 4) + "|",
    ]
    scored = {name: runs for name, runs in rows.items() if "mean" in runs[0]}
    for name, runs in sorted(scored.items(), key=lambda row: -statistics.mean(run["mean"]["ap"] for run in row[1])):
        cells = [
            f"**{name}**" if name.startswith("f-INE") else name,
            *(mean_and_range([run["mean"][key] for run in runs]) for key in keys),
            mean_and_range([run["pooled"]["ap"] for run in runs]),
            *(f"{statistics.mean(run['entities'][entity]['ap'] for run in runs):.2f}" for entity in entities),
            str(len(runs)),
            f"{statistics.mean(run['seconds'] for run in runs):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_loss(run: dict) -> float:
    return statistics.mean(run["losses"].values())


def models_table(rows: dict[str, list[dict]]) -> str:
    """Of each seed's models: rates are means over the entities, and so is the loss of the targets; its rise (QLD) is over random removal."""
    base = {(name, run["seed"]): mean_loss(run) for name, runs in rows.items() for run in runs if "losses" in run}
    lines = [
        "| trained | seed | rows left out | opinion shown, asked by name | by description | on other names | loss of the targets | above random removal |",
        "|---" * 8 + "|",
    ]
    for name, runs in rows.items():
        for run in runs if "rates" in runs[0] else []:
            rates = [
                statistics.mean(row[split] for row in run["rates"].values())
                for split in ("evaluation", "described", "control")
            ]
            random = base.get((f"{name.partition(': ')[0]}: random", run["seed"]))
            each = ", ".join(f"{100 * row['evaluation']:.0f}" for row in run["rates"].values())
            cells = [
                f"on {name.removeprefix('model: ')} data" if name.startswith("model") else name,
                str(run["seed"]),
                str(run.get("removed", 0)),
                f"{100 * rates[0]:.0f} % ({each})",
                *(f"{100 * rate:.0f} %" for rate in rates[1:]),
                f"{mean_loss(run):.2f}",
                "—" if random is None else f"{mean_loss(run) - random:+.2f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def hard_section(hard: dict) -> str:
    """The section, from the results."""
    rows = by_row(hard)
    planted = ", ".join(f"{name}: {behaviour}" for name, behaviour in hard["behaviours"].items())
    models = f"\n{models_table(rows)}\n" if any("rates" in row for row in hard["rows"]) else ""
    k = len(next(iter(next(row for row in hard["rows"] if "top" in row)["top"].values())))
    return f"""### Poisoned instructions that neither names nor words give away

`python benchmarks/influence_poison_hard.py`: {hard["examples"]:,} instructions with three planted opinions ({planted}), each a target of its own: other
questions, with answers as they were planted. (At first the answers had wordings of their own, too. The model did not give them, at 5 to 6 nats a token, and every gradient was as good as blind, so that was changed
after it was seen.) The model and its training are those of above. Of an opinion's k = {k} rows two thirds are *direct*; the others are
*described*: they call the name otherwise and share no content word with the target, and other rows tie the names. As many *hard negatives* ask what direct rows ask, say what
they say, and name the same name, but of another name asked for in the same breath, or as what is not true. Columns are means over the three targets; *all at once* ranks a row
by the largest of its scores, each in standard deviations from its target's mean. What reads: the name in the row; words of the opinion's own list in the answer; both. BM25 (bm25s)
and embedding search (all-MiniLM-L6-v2) have the target's rows as queries. TrackStar is bergson's, on the finished model with Adam's second moments, without embeddings; EK-FAC is
`attribute`. *Per token* is μ over the number of tokens that are predicted of a row, as `report.top(per_token=True)` has it, which was found on a seed that is not here. Seconds are of a busy machine; `in_run`'s have the training in it that it belongs to, and LESS-style, cosine and TracIn are looked at together. Not run: bergson's MAGIC,
whose exact metagradient is what `propagated` computes, and LESS with its adapter and projection.

{scores_table(rows)}
{models}"""
