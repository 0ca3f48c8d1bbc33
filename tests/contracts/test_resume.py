"""What is resumed and what is refused: a run that has ended, one of another method or data, half of one, a damaged one, two at once."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from trainers import (
    INFLUENCES,
    JOBS,
    UNLEARNERS,
    arguments,
    build,
    check_same,
    gan,
    images,
    outcome,
    own_images,
    pairs,
    resnet,
    spoilt,
    weights,
)

from hf_unlearn import GANTrainer
from hf_unlearn.influence.report.records import read_observations
from hf_unlearn.training.runs import MARKER


# What is refused


SHORT = {
    "max_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "per_device_train_batch_size": 4,
}  # ends within an epoch


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A copy of a folder in which a job has trained for two steps, with a checkpoint after each; `finished.ends` has what it came to."""
    root, done = tmp_path_factory.mktemp("finished"), {}

    def finished(name, target):
        if name not in done:
            done[name] = root / name
            trainer = build(name, done[name], **SHORT)
            if name == "propagated":  # stopped in the end, before the sweep
                trainer._propagate = lambda: None
            trainer.train()
            finished.ends[name] = outcome(trainer)
        shutil.copytree(done[name], target)
        return target

    finished.ends = {}
    return finished


def check_refused(trainer, words, resume=True):
    """In one line, and nothing is lost: no file, no weight."""
    folder = Path(trainer.args.output_dir)
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    before = weights(trainer) if isinstance(trainer, GANTrainer) else {}  # others may have read the checkpoint's
    with pytest.raises(ValueError) as error:
        trainer.train(resume_from_checkpoint=resume)
    message = str(error.value)
    assert words in message
    assert "\n" not in message
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    assert all(torch.equal(value, weights(trainer)[name]) for name, value in before.items())


@pytest.mark.parametrize("name", JOBS)
class TestWholeOrNotThere:
    def test_no_checkpoint(self, name, tmp_path):
        for folder in ("checkpoint-3", "checkpoint-best", "checkpoint-4-old"):
            (tmp_path / folder).mkdir()
            if folder != "checkpoint-3":
                (tmp_path / folder / MARKER).write_text("{}")
        (tmp_path / "_private").mkdir()
        check_refused(build(name, tmp_path, **SHORT), f"complete checkpoint in '{tmp_path}'")

    def test_half_a_checkpoint_is_passed_over(self, name, finished, tmp_path):
        """Half of its files, and the rest is of no use; then there is none."""
        folder = finished(name, tmp_path / "run")
        newest = folder / "checkpoint-2"
        (newest / MARKER).unlink()
        for weights_file in newest.glob("*.safetensors"):
            weights_file.write_bytes(b"half")
        begun = []
        trainer = build(name, folder, **SHORT)
        trainer.callback_handler.on_step_begin = lambda *args: (
            begun.append(trainer.state.global_step) or trainer.control
        )
        trainer.train(resume_from_checkpoint=True)
        assert begun == [1]
        for step in (1, 2):
            (folder / f"checkpoint-{step}" / MARKER).unlink()
        check_refused(build(name, folder, **SHORT), "checkpoint in ")


def gone(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def other_format(folder):
    file = folder / "checkpoint-2" / MARKER
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))


