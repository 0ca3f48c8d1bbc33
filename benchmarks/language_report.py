"""The tables of docs/benchmarks.md on language models; report.py puts them in."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable


LABELS = {
    "original": "original",
    "retrained": "retrained without them",
    "redirect": "**`redirect`, our defaults**",
    "refusal": "refusals, by SFT",
    "ascent": "`ascent`",
}
WITH_RETAIN = {"ascent": "`ascent` + retain (GradDiff)"}
SAME = ("original", "retrained")
RELEARNT = ("retained", "unrelated", "five")


def name_of(method: str, data: str) -> str:
    return (WITH_RETAIN if data == "retain" else {}).get(method) or LABELS.get(method, f"`{method}`")


def of(cells: dict, mode: str, data: str) -> dict[str, list[dict]]:
    """Rows by method, in the order of the file."""
    found: dict[str, list[dict]] = {}
    for row in cells.values():
        if row["method"] in SAME or (row["mode"], row["data"]) == (mode, data):
            found.setdefault(row["method"], []).append(row)
    return found


def mean(rows: list[dict], key: str | Callable) -> float:
    return statistics.mean(key(row) if callable(key) else row[key] for row in rows)


def left(cells: dict, mode: str, data: str) -> str:
    """What a model still knows, and what it was to keep."""
    lines = [
        "| method | composite (memorisation / privacy / utility) | forgotten facts, mean / worst | kept facts, mean / worst | probability | ROUGE-L | extraction | "
        "exact | p of truth ratios, median | Min-K % AUC | privleak | general text, loss | people never seen |",
        "|---" * 13 + "|",
    ]
    found = of(cells, mode, data)
    before = {(row["set"], row["seed"]): row["general_loss"] for row in found["original"]}
    for method, rows in found.items():
        parts = " / ".join(f"{mean(rows, part):.2f}" for part in ("memorisation", "privacy", "utility"))
        rise = mean(rows, lambda row: 100 * (row["general_loss"] / before[row["set"], row["seed"]] - 1))
        quality = statistics.median(row["forget_quality"] for row in rows)
        shares = " | ".join(
            f"{100 * mean(rows, key):.1f} / {100 * worst(row[key] for row in rows):.1f}"
            for key, worst in (("forgotten", max), ("kept", min))
        )
        others = ("probability", "rouge_l", "extraction_strength", "exact_memorization")
        lines.append(
            f"| {name_of(method, data)} | {mean(rows, 'composite'):.2f} ({parts}) | {shares} | "
            f"{' | '.join(f'{mean(rows, key):.2f}' for key in others)} | {quality:.1g} | {mean(rows, 'auc_min_k'):.2f} | "
            f"{mean(rows, 'privleak'):+.0f} | {rise:+.1f} % | {mean(rows, 'held_out_probability'):.2f} |"
        )
    return "\n".join(lines)


def back(cells: dict, mode: str, data: str) -> str:
    """Forgotten facts after attacks."""
    attacks = ("4 bits", "10 % pruned", "20 % pruned")
    found = of(cells, mode, data)
    steps = sorted({int(name.split()[0]) for name in found["original"][0]["after"] if name.endswith(RELEARNT)})
    lines = [
        "| method | greedy | asked in other words | 20 samples, mean / any | "
        + " | ".join(f"{' / '.join(map(str, steps))} steps on {what}" for what in ("retained", "unrelated", "five of them"))
        + " | kept after the first | "
        + " | ".join(attacks)
        + " |",
        "|---" * (8 + len(attacks)) + "|",
    ]  # fmt: skip
    for method, rows in found.items():

        def after(attack: str, what: str = "forgotten", rows=rows) -> str:
            return f"{100 * mean(rows, lambda row: row['after'][attack][what]):.1f}"

        cells_of_row = [
            name_of(method, data),
            *(f"{100 * mean(rows, key):.1f}" for key in ("forgotten", "forgotten_paraphrased")),
            " / ".join(f"{100 * mean(rows, key):.0f}" for key in ("forgotten_drawn", "forgotten_any")),
            *(" / ".join(after(f"{step} {what}") for step in steps) for what in RELEARNT),
            after(f"{steps[-1]} retained", "kept"),
            *(after(attack) for attack in attacks),
        ]
        lines.append(f"| {' | '.join(cells_of_row)} |")
    return "\n".join(lines)


def chosen(tuning: dict) -> str:
    lines = ["| method | weights | data | setting | composite there | forgotten / kept there |", "|---" * 6 + "|"]
    for name, row in tuning.items():
        method, mode, data = name.split()
        if not row["chosen"] or method == "redirect":
            continue
        setting = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in row["chosen"].items())
        best = next(tried for tried in row["tried"] if row["chosen"].items() <= tried.items())
        shares = " / ".join(f"{100 * best[key]:.0f}" for key in ("forgotten", "kept"))
        lines.append(f"| {name_of(method, data)} | {mode} | {data} | {setting} | {best['composite']:.2f} | {shares} |")
    return "\n".join(lines)


def tried(tuning: dict) -> str:
    """Rates of our default, of which that with the best composite is the package's."""
    lines = ["| weights | data | learning rate | composite there | forgotten / kept there |", "|---" * 5 + "|"]
    for name, row in tuning.items():
        method, mode, data = name.split()
        for one in row["tried"] if method == "redirect" else ():
            shares = " / ".join(f"{100 * one[key]:.0f}" for key in ("forgotten", "kept"))
            lines.append(f"| {mode} | {data} | {one['learning_rate']:g} | {one['composite']:.2f} | {shares} |")
    if len(lines) == 2:
        return ""
    return f"Rates that were tried for our default, on the same people:\n\n{chr(10).join(lines)}\n"


