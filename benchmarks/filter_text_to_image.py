"""A filter from twenty marks on what a text-to-image pipeline draws: alone, in Stable Diffusion's slot, and beside unlearning.

    python benchmarks/filter_text_to_image.py           # a quarter of an hour on one core, once the small models are in the cache
    python benchmarks/filter_text_to_image.py --quick   # of a pipeline that has learnt nothing; writes no figures

The pipeline draws coloured digits as it is asked to (hf_unlearn.examples.text_to_image); undesired is "three". One picture of each of the 240
combinations of digit, colour and background is looked at, until twenty threes are marked; a classifier of all attributes, which no filter looks
through, stands for the person who marks, and judges what is held out. Writes benchmarks/results/filter_text_to_image.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers import ResNetConfig, ResNetForImageClassification
from transformers.utils import logging as transformers_logging

from hf_unlearn import FASTFitter, FASTSafetyChecker, FilteredPipeline, FilterEncoder, redirect_concept
from hf_unlearn.examples import text_to_image
from hf_unlearn.examples.attributes import BATCH, NOISE, SIZES, attribute_classifier, labelled
from hf_unlearn.examples.cache import cached, saved
from hf_unlearn.examples.captions import combinations, meaning, say
from hf_unlearn.examples.classifier import cached_digits_classifier
from hf_unlearn.examples.coloured_digits import coloured_digits
from hf_unlearn.examples.text_to_image import TextToImageRecipe, text_to_image_model
from hf_unlearn.filtering.encoding.preprocessing import ImagePreprocessing
from hf_unlearn.filtering.fitting.rates import Rate


RESULTS = Path(__file__).parent / "results" / "filter_text_to_image.json"
CONCEPT, ANCHOR = "three", "seven"
MARKS = 20
STEPS = 20  # of DDIM
ASKED = {"three": 0, "3": 1, "iii": -1}  # by which word; the first is the one that unlearning is told
UNDESIRED = meaning(CONCEPT)[1]


@dataclass(frozen=True)
class Size:
    unmarked: int = 2  # pictures of each combination that nobody looks at
    held_out: int = 2  # of each combination without the concept
    concept: int = 4  # of each combination with it, and of each wording
    every: int = 1  # of how many combinations one is taken
    encoder_steps: int = 600
    examples: int = 6_000
    turns: int = 3  # to see what the filter costs


class Drawn:
    """Pictures in [−1, 1], what the filter says of them, and which of them show the concept."""

    def __init__(self, images: Tensor, flags: Sequence[bool]):
        self.images = images
        self.flags = np.array(flags, bool)
        self.found = attribute_classifier()(images)
        self.shows = np.array([value == UNDESIRED for value in self.found["digit"]])


def draw(pipeline: Any, prompts: Sequence[str], *, seed: int, batch: int = 60, **arguments: Any) -> Drawn:
    """One picture a prompt, each from noise of its own; what a filter flags is shown here, and flagged."""
    seeds = np.random.SeedSequence(seed).generate_state(len(prompts), np.uint64)
    images, flags = [], []
    for begin in range(0, len(prompts), batch):
        part = slice(begin, begin + batch)
        generators = [torch.Generator().manual_seed(int(value) % 2**63) for value in seeds[part]]
        told = {"generator": generators, "num_inference_steps": STEPS, "output_type": "pt"} | arguments
        out = pipeline(list(prompts[part]), **told)
        images.append(out.images * 2 - 1)
        flags += getattr(out, "filtered", None) or out.nsfw_content_detected or [False] * len(images[-1])
    return Drawn(torch.cat(images).float(), flags)


def prompts_of(shown: Sequence[dict[str, str]], times: int = 1, word: int = 0) -> list[str]:
    return [say(values, word=word) for values in shown] * times


# Encoders


@dataclass(frozen=True)
class EncoderRecipe:
    """A classifier of coloured digits, colours and backgrounds that never saw the concept."""

    steps: int
    examples: int
    without: str = CONCEPT
    seed: int = 2


def train_encoder(recipe: EncoderRecipe, folder: Path) -> Path:
    images, labels = labelled(coloured_digits(recipe.examples, without=recipe.without, seed=recipe.seed)["train"])
    sizes = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic"}
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.random.fork_rng(devices=[]), saved(recipe, folder) as scratch:
        torch.manual_seed(recipe.seed)
        model = ResNetForImageClassification(ResNetConfig(num_channels=3, num_labels=sum(SIZES), **sizes)).train()
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
        decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, recipe.steps)
        for _ in range(recipe.steps):
            rows = torch.randint(len(images), (BATCH,), generator=generator)
            noise = NOISE * torch.rand(BATCH, 1, 1, 1, generator=generator)
            seen = images[rows] + noise * torch.randn(images[rows].shape, generator=generator)
            heads = model(seen.clamp(-1, 1)).logits.split(SIZES, 1)
            loss = sum(F.cross_entropy(head, label) for head, label in zip(heads, labels[rows].T, strict=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
        model.eval().save_pretrained(scratch)
    return folder


def encoders(
    pipeline: StableDiffusionPipeline, recipe: EncoderRecipe, scratch: Path | None
) -> dict[str, FilterEncoder]:
    """What filters look through, by name: nothing is downloaded."""
    if scratch is None:
        others = cached("coloured-digits-without-three-encoder", recipe, lambda folder: train_encoder(recipe, folder))
    else:
        others = train_encoder(recipe, scratch / "encoder")
    vae = copy.deepcopy(pipeline.vae)
    latents = FilterEncoder.own(
        lambda images: vae.encode(images).latent_dist.mean.flatten(1), name="the VAE's latents"
    )
    return {
        "classifier of the others": FilterEncoder.from_pretrained(others, preprocessing=ImagePreprocessing()),
        "the VAE's latents": latents,
        "grey digits": FilterEncoder.from_pretrained(cached_digits_classifier()),
    }


# Filters


def fits(encoder: FilterEncoder, undesired: Tensor, clean: Tensor, unmarked: Tensor) -> dict[str, tuple[str, Any]]:
    """By name: what the fitter was given, and what it made of it. The first is the package's default."""

    def fitter(others: Tensor, **arguments: Any) -> FASTFitter:
        given = {"undesired": undesired, "clean": others, "value_range": (-1, 1)}
        return FASTFitter(encoder, concepts=(CONCEPT,), **arguments).update(**given)

    few = clean[: len(undesired)]
    default = fitter(clean).update(unmarked=unmarked, value_range=(-1, 1)).fit()
    unwatched = fitter(few).update(unmarked=unmarked, value_range=(-1, 1)).fit(threshold="pooled_mean")
    paper = fitter(few, score="mean_difference").fit(threshold="pooled_mean")
    return {"default": default, "quadratic, pooled mean": unwatched, "paper": paper}


