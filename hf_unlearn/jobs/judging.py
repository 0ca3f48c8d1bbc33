"""What the jobs of all generators share: a classifier that judges what is drawn before and after, its table, and the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor

from ..files import loading
from ..hub.card import Figure
from ..images import image_column, pixels
from ..metrics.features import ClassifierFeatures, FeatureMoments, Features, features_of
from ..metrics.generation import UnlearnedResult, class_shift, density_coverage, frechet_distance, percentage_unlearned
from .alone import made_once
from .keys import run_training, tell


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainingArguments

    from ..unlearning.diffusion.vdu import VDUTrainer
    from ..unlearning.gan.adapt_then_unlearn import AdaptThenUnlearnTrainer


MEASURE_SEED = 5  # apart from the noise of grids and replay
NEIGHBOUR = 5  # that sets the radius of coverage
PART = 512  # real images that are read at once


def classifier_of(
    name: str, config: TrainingArguments | None, *, argument: str = "classifier", seed: int = 0
) -> ClassifierFeatures:
    """An image classifier with its processor, as the key `argument` of a recipe names it.

    Args:
        name (`str`): `"digits"`, a folder or an id.
        config (`TrainingArguments`, *optional*): of the job; None where it runs in one process.
        argument (`str`, defaults to `"classifier"`): what to call it in an error.
        seed (`int`, defaults to 0): of `"digits"`, which is trained on first use: seconds.

    Raises:
        ValueError: there is none.
    """
    folder = name
    if name == "digits":
        folder = made_once(config, name, seed=seed)
    with loading(argument, name, "a classifier and its image processor"):
        return ClassifierFeatures.from_pretrained(folder)


def reference_of(
    rows: Dataset | None,
    classifier: ClassifierFeatures,
    shape: tuple[int, int, int],
    *,
    resize: bool,
    each: bool = True,
) -> Features | FeatureMoments | None:
    """Features of real images to compare with; None where there are fewer than two.

    Args:
        rows (`Dataset`, *optional*): with a column of images; of `eval_split`, which errors name.
        shape: `(channels, height, width)` of what the model draws.
        resize (`bool`): fit the images to it.
        each (`bool`, defaults to `True`): of each image, for coverage; else their moments alone, which take no more memory for more images.

    Raises:
        ValueError: no images, or images that do not fit the model.
    """
    if rows is None or len(rows) < 2:
        return None
    column = image_column(rows.column_names, "eval_split")
    found, moments = [], FeatureMoments()
    for begin in range(0, len(rows), PART):
        some = range(begin, min(begin + PART, len(rows)))
        images = [rows[index][column] for index in some]
        images = pixels(images, shape, resize=resize, argument="eval_split", rows=some)
        part = features_of(images, classifier, value_range=(-1, 1))
        found.append(part.values) if each else moments.update(part)
    return Features(torch.cat(found), classifier.name) if each else moments


@dataclass(frozen=True)
class Look:
    """What a judge sees in a set of samples.

    Args:
        classes (`Tensor`): `[n]`, int64.
        features ([`Features`], *optional*): where there is a reference to compare them with.
    """

    classes: Tensor
    features: Features | None


@dataclass(frozen=True)
class Judge:
    """Says what a generator draws before and after it forgets.

    Args:
        classifier ([`ClassifierFeatures`]): counts classes; its features are what distances are measured on.
        samples (`int`): images drawn each time, ≥ 2.
        forgotten (`list[int]`): its classes that are forgotten; may be empty, then it only counts.
        reference ([`Features`] or [`FeatureMoments`], *optional*): of real images of the other classes, by the same classifier.
        split (`str`, *optional*): that they come from.
        coverage (`bool`, defaults to `False`): also how many of them are near a sample, which takes the features of each.
    """

    classifier: ClassifierFeatures
    samples: int
    forgotten: list[int] = field(default_factory=list)
    reference: Features | FeatureMoments | None = None
    split: str | None = None
    coverage: bool = False

    def look(self, trainer: VDUTrainer | AdaptThenUnlearnTrainer) -> Look | None:
        """At samples from noise that is always the same; None where the model is destroyed and there is nothing to count."""
        images = trainer.draw(self.samples, MEASURE_SEED)
        if not torch.isfinite(images).all():
            return None
        features = None if self.reference is None else features_of(images, self.classifier, value_range=(-1, 1))
        return Look(self.classifier.classify(images), features)

    def figures(self, before: Look, after: Look) -> tuple[list[Figure], Table]:
        """Figures for the card, and a table of them with the counts of every class."""
        names = [str(value) for value in self.classifier.model.config.id2label.values()]
        unlearned, figures = self._of_classes(before.classes, after.classes, len(names))
        if self.reference is not None:
            figures += self._of_features(before.features, after.features)
        table = Table(title=f"{self.samples} samples from the same noise, as {self.classifier.name} sees them")
        for heading in ("", "before", "after"):
            table.add_column(heading, justify="left" if not heading else "right")
        for figure in figures:
            cells = [f"{value:.2f} {figure.unit}".rstrip() for value in (figure.before, figure.after)]
            if figure.metric == "pul":
                cells[1] += f" ({unlearned.low:.2f} to {unlearned.high:.2f})"
            table.add_row(figure.name, *cells)
        table.add_section()
        for index, name in enumerate(names):
            counts = (str(int((look.classes == index).sum())) for look in (before, after))
            table.add_row(f"{name} (forgotten)" if index in self.forgotten else name, *counts)
        return figures, table

    def _of_classes(
        self, before: Tensor, after: Tensor, num_classes: int
    ) -> tuple[UnlearnedResult | None, list[Figure]]:
        if not self.forgotten:
            return None, []
        unlearned, figures = None, []
        hits = [torch.isin(classes, torch.tensor(self.forgotten)) for classes in (before, after)]
        if hits[0].any():
            unlearned = percentage_unlearned(before, after, self.forgotten)
            share = [100 * float(hit.double().mean()) for hit in hits]
            figures += [
                Figure(
                    metric="share",
                    name="Samples of the forgotten kind",
                    before=share[0],
                    after=share[1],
                    split="samples",
                ),
                Figure(metric="pul", name="Percentage unlearned", before=0.0, after=unlearned.pul, split="samples"),
            ]
        if not any(hit.all() for hit in hits):
            shift = class_shift(before, after, self.forgotten, num_classes)
            figures.append(
                Figure(
                    metric="total_variation",
                    name="Change in the shares of the other classes",
                    before=0.0,
                    after=100 * shift.total_variation,
                    split="samples",
                )
            )
        return unlearned, figures

    def _of_features(self, before: Features, after: Features) -> list[Figure]:
        sizes = f"{len(before):,} samples to {len(self.reference):,} other real images"
        distances = [frechet_distance(self.reference, drawn).distance for drawn in (before, after)]
        figures = [
            Figure(
                metric="fid",
                name=f"Fréchet distance of {sizes}, features of {self.classifier.name}",
                before=distances[0],
                after=distances[1],
                split=self.split,
                unit="",
            )
        ]
        if self.coverage and min(len(before), len(self.reference)) > NEIGHBOUR:
            covered = [
                100 * density_coverage(self.reference, drawn, k=NEIGHBOUR).coverage for drawn in (before, after)
            ]
            figures.append(
                Figure(
                    metric="coverage",
                    name="Coverage of the same real images",
                    before=covered[0],
                    after=covered[1],
                    split=self.split,
                )
            )
        return figures


def forget_and_report(trainer: VDUTrainer | AdaptThenUnlearnTrainer, judge: Judge | None) -> dict[str, Any] | None:
    """Draw, train, draw again, save, and say where things are; the first process returns what it said.

    Raises:
        ValueError: the judge cannot read what the model draws; nothing was trained.
        FloatingPointError: the loss is not finite.
    """
    before = judge.look(trainer) if judge else None
    run_training(trainer)
    after = judge.look(trainer) if before else None
    table = None
    if before and after:
        trainer.results, table = judge.figures(before, after)
    if trainer.args.grid_images:
        trainer.card_values = trainer.card_values | {"picture": "pictures/after.png"}
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return None
    code = trainer._card_defaults(trainer.args.output_dir)["load_snippet"]
    return tell(trainer, table, code, kind="pipeline", grids=bool(trainer.args.grid_images))
