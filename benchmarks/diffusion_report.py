"""The page's part on diffusion models, written from results/diffusion_unlearning.json and results/diffusion_cost.json."""

from __future__ import annotations


def table(results: dict) -> str:
    lines = [
        "| method | data it sees | runs | PUL, mean / worst | u-FID, mean / worst | coverage | shift of the others | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    labels = {
        "original": ["original", "—"],
        "retrain": ["retrained without the class", "retained"],
    } | results["labels"]
    for name, row in results["summary"].items():
        label, sees = labels[name]
        seconds = f"{row['seconds']:.0f}" if row["seconds"] else "—"
        lines.append(
            f"| {label} | {sees} | {row['runs']} | {row['pul']:.1f} / {row['pul_worst']:.1f} | "
            f"{row['fid']:.2f} / {row['fid_worst']:.2f} | {row['coverage']:.2f} | {row['shift']:.1f} % | {seconds} |"
        )
    return "\n".join(lines)


def by_class(results: dict) -> str:
    methods = {"original": "original", "vdu": "**ours**", "npo_replay": "NPO with replay", "retrain": "retrained"}
    lines = [
        "| class | seed | drawn before | " + " | ".join(f"{label}: PUL / u-FID" for label in methods.values()) + " |",
        "|---" * (3 + len(methods)) + "|",
    ]
    runs = {(row["method"], row["seed"], row["class"]): row for row in results["runs"]}
    for seed in results["seeds"]:
        for forgotten in results["classes"]:
            rows = [runs.get((method, seed, forgotten)) for method in methods]
            cells = " | ".join(f"{row['pul']:.1f} / {row['fid']:.2f}" if row else "—" for row in rows)
            lines.append(f"| {forgotten} | {seed} | {rows[0]['before']} | {cells} |")
    return "\n".join(lines)


def chosen(results: dict) -> str:
    settings = {}
    for name, option in results["chosen"].items():
        best = [row for row in results["tuning"]["tried"] if row["method"] == name and row["option"] == option]
        told = ", ".join(f"{key} {value:g}" for key, value in option.items())
        settings[name] = (told, f"{best[0]['pul']:.1f} / {best[0]['fid']:.2f}" if best else "as with 8 checkpoints")
    lines = ["| method | setting chosen | PUL / u-FID there |", "|---|---|---|"]
    for name, (label, _) in results["labels"].items():
        if name in settings:
            lines.append(f"| {label} | {settings[name][0]} | {settings[name][1]} |")
    return "\n".join(lines)


def curve(results: dict) -> str:
    steps = [row["step"] for row in results["curve"][0]["rows"]]
    lines = [
        "| method, class | " + " | ".join(f"{step} steps" for step in steps) + " |",
        "|---" * (len(steps) + 1) + "|",
    ]
    for run in results["curve"]:
        cells = " | ".join(f"{row['pul']:.0f} / {row['fid']:.1f}" for row in run["rows"])
        lines.append(f"| {results['labels'][run['method']][0]}, {run['class']} | {cells} |")
    return "\n".join(lines)


def fashion_table(fashion: dict) -> str:
    names = {1: "trouser", 6: "shirt"}
    labels = {"original": "original", "vdu": "**VDU, our defaults**", "retrain": "retrained without the class"}
    lines = [
        "| class | model | drawn before | left | PUL | u-FID | coverage | shift of the others |",
        "|---" * 8 + "|",
    ]
    for row in sorted(fashion["runs"], key=lambda row: row["class"]):
        lines.append(
            f"| {names[row['class']]} | {labels[row['method']]} | {row['before']} | {row['left']} | {row['pul']:.1f} | "
            f"{row['fid']:.2f} | {row['coverage']:.2f} | {row['shift']:.1f} % |"
        )
    return "\n".join(lines)


def render(results: dict, cost: dict, cost_table: str) -> str:
    tuned = results["tuning"]
    text = f"""## Forgetting a class of a diffusion model

`python benchmarks/diffusion_unlearning.py`: U-Nets of 0.6 M parameters that draw scikit-learn's digits at 8 × 8, classes
{", ".join(str(value) for value in results["classes"])} forgotten from their training images alone, {results["steps"]} steps. {results["samples"]:,} samples by DDIM, from the same noise for all models
of a seed, as a classifier sees them that no method was given; u-FID is the Fréchet distance, in that classifier's features, to all real
images *without* the forgotten class (so the original's own is large). *Shift*: total variation between the shares of the other classes
before and after. This table is of seed {results["seeds"][0]}; a second seed is below.

{table(results)}

Every method but ours (which runs with its defaults) was tuned: on the model of seed {tuned["seed"]}, class {tuned["class"]}, the setting of lowest u-FID:

{chosen(results)}

Class by class:

{by_class(results)}

![samples of the original](pictures/diffusion_digits_original.png)

![samples of the unlearned model](pictures/diffusion_digits_unlearned.png)

![samples of the retrained model](pictures/diffusion_digits_retrained.png)

*64 samples each, from the same noise: the original, the same model after forgetting the {results["classes"][0]}, and one retrained without it.*
"""
    if "curve" in results:
        text += f"""
### Over steps, without the guard

PUL / u-FID at up to ten times the default number of steps:

{curve(results)}

![PUL over steps](pictures/diffusion_unlearning_pul.png)

![u-FID over steps, cut at 40](pictures/diffusion_unlearning_fid.png)
"""
    if fashion := results.get("fashion_mnist"):
        text += f"""
### Confirmation on Fashion-MNIST

`python benchmarks/diffusion_unlearning.py --fashion` (Debian package `dataset-fashion-mnist`): a U-Net of the same kind at 16 × 16,
{fashion["images"]} forget images, the defaults; {fashion["samples"]} samples.

{fashion_table(fashion)}
"""
    text += f"""
### What a step costs

`python benchmarks/diffusion_cost.py`, on {cost["threads"]} threads, {cost["rounds"]} interleaved rounds, as for classifiers above. Every step denoises 64
images: the default's are 32 forget images and 32 of the original's own samples.

{cost_table}
"""
    return text
