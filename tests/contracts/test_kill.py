"""A run that was killed goes on from its newest whole checkpoint, and ends as if nothing had happened."""

import json
import signal
from pathlib import Path

import pytest
import torch
from fresh import run_python
from safetensors.torch import load_file
from trainers import EXACT, GANS, INFLUENCES, JOBS, build, check_same

from hf_unlearn.influence.report.records import read_observations


# 9 examples in batches of 2, accumulated twice: 3 optimiser steps an epoch, the last one of a single micro-batch of one.
# Checkpoints are in the middle of epochs. GANs have steps alone.
NINE = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2, "max_steps": -1}
SIX = {"max_steps": 6, "lr_scheduler_type": "linear"}
EVERY_FOUR = {"save_strategy": "steps", "save_steps": 4}
ONE = {"save_total_limit": 1}
ALONE = {"discriminator_warmup": 5, "warmup_steps": 3}
RECOMPUTED = {"trajectory_gigabytes": 1e-5, "last_steps": 5}
CASES = {  # job, where and at which step it is killed, the newest checkpoint that is left, and settings
    **{name: (name, "in a step", 5, 4, {}) for name in JOBS},
    "unlearn, mid-checkpoint": ("unlearn", "in a checkpoint", 6, 4, ONE),
    "unlearn, before the marker": ("unlearn", "before the marker", 6, 4, ONE),
    "unlearn, before rotation": (
        "unlearn",
        "before rotation",
        3,
        3,
        {"save_steps": 1} | ONE,
    ),  # the guard looks at 3 too
    "gan, mid-checkpoint": ("gan", "in a checkpoint", 6, 4, ALONE),
    "in_run, mid-checkpoint": ("in_run", "in a checkpoint", 6, 4, {}),
    "in_run, mid-step, long after a look": ("in_run", "in a step", 4, 4, {"target_every": 10}),
    "in_run, from an epoch's last step": ("in_run", "in a step", 3, 2, {"save_steps": 2}),
    "propagated, mid-checkpoint": ("propagated", "in a checkpoint", 6, 4, {}),
    "propagated, in the sweep": ("propagated", "in the sweep", 3, 6, {}),
    "propagated, after the sweep": ("propagated", "after the sweep", 6, 6, {}),
    "propagated, recomputed, mid-step": ("propagated", "in a step", 4, 4, RECOMPUTED),
}


RARE = {
    "unlearn, mid-checkpoint",
    "unlearn, before rotation",
    "gan, mid-checkpoint",
    "in_run, mid-step, long after a look",
    "propagated, mid-checkpoint",
    "propagated, recomputed, mid-step",
}


OFTEN = ("unlearn", "gan")  # jobs that are killed whenever tests are run; the others with the slow ones


def is_slow(name):
    return name in RARE or CASES[name][0] not in OFTEN


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the three runs of each case of a job, of the rare ones apart: unbroken, killed, and that one gone on; and how
    they ended.
    """
    root, done = tmp_path_factory.mktemp("runs"), {}

    def runs(job, rare):
        if (job, rare) not in done:
            plan, unbroken = [], {}
            for name in [name for name, case in CASES.items() if case[0] == job and (name in RARE) == rare]:
                _, where, step, _, changes = CASES[name]
                common = {"job": job, "changes": (SIX if job in GANS else NINE) | EVERY_FOUR | changes}
                calm = unbroken.setdefault(str(common), f"{root}/{name}")
                if calm == f"{root}/{name}":
                    plan.append(common | {"folder": f"{calm}/calm", "result": f"{calm}/expected"})
                (root / name).mkdir()
                (root / name / "unbroken").symlink_to(calm)
                # Records are written at once, and else when they have to be.
                kill = {"where": where, "step": step, "shards": 1 if name == "in_run" else None}
                plan.append(common | kill | {"folder": f"{root}/{name}/run", "result": f"{root}/{name}/none"})
                plan.append(
                    common | {"folder": f"{root}/{name}/run", "result": f"{root}/{name}/actual", "resume": True}
                )
            file = root / f"{job}-{rare}.json"
            file.write_text(json.dumps(plan))
            run_python("import sys, mortal; mortal.run_all(sys.argv[1])", file, timeout=600)
            done[job, rare] = json.loads(Path(f"{file}.ends").read_text())
        return root, done[job, rare]

    return runs


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * is_slow(name)) for name in CASES])
def test_a_killed_run_ends_as_if_nothing_had_happened(name, runs):
    job, _, _, newest, changes = CASES[name]
    root, ends = runs(job, name in RARE)
    folder, calm = root / name, (root / name / "unbroken").resolve()
    codes = [ends[str(result)] for result in (calm / "expected", folder / "none", folder / "actual")]
    assert [code for code, _ in codes] == [0, -signal.SIGKILL, 0], codes
    assert not list(folder.glob("none.*"))
    start = load_file(f"{calm}/expected.start.safetensors")
    expected, actual = load_file(f"{calm}/expected.safetensors"), load_file(f"{folder}/actual.safetensors")
    check_same(actual, expected, start, exact=EXACT)
    assert any(not torch.equal(expected[key], value) for key, value in start.items())
    left = {path.name for path in (folder / "run").glob("checkpoint-*")}
    assert left == (
        {"checkpoint-6"} if "save_total_limit" in changes else {f"checkpoint-{step}" for step in (newest, 4, 6)}
    )
    begun = json.loads((folder / "actual.begun.json").read_text())
    assert begun == list(range(newest, 6))
    if job in INFLUENCES:
        assert expected["steps.step/all"].tolist() == list(range(6 - changes.get("last_steps", 6), 6))
        manifests = [read_observations(run / "_private" / "influence")[1] for run in (calm / "calm", folder / "run")]
        for facts in manifests:  # differ between runs: the key, and what is made with it
            assert facts.pop("run_id")
            assert facts.pop("looks")
        assert manifests[0] == manifests[1]
    else:
        assert expected["looks/all"][:, 0].tolist() == list(range(0, 7, 3 if job == "unlearn" else 1))


def test_pairs_of_a_resumed_epoch(tmp_path):
    """What a forget example stands beside is a function of seed and epoch, wherever in an epoch a run goes on."""

    class Pairs:
        def training_step(self, model, inputs, *args):
            sums = (inputs[part]["pixel_values"].flatten(1).sum(1).tolist() for part in ("forget", "retain"))
            self.seen.setdefault(self.state.global_step, []).extend(zip(*sums, strict=True))
            return super().training_step(model, inputs, *args)

    values = NINE | EVERY_FOUR | {"save_steps": 1, "guard": False, "fisher_weight": 0.0}
    whole = build("unlearn", tmp_path, mixin=type("Whole", (Pairs,), {"seen": {}}), **values)
    whole.train()
    epochs = [dict(whole.seen[step] + whole.seen[step + 1] + whole.seen[step + 2]) for step in (0, 3)]
    assert epochs[0].keys() == epochs[1].keys()
    assert len(epochs[0]) == 9
    assert epochs[0] != epochs[1]
    for step in (2, 3, 5):
        rest = build("unlearn", tmp_path, mixin=type("Rest", (Pairs,), {"seen": {}}), **values)
        rest.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert rest.seen == {at: pairs for at, pairs in whole.seen.items() if at >= step}
