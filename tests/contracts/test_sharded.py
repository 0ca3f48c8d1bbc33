"""Two processes that share the parameters (FSDP2) come to the same as two that hold all of them each."""

import json
from pathlib import Path

import pytest
import sharded
from launching import launched
from safetensors.torch import load_file
from trainers import arguments, check_same


pytestmark = pytest.mark.slow  # two interpreters and twenty runs

WHOLE = [name for name in sharded.RUNS if name != "unlearn, broken"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of the runs of processes that hold all, and of those that share."""
    folder = tmp_path_factory.mktemp("sharded")
    launched(sharded.__file__, folder, timeout=900)
    return folder / "plain", folder / "sharded"


def said(folder, name, rank=0):
    return json.loads(Path(folder, name, f"facts-{rank}.json").read_text())


def weights(folder):
    return {f"model/{name}": value for name, value in load_file(Path(folder, "model.safetensors")).items()}


def start_of(folder):
    """None of an adapter, whose weights are merged where they are saved."""
    file = Path(folder, "start.safetensors")
    return load_file(file) if file.is_file() else None


@pytest.mark.parametrize("name", WHOLE)
def test_the_same_model_is_saved(name, runs):
    plain, shared = (weights(folder / name / "final") for folder in runs)
    check_same(shared, plain, start_of(runs[0] / name), exact=False)


@pytest.mark.parametrize("name", sharded.RUNS)
def test_the_same_is_said(name, runs):
    """Terms of the loss, anchors and looks of the guard, on both processes."""
    plain, shared = (said(folder, name) for folder in runs)
    assert (plain["sharded"], shared["sharded"]) == (False, True)
    assert len(plain["logs"]) == len(shared["logs"]) > 1
    for one, other in zip(plain["logs"], shared["logs"], strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)
    for when in ("before", "after"):
        assert shared[when] == (plain[when] and pytest.approx(plain[when], rel=1e-5))
    assert [look["step"] for look in shared["guard"]["looks"]] == [look["step"] for look in plain["guard"]["looks"]]
    assert shared["guard"]["best"] == pytest.approx(plain["guard"]["best"], rel=1e-4, abs=1e-6)
    assert said(runs[1], name, 1)["guard"] == shared["guard"]


def test_the_guard_goes_back(runs):
    """To a state that is written whole, and dealt out again."""
    state = said(runs[1], "unlearn, guarded")["guard"]
    assert state["best"]["step"] < state["looks"][-1]["step"]
    file = runs[1] / "unlearn, guarded" / "_private" / "guard" / f"step-{state['best']['step']}.safetensors"
    kept = {f"model/{key.split('/', 1)[1]}": value for key, value in load_file(file).items()}
    model = type(arguments("unlearn")["model"]).from_pretrained(runs[1] / "unlearn, guarded" / "final")
    saved = {f"model/{name}": value for name, value in model.state_dict().items()}
    check_same(saved, {name: kept[name] for name in saved}, exact=True)


@pytest.mark.parametrize("name", [name for name, one in sharded.RUNS.items() if "guard" not in one.changes])
def test_a_run_goes_on_from_its_checkpoint(name, runs):
    assert said(runs[1], name)["resumed"] == 4
    first, again = (weights(runs[1] / name / end) for end in ("final", "resumed"))
    check_same(again, first)


@pytest.mark.parametrize("file", ["reference.safetensors", "fisher.safetensors"])
def test_what_is_kept_of_the_original_is_whole(file, runs):
    plain, shared = (load_file(folder / "unlearn" / "_private" / file) for folder in runs)
    check_same(shared, plain, exact=True)


def test_stock_classes_load_it(runs):
    for name in WHOLE:
        kind = type(arguments(sharded.RUNS[name].job)["model"])
        model, info = kind.from_pretrained(runs[1] / name / "final", output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert model.config.architectures == [kind.__name__]


def test_a_loss_that_is_not_finite_on_one_stops_both(runs):
    for rank in (0, 1):
        assert "not finite at step 3" in said(runs[1], "unlearn, broken", rank)["error"]
    plain, shared = (load_file(folder / "unlearn, broken" / "_private" / "last_good.safetensors") for folder in runs)
    check_same(shared, plain, exact=False)
