"""Benchmarks still run, the quick way, and leave the figures alone."""

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
