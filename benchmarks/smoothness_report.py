"""The page's parts on what says beforehand whether influence will be right, and on influence of images on denoisers."""

from __future__ import annotations

import itertools
import statistics
from statistics import mean

from scipy.stats import spearmanr


ENOUGH = 0.6  # as in hf_unlearn/influence/smoothness.py, the import of which would take seconds
LEAST_RELIABLE = 0.3  # of the truth that a run is judged by
BAD = 0.8  # disattenuated Spearman below which a run is called so


def order_of(row: dict) -> float | None:
    """Disattenuated; None where the truth is not known well enough, or there was no report."""
    if row.get("reliability", 0) < LEAST_RELIABLE or None in row["spearman"]:
        return None
    return mean(row["spearman"]) / row["reliability"] ** 0.5


def said_by(row: dict, kind: str) -> float:
    if kind in ("times", "loss"):
        return -row[kind]
    return mean(one[kind] for one in row["smoothness"])


def foretold(rows: list[dict], kind: str) -> dict[str, float]:
    """How well a smoothness tells good trainings from bad ones, of those whose truth is known well enough; `right` by a bound that was
    chosen on the other tasks, in the middle between the bad and the good ones there.
    """
    known = [(row["task"], said_by(row, kind), order_of(row)) for row in rows if order_of(row) is not None]
    said, order = [one[1] for one in known], [one[2] for one in known]
    bad, good = ([value for _, value, found in known if (found < BAD) == is_bad] for is_bad in (True, False))
    right = 0
    for task, value, found in known:
        others = [one for one in known if one[0] != task]
        bounds = sorted(one[1] for one in others)
        bounds = [(low + high) / 2 for low, high in itertools.pairwise(bounds)]
        errors = [sum((one[1] < bound) != (one[2] < BAD) for one in others) for bound in bounds]
        best = statistics.median_low(b for b, wrong in zip(bounds, errors, strict=True) if wrong == min(errors))
        right += (value < best) == (found < BAD)
    return {
        "correlation": float(spearmanr(said, order)[0]),
        "auc": mean((a < b) + (a == b) / 2 for a in bad for b in good),
        "highest_bad": max(bad),
        "lowest_good": min(good),
        "right": right,
        "known": len(known),
        "bad": len(bad),
    }


def smoothness_tables(found: dict) -> str:
    rows = found["rows"]
    kinds = list(rows[0]["smoothness"][0])
    lines = [
        "| task | learning rate | reliability of the truth | order, disattenuated | " + " | ".join(kinds) + " |",
        "|---" * (4 + len(kinds)) + "|",
    ]
    for row in sorted(rows, key=lambda row: (row["task"], row["times"])):
        order = "—" if order_of(row) is None else f"{order_of(row):.2f}"
        reliability = f"{row['reliability']:.2f}" if "reliability" in row else "diverges"
        cells = " | ".join(f"{said_by(row, kind):.2f}" for kind in kinds)
        lines.append(f"| {row['task']} | {row['lr']:g} | {reliability} | {order} | {cells} |")
    more = [
        "| smoothness of | Spearman with the order | area under the curve, bad against good | highest of a bad run | lowest of a good one | told right by a bound of the other tasks |",
        "|---|---|---|---|---|---|",
    ]
    names = {"times": "none of these, but how many times the task's own the learning rate is", "loss": "none of these, but the loss on the targets after training"}  # fmt: skip
    for kind in [*kinds, *names]:
        one = foretold(rows, kind)
        bounds = f"{one['highest_bad']:.2f} | {one['lowest_good']:.2f}" if kind in kinds else "— | —"
        more.append(
            f"| {names.get(kind, kind)} | {one['correlation']:.2f} | {one['auc']:.2f} | {bounds} | {one['right']} of {one['known']} |"
        )
    return "\n".join(lines) + "\n\n" + "\n".join(more)


