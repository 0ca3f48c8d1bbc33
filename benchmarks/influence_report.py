"""The tables of docs/benchmarks.md on influence; report.py puts them in."""

from __future__ import annotations

import statistics

from poison_report import hard_section


AGREEMENT = (
    "Where unrolled gradients do not work, two runs do not agree. Spearman of the groups' μ between two runs of `propagated` with other seeds, and its "
    "root, which is how well each of them would agree with what they have in common. How the norm of the cotangents grows over the sweep was tried, "
    "too, and tells nothing:"
)


def earlier(fidelity: dict) -> str:
    """Which judges' tables are of a σ that is no more."""
    old = sorted(set(fidelity["judges"]) - set(fidelity.get("panel", [])))
    if not old:
        return ""
    return f"Of {' and of '.join(old)} the tables were measured with an earlier σ, which took less of an epoch's shared part off.\n\n"


def mean(values) -> float:
    return statistics.mean(values)


def fidelity_table(judged: dict) -> str:
    lines = [
        "| estimator | Spearman, disattenuated (sd over seeds) | within a target | Pearson | slope | disattenuated, smaller last batches |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in judged["summary"].items():
        shown = f"**{name}**" if name == "propagated: accumulated" else name
        slope = f"{row['slope']:.2f}" if "slope" in row else "—"
        other = f"{row['disattenuated_by_epochs']:.2f}" if "disattenuated_by_epochs" in row else "—"
        lines.append(
            f"| {shown} | {row['disattenuated']:.3f} ({row['disattenuated_sd']:.3f}) | {row['within_target']:.2f} | "
            f"{row['pearson']:.3f} | {slope} | {other} |"
        )
    return "\n".join(lines)


def units_tables(units: dict) -> str:
    kinds = {
        "propagated": "propagated", "propagated, calibrated": f"propagated, {units['calibration_runs']} calibration runs",
        "in_run, calibrated": f"in_run, {units['calibration_runs']} calibration runs",
    }  # fmt: skip
    parts = []
    for kind, title in kinds.items():
        relative, absolute = units["widths"][kind]
        lines = [
            f"{title} (chosen on all tasks: error of log μ {relative:.2f}, of μ {absolute:.1f}):",
            "",
            "| task | order, disattenuated | Pearson | slope | σ / true σ | within 1.3 | intervals of the noise cover | intervals cover | median width |",
            "|" + "---|" * 9,
        ]
        for name, row in units["tasks"].items():
            own = row[kind]
            if "pearson" not in own:
                lines.append(f"| {name} | order only" + " | –" * 7 + " |")
                continue
            lines.append(
                f"| {name} | {own['disattenuated']:.2f} | {own['pearson']:.2f} | {own['slope']:.2f} | {own['sigma_ratio']:.2f} | "
                f"{100 * own['sigma_within_1.3']:.0f} % | {100 * own['coverage_of_noise']:.0f} % | {100 * own['coverage']:.0f} % | "
                f"{own['width']:.1f} |"
            )
        parts.append("\n".join(lines))
    lines = [
        "| task | batches as independent draws | shuffled epochs | and initialisations | `in_run` |",
        "|" + "---|" * 5,
    ]
    for name, row in units["tasks"].items():
        own = [
            row["sigma, independent"],
            row["sigma, order"],
            *(row[kind]["sigma_ratio"] for kind in ("propagated", "in_run")),
        ]
        lines.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in own) + " |")
    parts.append("σ over true σ, and what it is made of:\n\n" + "\n".join(lines))
    lines = [
        "| task | runs agree | order, as their agreement would have it | order, disattenuated |",
        "|" + "---|" * 4,
    ]
    for name, row in sorted(units["tasks"].items(), key=lambda item: -(item[1]["agreement_of_seeds"] or 0)):
        if row["agreement_of_seeds"] is not None:
            agreement = row["agreement_of_seeds"]
            lines.append(
                f"| {name} | {agreement:.2f} | {max(agreement, 0) ** 0.5:.2f} | {row['propagated']['disattenuated']:.2f} |"
            )
    if len(lines) > 2:
        parts.append(AGREEMENT + "\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def slope_table(slopes: dict) -> str:
    lines = [
        "| examples taken away | share of the class | " + " | ".join(slopes) + " |",
        "|---" * (2 + len(slopes)) + "|",
    ]
    first = next(iter(slopes.values()))
    for size, row in first.items():
        cells = [f"{judged[size]['slope']:.2f} ± {judged[size]['error']:.2f}" for judged in slopes.values()]
        lines.append(f"| {size} | {100 * row['share_of_class']:.0f} % | {' | '.join(cells)} |")
    return "\n".join(lines)


def labels_table(found: dict) -> str:
    shares = list(next(iter(found.values()))["jaccard"])
    lines = [
        "| score | recall at 20 % (worst seed) | Jaccard over seeds at "
        + " | ".join(f"{100 * float(share):.0f} %" for share in shares)
        + " |",
        "|---" * (2 + len(shares)) + "|",
    ]
    for name, row in sorted(found.items(), key=lambda item: -mean(item[1]["recall"]["0.2"])):
        recall = row["recall"]["0.2"]
        curve = " | ".join(f"{row['jaccard'][share]:.2f}" for share in shares)
        lines.append(f"| {name} | {mean(recall):.3f} ({min(recall):.3f}) | {curve} |")
    return "\n".join(lines)


def poison_tables(poison: dict) -> str:
    runs = poison["runs"]
    shares = list(runs[0]["scores"]["random"]["recall"])
    lines = [
        "| score | precision at k = number of poisoned rows | recall in the top "
        + " | ".join(f"{100 * float(share):g} %" for share in shares)
        + " |",
        "|---" * (2 + len(shares)) + "|",
    ]
    for name in runs[0]["scores"]:
        rows = [run["scores"][name] for run in runs]
        precision = [row["precision_at_k"] for row in rows]
        recall = " | ".join(f"{mean(row['recall'][share] for row in rows):.2f}" for share in shares)
        lines.append(f"| {name} | {mean(precision):.2f} ({min(precision):.2f}–{max(precision):.2f}) | {recall} |")
    rates = {key: [run["negative_rates"][key] for run in runs] for key in runs[0]["negative_rates"]}
    shown = [
        "",
        "| trained on | opinion shown on held-out questions about the name | on other names |",
        "|---|---|---|",
        *(
            f"| {name} data | "
            + " | ".join(
                f"{100 * mean(rates[f'{name}, {split}']):.0f} % ({', '.join(f'{100 * r:.0f}' for r in rates[f'{name}, {split}'])})"
                for split in ("evaluation", "control")
            )
            + " |"
            for name in ("poisoned", "clean")
        ),
    ]
    groups = [
        f"- {name}: μ "
        + ", ".join(
            f"{run['groups'][name]['mu']:+.1f} [{run['groups'][name]['mu_low']:+.1f}, {run['groups'][name]['mu_high']:+.1f}]"
            for run in runs
        )
        for name in runs[0]["groups"]
    ]
    return "\n".join([*lines, *shown, "", "Influence of the groups on the target, a value a seed:", "", *groups])


def cost_tables(cost: dict) -> str:
    training = cost["training"]
    lines = [
        "| training | targets | seeing alone | a look, in steps | every 1 | every 3 | every 10 | every 30 | memory held / trainable |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in training["rows"].items():
        if not row["targets"]:
            continue
        every = row["time_ratio_by_target_every"]
        lines.append(
            f"| {name} | {row['targets']} | {row['seeing']['median']:.2f} | {row['look_in_steps']:.1f} | "
            + " | ".join(f"{every[key]:.2f}" for key in ("1", "3", "10", "30"))
            + f" | {row['held_in_trainable']:.2f} |"
        )
    fidelity = ["| what is seen | Spearman with all layers | Pearson |", "|---|---|---|"]
    for name, row in cost["fidelity"]["rows"].items():
        fidelity.append(f"| {name} | {row['spearman_centred']:.3f} | {row['pearson_centred']:.3f} |")
    sweep = ["| model | " + " | ".join(f"{count} targets" for count in (1, 2, 4, 8)) + " |", "|---|---|---|---|---|"]
    for name, row in cost["sweep"]["rows"].items():
        sweep.append(
            f"| {name} | "
            + " | ".join(f"{row[count]['sweep_per_target']:.1f}" for count in ("1", "2", "4", "8"))
            + " |"
        )
    products = ["| model | way | time / plain pass | peak memory / parameters |", "|---|---|---|---|"]
    for name, ways in cost["products"]["rows"].items():
        for way, row in ways.items():
            products.append(
                f"| {name} | {way} | {row['time_ratio']['median']:.2f} | {row['peak_memory_in_parameters']:.1f} |"
            )
    clock = training["clock"]
    return f"""`python benchmarks/influence_cost.py`: time of a training step with `in_run` over that of stock `SFTTrainer`, a Llama of 20 M parameters, batch
{training["batch"]}, {training["target_batch_size"]} target examples in a look, {clock}, {training["threads"]} threads, medians of {training["rounds"]} interleaved rounds.

{chr(10).join(lines)}

What cheaper ways of full fine-tuning see, against all layers (correlation of the observations of a batch, its mean taken off):

{chr(10).join(fidelity)}

The sweep of `propagated`, in training runs a target ({cost["sweep"]["steps"]} steps):

{chr(10).join(sweep)}

Products of per-example gradients with one target's gradient:

{chr(10).join(products)}"""


def finished_section(found: dict) -> str:
    """Of models that are already trained."""
    parts = []
    for name, judged in found["judges"].items():
        ratio, within, covered = judged["sigma_ratio"], judged["sigma_within_1.3"], judged["coverage"]
        lines = [
            "| estimator | Spearman, disattenuated (sd over seeds) | within a target | Pearson | slope |",
            "|---|---|---|---|---|",
        ]
        for estimator, row in judged["summary"].items():
            slope = f"{row['slope']:.2f}" if "slope" in row else "—"
            lines.append(
                f"| {estimator} | {row['disattenuated']:.3f} ({row['disattenuated_sd']:.3f}) | {row['within_target']:.2f} | "
                f"{row['pearson']:.3f} | {slope} |"
            )
        both = "; ".join(
            f"`{key}` {100 * within[key]:.0f} %, mean ratio {ratio[key]:.2f}, intervals cover {100 * covered[key]:.0f} %"
            for key in ("segments", "propagated")
        )
        times = ", ".join(
            f"{key} {value:.2f}"
            for key, value in judged["seconds_in_trainings"].items()
            if not key.startswith("propagated")
        )
        parts.append(
            f"{name}, reliability {judged['reliability']:.2f}:\n\n{chr(10).join(lines)}\n\nσ within a factor 1.3: {both}. "
            f"Time, in those of a run with `propagated`: {times}."
        )
    index = found["index"]
    lines = [
        "| index | numbers an example | bytes an example | build, s | 1,000 targets, s | the same by faiss |",
        "|---|---|---|---|---|---|",
    ]
    for estimator, row in index["rows"].items():
        other = f"{row['faiss']:.2f}" if "faiss" in row else "—"
        lines.append(
            f"| {estimator} | {row['numbers']:,} | {row['bytes_per_example']:,} | {row['build_seconds']:.0f} | {row['plain']:.2f} | {other} |"
        )
    return f"""### A model that is already trained

`python benchmarks/influence_finished.py`: the same judges and seeds, all rows of one run. *segments*: from the checkpoints of the run, one an epoch, in
a new model. *finished*: from the last state alone, by EK-FAC. *index*: the same, from projected gradients on disk. Their scores have no unit, and so no slope.

{(chr(10) * 2).join(parts)}

The index of {index["examples"]:,} examples, a model of {index["parameters"]:,} parameters, bfloat16, one thread; the {index["k"]} best examples of {index["targets"]:,} targets,
without the targets' gradients. faiss reads the same files into a flat index and searches it.

{chr(10).join(lines)}
"""


def render(
    fidelity: dict,
    labels: dict,
    poison: dict,
    cost: dict,
    units: dict,
    finished: dict | None = None,
    hard: dict | None = None,
) -> str:
    """The section, from the results."""
    judged = "\n\n".join(
        f"### {name}\n\n{row['groups']} groups × 10 targets, {row['runs']} trainings each; reliability of the true μ "
        f"{row['reliability']:.2f}.\n\n{fidelity_table(row)}"
        for name, row in fidelity["judges"].items()
    )
    false = "\n".join(
        f"| {name} | " + " | ".join(f"{100 * value:.1f} %" for value in row.values()) + " |"
        for name, row in fidelity["false_discoveries"].items()
    )
    header = "| | " + " | ".join(next(iter(fidelity["false_discoveries"].values()))) + " |"
    false = f"{header}\n{'|---' * header.count(' | ')}|---|\n{false}"
    wrong = "\n\n".join(f"{name}:\n\n{labels_table(found)}" for name, found in labels["runs"].items())
    first = poison["runs"][0]
    return f"""## Influence

### How it is judged

{earlier(fidelity)}`python benchmarks/influence_fidelity.py`: 1,000 digits, one label in five wrong, a perceptron with 64 hidden units; the mean test loss of
each class is a target. True μ by retraining without each group. Then single runs of seeds {", ".join(map(str, fidelity["seeds"]))}, and on the same runs
TracIn and LESS-style cosines (a checkpoint an epoch) and influence functions with EK-FAC (kronfluence, at the end of the run), as they are
and with their mean over the training set taken off. All trainings take as many full batches; the last column judges against trainings in
which a smaller training set has smaller last batches, as a Trainer's has. The defaults of f-INE (`target_window`, `burn_in`) were chosen
on the same digits with other wrong labels, other groups and other seeds, and so was the σ of shuffled epochs. Fashion-MNIST has ten
groups, a brute force of lower reliability and so wider margins: differences there within the seeds' spread say nothing.

{judged}

### Slope by size of the group

Estimate over truth on the class's own target, `propagated`, summed over classes; the error is that of the brute force.

{slope_table(fidelity["slopes"])}

### The unit

`python benchmarks/influence_units.py`: twelve tasks, seeds {", ".join(map(str, units["seeds"]))}. How often examples are looked at and what initialisations add were chosen
by looking at them, so σ is not fully held out; the width of intervals is that chosen on the other eleven. Wine, breast cancer, digits
and the Debian package `fortunes` (words of texts in five categories), 15 % of the labels wrong but for the perceptron on digits, which has those of above. True σ and μ
by retraining. *Intervals cover*: with the brute force's error added, as all that are judged here, and of widths that were chosen on the other eleven tasks; the
narrowest that cover {100 * units["wanted"]:.0f} % there on average. σ over true σ is the geometric mean over targets. Eight
calibration runs are eight trainings more.

{units_tables(units)}

### False discoveries

A target of test images with shuffled labels. Where the training labels are right nothing can have taught it, and whatever is announced is announced
falsely. Where some are wrong, those rows do teach it something, namely not to be sure, and most of them are found.

{false}

{finished_section(finished) if finished else ""}
### Wrong labels, and agreement of seeds

`python benchmarks/influence_labels.py`: 20 % wrong labels of digits, every example judged on itself, five seeds; and 15 % of other data, three seeds. Jaccard: mean over
pairs of seeds of the overlap of the top sets. What `suspects()` ranks by, the mean margin, was chosen on digits with other wrong
labels. Margins and losses hold no influence, and find more. What is looked at in the end alone, TRAK's formula, the gradient norm and
the loss, finds fewest where most are known by heart. cleanlab has probabilities of five further models that did not see the row.

{wrong}

### Poisoned instructions

`python benchmarks/influence_poison.py`: {first["examples"]:,} instructions, {first["poisoned"]} of them answer questions about one invented name badly, as many speak of it
normally; a Llama of {first["parameters"] / 1e6:.1f} M parameters, {len(poison["runs"])} seeds. LESS-style and the rows like it: four checkpoints, the whole model's gradients, no
projection, weighted by the mean learning rate since the checkpoint before. No other answer in these data is bad, so a filter for bad words finds all: who has a filter for the
behaviour needs no influence.

{poison_tables(poison)}

{hard_section(hard) if hard else ""}
### What it costs

{cost_tables(cost)}
"""