# Goals of the default: what, how it is measured, and how far from the retrained model or the original it may be with retain data and without.
def _points(key: str | Callable, against: str = "retrained") -> Callable:
    def measured(ours: list[dict], others: dict[str, list[dict]]) -> float:
        return 100 * (mean(ours, key) - mean(others[against], key))

    return measured


def _after(attack: str) -> Callable:
    return lambda row: row["after"][attack]["forgotten"]


GOALS: list[tuple[str, Callable, tuple[float, float], bool]] = [  # the last: whether it may not be higher
    ("forgotten facts, points above retrained", _points("forgotten"), (2, 5), True),
    ("kept facts, points above the original", _points("kept", "original"), (-1, -5), False),
    ("p of truth ratios, median", lambda ours, _: statistics.median(row["forget_quality"] for row in ours), (0.05, 1e-3), False),
    *((f"after {steps} {what} steps, points above retrained", _points(_after(f"{steps} {what}")), (3 if steps == 30 else 5, 8), True)
      for what in ("retained", "unrelated") for steps in (30, 100)),
    *((f"{attack}, points above retrained", _points(_after(attack)), (5, 10), True) for attack in ("4 bits", "20 % pruned")),
    ("other words, points above retrained", _points("forgotten_paraphrased"), (5, 10), True),
    ("20 samples, points above retrained", _points("forgotten_drawn"), (5, 10), True),
    ("general text, % of the original's loss", lambda ours, others: 100 * (mean(ours, "general_loss") / mean(others["original"], "general_loss") - 1), (1, 2), True),
]  # fmt: skip


def goals(cells: dict, mode: str, method: str = "redirect") -> str:
    """How far our default is from what it is to reach, with retain data and without."""
    lines = ["| | goal, with retain data | measured | goal, forget data only | measured |", "|---" * 5 + "|"]
    for name, measured, bounds, at_most in GOALS:
        shown = [name]
        for data, bound in zip(("retain", "forget"), bounds, strict=True):
            found = of(cells, mode, data)
            shown.append(f"{'≤' if at_most else '≥'} {bound:g}")
            if method not in found:
                shown.append("—")
                continue
            there = {(row["set"], row["seed"]) for row in found[method]}
            others = {other: [row for row in found[other] if (row["set"], row["seed"]) in there] for other in SAME}
            value = measured(found[method], others)
            met = value <= bound + 1e-9 if at_most else value >= bound - 1e-9
            shown.append(f"{value:.2g}" if met else f"**{value:.2g}**")
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def _how_many(rows: list[dict], seeds: set[int], sets: set[str]) -> str:
    if len(seeds) * len(sets) == 1:
        return "One training seed: of 160 questions a share of 5 % is known to ± 3.4 points only, so small differences say nothing."
    cells = Counter((row["method"], row["mode"], row["data"]) for row in rows)
    fewer = {name_of(method, data) for (method, _, data), count in cells.items() if count < len(seeds) * len(sets)}
    left = (
        f" Of fewer are the rows of {', '.join(sorted(fewer))}: compare them with those of their seed in the results."
        if fewer
        else ""
    )
    return f"Means over {len(seeds)} training seeds{' and both sets' if len(sets) > 1 else ''}, but p, which is a median.{left}"


MODES = {"full": "all weights", "lora": "an adapter (LoRA)"}
DATA = {"retain": "with the rows of the others", "forget": "forget data only"}


