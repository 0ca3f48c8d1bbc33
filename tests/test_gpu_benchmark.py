"""The script for a GPU runs whole, with tiny models on the CPU: nobody wants to find its mistakes in rented minutes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
STEPS = {"seconds", "step_mb", "run_mb", "trained", "parameters", "examples"}


@pytest.mark.slow
def test_every_row_is_measured(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import scaling_report

    out = tmp_path / "gpu.json"
    process = subprocess.run(
        [sys.executable, str(SCRIPT), "--tiny", "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    rows = {(row["part"], row["name"]): row for row in json.loads(out.read_text())["rows"]}
    assert {place: row for place, row in rows.items() if "failed" in row or "left_out" in row} == {}, process.stdout[
        -3000:
    ]
    assert len(rows) == 21
    assert set(scaling_report.PREDICTED) <= set(rows)
    trainings = {place: row for place, row in rows.items() if place[0].startswith(("Llama", "sd15,", "sdxl,"))}
    assert len(trainings) == 17
    assert all(set(row) >= STEPS and row["seconds"] > 0 for row in trainings.values())
    for part in {part for part, _ in trainings}:  # what is compared trains the same parameters
        sizes = {row["trained"] for (place, _), row in trainings.items() if place == part}
        assert len(sizes) == 1
        assert part.endswith("all") == (
            sizes == {row["parameters"] for (place, _), row in trainings.items() if place == part}
        )


@pytest.mark.slow
def test_a_row_that_fails_says_why_and_others_go_on(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu

    def measure(machine):
        raise RuntimeError("CUDA out of memory")

    machine = gpu.Machine(True, str(tmp_path))
    assert gpu.row_of(measure, machine)["failed"] == "RuntimeError: CUDA out of memory"
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(
        gpu, "parts", lambda: iter([("a", "1", measure), ("b", "2", lambda machine: {"seconds": 1.0})])
    )
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--out", str(out)])
    gpu.main()
    rows = json.loads(out.read_text())["rows"]
    assert [(row["part"], "failed" in row, row.get("seconds")) for row in rows] == [
        ("a", True, None),
        ("b", False, 1.0),
    ]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--minutes", "-1", "--out", str(out)])
    gpu.main()
    assert [row["left_out"] for row in json.loads(out.read_text())["rows"]] == ["no time was left"] * 2
