"""VDU: variational diffusion unlearning of a class or a concept, from forget data alone (arXiv 2510.04058, TMLR 2026)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...parameters.anchors import Anchor, QuadraticAnchor, SumOfAnchors
from ...parameters.fisher import scaled_to_mean_one
from ...parameters.moments import ParameterMoments
from ...training.checks import check_fields
from ..objective import Batch
from .config import DiffusionUnlearnConfig
from .denoiser import is_prompted
from .encoded import EncodedImages, encode_prompts
from .posterior import ForgottenPosterior
from .prompt_effect import LASTING
from .trainer import DiffusionUnlearnTrainer


logger = logging.getLogger(__name__)

RANGES = {
    "> 0": ("variance_floor", "caution"),
    "≥ 0": ("stability_weight", "negative_guidance"),
    "in (0, 1)": ("gamma",),
}


@dataclass
class VDUConfig(DiffusionUnlearnConfig):
    r"""Configuration of [`VDUTrainer`]: [`DiffusionUnlearnConfig`] and these.

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

    > `redirect`
        negative_guidance (`float`, defaults to 0.0): with prompts: how far beyond the neutral prompt `redirect` goes.
        caution (`float`, defaults to 3.0): without prompts: how many times the odds of the forgotten kind are raised in
            `redirect`: 1 is Bayes' rule itself; above, what is in doubt is forgotten.
        redirect_prompt (`list[str]` | `str` | `dict[str, str]`, defaults to `""`): with prompts: the neutral prompt. One for all takes
            everything else that a prompt asks for with it; better is the same wording without the forgotten concept: one for each
            of `forget_prompts`, in their order, or for prompts of a dataset a dict from prompt to neutral prompt.
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
    negative_guidance: float = 0.0
    caution: float = 3.0
    redirect_prompt: list[str] | str | dict[str, str] = ""

    def _check_unlearn_arguments(self) -> None:
        super()._check_unlearn_arguments()
        check_fields(self, RANGES)
        if self.gamma is not None:
            weights = (self.forget_weight, self.stability_weight)
            if weights not in ((1.0, 0.0), (1 - self.gamma, self.gamma)):
                raise ValueError("gamma: sets forget_weight and stability_weight; leave those out, or set gamma=None")
            self.forget_weight, self.stability_weight = 1 - self.gamma, self.gamma
        if isinstance(self.redirect_prompt, list | tuple):
            self.redirect_prompt = self._in_order(list(self.redirect_prompt))
        if odd := [prompt for prompt in self.neutral_prompts if not isinstance(prompt, str)]:
            raise ValueError(f"redirect_prompt: {odd[0]!r} is no text; give prompts")
        self._check_redirection()
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

    def _in_order(self, neutral: list[str]) -> str | dict[str, str]:
        prompts = self.forget_prompts or []
        if len(neutral) == 1:
            return neutral[0]
        if len(neutral) != len(prompts):
            raise ValueError(
                f"redirect_prompt: has {len(neutral)} prompts for {len(prompts)} forget_prompts; give one for all, one for each, or "
                "for the prompts of a dataset a dict"
            )
        return dict(zip(prompts, neutral, strict=True))

    def _check_redirection(self) -> None:
        prompts = self.forget_prompts or []
        if self.forget_loss not in ("bounded", "redirect"):
            return
        if same := [prompt for prompt in self.redirected(prompts) if prompt in prompts]:
            raise ValueError(
                f"redirect_prompt: {same[0]!r} is among forget_prompts; leave the forgotten concept out of it"
            )

    def redirected(self, prompts: Iterable[str]) -> list[str]:
        """The neutral prompt of each of `prompts`.

        Raises:
            ValueError: there is none for it.
        """
        given = self.redirect_prompt
        if isinstance(given, dict) and (missing := [prompt for prompt in prompts if prompt not in given]):
            raise ValueError(f"redirect_prompt: has none for {missing[0]!r}; add it")
        return [given[prompt] if isinstance(given, dict) else given for prompt in prompts]

    @property
    def neutral_prompts(self) -> list[str]:
        given = self.redirect_prompt
        return list(dict.fromkeys(given.values())) if isinstance(given, dict) else [given]

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


