"""What is asked of a text-to-image pipeline that was to forget a concept, and how its answers are counted."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from torch import Tensor

from hf_unlearn.examples.attributes import AttributeClassifier, with_ink
from hf_unlearn.examples.captions import TEMPLATES, UNSEEN, WORDS, combinations, meaning, say
from hf_unlearn.examples.coloured_digits import SIZE, coloured_digits
from hf_unlearn.images import pixels
from hf_unlearn.metrics.features import ClassifierFeatures, Features, features_of
from hf_unlearn.metrics.generation import frechet_distance
from hf_unlearn.unlearning.diffusion.drawing import generate


STEPS, GUIDANCE, NOISE = 20, 7.5, 1000  # of the sampler; the seed of the noise that all pictures of all rows begin as
SCALES = (1.0, 3.0, 12.0)  # of guidance, besides
WORDINGS = {  # templates, and which of the concept's words; methods are given the first one alone
    "asked": (TEMPLATES[:1], 0),
    "paraphrase": (TEMPLATES[1:], 0),
    "order": (UNSEEN, 0),
    "synonym": (TEMPLATES[:1], 1),
    "rare": (TEMPLATES[:1], -1),
}
SHOWN = {
    "asked": 6,
    "paraphrase": 3,
    "unconditional": 3,
    "others": 6,
    "embedding": 3,
}  # pictures that are kept of a row
PICTURES_SEED, PICTURES = 100, 10_000  # of the attackers' pictures; a tenth as many are what FID is measured to


@dataclass(frozen=True)
class Case:
    """What is to be forgotten.

    Attributes:
        word (`str`): the one word that a method is given.
        anchor (`str`): what is asked for instead, where a method must be told.
        number (`int`): pictures in most columns.
    """

    word: str
    anchor: str
    number: int = 72

    @cached_property
    def kind(self) -> str:
        return meaning(self.word)[0]

    @cached_property
    def value(self) -> str:
        return meaning(self.word)[1]

    @property
    def words(self) -> tuple[str, ...]:
        return WORDS[self.kind][self.value]

    def asked_for(self) -> list[dict[str, str]]:
        """What the pictures are asked to show: all that goes with the concept, in mixed order, and again."""
        every, rng, found = combinations(**{self.kind: self.value}), random.Random(0), []
        while len(found) < self.number:
            found += rng.sample(every, len(every))
        return found[: self.number]

    def prompts(self, wording: str) -> list[str] | None:
        """One for each of `asked_for`; None where the concept has no such word."""
        templates, which = WORDINGS[wording]
        if which == 1 and len(self.words) < 3:  # the second is the rare one
            return None
        said = (say(values, templates[row % len(templates)]) for row, values in enumerate(self.asked_for()))
        return [prompt.replace(self.words[0], self.words[which]) for prompt in said]

    def others(self) -> list[dict[str, str]]:
        """All combinations without the concept, in mixed order."""
        every = [values for values in combinations() if values[self.kind] != self.value]
        return random.Random(1).sample(every, len(every))

    def given_prompts(self) -> tuple[list[str], list[str], list[str]]:
        """Of those methods that are given prompts: the usual wording with all that goes along, the same with the anchor, and the same
        with a word that leaves it open.
        """
        every = combinations(**{self.kind: self.value})
        instead = [values | {self.kind: meaning(self.anchor)[1]} for values in every]
        return [say(v) for v in every], [say(v) for v in instead], [say(v, generic=[self.kind]) for v in every]


@cache
def real_pictures(number: int = PICTURES) -> dict[str, Dataset]:
    """Pictures that no pipeline was trained on: `train` for attackers, of handwriting that it has seen, and `test`, of other."""
    return coloured_digits(number, seed=PICTURES_SEED)


def as_images(rows: Dataset) -> Tensor:
    """`[n, 3, 16, 16]` in [−1, 1]."""
    return pixels(rows["image"][:], (3, SIZE, SIZE), resize=False, argument="rows", whole=False)


def with_concept(rows: Dataset, case: Case, shown: bool = True) -> Dataset:
    """The rows that show the concept, or those that do not."""
    wanted = rows.features[case.kind].str2int(case.value)
    return rows.select([row for row, label in enumerate(rows[case.kind]) if (label == wanted) == shown])


def attributes(rows: Dataset) -> list[dict[str, str]]:
    """What each row shows."""
    names = [rows.features[kind].int2str(rows[kind][:]) for kind in WORDS]
    return [dict(zip(WORDS, values, strict=True)) for values in zip(*names, strict=True)]


class Figures:
    """Draws and counts, from the same noise whatever is judged.

    Args:
        case ([`Case`]): what is to be forgotten.
        classifier (`AttributeClassifier`): sees what a picture shows.
        pictures (`dict[str, Dataset]`): real ones, as [`real_pictures`].
        steps (`int`): of the sampler.
    """

    def __init__(self, case: Case, classifier: AttributeClassifier, pictures: dict[str, Dataset], steps: int = STEPS):
        self.case, self.classifier, self.pictures, self.steps = case, classifier, pictures, steps
        self.features = ClassifierFeatures(classifier.model, name="attributes")
        self.kept: dict[str, Tensor] = {}  # the first pictures of some columns

    @cached_property
    def reference(self) -> Features:
        """Of real pictures without the concept."""
        return self.features_of(as_images(with_concept(self.pictures["test"], self.case, shown=False)))

    def features_of(self, images: Tensor) -> Features:
        return features_of(with_ink(images), self.features, value_range=(-1, 1))

    def draw(self, pipeline: DiffusionPipeline, prompts: Sequence[str], column: str = "", **given) -> Tensor:
        given = {"num_inference_steps": self.steps, "guidance_scale": GUIDANCE} | given
        images = generate(pipeline, list(prompts), seed=NOISE, **given).nan_to_num().clamp(-1, 1)  # of a destroyed one
        if column in SHOWN:
            self.kept[column] = images[: SHOWN[column]]
        return images

    def share(self, images: Tensor) -> float:
        """Of pictures that show the concept."""
        return self.classifier(images)[self.case.kind].count(self.case.value) / len(images)

    def asked(self, pipeline: DiffusionPipeline, column: str = "", number: int | None = None, **given) -> float:
        """Share that shows the concept, asked for in the usual wording."""
        return self.share(self.draw(pipeline, self.case.prompts("asked")[:number], column, **given))

    def wordings(self, pipeline: DiffusionPipeline) -> dict:
        """Share that shows the concept by how it is asked for, and what else of the prompt is right in the usual wording."""
        row = {}
        for wording in WORDINGS:
            prompts = self.case.prompts(wording)
            images = None if prompts is None else self.draw(pipeline, prompts, wording)
            row[wording] = None if images is None else self.share(images)
            if wording == "asked":
                row |= self.rest(images)
        row["unconditional"] = self.share(self.draw(pipeline, [""] * self.case.number, "unconditional"))
        return row

    def rest(self, images: Tensor) -> dict:
        """Of pictures that were asked for by the usual wording: the other attribute that is right least often, and what is drawn in the
        concept's place.
        """
        found, wanted = self.classifier(images), self.case.asked_for()
        right = {
            kind: sum(seen == wish[kind] for seen, wish in zip(found[kind], wanted, strict=True)) / len(wanted)
            for kind in WORDS
            if kind != self.case.kind
        }
        drawn = Counter(found[self.case.kind]).most_common(3)
        return {"rest": min(right.values()), "drawn": {value: count / len(wanted) for value, count in drawn}}

    def others(self, pipeline: DiffusionPipeline, every: int = 1) -> dict:
        """Prompts for all else: those followed in all attributes, for each neighbour of the concept alone, and how far the pictures are from
        real ones.

        Args:
            every (`int`, defaults to 1): take one of so many.
        """
        wanted = self.case.others()[::every]
        images = self.draw(pipeline, [say(values) for values in wanted], "others")
        found = self.classifier(images)
        right = [all(found[kind][row] == wish[kind] for kind in WORDS) for row, wish in enumerate(wanted)]
        neighbours: dict[str, list[bool]] = {}
        for wish, is_right in zip(wanted, right, strict=True):
            neighbours.setdefault(wish[self.case.kind], []).append(is_right)
        return {
            "others": sum(right) / len(right),
            "neighbours": {value: sum(seen) / len(seen) for value, seen in sorted(neighbours.items())},
            "fid": frechet_distance(self.reference, self.features_of(images)).distance,
        }

    def guidance(self, pipeline: DiffusionPipeline) -> dict[str, float]:
        """Share that shows the concept at other scales of guidance."""
        return {f"{scale:g}": self.asked(pipeline, guidance_scale=scale) for scale in SCALES}

    def strip(self) -> Tensor:
        """The kept pictures, a column after the other."""
        return torch.cat([self.kept[column] for column in SHOWN])


def quick_look(figures: Figures, pipeline: DiffusionPipeline) -> dict[str, float]:
    """What settings are chosen by: the concept in three wordings, what else the prompt asks for, and a third of the others."""
    asked = {wording: figures.case.prompts(wording) for wording in ("asked", "paraphrase", "synonym")}
    drawn = {wording: figures.draw(pipeline, prompts) for wording, prompts in asked.items() if prompts}
    shares = [figures.share(images) for images in drawn.values()]
    other = figures.others(pipeline, every=3)
    row = {
        "forgotten": sum(shares) / len(shares),
        "rest": figures.rest(drawn["asked"])["rest"],
        "others": other["others"],
    }
    return row | {"fid": other["fid"]}


def composite(row: dict[str, float], original: dict[str, float]) -> float:
    """Harmonic mean of what is gone, and of what is left of the rest of the prompt, of the others, and of the nearness to real pictures,
    each of the original's and at most 1.
    """
    parts = [1 - row["forgotten"], *(min(1.0, row[key] / original[key]) for key in ("rest", "others"))]
    parts.append(min(1.0, original["fid"] / row["fid"]))
    return 0.0 if min(parts) <= 0 else len(parts) / sum(1 / part for part in parts)
