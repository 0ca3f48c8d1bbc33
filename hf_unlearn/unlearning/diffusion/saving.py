"""What an unlearning trainer of a diffusion pipeline writes: a plain pipeline, or a LoRA file, with its card."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...data import class_names
from ...hub.loading import diffusion_task, loading_code
from ...hub.origin import hub_id
from ...hub.publish import forget_local_paths, save_settings
from ...parameters.reference import ReferencePoint, average_, trainable_parameters
from ...parameters.sharding import is_shared, stock_class
from ..saving import SavingMixin
from .architecture import Architecture


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


logger = logging.getLogger(__name__)

ADAPTER_STATE = "adapter.safetensors"
EMA_STATE = "ema.safetensors"
# Settings that a card tells. Prompts are not among them: they say what was forgotten.
TOLD = ("ema_decay", "loss_weighting", "own_samples", "snr_gamma", "t_range", "trainable")


class PipelineSavingMixin(SavingMixin):
    """Saving of a pipeline whose denoiser is trained. Stock diffusers loads the result."""

    pipeline: DiffusionPipeline
    architecture: Architecture
    ema: AverageWeights | None
    _told: tuple[str, ...] = ()  # settings of a method that its card tells too

    @property
    def is_adapter(self) -> bool:
        return bool(getattr(self.model, "peft_config", None))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder, writes = Path(output_dir if output_dir is not None else self.args.output_dir), self.args.should_save
        denoiser = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            if self.is_adapter:
                ReferencePoint.capture(denoiser, copy=False).save(folder / ADAPTER_STATE, write=writes)
            elif writes:
                _held_alone(denoiser, state_dict).save_pretrained(folder / self.architecture.part)
            if self.ema is not None:
                self.ema.point.save(folder / EMA_STATE, write=writes)
        elif writes:
            if self.is_adapter and not self.args.merge_adapter:
                self._save_lora(denoiser, folder, state_dict)
            else:
                self._save_pipeline(denoiser, folder, state_dict)
            self._write_card(folder)

    def _save_settings(self, folder: Path) -> None:
        save_settings(self.pipeline, folder)
        if self.is_adapter:
            for config in self.accelerator.unwrap_model(self.model, keep_torch_compile=False).peft_config.values():
                config.save_pretrained(folder)

    def _save_pipeline(self, denoiser: torch.nn.Module, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
        plain = _held_alone(denoiser, state_dict)
        if self.is_adapter:
            plain = copy.deepcopy(denoiser) if plain is denoiser else plain
            plain.fuse_lora(safe_fusing=True)
            plain.unload_lora()
        part, parts = self.architecture.part, vars(self.pipeline)
        trained, parts[part] = (
            parts[part],
            plain,
        )  # not registered: of one that processes share the class has another name
        try:
            self.pipeline.save_pretrained(folder)
        finally:
            parts[part] = trained
        forget_local_paths(folder)

    def _save_lora(self, denoiser: torch.nn.Module, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft.utils import get_peft_model_state_dict

        part, layers = self.architecture.part, get_peft_model_state_dict(denoiser, state_dict)
        if (
            part == "unet"
        ):  # transformers keep the names of peft: with the others half of Stable Diffusion 3's would not be loaded
            layers = convert_state_dict_to_diffusers(layers)
        self.pipeline.save_lora_weights(
            folder,
            **{
                f"{part}_lora_layers": {name: value.cpu().contiguous() for name, value in layers.items()},
                # Without it diffusers takes alpha for the rank.
                f"{part}_lora_adapter_metadata": next(iter(denoiser.peft_config.values())).to_dict(),
            },
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        denoiser = model if model is not None else self.model
        if self.is_adapter:
            ReferencePoint.load(Path(resume_from_checkpoint, ADAPTER_STATE), self.args.device).restore(denoiser)
        else:
            saved = stock_class(denoiser).from_pretrained(
                resume_from_checkpoint, subfolder=self.architecture.part, torch_dtype=denoiser.dtype
            )
            if is_shared(denoiser):
                set_model_state_dict(denoiser, saved.state_dict(), options=StateDictOptions(full_state_dict=True))
            else:
                denoiser.load_state_dict(saved.state_dict())
        if self.ema is not None:
            average = ReferencePoint.load(Path(resume_from_checkpoint, EMA_STATE), self.args.device)
            self.ema.point = average.sharded_like(denoiser)

    # The card

    def _forgotten(self) -> str:
        if self.args.forget_prompts:
            return f"what {len(self.args.forget_prompts):,} prompts ask for"
        kind = f"the kind of images in {len(self.source_dataset):,} examples"
        classes = class_names(self.source_dataset)
        return f"{classes}: {kind}" if classes else kind

    def _chosen(self) -> dict[str, Any]:
        chosen = super()._chosen()
        for name in ("bn", "fisher", "fisher_samples", "forget_accuracy", "forget", "retain_loss"):
            chosen.pop(name, None)  # of models with labels or tokens
        chosen |= {name: getattr(self.args, name) for name in (*TOLD, *self._told)}
        return chosen | {"anchor_precision": getattr(self, "precision_name", None)}

    def _card_defaults(self, name: str) -> dict[str, Any]:
        adapter = self.is_adapter and not self.args.merge_adapter
        steps = {} if self.args.num_inference_steps is None else {"num_inference_steps": self.args.num_inference_steps}
        lora = {"lora_base": hub_id(self.base_model) or "the original"} if adapter else {}
        return {
            "library_name": "diffusers",
            "base_model_relation": "adapter" if adapter else "finetune",
            "pipeline_tag": diffusion_task(type(self.pipeline)),
            "load_snippet": loading_code(type(self.pipeline), name, **steps, **lora),
        }


def _held_alone(denoiser: torch.nn.Module, state_dict: dict[str, Tensor] | None) -> torch.nn.Module:
    """The denoiser; one that processes share as a copy that needs none of the others, of what was gathered."""
    if not is_shared(denoiser):
        return denoiser
    with torch.device("meta"):
        alone = stock_class(denoiser).from_config(denoiser.config)
        for name, config in (getattr(denoiser, "peft_config", None) or {}).items():
            config = copy.copy(config)
            config.init_lora_weights = False
            alone.add_adapter(config, name)
    alone.load_state_dict(state_dict, assign=True)
    return alone


class AverageWeights(TrainerCallback):
    """Exponential moving average of the trained parameters ([`~hf_unlearn.parameters.reference.average_`]), which replaces them when
    training ends.

    Args:
        model (`nn.Module`): its trainable parameters are averaged.
        decay (`float`): in (0, 1).
        accept (callable, *optional*): asked once the average is in place; where it says no, the last weights come back.
    """

    def __init__(self, model: torch.nn.Module, decay: float, accept: Callable[[], bool] | None = None):
        self.model, self.decay, self.accept = model, decay, accept
        self.point: ReferencePoint | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if self.point is None or state.global_step == 0:
            self.point = ReferencePoint.capture(self.model)

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        average_(self.point.parameters, trainable_parameters(self.model), self.decay, state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        last = ReferencePoint.capture(self.model)
        self.point.restore(self.model)
        if self.accept is not None and not self.accept():
            logger.warning("ema_decay: the averaged weights lost too much utility; keeping the last ones")
            last.restore(self.model)
