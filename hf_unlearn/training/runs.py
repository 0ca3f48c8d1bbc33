"""A run and its folder: which checkpoints are its own, whole and undamaged; and that no other run is at work there.

A run has a number of its own. `_private/run.json` says which run a folder is of, and each checkpoint which run wrote it, in a file
that is written last. A run that starts claims its folder: from then on the checkpoints of earlier runs are nobody's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
import zlib
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints

from ..data import looks_of
from ..files import PRIVATE, kept_private, read_json, write_json
from .checks import check_is_not_original, check_shared_once
from .processes import EvaluationMixin


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

try:
    import fcntl
except ImportError:  # Windows, where two runs in one folder are not seen
    fcntl = None


MARKER = "run.json"  # of a checkpoint it is written last: one without it is half of one
LOCK = "lock"
FORMAT = 2
AGAIN = "resume it as it was, or start a new one"


class RunMixin(EvaluationMixin):
    """Gives a Trainer runs that can be resumed: `train` is here, and a trainer says by `_train` what it does itself.

    A trainer overrides `_checkpoint_state` for what it needs to go on, `_run_settings` and `_run_rows` for what a
    resumed run must have in common with the first one, and `_is_over` where it may end before its last step.
    """

    _method: str
    _originals: Sequence[str | Path | None] = ()  # names of what the model was loaded from
    _resumed: dict[str, Any]  # what `_checkpoint_state` gave
    _run: dict[str, Any]

    @property
    def private_dir(self) -> Path:
        """Reference, Fisher, guard states, records, keys: everything that could undo the unlearning or tell what was trained on. Never
        published.
        """
        return Path(self.args.output_dir, PRIVATE)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """As [`~transformers.Trainer.train`]. `resume_from_checkpoint=True` takes the newest complete checkpoint of the run that
        `output_dir` is of; a run that has ended is not trained on, and ends as it ended.

        Raises:
            ValueError: there is no such checkpoint, it is damaged, of another run or method, or the run was started with other
                settings or data; or another run is at work in `output_dir`.
            FloatingPointError: a loss or a gradient is not finite.
        """
        check_shared_once(self.model)
        resumes = resume_from_checkpoint not in (None, False)
        # What is to be resumed and is no run is refused before a file is made there.
        with self._alone() if not resumes or (self.private_dir / MARKER).is_file() else nullcontext():
            checkpoint = self._whole_checkpoint(resume_from_checkpoint) if resumes else None
            self.check_saving()
            if not resumes and self.args.should_save:
                self._claim()
            self.accelerator.wait_for_everyone()
            return self._train(checkpoint, **kwargs)

    def _train(self, checkpoint: str | None, **kwargs: Any):
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    # What a trainer says of its run

    def check_saving(self) -> None:
        """Refuse what could not be saved at the end."""

    def _checkpoint_state(self) -> dict[str, Any]:
        return {}

    def _run_settings(self) -> dict[str, Any]:
        """Settings that decide what the steps do; not those that say how many there are."""
        return {name: getattr(self.args, name) for name in ("seed", "data_seed", "learning_rate")}

    def _run_rows(self) -> dict[str, Any]:
        """What is trained on, by the argument's name."""
        return {}

    @property
    def _is_over(self) -> bool:
        return self.state.global_step >= self.state.max_steps

    def save_model(self, output_dir: str | Path | None = None, _internal_call: bool = False) -> None:
        """As [`~transformers.Trainer.save_model`], but not over the original.

        Raises:
            ValueError: `output_dir` holds the original model.
        """
        if output_dir is not None:
            for name in self._originals:
                check_is_not_original(output_dir, name)
            output_dir = str(output_dir)
        super().save_model(output_dir, _internal_call)

    # The folder

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with ExitStack() as held:
            free = True
            if self.is_world_process_zero():
                lock = locked(self.private_dir)
                free = lock is not None
                held.enter_context(lock or ExitStack())
            if self.args.world_size > 1:  # one process that stopped alone would leave the others waiting
                free = bool(broadcast(torch.tensor(int(free), device=self.args.device)))
            if not free:
                raise ValueError(
                    f"output_dir: another run is at work in {str(self.args.output_dir)!r}; wait for its end, or choose another folder"
                )
            yield

    def _claim(self) -> None:
        run = uuid.uuid4().hex
        rows = {name: _looks(rows, run) for name, rows in self._run_rows().items() if rows is not None}
        self._run = {"format": FORMAT, "run": run, "method": self._method}
        about = {"settings": self._run_settings(), "model": _shapes(self.model), "rows": rows}
        write_json(self._run | about, self.private_dir / MARKER)

    def own_checkpoints(self) -> list[Path]:
        """The complete checkpoints of the run that `output_dir` is of, the newest last."""
        file = self.private_dir / MARKER
        run = read_json(file).get("run") if file.is_file() else None
        return [path for path, written_by in _whole(self.args.output_dir).items() if written_by == run]

    def _whole_checkpoint(self, given: str | bool) -> str:
        """The checkpoint to go on from, after a look at all of its files."""
        file = self.private_dir / MARKER
        run = read_json(file) if file.is_file() else {}
        if run:
            self._check_kind(run, self.args.output_dir)
        if given is True:
            own = self.own_checkpoints()
            if not own:
                others = "; those that are there are of an earlier run" if _whole(self.args.output_dir) else ""
                raise ValueError(
                    f"resume_from_checkpoint: no complete checkpoint in {str(self.args.output_dir)!r}{others}; start without it"
                )
            given = own[-1]
        marker = Path(given, MARKER)
        if not marker.is_file():
            raise ValueError(f"resume_from_checkpoint: {str(given)!r} is no complete checkpoint (no {MARKER})")
        about = read_json(marker)
        self._check_kind(about, given)
        if about["run"] != run.get("run"):
            raise ValueError(
                f"resume_from_checkpoint: {str(given)!r} is of another run than {str(self.args.output_dir)!r}; resume that run in "
                "its own folder, or start a new one"
            )
        self._check_same(run)
        self._check_sharing(given, about["files"])
        check_files(Path(given), about["files"])
        self._run = {name: run[name] for name in ("format", "run", "method")}
        self._resumed = about["state"]
        return str(given)

    def _check_kind(self, about: dict[str, Any], where: str | Path) -> None:
        if about.get("method") != self._method:
            raise ValueError(
                f"resume_from_checkpoint: {str(where)!r} belongs to method {about.get('method')!r}, this is {self._method!r}; "
                "resume with the trainer that wrote it"
            )
        if about.get("format") != FORMAT:
            raise ValueError(
                f"resume_from_checkpoint: {str(where)!r} has format {about.get('format')}, this version reads {FORMAT}; start again"
            )

    def _check_sharing(self, checkpoint: str | Path, files: dict[str, Any]) -> None:
        # accelerate 1.15 and transformers 5.23 write an optimizer's state in another form where processes share the parameters.
        shares = self.is_fsdp_enabled
        if ("optimizer.pt" if shares else "optimizer.bin") in files:
            wrote, now = ("do not share", "does") if shares else ("share", "does not")
            raise ValueError(
                f"resume_from_checkpoint: {str(checkpoint)!r} is of processes that {wrote} the parameters (FSDP2), and this run {now}; resume it "
                "by the config that it was launched with, on any number of processes, or start a new run"
            )

    def _check_same(self, run: dict[str, Any]) -> None:
        now = json.loads(json.dumps(self._run_settings(), default=str))
        for name, value in now.items():
            if run["settings"].get(name) != value:
                raise ValueError(
                    f"resume_from_checkpoint: the run was started with {name} {run['settings'].get(name)!r}, this is {value!r}; {AGAIN}"
                )
        if run.get("model", now := _shapes(self.model)) != now:
            raise ValueError(
                f"resume_from_checkpoint: the run was started with a model (or adapter) of other parameters; {AGAIN}"
            )
        rows = self._run_rows()
        nothing = dict.fromkeys(rows, (0, None))
        for name, (size, digest) in (nothing | run["rows"]).items():
            now = _looks(rows[name], run["run"]) if rows.get(name) is not None else [0, None]
            if size != now[0] or (digest and now[1] and digest != now[1]):
                raise ValueError(f"resume_from_checkpoint: the run was started with other rows of {name}; {AGAIN}")

    # The loop

    def _run_epoch(self, **kwargs: Any) -> None:
        # transformers 5.23 takes one more step where a run that has ended is resumed.
        if self._is_over:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def _finalize_training(self, trial, *args: Any):
        # One that stops early has a checkpoint of its end too, or it would take its last steps again.
        step, saves = self.state.global_step, self.args.save_strategy in ("steps", "epoch")
        checkpoint = Path(self._get_output_dir(trial=trial), f"checkpoint-{step}")
        missing = self.args.should_save and saves and step > 0 and _run_of(checkpoint) != self._run["run"]
        if self.args.world_size > 1:
            missing = bool(broadcast(torch.tensor(int(missing), device=self.args.device)))
        if missing:
            self._save_checkpoint(self.model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        return super()._finalize_training(trial, *args)

    def _save_checkpoint(self, model, trial) -> None:
        # Rotation waits until the new checkpoint is marked: a kill in between must not leave none. And where an earlier run
        # left a checkpoint of this step, nothing of it must be taken for a part of this one.
        run_dir = self._get_output_dir(trial=trial)
        checkpoint = Path(run_dir, f"checkpoint-{self.state.global_step}")
        if self.args.should_save and checkpoint.is_dir():
            (checkpoint / MARKER).unlink(missing_ok=True)
            shutil.rmtree(checkpoint)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(checkpoint, self._run, self._checkpoint_state())
            rotate_checkpoints(run_dir, limit, self.state.best_model_checkpoint, use_mtime=True)


def locked(folder: Path) -> IO | None:
    """An open file whose lock nobody else holds, or None. The lock goes with its process: none is ever left behind.

    Raises:
        ValueError: no file can be made in the folder.
    """
    try:
        with kept_private(folder / LOCK) as path:
            file = open(path, "a")  # noqa: SIM115 (whoever asks closes it)
    except OSError as error:
        raise ValueError(
            f"output_dir: cannot write to {str(folder)!r} ({error.strerror}); choose another folder"
        ) from error
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:  # a file system that has no locks
        pass
    return file


def mark_complete(checkpoint: Path, run: dict[str, Any], state: dict[str, Any]) -> None:
    """Declare a checkpoint complete, with the run that wrote it, the trainer's own state, and size and checksum of its files."""
    write_json(run | {"state": state, "files": _checksums(checkpoint)}, checkpoint / MARKER)


def check_files(checkpoint: Path, files: dict[str, list[int]]) -> None:
    """Refuse a checkpoint that is not as it was written.

    Raises:
        ValueError: naming the first file that is missing or damaged.
    """
    for name, (size, checksum) in files.items():
        file = checkpoint / name
        wrong = "is missing" if not file.is_file() else None
        if wrong is None and (now := os.path.getsize(file)) != size:
            wrong = f"is damaged ({now:,} bytes of {size:,})"
        elif wrong is None and _checksum(file) != checksum:
            wrong = "is damaged (other bytes than were written)"
        if wrong:
            raise ValueError(
                f"resume_from_checkpoint: {file} {wrong}; restore it, or delete {checkpoint.name} to resume from the "
                "checkpoint before it"
            )


def _shapes(model: Any) -> str:
    """What parameters a model has, and which of them are trained; not their values."""
    parts = sorted((name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters())
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _run_of(checkpoint: Path) -> str | None:
    """The run that wrote a checkpoint; None where it is not whole, or not of this package."""
    marker = checkpoint / MARKER
    return read_json(marker).get("run") if marker.is_file() else None


def _whole(folder: str) -> dict[Path, str]:
    """Complete checkpoints in a folder, the newest last, and the run that wrote each."""
    found = [Path(path) for path in sort_checkpoints(folder)]
    return {path: run for path in found if re.fullmatch(r"checkpoint-\d+", path.name) and (run := _run_of(path))}


def _checksums(folder: Path) -> dict[str, list[int]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    return {str(path.relative_to(folder)): [os.path.getsize(path), _checksum(path)] for path in files}


def _checksum(file: Path) -> int:
    value = 0
    with open(file, "rb") as stored:
        while part := stored.read(1 << 22):
            value = zlib.crc32(part, value)
    return value


def _looks(rows: Any, run: str) -> list[Any]:
    return [len(rows), looks_of(rows, run)]
