import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers.utils import logging

from hf_unlearn.influence.report import writer as module
from hf_unlearn.influence.report.observations import step_statistics
from hf_unlearn.influence.report.records import read_observations, write_observations
from hf_unlearn.influence.report.writer import Recorder


MANIFEST = {"run_id": "run", "targets": ["a", "b"], "observation": "in_run", "seed": 3, "settings": {"lr": 0.1}}
IDS = [f"sample {i}" for i in range(10)]


def batch(step, size=4, width=2):
    generator = np.random.default_rng(step)
    return (
        generator.permutation(10)[:size],
        generator.integers(1, 9, size).astype(np.float32),
        generator.normal(size=(size, width)).astype(np.float32),
    )


def run(recorder, steps, size=4):
    for step in steps:
        recorder.add(step, *batch(step, size))
    return recorder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def expect(folder, steps, size=4):
    observations, _ = read_observations(folder)
    assert observations.steps.step.tolist() == list(steps)
    assert observations.step.tolist() == [step for step in steps for _ in range(size)]
    for column, name in enumerate(("example", "weight", "value")):
        expected = [batch(step, size)[column] for step in steps] or [getattr(observations, name)[:0]]
        np.testing.assert_array_equal(getattr(observations, name), np.concatenate(expected))
    return observations


@pytest.mark.parametrize("ids", [IDS, list(range(100, 110)), np.arange(100, 110)], ids=lambda x: type(x).__name__)
def test_what_is_recorded_is_read(ids, tmp_path):
    run(Recorder(tmp_path / "new" / "folder", MANIFEST, ids, rows_per_shard=12), range(7)).flush()
    observations = expect(tmp_path / "new" / "folder", range(7))
    assert observations.sample_ids.tolist() == list(ids)
    assert observations.targets == ("a", "b")
    assert not observations.is_self
    assert observations.value.dtype == np.float32
    assert read_observations(tmp_path / "new" / "folder")[1] == MANIFEST
    for position, step in enumerate(range(7)):
        _, weight, value = batch(step)
        for name, expected in zip(
            ("weight", "mean", "variance"), step_statistics(weight.astype(float), value.astype(float)), strict=True
        ):
            np.testing.assert_allclose(getattr(observations.steps, name)[position], expected)
    assert observations.steps.size.tolist() == [4] * 7


def test_tensors_of_any_type_and_a_variance_that_is_given(tmp_path):
    recorder = Recorder(tmp_path, MANIFEST, IDS)
    value = torch.randn(3, 2, dtype=torch.bfloat16, requires_grad=True)
    recorder.add(
        0, torch.tensor([3, 1, 2], dtype=torch.int16), torch.tensor([1, 2, 3]), value, variance=torch.tensor([0.5, 2])
    )
    recorder.add(1, [4], [1.0], [[1.0, 2.0]])
    recorder.add(2, np.array([4]), np.ones(1), np.ones((1, 2)), np.array([0.25, np.nan]))
    recorder.flush()
    observations, _ = read_observations(tmp_path)
    np.testing.assert_array_equal(observations.value[:3], value.detach().float())
    np.testing.assert_array_equal(observations.steps.variance, [[0.5, 2], [np.nan, np.nan], [0.25, np.nan]])


def test_the_callers_buffers_may_be_reused(tmp_path):
    recorder = Recorder(tmp_path, MANIFEST, IDS)
    examples, weight, value = (torch.as_tensor(part).clone() for part in batch(0))
    recorder.add(0, examples, weight, value)
    for buffer in (examples, weight, value):
        buffer.zero_()
    recorder.flush()
    expect(tmp_path, [0])


