"""Filters on a Hub over real HTTP: pushed and loaded by processes of their own, and never loaded without the filter."""

import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from filter_data import Case, fitted_filter, loaders_without_a_filter
from safetensors.torch import load, save

from hf_unlearn import FilteredPipeline
from hf_unlearn.examples.loopback_hub import LoopbackHub


pytestmark = pytest.mark.slow  # two interpreters: the Hub's address is read when huggingface_hub is imported


WEIGHTS, CONFIG = "safety_checker/model.safetensors", "safety_checker/config.json"
PUSH = """
from hf_unlearn import FilteredPipeline
pipe = FilteredPipeline.from_pretrained({saved!r})
pipe.push_to_hub("me/filtered")
pipe.safety_checker.push_to_hub("me/filter")
"""
LOAD = """
import json, sys
{loaders}
told = {{"stock": loaders_without_a_filter("me/filtered"), "imported": "hf_unlearn" in sys.modules}}
import torch
from hf_unlearn import FASTSafetyChecker, FilteredPipeline

def drawn(pipe):
    pipe.set_progress_bar_config(disable=True)
    out = pipe(batch_size=4, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np")
    return [out.filtered, out.filter_scores.tolist(), out.images.tolist()]

refused = {{}}
for name in {broken!r}:
    try:
        FilteredPipeline.from_pretrained(name)
        refused[name] = None
    except (ValueError, OSError) as error:
        refused[name] = str(error)
print(json.dumps(told | {{
    "whole": drawn(FilteredPipeline.from_pretrained("me/filtered")),
    "put together": drawn(FilteredPipeline.from_pretrained("me/plain", filter="me/filter")),
    "alone": list(FASTSafetyChecker.from_pretrained("me/filter").concepts),
    "inside": list(FASTSafetyChecker.from_pretrained("me/filtered", subfolder="safety_checker").concepts),
    "refused": refused,
    "unfiltered": loaders_without_a_filter("me/filtered"),
}}))
"""


def broken_copies(files):
    """Repositories that must not be loaded, by name: each a copy of a whole one with one thing wrong."""
    index, config = json.loads(files["model_index.json"]), json.loads(files[CONFIG])

    def weights(change):
        with_change = load(files[WEIGHTS])
        change(with_change)
        return {WEIGHTS: save(with_change, metadata={"format": "pt"})}

    def in_index(**changes):
        return {"model_index.json": json.dumps(index | changes).encode()}

    without_filter = {key: value for key, value in index.items() if key != "safety_checker"}
    changes = {
        "cut": {WEIGHTS: files[WEIGHTS][:-100]},
        "no-weights": {WEIGHTS: None},
        "no-config": {CONFIG: None},
        "no-threshold": weights(lambda state: state.pop("bank.threshold")),
        "other-threshold": weights(lambda state: state["bank.threshold"].fill_(1e9)),
        "nan-threshold": weights(lambda state: state["bank.threshold"].fill_(torch.nan)),
        "nan-encoder": weights(lambda state: next(v for k, v in state.items() if "encoder." in k).fill_(torch.nan)),
        "other-version": {CONFIG: json.dumps(config | {"schema_version": 99}).encode()},
        "other-layout": in_index(schema_version=99),
        "null-filter": in_index(safety_checker=[None, None]),
        "no-filter": {"model_index.json": json.dumps(without_filter).encode()},
        "other-filter": in_index(safety_checker=["transformers", "CLIPModel"]),
        "no-index": {"model_index.json": None},
    }
    return {
        f"me/{name}": {path: content for path, content in (files | change).items() if content is not None}
        for name, change in changes.items()
    }


def run(script, hub, home, **values):
    """In a real interpreter: huggingface_hub reads the endpoint when it is imported."""
    environment = hub.environment(home) | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script.format(**values)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else None


STORY = {}


@pytest.fixture
def story(tiny_ddpm, tmp_path_factory):
    """Told once."""
    if not STORY:
        STORY.update(told(tiny_ddpm, tmp_path_factory.mktemp("hub")))
    return STORY


