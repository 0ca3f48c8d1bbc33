"""VDU: variational diffusion unlearning of a class or a concept, from forget data alone (arXiv 2510.04058, TMLR 2026)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from torch.utils.data import default_collate
from transformers import Trainer, set_seed

from ...parameters.reference import ReferencePoint
from ...training.checks import check_fields, check_is_not_original
from ...training.pictures import SampleGrids
from ..checkpoint import last_complete
from ..checks import check_arguments
from ..config import UnlearnConfig
from ..trainer import UnlearnMixin
from .denoiser import as_pipeline, choose_trainable, is_prompted
from .encoded import EncodedImages, encode, some_prompts
from .noise import NoiseSchedule
from .objective import DenoisingMixin
from .own_samples import OwnSamples
from .replay_pool import FORGET_SEED, ReplayPoolMixin
from .saving import AverageWeights, PipelineSavingMixin
from .stability import StabilityMixin


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


RANGES = {
    "> 0": ("variance_floor", "snr_gamma", "caution"),
    "≥ 0": ("stability_weight", "negative_guidance", "replay_samples", "grid_images"),
    "≥ 1": (
        "lora_rank", "lora_alpha", "forget_samples", "sample_batch_size", "num_inference_steps", "grid_steps",
    ),
    "in (0, 1)": ("gamma",),
    "in [0, 1)": ("ema_decay",),
}  # fmt: skip


@dataclass
class VDUConfig(UnlearnConfig):
    __doc__ = r"""Configuration of [`VDUTrainer`]: [`UnlearnConfig`] and these.

    The paper's loss is (1 − γ)·A + γ·B: A = −E w_t‖ε − ε_θ(x_t, t)‖² on the forget data, without lower bound, and
    B = Σ (θᵢ − μᵢ)²/2vᵢ over mean μ and variance v of the parameters at K checkpoints. [`VDUConfig.paper`] is that, with every
    safety off. The default asks for the noise that the original would see in a forget image *without the forgotten part of
    its own distribution* (`redirect`), which has a minimum, and replays the original's own samples (docs/methods/vdu.md).

    Other defaults than there: `forget="examples"`, `isotropic_weight` 0, a look of the guard every 50 steps, `utility_tolerance` 0.5 of the
    original's own denoising error, `replay_weight` 1 for `redirect` and 10 for other losses. `heldout_loss` is a denoising error.

    > The paper's terms
        gamma (`float`, *optional*): γ in (0, 1): sets `forget_weight` to 1 − γ and `stability_weight` to γ.
        stability_weight (`float`, defaults to 0.0): weight of B.
        checkpoints (`list[str]`, *optional*): K folders or ids of checkpoints of the run that trained the model, or one
            folder that holds `checkpoint-*`; see [`~hf_unlearn.parameters.moments.ParameterMoments`].
        variance_floor (`float`, defaults to 0.01): v is at least this share of its own mean over the parameters.
        stability (`str`, defaults to `"auto"`): the precision in B: `"inverse_variance"` (needs K ≥ 2), `"fisher"` or
            `"isotropic"` (both scaled to a mean of one). `"auto"` is the first where K ≥ 2, else the second.
        anchor (`"original"` | `"checkpoint_mean"`, defaults to `"original"`): what B attracts to.

    > The denoising loss
        loss_weighting (`"simple"` | `"elbo"` | `"min_snr"`, defaults to `"min_snr"`): w_t; see [`~hf_unlearn.unlearning.diffusion.noise.NoiseSchedule`].
        snr_gamma (`float`, defaults to 1.0): γ of `min_snr`: errors of the clean image count alike where the signal-to-noise
            ratio is above, those of the noise where it is below.
        t_range (`list[float]`, defaults to `[0, 1]`): the share of the timesteps that noise is drawn from, 0 without noise.
        negative_guidance (`float`, defaults to 0.0): with prompts: how far beyond the neutral prompt `redirect` goes.
        caution (`float`, defaults to 3.0): without prompts: how many times the odds of the forgotten kind are raised in
            `redirect`: 1 is Bayes' rule itself; above, what is in doubt is forgotten.
        redirect_prompt (`str`, defaults to `""`): with prompts: the neutral prompt.
        ema_decay (`float`, defaults to 0.0): decay of an average of the weights, which replaces them at the end; 0 for none.

    > What is trained
        trainable (`list[str]`, defaults to `["all"]`): `all`, `cross_attention`, `lora`, or patterns of parameter names (`*` and `?`).
        lora_rank, lora_alpha (`int`, default to 8): of `lora`, on the attention's projections.

    > What to forget, where there are no images
        forget_prompts (`list[str]`, *optional*): the original draws the forget images itself from these prompts.
        forget_samples (`int`, defaults to 100): how many.
        resize (`bool`, defaults to `False`): scale and crop images that do not have the model's size.

    > What to keep
        replay_samples (`int`, defaults to 1000): images that the original draws, once, before the first step; 0 for none.
        replay_prompts (`list[str]`, *optional*): with prompts: what it draws. Must not ask for the forgotten concept.
        num_inference_steps (`int`, *optional*): denoising steps of every image drawn. Default: the pipeline's own.
        guidance_scale (`float`, *optional*): of classifier-free guidance. Default: the pipeline's own.
        sample_batch_size (`int`, defaults to 64): images drawn at a time.

    > Pictures
        grid_images (`int`, defaults to 16): images of the grids before, during and after, from the same noise; 0 for none.
        grid_steps (`int`, *optional*): optimiser steps between two grids. Default: only before and after.
        publish_before (`bool`, defaults to `False`): put the grid of the original beside the one that is published.
    """

    learning_rate: float = 3e-4
    lr_scheduler_type: str = "constant"
    per_device_train_batch_size: int = 32
    max_steps: int = 200
    save_strategy: str = "no"
    logging_steps: float = 10
    forget: Literal["class", "examples"] = "examples"
    isotropic_weight: float = 0.0
    guard_steps: int | None = 50
    gamma: float | None = None
    stability_weight: float = 0.0
    checkpoints: list[str] | None = None
    variance_floor: float = 0.01
    stability: Literal["auto", "inverse_variance", "fisher", "isotropic"] = "auto"
    anchor: Literal["original", "checkpoint_mean"] = "original"
    loss_weighting: Literal["simple", "elbo", "min_snr"] = "min_snr"
    snr_gamma: float = 1.0
    t_range: list[float] = field(default_factory=lambda: [0.0, 1.0])
    negative_guidance: float = 0.0
    caution: float = 3.0
    redirect_prompt: str = ""
    ema_decay: float = 0.0
    trainable: list[str] = field(default_factory=lambda: ["all"])
    lora_rank: int = 8
    lora_alpha: int = 8
    forget_prompts: list[str] | None = None
    forget_samples: int = 100
    resize: bool = False
    replay_samples: int = 1000
    replay_prompts: list[str] | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    sample_batch_size: int = 64
    grid_images: int = 16
    grid_steps: int | None = None
    publish_before: bool = False

    def _check_unlearn_arguments(self) -> None:
        super()._check_unlearn_arguments()
        check_fields(self, RANGES)
        if self.forget == "class":
            raise ValueError("forget='class': a generator has no labels; pass that class's images, forget='examples'")
        if self.gamma is not None:
            weights = (self.forget_weight, self.stability_weight)
            if weights not in ((1.0, 0.0), (1 - self.gamma, self.gamma)):
                raise ValueError("gamma: sets forget_weight and stability_weight; leave those out, or set gamma=None")
            self.forget_weight, self.stability_weight = 1 - self.gamma, self.gamma
        if self.fisher_weight:
            raise ValueError("fisher_weight: set stability='fisher' and stability_weight instead")
        if self.checkpoints is not None and not self.checkpoints:
            raise ValueError(
                "checkpoints: K = 0, so there is no mean and no variance; name at least one, or leave it out"
            )
        if len(self.t_range) != 2 or not 0 <= self.t_range[0] < self.t_range[1] <= 1:
            raise ValueError(f"t_range={self.t_range}: must be two shares, 0 ≤ low < high ≤ 1")
        if self.stability_weight and self.anchor == "checkpoint_mean" and not self.checkpoints:
            raise ValueError(
                "checkpoints: missing; anchor='checkpoint_mean' (as in the paper preset) needs one or more"
            )
        for name in ("trainable", "forget_prompts", "replay_prompts"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])

    @classmethod
    def paper(cls, output_dir: str, **overrides: Any) -> VDUConfig:
        """The paper's objective and nothing else: ascent on the simple denoising loss, the anchor over the variance of the
        checkpoints, no replay, no clipping, no guard. The paper's γ was not to be had: 0.5 weighs both terms alike, and the
        right one depends on the model.
        """
        preset = {
            "forget_loss": "ascent",
            "gamma": 0.5,
            "anchor": "checkpoint_mean",
            "loss_weighting": "simple",
            "replay_samples": 0,
            "replay_weight": 0.0,
            "max_grad_norm": 0.0,
            "guard": False,
        }
        return cls(output_dir=output_dir, **(preset | overrides))


class VDUTrainer(DenoisingMixin, StabilityMixin, ReplayPoolMixin, PipelineSavingMixin, UnlearnMixin, Trainer):
    """Makes a diffusion model forget the kind of images that its forget examples show, from these alone.

    The pipeline (`trainer.pipeline`) is changed in place, and what is saved is a pipeline that stock diffusers loads.

    ```python
    trainer = VDUTrainer(pipeline=pipe, args=VDUConfig(output_dir="without-3"), forget_dataset=threes)
    trainer.train()
    trainer.save_model()
    ```

    Args:
        model (`UNet2DModel` | `DiffusionPipeline` | `str`, *optional*): a denoiser with `noise_scheduler=`, or what `pipeline` takes.
        args (`VDUConfig`, *optional*): defaults to `VDUConfig(output_dir="unlearned")`.
        pipeline (`DiffusionPipeline` | `str`, *optional*): one whose `unet` is a `UNet2DModel` (DDPM, DDIM) or, with VAE,
            text encoder and tokenizer, a `UNet2DConditionModel` (Stable Diffusion 1 and 2).
        noise_scheduler (*optional*): of a denoiser without a pipeline: any variance-preserving one of diffusers.
        forget_dataset (`Dataset`, *optional*): rows with `image` (PIL) or `pixel_values` (in [−1, 1]), and for a prompted
            model `prompt`. Not needed where `forget_prompts` is set.
        retain_dataset (`Dataset`, *optional*): data to keep, trained on beside; stands in for the replay if there is any.
        heldout_dataset (`Dataset`, *optional*): never seen; its error is the target of `forget_loss="match"`.
        replay_dataset (`Dataset`, *optional*): samples of the original, drawn before; stands in for `replay_samples`.
        replay_filter (callable, *optional*): marks samples of the forgotten kind, images `[n, channels, height, width]` in
            [−1, 1] to bool `[n]`. Default: those that lie among the forget images; with prompts, none.
        eval_dataset (`dict[str, Dataset]`, *optional*): for `evaluate()`, which gives denoising errors.
        peft_config (`peft.LoraConfig`, *optional*): train a LoRA of one's own.
        kwargs: anything else `Trainer` takes.

    Raises:
        ValueError: see the message, which names the argument and the fix. No model was written.
    """

    _method = "vdu"
    _title = "Variational diffusion unlearning"
    _paper = "2510.04058"
    _config_class = VDUConfig

    def __init__(
        self,
        model=None,
        args: VDUConfig | None = None,
        *,
        pipeline: DiffusionPipeline | str | None = None,
        noise_scheduler=None,
        forget_dataset=None,
        retain_dataset=None,
        heldout_dataset=None,
        replay_dataset=None,
        replay_filter: Callable[[Tensor], Tensor] | None = None,
        eval_dataset=None,
        peft_config=None,
        **kwargs,
    ):
        args = args if args is not None else self._config_class(output_dir="unlearned")
        if not isinstance(args, self._config_class):
            raise ValueError(f"args: {type(self).__name__} needs VDUConfig, got {type(args).__name__}")
        self.pipeline, self.name = as_pipeline(model, pipeline, noise_scheduler)
        check_is_not_original(args.output_dir, self.name)
        self.schedule = NoiseSchedule.of(self.pipeline.scheduler).to(args.device)
        self.replay_filter = replay_filter
        if both := set(args.forget_prompts or ()) & set(args.replay_prompts or ()):
            raise ValueError(f"replay_prompts: {min(both)!r} is among forget_prompts too; keep it in one of them")
        drawn = args.replay_samples and replay_dataset is None and (retain_dataset is None or args.replay_weight)
        if drawn and is_prompted(self.pipeline) and not args.replay_prompts:
            raise ValueError(
                "replay_prompts: missing; name what a prompted model is to keep (without the forgotten concept), or set "
                "replay_samples=0"
            )
        if args.guard and not (drawn or replay_dataset is not None or retain_dataset is not None):
            raise ValueError(
                "guard: has nothing to look at without replay_samples or a retain_dataset; set guard=False"
            )
        if args.stability_weight and (peft_config is not None or "lora" in args.trainable):
            raise ValueError("stability_weight: means nothing for LoRA factors; use isotropic_weight")
        source = forget_dataset
        if args.forget_prompts:
            if forget_dataset is not None:
                raise ValueError("forget_dataset: given beside forget_prompts; keep one of them")
            if not is_prompted(self.pipeline):
                raise ValueError("forget_prompts: this model takes no prompts; pass forget_dataset=")
            prompts = [args.forget_prompts[i % len(args.forget_prompts)] for i in range(args.forget_samples)]
            source = [{"prompt": prompt} for prompt in prompts]
            forget_dataset = self.drawn(args, prompts, FORGET_SEED, "forget")
        given = {
            "forget_dataset": forget_dataset,
            "retain_dataset": retain_dataset,
            "heldout_dataset": heldout_dataset,
        }
        check_arguments(type(self).__name__, args, train_dataset=kwargs.get("train_dataset"), **given)
        given |= {"replay_dataset": replay_dataset}
        evaluation = (
            eval_dataset if isinstance(eval_dataset, dict) else {} if eval_dataset is None else {"": eval_dataset}
        )
        given |= {f"eval_dataset[{name!r}]": rows for name, rows in evaluation.items()}
        encoded = {name: self._encoded(name, rows, args) for name, rows in given.items()}
        self.replay_dataset = encoded.pop("replay_dataset")
        datasets = {name: encoded.pop(name) for name in ("forget_dataset", "retain_dataset", "heldout_dataset")}
        set_seed(args.seed)  # a LoRA begins at random
        choose_trainable(self.pipeline.unet, args.trainable, peft_config, r=args.lora_rank, lora_alpha=args.lora_alpha)
        self.own: OwnSamples | None = None
        self.ema: AverageWeights | None = None
        super().__init__(
            self.pipeline.unet,
            args,
            **datasets,
            eval_dataset=dict(zip(evaluation, encoded.values(), strict=True))
            if isinstance(eval_dataset, dict)
            else next(iter(encoded.values()), None),
            **kwargs,
        )
        self.source_dataset = source  # as the caller passed it
        self.forget_prompts = some_prompts(source, 4) if is_prompted(self.pipeline) else []
        if args.ema_decay:
            self.ema = AverageWeights(self.model, args.ema_decay, self._is_kept if self.guard else None)
            self.add_callback(self.ema)
            if self.guard:  # after the average, so that what it restores stays
                self.add_callback(self.pop_callback(self.guard))
        if args.grid_images:
            self.add_callback(SampleGrids(self))

    # What the stock trainer gets

    def _load(self, model, args, processing_class):
        return model, processing_class, self.name

    def _stock_arguments(self, model, data_collator, forget_dataset, processing_class, peft_config) -> dict[str, Any]:
        return {"model": model, "data_collator": data_collator or default_collate}

    def _encoded(self, argument: str, dataset: Any, args: VDUConfig) -> EncodedImages | None:
        if dataset is None or isinstance(dataset, EncodedImages):
            return dataset
        return encode(
            dataset,
            self.pipeline,
            device=args.device,
            resize=args.resize,
            batch_size=args.per_device_eval_batch_size,
            argument=argument,
        )

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["latents", "latents_std", "conditioning", "forget", "retain"]

    # Before the first step

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Unlearn. As [`~transformers.Trainer.train`]; the original draws its own samples first, if it has not before."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete(self.args.output_dir)
        original = self.private_dir / "reference.safetensors"
        if resume_from_checkpoint and original.is_file():  # the pipeline may be half unlearned already
            ReferencePoint.load(original, self.args.device).restore(self.model)
        if not resume_from_checkpoint:
            self._drop_pictures()
        replays = self.retain_dataset is None or self.replay_dataset is not None or self.args.replay_weight
        if self.own is None and replays:
            self.own = self.own_samples(self.forget_dataset, self.replay_dataset)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _is_kept(self) -> bool:
        return self.utility_drop(self.guard.state.baseline) <= self.utility_tolerance
