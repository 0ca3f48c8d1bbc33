"""What the buttons do, without the page: numbers and words in, pictures and words out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ..hub.objects import publish
from ..images import of_pil
from ..jobs.filter.fit import encoder_of
from ..jobs.recipe.filter import FilterFitJob
from . import fitting
from .comparing import Comparison, compared
from .fitting import Fitted
from .marks import MOST, PAGE, Marks
from .opened import Opened
from .tiles import tiles


if TYPE_CHECKING:
    from ..filtering.checker import FASTSafetyChecker
    from ..jobs.recipe.app import AppJob

logger = logging.getLogger(__name__)

Told = Callable[[int, int], None]
UNSAVED = ".unsaved"  # a folder that a job needs a name for, and that is not made
OPENED, UNLEARNED, MADE = "opened", "unlearned", "made"
UPLOADS = 60  # images that are judged at once


def _nobody(done: int, of: int) -> None:
    pass


class Desk:
    """One thing that is opened, for all visitors; what a visitor marks and makes is passed in and out.

    Args:
        job ([`AppJob`]): settings at first.
        found ([`Opened`]): what they open.
    """

    def __init__(self, job: AppJob, found: Opened):
        self.job, self.found = job, found
        self._encoder = lru_cache(maxsize=2)(self._loaded)

    def asked(
        self,
        *,
        prompts: str = "",
        seed: float = 0,
        steps: float | None = None,
        guidance: float | None = None,
        **keys: Any,
    ) -> FilterFitJob:
        """What a visitor asks for, checked as the keys of a recipe are.

        Args:
            prompts (`str`): one a line.
            seed, steps, guidance (`float`, *optional*): as a field of the page gives numbers.
            keys: others of [`FilterFitJob`].

        Raises:
            ValueError: naming the field and what it takes.
        """
        for name, value in (("seed", seed), ("steps", steps)):
            if value is not None and (value != int(value) or value < 0):
                raise ValueError(f"{name}={value:g}: must be a whole number ≥ 0")
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        if self.found.prompted and not lines:
            raise ValueError("prompts: missing; write what to draw, one prompt a line")
        return FilterFitJob(
            pipeline=self.found.folder,
            prompts=lines if self.found.prompted else None,
            seed=int(seed or 0),
            num_inference_steps=int(steps) if steps else None,
            guidance_scale=guidance or None,
            batch_size=self.job.batch_size,
            device=self.job.device,
            output_dir=str(Path(self.job.output_dir or ".", UNSAVED)),
            **keys,
        )

    # Before and after

    def choices(self, fitted: Fitted | None) -> list[tuple[str, str]]:
        """What may come between before and after: `(title, word)`, the newest first."""
        known = [
            ("the filter you made", MADE, fitted),
            ("the filter that was opened", OPENED, self.found.checker),
            ("the unlearned pipeline", UNLEARNED, self.found.unlearned),
        ]
        return [(title, word) for title, word, there in known if there is not None]

    def compare(
        self,
        job: FilterFitJob,
        which: str | None,
        fitted: Fitted | None,
        count: float,
        action: str,
        told: Told = _nobody,
    ) -> Comparison:
        """Samples before and after.

        Raises:
            ValueError: there is nothing to compare with, or see [`compared`].
        """
        if which not in [word for _, word in self.choices(fitted)]:
            raise ValueError("nothing to compare with yet: make a filter first, or open one beside the pipeline")
        other = {MADE: fitted and fitted.checker, OPENED: self.found.checker}.get(which)
        after = {"unlearned": self.found.unlearned} if which == UNLEARNED else {"checker": other}
        return compared(job, self.found.pipeline, count=int(count), action=action, told=told, **after)

    @staticmethod
    def pictures(comparison: Comparison) -> tuple[str, str]:
        """Before, and after; what is blocked has a ring in both."""
        given = {"blocked": comparison.blocked, "numbers": range(len(comparison.before)), "titles": comparison.prompts}
        return tiles(comparison.before, **given), tiles(comparison.after, **given)

    # Marks

    def draw_page(self, job: FilterFitJob, marks: Marks, told: Told = _nobody) -> int:
        """Draw another page to mark; gives its number.

        Raises:
            ValueError: as many as a visitor may have are there already.
        """
        if len(marks) + PAGE > MOST:
            raise ValueError(f"samples: {len(marks)} are there, {MOST} at most; fit a filter with them")
        fitting.draw_page(self.found, job, marks, PAGE, told)
        return marks.pages - 1

    @staticmethod
    def page(marks: Marks, page: int, fitted: Fitted | None = None) -> str:
        """A page of samples with their marks, and rings around what the new filter blocks."""
        numbers = marks.numbers(page)
        if not len(numbers):
            return ""
        known = fitted is not None and len(fitted.blocked) >= numbers.stop
        return tiles(
            marks.images[numbers.start : numbers.stop].float() / 2 + 0.5,
            numbers=numbers,
            marks=[marks.kinds.get(number) for number in numbers],
            blocked=[fitted.blocked[number] for number in numbers] if known else None,
            titles=marks.prompts[numbers.start : numbers.stop],
        )

    @staticmethod
    def count(marks: Marks, page: int, *, rest_is_clean: bool) -> str:
        """Where one is, and what is marked."""
        if not len(marks):
            return "No samples yet."
        undesired, clean = len(marks.of("undesired")), len(marks.of("clean", rest_is_clean=rest_is_clean))
        return f"Page {page + 1} of {marks.pages}: {undesired} undesired and {clean} clean of {len(marks)} samples."

    # A filter

    def _loaded(self, name: str | None):
        return encoder_of(self.asked(prompts="any", encoder=name))

    def fit(self, job: FilterFitJob, marks: Marks, *, rest_is_clean: bool, told: Told = _nobody) -> Fitted:
        """Fit a filter: see [`fitting.fit`].

        Raises:
            ValueError: see there, or another encoder than the one proposed where the app saves nothing, since it is for anybody then.
        """
        if self.job.output_dir is None and job.encoder not in (None, self.found.encoder):
            raise ValueError(f"encoder={job.encoder!r}: this app loads no other than {self.found.encoder!r}")
        return fitting.fit(self.found, job, marks, self._encoder(job.encoder), rest_is_clean=rest_is_clean, told=told)

    def save(self, fitted: Fitted | None, name: str, *, whole: bool, action: str) -> tuple[Path, list[str]]:
        """Save a filter: see [`fitting.save`].

        Raises:
            ValueError: there is none, or see there.
        """
        if self.job.output_dir is None:
            raise ValueError("output_dir: this app saves nothing")
        if fitted is None:
            raise ValueError("no filter yet: mark samples and fit one first")
        return fitting.save(self.found, fitted, self.job.output_dir, name, whole=whole, action=action)

    def publish(self, saved: Path | None, repo_id: str, *, private: bool = True) -> tuple[str, list[str]]:
        """Publish what was saved: the pipeline with its filter where it was saved too, else the filter. See [`~hf_unlearn.hub.objects.publish`].

        Returns:
            What was published where, in a sentence, and lines of Python that use it.

        Raises:
            ValueError: nothing is saved, others reach the page, or it cannot be published there.
            OSError: no token, or the Hub did not take it.
        """
        if self.job.is_for_others:
            raise ValueError(f"host={self.job.host!r}: others reach this page, and it would publish with your token")
        if saved is None:
            raise ValueError("nothing is saved yet: save a filter first")
        whole = (saved / "pipeline").is_dir()
        sent = publish(
            saved / "pipeline" if whole else saved / "filter", repo_id.strip(), private=private, show=logger.info
        )
        seen = "there already: as its owner has set" if not sent.is_new else "private" if sent.private else "public"
        what = "The pipeline with its filter" if whole else "The filter"
        code = fitting.usage(self.found, *([sent.repo_id] if whole else [self.found.folder, sent.repo_id]))
        return f"{what} is published: {len(sent.files)} files in `{sent.repo_id}` ({seen}), {sent.url}", code

    # Images from elsewhere

    def judge(self, images: list[Image.Image], fitted: Fitted | None) -> tuple[str, str]:
        """What a filter says of images: the new one, else the one that was opened.

        Raises:
            ValueError: no filter of images, no images, or too many.
        """
        checker = fitted.checker if fitted is not None else self.found.checker
        check_sees_images(checker)
        if not 1 <= len(images) <= UPLOADS:
            raise ValueError(f"images: {len(images)} are given; drop 1 to {UPLOADS}")
        verdict = checker.judge(images)
        shown = torch.stack([_square(image) for image in images])
        concepts, scores = checker.concepts, verdict.scores.tolist()
        lines = [
            f"{number}: {'blocked' if flag else 'released'} ("
            + ", ".join(
                f"{name} {value:.3g}, line {line:.3g}"
                for name, value, line in zip(concepts, row, checker.thresholds.values(), strict=True)
            )
            + ")"
            for number, (flag, row) in enumerate(zip(verdict.flags.tolist(), scores, strict=True))
        ]
        return tiles(shown, numbers=range(len(images)), blocked=verdict.flags.tolist()), "\n".join(lines)


def check_sees_images(checker: FASTSafetyChecker | None) -> None:
    """
    Raises:
        ValueError: there is no filter, or it judges a generator's latents.
    """
    if checker is None:
        raise ValueError("no filter yet: make one first, or open one")
    if checker.encoder is None:
        raise ValueError("the filter judges a generator's latents, which images from elsewhere have none of")


def _square(image: Image.Image, size: int = 160) -> torch.Tensor:
    """For a look: in [0, 1], in colours, with room around it."""
    fitted = of_pil(image).expand(3, -1, -1) / 2 + 0.5
    array = (fitted.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(array)
    picture = picture.resize([max(1, round(side * size / max(picture.size))) for side in picture.size])
    canvas = Image.new("RGB", (size, size), "#868e96")
    canvas.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1) / 255