def rates(checker: FASTSafetyChecker, held_out: Drawn) -> dict[str, dict]:
    """Recall and false alarms on what was drawn after the filter was fitted, with their exact intervals."""
    flags = checker.judge(held_out.images, value_range=(-1, 1)).flags.numpy()
    sides = {"recall": flags[held_out.shows], "false_alarm": flags[~held_out.shows]}
    return {name: rate_of(side) for name, side in sides.items()}


def rate_of(flags: np.ndarray) -> dict:
    rate = Rate.counted(int(flags.sum()), len(flags))
    return {} if rate is None else asdict(rate)


def places(
    pipeline: StableDiffusionPipeline, checker: FASTSafetyChecker, prompts: list[str], folder: Path, turns: int
) -> dict:
    """Whether the slot of stock Stable Diffusion, saved and loaded by it, says the same as `FilteredPipeline`; and what either costs."""
    slot = {"safety_checker": checker, "feature_extractor": checker.feature_extractor}
    StableDiffusionPipeline(**pipeline.components | slot, requires_safety_checker=True).save_pretrained(folder)
    inside = StableDiffusionPipeline.from_pretrained(folder)
    inside.set_progress_bar_config(disable=True)
    around = FilteredPipeline(pipeline, checker)
    flags = {
        name: draw(made, prompts, seed=5).flags for name, made in (("slot", inside), ("FilteredPipeline", around))
    }
    seconds: dict[str, list[float]] = {"pipeline": [], "slot": [], "FilteredPipeline": []}
    for turn in range(turns):
        for name, made in (("pipeline", pipeline), ("slot", inside), ("FilteredPipeline", around)):
            begin = time.process_time()
            draw(made, prompts[:60], seed=turn)
            seconds[name].append(time.process_time() - begin)
    return {
        "class": type(inside.safety_checker).__name__,
        "images": len(prompts),
        "blocked": {name: int(found.sum()) for name, found in flags.items()},
        "differing": int((flags["slot"] != flags["FilteredPipeline"]).sum()),
        "seconds": {name: median(values) for name, values in seconds.items()},
    }


