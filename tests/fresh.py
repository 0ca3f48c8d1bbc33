"""Processes that have never seen hf_unlearn, without the seconds that the libraries' imports take.

They are forked from a clean interpreter that has imported the libraries and nothing else. What huggingface_hub reads when it
is imported (`HF_ENDPOINT`, `HF_HOME`, `HF_HUB_OFFLINE`) cannot be changed in them: that needs a real interpreter.
"""

import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
import types
from pathlib import Path


LIBRARIES = ["datasets", "diffusers", "peft", "torch", "transformers", "transformers.trainer", "trl"]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(LIBRARIES)


def run_python(code, *arguments, cwd=None, env=None, timeout=240):
    """As `subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)`.

    Args:
        code (`str`): a whole program.
        arguments: its `sys.argv[1:]`.
        cwd (`Path`, *optional*): where it runs.
        env (`dict[str, str]`, *optional*): variables to set besides those of this process.
        timeout (`float`): seconds.

    Raises:
        AssertionError: the program failed, with what it printed to stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = _context.Process(target=_run, args=(code, [*map(str, arguments)], cwd, env or {}, out, err))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        printed = [file.read_text() if file.exists() else "" for file in (out, err)]
    assert process.exitcode == 0, f"exit code {process.exitcode}\n{printed[1]}"
    return subprocess.CompletedProcess(code, process.exitcode, *printed)


def _run(code, arguments, cwd, env, out, err):
    import torch

    gc.freeze()  # what the libraries left: neither looked at nor copied
    for file, descriptor in ((out, 1), (err, 2)):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, descriptor)
    sys.stdout, sys.stderr = (open(descriptor, "w", closefd=False) for descriptor in (1, 2))  # noqa: SIM115
    os.environ.update(env)
    torch.set_num_threads(1)
    if cwd is not None:
        os.chdir(cwd)
    sys.argv = ["-c", *arguments]
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    status = 0
    try:
        exec(compile(code, "<string>", "exec"), main.__dict__)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
