"""The index: what it says beside `attribute`, kills, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from brute_force import QUIET, mlp, vectors

from hf_unlearn import InfluenceConfig, InfluenceIndex, InfluenceTrainer, attribute
from hf_unlearn.files import load_tensors
from hf_unlearn.influence import index as index_file


TARGETS = {"a": vectors(4, seed=1), "b": vectors(5, seed=2)}
ROWS = 30


@pytest.fixture
def given(tmp_path):
    args = InfluenceConfig(output_dir=str(tmp_path / "unused"), per_device_eval_batch_size=4, **QUIET)
    return {"args": args, "trainer_class": InfluenceTrainer}


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of eight rows."""
    monkeypatch.setattr(index_file, "SHARD_BYTES", 8 * 75 * 4)


def test_whole_it_says_what_attribute_says(tmp_path, given, small_shards):
    rows = vectors(ROWS)
    built = InfluenceIndex.build(mlp(), rows, tmp_path / "index", projection=None, dtype="float32", **given)
    assert built.bytes_per_example == 75 * 4  # every parameter
    assert [len(part) for _, _, part in built.blocks()] == [8, 8, 8, 6]
    direct = attribute(mlp(), rows, TARGETS, **given)

    found = InfluenceIndex.load(tmp_path / "index", mlp(), **given).query(TARGETS)

    np.testing.assert_allclose(found.observations.value, direct.observations.value, rtol=1e-4, atol=1e-4)
    assert (found.order_only, found.unit) == (True, direct.unit)
    np.testing.assert_allclose(found.dataset["mu"][:], direct.dataset["mu"][:], rtol=1e-3, atol=1e-5)
    best = built.query(TARGETS, k=5)
    for target in TARGETS:
        own = best.filter(lambda row, target=target: row["target"] == target)
        assert own["sample_id"][:] == found.top(5, target)["sample_id"][:]
        assert own["rank"][:] == [1, 2, 3, 4, 5]
    half = InfluenceIndex.build(mlp(), rows, tmp_path / "half", projection=None, **given)
    assert half.bytes_per_example == 75 * 2
    scores = half.query(TARGETS).observations.value
    np.testing.assert_allclose(scores, direct.observations.value, atol=0.02 * np.abs(scores).max())


@pytest.mark.parametrize("random", [False, True])
def test_projected_it_is_near_and_small(tmp_path, given, random):
    rows = vectors(ROWS)
    index = InfluenceIndex.build(mlp(), rows, tmp_path / "index", projection=4, random_projection=random, **given)
    assert index.manifest["width"] == 4 * 4 + 3 * 4  # of 6 × 9 and 3 × 7
    direct = attribute(mlp(), rows, TARGETS, **given).observations.value
    found = index.query(TARGETS).observations.value
    correlation = np.corrcoef(found.ravel(), direct.ravel())[0, 1]
    assert correlation > (0.3 if random else 0.6)  # 0.73 without chance


def test_what_was_interrupted_goes_on_to_the_same_files(tmp_path, given, monkeypatch):
    rows, folder, whole = vectors(ROWS), tmp_path / "index", tmp_path / "whole"
    monkeypatch.setattr(index_file, "SHARD_BYTES", 8 * 8 * 2)
    InfluenceIndex.build(mlp(), rows, whole, projection=2, **given)
    count, save = 0, index_file.save_tensors

    def killed(tensors, path, *rest):
        nonlocal count
        count += path.name.startswith("shard")
        if count == 3:
            raise KeyboardInterrupt
        save(tensors, path, *rest)

    monkeypatch.setattr(index_file, "save_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        InfluenceIndex.build(mlp(), rows, folder, projection=2, **given)
    monkeypatch.setattr(index_file, "save_tensors", save)
    with pytest.raises(ValueError, match="of an index that was not finished; build it again, which goes on$"):
        InfluenceIndex.load(folder, mlp(), **given)
    with pytest.raises(
        ValueError, match=r"a part of an index of another settings .* as it was begun, or choose another"
    ):
        InfluenceIndex.build(mlp(), rows, folder, projection=3, **given)
    with pytest.raises(ValueError, match="a part of an index of another rows"):
        InfluenceIndex.build(mlp(), vectors(ROWS, seed=4), folder, projection=2, **given)
    before = (folder / "shard-00000.safetensors").stat().st_mtime_ns
    InfluenceIndex.build(mlp(), rows, folder, projection=2, **given)
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == before
    for file in sorted(whole.glob("shard-*")):
        one, other = load_tensors(file), load_tensors(folder / file.name)
        assert torch.equal(one["gradients"], other["gradients"])
        assert torch.equal(one["weight"], other["weight"])
    # Killed before there was anything to go on from, there is nothing.
    monkeypatch.setattr(index_file, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        InfluenceIndex.build(mlp(), rows, tmp_path / "nothing", projection=2, **given)
    assert not (tmp_path / "nothing").exists()


def test_refused(tmp_path, given):
    rows, folder = vectors(9), tmp_path / "index"
    InfluenceIndex.build(mlp(), rows, folder, projection=2, **given)
    other = mlp()
    with torch.no_grad():
        other.first.bias[0] += 1e-3
    for call, message in (
        (lambda: InfluenceIndex.load(folder, other, **given).query(TARGETS), "model: is another one than the index in "),
        (lambda: InfluenceIndex.build(mlp(), rows, folder, **given), "holds an index already; load it, or choose another folder"),
        (lambda: InfluenceIndex.load(tmp_path, mlp(), **given), r"holds no index \(no index.json\); build one into it first"),
        (lambda: InfluenceIndex.build(mlp(), rows, tmp_path, **given), "holds something else than an index; choose another one"),
        (lambda: InfluenceIndex.build(mlp(), rows, tmp_path / "x", projection=0, **given), "projection=0: must be ≥ 1"),
        (lambda: InfluenceIndex.build(mlp(), rows, tmp_path / "x", dtype="int8", **given), "dtype='int8': must be one of "),
        (lambda: InfluenceIndex.load(folder, mlp(), **given).query(TARGETS, k=0), "k=0: must be ≥ 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "x").exists()
    manifest = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(manifest | {"format": 0}))
    with pytest.raises(ValueError, match="has format 0, this version reads 1"):
        InfluenceIndex.load(folder, mlp(), **given)
    (folder / "index.json").write_text(json.dumps(manifest))
    shutil.copy(folder / "index.json", folder / "shard-00000.safetensors")
    with pytest.raises(ValueError, match="shard-00000.safetensors is damaged"):
        InfluenceIndex.load(folder, mlp(), **given).query(TARGETS)
