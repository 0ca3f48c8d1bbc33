"""What every trainer refuses."""

from __future__ import annotations

import os


def check_processes(args) -> None:
    """Refuse processes that were launched together and do not know of each other: each would write the same folder.

    Raises:
        ValueError: as when `accelerate launch` starts several on a machine without a GPU, which it does not tell them.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != args.world_size:
        raise ValueError(f"use_cpu: {launched} processes were launched, but there is no GPU; set use_cpu=True")
