"""`GANTrainer`: a `Trainer` in which generator and discriminator take turns."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import broadcast, reduce
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..hub.origin import keep_origins
from ..images import IMAGE_COLUMNS, image_column, look, pixels
from ..metrics.features import Features, features_of
from ..metrics.generation import density_coverage, frechet_distance
from ..modes import seeded_generator
from ..parameters.anchors import Anchor
from ..parameters.reference import average_
from ..training.checks import check_features, check_is_not_original, check_parallelism
from ..training.trackers import Trackers
from .collapse import CollapseGuard
from .config import GANConfig
from .losses import discriminator_loss, generator_loss, r1_penalty
from .pipeline import GANPipeline
from .players import GAN, Checked, ImageTensors, Reshuffled, as_pipeline, check_players
from .saving import GANSavingMixin


logger = logging.getLogger(__name__)

EVALUATION_SEED = 6  # of what evaluate() draws
PATH_DECAY = 0.01  # of the running mean of path lengths, as in StyleGAN2


class GANTrainer(GANSavingMixin, Trainer):
    r"""Trains a GAN: non-saturating logistic loss (arXiv 1406.2661) with lazy R1 (arXiv 1801.04406, 1912.04958).

    In a step the discriminator moves, then the generator. `trainer.pipeline` draws with the average of the generator's
    weights, at any time; it is what is saved. One Adam holds both players in two groups with learning rates of their own:
    the one whose turn it is not has no gradient, and does not move.

    ```python
    trainer = GANTrainer(GANPipeline(DCGANGenerator(28), DCGANDiscriminator(28)), GANConfig("gan"), train_dataset=images)
    trainer.train()
    trainer.save_model()
    ```

    Args:
        model (`GANPipeline` | `str`): generator and discriminator, changed in place, or a folder or an id.
        args (`GANConfig`, *optional*): defaults to `GANConfig(output_dir="gan")`.
        train_dataset (`Dataset` | `Tensor`): rows with `image` (PIL) or `pixel_values` (in [−1, 1]), or a tensor of images.
        eval_dataset (*optional*): like it; for `evaluate()`, which draws as many images and compares.
        extractor (callable, *optional*): images in [−1, 1] to features `[n, d]`, as
            [`~hf_unlearn.metrics.features.ClassifierFeatures`]; what `evaluate()` and the guard compare. Default: pixels.
        kwargs: anything else `Trainer` takes.

    Raises:
        ValueError: see the message, which names the argument and the fix. No model was written.
    """

    _config_class: type = GANConfig

    def __init__(
        self,
        model: GANPipeline | str | None = None,
        args: GANConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        extractor: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ):
        args = args if args is not None else self._config_class(output_dir="gan")
        name = type(self).__name__
        if not isinstance(args, self._config_class):
            raise ValueError(f"args: {name} needs {self._config_class.__name__}, got {type(args).__name__}")
        self.pipeline, self.base_model = as_pipeline(model)
        keep_origins(self.pipeline)
        check_is_not_original(args.output_dir, self.base_model)
        if train_dataset is None or len(train_dataset) == 0:
            raise ValueError("train_dataset: missing or empty; pass images to learn from")
        check_players(self.pipeline)
        if args.path_length_weight and not hasattr(self.pipeline.generator, "mapping"):
            raise ValueError(
                f"path_length_weight={args.path_length_weight}: {type(self.pipeline.generator).__name__} has no mapping network whose "
                "styles it could be of; set it to 0"
            )
        self.extractor = extractor
        if kwargs.get("model_init") is not None or kwargs.get("compute_loss_func") is not None:
            name = "model_init" if kwargs.get("model_init") is not None else "compute_loss_func"
            raise ValueError(f"{name}: would be ignored, there are two players with losses of their own; leave it out")
        self.resize = args.resize
        datasets = {
            "train_dataset": self._rows(train_dataset, "train_dataset"),
            "eval_dataset": self._rows(eval_dataset, "eval_dataset") if eval_dataset is not None else None,
        }
        self.averaged = self.pipeline.generator.requires_grad_(False)
        gan = GAN(copy.deepcopy(self.averaged).requires_grad_(True), self.pipeline.discriminator.requires_grad_(True))
        super().__init__(gan, args, data_collator or self._collate, **datasets, **kwargs)
        check_parallelism(self, "two players take turns within a step")
        check_features(self)
        self.averaged.to(self.args.device)
        self.anchor: Anchor | None = None
        self.path_mean = torch.zeros((), device=self.args.device)
        self._terms: dict[str, Tensor] = {}
        self._terms_count = 0
        self.add_callback(_Average(self))
        self.trackers = Trackers(self)
        self.add_callback(self.trackers)
        self.guard = CollapseGuard(self) if args.guard else None
        if self.guard:
            self.add_callback(self.guard)

    # Data

    def _rows(self, dataset: Any, argument: str) -> Any:
        """The dataset, after a look at its first row."""
        if isinstance(dataset, dict):
            raise ValueError(f"{argument}: is a dict; pass one dataset, and others to evaluate()")
        if isinstance(dataset, ImageTensors):
            return dataset
        if isinstance(dataset, Tensor):
            return ImageTensors(pixels(dataset, self.pipeline.image_shape, resize=self.resize, argument=argument))
        look(
            dataset,
            image_column(dataset[0], argument),
            self.pipeline.image_shape,
            resize=self.resize,
            argument=argument,
        )
        return dataset

    def _pixels(self, rows: Sequence[dict[str, Any]], argument: str) -> Tensor:
        column = image_column(rows[0], argument)
        shape = self.pipeline.image_shape
        images, names = [row[column] for row in rows], ["of a batch"] * len(rows)
        return pixels(images, shape, resize=self.resize, argument=argument, rows=names, whole=False)

    def _collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        if isinstance(rows[0], Checked):
            return {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
        return {"pixel_values": self._pixels(rows, "train_dataset")}

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*IMAGE_COLUMNS]

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.args.max_steps <= 0:
            return super()._get_train_sampler(rows)
        total = self.args.max_steps * self._train_batch_size * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return Reshuffled(len(rows), total, seed)

    def real_images(self, dataset: Any, count: int, seed: int) -> Tensor:
        """At most `count` images of a dataset, drawn by the seed."""
        drawn = torch.randperm(len(dataset), generator=seeded_generator("cpu", self.args.seed, seed))[:count]
        return torch.cat([self._collate([dataset[row]])["pixel_values"] for row in drawn.tolist()])

    # The two players

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            slow = self.args.discriminator_learning_rate
            self.optimizer = kind(
                [
                    {"params": list(self.model.generator.parameters())},
                    {"params": list(self.model.discriminator.parameters()), **({} if slow is None else {"lr": slow})},
                ],
                **({"weight_decay": self.args.weight_decay} | settings),
            )
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        images = self._prepare_inputs(inputs)["pixel_values"].to(self.averaged.dtype)
        self._discriminator_turn(model, images)
        loss = self._generator_turn(model, len(images))
        self._terms_count += 1
        return loss

    def _discriminator_turn(self, model: nn.Module, images: Tensor) -> None:
        args, step = self.args, self.state.global_step
        penalized = args.r1_weight > 0 and step % args.r1_every == 0
        with self.compute_loss_context_manager():
            false = self.false_images(len(images), step)
            latents = self._latents(len(images) - (0 if false is None else len(false)), step, 0)
            real, drawn = model(latents, images.requires_grad_(penalized), false)
            loss = discriminator_loss(real, drawn)
            self._note(discriminator_loss=loss, score_real=real.mean(), score_drawn=drawn.mean())
            if penalized:
                penalty = r1_penalty(real, images)
                self._note(r1=penalty * args.r1_every)
                loss = loss + args.r1_weight * args.r1_every * penalty
        self._refuse_non_finite(loss, "the discriminator's loss is", step + 1)
        self.accelerator.backward(loss)
        self.optimizer.step()
        model.zero_grad()

    def false_images(self, count: int, step: int) -> Tensor | None:
        """Images that take the place of some of the `count` drawn ones in the discriminator's turn at `step`; None for none."""
        return None

    def _generator_turn(self, model: nn.Module, count: int) -> Tensor:
        """Leaves the generator's gradient for Trainer's own step."""
        args, step = self.args, self.state.global_step
        discriminator = self.model.discriminator.requires_grad_(False)
        try:
            with self.compute_loss_context_manager():
                penalized = args.path_length_weight > 0 and step % args.path_length_every == 0
                scores, lengths = model(
                    self._latents(count, step, 1), lengths_by=self._generator(step, 2) if penalized else None
                )
                loss = generator_loss(scores)
                self._note(generator_loss=loss)
                if penalized:
                    self.path_mean = torch.lerp(self.path_mean, lengths.mean().detach().float(), PATH_DECAY)
                    penalty = (lengths - self.path_mean).square().mean()
                    self._note(path_length=penalty * args.path_length_every)
                    loss = loss + args.path_length_weight * args.path_length_every * penalty
            self._refuse_non_finite(loss, "the generator's loss is", step + 1)
            if step >= args.discriminator_warmup:
                self.accelerator.backward(loss)
                # After the backward pass, where DDP has averaged: equal to a penalty in the loss.
                if self.anchor is not None:
                    self.anchor.add_grad_(dict(self.model.generator.named_parameters()))
        finally:
            discriminator.requires_grad_(True)
        return loss.detach()

    def _latents(self, count: int, *key: int) -> Tensor:
        shape = (count, *self.averaged.latent_shape)
        latents = torch.randn(shape, generator=self._generator(*key), device=self.args.device)
        latents = latents.to(self.averaged.dtype)
        # Where there is no mapping network the path lengths are those of z.
        return latents.requires_grad_(self.args.path_length_weight > 0)

    def _generator(self, *key: int) -> torch.Generator:
        return seeded_generator(self.args.device, self.args.seed, self.args.process_index, *key)

    def _refuse_non_finite(self, value: Tensor, what: str, step: int) -> None:
        finite = torch.isfinite(value.detach())
        if self.args.world_size > 1:  # one process that stopped alone would leave the others waiting
            finite = reduce(finite.int(), "sum") == self.args.world_size
        if not finite:
            kept = self.guard.keep_healthy() if self.guard else None
            where = f"; the last healthy state, of step {kept}, is in trainer.pipeline" if kept is not None else ""
            raise FloatingPointError(
                f"{what} not finite at step {step}{where}; try a smaller learning_rate or a larger r1_weight"
            )

    @torch.no_grad()
    def average(self) -> None:
        """Move the averaged generator toward the trained one, which must be finite."""
        step, weights = self.state.global_step, list(self.model.generator.parameters())
        self._refuse_non_finite(torch.stack(torch._foreach_norm(weights)).sum(), "the generator's weights are", step)
        average_(
            dict(self.averaged.named_parameters()),
            dict(self.model.generator.named_parameters()),
            self.args.ema_decay,
            step,
        )
        for buffer, now in zip(self.averaged.buffers(), self.model.generator.buffers(), strict=True):
            # DDP gives the ranks one rank's buffers before a forward pass, which then moves them apart.
            buffer.copy_(broadcast(now) if self.args.world_size > 1 else now)

    # Looking

    def draw(self, count: int, seed: int) -> Tensor:
        """Images `[count, channels, size, size]` in [−1, 1] of the averaged generator, from latents that `seed` alone decides."""
        latents = torch.randn(
            (count, *self.averaged.latent_shape), generator=seeded_generator("cpu", self.args.seed, seed)
        )
        return self.pipeline.draw(latents, batch_size=self.args.batch_size)

    def features(self, images: Tensor) -> Features:
        """What images are compared by: the extractor's features, or pixels."""
        if self.extractor is None:
            return Features(images.flatten(1), "pixels")
        return features_of(
            images, self.extractor, name=getattr(self.extractor, "name", "extractor"), value_range=(-1, 1)
        )

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Draw as many images as there are in the dataset, and compare: Fréchet distance, density and coverage.

        Raises:
            ValueError: no dataset.
        """
        rows = self.eval_dataset if eval_dataset is None else self._rows(eval_dataset, "eval_dataset")
        if rows is None:
            raise ValueError("eval_dataset: missing; evaluate() compares what is drawn with real images")
        real = self.features(self.real_images(rows, len(rows), EVALUATION_SEED))
        drawn = self.features(self.draw(len(rows), EVALUATION_SEED))
        spread = density_coverage(real, drawn)
        metrics = {
            f"{metric_key_prefix}_fid": frechet_distance(real, drawn).distance,
            f"{metric_key_prefix}_density": spread.density,
            f"{metric_key_prefix}_coverage": spread.coverage,
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._terms_count:
            means = torch.stack([term.float() for term in self._terms.values()]) / self._terms_count
            logs.update(zip(self._terms, self.accelerator.reduce(means, "mean").tolist(), strict=True))
            if self.anchor is not None:
                terms = self.anchor.value(dict(self.model.generator.named_parameters()))
                logs.update({name: value.item() for name, value in terms.items()})
            self._terms, self._terms_count = {}, 0
        super().log(logs, start_time)

    def _note(self, **terms: Tensor) -> None:
        for name, term in terms.items():
            self._terms[name] = self._terms.get(name, 0) + term.detach()


class _Average(TrainerCallback):
    def __init__(self, trainer: GANTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.average()