ORDER = list(range(9))
REFUSED = {  # job, what is done to its folder, what is other in the new run, what is resumed from, words
    "another method": ("unlearn", None, {"job": "pbu"}, "method 'unlearn', this is 'pbu'"),
    "another method, of a pipeline": ("vdu", None, {"job": "pbu"}, "method 'vdu', this is 'pbu'"),
    "of no GAN": ("unlearn", None, {"job": "gan"}, "method 'unlearn', this is 'gan'"),
    "of a GAN": ("gan", None, {"job": "unlearn", "resume": "checkpoint-2"}, "method 'gan', this is 'unlearn'"),
    "of a GAN, not unlearned": ("gan", None, {"job": "adapt"}, "method 'gan', this is 'adapt_then_unlearn'"),
    "of no recorded run": ("unlearn", None, {"job": "in_run"}, "method 'unlearn', this is 'influence'"),
    "half of it by name": ("sft", gone("checkpoint-2/" + MARKER), {"resume": "checkpoint-2"}, "is no complete"),
    "not there by name": ("vdu", None, {"resume": "checkpoint-7"}, "is no complete checkpoint"),
    "not there by name, of a GAN": ("gan", None, {"resume": "checkpoint-7"}, "is no complete checkpoint"),
    "another format": ("unlearn", other_format, {}, "format 99"),
    **{
        f"{name} without {file}": (name, gone(file), {}, f"{file.split('/')[1]} is missing")
        for name, file in (
            *((name, "_private/reference.safetensors") for name in (*UNLEARNERS, "adapt")),
            *((name, "_private/fisher.safetensors") for name in ("unlearn", "vdu")),
            ("vdu", "checkpoint-2/ema.safetensors"),
            ("adapt", "_private/adapted-0.safetensors"),
        )
    },
    "other players": ("gan", None, {"model": lambda: gan(latent_dim=5)}, "a model (or adapter) of other parameters"),
    "another architecture": ("unlearn", None, {"model": resnet}, "a model (or adapter) of other parameters"),
    "an adapter": ("sft", None, {"peft_config": lambda: LoraConfig(target_modules=["q_proj"])}, "a model (or adapter) of other"),
    "other norms": ("gan", None, {"model": lambda: gan("pixel")}, "a model (or adapter) of other parameters"),
    **{
        f"{name}, other {argument}": (name, None, {argument: rows}, f"was started with other rows of {argument}")
        for name, argument, rows in (
            ("unlearn", "retain_dataset", lambda: images(5, [1, 0], seed=1)),
            ("sft", "forget_dataset", lambda: pairs(8)),
            ("vdu", "forget_dataset", lambda: images(8)),
            ("gan", "train_dataset", lambda: own_images(39)),
        )
    },
    "other feedback": ("adapt", None, {"undesired": lambda: own_images(7)}, "started with other rows of undesired"),
    "another fisher": ("adapt", None, {"fisher_samples": 9}, "started with fisher_samples 8, this is 9"),
    "another stage 1": ("adapt", None, {"adapted_models": 2}, "started with adapted_models 1, this is 2"),
    **{
        f"{name} {what}": (name, None, {"train_dataset": rows}, words)
        for name in ("in_run", "propagated")
        for what, rows, words in (
            ("fewer rows", lambda: images(8, [0, 1, 2]), "sample_ids: not those that"),
            ("reordered", lambda: images(9, [0, 1, 2]).select(ORDER[::-1]), "sample_ids: not those that"),
            ("other rows", lambda: images(9, [0, 1, 2]).map(lambda row: {"labels": 0}), "the training set has other rows"),
        )
    },
    "fewer texts": ("fine", None, {"train_dataset": lambda: JOBS["fine"].given(0.0)["train_dataset"].select(ORDER[:8])},
                    "sample_ids: not those that"),
    "other targets": ("in_run", None, {"target_dataset": lambda: {"other": images(5, seed=1)}}, "started with targets"),
    "in_run, not propagated": ("in_run", None, {"job": "propagated"}, "started with observation"),
    "propagated, not in_run": ("propagated", None, {"job": "in_run"}, "started with observation"),
    "other settings": ("fine", None, {"target_every": 7}, "started with settings"),
    "without records": ("fine", gone("_private/influence/manifest.json"), {}, "holds no records"),
    "without a trajectory": ("propagated", lambda folder: shutil.rmtree(folder / "_private" / "trajectory"), {},
                             "step 0 of the run is not in"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, finished, tmp_path):
    name, break_it, changes, words = REFUSED[case]
    folder = finished(name, tmp_path / "run")
    if break_it:
        break_it(folder)
    changes = {key: value() if callable(value) else value for key, value in changes.items()}
    name, resume = changes.pop("job", name), changes.pop("resume", True)
    trainer = build(name, folder, **(SHORT | changes))
    check_refused(trainer, words, resume if resume is True else str(folder / resume))


def test_rows_without_ids_are_known_by_what_they_hold(tmp_path):
    rows = images(9, [0, 1, 2]).remove_columns("id")
    build("in_run", tmp_path, train_dataset=rows, **SHORT).train()
    again = build("in_run", tmp_path, train_dataset=rows.select(ORDER[::-1]), **SHORT)
    check_refused(again, "the training set has other rows")


# A run that has ended


STOPPED = {"guard_steps": 1, "guard_patience": 1, "max_steps": 9, "save_steps": 5}  # between two checkpoints
EPOCHS = {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "epoch"}
ENDS = {  # job, settings, and the step it ends at
    **{name: (name, {}, 2) for name in JOBS},
    "unlearn, epochs": ("unlearn", EPOCHS, 3),
    "unlearn, stopped": ("unlearn", STOPPED, 2),
    "vdu, stopped": ("vdu", STOPPED, 2),
    "gan, collapsed": ("gan", {"max_steps": 9, "save_steps": 5}, 2),
}


class Stops:
    """The guard sees what ends a run; the best state is an earlier one."""

    def remembered(self):
        return 1.0 - self.state.global_step

    def utility_drop(self, baseline):
        return 0.001 * self.state.global_step

    def draw(self, count, seed):
        drawn = super().draw(count, seed)
        return drawn[:1].expand_as(drawn) + 9 if self.state.global_step == 2 else drawn


@pytest.mark.parametrize("case", ENDS)
def test_a_run_that_has_ended_ends_as_it_ended(case, finished, tmp_path):
    """No step, no bit, whatever the model is that the trainer is given: the run is all on disk."""
    name, changes, steps = ENDS[case]
    folder, mixin = tmp_path / "run", Stops if case.endswith(("stopped", "collapsed")) else None
    if case in JOBS and case != "propagated":
        finished(name, folder)
        expected = finished.ends[name]
    else:
        first = build(name, folder, mixin=mixin, **SHORT | changes)
        first.train()
        expected = outcome(first)
    start = JOBS[name].start
    given = {} if name == "adapt" else {start: spoilt(arguments(name)[start])}
    again, begun = build(name, folder, mixin=mixin, **SHORT | changes | given), []
    again.callback_handler.on_step_begin = lambda *args: begun.append(args) or again.control
    again.train(resume_from_checkpoint=True)
    assert (begun, again.state.global_step) == ([], steps)
    check_same(outcome(again), expected, exact=True)


@pytest.mark.parametrize("name", JOBS)
def test_an_earlier_run_in_the_folder_is_nobody_s(name, finished, tmp_path):
    """Another run starts, and is killed before its first checkpoint. Before it starts, it has other settings."""
    folder = finished(name, tmp_path / "run")
    other = build(name, folder, **SHORT)
    for setting, value in (("learning_rate", 0.5), ("seed", 1)):
        setattr(other.args, setting, value)
        check_refused(
            other, f"was started with {'learning_rate' if setting == 'learning_rate' else 'seed 42, this is 1'}"
        )
        setattr(other.args, setting, 1 if setting == "seed" else JOBS[name].values["learning_rate"])
    other.callback_handler.on_step_begin = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        other.train()
    for resume, words in (
        (True, f"no complete checkpoint in '{folder}'; those that are there are of an earlier run"),
        (str(folder / "checkpoint-2"), "is of another run than"),
    ):
        check_refused(other, words, resume)


@pytest.mark.parametrize("name", ["unlearn", "vdu", "adapt", "fine"])  # the others have the `train` of one of them
def test_one_run_at_a_time(name, finished, tmp_path):
    """While one is at work, whether another starts or goes on; a lock that a dead process left holds nobody up."""
    folder, refused = finished(name, tmp_path / "run"), []
    (folder / "_private" / "lock").write_text("4711")
    first, second = (build(name, folder, **SHORT) for _ in range(2))

    def meanwhile(*args):
        for resume in (None, True):
            with pytest.raises(ValueError, match="^output_dir: another run is at work in .*choose another folder$"):
                second.train(resume_from_checkpoint=resume)
            refused.append(resume)
        return first.control

    first.callback_handler.on_step_begin = meanwhile
    first.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert (first.state.global_step, len(refused)) == (2, 2)


# Damage


def shorter(content):
    return content[: len(content) // 2]


def emptied(content):
    return b""


def flipped(content):
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("name", JOBS)
def test_damage_is_named(name, finished, tmp_path):
    """Every file of a checkpoint: cut off, emptied, or of other bytes; and of what a resumed run reads beside it: cut off and emptied."""
    folder = finished(name, tmp_path / "run")
    checkpoint, private = folder / "checkpoint-2", folder / "_private"
    read = {"adapt": ["reference.safetensors", "adapted-0.safetensors"], "gan": []}
    read |= {job: ["reference.safetensors"] for job in UNLEARNERS}
    read |= {
        job: ["influence/manifest.json", "influence/samples.arrow", "influence/rows-00000.arrow"] for job in INFLUENCES
    }
    read["propagated"] = read["propagated"][:2] + [
        "trajectory/step-00000000.safetensors",
        "trajectory/state-00000000.safetensors",
    ]
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    assert {"trainer_state.json", "optimizer.pt", "rng_state.pth", MARKER} <= {path.name for path in files}
    trainer = build(name, folder, **SHORT)
    damages = shorter, flipped, emptied
    for number, file in enumerate([*files, *(private / part for part in (*read[name], MARKER))]):
        whole = file.read_bytes()
        if not whole:
            continue
        # Files of a checkpoint are all held against their digests: one damage each, in turn.
        for damage in (damages[number % 3],) if file in files and file.name != MARKER else (shorter, emptied):
            file.write_bytes(damage(whole))
            with pytest.raises(ValueError) as error:
                trainer.train(resume_from_checkpoint=True)
            message = str(error.value)
            assert f"{file} is damaged" in message
            assert "; restore it" in message
            assert "\n" not in message
        file.write_bytes(whole)
    trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", INFLUENCES)
def test_a_recorded_run_keeps_its_name(name, finished, tmp_path):
    folder = finished(name, tmp_path / "run")
    before = read_observations(folder / "_private" / "influence")[1]["run_id"]
    trainer = build(name, folder, **SHORT)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert trainer.influence.manifest["run_id"] == before


@pytest.mark.parametrize("name", ["unlearn", "gan"])
def test_writing_over_a_checkpoint_begins_with_nothing(name, finished, tmp_path):
    """Neither a marker that would stand for the half of one, nor a file that would be taken for a part of it."""
    folder = finished(name, tmp_path / "run")
    (folder / "checkpoint-1" / "adapter_model.safetensors").write_text("left")
    seen = []

    class Looks:
        def _save_optimizer_and_scheduler(self, output_dir):
            seen.append({"adapter_model.safetensors", MARKER} & {path.name for path in Path(output_dir).iterdir()})
            super()._save_optimizer_and_scheduler(output_dir)

    build(name, folder, mixin=Looks, **SHORT).train()
    assert seen == [set(), set()]


def test_the_reference_is_the_original_and_not_the_checkpoint(finished, tmp_path):
    trainer = build("unlearn", finished("unlearn", tmp_path / "run"), **SHORT)
    start = weights(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(start[f"model/{name}"], value) for name, value in trainer.reference.parameters.items())
