"""Benchmarks still run, the quick way, and leave the figures alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
QUICK = sorted(path.name for path in BENCHMARKS.glob("*.py") if '"--quick"' in path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("script", QUICK)
def test_quick(script):
    if "kronfluence" in (BENCHMARKS / script).read_text():
        pytest.importorskip("kronfluence")
    figures = {path: path.read_bytes() for path in (BENCHMARKS / "results").iterdir()}
    process = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--quick"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout
    assert {path: path.read_bytes() for path in (BENCHMARKS / "results").iterdir()} == figures


def test_a_row_takes_the_place_of_an_older_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from rows import keep, rounded

    def row(seed, way, value):
        return {"seed": seed, "way": way, "value": value}

    file = tmp_path / "results.json"
    keep(file, [row(1, "a", 1), row(0, "b", 2)], ("seed", "way"), steps=[1, 2])
    first, third = row(1, "a", 3), row(1, "b", 4)
    assert keep(file, [first], ("way", "seed")) == [row(0, "b", 2), first]
    rows = keep(file, iter([third]), ("seed", "way"), key=lambda row: row["value"], steps=[3])
    assert rows == [row(0, "b", 2), first, third]
    assert json.loads(file.read_text()) == {"steps": [3], "rows": rows}
    assert len(file.read_text().splitlines()) == len(rows) + 3
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert rounded({"a": [1.23456, 12345, "x"], "b": {"c": 2e-7 / 3}}) == {
        "a": [1.235, 12345, "x"],
        "b": {"c": 6.667e-8},
    }
