"""What the keys of several recipes mean, and how a job speaks."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .watching import watch


if TYPE_CHECKING:
    from ..unlearning.config import UnlearnArguments


def resume_argument(config: UnlearnArguments) -> str | bool | None:
    """`resume_from_checkpoint` of a recipe, where every value is a word."""
    word = config.resume_from_checkpoint
    return {None: None, "false": None, "true": True}.get(word and word.lower(), word)


def adapter_of(job: Any, task_type: str | None = None) -> Any:
    """The `LoraConfig` that a recipe's `lora_r`, `lora_alpha` and `lora_target_modules` ask for, or None."""
    if not job.lora_r:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=job.lora_r,
        lora_alpha=job.lora_alpha or 2 * job.lora_r,
        target_modules=job.lora_target_modules or "all-linear",
        task_type=task_type,
    )


def check_machine(job: Any, name: str) -> None:
    """Refuse several processes, of which each would write the same folder, and a GPU that is not there.

    Args:
        job: with a key `device`.
        name (`str`): of what runs.

    Raises:
        ValueError: naming what to change.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"{name}: runs in one process; start it without accelerate launch")
    if device_of(job).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={job.device!r}: there is no such GPU; leave it out")


def device_of(job: Any) -> str:
    """Where a job draws: its key `device`, or a GPU if there is one."""
    return job.device or ("cuda" if torch.cuda.is_available() else "cpu")


class Stopped(KeyboardInterrupt):
    """Ctrl-C while a job trains, and how to go on."""


def run_training(trainer: Any) -> None:
    """`trainer.train()`, from the checkpoint that the recipe names.

    Raises:
        Stopped: by Ctrl-C.
    """
    if (looks := watch()) is not None:
        trainer.add_callback(looks.of(trainer))
    try:
        trainer.train(resume_from_checkpoint=resume_argument(trainer.args))
    except KeyboardInterrupt:
        kept = trainer.own_checkpoints()
        how = (
            "no checkpoint was saved, so the same command begins anew; save_strategy and save_steps save some"
            if not kept
            else f"go on from step {kept[-1].name.partition('-')[2]} with the same command and --resume_from_checkpoint true"
        )
        raise Stopped(f"stopped at step {trainer.state.global_step}; {how}") from None


def console() -> Console:
    """Names of concepts and classes are anybody's: nothing that is printed is read as markup."""
    return Console(highlight=False, soft_wrap=True, markup=False)


def show_code(lines: Sequence[str]) -> None:
    console().print("\n".join(f"    {line}".rstrip() for line in lines), markup=False)


def tell(trainer: Any, table: Table | None, code: str, *, kind: str, grids: bool = False) -> dict[str, Any]:
    """The end of an unlearning job: what was measured, what did not pass, where things are, and how to load them.

    Returns the same for machines.

    Args:
        code (`str`): loads what was saved.
        kind (`str`): what that is, as in `"model"`.
        grids (`bool`, defaults to `False`): pictures were drawn on the way.
    """
    out, folder, private = console(), trainer.args.output_dir, trainer.private_dir
    if table is not None:
        out.print(table)
    for failed in trainer.failed_checks:
        out.print(Text.assemble(("not passed", "bold red"), f"  {failed}"))
    places = {kind: folder, "card": Path(folder, "README.md")} | ({"grids": private / "samples"} if grids else {})
    for name, place in (places | {"private": f"{private} (could undo the unlearning: never publish it)"}).items():
        out.print(f"{name:8} {place}", markup=False)
    out.print("\nLoad it:\n")
    show_code(code.splitlines())
    return {
        "figures": [*trainer.results, *getattr(trainer, "outcome_figures", ())],
        "verdict": "not passed" if trainer.failed_checks else "passed",
        "failed_checks": [*trainer.failed_checks],
        "passed_checks": [*trainer.passed_checks],
        "steps": trainer.state.global_step,
        "places": places,
        "load": code,
    }


def command_line(verb: str, arguments: Sequence[str]) -> str:
    return shlex.join(["hf-unlearn", *verb.split(), *arguments])


def card_of_dataset(name: str | None) -> dict[str, Any]:
    """What a card says of the data: nothing of a folder on this machine, and the id of one on the Hub."""
    if not name or Path(name).exists():
        return {}
    return {"dataset_name": name, "dataset_type": name} | ({"datasets": [name]} if "/" in name else {})
