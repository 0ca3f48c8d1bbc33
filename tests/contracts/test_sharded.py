"""Two processes that share the parameters (FSDP2) come to the same as two that hold all of them each."""

import json
from pathlib import Path

import numpy as np
import pytest
import sharded
import torch
import trainers
from diffusers import DiffusionPipeline
from launching import launched
from PIL import Image
from safetensors.torch import load_file
from trainers import arguments, check_same


pytestmark = pytest.mark.slow  # two interpreters and thirty runs

WHOLE = [name for name in sharded.RUNS if name != "unlearn, broken"]
ADAPTERS = ["in_run, self"]  # which nothing is merged of
INFLUENCES = [name for name, one in sharded.RUNS.items() if one.job in trainers.INFLUENCES]
PIPELINES = [name for name, one in sharded.RUNS.items() if one.job == "vdu"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of the runs of processes that hold all, and of those that share."""
    folder = tmp_path_factory.mktemp("sharded")
    launched(sharded.__file__, folder, timeout=900)
    return folder / "plain", folder / "sharded"


def said(folder, name, rank=0):
    return json.loads(Path(folder, name, f"facts-{rank}.json").read_text())


def weights(folder):
    (file,) = [*folder.glob("*model.safetensors"), *folder.glob("unet/*.safetensors")]
    return {f"model/{name}": value for name, value in load_file(file).items()}


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
    """Terms of the loss, anchors, looks of the guard and how it came out, on both processes."""
    plain, shared = (said(folder, name) for folder in runs)
    assert (plain["sharded"], shared["sharded"]) == (False, True)
    assert len(plain["logs"]) == len(shared["logs"]) > 1
    for one, other in zip(plain["logs"], shared["logs"], strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)
    for when in ("before", "after"):
        assert shared[when] == (plain[when] and pytest.approx(plain[when], rel=1e-5))
    for figures in ("now", "original") if plain["outcome"] else ():
        assert shared["outcome"][figures] == pytest.approx(plain["outcome"][figures], rel=1e-4, abs=1e-6)
    other = said(runs[1], name, 1)
    assert (other["guard"], other["outcome"]) == (shared["guard"], shared["outcome"])
    if plain["guard"]:
        looks, others = shared["guard"]["looks"], plain["guard"]["looks"]
        assert [look["step"] for look in looks] == [look["step"] for look in others]
        best = [{k: v for k, v in one["guard"]["best"].items() if v is not None} for one in (shared, plain)]
        assert best[0] == pytest.approx(best[1], rel=1e-4, abs=1e-6)


def test_rows_are_closed(runs):
    gaps = [said(folder, "unlearn, severed")["gap"] for folder in runs]
    assert gaps[0] is not None
    assert gaps[1] == pytest.approx(gaps[0], rel=1e-4)


def test_the_guard_goes_back(runs):
    """To a state that is written whole, and dealt out again."""
    state = said(runs[1], "unlearn, guarded")["guard"]
    assert state["best"]["step"] < state["looks"][-1]["step"]
    file = runs[1] / "unlearn, guarded" / "_private" / "guard" / f"step-{state['best']['step']}.safetensors"
    kept = {f"model/{key.split('/', 1)[1]}": value for key, value in load_file(file).items()}
    model = type(arguments("unlearn")["model"]).from_pretrained(runs[1] / "unlearn, guarded" / "final")
    saved = {f"model/{name}": value for name, value in model.state_dict().items()}
    check_same(saved, {name: kept[name] for name in saved}, exact=True)


@pytest.mark.parametrize("name", [name for name, one in sharded.RUNS.items() if one.resumed])
def test_a_run_goes_on_from_its_checkpoint(name, runs):
    assert said(runs[1], name)["resumed"] == sharded.RUNS[name].changes.get("max_steps", 4)
    first, again = (weights(runs[1] / name / end) for end in ("final", "resumed"))
    check_same(again, first)


@pytest.mark.parametrize("file", ["reference.safetensors", "fisher.safetensors"])
def test_what_is_kept_of_the_original_is_whole(file, runs):
    plain, shared = (load_file(folder / "unlearn" / "_private" / file) for folder in runs)
    check_same(shared, plain, exact=True)


def test_stock_classes_load_it(runs):
    for name in set(WHOLE) - {*PIPELINES, *ADAPTERS}:
        kind = type(arguments(sharded.RUNS[name].job)["model"])
        model, info = kind.from_pretrained(runs[1] / name / "final", output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert model.config.architectures == [kind.__name__]


def test_a_loss_that_is_not_finite_on_one_stops_both(runs):
    for rank in (0, 1):
        assert "not finite at step 3" in said(runs[1], "unlearn, broken", rank)["error"]
    plain, shared = (load_file(folder / "unlearn, broken" / "_private" / "last_good.safetensors") for folder in runs)
    check_same(shared, plain, exact=False)


def test_a_second_training_that_would_mix_up_parameters(runs):
    """The last layer has one row, and so the second process has nothing of its weight or its bias."""
    for rank in (0, 1):
        assert "would take 'conv_out.weight' for 'conv_out.bias'" in said(runs[1], "vdu", rank)["refused"]


@pytest.mark.parametrize("name", PIPELINES)
def test_stock_diffusers_loads_it(name, runs):
    """The same files, and settings that say nothing of processes."""
    plain, shared = (folder / name / "final" for folder in runs)
    first, second = ({file.relative_to(final) for file in final.rglob("*")} for final in (plain, shared))
    assert first == second
    for file in ("model_index.json", "unet/config.json"):
        assert json.loads((shared / file).read_text()) == json.loads((plain / file).read_text())
    loaded = DiffusionPipeline.from_pretrained(shared).unet.state_dict()
    check_same({f"model/{name}": value for name, value in loaded.items()}, weights(shared), exact=True)


def test_an_adapter_that_is_saved_apart_is_whole(runs):
    plain, shared = (
        load_file(folder / "vdu, adapter" / "apart" / "pytorch_lora_weights.safetensors") for folder in runs
    )
    start = {name: torch.zeros(()) for name in plain}
    assert all([value.any() for name, value in plain.items() if ".up." in name] or [False])
    check_same(shared, plain, start, exact=False)


def test_what_is_drawn_is_the_same(runs):
    """To one of 256: processes that share a denoiser draw together."""
    plain, shared = (folder / "vdu" for folder in runs)
    drawn = sorted(file.relative_to(plain) for file in plain.rglob("*.png"))
    assert len(drawn) == 3  # before, after, and this once more, to be published
    for file in drawn:
        first, second = (np.asarray(Image.open(folder / file)).astype(int) for folder in (plain, shared))
        assert np.abs(first - second).max() <= 1


@pytest.mark.parametrize("name", INFLUENCES)
def test_the_same_is_recorded(name, runs):
    """What every example did, by the products of its own process with targets that are shared; and by a run that was resumed."""
    plain, shared = (load_file(folder / name / "records.safetensors") for folder in runs)
    assert plain["rows.value/all"].any(0).all()
    check_same(shared, plain, exact=False)
    if sharded.RUNS[name].resumed:
        check_same(load_file(runs[1] / name / "again.safetensors"), shared)
