"""How a run came out, said when it ends: no run is silent about it."""

from __future__ import annotations

import logging
from typing import Any


logger = logging.getLogger(__name__)


def tell_outcome(trainer: Any, line: str) -> None:
    """Print how a run came out, as Trainer prints its metrics at any log level, and warn of each of `trainer.failed_checks`."""
    if trainer.is_world_process_zero():
        print(line)
        for failed in getattr(trainer, "failed_checks", ()):
            logger.warning("not passed: %s", failed)