def together(models: dict[str, Any], checker: FASTSafetyChecker, size: Size) -> list[dict]:
    """What is shown of the concept, asked for by words and without any, before and behind the filter; and what others lose."""
    wanted, others = (
        [v for v in combinations() if (v["digit"] == UNDESIRED) == own][:: size.every] for own in (True, False)
    )
    asked = {word: prompts_of(wanted, size.concept, number) for word, number in ASKED.items()}
    asked["no prompt"] = [""] * len(asked[CONCEPT])
    rows = []
    for name, pipeline in models.items():
        filtered = FilteredPipeline(pipeline, checker)
        for word, prompts in asked.items():
            out = draw(filtered, prompts, seed=11, filter_action="flag")
            shown = {"shown": rate_of(out.shows), "released": rate_of(out.shows & ~out.flags)}
            rows.append({"model": name, "asked": word, **shown, "blocked": rate_of(out.flags)})
        out = draw(filtered, prompts_of(others), seed=12, filter_action="flag")
        right = np.array(
            [all(out.found[kind][row] == value for kind, value in values.items()) for row, values in enumerate(others)]
        )
        followed = {"shown": rate_of(right), "released": rate_of(right & ~out.flags)}
        rows.append({"model": name, "asked": "others", **followed, "blocked": rate_of(out.flags)})
    return rows


def printed(rows: Sequence[dict], names: Sequence[str], keys: Sequence[str]) -> None:
    for row in rows:
        shares = (f"{key} {100 * row[key]['value']:5.1f}" if row[key] else f"{key}   —  " for key in keys)
        print(*(f"{row[name]:26}" for name in names), *shares, flush=True)


def measured(pipeline: StableDiffusionPipeline, size: Size, folder: Path, *, quick: bool) -> dict:
    pipeline.set_progress_bar_config(disable=True)
    shown = combinations()[:: size.every]
    looked = draw(pipeline, prompts_of(shown), seed=1)
    order = np.random.default_rng(0).permutation(len(shown))  # in which somebody looks at them
    marks, clean = (order[looked.shows[order] == own] for own in (True, False))
    if quick and len(marks) < MARKS:  # a pipeline that has learnt nothing draws none
        marks, clean = order[:MARKS], order[MARKS:]
    marks = marks[:MARKS]
    unmarked = draw(pipeline, prompts_of(shown, size.unmarked), seed=2)
    concept = [values for values in shown if values["digit"] == UNDESIRED]
    others = [values for values in shown if values["digit"] != UNDESIRED]
    prompts = prompts_of(concept, size.concept) + prompts_of(others, size.held_out)
    held_out = draw(pipeline, prompts, seed=3)
    print(f"{len(marks)} marks, {len(clean)} clean; held out {held_out.shows.sum()} of {len(prompts)} show it")
    recipe = EncoderRecipe(size.encoder_steps, size.examples)
    rows, checkers = [], {}
    for name, encoder in encoders(pipeline, recipe, folder if quick else None).items():
        found = fits(encoder, looked.images[marks], looked.images[clean], unmarked.images)
        for kind, result in found.items():
            checkers[name, kind] = result.checker()
            threshold = result.concepts[0].threshold
            row = {"encoder": name, "fit": kind, "promise": threshold.promise}
            rows.append(row | rates(checkers[name, kind], held_out))
    printed(rows, ("encoder", "fit"), ("recall", "false_alarm"))
    checker = checkers["classifier of the others", "default"]
    begun = time.perf_counter()
    redirected = redirect_concept(copy.deepcopy(pipeline), CONCEPT, anchor=ANCHOR, measure=False)
    seconds = time.perf_counter() - begun
    redirected.set_progress_bar_config(disable=True)
    both = together({"original": pipeline, "redirected": redirected}, checker, size)
    printed(both, ("model", "asked"), ("shown", "released", "blocked"))
    place = places(pipeline, checker, prompts_of(shown), folder / "slot", size.turns)
    print(place)
    return {
        "marks": len(marks),
        "clean": len(clean),
        "unmarked": len(unmarked.images),
        "held_out": len(prompts),
        "steps": STEPS,
        "fits": rows,
        "together": both,
        "redirect_seconds": seconds,
        "places": place,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="of a pipeline that has learnt nothing; writes no figures"
    )
    quick = parser.parse_args().quick
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    recipe = TextToImageRecipe()
    size = Size(2, 1, 1, 2, 4, 200, 1) if quick else Size()
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        if quick:
            recipe = replace(
                recipe, examples=200, steps=4, reader_steps=2, vae_steps=2, checkpoints=0, channels=(8, 16)
            )
            folder = text_to_image.train(recipe, Path(scratch, "model"))
        else:
            folder = text_to_image_model(recipe)
        found = measured(StableDiffusionPipeline.from_pretrained(folder), size, Path(scratch), quick=quick)
    minutes = (time.process_time() - begun) / 60
    print(f"{minutes:.1f} minutes of one core")
    if not quick:
        found["core_minutes"] = minutes
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