class VDUTrainer(DiffusionUnlearnTrainer):
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
    _told = ("caution", "negative_guidance", "stability_weight")
    _precision_name: str | None = None

    def forget_loss(self, model: Callable, batch: Batch) -> Tensor:
        value = super().forget_loss(model, batch)
        if not self.args.forget_sum:
            return value
        low, high = self._timesteps
        return value * (len(self.forget_dataset) * (high - low) * batch["clean"][0].numel())

    # `redirect`: what the original would answer had it never seen the forgotten kind

    @property
    def _stands_on(self) -> dict[str, str]:
        if self.forget_loss_name != "redirect" or not is_prompted(self.pipeline):
            return {}
        kin = {"concept ablation": "2303.13516"}
        return kin | {"ESD's negative guidance": "2303.07345"} if self.args.negative_guidance else kin

    @torch.no_grad()
    def answer_without(self, batch: Batch) -> Tensor:
        """What the original would answer had it never seen the forgotten kind: by Bayes' rule over two banks of images
        ([`hf_unlearn.unlearning.diffusion.posterior`]), or for a prompted model its answer to the neutral prompt, ε(∅) − η(ε(c) − ε(∅)).
        Kin: concept ablation (arXiv 2303.13516, η = 0), ESD (arXiv 2303.07345, η > 0), and DELETE for classifiers (arXiv 2503.23751).
        """
        answer, _ = self.predictions(self.reference_forward, batch)
        if is_prompted(self.pipeline):
            unprompted, _ = self.predictions(self.reference_forward, {**batch, "conditioning": batch["neutral"]})
            return unprompted - self.args.negative_guidance * (answer - unprompted)
        _, change = self.posterior(batch["noisy"], batch["timesteps"], self.schedule)
        return answer + self.schedule.shift(change, batch["timesteps"])

    def _encoded(self, argument: str, dataset: Any, args: VDUConfig) -> EncodedImages | None:
        encoded = super()._encoded(argument, dataset, args)
        if argument != "forget_dataset" or not is_prompted(self.pipeline):
            return encoded
        known = encoded.prompts
        if not known and isinstance(args.redirect_prompt, dict):
            raise ValueError(
                "redirect_prompt: the prompts of this forget_dataset are not known; give one neutral prompt for all"
            )
        neutral = args.redirected(known) if known else args.neutral_prompts
        tables, rows = encode_prompts(neutral, self.pipeline, device=args.device, guidance_scale=args.guidance_scale)
        count = len(next(iter(encoded.conditioning.values())))
        encoded.neutral = {name: table[rows].expand(count, *table.shape[1:]) for name, table in tables.items()}
        return encoded

    @torch.no_grad()
    def remaining_effect(self) -> float:
        """With prompts: what is left of the effect of the forget prompts on the answer, ε(c) − ε(∅) along that of the original, as the
        sampler sees it: times the guidance scale. The original has the scale itself, 0 is forgotten.
        """
        left, whole = 0.0, 0.0
        with self._looking():
            for batch in self._batches(self.forget_dataset, self.args.guard_examples):
                neutral = {**batch, "conditioning": batch["neutral"]}
                now, before = (
                    self.predictions(forward, batch)[0] - self.predictions(forward, neutral)[0]
                    for forward in (self.model, self.reference_forward)
                )
                left, whole = left + (now * before).sum().item(), whole + before.square().sum().item()
        return self.guidance * left / whole if whole else 0.0

    def train(self, *args: Any, **kwargs: Any):
        """As [`~hf_unlearn.unlearning.diffusion.trainer.DiffusionUnlearnTrainer.train`]; says at the end whether prompts still have effect."""
        output = super().train(*args, **kwargs)
        if is_prompted(self.pipeline) and self.forget_loss_name == "redirect":
            effect = self.remaining_effect()
            logger.info("remaining effect of the forget prompts, times guidance: %.3g", effect)
            if effect > LASTING:
                logger.warning(
                    "the forget prompts still have %.2g times the effect on an answer that they had without guidance (guidance_scale=%g), "
                    "so what was to be forgotten is probably drawn; set a redirect_prompt for each and negative_guidance to about 1, or "
                    "raise learning_rate or max_steps",
                    effect,
                    self.guidance,
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

    # The term B

    def build_anchor(self) -> Anchor | None:
        anchors = [super().build_anchor(), self._stability()]
        anchors = [anchor for anchor in anchors if anchor is not None]
        return SumOfAnchors(*anchors) if anchors else None

    def _stability(self) -> Anchor | None:
        args, reference = self.args, self.reference.parameters
        if not args.stability_weight:
            return None
        moments = self._moments()
        precision = self._precision(moments)
        center = reference
        if args.anchor == "checkpoint_mean" and moments is not None:
            center = {name: moments.mean[name].to(value) for name, value in reference.items()}
        logger.info("stability: precision %s around %s", self.precision_name, args.anchor)
        return QuadraticAnchor(
            center, diagonal=precision, diagonal_weight=args.stability_weight, diagonal_name="stability"
        )

    @property
    def precision_name(self) -> str | None:
        """What stands in for 1/v in the term B, as log and card say it; None without the term."""
        if not self.args.stability_weight:
            return None
        return self._precision_name

    def _moments(self) -> ParameterMoments | None:
        """Mean and variance over the checkpoints; a resumed run reads what the first one computed."""
        if self.args.checkpoints is None:
            return None
        file = self.private_dir / "moments.safetensors"
        if self._resuming:
            if not file.is_file():
                raise ValueError(f"resume_from_checkpoint: {file} is missing; start again, or set stability_weight=0")
            return ParameterMoments.load(file, self.args.device)
        moments = ParameterMoments.from_checkpoints(self.args.checkpoints, self.reference.parameters)
        if self.args.should_save:
            moments.save(file)
        return moments

    def _precision(self, moments: ParameterMoments | None) -> dict[str, Tensor]:
        """P of B = Σ Pᵢ(θᵢ − μᵢ)²: 1/2v, or half a Fisher information or an identity where there is no variance."""
        kind, count = self.args.stability, 0 if moments is None else moments.count
        if kind == "auto":
            kind = "inverse_variance" if count >= 2 else "fisher"
        if kind == "inverse_variance" and count < 2:
            raise ValueError(f"checkpoints: K = {count} has no variance; name two or more, or set stability='fisher'")
        if kind == "inverse_variance":
            self._precision_name = f"inverse variance over {count} checkpoints"
            precision = moments.precision(self.args.variance_floor)
            return {name: value.to(self.args.device) for name, value in precision.items()}
        self._precision_name = f"{kind}, scaled to a mean of one"
        if kind == "isotropic":
            return {name: torch.full_like(value, 0.5) for name, value in self.reference.parameters.items()}
        if self.args.stability == "auto":
            logger.warning(
                "checkpoints: K = %d has no variance; the stability term uses the Fisher information", count
            )
        return {name: value / 2 for name, value in scaled_to_mean_one(self._fisher()).items()}