def test_an_example_that_comes_twice_in_a_step_is_one(tmp_path):
    """As where processes fill up a last batch: alone and as a group of one it leaves the batch with both."""
    recorder = Recorder(tmp_path, MANIFEST, IDS, rows_per_shard=100)
    twice, weight = np.array([3, 1, 3, 7, 7]), np.array([1.0, 2, 3, 0, 0])
    value = np.arange(10, dtype=np.float32).reshape(5, 2)
    recorder.add(0, twice, weight, value)
    recorder.add(1, *batch(1))
    assert recorder.pending_rows == 3 + 4
    recorder.flush()
    found = read_observations(tmp_path)[0]
    assert found.example[:3].tolist() == [3, 1, 7]
    assert found.weight[:3].tolist() == [4, 2, 0]
    np.testing.assert_allclose(found.value[:3], [(value[0] + 3 * value[2]) / 4, value[1], (value[3] + value[4]) / 2])
    assert found.steps.size.tolist() == [3, 4]
    np.testing.assert_allclose(found.steps.mean[0], weight @ value / 6)
    mu = found.example_mu().mu
    alone = found.group_signals([np.array([example]) for example in range(10)]).sum(1)
    np.testing.assert_allclose(np.nan_to_num(mu * found.sigma), alone, rtol=1e-5, atol=1e-6)


def test_memory_is_bounded(tmp_path):
    recorder = Recorder(tmp_path, MANIFEST, IDS, rows_per_shard=20)
    for step in range(100):
        recorder.add(step, *batch(step, 1 + step % 7))
        held = sum(len(part.weight) for part in recorder._pending)
        assert recorder.pending_rows == held < 20
    assert len([name for name in names(tmp_path) if name.startswith("rows")]) >= 400 // 27


def test_steps_in_any_order_come_back_sorted(tmp_path):
    run(Recorder(tmp_path, MANIFEST, IDS, rows_per_shard=8), [9, 7, 8, 2, 1]).flush()
    expect(tmp_path, [1, 2, 7, 8, 9])


def test_nothing_recorded_and_a_run_id_that_is_drawn(tmp_path):
    first, second = (Recorder(tmp_path, {"targets": ["a", "b"]}, IDS) for _ in range(2))
    assert first.manifest["run_id"] != second.manifest["run_id"] == read_observations(tmp_path)[1]["run_id"]
    second.flush()
    assert names(tmp_path) == ["manifest.json", "samples.arrow"]
    observations = expect(tmp_path, [])
    assert observations.value.shape == (0, 2)
    assert np.isnan(observations.example_mu().mu).all()


def test_reading_a_single_shard_copies_nothing(tmp_path):
    run(Recorder(tmp_path, MANIFEST, IDS), range(5)).flush()
    observations, _ = read_observations(tmp_path)
    assert not observations.value.flags.writeable
    run(Recorder(tmp_path, MANIFEST, IDS), range(3)).flush()  # the files of the other run are gone, not overwritten
    np.testing.assert_array_equal(observations.value[:4], batch(0)[2])


# Truncating and resuming


@pytest.mark.parametrize("step", [0, 1, 3, 5, 8, 20])
def test_truncation_is_exact(step, tmp_path):
    recorder = run(Recorder(tmp_path, MANIFEST, IDS, rows_per_shard=12), range(8))  # shards of three, two are pending
    recorder.truncate(step)
    run(recorder, range(min(step, 8), 10)).flush()
    expect(tmp_path, range(10))


def test_truncation_rewrites_the_shard_it_cuts_and_no_other(tmp_path):
    recorder = run(Recorder(tmp_path, MANIFEST, IDS, rows_per_shard=12), range(12))
    before = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    recorder.truncate(7)
    after = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    assert set(before) - set(after) == {"rows-00003.arrow", "steps-00003.arrow"}
    assert {name for name in after if after[name] != before[name]} == {"rows-00002.arrow", "steps-00002.arrow"}
    expect(tmp_path, range(7))


