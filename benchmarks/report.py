"""Writes docs/benchmarks.md, the pages of docs/benchmarks/, and the tables of other pages, from the JSON files in benchmarks/results/: no figure there is typed by hand.

python benchmarks/report.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import audit_report
import diffusion_report
import filter_report
import filter_text_to_image_report
import front_report
import gan_report
import influence_report
import language_report
import poison_report
import scaling_report
import smoothness_report
import text_to_image_report


HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "benchmarks.md"
FAMILIES = DOCUMENT.parent / "benchmarks"
LANGUAGE = HERE.parent / "docs" / "methods" / "language.md"
SCALING = DOCUMENT.parent / "scaling.md"
BEGIN, END = "<!-- from benchmarks/report.py -->", "<!-- to here -->"

METHODS = {
    "original": ("original", "—"),
    "retrain": ("retrained from scratch", "retained"),
    "finetune": ("fine-tuned on retained data", "retained"),
    "ascent": ("gradient ascent", "forget"),
    "random_labels": ("random labels", "forget"),
    "pbu_paper": ("PBU, paper preset, 3 epochs", "forget"),
    "pbu_paper_tuned": ("PBU, paper preset, chosen epoch", "forget"),
    "pbu": ("**PBU, our defaults**", "forget"),
}


def results(name: str) -> dict:
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def class_table(digits: dict) -> str:
    lines = [
        "| method | data it sees | forgotten class, mean / worst | other classes | against original, mean / worst run | "
        "worst class, mean over runs | against retrained | example-passes | time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method, (label, sees) in METHODS.items():
        if (row := digits["summary"].get(method)) is None:
            continue
        lines.append(
            f"| {label} | {sees} | {row['forget_mean']:.2f} / {row['forget_worst']:.1f} | {row['retain_mean']:.2f} | "
            f"{row['drop_mean']:+.2f} / {row['drop_worst']:+.2f} | {row['mean_class_drop_worst']:+.2f} | "
            f"{row['against_retrained']:+.2f} | {row['passes_relative']:.3f} | {row['seconds_relative']:.2f} |"
        )
    return "\n".join(lines)


def chosen(digits: dict) -> str:
    lines = ["| baseline | setting | epochs | validation, forgotten / others |", "|---|---|---|---|"]
    for method, best in digits["chosen"].items():
        lines.append(
            f"| {METHODS[method][0]} | {best['option']} | {best['epoch']} | "
            f"{100 * best['forget']:.1f} / {100 * best['retain']:.1f} |"
        )
    return "\n".join(lines)


def curve_table(digits: dict) -> str:
    original = statistics.mean(row["retain"] for row in digits["rows"] if row["method"] == "original")
    lines = [
        "| epochs | defaults: forgotten, mean / worst | defaults: others against original, mean / worst run | "
        "paper: forgotten | paper: others against original |",
        "|---|---|---|---|---|",
    ]
    base = [row["retain"] for row in digits["rows"] if row["method"] == "original"]
    for epoch, ours in digits["curve"]["pbu"].items():
        paper = digits["curve"]["pbu_paper"][epoch]
        drops = [100 * (after - before) for after, before in zip(ours["retain"], base, strict=True)]
        lines.append(
            f"| {epoch} | {100 * statistics.mean(ours['forget']):.2f} / {100 * max(ours['forget']):.1f} | "
            f"{statistics.mean(drops):+.2f} / {min(drops):+.2f} | {100 * statistics.mean(paper['forget']):.1f} | "
            f"{100 * (statistics.mean(paper['retain']) - original):+.2f} |"
        )
    return "\n".join(lines)


def fashion_table(fashion: dict) -> str:
    lines = [
        "| model | seed | forgotten class | other classes | example-passes / retraining |",
        "|---|---|---|---|---|",
    ]
    names = {"original": "original", "retrain": "retrained from scratch", "pbu": "**PBU, our defaults**"}
    for row in fashion["rows"]:
        passes = (
            f"{row['passes_relative']:.3f}" if "passes_relative" in row else "1" if row["method"] == "retrain" else "—"
        )
        lines.append(
            f"| {names[row['method']]} | {row['seed']} | {100 * row['forget']:.2f} | {100 * row['retain']:.2f} | {passes} |"
        )
    return "\n".join(lines)


def cost_table(cost: dict) -> str:
    lines = [
        "| model and batch | step | time / plain step | quartiles | extra peak memory / parameters |",
        "|---|---|---|---|---|",
    ]
    for workload, measured in cost["workloads"].items():
        for name, row in measured["rows"].items():
            low, high = row["time_ratio_quartiles"]
            lines.append(
                f"| {workload} | {name} | {row['time_ratio']:.3f} | {low:.3f}–{high:.3f} | "
                f"{row['extra_memory_in_parameters']:+.2f} |"
            )
    return "\n".join(lines)


def sharing_table(ways: dict) -> str:
    alone = ways["one process"]["peak"]
    rows = [f"| {way} | {row['peak']:.2f} | {row['peak'] / alone:.2f} |" for way, row in ways.items()]
    return "\n".join(["| | memory / weights | / that of one process |", "|---|---|---|", *rows])


def parts_table(found: dict) -> str:
    """What each part of PBU costs and earns: means over the jobs, medians of times."""
    originals = {(row["seed"], row["class"]): row for row in found["originals"]}
    lines = [
        "| variant | forgotten class, mean / worst | others against original, mean / worst run | relearnt | membership | steps | example-passes | time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["variant"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["variant"] == name]
        forgotten = [100 * row["forget"] for row in rows]
        drops = [100 * (row["retain"] - originals[row["seed"], row["class"]]["retain"]) for row in rows]
        relearnt, membership, steps, passes = (
            statistics.mean(row[key] for row in rows) for key in ("relearnt", "membership", "steps", "passes")
        )
        lines.append(
            f"| {name} | {statistics.mean(forgotten):.1f} / {max(forgotten):.1f} | {statistics.mean(drops):+.2f} / {min(drops):+.2f} | {100 * relearnt:.0f} % | "
            f"{membership:.2f} | {steps:.0f} | {passes:.3f} | {statistics.median(row['time'] for row in rows):.2f} |"
        )
    return "\n".join(lines)


def shares_table(found: dict) -> str:
    """Where the time of a job goes, in units of retraining."""
    shown = ("former defaults", "defaults")
    parts = list(dict.fromkeys(name for row in found["rows"] if row["variant"] in shown for name in row["parts"]))

    def share(variant: str, part: str) -> float:
        return statistics.mean(row["parts"].get(part, 0.0) for row in found["rows"] if row["variant"] == variant)

    lines = [f"| part | {' | '.join(shown)} |", "|---|---|---|"]
    parts.sort(key=lambda part: -share(shown[0], part))
    lines += [f"| {part} | {' | '.join(f'{share(name, part):.3f}' for name in shown)} |" for part in parts]
    return "\n".join(lines)


def sections() -> dict[str, list[str]]:
    """Pages of the families, and what stands on them."""
    classes, cost, imports = results("class_unlearning"), results("step_cost"), results("import_time")
    digits, fashion = classes["digits"], classes.get("fashion_mnist")
    found: dict[str, list[str]] = {page: [] for page in front_report.FAMILIES}
    found["classifiers"].append(
        f"""## Forgetting a class from its own examples

