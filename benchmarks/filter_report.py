"""The page's part on filters, written from results/filter.json and results/filter_cost.json."""

from __future__ import annotations


LABELS = {
    "quadratic": "**quadratic (ours)**",
    "mean_difference": "mean difference (paper)",
    "linear_svc": "linear SVC (paper)",
    "lda": "LDA, Ledoit–Wolf",
    "cosine": "cosine (stock checker's rule)",
    "nearest neighbours": "nearest neighbours",
    "Gaussian SVM": "Gaussian SVM",
    "fine-tuned classifier": "fine-tuned classifier",
}
KINDS = {
    "known": "known latents",
    "pca": "PCA",
    "autoencoder": "autoencoder",
    "classifier": "classifier of the others",
}
NAMES = {"digits": "digits", "fashion_mnist": "Fashion-MNIST"}
MODES = {
    "both": "undesired and clean marks, mean of all",
    "alone": "undesired marks only, stand-ins for clean ones, mean of all",
    "looked at": "false alarms ≤ 5 %, calibrated on the clean samples looked at",
    "pool": "false alarms ≤ 5 %, calibrated on unmarked samples",
}


def aucs(found: dict, key: str, task: str, mode: str, marks: int, which: str) -> str:
    lines = ["| method | " + " | ".join(KINDS.values()) + " |", "|---" * (1 + len(KINDS)) + "|"]
    for name, label in LABELS.items():
        rows = [found["summary"].get(f"{task}|{kind}|{name}|{mode}|{marks}|{which}") for kind in KINDS]
        if any(rows):
            lines.append(f"| {label} | " + " | ".join(f"{row[key]:.3f}" if row else "—" for row in rows) + " |")
    return "\n".join(lines)


def curve(found: dict, task: str, kind: str) -> str:
    marks = found["marks"]
    lines = ["| method | marks | " + " | ".join(f"n = {n}" for n in marks) + " |", "|---" * (2 + len(marks)) + "|"]
    for name, mode in (
        ("quadratic", "alone"),
        ("mean_difference", "both"),
        ("mean_difference", "alone"),
        ("linear_svc", "both"),
        ("linear_svc", "alone"),
        ("Gaussian SVM", "both"),
    ):
        rows = [found["summary"].get(f"{task}|{kind}|{name}|{mode}|{n}|all") for n in marks]
        cells = " | ".join(f"{row['auc']:.3f}" if row else "—" for row in rows)
        lines.append(f"| {LABELS[name]} | {'U + D' if mode == 'both' else 'U only'} | {cells} |")
    return "\n".join(lines)


def operating(found: dict, task: str, kind: str, marks: int) -> str:
    lines = [
        "| method | threshold | recall | false alarms, mean / worst | released | residual (prevalence) | FID | density | coverage |",
        "|---" * 9 + "|",
    ]
    for mode, meaning in MODES.items():
        for name, label in LABELS.items():
            row = found["operating"].get(f"{task}|{kind}|{name}|{mode}|{marks}")
            if row is None:
                continue
            lines.append(
                f"| {label} | {meaning} | {row['recall']:.2f} | {row['false_alarm']:.3f} / {row['false_alarm_worst']:.3f} | "
                f"{row['release']:.2f} | {row['residual']:.3f} ({row['prevalence']:.3f}) | {row['fid']:.2f} | {row['density']:.2f} | "
                f"{row['coverage']:.2f} |"
            )
    return "\n".join(lines)


def promises(found: dict) -> str:
    lines = [
        "| data | undesired | encoder | calibrated on | kept | false alarms, mean / worst | recall |",
        "|---" * 7 + "|",
    ]
    for row in found["promise"]:
        lines.append(
            f"| {NAMES[row['task']]} | {row['class']} | {KINDS[row['latents']]} | "
            f"{'clean samples looked at' if row['mode'] == 'looked at' else 'unmarked samples'} | "
            f"{round(row['kept'] * row['splits'])} of {row['splits']} | "
            f"{row['false_alarm_mean']:.3f} / {row['false_alarm_worst']:.3f} | {row['recall_mean']:.2f} |"
        )
    return "\n".join(lines)


