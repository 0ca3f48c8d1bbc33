"""Starts a program in several processes with torchrun, as a user's `accelerate launch` does."""

import os
import subprocess
import sys


NOISE = (
    "it/s",
    "?it",
    "examples/s",
    "find_unused_parameters",
)  # progress bars, and a warning of DDP on every forward pass


def launched(program, *arguments, processes=2, timeout=600):
    """What the processes printed; all of them must end well. What a process says when it is killed by a signal of its own is told, too.

    Args:
        program (`str`): a file. It ends each of its processes with `print("all done", flush=True)`.
        timeout (`int`): seconds; a process that waits for another for ever is what it is for.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)
    }  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    run = subprocess.run(
        [*launcher, program, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    lines = [line for line in run.stderr.splitlines() if not any(noise in line for noise in NOISE)]
    assert run.returncode == 0, "\n".join(lines)[-8000:]
    assert run.stdout.count("all done") == processes
    return run.stdout