def test_resuming_goes_on_as_if_nothing_had_happened(tmp_path):
    run(Recorder(tmp_path, MANIFEST, IDS, rows_per_shard=12), range(8)).flush()
    for name in ("rows-00003.arrow", "rows-00004.arrow.partial"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    expect(tmp_path, range(8))
    recorder = Recorder.resume(tmp_path, IDS, 5, rows_per_shard=12)
    assert not {"rows-00003.arrow", "rows-00004.arrow.partial"} & set(names(tmp_path))
    assert recorder.manifest == MANIFEST
    run(recorder, range(5, 12)).flush()
    expect(tmp_path, range(12))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_records_that_end_before_the_step_are_warned_about(tmp_path, caplog, monkeypatch):
    run(Recorder(tmp_path, MANIFEST, IDS), range(6)).flush()
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    monkeypatch.setattr(module.logger, "propagate", True)
    Recorder.resume(tmp_path, IDS, 6)
    assert not caplog.messages
    Recorder.resume(tmp_path, IDS, 9)
    assert ["end at step 5, the run goes on at 9" in message for message in caplog.messages] == [True]


def test_another_training_set_is_refused(tmp_path):
    run(Recorder(tmp_path, MANIFEST, IDS), range(3)).flush()
    for ids in (IDS[:-1], [*IDS[1:], IDS[0]], list(range(10)), ["sample 0s", "ample 1", *IDS[2:]]):
        with pytest.raises(ValueError, match=r"^sample_ids: not those that .* start a new run$"):
            Recorder.resume(tmp_path, ids, 2)
    expect(tmp_path, range(3))


def test_a_new_recorder_removes_the_records_of_the_last_run_and_nothing_else(tmp_path):
    run(Recorder(tmp_path, MANIFEST, IDS, rows_per_shard=4), range(5))
    (tmp_path / "rows-00009.arrow.partial").write_bytes(b"half")
    (tmp_path / "rows.arrow").write_bytes(b"mine")
    Recorder(tmp_path, MANIFEST, IDS)
    assert names(tmp_path) == ["manifest.json", "rows.arrow", "samples.arrow"]


# Kills


def killed_after(operations, action, *args, **kwargs):
    """`action` in a child process that dies before its next file operation. True if there was a next one."""
    child = os.fork()
    if not child:
        left = operations

        def counted(function):
            def call(*args, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    os._exit(9)
                return function(*args, **kwargs)

            return call

        os.replace, Path.unlink, pa.OSFile = map(counted, (os.replace, Path.unlink, pa.OSFile))
        try:
            action(*args, **kwargs)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def killed_everywhere(tmp_path, action, prepare=lambda folder: None):
    """Folders of runs that were killed after 0, 1, 2 … file operations."""
    for operations in range(100):
        folder = tmp_path / str(operations)
        prepare(folder)
        if not killed_after(operations, action, folder):
            break
        yield folder


def record_nine(folder):
    run(Recorder(folder, MANIFEST, IDS, rows_per_shard=12), range(9))


def test_a_kill_while_shards_are_written(tmp_path):
    found = []
    for folder in killed_everywhere(tmp_path, record_nine):
        if not (folder / "manifest.json").is_file():
            assert not found
            with pytest.raises(ValueError, match="holds no records"):
                read_observations(folder)
            recorder = Recorder(folder, MANIFEST, IDS, rows_per_shard=12)
        else:
            steps = read_observations(folder)[0].steps.step.tolist()
            found.append(len(steps))
            expect(folder, range(len(steps)))
            recorder = Recorder.resume(folder, IDS, len(steps), rows_per_shard=12)
        run(recorder, range(len(recorder._recorded), 9)).flush()
        expect(folder, range(9))
    assert found == [0] * 4 + [3] * 4 + [6] * 4  # two files a shard, opened and put in place


def test_a_kill_while_a_new_run_removes_the_old_one(tmp_path):
    for folder in killed_everywhere(tmp_path, lambda folder: Recorder(folder, MANIFEST, IDS[:4]), prepare=record_nine):
        if (folder / "manifest.json").is_file():
            observations, _ = read_observations(folder)
            assert (len(observations.sample_ids), len(observations.steps.step)) in ((10, 9), (4, 0))  # all of one run
        record_nine(folder)
        expect(folder, range(9))


def test_a_kill_while_shards_are_cut(tmp_path):
    found = set()
    for folder in killed_everywhere(tmp_path, lambda folder: Recorder.resume(folder, IDS, 4), prepare=record_nine):
        steps = read_observations(folder)[0].steps.step.tolist()
        found.add(len(steps))
        expect(folder, range(len(steps)))
        run(Recorder.resume(folder, IDS, 4, rows_per_shard=12), range(4, 9)).flush()
        expect(folder, range(9))
    assert found == {9, 6, 4}


# Bad input


def test_queued_tensors_are_checked_when_they_are_written(tmp_path, monkeypatch):
    """As tensors on an accelerator are: what came before the bad step is kept."""
    recorder = Recorder(tmp_path, MANIFEST, IDS)
    drain = recorder._drain
    monkeypatch.setattr(recorder, "_drain", lambda: None)
    run(recorder, [0, 1])
    bad = batch(2)
    recorder.add(2, bad[0], bad[1], bad[2] * np.float32(np.nan))
    run(recorder, [3])
    assert recorder.pending_rows == 16
    monkeypatch.setattr(recorder, "_drain", drain)
    with pytest.raises(ValueError, match=r"at step 2; must be finite"):
        recorder.flush()
    expect(tmp_path, [0, 1])
    run(recorder, [2, 3]).flush()
    expect(tmp_path, range(4))


def valued(bad):
    return {"value": np.where(np.arange(8).reshape(4, 2) == 5, bad, 1.0)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 0}, "step=0: is recorded already"),
        ({"step": -1}, "step=-1: must be at least 0"),
        ({"examples": np.array([0, 1, 10, 2])}, "examples: 10 at step 5; must be a position in 10 sample ids"),
        ({"examples": np.array([0, -1, 3, 2])}, "examples: -1 at step 5"),
        ({"examples": np.array([0, 1, 3])}, r"weight: shape \[4\] at step 5; must be \[3\]"),
        ({"examples": np.zeros((4, 1), int)}, r"examples: shape \[4, 1\] at step 5"),
        ({"weight": np.array([1.0, -1, 1, 1])}, "weight: -1.0 for sample 'sample 1' at step 5; must be finite and"),
        ({"weight": np.zeros(4)}, "weight: no predictions at all at step 5"),
        ({"value": np.ones((4, 3))}, r"value: shape \[4, 3\] at step 5; must be \[4, 2\]"),
        ({"value": np.ones(4)}, r"value: shape \[4\] at step 5"),
        *(
            (valued(bad), "^value: .*for sample 'sample 2' at step 5; must be finite")
            for bad in (np.nan, -np.inf, 1e39)
        ),
        ({"variance": np.ones(3)}, r"variance: shape \[3\] at step 5; must be \[2\]"),
        ({"variance": np.array([1.0, -1])}, r"variance: \[1.0, -1.0\] at step 5"),
        ({"variance": np.array([1.0, np.inf])}, r"variance: \[1.0, inf\] at step 5"),
        (dict.fromkeys(("examples", "weight", "value"), np.zeros((0,))), "with at least 1 example"),
    ],
)
def test_bad_steps(change, message, tmp_path):
    recorder = run(Recorder(tmp_path, MANIFEST, IDS), [0])
    good = {"step": 5, "examples": np.arange(4), "weight": np.ones(4), "value": np.ones((4, 2)), "variance": None}
    with pytest.raises(ValueError, match=message) as caught:
        recorder.add(**{**good, **change})
    assert "\n" not in str(caught.value)
    recorder.add(**good)
    assert recorder.pending_rows == 8


