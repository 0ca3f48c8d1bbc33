"""Adapt-then-Unlearn: a GAN forgets a feature, from feedback on what it draws and no training data (arXiv 2309.14054, TMLR 2025)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Trainer

from ...gan.config import GANConfig
from ...gan.dcgan import DCGANDiscriminator
from ...gan.pipeline import GANPipeline
from ...gan.players import ImageTensors, as_pipeline, check_players
from ...gan.trainer import GANTrainer
from ...modes import seeded_generator
from ...parameters.anchors import QuadraticAnchor
from ...parameters.fisher import scalar_fisher, scaled_to_mean_one
from ...parameters.reference import ReferencePoint
from ...parameters.repulsion import Repulsion, extrapolate
from ...training.checks import check_fields, check_is_not_original
from ...training.config import DRAWING_RANGES, DrawingArguments
from ...training.outcome import tell_outcome
from ...training.pictures import SampleGrids
from .feedback import Feedback, marked_by, marked_samples, spread_over
from .outcome import GANOutcomeMixin, Judged
from .saving import GANPublishingMixin


logger = logging.getLogger(__name__)

FISHER_SEED, MARK_SEED, OWN_SEED, NEGATIVE_SEED = 11, 12, 13, 14
# γ and α by distance. The relative distance is what was measured; the others come to the same for a DCGAN of 85,000
# parameters, where ‖θ_G − θ_N‖² is about 30.
REPULSION_WEIGHTS = {
    "relative": {"el2": 0.1, "il2": 0.03, "nl2": 1e-3},
    "mean_mse": {"el2": 0.1, "il2": 1e-5, "nl2": 3.0},
    "sum_squares": {"el2": 0.1, "il2": 1.0, "nl2": 3e-5},
}
REPULSION_RATES = {"relative": 1.0, "mean_mse": 3e3, "sum_squares": 0.03}

RANGES = {
    "> 0": ("adapt_learning_rate", "repulsion_rate"),
    "≥ 0": ("consolidation_weight", "repulsion_weight", "own_samples"),
    "≥ 1": ("max_steps", "adapted_models", "adapt_steps", "fisher_samples", "mark_samples"),
    "in [0, 1)": ("negative_share",),
    "in (0, 1)": ("miss_rate",),
}


@dataclass
class AdaptThenUnlearnConfig(DrawingArguments, GANConfig):
    __doc__ = r"""Configuration of [`AdaptThenUnlearnTrainer`]: [`GANConfig`], [`~hf_unlearn.training.config.DrawingArguments`] and these.

    Stage 1 adapts the GAN to the negative samples, with elastic weight consolidation: L_adv + λ Σ Fᵢ(θᵢ − θ_G,i)². Stage 2
    starts again from the original, with the positive samples: L_adv + γ g(‖θ − θ_N‖²). The default adds what the paper does
    not have (docs/methods/adapt_then_unlearn.md): the marks are spread over the original's own samples, and the discriminator
    is shown undesired as drawn ones. [`AdaptThenUnlearnConfig.paper`] is the paper's objective alone.

    Other defaults than there: 1,000 steps, a linear decay of the learning rate, an `ema_decay` of 0.998.

    > Stage 1: adapt
        adapted_models (`int`, defaults to 1): K, adapted independently.
        adapt_steps (`int`, defaults to 300): steps of each.
        adapt_learning_rate (`float`, defaults to 5e-4): of both players.
        consolidation_weight (`float`, defaults to 0.01): λ ≥ 0, of the Fisher information scaled to a mean of one.
        fisher_samples (`int`, defaults to 256): samples that it is computed from.

    > Stage 2: unlearn
        repulsion (`"el2"` | `"il2"` | `"nl2"` | `"none"`, defaults to `"el2"`): g; `"none"` leaves stage 1 out.
        repulsion_weight (`float`, *optional*): γ ≥ 0. Default: by repulsion and distance.
        repulsion_rate (`float`, *optional*): α > 0 of `"el2"`. Default: by distance.
        distance (`"relative"` | `"mean_mse"` | `"sum_squares"`, defaults to `"relative"`): see [`~hf_unlearn.parameters.repulsion.Repulsion`].
        negative_share (`float`, defaults to 0.2): share of undesired in what the discriminator is shown as drawn, in [0, 1).

    > Feedback
        mark_samples (`int`, defaults to 5000): samples of the original that a `marker=` callable is shown.
        own_samples (`int`, defaults to 10000): samples of the original that the marks are spread over; 0 for none.
        miss_rate (`float`, defaults to 0.05): share of the negative marks that may pass for positive then, in (0, 1).

    > The discriminator
        discriminator (`"original"` | `"fresh"`, defaults to `"original"`): `"fresh"` for a pipeline that has lost its own:
            a new one, which moves alone for the first `discriminator_warmup` steps of both stages (then 200 by default).
        save_discriminator (`bool`, defaults to `False`): save it with the pipeline. It has seen what was forgotten.
    """

    max_steps: int = 1_000
    lr_scheduler_type: str = "linear"
    ema_decay: float = 0.998
    adapted_models: int = 1
    adapt_steps: int = 300
    adapt_learning_rate: float = 5e-4
    consolidation_weight: float = 0.01
    fisher_samples: int = 256
    repulsion: Literal["el2", "il2", "nl2", "none"] = "el2"
    repulsion_weight: float | None = None
    repulsion_rate: float | None = None
    distance: Literal["relative", "mean_mse", "sum_squares"] = "relative"
    negative_share: float = 0.2
    mark_samples: int = 5_000
    own_samples: int = 10_000
    miss_rate: float = 0.05
    discriminator: Literal["original", "fresh"] = "original"
    save_discriminator: bool = False

    def _check_gan_arguments(self) -> None:
        super()._check_gan_arguments()
        check_fields(self, RANGES)
        check_fields(self, DRAWING_RANGES)
        if self.discriminator == "fresh" and not self.discriminator_warmup:
            self.discriminator_warmup = 200
        if self.repulsion != "none" and self.discriminator_warmup >= self.adapt_steps:
            raise ValueError(
                f"adapt_steps={self.adapt_steps}: must be more than discriminator_warmup={self.discriminator_warmup}, in "
                "which the generator does not move"
            )

    @classmethod
    def paper(cls, output_dir: str, **overrides: Any) -> AdaptThenUnlearnConfig:
        """The paper's objective and nothing else: consolidation, then repulsion with the distance of its code, from the marked
        samples alone. γ and α are ours: its own are of other networks.
        """
        preset = {
            "distance": "mean_mse",
            "negative_share": 0.0,
            "own_samples": 0,
            "lr_scheduler_type": "constant",
            "guard": False,
        }
        return cls(output_dir=output_dir, **(preset | overrides))


class AdaptThenUnlearnTrainer(GANOutcomeMixin, GANPublishingMixin, GANTrainer):
    """Makes a GAN forget what its negative samples show.

    The pipeline (`trainer.pipeline`) is changed in place: its generator becomes the average of the unlearned one.

    ```python
    trainer = AdaptThenUnlearnTrainer(
        "me/digits-gan", AdaptThenUnlearnConfig("without-3"), undesired=latents[threes], clean=latents[others]
    )
    trainer.train()
    trainer.save_model()
    ```

    Args:
        model (`GANPipeline` | `str`): generator and discriminator, a folder or an id.
        args (`AdaptThenUnlearnConfig`, *optional*): defaults to `AdaptThenUnlearnConfig(output_dir="unlearned")`.
        undesired, clean (*optional*): samples with what is undesired, and without: images (PIL, or a tensor in [−1, 1]),
            a `Dataset` with `image` or `pixel_values`, or a tensor of latents that the pipeline draws.
        marker (callable, *optional*): instead of both: images `[n, channels, size, size]` in [−1, 1] to bool `[n]`, True for
            what is undesired. They are not spread: it can mark as many as are wanted.
        extractor (callable, *optional*): images to features `[n, d]`, which the marks are spread by. Default: the
            discriminator's features, or pixels where it is fresh.
        kwargs: anything else [`GANTrainer`] takes.

    Raises:
        ValueError: see the message, which names the argument and the fix. No model was written.
    """

    _method = "adapt_then_unlearn"
    _title = "Adapt-then-Unlearn"
    _paper = "2309.14054"
    _tag_names = ["hf_unlearn", "machine-unlearning"]
    _config_class = AdaptThenUnlearnConfig
    _decisive = (
        *GANTrainer._decisive, "adapted_models", "adapt_steps", "adapt_learning_rate", "consolidation_weight", "fisher_samples",
        "repulsion", "repulsion_weight", "repulsion_rate", "distance", "negative_share",
    )  # fmt: skip

    def __init__(
        self,
        model: GANPipeline | str | None = None,
        args: AdaptThenUnlearnConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        undesired: Any = None,
        clean: Any = None,
        marker: Callable[[Tensor], Tensor] | None = None,
        extractor: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ):
        args = args if args is not None else self._config_class(output_dir="unlearned")
        if not isinstance(args, self._config_class):
            raise ValueError(
                f"args: {type(self).__name__} needs {self._config_class.__name__}, got {type(args).__name__}"
            )
        if train_dataset is not None:
            raise ValueError("train_dataset: this trainer needs none; pass undesired= and clean=, or marker=")
        pipeline, name = as_pipeline(model)
        check_is_not_original(args.output_dir, name)
        if pipeline.discriminator is None:
            if args.discriminator != "fresh":
                raise ValueError(
                    "model: the pipeline has no discriminator, which knows how real images look; pass the pipeline that "
                    "has it, or set discriminator='fresh' to train a new one on the feedback first"
                )
            pipeline.register_modules(discriminator=_fresh_discriminator(pipeline.generator, args.seed))
            self.sorted_by = extractor
        else:
            if args.discriminator == "fresh":
                raise ValueError("discriminator='fresh': the pipeline has one, which knows more; leave it out")
            check_players(pipeline)
            self.sorted_by = extractor or Judged(copy.deepcopy(pipeline.discriminator))  # which training changes
        self.marker = marker
        self.feedback = self._gathered(args, pipeline, undesired, clean, marker)
        given = {"train_dataset": self.feedback.all_clean, "eval_dataset": eval_dataset, "extractor": extractor}
        super().__init__(pipeline, args, data_collator, **given, **kwargs)
        self.base_model = name
        self.source_dataset = [{"image": image} for image in self.feedback.undesired]
        self._negatives: Tensor | None = None
        self.results: list = []
        self.card_values: dict[str, Any] = {}
        self.reference: ReferencePoint | None = None
        self.adapted: list[dict[str, Tensor]] = []
        if args.grid_images:
            self.add_callback(SampleGrids(self))

    def _gathered(self, args, pipeline, undesired, clean, marker) -> Feedback:
        def own(count: int, seed: int) -> Tensor:
            shape = (count, *pipeline.generator.latent_shape)
            latents = torch.randn(shape, generator=seeded_generator("cpu", args.seed, seed))
            return pipeline.draw(latents, batch_size=args.batch_size)

        pipeline.to(args.device)
        if marker is not None:
            if undesired is not None or clean is not None:
                raise ValueError("marker: given beside undesired or clean; keep one of them")
            return marked_by(marker, own(args.mark_samples, MARK_SEED))
        marked = marked_samples(undesired, clean, pipeline, resize=args.resize)
        feedback = Feedback(*marked, marked[0][:0], marked[1][:0])
        if not args.own_samples:
            return feedback

        samples = own(args.own_samples, OWN_SEED)
        return spread_over(feedback, samples, self.mark_features, miss_rate=args.miss_rate, seed=args.seed)

    # Stage 1

    def _train(self, checkpoint: str | None, **kwargs):
        self._remember_original(checkpoint)
        if not checkpoint:
            self._drop_pictures()
            if self.args.should_save:
                self.reference.save(self._reference_file)
        if self.args.repulsion != "none":
            if checkpoint:
                self.adapted = self._adapted_before()
            elif len(self.adapted) < self.args.adapted_models:
                self.adapt()
            if self.args.should_save and not checkpoint:
                for k, adapted in enumerate(self.adapted):
                    ReferencePoint(adapted).save(self._adapted_file(k))
            self.anchor = self.build_repulsion()
            self.adapted = self.adapted[:1]  # the others are in its mean; this one, for extrapolated()
        done = super()._train(checkpoint, **kwargs)
        self.outcome = self.judge()
        tell_outcome(self, self.outcome_line)
        return done

    def _run_rows(self) -> dict[str, Any]:
        return {"undesired": self.feedback.all_undesired, "clean": self.feedback.all_clean}

    def adapt(self) -> list[dict[str, Tensor]]:
        """Stage 1: the parameters of K generators that draw what is to be forgotten; `train` keeps them in `_private/`."""
        self._remember_original()
        self.adapted = [self._adapt(k) for k in range(self.args.adapted_models)]
        return self.adapted

    def _adapt(self, k: int) -> dict[str, Tensor]:
        stage = copy.copy(self.args)
        stage.output_dir, stage.seed = str(self.private_dir), self.args.seed + 1 + k
        stage.max_steps, stage.learning_rate = self.args.adapt_steps, self.args.adapt_learning_rate
        stage.discriminator_learning_rate, stage.lr_scheduler_type = None, "constant"
        stage.guard, stage.save_strategy, stage.eval_strategy, stage.report_to = False, "no", "no", []
        stage.load_best_model_at_end = stage.push_to_hub = stage.eval_on_start = False
        players = GANPipeline(self._original(), copy.deepcopy(self.pipeline.discriminator))
        logger.info(
            "adapting model %d of %d to %d undesired", k + 1, self.args.adapted_models, len(self.source_dataset)
        )
        trainer = GANTrainer(players, stage, train_dataset=ImageTensors(self.feedback.undesired))
        trainer.anchor = self.build_consolidation()
        Trainer.train(trainer)  # a part of this run, and none of its own
        return {name: value.detach() for name, value in trainer.averaged.named_parameters()}

    def build_consolidation(self) -> QuadraticAnchor:
        """λ Σ Fᵢ(θᵢ − θ_G,i)²: elastic weight consolidation around the original (the paper's L_adapt)."""
        generator = self._original()
        shape = (self.args.fisher_samples, *generator.latent_shape)
        latents = torch.randn(shape, generator=seeded_generator("cpu", self.args.seed, FISHER_SEED))
        discriminator = self.pipeline.discriminator.eval()
        fisher = scalar_fisher(
            generator, latents.to(self.args.device), lambda drawn: discriminator(drawn.sample).logits
        )
        return QuadraticAnchor(
            self.reference.parameters,
            diagonal=scaled_to_mean_one(fisher),
            diagonal_weight=self.args.consolidation_weight,
            diagonal_name="consolidation",
        )

    # Stage 2

    def build_repulsion(self) -> Repulsion:
        """γ g(d), d the distance from the adapted models (the paper's L_repulsion)."""
        return Repulsion(
            self.adapted,
            kind=self.args.repulsion,
            weight=self.repulsion_weight,
            rate=self.repulsion_rate,
            distance=self.args.distance,
            reference=self.reference.parameters,
        )

    @property
    def repulsion_weight(self) -> float:
        """γ: the config's, or the default of its repulsion and distance; 0 without one."""
        if self.args.repulsion_weight is not None:
            return self.args.repulsion_weight
        return REPULSION_WEIGHTS[self.args.distance].get(self.args.repulsion, 0.0)

    @property
    def repulsion_rate(self) -> float:
        """α: the config's, or the default of its distance."""
        return REPULSION_RATES[self.args.distance] if self.args.repulsion_rate is None else self.args.repulsion_rate

    def false_images(self, count: int, step: int) -> Tensor | None:
        """Negatives, in place of a share of what is drawn."""
        count = round(self.args.negative_share * count)
        if not count:
            return None
        if self._negatives is None:
            self._negatives = self.feedback.all_undesired.to(self.args.device)
        rows = torch.randint(
            len(self._negatives), (count,), generator=self._generator(step, NEGATIVE_SEED), device=self.args.device
        )
        return self._negatives[rows]

    def extrapolated(self, scale: float) -> GANPipeline:
        """The original moved by `scale` times the way to the first adapted model: away from it for `scale` < 0, where the feature
        fades, and quality with it (the paper's §3.1). Adapts first, where that has not been done.

        Raises:
            ValueError: after a training without stage 1.
        """
        if not self.adapted and self.state.global_step:
            raise ValueError("repulsion='none': this run adapted no model; call extrapolated() before train()")
        adapted = (self.adapted or self.adapt())[0]
        generator = self._original()
        ReferencePoint(extrapolate(self.reference.parameters, adapted, scale), self.reference.buffers).restore(
            generator
        )
        return GANPipeline(generator.requires_grad_(False), self.pipeline.discriminator)

    # The original

    @property
    def _reference_file(self) -> Path:
        return self.private_dir / "reference.safetensors"

    def _remember_original(self, checkpoint: str | None = None) -> None:
        if checkpoint:
            if not self._reference_file.is_file():
                raise ValueError(
                    f"resume_from_checkpoint: {self._reference_file} is missing, without which the original is not known; start again"
                )
            self.reference = ReferencePoint.load(self._reference_file, self.args.device)
        elif self.reference is None:
            self.reference = ReferencePoint.capture(self.model.generator)

    def _adapted_file(self, k: int) -> Path:
        return self.private_dir / f"adapted-{k}.safetensors"

    def _adapted_before(self) -> list[dict[str, Tensor]]:
        files = [self._adapted_file(k) for k in range(self.args.adapted_models)]
        if missing := [file for file in files if not file.is_file()]:
            raise ValueError(f"resume_from_checkpoint: {missing[0]} is missing; start again")
        return [ReferencePoint.load(file, self.args.device).parameters for file in files]

    def _original(self) -> nn.Module:
        """A generator of its own, as it was before the first step."""
        generator = copy.deepcopy(self.averaged).requires_grad_(True)
        self.reference.restore(generator)
        return generator

    @contextmanager
    def as_original(self) -> Iterator[None]:
        """What draws, as it was before the first step, for the time of a `with` block."""
        self._remember_original()
        live = dict(self.averaged.named_parameters()) | dict(self.averaged.named_buffers())
        now = {name: value.detach().clone() for name, value in live.items()}
        original = self.reference.parameters | self.reference.buffers
        for name, value in live.items():
            value.detach().copy_(original[name])
        try:
            yield
        finally:
            for name, value in live.items():
                value.detach().copy_(now[name])


def _fresh_discriminator(generator: nn.Module, seed: int) -> DCGANDiscriminator:
    """A new discriminator of the generator's size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = {name: generator.config[name] for name in ("sample_size", "channels")}
        widths = {
            name: generator.config[name] for name in ("base_channels", "max_channels") if name in generator.config
        }
        return DCGANDiscriminator(**shape, **widths)
