"""The page's part on GANs, written from results/gan_unlearning.json and results/gan_cost.json."""

from __future__ import annotations


def table(results: dict, marks: int) -> str:
    lines = [
        "| method | PUL, mean / worst | FID, mean / worst | FID / original's, mean / worst | Ret-FID | coverage | shift of the others |",
        "|---" * 7 + "|",
    ]
    labels = {"original": "original", "retrain": "retrained without the class"} | results["labels"]
    for name, label in labels.items():
        row = results["summary"].get(name if name in ("original", "retrain") else f"{name} {marks}")
        if row is None:
            continue
        lines.append(
            f"| {label} | {row['pul']:.1f} / {row['pul_worst']:.1f} | {row['fid']:.2f} / {row['fid_worst']:.2f} | "
            f"{row['fid_ratio']:.2f} / {row['fid_ratio_worst']:.2f} | {row['ret_fid']:.2f} | {row['coverage']:.2f} | "
            f"{row['shift']:.1f} % |"
        )
    return "\n".join(lines)


def by_class(results: dict) -> str:
    columns = [
        ("retrain", 0),
        *(("ours", marks) for marks in (20, 100)),
        *(("el2", marks) for marks in (20, 100)),
    ]
    heads = ["retrained", "**ours**, 20 marks", "**ours**, 100", "EL2, 20", "EL2, 100"]
    lines = [
        "| class | seed | drawn before | " + " | ".join(f"{head}: PUL / FID" for head in heads) + " |",
        "|---" * (3 + len(heads)) + "|",
    ]
    runs = {(row["method"], row["marks"], row["seed"], row["class"]): row for row in results["runs"]}
    for seed in results["seeds"]:
        for forgotten in results["classes"]:
            rows = [runs.get((*column, seed, forgotten)) for column in columns]
            cells = " | ".join(f"{row['pul']:.1f} / {row['fid']:.2f}" if row else "—" for row in rows)
            lines.append(f"| {forgotten} | {seed} | {rows[0]['before']} | {cells} |")
    return "\n".join(lines)


def chosen(results: dict) -> str:
    lines = ["| method | 20 marks | 100 marks |", "|---|---|---|"]
    for name, options in results["chosen"].items():
        cells = [", ".join(f"{key} {value:g}" for key, value in options[marks].items()) for marks in ("20", "100")]
        lines.append(f"| {results['labels'][name]} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def sensitivity(results: dict) -> str:
    classes = sorted({row["class"] for row in results["sensitivity"]})
    lines = [
        "| setting | value | " + " | ".join(f"class {forgotten}: PUL / FID" for forgotten in classes) + " |",
        "|---" * (2 + len(classes)) + "|",
    ]
    groups: dict[tuple, dict[int, dict]] = {}
    for row in results["sensitivity"]:
        groups.setdefault((row["what"], row["value"]), {})[row["class"]] = row
    for (what, value), rows in groups.items():
        cells = " | ".join(f"{rows[c]['pul']:.1f} / {rows[c]['fid']:.2f}" for c in classes)
        lines.append(f"| {what} | {value:g} | {cells} |")
    return "\n".join(lines)


def fashion_table(fashion: dict, labels: dict) -> str:
    names = {"original": "original", "retrain": "retrained without the class"} | labels
    lines = [
        "| model | left of those drawn before | PUL | FID | Ret-FID | coverage | shift of the others |",
        "|---" * 7 + "|",
    ]
    for row in fashion["runs"]:
        ret_fid = f"{row['ret_fid']:.2f}" if "ret_fid" in row else "—"
        lines.append(
            f"| {names[row['method']]} | {row['left']} of {row['before']} | {row['pul']:.1f} | {row['fid']:.2f} | {ret_fid} | "
            f"{row['coverage']:.2f} | {row['shift']:.1f} % |"
        )
    return "\n".join(lines)


def render(results: dict, cost: dict, cost_table: str) -> str:
    originals = ", ".join(f"{value:.2f} (seed {seed})" for seed, value in results["originals"].items())
    classes = ", ".join(str(value) for value in results["classes"])
    tuned = ", ".join(f"{forgotten}" for _, forgotten in results["tuning"]["on"])
    text = f"""## Forgetting a class of a GAN

`python benchmarks/gan_unlearning.py`: DCGANs (170,000 parameters in both players) that draw scikit-learn's digits at 8 × 8, classes {classes}
forgotten, for GANs of {len(results["seeds"])} seeds. No method gets training data. A classifier plays the user: it looks at samples until it has seen so many
of the undesired class; those are the negative marks, and all others it has seen, about nine times as many, the positive ones. What is
drawn after, {results["samples"]:,} images from the same latents, is judged by another classifier. FID is the Fréchet distance in its features to all real
images *without* the class; the original's own, to all real images, is {originals}. Ret-FID: to 5,000 samples of the GAN retrained without the class.
*Shift*: total variation between the shares of the other classes before and after. The two tables are means over the classes for the GAN of seed
{results["seeds"][0]}; seed {results["seeds"][1]} is in the table by class.

With 20 negative marks:

{table(results, 20)}

With 100:

{table(results, 100)}

The rows "ours" run with the defaults. All others were tuned on the GAN of seed {results["tuning"]["on"][0][0]}, classes {tuned}: the highest PUL with an FID of at most 1.5 × the original's,
else the lowest FID. EL2, NL2 and IL2 are the paper's three repulsions on the marked samples alone, with the relative distance and the schedule of our
networks; for γ → 0 they are the fine-tuning. What was chosen:

{chosen(results)}

Class by class and for both GANs, beside the repulsion that the paper prefers:

{by_class(results)}

![samples of the original](pictures/gan_digits_original.png)

![samples of the unlearned GAN](pictures/gan_digits_unlearned.png)

![samples of the retrained GAN](pictures/gan_digits_retrained.png)

*64 samples each, the first two from the same latents: the original, the same GAN after forgetting the {results["classes"][0]} (20 marks), and one retrained without it.*
"""
    if "sensitivity" in results:
        text += f"""
### One setting at a time

On the model that the defaults were chosen on, with 20 marks. FID at 1.5 × the original's would be {results["sensitivity_limit"]:.2f}.

{sensitivity(results)}

![PUL over the number of negative marks](pictures/gan_marks_pul.png)

![FID over the number of negative marks](pictures/gan_marks_fid.png)

![PUL over γ](pictures/gan_repulsion_weight_pul.png)

![FID over γ](pictures/gan_repulsion_weight_fid.png)
"""
    if fashion := results.get("fashion_mnist"):
        text += f"""
### Confirmation on Fashion-MNIST

`python benchmarks/gan_unlearning.py --fashion` (Debian package `dataset-fashion-mnist`): a DCGAN at 16 × 16, trousers forgotten from {fashion["marks"]} negative
marks; the original's FID to all real images is {fashion["original"]:.2f}.

{fashion_table(fashion, results["labels"])}

![samples of the original](pictures/gan_fashion_mnist_original.png)

![samples of the unlearned GAN](pictures/gan_fashion_mnist_unlearned.png)
"""
    text += f"""
### What a step costs

`python benchmarks/gan_cost.py`, on {cost["threads"]} thread{"s" if cost["threads"] > 1 else ""}, {cost["rounds"]} interleaved rounds, R1 included.

{cost_table}
"""
    return text
