"""The page's part on filters of a text-to-image pipeline, written from results/filter_text_to_image.json."""

from __future__ import annotations


FITS = {
    "default": "**default**: quadratic, false alarms ≤ 5 %",
    "quadratic, pooled mean": "quadratic, pooled mean",
    "paper": "mean difference, pooled mean (paper)",
}
MODELS = {"original": "original", "redirected": "`redirect_concept`"}
ASKED = {"three": "“three”", "3": "“3”", "iii": "“iii”", "no prompt": "without a prompt", "others": "other digits"}


def percent(rate: dict) -> str:
    """A share with its interval, of how many."""
    if not rate:
        return "—"
    low, high = 100 * rate["low"], 100 * rate["high"]
    return f"{100 * rate['value']:.1f} ({low:.1f}–{high:.1f}; {rate['count']} of {rate['total']})"


def fit_rows(found: dict) -> str:
    lines = ["| encoder | fit | recall | false alarms |", "|---|---|---|---|"]
    for row in found["fits"]:
        cells = (row["encoder"], FITS[row["fit"]], percent(row["recall"]), percent(row["false_alarm"]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def together_rows(found: dict) -> str:
    lines = ["| pipeline | asked for | shows it | shows it behind the filter | blocked |", "|---|---|---|---|---|"]
    for row in found["together"]:
        cells = (
            MODELS[row["model"]],
            ASKED[row["asked"]],
            *(percent(row[k]) for k in ("shown", "released", "blocked")),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def render(found: dict) -> str:
    """The section, from the results."""
    place = found["places"]
    slot, around = (
        100 * (place["seconds"][name] / place["seconds"]["pipeline"] - 1) for name in ("slot", "FilteredPipeline")
    )
    return f"""## Filtering a text-to-image pipeline

`python benchmarks/filter_text_to_image.py`: the small Stable Diffusion pipeline that draws coloured digits as it is asked to, DDIM in {found["steps"]} steps; undesired is "three".
A classifier that no filter looks through marks {found["marks"]} threes among one picture of each of 240 combinations of digit, colour and background, and judges {found["held_out"]}
pictures from other noise. The default fit has the {found["clean"]} clean ones that were looked at meanwhile and {found["unmarked"]} that nobody looked at; the other fits have {found["marks"]} clean
ones. Percent, with exact intervals at 95 %.

{fit_rows(found)}

*Classifier of the others* never saw a three in any colour. *Grey digits* is what recipes call `encoder: digits`, a classifier of grey 8 × 8 digits, threes among them, which has not seen
colours. *The VAE's latents* are the pipeline's own, of 256 numbers.

In Stable Diffusion's slot, saved and loaded by stock diffusers, the first filter blocks {place["blocked"]["slot"]} of {place["images"]} pictures, as `FilteredPipeline` {place["blocked"]["FilteredPipeline"]}; {place["differing"]} are judged
otherwise. Drawing takes {slot:+.0f} % and {around:+.0f} % of processor time.

### Unlearned and filtered

The same filter, fitted on what the original draws, behind the original and behind the pipeline after `redirect_concept(pipe, "three", anchor="seven")`, {found["redirect_seconds"]:.1f} s. Neither "3"
nor "iii" was named. Of other digits the table says how many pictures show digit, colour and background as asked for.

{together_rows(found)}
"""
