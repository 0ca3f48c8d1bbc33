"""VDU: variational diffusion unlearning of a class or a concept, from forget data alone (arXiv 2510.04058, TMLR 2026)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import TrainerCallback

from ...parameters.reference import trainable_parameters
from ...training.checks import check_fields
from ...training.pictures import METRIC_SEED
from ...training.trackers import log_beside
from ..objective import Batch
from ..outcome import Outcome
from .concept import settled
from .denoiser import is_prompted
from .encoded import prompts_of
from .pipelines import text_side_of
from .posterior import ForgottenPosterior
from .prompt_effect import still_drawn
from .redirect import KIN, redirect_concept
from .redirect_prompts import RedirectPromptsConfig, RedirectPromptsTrainer
from .stability import StabilityMixin
from .together import Together
from .unprompted import without_concept
from .wordings import exchanged, kind_of, templates_for


logger = logging.getLogger(__name__)

HANDFUL = 32  # images that are drawn for a marker when a run is judged
PROMPTED_REPLAY = (
    4.0  # weight of replay where what is drawn without a prompt counts: benchmarks/text_to_image_defaults.py
)
RANGES = {
    "> 0": ("variance_floor", "caution"),
    "≥ 0": ("stability_weight", "negative_guidance"),
    "in (0, 1)": ("gamma",),
}


@dataclass
class VDUConfig(RedirectPromptsConfig):
    r"""Configuration of [`VDUTrainer`]: [`RedirectPromptsConfig`] and these.

    The paper's loss is (1 − γ)·A + γ·B: A = −Σ_x Σ_t C_t‖ε − ε_θ(x_t, t)‖², a sum over forget images, timesteps and pixels without
    lower bound, and B = Σ (θᵢ − μᵢ)²/2vᵢ over mean μ and variance v of the parameters at K checkpoints. [`VDUConfig.paper`] is that,
    with every safety off. The default asks for the noise that the original would see in a forget image *without the forgotten part of
    its own distribution* (`redirect`), which has a minimum, and replays the original's own samples (docs/methods/vdu.md).

    > The paper's terms
        gamma (`float`, *optional*): γ in (0, 1): sets `forget_weight` to 1 − γ and `stability_weight` to γ.
        forget_sum (`bool`, defaults to `False`): the forget loss is the sum over the forget images, the timesteps of `t_range` and the
            pixels, as in A, and not the mean. Each step has an unbiased estimate of it: the mean over its batch, times their number.
        stability_weight (`float`, defaults to 0.0): weight of B.
        checkpoints (`list[str]`, *optional*): K folders or ids of checkpoints of the run that trained the model, or one
            folder that holds `checkpoint-*`; see [`~hf_unlearn.parameters.moments.ParameterMoments`].
        variance_floor (`float`, defaults to 0.01): v is at least this share of its own mean over the parameters.
        stability (`str`, defaults to `"auto"`): the precision in B: `"inverse_variance"` (needs K ≥ 2), `"fisher"` or
            `"isotropic"` (both scaled to a mean of one). `"auto"` is the first where K ≥ 2, else the second.
        anchor (`"original"` | `"checkpoint_mean"`, defaults to `"original"`): what B attracts to.

    > `redirect`, with prompts
        concept (`str` | `list[str]` | `dict[str, str | None]`, *optional*): the word or phrase that is to be forgotten, several, or a dict
            from each to what is drawn instead, its anchor, as in `{"three": "seven"}`; where none is given it is chosen as by
            [`redirect_concept`], and told. Default: the longest phrase that all prompts have in common, told, too; it is not looked
            for where there is a `redirect_prompt`. Without forget images and `forget_prompts` it is asked for in a dozen wordings.
        closed_form (`bool`, *optional*): begin with [`redirect_concept`], by which the words lead elsewhere before the first step.
            Default: where there is a concept, and the layers that read words are trained.
        redirect_prompt (`list[str]` | `str` | `dict[str, str]`, *optional*): the neutral prompt. Default: with a concept the same wording
            with its anchor, else the empty prompt, which takes everything else that a prompt asks for with it. One for all, one for each
            of `forget_prompts` in their order, or for prompts of a dataset a dict from prompt to neutral prompt.
        negative_guidance (`float`, *optional*): how far beyond the neutral prompt `redirect` goes, for every image alike, as ESD does. Default: as
            far as guidance needs it when the concept leaves what is drawn without a prompt as well, which is then trained, too
            ([`hf_unlearn.unlearning.diffusion.unprompted`]); 0 where the pipeline draws without guidance.

    > `redirect`, without prompts
        caution (`float`, defaults to 3.0): how many times the odds of the forgotten kind are raised: 1 is Bayes' rule itself; above, what
            is in doubt is forgotten.
    """

    anchors_on_parameters: ClassVar[tuple[str, ...]] = ("stability_weight",)
    fisher_weight: ClassVar[float] = 0.0  # no field: stability="fisher" is that anchor

    gamma: float | None = None
    forget_sum: bool = False
    stability_weight: float = 0.0
    checkpoints: list[str] | None = None
    variance_floor: float = 0.01
    stability: Literal["auto", "inverse_variance", "fisher", "isotropic"] = "auto"
    anchor: Literal["original", "checkpoint_mean"] = "original"
    concept: list[str] | str | dict[str, str | None] | None = None
    closed_form: bool | None = None
    negative_guidance: float | None = None
    caution: float = 3.0

    def _check_unlearn_arguments(self) -> None:
        super()._check_unlearn_arguments()
        check_fields(self, RANGES)
        if self.gamma is not None:
            weights = (self.forget_weight, self.stability_weight)
            if weights not in ((1.0, 0.0), (1 - self.gamma, self.gamma)):
                raise ValueError("gamma: sets forget_weight and stability_weight; leave those out, or set gamma=None")
            self.forget_weight, self.stability_weight = 1 - self.gamma, self.gamma
        if self.checkpoints is not None and not self.checkpoints:
            raise ValueError(
                "checkpoints: K = 0, so there is no mean and no variance; name at least one, or leave it out"
            )
        if self.stability_weight and not self.checkpoints:
            needs = {"anchor": self.anchor == "checkpoint_mean", "stability": self.stability == "inverse_variance"}
            fixes = [
                f"{name}={fix!r}" for name, fix in (("anchor", "original"), ("stability", "fisher")) if needs[name]
            ]
            if fixes:
                raise ValueError(
                    f"checkpoints: missing; name two or more of the run that trained the model, or set {' and '.join(fixes)}"
                )

    def _check_redirection(self) -> None:
        if self.forget_loss in ("bounded", "redirect"):
            super()._check_redirection()
        elif set_ := [name for name in ("concept", "closed_form", "redirect_prompt") if getattr(self, name)]:
            raise ValueError(f"{set_[0]}: is of forget_loss='redirect', not of {self.forget_loss!r}; leave it out")

    @classmethod
    def paper(cls, output_dir: str, **overrides: Any) -> VDUConfig:
        """The paper's objective and nothing else: ascent on the sum of the denoising errors, weighted as in the variational bound, the
        anchor over the variance of the checkpoints, no replay, no clipping, no guard. The paper's γ was not to be had: 0.5 weighs both
        sums alike, and the right one depends on the model.

        Raises:
            ValueError: as the config itself; without `checkpoints=` of two or more, unless `stability` and `anchor` do without.
        """
        preset = {
            "forget_loss": "ascent",
            "forget_sum": True,
            "gamma": 0.5,
            "anchor": "checkpoint_mean",
            "stability": "inverse_variance",
            "variance_floor": 1e-6,
            "loss_weighting": "elbo",
            "own_samples": 0,
            "replay_weight": 0.0,
            "max_grad_norm": 0.0,
            "guard": False,
        }
        return cls(output_dir=output_dir, **(preset | overrides))


class VDUTrainer(StabilityMixin, RedirectPromptsTrainer):
    r"""Makes a diffusion model forget the kind of images that its forget examples show, from these alone.

    ```python
    trainer = VDUTrainer(pipeline=pipe, args=VDUConfig(output_dir="without-3"), forget_dataset=threes)
    trainer.train()
    trainer.save_model()
    ```

    Arguments as for [`~hf_unlearn.unlearning.diffusion.trainer.DiffusionUnlearnTrainer`], `args` a [`VDUConfig`]. The term
    $B = \sum_i (\theta_i - \mu_i)^2 / 2v_i$ is one of the anchors, with v the variance over checkpoints, or what stands in for it.
    """

    _method = "vdu"
    _title = "Variational diffusion unlearning"
    _paper = "2510.04058"
    _config_class = VDUConfig
    _told = ("caution", "closed_form", "negative_guidance", "stability_weight")
    _figure_names = RedirectPromptsTrainer._figure_names | {
        "effect": ("prompt_effect", "Effect of the forget prompts, times guidance", "", 1),
        "shown": ("marked", "Images drawn for the forget prompts that the marker marks", "%", 100),
        "unasked": ("marked", "Images drawn without a prompt that the marker marks", "%", 100),
    }

    def forget_loss(self, model: Callable, batch: Batch) -> Tensor:
        if self._goes_without_words:
            value = self._both_ways(model, batch, *self._answers_without(batch))
        else:
            value = super().forget_loss(model, batch)
        if not self.args.forget_sum:
            return value
        low, high = self._timesteps
        return value * (len(self.forget_dataset) * (high - low) * batch["clean"][0].numel())

    @contextmanager
    def seen_together(self, model: Callable, forget: Batch, replayed: Batch | None) -> Iterator[None]:
        """Without prompts, both batches are one pass of the student, and where the original is asked about both, one of the original."""
        if replayed is not None and not is_prompted(self.pipeline):
            asked = [self.reference_forward] if self.forget_loss_name == "redirect" else []
            self._together = Together([forget, replayed], [model, *asked])
        try:
            yield
        finally:
            self._together = None

    # `redirect`: what the original would answer had it never seen the forgotten kind

    @property
    def _stands_on(self) -> dict[str, str]:
        if not self._redirects_prompts:
            return {}
        kin = {"concept ablation": "2303.13516"}
        if self._goes_without_words or self.args.negative_guidance:
            kin |= {"ESD's negative guidance": "2303.07345"}
        return kin | KIN if self.args.closed_form else kin

    @torch.no_grad()
    def answer_without(self, batch: Batch) -> Tensor:
        """What the original would answer had it never seen the forgotten kind: by Bayes' rule over two banks of images
        ([`hf_unlearn.unlearning.diffusion.posterior`]), or for a prompted model its answer to the neutral prompt, and with an η beyond,
        ε(∅) − η(ε(c) − ε(∅)).
        Kin: concept ablation (arXiv 2303.13516, η = 0), ESD (arXiv 2303.07345, η > 0), and DELETE for classifiers (arXiv 2503.23751).
        """
        if is_prompted(self.pipeline):
            shown, eta = {**batch, "conditioning": batch["neutral"]}, self.args.negative_guidance
            if not eta:
                return self.predictions(self.reference_forward, shown)[0]
            neutral, answer = self.answers(self.reference_forward, shown, batch)
            return neutral - eta * (answer - neutral)
        answer, _ = self.predictions(self.reference_forward, batch)
        _, change = self.posterior(batch["noisy"], batch["timesteps"], self.schedule)
        return answer + self.schedule.shift(change, batch["timesteps"])

    @property
    def _goes_without_words(self) -> bool:
        """Whether what is drawn without a prompt is to lose the concept, too: where guidance needs it, and no η is given."""
        return self._redirects_prompts and self.args.negative_guidance is None and self.guidance > 1

    @torch.no_grad()
    def _answers_without(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The guided answer to the concept's words, that of the original to the neutral prompt, and ε*(∅)."""
        shown = {**batch, "conditioning": batch["neutral"]}
        neutral, unprompted, concept = self.answers(self.reference_forward, shown, self.without_words(shown), batch)
        return self.guide(neutral, unprompted), without_concept(unprompted, concept, neutral)

    def _both_ways(self, model: Callable, batch: Batch, guided: Tensor, untold: Tensor) -> Tensor:
        """Squared distance of what is answered without words, and of the guided answer by the square of its scale, `[batch]`."""
        answer, unprompted = self.both_answers(model, batch)
        of_guided = self._error(self.guide(answer, unprompted), guided, batch) / self.guidance**2
        return 0.5 * (of_guided + self._error(unprompted, untold, batch))

    @property
    def replay_weight(self) -> float:
        """By default of prompts more than of images: guidance multiplies what is lost of what is kept."""
        if self.own is not None and self.args.replay_weight is None and self._goes_without_words:
            return PROMPTED_REPLAY
        return super().replay_weight

    def replay_loss(self, model: Callable, batch: Batch) -> Tensor:
        if not self._goes_without_words:
            return super().replay_loss(model, batch)
        with torch.no_grad():
            answer, unprompted = self.both_answers(self.reference_forward, batch)
        return self._both_ways(model, batch, self.guide(answer, unprompted), unprompted)

    def retain_loss(self, model: Callable, batch: Batch) -> Tensor:
        value = super().retain_loss(model, batch)
        if not self._goes_without_words:
            return value
        return 0.5 * (value + super().retain_loss(model, self.without_words(batch)))

    @torch.no_grad()
    def remaining_effect(self, model: Callable | None = None) -> float:
        """With prompts: what is left of the effect of the forget prompts on the answer, ε(c) − ε(∅) along that of the original, as the
        sampler sees it: times the guidance scale. The original has the scale itself, 0 is forgotten.

        Args:
            model (callable, *optional*): whose; by default that of the trainer, as it is now.
        """
        model = self.model if model is None else model
        left, whole = 0.0, 0.0
        with self._looking():
            for batch in self._batches(self.forget_dataset, self.args.guard_examples):
                neutral = {**batch, "conditioning": batch["neutral"]}
                now, before = (
                    self.predictions(forward, batch)[0] - self.predictions(forward, neutral)[0]
                    for forward in (model, self.reference_forward)
                )
                left, whole = left + (now * before).sum().item(), whole + before.square().sum().item()
        return self.guidance * left / whole if whole else 0.0

    def _settled(self, args: VDUConfig, forget_dataset) -> VDUConfig:
        redirects, prompted = args.forget_loss in ("bounded", "redirect"), is_prompted(self.pipeline)
        if not prompted and (args.concept is not None or args.closed_form):
            name = "closed_form" if args.concept is None else "concept"
            raise ValueError(f"{name}: this model takes no prompts; leave it out, and pass forget_dataset=")
        if redirects and prompted:
            args = settled(args, self.pipeline, forget_dataset)
            args.trainable = args.trainable or ["cross_attention"]
        else:
            args = copy.copy(args)
            args.redirect_prompt, args.closed_form = args.redirect_prompt or "", False
            args.negative_guidance = args.negative_guidance or 0.0
        return super()._settled(args, forget_dataset)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.closed_form and not self._words_are_trained:
            raise ValueError(
                "closed_form: changes the layers that read words, which are not trained here; set trainable to cross_attention or all, or "
                "closed_form=False"
            )
        if self.args.closed_form is None:
            self.args.closed_form = self._words_are_trained
        if self.guard and self.forget_dataset is not None and self._redirects_prompts:
            self.add_callback(_LogsEffect(self))

    @property
    def _words_are_trained(self) -> bool:
        """Whether all layers that read words are trained, as they are and not by an adapter."""
        if self.is_adapter:
            return False
        trained = set(trainable_parameters(self.model))
        return all(f"{layer.name}.weight" in trained for layer in text_side_of(self.pipeline).layers)

    def _before_steps(self) -> None:
        """The first act: words lead elsewhere before the first step. What is useful stays what the original does."""
        if not self.args.closed_form:
            return
        if self.guard:
            self.guard.state.baseline = self.utility(self.reference_forward)
        anchors = self.args.concept
        own = [prompt for prompt in prompts_of(self.forget_dataset) if exchanged(prompt, anchors) != prompt]
        templates = chain.from_iterable(templates_for(name, kind_of(name)) for name in anchors)
        redirect_concept(self.pipeline, anchors, wordings=[*dict.fromkeys(templates), *own])

    @property
    def _begins_as_original(self) -> bool:
        return not self.args.closed_form

    # How it came out

    def forget_figures(self, model: Callable) -> dict[str, float]:
        """As of [`~hf_unlearn.unlearning.diffusion.objective.DenoisingMixin`]; where prompts are redirected also `effect`, what is left of
        theirs ([`~VDUTrainer.remaining_effect`]), and with a `marker` the share it marks of what they draw, `shown`, and of what is drawn
        without a prompt, `unasked`.
        """
        figures = super().forget_figures(model)
        if not self._redirects_prompts:
            return figures
        figures["effect"] = self.remaining_effect(model)
        prompts = prompts_of(self.forget_dataset)
        if self.marker is not None and prompts:
            asked = [prompts[i % len(prompts)] for i in range(HANDFUL)]
            with nullcontext() if model is self.model else self.as_original():
                drawn = {"shown": self._drawn(asked, METRIC_SEED), "unasked": self._drawn([""] * HANDFUL, METRIC_SEED)}
            for name, images in drawn.items():
                figures[name] = torch.as_tensor(self.marker(images)).float().mean().item()
        return figures

    def _forgotten_how_far(self, outcome: Outcome) -> str:
        said, now, before = super()._forgotten_how_far(outcome), outcome.now, outcome.original
        if "effect" not in now:
            return said
        said = f"the effect of the forget prompts, times guidance, is {now['effect']:.3g} ({before['effect']:.3g} before), {said}"
        if "shown" in now:
            said = f"{100 * now['shown']:.1f} % of the images drawn for them show it ({100 * before['shown']:.1f} % before), {said}"
        return said

    @property
    def failed_checks(self) -> list[str]:
        drawn = self._still_drawn
        return [*super().failed_checks, *([] if drawn is None else [f"{drawn} (guidance_scale={self.guidance:g})."])]

    @property
    def _still_drawn(self) -> str | None:
        known = self.outcome is not None and "effect" in self.outcome.now
        return still_drawn(self.outcome.now["effect"], "prompts") if known else None

    @property
    def _redirects_prompts(self) -> bool:
        return self.forget_loss_name == "redirect" and is_prompted(self.pipeline)

    def train(self, *args: Any, **kwargs: Any):
        """As [`~hf_unlearn.unlearning.diffusion.trainer.DiffusionUnlearnTrainer.train`]; says how to go on where prompts still have effect."""
        output = super().train(*args, **kwargs)
        if self._still_drawn is not None:
            logger.warning(
                "to take more of it, leave closed_form and negative_guidance at their defaults, name a concept=, or raise learning_rate or max_steps"
            )
        return output

    @cached_property
    def posterior(self) -> ForgottenPosterior | None:
        """What is forgotten and what is kept, as two banks of images; None for a prompted model, whose prompts say it."""
        kept = self.retain_dataset if self.own is None else self.own.kept
        if is_prompted(self.pipeline) or kept is None:
            return None
        size = len(self.forget_dataset)
        share = size / (size + len(kept)) if self.own is None else self.own.share
        # Where no own sample was of the forgotten kind, it may still be as frequent as the resolution of the count.
        share = min(max(share, 1 / (len(kept) + 1)), 0.99)
        device = self.args.device
        odds = self.args.caution * share / (1 - share)
        return ForgottenPosterior(self.forget_dataset.latents.to(device), kept.latents.to(device), odds / (1 + odds))

    def kept_answer(self, batch: Batch) -> Tensor:
        if self.forget_loss_name == "redirect" and self.posterior is not None:
            return self.answer_without(batch)
        return super().kept_answer(batch)


class _LogsEffect(TrainerCallback):
    """Logs `prompt_effect`, what is left of the forget prompts' effect, whenever the guard looks."""

    def __init__(self, trainer: VDUTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.guard_steps and state.global_step % self.trainer.guard_steps == 0:
            log_beside(self.trainer, {"prompt_effect": self.trainer.remaining_effect()})