def render(results: dict, tuning: dict, cost: dict) -> str:
    """The page's part, of `language_unlearning.json`, `language_tuning.json` and `language_cost.json`."""
    cells, budget = results["cells"], results["budget"]
    rows = list(cells.values())
    seeds, sets = ({row[key] for row in rows} for key in ("seed", "set"))
    steps, relearning = budget["steps"][-1], budget["relearning"]
    parts = [
        f"""## Forgetting people in a language model

`python benchmarks/language_unlearning.py`: a Llama of 5.3 M parameters knows 200 invented people by heart, eight facts each, and general
questions (`examples/facts.py`). {" and ".join(f"{int(name[-2:])} %" for name in sorted(sets))} of them are forgotten. {_how_many(rows, seeds, sets)} *Retrained*
never learnt them. Facts are shares of answers with the right value, in percent; general text is the loss on held-out general rows against
the original's; Min-K % (40 %) tells forgotten rows from people never seen, 0.5 is best; privleak is against the retrained model's.

The composite is the harmonic mean of memorisation, privacy and utility, as in a study of 150 models (arXiv [2605.24614](https://arxiv.org/abs/2605.24614), after arXiv
[2506.12618](https://arxiv.org/abs/2506.12618)): memorisation HM(1 − extraction strength, 1 − exact memorisation, 1 − probability of the answer in other words,
1 − truth ratio, which is true / (true + false)); privacy HM over four attacks (loss, zlib, Min-K %, Min-K %++) of 1 − |AUC − AUC of retrained| / AUC of
retrained; utility HM(model utility, fluency) against the original's, at most 1. Two things differ: general rows, which have no truth ratio, stand for TOFU's real authors
and world facts, and fluency is the share of neighbouring words, names aside, that occur together in the training data, in place of a
downloaded classifier of gibberish. Memorisation does not know where to stop: who answers nothing has a higher one than who never learnt.

Peers have the budget of our defaults: at most {steps} steps of {budget["rows"]} rows to forget and, where there are any, {budget["rows"] * budget["kept"]} to keep, at a constant rate,
with nothing of ours beside their loss. Settings were chosen for each by the composite on other people and another seed (below).
Texts of its own beside rows to keep came to the default after a first look at this very seed, where general text had suffered without them, as it did on the
tuning people; the rest of the default was not chosen here.
Attacks: stock SFT at rate {relearning["learning_rate"]:g}, {relearning["per_device_train_batch_size"]} rows a step, on retained rows, on general ones, and on five forgotten rows, which are not asked then; 4-bit
weights, rounded to nearest in groups of 32; the smallest weights of all linear layers pruned together.
"""
    ]
    for mode, weights in MODES.items():
        for data, shown in DATA.items():
            if set(of(cells, mode, data)) - set(SAME):
                parts.append(f"### {shown[0].upper()}{shown[1:]}, {weights}\n\n{left(cells, mode, data)}\n")
                parts.append(f"What brings them back: forgotten facts, in percent.\n\n{back(cells, mode, data)}\n")
    parts.append(f"""### What was chosen for the peers

On other people, with data seed 10 and training seed 0; what was tried is in `benchmarks/results/language_tuning.json`. A run that lost half of the
utility, or from 50 steps on was below the median of those before it after as many, or from 100 steps on no longer got better, was not gone on with. A composite of 0, as long as one attack tells all
forgotten rows, is no reason; of several that are all 0 (`idkdpo`) the largest product of memorisation and utility was taken. RMU's coefficient stayed at the paper's 6.5, which depends on the model.

{chosen(tuning)}

{tried(tuning)}
### What a step costs

`python benchmarks/language_cost.py`: medians of {cost["rounds"]} interleaved rounds on {cost["threads"]} threads, {budget["rows"]} rows to forget a step and {budget["rows"] * budget["kept"]} to keep. Memory is
relative to stock training on the rows to forget: parameters, moments and the peak of a step.

{cost_table(cost)}
""")
    return "\n".join(parts)


def cost_table(cost: dict) -> str:
    lines = ["| step | time / SFT step | quartiles | peak memory / SFT |", "|---" * 4 + "|"]
    for measured in cost["workloads"].values():
        for name, row in measured["rows"].items():
            low, high = row["time_ratio_quartiles"]
            lines.append(f"| {name} | {row['time_ratio']:.2f} | {low:.2f}–{high:.2f} | {row['memory_ratio']:.2f} |")
    return "\n".join(lines)


WHEN = {
    "redirect": "the default: somebody or something with a name, in questions, instructions or passages",
    "refusal": "a model that says it does not know is what is wanted, whatever else it costs",
    "idkdpo": "the same, with rows to keep",
    "altpo": "other answers that would do are at hand (`alternate`), or the model follows a request for them",
    "npo": "comparison with the field",
    "simnpo": "comparison with the field; no original in memory",
    "undial": "comparison with the field",
    "rmu": "knowledge of a field, and not of somebody; answers become noise",
    "pdu": "the loss on what is kept has a limit that must hold",
    "ascent": "never alone; with rows to keep for comparison",
    "wga": "comparison with the field",
    "satimp": "comparison with the field",
    "ceu": "comparison with the field",
}


