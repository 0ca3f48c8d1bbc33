"""The first page of the benchmarks: a line for each family, of the figures that its own page explains."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import audit_report
import language_report


def classifiers(results: Callable) -> str:
    digits, paper = (results("class_unlearning")["digits"]["summary"][name] for name in ("pbu", "pbu_paper_tuned"))
    return (
        f"PBU's defaults leave {digits['forget_mean']:.1f} % of a digit and cost the others {-digits['drop_mean']:.2f} points; the paper's objective at its chosen epoch "
        f"{paper['forget_mean']:.1f} % and {-paper['drop_mean']:.1f} points"
    )


def diffusion(results: Callable) -> str:
    ours, twin, npo = (results("diffusion_unlearning")["summary"][name] for name in ("vdu", "retrain", "npo_replay"))
    return (
        f"VDU's defaults draw {ours['pul']:.0f} % fewer of a digit at u-FID {ours['fid']:.2f}; retrained {twin['pul']:.0f} % at {twin['fid']:.2f}, NPO with replay "
        f"{npo['pul']:.0f} % at {npo['fid']:.2f}"
    )


def gans(results: Callable) -> str:
    ours, twin, paper = (results("gan_unlearning")["summary"][name] for name in ("ours 20", "retrain", "el2 20"))
    return (
        f"from 20 marks Adapt-then-Unlearn's defaults draw {ours['pul']:.0f} % fewer of a digit at FID {ours['fid']:.2f}; retrained {twin['pul']:.0f} % at "
        f"{twin['fid']:.2f}, the paper's EL2 {paper['pul']:.0f} % at {paper['fid']:.2f}"
    )


def text_to_image(results: Callable) -> str:
    cells = results("text_to_image")["cells"].values()

    def median(method: str, key: str) -> float:
        return 100 * statistics.median(row[key] for row in cells if row["method"] == method and "refused" not in row)

    return (
        f"asked for, a concept is drawn in {median('redirect', 'asked'):.0f} % of pictures after the closed form and in {median('both', 'asked'):.0f} % after VDU; "
        f"other pictures are right in {median('redirect', 'others'):.0f} % and {median('both', 'others'):.0f} %, the retrained model's in {median('retrained', 'others'):.0f} %"
    )


def language(results: Callable) -> str:
    found = language_report.of(results("language_unlearning")["cells"], "full", "retain")

    def shares(method: str) -> str:
        forgotten, kept = (100 * language_report.mean(found[method], key) for key in ("forgotten", "kept"))
        return f"{forgotten:.1f} % of the forgotten facts and {kept:.1f} % of the kept ones"

    return f"`redirect` leaves {shares('redirect')}, retraining {shares('retrained')}, SimNPO {shares('simnpo')}"


def filters(results: Callable) -> str:
    summary = results("filter")["summary"]

    def mean(name: str, mode: str) -> float:
        rows = [row["auc"] for key, row in summary.items() if f"|{name}|{mode}|20|all" in key and "|known|" not in key]
        return statistics.mean(rows)

    return (
        f"20 marks separate a class from the others with AUC {mean('quadratic', 'alone'):.3f}, the paper's mean difference with {mean('mean_difference', 'both'):.3f}, "
        f"a Gaussian SVM with {mean('Gaussian SVM', 'both'):.3f} (encoders; latents are harder)"
    )


def influence(results: Callable) -> str:
    judged = results("influence_fidelity")["judges"]["digits, SGD"]["summary"]
    ours, ekfac, tracin = (
        judged[name]["disattenuated"] for name in ("propagated: accumulated", "EK-FAC influence", "TracIn")
    )
    return f"f-INE ranks groups as retraining does with Spearman {ours:.2f}; EK-FAC {ekfac:.2f}, TracIn {tracin:.2f}"


def audit(results: Callable) -> str:
    rows = [row for row in results("audit_power")["rows"] if row["case"] in audit_report.RIGHT]
    right = sum(row["verdict"] == audit_report.RIGHT[row["case"]] for row in rows)
    own = [row["verdict"] for row in results("audit_power")["rows"] if row["case"] == "PBU"]
    said = " and ".join(f"{verdict} in {own.count(verdict)} of {len(own)}" for verdict in dict.fromkeys(own))
    return f"{right} of {len(rows)} verdicts on models whose truth is known are right; of PBU's own results it says {said}"


# Page: title, its line, and a picture with its caption.
FAMILIES: dict[str, tuple[str, Callable, str | None, str]] = {
    "influence": ("Find what taught it", influence, None, ""),
    "classifiers": ("Forget a class of a classifier", classifiers, "class_unlearning.png", "Test accuracy over epochs, our defaults and the paper's preset"),
    "language": ("Forget people, passages and poison of a language model", language, None, ""),
    "text_to_image": ("Forget a concept of a text-to-image pipeline", text_to_image, "text_to_image_rows.png", "Rows of all methods from the same noise and prompts"),
    "diffusion": ("Forget a class of a diffusion model", diffusion, "diffusion_digits_unlearned.png", "The diffusion model of digits after it forgot the 3"),
    "gans": ("Forget a class of a GAN", gans, "gan_digits_unlearned.png", "The GAN of digits after it forgot the 3"),
    "audit": ("Verify", audit, None, ""),
    "filters": ("Filter", filters, "filter_digits_filtered.png", "What a filter of 3s releases"),
}  # fmt: skip


def render(results: Callable, there: set[str]) -> str:
    """The page.

    Args:
        results (callable): name of a file of results to what it holds.
        there (`set[str]`): pages that have something to tell.
    """
    families = {page: family for page, family in FAMILIES.items() if page in there}
    lines = ["| | in one line, on small models | all tables |", "|---|---|---|"]
    lines += [
        f"| **{title}** | {line(results)} | [{page.replace('_', '-')}](benchmarks/{page}.md) |"
        for page, (title, line, _, _) in families.items()
    ]
    pictures = [
        f"![{caption}](pictures/{file})\n\n*{caption}: [{page.replace('_', '-')}](benchmarks/{page}.md).*"
        for page, (_, _, file, caption) in families.items()
        if file
    ]
    return "\n".join(
        [
            "# Benchmarks",
            "",
            "Every figure is printed by a script, beside its baselines, also where they win. Models are small, and so are data: read each line with its page, which says how",
            "many seeds there were, what was tuned on what, and what it cost.",
            "",
            *lines,
            "",
            *"\n\n".join(pictures).split("\n"),
            "",
            "Written by `python benchmarks/report.py` from `benchmarks/results/*.json`. To measure again, run the script named at each table; `--quick` gives a smaller version",
            "in under two minutes.",
            "",
        ]
    )
