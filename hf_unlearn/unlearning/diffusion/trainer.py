"""What every method of making a diffusion model forget stands on: denoising, the original's own samples, saving."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import default_collate
from transformers import Trainer, set_seed

from ...hub.origin import keep_origins
from ...parameters.reference import ReferencePoint
from ...training.checks import check_is_not_original
from ...training.pictures import SampleGrids
from ..checks import check_anchors, check_arguments
from ..trainer import UnlearnMixin
from .config import DiffusionUnlearnConfig
from .denoiser import as_pipeline, choose_trainable, is_prompted
from .encoded import EncodedImages, encode, some_prompts
from .objective import DenoisingMixin
from .own_samples import FORGET_SEED, OwnSamples, OwnSamplesMixin
from .saving import AverageWeights, PipelineSavingMixin


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


logger = logging.getLogger(__name__)


class DiffusionUnlearnTrainer(DenoisingMixin, OwnSamplesMixin, PipelineSavingMixin, UnlearnMixin, Trainer):
    """Base of the trainers that make a diffusion model forget. A method overrides the hooks of [`UnlearnMixin`], and
    `answer_without`, the target of the forget loss `redirect`, and `kept_answer`, that of the replay.

    The pipeline (`trainer.pipeline`) is changed in place, and what is saved is a pipeline that stock diffusers loads.

    Args:
        model (`UNet2DModel` | `DiffusionPipeline` | `str`, *optional*): a denoiser with `noise_scheduler=`, or what `pipeline` takes.
        args (`DiffusionUnlearnConfig`, *optional*): the method's config; defaults to its defaults, with `output_dir="unlearned"`.
        pipeline (`DiffusionPipeline` | `str`, *optional*): DDPM and its kin, Stable Diffusion 1, 2, XL (also beside a ControlNet) and 3, latent
            consistency, PixArt, DiT or Flux.1 ([`hf_unlearn.unlearning.diffusion.pipelines`]).
        noise_scheduler (*optional*): of a denoiser without a pipeline: any variance-preserving one of diffusers.
        forget_dataset (`Dataset`, *optional*): rows with `image` (PIL) or `pixel_values` (in [−1, 1]), and for a prompted
            model `prompt`. Not needed where `forget_prompts` is set.
        retain_dataset (`Dataset`, *optional*): data to keep, trained on beside; stands in for the replay if there is any.
        heldout_dataset (`Dataset`, *optional*): never seen; its error is the target of `forget_loss="match"`.
        replay_dataset (`Dataset`, *optional*): samples of the original, drawn before; stands in for `own_samples`.
        marker (callable, *optional*): marks samples of the forgotten kind, images `[n, channels, height, width]` in
            [−1, 1] to bool `[n]`. Default: those that lie among the forget images; with prompts, none.
        eval_dataset (`dict[str, Dataset]`, *optional*): for `evaluate()`, which gives denoising errors.
        peft_config (`peft.LoraConfig`, *optional*): train a LoRA of one's own.
        kwargs: anything else `Trainer` takes.

    Raises:
        ValueError: see the message, which names the argument and the fix. No model was written.
    """

    _config_class = DiffusionUnlearnConfig

    def __init__(
        self,
        model=None,
        args: DiffusionUnlearnConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *,
        pipeline: DiffusionPipeline | str | None = None,
        noise_scheduler=None,
        forget_dataset=None,
        retain_dataset=None,
        heldout_dataset=None,
        replay_dataset=None,
        marker: Callable[[Tensor], Tensor] | None = None,
        peft_config=None,
        **kwargs,
    ):
        args = args if args is not None else self._config_class(output_dir="unlearned")
        if not isinstance(args, self._config_class):
            raise ValueError(
                f"args: {type(self).__name__} needs {self._config_class.__name__}, got {type(args).__name__}"
            )
        if kwargs.get("model_init") is not None:
            raise ValueError(
                "model_init: a pipeline is changed in place; pass it, and make a new trainer for each trial"
            )
        if processing_class is not None:
            raise ValueError("processing_class: the pipeline has what it needs; leave it out")
        model, pipeline = (
            os.fspath(given) if isinstance(given, os.PathLike) else given for given in (model, pipeline)
        )
        self.pipeline, self.name = as_pipeline(model, pipeline, noise_scheduler)
        keep_origins(self.pipeline)
        check_is_not_original(args.output_dir, self.name)
        args = self._settled(args, forget_dataset)
        self.schedule = self.architecture.schedule.to(args.device)
        self.marker = marker
        if both := set(args.forget_prompts or ()) & set(args.replay_prompts or ()):
            raise ValueError(f"replay_prompts: {min(both)!r} is among forget_prompts too; keep it in one of them")
        drawn = args.own_samples and replay_dataset is None and (retain_dataset is None or args.replay_weight)
        self.replay_prompts = args.replay_prompts or args.neutral_prompts
        if drawn and is_prompted(self.pipeline) and not args.replay_prompts:
            if both := set(args.forget_prompts or ()) & set(self.replay_prompts):
                raise ValueError(
                    f"replay_prompts: missing, and the neutral prompt {min(both)!r} is among forget_prompts"
                )
            logger.warning(
                "replay_prompts: not given, so what is kept is what %s draws; name what else must stay",
                " and ".join(map(repr, self.replay_prompts)),
            )
        if not (drawn or replay_dataset is not None or retain_dataset is not None):
            self._check_without_anything_to_keep(args, heldout_dataset)
        if peft_config is not None or "lora" in args.trainable:
            check_anchors(args)
        source = forget_dataset
        if args.forget_prompts:
            if forget_dataset is not None:
                raise ValueError("forget_dataset: given beside forget_prompts; keep one of them")
            if not is_prompted(self.pipeline):
                raise ValueError("forget_prompts: this model takes no prompts; pass forget_dataset=")
            prompts = [args.forget_prompts[i % len(args.forget_prompts)] for i in range(args.forget_samples)]
            source = [{"prompt": prompt} for prompt in prompts]
            forget_dataset = self._from_prompts(args, prompts)
        given = {
            "forget_dataset": forget_dataset,
            "retain_dataset": retain_dataset,
            "heldout_dataset": heldout_dataset,
        }
        name = type(self).__name__
        check_arguments(name, args, train_dataset=train_dataset, data_collator=data_collator, **given)
        given |= {"replay_dataset": replay_dataset}
        evaluation = (
            eval_dataset if isinstance(eval_dataset, dict) else {} if eval_dataset is None else {"": eval_dataset}
        )
        given |= {f"eval_dataset[{name!r}]": rows for name, rows in evaluation.items()}
        encoded = {name: self._encoded(name, rows, args) for name, rows in given.items()}
        self.replay_dataset = encoded.pop("replay_dataset")
        datasets = {name: encoded.pop(name) for name in ("forget_dataset", "retain_dataset", "heldout_dataset")}
        set_seed(args.seed)  # a LoRA begins at random
        choose_trainable(self.architecture, args.trainable, peft_config, r=args.lora_rank, lora_alpha=args.lora_alpha)
        self.own: OwnSamples | None = None
        self.ema: AverageWeights | None = None
        super().__init__(
            getattr(self.pipeline, self.architecture.part),
            args,
            data_collator,
            **datasets,
            eval_dataset=dict(zip(evaluation, encoded.values(), strict=True))
            if isinstance(eval_dataset, dict)
            else next(iter(encoded.values()), None),
            **kwargs,
        )
        self.source_dataset = source  # as the caller passed it
        self.forget_prompts = (
            some_prompts(source, 4, self.architecture.columns)
            if is_prompted(self.pipeline) and source is not None
            else []
        )
        if args.ema_decay:
            self.ema = AverageWeights(self.model, args.ema_decay, self._is_kept if self.guard else None)
            self.add_callback(self.ema)
            if self.guard:  # after the average, so that what it restores stays
                self.add_callback(self.pop_callback(self.guard))
        if args.grid_images:
            self.add_callback(SampleGrids(self))

    def _settled(self, args: DiffusionUnlearnConfig, forget_dataset) -> DiffusionUnlearnConfig:
        """The config with what follows from the pipeline and the data; the user's own stays as it was."""
        args = copy.copy(args)
        args.trainable = args.trainable or ["all"]
        return args

    def _check_without_anything_to_keep(self, args, heldout_dataset) -> None:
        to_target = args.heldout_loss is not None or heldout_dataset is not None
        redirects = args.forget_loss == "redirect" or (args.forget_loss == "bounded" and not to_target)
        if redirects and not is_prompted(self.pipeline):
            raise ValueError(
                "forget_loss='redirect' needs what is to be kept: set own_samples, or pass retain_dataset="
            )
        if args.guard:
            raise ValueError("guard: has nothing to look at without own_samples or a retain_dataset; set guard=False")

    # What the stock trainer gets

    def _load(self, model, args, processing_class):
        return model, processing_class, self.name

    def _stock_arguments(self, model, data_collator, forget_dataset, processing_class, peft_config) -> dict[str, Any]:
        return {"model": model, "data_collator": data_collator or default_collate}

    def _from_prompts(self, args: DiffusionUnlearnConfig, prompts: list[str]) -> EncodedImages:
        """What is trained on where there are prompts to forget and no images: what the original draws from them."""
        return self.drawn(args, prompts, FORGET_SEED, "forget")

    def _encoded(self, argument: str, dataset: Any, args: DiffusionUnlearnConfig) -> EncodedImages | None:
        if dataset is None or isinstance(dataset, EncodedImages):
            return dataset
        return encode(
            dataset,
            self.pipeline,
            device=args.device,
            resize=args.resize,
            batch_size=args.per_device_eval_batch_size,
            argument=argument,
            guidance_scale=args.guidance_scale,
        )

    def get_eval_dataloader(self, eval_dataset=None):
        if eval_dataset is not None and not isinstance(eval_dataset, str):  # images, of `evaluate`
            eval_dataset = self._encoded("eval_dataset", eval_dataset, self.args)
        return super().get_eval_dataloader(eval_dataset)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["latents", "latents_std", "conditioning", "neutral", "forget", "retain"]

    # Before the first step

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Unlearn. As [`~transformers.Trainer.train`]; the original draws its own samples first, if it has not before."""
        if self.forget_dataset is None:
            raise ValueError("forget_dataset: missing; pass the images to forget, or forget_prompts")
        return super().train(resume_from_checkpoint, **kwargs)

    def _train(self, checkpoint: str | None, **kwargs):
        original = self.private_dir / "reference.safetensors"
        if checkpoint and original.is_file():  # the pipeline may be half unlearned already
            ReferencePoint.load(original, self.args.device).restore(self.model)
        if not checkpoint:
            self._drop_pictures()
        replays = self.retain_dataset is None or self.replay_dataset is not None or self.args.replay_weight
        if self.own is None and replays:  # the original draws them, if it has not before
            self.own = self.own_samples(self.forget_dataset, self.replay_dataset)
        with self._checkpointed():
            return super()._train(checkpoint, **kwargs)

    @contextmanager
    def _checkpointed(self) -> Iterator[None]:
        """`activation_checkpointing`, in the words of diffusers: the stock trainer knows those of Transformers only."""
        wanted, self.args.activation_checkpointing = self.args.activation_checkpointing, False
        if wanted:
            self.model.enable_gradient_checkpointing()
        try:
            yield
        finally:
            self.args.activation_checkpointing = wanted
            if wanted:
                self.model.disable_gradient_checkpointing()

    def _is_kept(self) -> bool:
        return self.utility_drop(self.guard.state.baseline) <= self.utility_tolerance
