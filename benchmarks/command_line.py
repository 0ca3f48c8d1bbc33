"""How long the command line takes to say what is wrong, beside a Python that imports yaml: medians of runs in turn.

A wrong verb, key, word, number or missing key has to be answered within 1.5 times that, plus a second.
"""

import statistics
import subprocess
import sys
import time


RUNS = 11
COMMANDS = {
    "import yaml": ["-c", "import yaml"],
    "wrong verb": ["-m", "hf_unlearn.cli", "unlern"],
    "wrong key": ["-m", "hf_unlearn.cli", "unlearn", "vdu_ddpm_digits", "--cautoin", "2"],
    "wrong type": ["-m", "hf_unlearn.cli", "unlearn", "pbu_digits", "--learning_rate", "fast"],
    "out of range": ["-m", "hf_unlearn.cli", "unlearn", "pbu_digits", "--forget_accuracy", "2"],
    "missing key": ["-m", "hf_unlearn.cli", "influence", "--method", "sft"],
    "filter": ["-m", "hf_unlearn.cli", "filter", "fit", "--marker_", "digits"],
    "--help": ["-m", "hf_unlearn.cli", "unlearn", "--help"],
    "list": ["-m", "hf_unlearn.cli", "list"],
}


def main() -> None:
    seconds = {name: [] for name in COMMANDS}
    for _ in range(RUNS):
        for name, command in COMMANDS.items():
            begun = time.perf_counter()
            subprocess.run([sys.executable, *command], capture_output=True)
            seconds[name].append(time.perf_counter() - begun)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    allowed = 1.5 * middle["import yaml"] + 1
    for name, value in middle.items():
        ratio = value / middle["import yaml"]
        print(f"{name:12} {value:6.3f} s  {ratio:5.1f} times import yaml  {value / allowed:4.2f} of what is allowed")


if __name__ == "__main__":
    main()