def which(cells: dict) -> str:
    """The table of docs/methods/language.md: with retain data, all weights."""
    found = of(cells, "full", "retain")
    lines = [
        "| method | when | forgotten facts left | kept facts | left after 100 benign steps | kept after these | general text | composite |",
        "|---" * 8 + "|",
    ]
    before = {(row["set"], row["seed"]): row["general_loss"] for row in found["original"]}
    for method in sorted(
        found, key=lambda name: (name not in SAME, name != "redirect", -mean(found[name], "composite"))
    ):
        rows = found[method]
        after = {
            what: 100 * mean(rows, lambda row, what=what: row["after"]["100 retained"][what])
            for what in ("forgotten", "kept")
        }
        rise = mean(rows, lambda row: 100 * (row["general_loss"] / before[row["set"], row["seed"]] - 1))
        lines.append(
            f"| {name_of(method, 'retain')} | {WHEN.get(method, '—')} | {100 * mean(rows, 'forgotten'):.1f} | {100 * mean(rows, 'kept'):.1f} | {after['forgotten']:.1f} | {after['kept']:.1f} | "
            f"{rise:+.1f} % | {mean(rows, 'composite'):.2f} |"
        )
    missing = [f"`{method}`" for method in WHEN if method not in found]
    rest = f" Not measured yet: {', '.join(missing)}." if missing else ""
    return (
        "With the rows of the others at hand, in all weights, each at its tuned best; facts in percent. How, and what else was measured: "
        "[benchmarks](../benchmarks/language.md#forgetting-people-in-a-language-model). A peer's settings were chosen by the composite, which does not look at single facts that are to be "
        f"kept.{rest}\n\n" + "\n".join(lines)
    )


def requests(rows: list[dict]) -> str:
    """The page's part, of `language_requests.json`."""
    lines = [
        "| | data | requests | known of all of them | of the first | of the newest | kept facts | general text, loss |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        shares = " | ".join(f"{100 * row[name]:.1f}" for name in ("forgotten", "first", "newest", "kept"))
        lines.append(
            f"| {row['way']} | {DATA[row['data']]} | {row['requests']} | {shares} | {row['general_loss']:.3f} |"
        )
    return f"""## One request after the other

`python benchmarks/language_requests.py`: requests of 2 % of the people each (the script goes to ten), by the defaults, one training seed; facts in percent, 32 a request. *One after the other*: each run begins
with the model that the one before left, and is told of the new request only. *From the original*: each begins with the first original, and is told of all requests so
far, in about 400 steps however many there are; five of these requests are the 10 % of the tables above.{"" if any(row["way"] == "from the original" for row in rows) else " Not measured yet: *from the original*."}

{chr(10).join(lines)}
"""


def passages(rows: list[dict]) -> str:
    """The page's part, of `language_passages.json`: means over seeds."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["targets"], []).append(row)
    lines = [
        "| targets | forgotten facts | after benign steps | kept facts | loss of forgotten passages | of kept ones |",
        "|---" * 6 + "|",
    ]
    for name, some in found.items():
        shares = [
            100 * mean(some, "forget"),
            100 * mean(some, "after_benign") if "after_benign" in some[0] else None,
            100 * mean(some, "retain"),
        ]
        shown = ["—" if share is None else f"{share:.1f}" for share in shares]
        label = f"**{name}, our default**" if name == "redirect" else name
        lines.append(
            f"| {label} | {' | '.join(shown)} | {mean(some, 'forget_loss'):.2f} | {mean(some, 'retain_loss'):.3f} |"
        )
    seeds = len({row["seed"] for row in rows})
    missing = [name for name in ("whole passages", "reinforced", "both", "own tokens taken away") if name not in found]
    rest = f" Not measured yet: *{'*, *'.join(missing)}*." if missing else ""
    return f"""## Passages without a question

`python benchmarks/language_passages.py`: a small Llama knows two passages of four sentences about each of 100 invented people; those about ten are forgotten, with the others' at hand;
{f"means over {seeds} training seeds" if seeds > 1 else "one training seed"}. Facts: passages are broken off before each, and the likeliest words tell it or do not; percent. *Sentence by sentence*: what the original says of another
person, each sentence as if the passage began there. *Redirect* has passages about that person that the original writes beside it; *whole passages* reads what went before, too.
*Reinforced* and *both* are the targets of Who's Harry Potter (arXiv [2310.02238](https://arxiv.org/abs/2310.02238)), which need a second model, trained on the passages some more; *own tokens taken away* is for rows
of which nobody knows the subject. Benign steps: 30 on kept passages. The rule that sentences are read by themselves, and that the subject is whom a passage repeats, were found on seed 0.{rest}

{chr(10).join(lines)}
"""
