"""What `hf-unlearn estimate` says before a run, and what the run then takes: memory, disk and processor time.

    python benchmarks/estimate.py [RECIPE ...]

Each of both is a process of its own, one thread, on the CPU; the small models are made before. Time is that of the processor, which other
programs on the machine change less than that of the clock. A guard or a target may end a run before its last step, which an estimate cannot
know: the run is compared with what is estimated for as many steps as it took.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


HERE = Path(__file__).parent
RECIPES = {  # recipe: words of its verb
    "pbu_digits": ["unlearn"],
    "unlearn_examples_digits": ["unlearn"],
    "influence_labels_digits": ["influence"],
    "filter_digits_gan": ["filter", "fit"],
    "vdu_ddpm_digits": ["unlearn"],
}


def run(*words: str, folder: str) -> tuple[dict, float, int]:
    """What a command says to machines, its processor seconds, and the bytes that it held at most."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "hf_unlearn.cli", *words, "--json"]
    with open(Path(folder, "log"), "w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        said = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(words)}: {Path(folder, 'log').read_text()[-2000:]}")
    return json.loads(said.splitlines()[-1]), used.ru_utime + used.ru_stime, 1024 * used.ru_maxrss


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def compare(recipe: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        # Makes the small models, and reads what both will read.
        first = run("estimate", recipe, "--output_dir", f"{folder}/out", folder=folder)[0]
        said, spent, _ = run("estimate", recipe, "--output_dir", f"{folder}/out", folder=folder)
        estimate = said["estimate"]
        assert first["estimate"]["steps"] == estimate["steps"]
        done, seconds, memory = run(*RECIPES[recipe], recipe, "--output_dir", f"{folder}/out", folder=folder)
        disk = bytes_in(Path(folder, "out"))
    steps = done.get("steps", estimate["steps"])
    not_taken = (estimate["steps"] - steps) * estimate["time"].get("cpu_step", 0.0)
    return {
        "steps": {"estimated": estimate["steps"], "taken": steps, "measured": estimate["measured_steps"]},
        "cpu_seconds": {"estimated": estimate["cpu_seconds"] - not_taken, "taken": seconds, "at_most": estimate["cpu_seconds"]},
        "memory": {"estimated": estimate["memory"], "taken": memory},
        "disk": {"estimated": estimate["disk"], "taken": disk},
        "memory_parts": estimate["memory_parts"],
        "cost": spent,
    }  # fmt: skip


def main(recipes: list[str]) -> None:
    file = HERE / "results" / "estimate.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    print(f"{'recipe':26} {'':12} {'estimated':>10} {'taken':>10}  ratio")
    for recipe in recipes or RECIPES:
        found[recipe] = compare(recipe)
        for what, scale, unit in (("cpu_seconds", 1, "s"), ("memory", 1e6, "MB"), ("disk", 1e6, "MB")):
            guess, taken = (found[recipe][what][side] / scale for side in ("estimated", "taken"))
            print(
                f"{recipe:26} {what:12} {guess:8.3g} {unit:2} {taken:7.3g} {unit:2} {guess / taken:5.2f}", flush=True
            )
        print(f"{recipe:26} {'cost':12} {found[recipe]['cost']:8.3g} s", flush=True)
        file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