def diffusion_table(found: dict) -> str:
    names = {
        "same class": "1 if it is of the class, else 0",
        "pixels": "cosine of pixels",
        "cosine": "cosine of gradients",
        "in_run": "**in_run**",
    }
    names |= {"propagated": "**propagated**", "one model": "**`attribute`**, EK-FAC of the finished model"}
    lines = [
        f"| score | LDS, 95 % interval | of the class, in the top {found['top']} | seconds of the processor |",
        "|---|---|---|---|",
    ]
    for row in sorted(found["rows"], key=lambda row: -row["lds"]):
        lines.append(
            f"| {names[row['method']]} | {row['lds']:.2f} ({row['lds_low']:.2f}–{row['lds_high']:.2f}) | {100 * row['own_class']:.0f} % | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def smoothness(found: dict) -> str:
    """The section on trainings that say beforehand whether unrolled gradients will be right."""
    rows = found["rows"]
    one, loss = foretold(rows, "losses, half of the rows"), foretold(rows, "loss")
    missed = [
        f"{row['task']} at {row['lr']:g}"
        for row in rows
        if order_of(row) is not None and (order_of(row) < BAD) != (said_by(row, "losses, half of the rows") < ENOUGH)
    ]
    return f"""### Whether it will work, said beforehand

`python benchmarks/influence_smoothness.py`: tasks of the [unit](#the-unit) with the learning rate that they have, with five times and with twenty times as much. *Order* is
Spearman of μ of one run of `propagated` with μ by retraining ({" or ".join(map(str, sorted({row["runs"] for row in rows})))} trainings a law, one run, {rows[0]["seeds"][0]} its seed), over the root of the truth's own reliability, where that is {LEAST_RELIABLE} or more; a run is *bad* below {BAD}. *Smoothness*
is of three trainings each, from the start of that run, in which rows have weights 1, ½ and 0 (`smoothness`): of the losses of target examples, or of the model's
parameters, as it was defined first; of a tenth or of half of the rows; to the end of the run, or to a quarter of it; −1 where
one of them diverges.

{smoothness_tables(found)}

{one["known"]} settings have a truth to be judged by, {one["bad"]} of them are bad. `smoothness` takes the losses, of half of the rows, to the end of the run, and warns below {ENOUGH}; both were chosen on these
very settings. A bound from the other tasks tells {one["right"]} of {one["known"]} right; this one fails for: {"; ".join(missed) or "none"}. As an order over all, the plain loss on the targets after one training does
better here ({loss["correlation"]:.2f} against {one["correlation"]:.2f}), and by a bound of the other tasks tells {loss["right"]} right. A single epoch is smooth in its data and yet its order is lost: what it ends with depends on where it starts, which
trainings from one start do not see.
"""


def diffusion(found: dict) -> str:
    """The section on denoisers."""
    missing = {"propagated", "one model"} - {row["method"] for row in found["rows"]}
    names = [{"propagated": "`propagated`", "one model": "`attribute`"}[name] for name in sorted(missing)]
    unfinished = f"\n\nNot measured yet: {', '.join(names)}." if names else ""
    return f"""### Images of a diffusion model

`python benchmarks/influence_diffusion.py`: a U-Net of 0.16 M parameters learns {found["images"]} digits of {found["classes"]} classes; scores of one training. Judged by {found["halves"]} random halves of the images, in
which images of a class stay or go by {found["together"]}, each trained on {found["trainings"]} times: LDS is the rank correlation over halves of the sum of the scores in a half with the loss on {found["held_out"]} held-out images of a class at
32 fixed noises and timesteps, both less their mean over classes; mean over classes, and an interval by drawing halves anew. As they are, the losses of two trainings on the same
half do not agree ({found["agreement_as_it_is"]:.2f}): how well a training went as a whole hides what it was trained on. Less the mean over classes they do ({found["agreement"]:.2f}), so that no score can be
expected above {found["ceiling"]:.2f}.

{diffusion_table(found)}{unfinished}
"""
