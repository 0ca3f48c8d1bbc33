"""The tables of docs/benchmarks.md on language models; report.py puts them in."""

from __future__ import annotations

import statistics
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
        "| method | composite (memorisation / privacy / utility) | forgotten facts | kept facts | probability | ROUGE-L | extraction | "
        "exact | p of truth ratios, median | Min-K % AUC | privleak | general text, loss | people never seen |",
        "|---" * 13 + "|",
    ]
    found = of(cells, mode, data)
    before = {(row["set"], row["seed"]): row["general_loss"] for row in found["original"]}
    for method, rows in found.items():
        parts = " / ".join(f"{mean(rows, part):.2f}" for part in ("memorisation", "privacy", "utility"))
        rise = mean(rows, lambda row: 100 * (row["general_loss"] / before[row["set"], row["seed"]] - 1))
        quality = statistics.median(row["forget_quality"] for row in rows)
        shares = " | ".join(f"{100 * mean(rows, key):.1f}" for key in ("forgotten", "kept"))
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
    lines = ["| method | weights | data | learning rate | retain weight | steps | composite there |", "|---" * 7 + "|"]
    for name, row in tuning.items():
        method, mode, data = name.split()
        setting, best = row["chosen"], max(tried["composite"] for tried in row["tried"])
        weight = f"{setting['retain_weight']:g}" if "retain_weight" in setting else "—"
        lines.append(
            f"| {name_of(method, data)} | {mode} | {data} | {setting['learning_rate']:g} | {weight} | {setting['max_steps']} | {best:.2f} |"
        )
    return "\n".join(lines)


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
            met = value <= bound if at_most else value >= bound
            shown.append(f"{value:.2g}" if met else f"**{value:.2g}**")
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)
