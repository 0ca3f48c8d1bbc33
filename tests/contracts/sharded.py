"""Unlearning in two gloo processes that hold all parameters each (DDP), and then in the same two that share them (FSDP2).

Started by torchrun with a folder. accelerate considers FSDP for accelerators alone, and takes DDP on a CPU without a word; so it is told here, after the
arguments are made, that these processes are on some. Nothing of the package knows of it.
"""

import gc
import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import accelerate.state
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig
from processes import BATCH, DESCENDING, Broken
from safetensors.torch import save_file
from text_to_image_data import tiny
from torch.distributed.tensor import DTensor
from trainers import INFLUENCES, JOBS, QUIET, arguments, build, records, weights

from hf_unlearn import ESDTrainer, SalUnTrainer, VDUTrainer
from hf_unlearn.unlearning.diffusion import vdu


COMMON = {
    "logging_strategy": "steps", "logging_steps": 1, "max_steps": 4, "per_device_train_batch_size": BATCH // 2,
    "save_strategy": "steps", "save_steps": 2,
}  # fmt: skip


@dataclass
class Run:
    """A run of a job, and the layers that its processes gather one after the other; by default those that the model names."""

    job: str
    layers: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    mixin: type | None = None
    adapter: bool = False
    task: str | None = None  # of the adapter
    resumed: bool = True
    prompted: type | None = None  # a trainer of a pipeline that takes prompts, in place of the job's
    marker: Callable[[torch.Tensor], torch.Tensor] | None = None


class Forgets:
    """The original knows all, and the model none of it any more."""

    def correct(self, model, batch):
        return torch.full_like(self.labels_of(batch), model is not self.model, dtype=torch.bool)


def brighter(images):
    """Half of them."""
    means = images.mean((1, 2, 3))
    return means > means.median()


PROMPTS = {
    "forget_prompts": ["a photo of a cat", "a cat in the rain"], "forget_samples": 8, "own_samples": 8, "num_inference_steps": 2,
    "guard": False, "ema_decay": 0.0, "stability_weight": 0.0, "max_steps": 2, "save_steps": 1,
}  # fmt: skip
UP = "CrossAttnUpBlock2D"
HORSE = PROMPTS | {"concept": {"cat": "horse"}}
ASKED = PROMPTS | {
    "own_samples": 0,
    "num_inference_steps": 3,
    "seed": 4,
}  # one draws for longer than the other, and then the other way round


RUNS = {
    "unlearn": Run("unlearn", "ViTLayer"),
    "unlearn, guarded": Run("unlearn", "ViTLayer", DESCENDING, resumed=False),
    "unlearn, broken": Run("unlearn", "ViTLayer", {"forget_loss": "ascent", "guard": True}, Broken, resumed=False),
    "unlearn, severed": Run("unlearn", "ViTLayer", {"forget": "class", "fisher_weight": 0.0}, Forgets, resumed=False),
    "sft": Run("sft", "LlamaDecoderLayer"),
    "sft, adapter": Run("sft", "LlamaDecoderLayer", {"isotropic_weight": 0.1}, adapter=True, task="CAUSAL_LM"),
    "in_run": Run("in_run", "ViTLayer", {"preconditioned": True, "target_every": 2}),
    "in_run, self": Run("in_run", "ViTLayer", {"target": "self", "target_dataset": None}, adapter=True, resumed=False),
    "fine": Run(
        "fine",
        "LlamaDecoderLayer",
        {"target_rank": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    ),
    "vdu": Run(
        "vdu",
        "ResnetBlock2D",
        {"grid_images": 2, "activation_checkpointing": True, "guard_steps": 2},
    ),
    "vdu, concept": Run("vdu", UP, HORSE, prompted=VDUTrainer, marker=brighter, resumed=False),
    "vdu, adapter": Run("vdu", None, HORSE | {"trainable": ["lora"]}, prompted=VDUTrainer),
    "salun": Run("vdu", UP, PROMPTS, prompted=SalUnTrainer, resumed=False),
    "esd": Run("vdu", UP, ASKED, prompted=ESDTrainer, resumed=False),
}


@contextmanager
def environment(layers):
    """What `accelerate launch` sets for a config of FSDP2."""
    values = {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    }  # fmt: skip
    if layers:
        values["FSDP_TRANSFORMER_CLS_TO_WRAP"] = layers
    os.environ |= values
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]


