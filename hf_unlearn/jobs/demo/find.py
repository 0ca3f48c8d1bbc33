"""FIND: one training run, watched, tells which examples taught the classifier nonsense."""

from __future__ import annotations

from dataclasses import dataclass

from datasets import Dataset, concatenate_datasets
from transformers.trainer_callback import PrinterCallback

from hf_unlearn import InfluenceConfig, InfluenceReport, InfluenceTrainer
from hf_unlearn.data import split_by_values
from hf_unlearn.examples.classifier import TRAINING, Told, digits_model, digits_processor
from hf_unlearn.examples.datasets import with_wrong_labels

from .stage import QUIET, Stage


SHARE = 0.1  # of the labels of one digit


@dataclass(frozen=True)
class Found:
    """What the first act leaves.

    Args:
        train (`Dataset`): what the classifier learned: `id`, `image`, `label`, and `wrong`, which nobody but the demo knows.
        suspects (`Dataset`): rows of it, the most suspicious first, with `mu`; as many as there are wrong labels.
        all_within (`int`): how many of the most suspicious one must look at to see every wrong label.
        report ([`InfluenceReport`]): of every row.
        model (`str`): folder of the classifier.
    """

    train: Dataset
    suspects: Dataset
    all_within: int
    report: InfluenceReport
    model: str

    @property
    def hits(self) -> int:
        return sum(self.suspects["wrong"])

    @property
    def kept(self) -> Dataset:
        """All rows that are no suspects."""
        return split_by_values(self.train, "id", self.suspects["id"][:])[1]


def play(stage: Stage, rows: Dataset) -> Found:
    """Spoil the labels, train, and ask what had to be learned by heart."""
    train = spoiled(rows, stage.mislabelled, stage.seed)
    planted = sum(train["wrong"])
    stage.say(
        f"{len(train):,} training images; {planted} images of the digit {stage.mislabelled} are given a wrong label on purpose"
    )
    trainer = watched_training(stage, train)
    report = trainer.influence.join(train, "id", ["wrong"])
    report.save_to_disk(stage.folder / "original" / "_private" / "report")
    ranking = report.top(len(train))
    suspects = in_order(train, ranking["sample_id"][:planted]).add_column("mu", ranking["mu"][:planted])
    all_within = 1 + max(rank for rank, wrong in enumerate(ranking["wrong"]) if wrong)
    found = Found(train, suspects, all_within, report, trainer.args.output_dir)
    stage.say(
        f"of the {planted} most suspicious images {found.hits} are those: precision and recall {100 * (found.hits / planted):.0f} %, "
        f"by chance {100 * (planted / len(train)):.1f} %; all {planted} are among the first {all_within}"
    )
    return found


def spoiled(rows: Dataset, digit: int, seed: int) -> Dataset:
    """The rows, a tenth of one digit's labels wrong."""
    those, others = split_by_values(rows, "label", [digit])
    those = with_wrong_labels(those, SHARE, seed=seed)
    return concatenate_datasets([those, others.add_column("wrong", [False] * len(others))])


def watched_training(stage: Stage, train: Dataset) -> InfluenceTrainer:
    """An ordinary training. `target="self"`: how much of what was learned of an image came from that image alone."""
    trainer = InfluenceTrainer(
        digits_model(stage.seed),
        args=InfluenceConfig(str(stage.folder / "original"), seed=stage.seed, **TRAINING, **QUIET),
        train_dataset=train,
        target="self",
        processing_class=digits_processor(),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Told("the classifier, watched by f-INE", quiet=False))
    trainer.train()
    trainer.save_model()
    return trainer


def in_order(rows: Dataset, ids: list[int]) -> Dataset:
    """The rows of these ids."""
    places = {sample: place for place, sample in enumerate(rows["id"])}
    return rows.select([places[int(sample)] for sample in ids])
