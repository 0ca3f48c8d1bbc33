"""What must be made once where several processes were launched."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def made_once(config: Any, make: Callable[[], Path], code: str) -> str:
    """Folder of a model that is trained on first use.

    Of several processes the first one makes it, in a process of its own: its training must not look for the other processes.

    Args:
        config (`TrainingArguments`): of the job.
        make (callable): makes it, and gives its folder.
        code (`str`): Python that prints the same, as its last line.
    """
    if config.world_size == 1:
        return str(make())
    with config.main_process_first(desc="training a small model"):
        alone = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
        alone = {name: value for name, value in alone.items() if not name.startswith(("ACCELERATE_", "TORCHELASTIC_"))}
        done = subprocess.run([sys.executable, "-c", code], env=alone, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout.splitlines()[-1]