@pytest.mark.parametrize(
    ("manifest", "ids", "message"),
    [
        (MANIFEST, [1, 2, 1], "sample_ids: 1 occurs more than once"),
        (MANIFEST, ["a", "b", "b"], "sample_ids: 'b' occurs more than once"),
        (MANIFEST, ["a", 1], "sample_ids: must all be int or all be str"),
        (MANIFEST, [1.0, 2.0], "sample_ids: must all be int"),
        (MANIFEST, [True, False], "sample_ids: must all be int"),
        (MANIFEST, [1, None], "sample_ids: must all be int"),
        (MANIFEST, [], "sample_ids: must all be int or all be str, and at least one"),
        ({}, IDS, "manifest: targets=None; must be a list"),
        ({"targets": []}, IDS, "manifest: targets="),
        ({"targets": "a"}, IDS, "manifest: targets='a'"),
        ({"targets": ["a", "a"]}, IDS, "different names"),
        ({"targets": ["a", "self"]}, IDS, "'self' stands alone"),
        ({"targets": ["a"], "model": object()}, IDS, "manifest: .* must be what JSON can hold"),
    ],
)
def test_bad_runs(manifest, ids, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Recorder(tmp_path / "new", manifest, ids)
    with pytest.raises(ValueError, match=r"^rows_per_shard=0: must be at least 1$"):
        Recorder(tmp_path / "new", MANIFEST, IDS, rows_per_shard=0)
    assert not (tmp_path / "new").exists()


def test_another_format_and_missing_rows(tmp_path):
    recorder = Recorder(tmp_path, MANIFEST, IDS, rows_per_shard=1)
    for step, size in ((0, 3), (1, 5)):
        recorder.add(step, *batch(step, size))
    os.replace(tmp_path / "steps-00001.arrow", tmp_path / "steps-00000.arrow")
    with pytest.raises(ValueError, match=r"rows-00000.arrow': observations are missing"):
        read_observations(tmp_path)
    header = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**header, "format": 99}))
    with pytest.raises(ValueError, match=r"^folder=.*: has format 99, this version reads 1$"):
        read_observations(tmp_path)
    with pytest.raises(ValueError, match="holds no records"):
        Recorder.resume(tmp_path / "nowhere", IDS, 0)


