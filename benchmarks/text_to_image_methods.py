"""The rows of text_to_image.py: what makes a pipeline forget a concept, each by its name."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import rows
from diffusers import DiffusionPipeline
from text_to_image_figures import STEPS, Case

import hf_unlearn
from hf_unlearn.examples.captions import WORDS


QUIET = rows.QUIET | {
    "use_cpu": True,
    "num_inference_steps": STEPS,  # as everything is drawn here
}
# Of every method that is trained: so many steps at most, of so many pictures to forget, of so many that are drawn of the prompts.
BUDGET = {"max_steps": 200, "per_device_train_batch_size": 32, "forget_samples": 100}
LOOKS = (50, 100, 200)  # steps after which a run is looked at while settings are chosen
RATES = (3e-5, 1e-4, 3e-4)
ASKED = {"wordings": ("word", "prompts")}  # how a closed form of others is told what to forget

Change = Callable[
    ..., None
]  # (pipeline, case, settings, folder, callbacks): writes the changed pipeline into a folder


@dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
        label (`str`): in the page.
        change ([`Change`], *optional*): makes the pipeline forget; None for what is not changed.
        settings (`dict`): of the method.
        chosen (`dict`): what is chosen by `--tune`, with the values that are tried.
        is_trained (`bool`): whether it is a trainer's.
    """

    label: str
    change: Change | None = None
    settings: dict = field(default_factory=dict)
    chosen: dict = field(default_factory=dict)
    is_trained: bool = False


def public(name: str):
    """Of the package; a row whose method it does not have is left out."""
    try:
        return getattr(hf_unlearn, name)
    except AttributeError:
        raise ImportError(f"hf_unlearn has no {name}") from None


def redirect(pipeline: DiffusionPipeline, case: Case, settings: dict, folder: Path, callbacks=()) -> None:
    anchor = case.anchor if settings.get("anchor") == "given" else None
    settings = {name: value for name, value in settings.items() if name != "anchor"}
    public("redirect_concept")(pipeline, case.word, anchor=anchor, **settings).save_pretrained(folder)


def closed_form(name: str) -> Change:
    """Of a function that is told the concept, its anchor, and all other usual words to keep; with the setting `wordings="prompts"` also the
    usual prompts.
    """

    def change(pipeline: DiffusionPipeline, case: Case, settings: dict, folder: Path, callbacks=()) -> None:
        others = [words[0] for values in WORDS.values() for words in values.values() if words[0] != case.word]
        told = {"anchor": case.anchor, "keep": others}
        if settings.get("wordings") == "prompts":
            told["wordings"] = case.given_prompts()[0]
        public(name)(
            pipeline, case.word, **told, **{key: value for key, value in settings.items() if key != "wordings"}
        )
        pipeline.save_pretrained(folder)

    return change


def _train(
    name: str,
    pipeline: DiffusionPipeline,
    settings: dict,
    folder: Path,
    callbacks: Sequence,
    preset: str | None = None,
) -> None:
    trainer, config = public(f"{name}Trainer"), public(f"{name}Config")
    if unknown := set(settings) - set(config.__dataclass_fields__):
        raise ImportError(f"{config.__name__} has no {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as scratch:
        args = (getattr(config, preset) if preset else config)(output_dir=scratch, **(QUIET | settings))
        made = trainer(pipeline=pipeline, args=args, callbacks=list(callbacks))
        made.train()
        made.save_model(str(folder))


def trained(name: str, instead: str | None = None) -> Change:
    """Of a trainer that is told the usual prompts for the concept, with all that goes along.

    Args:
        name (`str`): of the trainer, without "Trainer".
        instead (`str`, *optional*): what is asked for instead: `"anchor"`, `"neutral"`, or nothing is told.
    """

    def change(pipeline: DiffusionPipeline, case: Case, settings: dict, folder: Path, callbacks=()) -> None:
        forget, anchored, neutral = case.given_prompts()
        told = {"forget_prompts": forget}
        if instead is not None:
            told["redirect_prompt"] = anchored if instead == "anchor" else neutral
        _train(name, pipeline, told | settings, folder, callbacks)

    return change


def by_one_word(pipeline: DiffusionPipeline, case: Case, settings: dict, folder: Path, callbacks=()) -> None:
    """VDU, told the concept alone."""
    _train("VDU", pipeline, {"concept": case.word} | settings, folder, callbacks)


def as_in_the_paper(pipeline: DiffusionPipeline, case: Case, settings: dict, folder: Path, callbacks=()) -> None:
    """VDU's own objective: ascent on what it draws for the prompts, and the anchor to denoisers of the run that trained it."""
    told = {"forget_prompts": case.given_prompts()[0], "checkpoints": [pipeline.config._name_or_path]}
    _train("VDU", pipeline, told | settings, folder, callbacks, "paper")


OLD_VDU = {  # the defaults before a concept could be named
    "trainable": ["all"], "negative_guidance": 0.0, "learning_rate": 3e-4, "max_steps": 200, "own_samples": 1000, "redirect_prompt": "",
}  # fmt: skip
NEUTRAL_VDU = {"trainable": ["cross_attention"], "negative_guidance": 1.0}


def peer(label: str, change: Change, **settings) -> Method:
    """Trained within the budget, at the rate and after the steps that are chosen for it."""
    return Method(label, change, BUDGET | settings, {"learning_rate": RATES, "max_steps": LOOKS}, is_trained=True)


METHODS: dict[str, Method] = {
    "original": Method("original"),
    "retrained": Method("retrained without it"),
    "negative_prompt": Method("negative prompt at sampling time"),
    "redirect": Method("**closed form (`redirect_concept`)**", redirect),
    "redirect_given": Method("closed form, anchor given", redirect, {"anchor": "given"}),
    "redirect_null_space": Method(
        "closed form in the null space", redirect, {"null_space": True}, {"ridge": (0.01, 0.1, 0.3)}
    ),
    "vdu_old": Method("VDU, defaults of before", trained("VDU"), OLD_VDU, is_trained=True),
    "vdu_neutral": Method("VDU, neutral prompts given", trained("VDU", "neutral"), NEUTRAL_VDU, is_trained=True),
    "vdu_paper": Method(
        "VDU, the paper's objective",
        as_in_the_paper,
        BUDGET,
        {"gamma": (1e-7, 1e-6, 1e-5, 3e-5, 1e-4, 0.5), "learning_rate": (1e-5, 3e-4), "max_steps": LOOKS},
        is_trained=True,
    ),
    "vdu": Method("**VDU alone**", by_one_word, {"closed_form": False}, is_trained=True),
    "both": Method("**closed form, then VDU: our defaults**", by_one_word, {"closed_form": True}, is_trained=True),
    "esd_x": peer("ESD-x", trained("ESD"), variant="x"),
    "esd_u": peer("ESD-u", trained("ESD"), variant="u"),
    "ablation": peer("concept ablation", trained("ConceptAblation", "anchor")),
    "salun": peer("SalUn", trained("SalUn", "anchor")),
    "uce": Method("UCE", closed_form("uce"), chosen={"lamb": (0.01, 0.1, 0.5), "erase_scale": (1.0, 10.0)} | ASKED),
    "speed": Method(
        "SPEED", closed_form("speed"), chosen={"threshold": (1e-3, 1e-2, 0.1), "keys": (False, True)} | ASKED
    ),
}
