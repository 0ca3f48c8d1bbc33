"""Influence of training images on a diffusion model: a stock trainer of denoisers that tells what its examples did."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data import label_column
from ..files import loading
from ..images import image_column, pixels
from ..training.checks import check_fields
from ..training.noise import NoiseSchedule
from .config import InfluenceConfig
from .trainer import FINEMixin


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


CLEAN = "pixel_values"


@dataclass
class DiffusionInfluenceConfig(InfluenceConfig):
    __doc__ = InfluenceConfig.__doc__.replace(
        "\n    Raises:",
        """        noise_draws (`int`, defaults to 32): noises and timesteps that the loss of a target is averaged over, the same for every image and every
            look. Timesteps are spread evenly. A training step sees one of each image, as always.

    Raises:""",
    )

    noise_draws: int = 32
    remove_unused_columns: bool = False
    label_names: list[str] | None = field(default_factory=lambda: [CLEAN])

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, {"≥ 1": ("noise_draws",)})
        if self.remove_unused_columns or self.label_names != [CLEAN]:
            raise ValueError(
                "remove_unused_columns, label_names: images are what a denoiser learns from; leave both out"
            )


class DiffusionInfluenceTrainer(FINEMixin, Trainer):
    r"""Trains a denoiser, and tells which training images taught it a behaviour, such as drawing a class.

    The loss of an image x₀ is that of DDPM (arXiv [2006.11239](https://arxiv.org/abs/2006.11239), eq. 14) at one noise and timestep a step, and for a
    target its mean over `noise_draws` of them,

    $$ \ell(x_0) = E_{t,\epsilon}\, \| \epsilon - \epsilon_\theta(\alpha_t x_0 + \sigma_t \epsilon, t) \|^2 / d $$

    (or of v or x₀, whichever the denoiser predicts). The mean over timesteps of such gradients is what influence of diffusion models is judged by elsewhere,
    too: TRAK (arXiv [2312.06205](https://arxiv.org/abs/2312.06205)), EK-FAC (arXiv [2410.13850](https://arxiv.org/abs/2410.13850)).

    Args:
        model (`DiffusionPipeline` or `str`): an unconditional or class-conditional pipeline of pixels (`UNet2DModel`: DDPM, DDIM), or a folder or id of one.
        args ([`DiffusionInfluenceConfig`]): training arguments and what is observed.
        train_dataset: rows with `image` or `pixel_values`, as [`VDUTrainer`] takes them; with `label` where the denoiser is told a class.
        target_dataset, target: as for [`InfluenceTrainer`].

    Raises:
        ValueError: naming the argument, what is wrong with it and what to do.
    """

    _config_class = DiffusionInfluenceConfig

    def __init__(
        self, model: DiffusionPipeline | str, args: DiffusionInfluenceConfig | None = None, *others: Any, **kwargs: Any
    ):
        self.pipeline = opened(model)
        self.schedule = NoiseSchedule.of(self.pipeline.scheduler)
        config = self.pipeline.unet.config
        size = config.sample_size
        self.shape = (config.in_channels, *((size, size) if isinstance(size, int) else size))
        super().__init__(self.pipeline.unet, args, *others, **kwargs)

    def _stock_arguments(self, model, data_collator, train_dataset, processing_class, peft_config, sample_ids):
        for name, value in (("peft_config", peft_config), ("processing_class", processing_class)):
            if value is not None:
                raise ValueError(f"{name}: a denoiser of pixels has none; leave it out")
        if data_collator is None:
            data_collator = _Images(train_dataset, self.shape, _is_told_a_class(model))
        return {"model": model, "data_collator": data_collator, "train_dataset": train_dataset}

    # The loss

    def noise_of(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Noise and timesteps of a training step: of each image of `clean`, `[batch, channels, height, width]`, its own."""
        noise = torch.randn_like(clean)
        return noise, torch.randint(len(self.schedule), (len(clean),), device=clean.device)

    def evaluation_noise(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Of a target: `noise_draws` noises and timesteps, the same for all images of `clean`, `[draws, …]` and `[draws]`."""
        draws, generator = self.args.noise_draws, torch.Generator().manual_seed(self.args.seed)
        noise = torch.randn(draws, *clean.shape[1:], generator=generator).to(clean)
        places = (torch.arange(draws) + torch.rand(draws, generator=generator)) / draws
        return noise, (places * len(self.schedule)).long().to(clean.device)

    def per_example_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        clean, told = inputs[CLEAN], inputs.get("class_labels")
        if model.training:
            noise, timesteps = self.noise_of(clean)
            losses = self._errors(model, clean, noise, timesteps, told)
        else:
            noise, timesteps = (one.repeat(len(clean), *[1] * (one.dim() - 1)) for one in self.evaluation_noise(clean))
            draws = self.args.noise_draws  # an example's draws stand together
            repeated = None if told is None else told.repeat_interleave(draws)
            losses = self._errors(model, clean.repeat_interleave(draws, 0), noise, timesteps, repeated)
            losses = losses.view(-1, draws).mean(1)
        return losses, self._weights(inputs)

    def _errors(self, model, clean: Tensor, noise: Tensor, timesteps: Tensor, told: Tensor | None) -> Tensor:
        schedule = self.schedule.to(clean.device)
        told = {} if told is None else {"class_labels": told}
        answer = model(schedule.add_noise(clean, noise, timesteps), timesteps, **told).sample
        wanted = schedule.target(clean, noise, timesteps)
        return (answer.float() - wanted.float()).square().flatten(1).mean(1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses, _ = self.per_example_loss(model, inputs)
        return (losses.mean(), {"losses": losses}) if return_outputs else losses.mean()

    def _weights(self, inputs: dict[str, Tensor]) -> Tensor:
        return torch.ones(len(inputs[CLEAN]), device=inputs[CLEAN].device)

    # What is saved: a pipeline, and in checkpoints the denoiser

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self.args.should_save:
            denoiser = self.accelerator.unwrap_model(self.model)
            (denoiser if folder.name.startswith(PREFIX_CHECKPOINT_DIR) else self.pipeline).save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        model = self.model if model is None else model
        saved = type(model).from_pretrained(resume_from_checkpoint, torch_dtype=model.dtype)
        model.load_state_dict(saved.state_dict())


def opened(model: Any) -> DiffusionPipeline:
    """A pipeline whose denoiser sees pixels, and is told nothing or a class.

    Raises:
        ValueError: it is none.
    """
    from diffusers import DiffusionPipeline, UNet2DModel

    if isinstance(model, str | Path):
        with loading("model", str(model), "a pipeline"):
            model = DiffusionPipeline.from_pretrained(str(model))
    if not isinstance(model, DiffusionPipeline):
        raise ValueError(f"model: {type(model).__name__} is no pipeline; pass one, or a folder or id of one")
    parts = {name for name, part in model.components.items() if part is not None}
    if not isinstance(getattr(model, "unet", None), UNet2DModel) or parts != {"unet", "scheduler"}:
        raise ValueError(
            f"model: {type(model).__name__} is not supported; influence sees denoisers of pixels that are told nothing or a class (DDPMPipeline, DDIMPipeline)"
        )
    if not model.unet.config.sample_size:
        raise ValueError("model: its config has no sample_size, so how large its images are is not known; set it")
    return model


def is_pipeline(model: Any) -> bool:
    return hasattr(model, "components") and hasattr(model, "register_modules")


def _is_told_a_class(denoiser: nn.Module) -> bool:
    return getattr(denoiser, "class_embedding", None) is not None


class _Images:
    """Rows with images as a batch."""

    def __init__(self, rows: Any, shape: tuple[int, int, int], told: bool):
        columns = getattr(rows, "column_names", None) or list(rows[0])
        self.column, self.shape = image_column(columns, "train_dataset"), shape
        self.label = label_column(rows) if told else None
        if told and self.label is None:
            raise ValueError("train_dataset: the denoiser is told a class, and there is no column label; add it")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        found = {CLEAN: pixels([row[self.column] for row in rows], self.shape, resize=True, argument="train_dataset")}
        if self.label is not None:
            found["class_labels"] = torch.tensor([int(row[self.label]) for row in rows])
        return found
