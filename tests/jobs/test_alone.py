"""What several processes need once."""

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from hf_unlearn.examples import cache
from hf_unlearn.jobs.alone import made_once


@dataclass
class Recipe:
    seed: int


def test_no_interpreter_is_started_for_what_is_there(tmp_path, monkeypatch):
    def made(name, *, seed=0):
        return cache.cached(f"{name}-{seed}", Recipe(seed), None, progress=False)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("hf_unlearn.jobs.alone.made", made)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    several = SimpleNamespace(world_size=2, main_process_first=lambda desc: nullcontext())
    with pytest.raises(FileNotFoundError):
        made_once(several, "model", seed=3)
    folder = tmp_path / "hf_unlearn" / "model-3"
    folder.mkdir(parents=True)
    cache.write_recipe(Recipe(3), folder)
    assert made_once(several, "model", seed=3) == str(folder)
    with pytest.raises(FileNotFoundError):
        made_once(several, "model", seed=4)
