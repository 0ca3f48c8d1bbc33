"""Two processes on CPU (gloo), started by torchrun: one model, that of one process with the same global batch."""

import json
import re
from pathlib import Path

import processes
import pytest
import torch
from diffusers import UNet2DModel
from launching import launched
from safetensors.torch import load_file
from trainers import GANS, JOBS, arguments, check_same

from hf_unlearn import GANPipeline
from hf_unlearn.influence.report.records import read_observations


pytestmark = pytest.mark.slow  # four interpreters and fifty runs


# Runs in which two processes are to come to the same as one. `propagated` is for one process only.
ALIKE = [
    *(name for name in JOBS if name != "propagated"),
    *(f"{n}, accumulated" for n in ("unlearn", "vdu", "in_run", "fine")),
    *(f"{n}, evaluated" for n in ("unlearn", "in_run")),
]
SAME_RANKS = [*ALIKE, "fine, each its own tokens", "in_run, uneven", "unlearn, pairs", "pbu, guarded",
              "pbu, guarded, resumed", "gan, guarded", "gan, guarded, resumed", "unlearn, broken"]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of the two processes' runs, and of the one process's."""
    two, one = (tmp_path_factory.mktemp(name) for name in ("two", "one"))
    launched(processes.__file__, two)
    with pytest.MonkeyPatch.context() as patch, processes.as_two(patch):
        processes.run_all(one, 1)
    return two, one


def end(folder, name, rank=0):
    """What a run came to, and what it says of itself."""
    return load_file(folder / f"{name}-{rank}.safetensors"), json.loads((folder / f"{name}-{rank}.json").read_text())


@pytest.mark.parametrize("name", SAME_RANKS)
def test_ranks_stay_identical(name, runs):
    (first, notes), (second, others) = (end(runs[0], name, rank) for rank in (0, 1))
    for state in (first, second):
        state.pop("players/path_mean", None)  # each process's own: of the images it drew
    check_same(first, second, exact=True)
    assert notes.pop("retained") != others.pop("retained") or name != "unlearn, pairs"
    for told in (notes, others):  # what each process's own loss was
        told["error"], told["logs"] = re.sub(r"\(.*?\)", "", told["error"] or ""), None
    assert notes == others


def by_row(found):
    """Records with the rows of a step by example: processes deliver theirs one after the other."""
    if "rows.step/all" not in found:
        return found
    step, example = found["rows.step/all"], found["rows.example/all"]
    order = torch.argsort(step.long() * 10_000 + example.long(), stable=True)
    return {name: value[order] if name.startswith("rows.") else value for name, value in found.items()}


@pytest.mark.parametrize("name", ALIKE)
def test_agrees_with_one_process_and_the_same_global_batch(name, runs):
    (two, notes), (one, expected) = (end(folder, name) for folder in runs)
    assert notes["error"] is expected["error"] is None
    check_same(by_row(two), by_row(one), load_file(runs[1] / f"{name}-0.start.safetensors"), exact=False)
    assert notes["top"] == expected["top"]
    assert len(notes["logs"]) == len(expected["logs"]) > 3
    for log, wanted in zip(notes["logs"], expected["logs"], strict=True):  # means over the processes
        assert log == pytest.approx(wanted, rel=1e-3, abs=1e-5)


def test_losses_that_each_process_divides_by_its_own_tokens(runs):
    """Training differs from that of one process, so only the first step, from the same weights, can be the same."""
    two, one = (by_row(end(folder, "fine, each its own tokens")[0]) for folder in runs)
    first = one["rows.step/all"] == 0
    two, one = ({name: value[first] for name, value in found.items() if name[:5] == "rows."} for found in (two, one))
    check_same(two, one, exact=False)


def test_a_last_batch_that_does_not_come_out_even(runs):
    """accelerate fills it up with rows from the start, which train, and so are seen, again."""
    seen = read_observations(runs[0] / "in_run, uneven" / "_private" / "influence")[0]
    assert seen.steps.size.tolist() == [6, 6, 6]
    assert set(seen.example) == set(range(16))


def test_pairs_change_from_epoch_to_epoch_and_reach_every_row(runs):
    seen = [end(runs[0], "unlearn, pairs", rank)[1]["retained"] for rank in (0, 1)]
    assert len(set(seen[0]) | set(seen[1])) == 5
    epochs = [tuple(sorted(seen[0][start : start + 6])) for start in range(0, len(seen[0]), 6)]
    assert len(set(epochs)) > 1


def test_the_guard_stops_and_restores_on_all(runs):
    """The BatchNorm statistics too, which are each process's own until then."""
    found, notes = end(runs[0], "pbu, guarded", 1)
    best = notes["guard"]["best"]["step"]
    assert best < notes["step"] < 12
    file = runs[0] / "pbu, guarded" / "_private" / "guard" / f"step-{best}.safetensors"
    saved = {f"model/{key.split('/', 1)[1]}": value for key, value in load_file(file).items()}
    check_same(saved, {name: found[name] for name in saved}, exact=True)


@pytest.mark.parametrize("name", ["pbu, guarded", "gan, guarded"])
def test_goes_on_from_a_checkpoint(name, runs):
    """A run that the guard had stopped stays stopped; one that had ended goes on for two more steps."""
    for folder in runs:
        (first, notes), (second, others) = (end(folder, name + suffix) for suffix in ("", ", resumed"))
        if name == "pbu, guarded":
            assert (notes["step"], notes["guard"]) == (others["step"], others["guard"])
            check_same(
                {k: v for k, v in first.items() if "model" in k},
                {k: v for k, v in second.items() if "model" in k},
                exact=True,
            )
        else:
            assert second["looks/all"][:, 0].tolist() == list(range(7))
            assert torch.equal(second["looks/all"][:5], first["looks/all"])


@pytest.mark.parametrize("name", JOBS)
def test_what_is_saved_is_the_model(name, runs):
    if name == "propagated":
        return
    folder, found = runs[0] / name, end(runs[0], name, 1)[0]
    if name in GANS:
        saved = {
            f"players/averaged.{k}": v for k, v in GANPipeline.from_pretrained(folder).generator.state_dict().items()
        }
    else:
        given = arguments(name)
        saved = (
            UNet2DModel.from_pretrained(folder / "unet")
            if name == "vdu"
            else type(given["model"]).from_pretrained(folder)
        )
        saved = {f"model/{key}": value for key, value in saved.state_dict().items()}
    assert saved
    check_same(saved, {key: found[key] for key in saved}, exact=True)


def test_the_original_draws_once(runs):
    """The first process draws, the other reads; and each of the two runs of VDU has a folder of its own."""
    assert [Path(folder, "drawn").read_text().count("drawn") for folder in runs] == [2, 2]


def test_propagated_is_refused(runs):
    for rank in (0, 1):
        assert end(runs[0], "propagated", rank)[1]["error"] == (
            "observation='propagated': runs in one process only; use 'in_run' with several"
        )
    assert not Path(runs[0], "propagated", "_private").exists()
    assert end(runs[1], "propagated")[1]["error"] is None


@pytest.mark.parametrize(("name", "words"), [
    ("unlearn, broken", "not finite at step 3"),
    ("gan, broken", "the discriminator's loss is not finite at step 1; the last healthy state, of step 0"),
])  # fmt: skip
def test_what_one_process_cannot_train_on_stops_both(name, words, runs):
    for folder, ranks in zip(runs, (2, 1), strict=True):
        for rank in range(ranks):
            found, notes = end(folder, name, rank)
            assert words in notes["error"]
            assert all(torch.isfinite(value).all() for value in found.values())
