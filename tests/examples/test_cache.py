"""What is trained on first use: said on any stream, complete or not there, and nothing of a killed process stays."""

import os

import pytest

from hf_unlearn.examples import cache


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "hf_unlearn"


def is_made(folder):
    return (folder / "whole").is_file()


def make(folder):
    folder.mkdir(parents=True)
    (folder / "whole").write_text("made")


def test_first_use_is_said_and_the_second_is_not(home, capsys):
    assert cache.made_once("model", is_made, make) == home / "model"
    assert capsys.readouterr().err == (
        f"model is used for the first time: it is trained now, once, and kept in {home / 'model'}\n"
    )
    assert cache.made_once("model", is_made, None) == home / "model"
    cache.made_once("quiet", is_made, make, progress=False)
    assert capsys.readouterr() == ("", "")
    assert sorted(path.name for path in home.iterdir()) == ["model", "quiet"]


def test_nothing_half_made_stays(home):
    def stopped(folder):
        make(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.made_once("model", is_made, stopped)
    assert list(home.iterdir()) == []
    # A process that was killed has cleaned up nothing; one that still runs is left alone.
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    for pid in (child, os.getppid()):
        (home / f".model.{pid}" / "model").mkdir(parents=True)
    (home / "model").mkdir()  # of another recipe
    assert is_made(cache.made_once("model", is_made, make))
    assert sorted(path.name for path in home.iterdir()) == [f".model.{os.getppid()}", "model"]


def test_another_process_that_was_faster_wins(home):
    def slower(folder):
        make(folder)
        make(home / "model")
        (home / "model" / "faster").touch()

    assert (cache.made_once("model", is_made, slower) / "faster").exists()
    assert [path.name for path in home.iterdir()] == ["model"]


def test_how_long_it_takes_is_measured_on_the_first_steps(capsys):
    now = [0.0]
    told = cache.Progress("model", 1000, clock=lambda: now[0])
    for step in range(1, 1001):
        now[0] += 60 if step == 1 else 0.5  # the first step does not count
        told.step()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training model: step 7 of 1,000, about 8 minutes to go"
    assert lines[1] == "training model: step 67 of 1,000, about 8 minutes to go"
    assert lines[-1] == "training model: step 967 of 1,000, about 16 seconds to go"
    assert len(lines) == 17
    quick = cache.Progress("model", 1000, clock=lambda: 0.0)
    for _ in range(1000):
        quick.step()
    assert capsys.readouterr().err == ""


def test_in_the_home_folder_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in (None, ""):  # empty counts as unset
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        if value is not None:
            monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache.cache_dir() == tmp_path / ".cache/hf_unlearn"
