"""The page's parts on audits, written from results/audit_power.json, audit_language.json and audit_generators.json."""

from __future__ import annotations

import statistics
from collections import Counter


WORDS = ("not forgotten", "suppressed", "forgotten", "undetermined")
RIGHT = {
    "original": "not forgotten",
    "masked": "suppressed",
    "projected": "suppressed",
    "head only": "suppressed",
    "refusal": "suppressed",
    "retrained": "forgotten",
}
LABELS = {
    "original": "the original",
    "masked": "a bias of −10,000",
    "projected": "POUR's projection, folded into the head",
    "head only": "a new head on the same features",
    "retrained": "one more retrained model",
    "random labels": "random labels",
    "ascent": "gradient ascent",
    "DELETE": "DELETE's loss",
    "PBU, redirect alone": "PBU with `redirect` alone",
    "PBU": "**PBU, our defaults**",
}
OF_LANGUAGE = {
    "original": "the original",
    "refusal": "refusals, by SFT",
    "retrained": "one more retrained model",
    "npo": "`npo`",
    "redirect": "**`redirect`, our defaults**",
}


OF_GENERATORS = {
    "ddpm original": "DDPM: the original",
    "ddpm retrained": "DDPM: one more retrained model",
    "ddpm VDU": "**VDU, our defaults**",
    "gan original": "GAN: the original",
    "gan retrained": "GAN: one more retrained model",
    "gan Adapt-then-Unlearn": "**Adapt-then-Unlearn, our defaults**",
}


def of_case(rows: list[dict], case: str) -> list[dict]:
    return [row for row in rows if row["case"] == case]


def verdicts(rows: list[dict], labels: dict[str, str] = LABELS) -> str:
    lines = ["| model | audits | " + " | ".join(WORDS) + " | right | decided by |", "|---" * 8 + "|"]
    for case, label in labels.items():
        found = of_case(rows, case)
        if not found:
            continue
        words = Counter(row["verdict"] for row in found)
        planted = RIGHT.get(case.removeprefix("ddpm ").removeprefix("gan "))
        right = f"{100 * words[planted] / len(found):.0f} %" if planted else "–"
        by = ", ".join(f"{name} {count}" for name, count in Counter(row["decided_by"] for row in found).most_common(3))
        cells = " | ".join(str(words[word] or "") for word in WORDS)
        lines.append(f"| {label} | {len(found)} | {cells} | {right} | {by} |")
    return "\n".join(lines)


def checks(rows: list[dict], labels: dict[str, str] = LABELS) -> str:
    """Median values of the checks that tell models apart, and how often each was beyond its margin."""
    cases = [case for case in labels if of_case(rows, case)]
    names = list(dict.fromkeys(name for row in rows for name in row["checks"]))
    lines = [
        "| check | retrained, mean | " + " | ".join(labels[case] for case in cases) + " |",
        "|---" * (2 + len(cases)) + "|",
    ]
    for name in names:
        every = [row["checks"][name] for row in rows if name in row["checks"]]
        if not any(one[-1] == "beyond" for one in every):
            continue
        cells = []
        for case in cases:
            own = [row["checks"][name] for row in of_case(rows, case) if name in row["checks"]]
            beyond = sum(one[-1] == "beyond" for one in own)
            cells.append(
                f"{_value(statistics.median(one[0] for one in own))}" + (f" (beyond {beyond})" if beyond else "")
            )
        lines.append(f"| `{name}` | {_value(statistics.mean(one[2] for one in every))} | " + " | ".join(cells) + " |")
    mu = []
    for case in cases:
        mu.append(f"{statistics.median(row['mu'][0] for row in of_case(rows, case)):+.3g}")
    lines.append("| residual μ, median | 0 | " + " | ".join(mu) + " |")
    return "\n".join(lines)


