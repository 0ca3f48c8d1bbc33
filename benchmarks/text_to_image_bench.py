"""Whether the small text-to-image pipeline that others start from follows its prompts, however they are worded.

    python benchmarks/text_to_image_bench.py [--seed N] [--without WORD] [--quick]

Each row: all 240 combinations of digit, colour and background, one picture each by DDIM in 20 steps, and the share that shows what was asked
for in each attribute, and in all, as a classifier sees it. The first rows at guidance 7.5 by wording, then the usual wording by guidance. The
pipeline is trained on first use.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging

from hf_unlearn.examples import text_to_image
from hf_unlearn.examples.attributes import attribute_classifier, followed, labelled, shown_as_wanted
from hf_unlearn.examples.captions import TEMPLATES, UNSEEN, WORDS, combinations, say
from hf_unlearn.examples.coloured_digits import coloured_digits
from hf_unlearn.examples.text_to_image import TextToImageRecipe, text_to_image_model
from hf_unlearn.images import grid
from hf_unlearn.unlearning.diffusion.drawing import generate


RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
WORDINGS = {
    "usual": (TEMPLATES[:1], 0),
    "other orders": (TEMPLATES[1:], 0),
    "synonyms": (TEMPLATES[:1], 1),
    "rare words": (TEMPLATES[:1], -1),
    "unseen orders": (UNSEEN, 0),
}
GUIDANCE = (1.0, 3.0, 12.0)
ROW = "{:16}" + 4 * "{:>12}"


def asked(wording: str, shown: list[dict[str, str]]) -> list[str]:
    """A prompt for each combination; templates in turn."""
    templates, word = WORDINGS[wording]
    return [say(values, templates[row % len(templates)], word=word) for row, values in enumerate(shown)]


def printed(name: str, shares: dict[str, float]) -> dict[str, float]:
    print(ROW.format(name, *(f"{100 * shares[kind]:.1f}" for kind in (*WORDS, "all"))), flush=True)
    return shares


def classifier_shares(examples: int) -> dict[str, float]:
    """Of real pictures of digits that the classifier never saw."""
    rows = coloured_digits(examples, seed=100)["test"]
    names = {kind: rows.features[kind].int2str(rows[kind][:]) for kind in WORDS}
    wanted = [dict(zip(names, values, strict=True)) for values in zip(*names.values(), strict=True)]
    return shown_as_wanted(attribute_classifier()(labelled(rows)[0]), wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and noise")
    parser.add_argument("--without", help="a word: the twin that never saw it")
    parser.add_argument(
        "--quick", action="store_true", help="of a pipeline that has learnt nothing; writes no figures"
    )
    given = parser.parse_args()
    diffusers_logging.set_verbosity_error()
    recipe = TextToImageRecipe(without=given.without, seed=given.seed)
    shown = combinations()[:: 24 if given.quick else 1]
    begin = perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        if given.quick:
            recipe = replace(
                recipe, examples=200, steps=4, reader_steps=2, vae_steps=2, checkpoints=0, channels=(8, 16)
            )
            folder = text_to_image.train(recipe, Path(scratch, "model"))
        else:
            folder = text_to_image_model(recipe)
        minutes = (perf_counter() - begin) / 60  # to load it, where it was there
        pipeline = DiffusionPipeline.from_pretrained(folder)
    print(f"{recipe.name}: {minutes:.1f} minutes to have it")
    print(ROW.format("", *WORDS, "all"))
    figures = {"classifier": printed("real pictures", classifier_shares(500 if given.quick else 20_000))}
    for wording in WORDINGS:
        figures[wording] = printed(wording, followed(pipeline, asked(wording, shown), shown, seed=given.seed))
    for scale in GUIDANCE:
        prompts = asked("usual", shown)
        shares = followed(pipeline, prompts, shown, seed=given.seed, guidance_scale=scale)
        figures[f"guidance {scale:g}"] = printed(f"guidance {scale:g}", shares)
    nothing = generate(pipeline, [""] * len(shown), seed=given.seed, num_inference_steps=20)
    found = attribute_classifier()(nothing)
    figures["unconditional"] = {
        kind: {value: found[kind].count(value) / len(shown) for value in values} for kind, values in WORDS.items()
    }
    for kind, shares in figures["unconditional"].items():
        print(f"no prompt, {kind}: " + ", ".join(f"{value} {100 * share:.0f}" for value, share in shares.items()))
    if not given.quick:
        (RESULTS / f"text_to_image_bench_{recipe.name}.json").write_text(json.dumps(figures, indent=1) + "\n")
        drawn = generate(pipeline, asked("usual", shown), seed=given.seed, num_inference_steps=20)
        grid(drawn, columns=24).save(PICTURES / f"{recipe.name}.png", optimize=True)


if __name__ == "__main__":
    main()