def told(ddpm, folder):
    """What was pushed, what processes with and without hf_unlearn made of it, and the Hub's own account."""
    ddpm.set_progress_bar_config(disable=True)
    case = Case(ddpm, batch_size=4, num_inference_steps=2)
    checker = fitted_filter(channels=1)
    scores = checker.judge(case.draw(output_type="pt").images * 2 - 1).scores.flatten().sort(descending=True).values
    checker.set_threshold("bright", (scores[1] + scores[2]).item() / 2)
    pipe = FilteredPipeline(ddpm, checker)
    pipe.save_pretrained(folder / "saved")
    ddpm.save_pretrained(folder / "plain")
    expected = case.draw(pipe, output_type="np")
    with LoopbackHub() as hub:
        run(PUSH, hub, folder / "pusher", saved=str(folder / "saved"))
        hub.put("me/plain", folder / "plain")
        broken = broken_copies(hub.files("me/filtered"))
        for name, files in broken.items():
            copy = folder / name
            for path, content in files.items():
                (copy / path).parent.mkdir(parents=True, exist_ok=True)
                (copy / path).write_bytes(content)
            hub.put(name, copy)
        source = inspect.getsource(loaders_without_a_filter)
        loaded = run(LOAD, hub, folder / "loader", broken=list(broken), loaders=source)
        files = {name: hub.files(name) for name in ("me/filtered", "me/filter")}
        unknown = list(hub.unknown)
    return {"expected": expected, "loaded": loaded, "files": files, "unknown": unknown, "broken": broken}


class TestPushed:
    def test_draws_the_same_in_another_process(self, story):
        """Of the whole, and of a plain pipeline with the filter."""
        for how in ("whole", "put together"):
            filtered, scores, images = story["loaded"][how]
            assert filtered == story["expected"].filtered
            assert sum(filtered) == 2
            # In another process: √72 · 6e-8 over 100 layers, × 2; a score adds 16 of some.
            torch.testing.assert_close(torch.tensor(scores), story["expected"].filter_scores, rtol=0, atol=1e-3)
            np.testing.assert_allclose(images, story["expected"].images, rtol=0, atol=1e-4)
        assert story["loaded"]["alone"] == story["loaded"]["inside"] == ["bright"]

    def test_nothing_but_what_belongs_there_was_sent(self, story):
        assert set(story["files"]["me/filtered"]) == {
            "README.md",
            "model_index.json",
            "provenance.json",
            "pipeline/model_index.json",
            "pipeline/scheduler/scheduler_config.json",
            "pipeline/unet/config.json",
            "pipeline/unet/diffusion_pytorch_model.safetensors",
            CONFIG,
            WEIGHTS,
        }
        assert set(story["files"]["me/filter"]) == {
            "README.md",
            "config.json",
            "model.safetensors",
            "provenance.json",
        }
        assert story["unknown"] == []  # the server understood everything


class TestFailsClosed:
    def test_no_other_loader_draws_without_the_filter(self, story):
        """Nor where the package is not imported."""
        assert story["loaded"]["unfiltered"] == []
        assert story["loaded"]["stock"] == []
        assert not story["loaded"]["imported"]

    def test_what_is_broken_is_refused_in_one_line(self, story):
        refused = story["loaded"]["refused"]
        assert set(refused) == set(story["broken"])
        assert [name for name, message in refused.items() if message is None] == []
        assert {name: message for name, message in refused.items() if "\n" in message.strip()} == {}
        # Each copy is broken in one place only.
        for name, files in story["broken"].items():
            whole = story["files"]["me/filtered"]
            assert sum(files.get(path) != content for path, content in whole.items()) == 1, name


def test_the_loaders_would_notice(tiny_ddpm, tmp_path):
    """A pipeline without a filter is loaded by several of them."""
    tiny_ddpm.save_pretrained(tmp_path)
    assert "DDPMPipeline" in [name for name, _ in loaders_without_a_filter(tmp_path, ("DDPM",))]