def power(rows: list[dict], by: str = "references") -> str:
    counts = sorted({row[by] for row in rows})
    lines = [
        "| model | " + " | ".join(f"{count} {by}" for count in counts) + " |",
        "|---" * (1 + len(counts)) + "|",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = []
        for count in counts:
            row = next(one for one in rows if (one["case"], one[by]) == (case, count))
            words = {word: row[word] for word in WORDS if word in row}
            total = sum(words.values())
            cells.append(", ".join(f"{100 * number / total:.0f} % {word}" for word, number in words.items()))
        lines.append(f"| {LABELS[case]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _value(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1e4 else f"{value:.0e}"


def choice(rows: list[dict]) -> str:
    """What `sever` asks of features, by rate and weight: what the check that is nearest to its margin takes of it."""
    jobs = list(dict.fromkeys((row["seed"], row["class"]) for row in rows))
    lines = [
        "| rate, weight | mean | " + " | ".join(f"class {forgotten}" for _, forgotten in jobs) + " |",
        "|---" * (2 + len(jobs)) + "|",
    ]
    for rate, weight in dict.fromkeys((row["rate"], row["weight"]) for row in rows):
        of = {(row["seed"], row["class"]): row for row in rows if (row["rate"], row["weight"]) == (rate, weight)}
        cells = [f"{of[job]['taken']:.2f} `{of[job]['worst']}`" for job in jobs]
        mean = statistics.mean(row["taken"] for row in of.values())
        lines.append(f"| {rate:g}, {weight:g} | {mean:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def of_gaps(rows: list[dict]) -> str:
    """What `sever` leaves of a class beside what models have that never saw it."""
    lines = [
        "| data, classes | epochs | class | original | least likely kept class | retrained, mean (range) | `sever` − retrained | half way − retrained |",
        "|---" * 8 + "|",
    ]
    far: dict[str, list[float]] = {"sever": [], "half way": []}
    for row in rows:
        never = row["retrained"]
        mean = statistics.mean(never)
        values = " | ".join(f"{row[name]:+.1f}" for name in ("original", "least"))
        for rule, level in (("sever", row["rule"]), ("half way", row["least"] - row["original"] / 2)):
            far[rule].append(level - mean)
        lines.append(
            f"| {row['data']}, {row['classes']} | {row['epochs']} | {row['class']} | {values} | {mean:+.1f} ({min(never):+.1f} to {max(never):+.1f}) | "
            f"{far['sever'][-1]:+.1f} | {far['half way'][-1]:+.1f} |"
        )
    table = "\n".join(lines)
    size = {rule: statistics.mean(one**2 for one in errors) ** 0.5 for rule, errors in far.items()}
    return f"""How low a closed row lies (`python benchmarks/sever_gap.py`): log-odds of the label to all kept classes, means over the forget images, nats. `sever` takes the lower of two: as
likely as the original finds itself wrong, or as the least likely class that is kept. Models that never saw the class are what it should be: `sever` is {size["sever"]:.1f} nats from them (root
of the mean square). *Half way* is half of the original's log-odds below the least likely class that is kept, {size["half way"]:.1f} nats away; it was found on these very rows, nobody has explained it, and it is not what
is done.

{table}
"""


def of_language(rows: list[dict]) -> str:
    seeds = len({row["seed"] for row in rows})
    return f"""### Of language models

`python benchmarks/audit_language.py`: a small Llama that knows 200 people by heart, 20 of whom were to be forgotten ([the bench](language.md#forgetting-people-in-a-language-model)); with the rows of the others, all weights,
{seeds} training seed{"" if seeds == 1 else "s"}, five references. Who learnt to refuse still has what it does not say, so the right verdict is *suppressed*; of `npo` and `redirect` it is found out.

{verdicts(rows, OF_LANGUAGE)}

What told them apart, as above. Shares of 1 and AUCs.

{checks(rows, OF_LANGUAGE)}
"""


def of_generators(rows: list[dict]) -> str:
    """The same tables, of rows that keep each retrained model's value and PUL."""
    order = ("audited", "original", "retrained", "low", "high", "margin", "status")
    alike = []
    for row in rows:
        checks_of = {
            name: [statistics.mean(one[key]) if key == "retrained" else one[key] for key in order]
            for name, one in row["checks"].items()
        }
        alike.append(row | {"case": f"{row['family']} {row['case']}", "checks": checks_of, "mu": [row["residual_mu"]]})
    families = " and ".join(
        {"ddpm": "DDPM", "gan": "GAN"}[one] for one in dict.fromkeys(row["family"] for row in rows)
    )
    jobs = dict.fromkeys((row["class"], row["seed"]) for row in rows)
    by_class = ", ".join(f"class {forgotten} of seed {seed}" for forgotten, seed in jobs)
    return f"""### Of generators of images

`python benchmarks/audit_generators.py`: the digits' small {families}, five references a class; {by_class}. A classifier marks what shows the class.

{verdicts(alike, OF_GENERATORS)}

What told them apart, as above.

{checks(alike, OF_GENERATORS)}
"""


def render(results: dict, chosen: dict | None = None) -> str:
    rows = results["rows"]
    parts = [
        f"""## Verifying

`python benchmarks/audit_power.py`: the digits' ResNet, {len(rows)} audits of {len({row["seed"] for row in rows})} originals, of which up to four classes are forgotten, six references a class. What is planted
has a right verdict by construction; what methods get is found out, for one class of an original. Settings of random labels and ascent are those that were chosen for them
[there](classifiers.md#forgetting-a-class-from-its-own-examples).

{verdicts(rows)}

What told them apart: medians, and in how many audits a check was beyond its margin. Shares of 1; `margin_divergence` in nats.

{checks(rows)}
"""
    ]
    if results.get("power"):
        parts.append(
            f"""What fewer and more references would have said, ten draws of them each, class 3:

{power(results["power"])}
"""
        )
    if results.get("power_of_examples"):
        parts.append(
            f"""What fewer forget examples say, beside six references, class 3:

{power(results["power_of_examples"], "examples")}
"""
        )
    if chosen is not None:
        parts.append(
            f"""How PBU's rate and the weight of what `sever` asks of features were chosen (`python benchmarks/sever_choice.py`): other originals and classes, validation images. Of each
audit the check whose distance takes most of its margin, at its upper end, in units of the margin; 0 is a row that is closed alone. Weights from 0.3 to 3 at 2e-4 are nearly level, and the smallest was taken, which asks least of the rest. At 5e-4
models are sometimes too sure of what they should not know.

{choice(chosen["rows"])}
"""
        )
    return "\n".join(parts)