def by_class(found: dict) -> str:
    lines = ["| data | undesired | recognised | known | PCA | autoencoder | classifier |", "|---" * 7 + "|"]
    for task, shares in found["separation"].items():
        for unwanted, share in shares.items():
            cells = []
            for kind in KINDS:
                ours, theirs = (
                    found["by_class"].get(f"{task}|{kind}|{name}|alone|{unwanted}")
                    for name in ("quadratic", "mean_difference")
                )
                cells.append("—" if ours is None else f"{ours:.3f} / {theirs:.3f}")
            lines.append(f"| {NAMES[task]} | {unwanted} | {100 * share:.1f} % | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def texts(text: dict, marks: int) -> str:
    lines = [
        "| category | texts | all labels | quadratic, U only | mean difference, U only | mean difference, U + D |",
        "|---" * 6 + "|",
    ]
    for name, size in text["sizes"].items():
        cells = [
            text["by_class"].get(f"fortunes|text|{method}|{mode}|{name}")
            for method, mode in (("quadratic", "alone"), ("mean_difference", "alone"), ("mean_difference", "both"))
        ]
        shown = " | ".join("—" if value is None else f"{value:.3f}" for value in cells)
        lines.append(f"| {name} | {size} | {text['separation'][name]:.3f} | {shown} |")
    means = ["| method | U only | U + D |", "|---|---|---|"]
    for name, label in LABELS.items():
        rows = [text["summary"].get(f"fortunes|text|{name}|{mode}|{marks}|all") for mode in ("alone", "both")]
        if any(rows):
            means.append(f"| {label} | " + " | ".join(f"{row['auc']:.3f}" if row else "—" for row in rows) + " |")
    return "\n".join(lines) + "\n\n" + "\n".join(means)


def cost_rows(cost: dict) -> str:
    lines = ["| dimension | as of | quadratic | linear |", "|---|---|---|---|"]
    lines += [
        f"| {row['dimension']} | {row['encoder']} | {row['quadratic']:.1f} ms | {row['linear']:.1f} ms |"
        for row in cost["scoring"]
    ]
    return "\n".join(lines)


def bars(found: dict) -> str:
    """The mean over tasks and encoders that never saw the class."""
    marks = found["marks"][0]

    def mean(name: str, mode: str, which: str) -> float:
        rows = [
            found["summary"].get(f"{task}|{kind}|{name}|{mode}|{marks}|{which}")
            for task in NAMES
            for kind in KINDS
            if kind != "known"
        ]
        rows = [row["auc"] for row in rows if row]
        return sum(rows) / len(rows)

    lines = [
        f"| AUC with {marks} marks, mean over data and encoders | classes recognised with ≥ 97 % | all classes |",
        "|---|---|---|",
    ]
    for name, mode, label in (
        ("quadratic", "alone", "quadratic, U only"),
        ("mean_difference", "alone", "mean difference, U only"),
        ("mean_difference", "both", "mean difference, U + D"),
        ("linear_svc", "both", "linear SVC, U + D"),
        ("Gaussian SVM", "both", "Gaussian SVM, U + D"),
    ):
        lines.append(f"| {label} | {mean(name, mode, 'separated'):.3f} | {mean(name, mode, 'all'):.3f} |")
    return "\n".join(lines)


def render(found: dict, cost: dict) -> str:
    first, last = found["marks"][0], found["marks"][-1]
    good = {
        NAMES[task]: ", ".join(c for c, share in shares.items() if share >= 0.97)
        for task, shares in found["separation"].items()
    }
    around = cost["pipelines"]
    blocks = [
        f"""## Filtering

`python benchmarks/filter.py`, the paper's protocol: 10,000 samples of a GAN (digits at 8 × 8; Fashion-MNIST at 16 × 16), half of them for feedback and half for
judging, n marks of a kind, labels by a classifier that nothing else sees; each class in turn is undesired; {len(found["seeds"])} draws. U are undesired marks, D
clean ones. *Known latents* are the GAN's own z. The encoders never saw the class: PCA, an autoencoder, and a classifier of the nine other classes, trained
on real images without it. What our defaults are was chosen on another GAN of digits and on real images, with other encoders.

{bars(found)}

The classifier that labels recognises these with 97 % or more: {"; ".join(f"{task} {classes or 'none'}" for task, classes in good.items())}. All methods by encoder, all classes,
AUC with n = {first}:"""
    ]
    for task, name in NAMES.items():
        for mode, meaning in (("alone", "U only"), ("both", "U + D")):
            blocks.append(f"{name}, {meaning}:\n\n{aucs(found, 'auc', task, mode, first, 'all')}")
    blocks.append(
        f"Recall where 5 % of the clean test samples are blocked, n = {first}, U only:\n\n"
        + "\n\n".join(
            f"{name}:\n\n{aucs(found, 'recall_at_5', task, 'alone', first, 'all')}" for task, name in NAMES.items()
        )
    )
    blocks.append(
        f"Class by class with n = {first}, U only: quadratic / mean difference, and how many of the class's real images the classifier recognises.\n\n"
        + by_class(found)
    )
    blocks.append(
        "AUC over the number of marks, known latents. Published for MNIST: 0.69 to 0.87 (U + D), 0.70 to 0.89 (U only).\n\n"
        + "\n\n".join(f"{name}:\n\n{curve(found, task, 'known')}" for task, name in NAMES.items())
    )
    blocks.append(
        "The same through the classifier of the other classes:\n\n"
        + "\n\n".join(f"{name}:\n\n{curve(found, task, 'classifier')}" for task, name in NAMES.items())
        + "\n\n![AUC over marks, digits, known latents](pictures/filter_digits_known.png)\n\n"
        "![AUC over marks, digits, classifier](pictures/filter_digits_classifier.png)"
    )
    blocks.append(
        f"""### Where they draw the line

Each method at its own threshold, n = {first}, through the classifier of the others; means over the classes, one draw each. FID, density and coverage are of what is released to what an oracle would
release of the same half (as published); density and coverage on 1,500 samples. The paper's threshold blocks a large share of what is clean.

{chr(10).join(f"{name}:{chr(10)}{chr(10)}{operating(found, task, 'classifier', first)}{chr(10)}" for task, name in NAMES.items())}
Known latents, digits, n = {last}:

{operating(found, "digits", "known", last)}"""
    )
    if "promise" in found:
        blocks.append(
            f"""### Is the promise kept?

At most 5 % of clean samples blocked, with confidence 95 %: random draws of {first} marks and of the calibration samples, false alarms counted on all other clean
samples. Of 200 draws at least 184 should keep it (0.95 − 2 standard deviations).

{promises(found)}"""
        )
    if "text" in found:
        blocks.append(
            f"""### Texts

{found["text"]["texts"]:,} short texts that people sorted by subject (Debian package `fortunes`), through all-MiniLM-L6-v2; the categories that a classifier with *all* labels separates with an AUC of
0.97 or more, which is the ceiling here. AUC with n = {first}:

{texts(found["text"], first)}"""
        )
    blocks.append(
        f"""### Cost

`python benchmarks/filter_cost.py`, one thread, medians. Scoring {cost["samples"]:,} embeddings for {cost["concepts"]} concepts of {cost["marks"]} marks:

{cost_rows(cost)}

{around["images"]} digits drawn by a DDPM in {around["steps"]} steps: {around["pipeline"]:.0f} ms, with the encoder {around["with encoder"]:.0f} ms, by `FilteredPipeline` {around["filtered"]:.0f} ms:
{100 * (around["filtered"] / around["with encoder"] - 1):+.1f} % over pipeline and encoder."""
    )
    return "\n\n".join(blocks) + "\n"