# Every example its own target


def test_self_records(tmp_path):
    recorder = Recorder(tmp_path, {"targets": ["self"]}, IDS)
    assert recorder.is_self
    value = np.array([[5, 1, 0.25], [2, 2, 1], [4, 1, 0.5]])
    recorder.add(0, [0, 1, 2], np.ones(3), value)
    recorder.add(1, [3], np.ones(1), np.array([[2, 2, np.nan]]))  # nobody to compare with
    recorder.flush()
    observations, _ = read_observations(tmp_path)
    assert observations.is_self
    np.testing.assert_array_equal(observations.value, [*value, [2, 2, 0]])
    assert observations.steps.mean.shape == observations.steps.variance.shape == (2, 1)
    mu = observations.example_mu().mu[:, 0]
    sigma = np.sqrt((0.25 + 1 + 0.5) / 4 * 2)
    np.testing.assert_allclose(mu[:4], [2 / sigma, 0, 1.5 / sigma, 0])
    with pytest.raises(ValueError, match=r"value: \[2.0, 2.0, nan\] for sample 'sample 5' at step 2; must be finite"):
        recorder.add(2, [4, 5], np.ones(2), np.array([[2, 2, 1], [2, 2, np.nan]]))
    with pytest.raises(ValueError, match=r"value: \[2.0, 2.0, -1.0\] .*variance of at least 0"):
        recorder.add(2, [4, 5], np.ones(2), np.array([[2, 2, -1], [2, 2, 1]]))
    with pytest.raises(ValueError, match=r"^variance: with target 'self'"):
        recorder.add(2, [4], np.ones(1), np.ones((1, 3)), np.ones(1))


def test_observations_that_are_written_at_once(tmp_path):
    run(Recorder(tmp_path / "a", MANIFEST, IDS, rows_per_shard=12), range(7)).flush()
    observations, manifest = read_observations(tmp_path / "a")
    for _ in range(2):
        write_observations(tmp_path / "b", observations, manifest)
    expect(tmp_path / "b", range(7))
    run(Recorder.resume(tmp_path / "b", IDS, 7), [7]).flush()
    expect(tmp_path / "b", range(8))
    with pytest.raises(ValueError, match=r"^manifest: targets \['b'\], but the observations have"):
        write_observations(tmp_path / "c", observations, {"targets": ["b"]})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_tensors_on_an_accelerator_wait_for_a_shard(tmp_path):
    recorder = Recorder(tmp_path, MANIFEST, IDS, rows_per_shard=12)
    torch.cuda.set_sync_debug_mode("error")
    try:
        parts = [
            [torch.as_tensor(part).pin_memory().to("cuda", non_blocking=True) for part in batch(step)]
            for step in (0, 1)
        ]
        for step in (0, 1):
            recorder.add(step, *parts[step])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert recorder.pending_rows == 8
    recorder.add(2, *(torch.as_tensor(part).cuda() for part in batch(2)))
    assert recorder.pending_rows == 0
    run(recorder, [3]).flush()
    expect(tmp_path, range(4))