`python benchmarks/class_unlearning.py`: scikit-learn's digits (test: 450 images), a ResNet of 171,000 parameters, each of
{len(digits["classes"])} classes forgotten once for each of {len(digits["seeds"])} seeds. Accuracies are percent of test images, differences are points of percent.
*Example-passes* and *time* are relative to retraining; a pass without gradients counts a third, the exact Fisher one pass for each
class and example. Our defaults take ten epochs, here 40 steps, with the guard, whose looks are counted too; their
row was measured later, in time of the processor, from originals trained again, to which its differences are.

{class_table(digits)}

*Worst class, mean over runs*: the class whose accuracy changed most for the worse, averaged over all runs in which it was to be
kept. The runs of our defaults in which some kept class lost more than two points: {digits["summary"]["pbu"]["runs_with_a_class_below_-2"]} of {len(digits["classes"]) * len(digits["seeds"])} (a class has
about 45 test images, so one image is 2.2 points).

The settings of the baselines were chosen for them on validation images, retained ones among them, with a model of another seed:

{chosen(digits)}

### Over epochs, without the guard

Of the defaults until 2026-11 (batches of 64, with the Fisher anchor; else those of today): whether it holds when it goes on for long.

{curve_table(digits)}

![Test accuracy over epochs, our defaults and the paper's preset](pictures/class_unlearning.png)
"""
    )
    if (HERE / "results" / "forgetting_cost.json").is_file():
        costs = results("forgetting_cost")
        found["classifiers"].append(
            f"""## What each part of forgetting costs and earns

`python benchmarks/forgetting_cost.py`: {len(costs["originals"])} jobs on digits, of originals of other seeds than above, judged on the validation images, which the defaults were
chosen on. *Relearnt* is the best accuracy on the forgotten class in 20 steps on retained rows alone, *membership* the AUC of the loss, both as an
[audit](../audit.md) measures them. Passes and time (of the processor, one thread) are in units of retraining.

{parts_table(costs)}

Where that time goes, in the same unit:

{shares_table(costs)}
"""
        )
    if fashion:
        found["classifiers"].append(
            f"""## Confirmation on Fashion-MNIST

`python benchmarks/class_unlearning.py --fashion` (Debian package `dataset-fashion-mnist`): ResNet-18 (11.2 M parameters, 28 × 28),
six epochs of training, class "{fashion["class"]}" forgotten from its training images. The retrained model begins from the same initialisation as
the original of its seed. Measured with the defaults until 2026-11 (as above), 64 steps, a look of the guard every 16 and a Fisher of 64 examples; not
yet with those of today.

{fashion_table(fashion)}
"""
        )
    found["classifiers"].append(
        f"""## What a step costs

`python benchmarks/step_cost.py`: training step, clipping and AdamW on {cost["threads"]} threads, medians of {cost["rounds"]} interleaved rounds. Memory: what
the trainer holds beside model, gradients and optimiser, and the peak within a step, above stock Trainer's, in units of the
parameters. The anchor's cost is that of passing over the parameters, so its share falls as the rest of the step grows.

{cost_table(cost)}

`python benchmarks/import_time.py`: `import hf_unlearn` takes {imports["milliseconds"]:.1f} ms and {"imports" if imports["torch"] else "does not import"} torch.
"""
    )
    if all((HERE / "results" / f"diffusion_{name}.json").is_file() for name in ("unlearning", "cost")):
        diffusion, steps = results("diffusion_unlearning"), results("diffusion_cost")
        found["diffusion"].append(diffusion_report.render(diffusion, steps, cost_table(steps)))
    if all((HERE / "results" / f"gan_{name}.json").is_file() for name in ("unlearning", "cost")):
        steps = results("gan_cost")
        found["gans"].append(gan_report.render(results("gan_unlearning"), steps, cost_table(steps)))
    if all((HERE / "results" / f"{name}.json").is_file() for name in ("filter", "filter_cost")):
        found["filters"].append(filter_report.render(results("filter"), results("filter_cost")))
    if (HERE / "results" / "filter_text_to_image.json").is_file():
        found["filters"].append(filter_text_to_image_report.render(results("filter_text_to_image")))
    names = ("fidelity", "labels", "poison", "cost", "units")
    if all((HERE / "results" / f"influence_{name}.json").is_file() for name in names):
        later = (f"influence_{name}" for name in ("finished", "poison_hard"))
        last = [results(name) if (HERE / "results" / f"{name}.json").is_file() else None for name in later]
        found["influence"].append(influence_report.render(*(results(f"influence_{name}") for name in names), *last))
    for name in ("smoothness", "diffusion"):
        if (HERE / "results" / f"influence_{name}.json").is_file():
            found["influence"].append(getattr(smoothness_report, name)(results(f"influence_{name}")))
    names = ("unlearning", "tuning", "cost")
    if all((HERE / "results" / f"language_{name}.json").is_file() for name in names):
        found["language"].append(language_report.render(*(results(f"language_{name}") for name in names)))
    for name in ("passages", "requests"):
        if (HERE / "results" / f"language_{name}.json").is_file():
            found["language"].append(getattr(language_report, name)(results(f"language_{name}")["rows"]))
    if (HERE / "results" / "audit_power.json").is_file():
        there = (HERE / "results" / "sever_choice.json").is_file()
        found["audit"].append(audit_report.render(results("audit_power"), results("sever_choice") if there else None))
    if (HERE / "results" / "sever_gap.json").is_file():
        found["audit"].append(audit_report.of_gaps(results("sever_gap")["rows"]))
    for family in ("language", "generators"):
        if (HERE / "results" / f"audit_{family}.json").is_file():
            found["audit"].append(getattr(audit_report, f"of_{family}")(results(f"audit_{family}")["rows"]))
    if (HERE / "results" / "poison_unlearning.json").is_file():
        found["language"].append(poison_report.render(results("poison_unlearning")))
    if all((HERE / "results" / f"text_to_image{name}.json").is_file() for name in ("", "_tuning")):
        there = (HERE / "results" / "text_to_image_cost.json").is_file()
        costs = results("text_to_image_cost") if there else None
        bench = results("text_to_image_bench_coloured-digits-stable-diffusion-0-0")
        found["text_to_image"].append(
            text_to_image_report.render(
                results("text_to_image"),
                results("text_to_image_tuning"),
                costs,
                bench,
                results("text_to_image_defaults"),
            )
        )
    if (HERE / "results" / "sharing.json").is_file():
        found["language"].append(f"""## Memory of processes that share a model

`python benchmarks/sharing.py`: the most that a process held above what it held before the model was made, in multiples of the weights
({results("sharing")["one process"]["weights_mb"]:.0f} MB in float32; one thread each, on the CPU), while a Llama unlearns by NPO with an anchor: weights, original, gradients, AdamW's moments.

{sharing_table(results("sharing"))}
""")
    return {page: parts for page, parts in found.items() if parts}


def page(title: str, parts: list[str]) -> str:
    """A family's page."""
    head = f"""# {title}

From the [benchmarks](../benchmarks.md), written by `python benchmarks/report.py` from `benchmarks/results/*.json`. To measure again, run the script named at each
table; `--quick` gives a smaller version in under two minutes.
"""
    return "\n".join([head, *parts]).replace("](pictures/", "](../pictures/")


def pages() -> dict[Path, str]:
    """What the pages should be."""
    families = sections()
    found = {DOCUMENT: front_report.render(results, set(families))}
    for name, parts in families.items():
        found[FAMILIES / f"{name}.md"] = page(front_report.FAMILIES[name][0], parts)
    if (HERE / "results" / "language_unlearning.json").is_file():
        before, after = LANGUAGE.read_text().split(BEGIN)[0], LANGUAGE.read_text().split(END)[1]
        table = language_report.which(results("language_unlearning")["cells"])
        found[LANGUAGE] = f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"
    if all((HERE / "results" / f"{name}.json").is_file() for name in ("growth", "shapes")):
        known = {name: (HERE / "results" / f"{name}.json").is_file() for name in ("estimate_parts", "gpu")}
        more = (results(name) if there else None for name, there in known.items())
        found[SCALING] = scaling_report.render(results("growth"), results("shapes"), results("influence_cost"), *more)
    return found


def write() -> None:
    for file, text in pages().items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)


if __name__ == "__main__":
    write()
