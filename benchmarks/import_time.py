"""Seconds that `import hf_unlearn` adds to an empty Python: median over fresh processes, and what it pulled in."""

import json
import statistics
import subprocess
import sys
from pathlib import Path


CODE = "import sys, time; t = time.perf_counter(); import hf_unlearn; print(time.perf_counter() - t, 'torch' in sys.modules)"


def main() -> None:
    runs = [
        subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True) for _ in range(21)
    ]
    seconds = statistics.median(float(run.stdout.split()[0]) for run in runs)
    torch = any(run.stdout.split()[1] == "True" for run in runs)
    print(f"import hf_unlearn: {1000 * seconds:.1f} ms, torch imported: {torch}")
    file = Path(__file__).parent / "results" / "import_time.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"milliseconds": 1000 * seconds, "torch": torch}, indent=1) + "\n")


if __name__ == "__main__":
    main()
