"""What must be made once where several processes were launched, and how they end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from torch import distributed

from ..examples.cache import NotMadeError, only_looking
from ..examples.named import made


if TYPE_CHECKING:
    from transformers import TrainingArguments


LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def made_once(config: TrainingArguments | None, name: str, *, seed: int = 0) -> str:
    """Folder of a small model ([`~hf_unlearn.examples.named.made`]).

    Of several processes the first one makes what is not there, in a process of its own: its training must not look for the other processes.

    Args:
        config (`TrainingArguments`, *optional*): of the job; None where it runs in one process.
        name, seed: which model.
    """
    if config is None or config.world_size == 1:
        return str(made(name, seed=seed))
    with config.main_process_first(desc="training a small model"):
        with suppress(NotMadeError), only_looking():
            return str(made(name, seed=seed))
        alone = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
        alone = {name: value for name, value in alone.items() if not name.startswith(("ACCELERATE_", "TORCHELASTIC_"))}
        command = [sys.executable, "-m", "hf_unlearn.examples", name, "--seed", str(seed)]
        done = subprocess.run(command, env=alone, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout.splitlines()[-1]


@contextmanager
def leaving_together() -> Iterator[None]:
    """The processes that were launched together wait for each other at the end of a job, and close what they are joined by.

    One that ends with it open may die of it ("terminate called without an active exception", torch 2.13), and the launcher then
    kills the others, which may be writing still.
    """
    yield
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
