"""The small models by the names that recipes know them by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path


GANS = ("digits-gan", "fashion-mnist-gan")
DDPMS = ("digits-ddpm", "fashion-mnist-ddpm")
LANGUAGE = ("facts", "opinions")
TEXT_TO_IMAGE = {"coloured-digits": "stable_diffusion", "coloured-digits-sd3": "sd3"}
NAMES = ("digits", *LANGUAGE, *GANS, *DDPMS, *TEXT_TO_IMAGE)


def made(name: str, *, seed: int = 0, progress: bool = True) -> Path:
    """Folder of a small model, trained on first use: a classifier in seconds, a generator in minutes.

    Args:
        name (`str`): one of [`NAMES`]; `"digits"` is a classifier, `"facts"` and `"opinions"` (the poisoned one) are language models,
            `"coloured-digits"` draws what a prompt asks for.
        seed (`int`, defaults to 0): of weights, order and noise.
        progress (`bool`, defaults to `True`): say on the error stream that it is trained, and how long that takes.

    Raises:
        ValueError: no such model.
    """
    if name not in NAMES:
        raise ValueError(f"name={name!r}: must be one of {', '.join(NAMES)}")
    if name == "digits":
        from .classifier import cached_digits_classifier

        return cached_digits_classifier(seed, progress=progress)
    if name == "facts":
        from .facts import FactsRecipe, facts_model

        return facts_model(FactsRecipe(seed=seed), progress=progress)
    if name == "opinions":
        from .poisoned import PoisonRecipe, poisoned_model

        return poisoned_model(PoisonRecipe(seed=seed), progress=progress)
    if name in TEXT_TO_IMAGE:
        from .text_to_image import TextToImageRecipe, text_to_image_model

        return text_to_image_model(TextToImageRecipe(family=TEXT_TO_IMAGE[name], seed=seed), progress=progress)
    if name in GANS:
        from . import gan as module
    else:
        from . import ddpm as module
    return module.cached(replace(module.NAMES[name], seed=seed), progress=progress)


def where(name: str, *, seed: int = 0) -> str:
    """Where a small model is, or that it is to be trained; nothing is made.

    Args:
        name, seed: as for [`made`].
    """
    from .cache import NotMadeError, only_looking

    try:
        with only_looking():
            return str(made(name, seed=seed))
    except NotMadeError as error:
        return f"not made yet: trained on first use, into {error}"