def told_of_accelerators():
    """To be called between the arguments and the trainer."""
    accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU


def trainer_of(folder, one, sharded):
    job = JOBS[one.job]
    settings = QUIET | job.values | COMMON | one.changes
    config = one.prompted._config_class if one.prompted else job.config
    args = config(str(folder), **{k: v for k, v in settings.items() if k in config.__dataclass_fields__})
    if sharded:
        told_of_accelerators()
    if one.prompted:
        return one.prompted(pipeline=tiny("sd"), args=args, marker=one.marker)
    known = arguments(one.job)
    rows = "train_dataset" if one.job in INFLUENCES else "forget_dataset"
    given = {name: known[name] for name in (job.start, rows)}
    if one.job in INFLUENCES:
        given |= {name: one.changes.get(name, known.get(name)) for name in ("target", "target_dataset")}
    if one.adapter:
        given["peft_config"] = LoraConfig(r=2, target_modules="all-linear", task_type=one.task)
    given[rows] = given[rows].select(range(8))  # or accelerate would fill the last batch up
    return build(one.job, folder, mixin=one.mixin, args=args, **given)


def refusal(function):
    try:
        function()
    except ValueError as error:
        return str(error)


def run(folder, one, sharded):
    """Trains, saves, and says what came of it."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"error": None, "resumed": None, "before": None, "after": None}
    torch.manual_seed(
        int(os.environ["RANK"])
    )  # what is drawn before there is a seed, as an adapter of a trainer that takes none
    trainer = trainer_of(folder, one, sharded)
    if not one.adapter and trainer.is_world_process_zero():
        save_file(weights(trainer), folder / "start.safetensors")
    try:
        rows = trainer.train_dataset
        facts["before"] = trainer.evaluate(rows)["eval_loss"]
        trainer.train()
        facts["after"] = trainer.evaluate(rows)["eval_loss"]
        trainer.save_model(folder / "final")
        trainer.check_saving()  # as before another training
        if sharded and folder.name == "vdu":
            facts["refused"] = refusal(trainer.train)
        if getattr(trainer, "is_adapter", False):
            trainer.args.merge_adapter = False
            trainer.save_model(folder / "apart")
    except FloatingPointError as error:
        facts["error"] = str(error)
    trainer.accelerator.wait_for_everyone()
    facts |= {
        "sharded": all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters()),
        "logs": [{k: v for k, v in log.items() if "loss" in k or "anchor" in k} for log in trainer.state.log_history],
        "guard": trainer.guard.state.to_json() if getattr(trainer, "guard", None) else None,
        "outcome": asdict(trainer.outcome) if getattr(trainer, "outcome", None) else None,
        "gap": getattr(getattr(trainer, "forgetting", None), "gap", None),
    }
    if one.job in INFLUENCES and trainer.is_world_process_zero():
        save_file(records(trainer), folder / "records.safetensors")
    if sharded and one.resumed:
        if trainer.is_world_process_zero():
            shutil.rmtree(folder / f"checkpoint-{trainer.state.max_steps}")
        trainer.accelerator.wait_for_everyone()
        again = trainer_of(folder, one, sharded)
        again.train(resume_from_checkpoint=True)
        again.save_model(folder / "resumed")
        if one.job in INFLUENCES and trainer.is_world_process_zero():
            save_file(records(again), folder / "again.safetensors")
        facts["resumed"] = again.state.global_step
    rank = os.environ["RANK"]
    (folder / f"facts-{rank}.json").write_text(json.dumps(facts).replace("NaN", "null").replace("Infinity", "null"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # every train() collects garbage
    vdu.HANDFUL = 4  # images that are drawn for a marker
    for name, one in RUNS.items():
        run(Path(sys.argv[1], "plain", name), one, False)
    for name, one in RUNS.items():
        with environment(one.layers):
            run(Path(sys.argv[1], "sharded", name), one, True)
    torch.distributed.destroy_process_group()
    print("all done", flush=True)
