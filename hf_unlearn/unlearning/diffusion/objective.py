"""What a denoiser minimises while it forgets: the forget losses on noisy images, and replay of the original's own samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...parameters.fisher import gaussian_fisher
from ...training.noise import NoiseSchedule
from .. import losses
from ..guard import LOOKING
from ..objective import Batch
from ..outcome import Outcome
from .architecture import Architecture
from .encoded import EncodedImages, encode_prompts
from .own_samples import OwnSamples
from .pipelines import architecture_of
from .together import Together, joined


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


DEFAULT_REPLAY_WEIGHT = {"redirect": 1.0}
DEFAULT_TOLERANCE = 0.5
UNCHANGED = 0.01  # share by which the error on the same noise must rise before anything counts as forgotten
LITTLE = 0.1  # share of the way to the asked-for answers below which nothing counts as forgotten


class DenoisingMixin:
    """The hooks of [`~hf_unlearn.unlearning.objective.ObjectiveMixin`] for a denoiser. Student and original see the same noise.

    What differs from one denoiser to the next is said by its [`~hf_unlearn.unlearning.diffusion.architecture.Architecture`].
    """

    pipeline: DiffusionPipeline
    schedule: NoiseSchedule
    own: OwnSamples | None
    replay_dataset: EncodedImages | None

    @property
    def architecture(self) -> Architecture:
        return architecture_of(self.pipeline)

    def _batches(self, dataset, limit: int | None) -> Iterator[Batch]:
        generator = self._generator(LOOKING)  # the same noise at every look
        for batch in super()._batches(dataset, limit):
            yield self.prepared(batch, generator)

    # The losses

    def _choose_forget_loss(self) -> str:
        name = self.args.forget_loss
        if name == "bounded":
            has_target = self.args.heldout_loss is not None or self.heldout_dataset is not None
            name = "match" if has_target else "redirect"
        self._check_is_for(name)
        return name

    @property
    def replay_weight(self) -> float:
        if self.own is None:
            return 0.0
        if self.args.replay_weight is not None:
            return self.args.replay_weight
        return DEFAULT_REPLAY_WEIGHT.get(self.forget_loss_name, 10.0)

    def prepared(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Clean images with the noise and the timesteps that student and original both see."""
        clean = batch["latents"]
        if "latents_std" in batch:
            clean = clean + batch["latents_std"] * _normal(clean, generator)
        timesteps = torch.randint(*self._timesteps, (len(clean),), generator=generator, device=clean.device)
        noise = _normal(clean, generator)
        return {
            "clean": clean,
            "noise": noise,
            "timesteps": timesteps,
            "noisy": self.schedule.add_noise(clean, noise, timesteps),
            "conditioning": batch.get("conditioning", {}),
            "neutral": batch.get("neutral", {}),
        }

    @property
    def _timesteps(self) -> tuple[int, int]:
        """First timestep that noise is drawn from, and the one after the last."""
        low, high = (round(share * len(self.schedule)) for share in self.args.t_range)
        low = min(low, len(self.schedule) - 1)  # a share above the last timestep, [0.99, 1] of 20
        return low, max(high, low + 1)

    def predictions(self, forward: Callable, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the denoiser answers, and what the true noise would have it answer, `[batch, channels, height, width]`, fp32."""
        answer = None if self._together is None else self._together.answer(self._answer, forward, batch)
        answer = self._answer(forward, batch) if answer is None else answer
        return answer.float(), self.schedule.target(batch["clean"], batch["noise"], batch["timesteps"])

    def _answer(self, forward: Callable, batch: Batch) -> Tensor:
        times = self.schedule.times(batch["timesteps"])
        return self.architecture.call(forward, batch["noisy"], times, batch["conditioning"])

    _together: Together | None = None  # what a step asks about at once

    def _error(self, answer: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """w_t times the mean squared error over pixels, `[batch]`."""
        weights = self.schedule.weights(batch["timesteps"], self.args.loss_weighting, self.args.snr_gamma)
        return weights * (answer - target).square().flatten(1).mean(1)

    def task_loss(self, model: Callable, batch: Batch) -> Tensor:
        """The weighted denoising error of each example, `[batch]`."""
        return self._error(*self.predictions(model, batch), batch)

    def forget_loss(self, model: Callable, batch: Batch) -> Tensor:
        """What is minimised on noisy forget images, `[batch]`, or a scalar."""
        name = self.forget_loss_name
        if name == "redirect":
            asked = self.answer_without(batch)  # first, while no graph is in memory
            return self._error(self.predictions(model, batch)[0], asked, batch)
        if name == "uniform":
            return self._error(self.predictions(model, batch)[0], self._answer_of_noise(batch), batch)
        error = self.task_loss(model, batch)
        if name == "ascent":
            return losses.ascent(error)
        if name == "match":
            return losses.match(error, self.heldout_loss)
        # −log p of an image, up to a constant: half the squared error of all its pixels.
        pixels = batch["clean"][0].numel() / 2
        reference_error = self.task_loss(self.reference_forward, batch)
        return losses.npo(pixels * error, pixels * reference_error, self.args.preference_beta) / pixels

    def answer_without(self, batch: Batch) -> Tensor:
        """What the original would answer had it never seen the forgotten kind: the target of `redirect`. A method's own."""
        raise NotImplementedError

    def _answer_of_noise(self, batch: Batch) -> Tensor:
        """As Selective Amnesia's surrogate (arXiv 2305.10120): what would be right if the clean image were uniform noise."""
        surrogate = (torch.erf(batch["noise"] / 2**0.5)).roll(1, 0).flip(-1)  # uniform in [−1, 1], of others
        true = self.schedule.target(batch["clean"], batch["noise"], batch["timesteps"])
        return true + self.schedule.shift(surrogate - batch["clean"], batch["timesteps"])

    def replay_inputs(self, batch: Batch, generator: torch.Generator) -> Batch:
        """As many noisy samples of the original's own as there are forget images."""
        kept = self.own.kept
        rows = torch.randint(len(kept), (len(batch["clean"]),), generator=generator, device=batch["clean"].device)
        return self.prepared(self._prepare_inputs(kept[rows.cpu()]), generator)

    def replay_loss(self, model: Callable, batch: Batch) -> Tensor:
        """Squared distance to what the original answers on its own samples ([`kept_answer`]), `[batch]`."""
        kept = self.kept_answer(batch)
        return self._error(self.predictions(model, batch)[0], kept, batch)

    def kept_answer(self, batch: Batch) -> Tensor:
        """What the student is to answer on samples of the original that are to be kept. Default: what the original does."""
        with torch.no_grad():
            return self.predictions(self.reference_forward, batch)[0]

    def _compute_fisher(self) -> dict[str, Tensor]:
        return gaussian_fisher(
            self.model,
            self._batches(self.forget_dataset, self.args.fisher_examples),
            lambda batch: self.predictions(self.model, batch)[0],
            generator=torch.Generator(self.args.device).manual_seed(self.args.seed),
        )

    # What the guard looks at

    utility_kind = "divergence"

    @property
    def utility_tolerance(self) -> float:
        return DEFAULT_TOLERANCE if self.args.utility_tolerance is None else self.args.utility_tolerance

    @property
    def has_utility(self) -> bool:
        return self.own is not None or self.retain_dataset is not None

    def utility(self, model: Callable | None = None) -> float:
        """How far the answers on kept images are from what they should be, as a share of the original's own error there.

        With prompts: how far the *guided* answers are from the original's, which is what the sampler sees. Guidance by s multiplies what
        was lost of a prompt's effect by s, and of its squared error by s².
        """
        model = self.model if model is None else model
        loss, kept = (self.task_loss, self.retain_dataset) if self.own is None else (self.replay_loss, self.own.kept)
        if self.guidance > 1:
            loss = self._guided_loss
        return self.mean_of(lambda batch: loss(model, batch), kept) / self._own_error

    @cached_property
    def guidance(self) -> float:
        """The scale of classifier-free guidance that is drawn with; 1 for none, also where the denoiser is told the scale instead."""
        return self.architecture.free_guidance(self.args.guidance_scale)

    def answers(self, forward: Callable, *batches: Batch) -> tuple[Tensor, ...]:
        """What the denoiser answers to each of several batches, which are one pass."""
        return self._answer(forward, joined(batches)).float().split([len(batch["noisy"]) for batch in batches])

    def guided(self, forward: Callable, batch: Batch, scale: float | None = None) -> Tensor:
        """What the sampler sees: ε(∅) + s (ε(c) − ε(∅)), s a guidance scale, by default that which is drawn with (arXiv 2207.12598)."""
        return self.guide(*self.both_answers(forward, batch), scale)

    def guide(self, answer: Tensor, unprompted: Tensor, scale: float | None = None) -> Tensor:
        """ε(∅) + s (ε(c) − ε(∅)) of answers that are at hand."""
        return unprompted + (self.guidance if scale is None else scale) * (answer - unprompted)

    def both_answers(self, forward: Callable, batch: Batch) -> tuple[Tensor, Tensor]:
        """ε(c) and ε(∅)."""
        return self.answers(forward, batch, self.without_words(batch))

    def without_words(self, batch: Batch) -> Batch:
        """The batch as it is shown to the sampler's unprompted half."""
        empty = {name: self._empty[name].expand_as(told) for name, told in batch["conditioning"].items()}
        return {**batch, "conditioning": empty}

    def _guided_loss(self, model: Callable, batch: Batch) -> Tensor:
        return self._error(self.guided(model, batch), self.guided(self.reference_forward, batch), batch)

    @cached_property
    def _empty(self) -> dict[str, Tensor]:
        told, _ = encode_prompts([""], self.pipeline, device=self.args.device)
        return self.architecture.unprompted({name: table.to(self.args.device) for name, table in told.items()})

    @cached_property
    def _own_error(self) -> float:
        kept = self.retain_dataset if self.own is None else self.own.kept
        return self.mean_of(lambda batch: self.task_loss(self.reference_forward, batch), kept)

    # How a run came out

    _divergence_unit = ""  # it is a share of the original's own error
    _figure_names = {"error": ("denoising_error", "Denoising error on the forget set", "", 1)}

    def forget_figures(self, model: Callable) -> dict[str, float]:
        """Of the forget set: `error`, the denoising error, and where the forget loss has a target `away`, the distance to it."""
        figures = {"error": self.mean_of(lambda batch: self.task_loss(model, batch), self.forget_dataset)}
        figures["loss"] = figures["error"]
        if self.forget_loss_name in ("redirect", "uniform"):
            figures["away"] = self.mean_of(lambda batch: self.forget_loss(model, batch), self.forget_dataset)
        return figures

    def _way(self, outcome: Outcome) -> float | None:
        """Share of the way from the original's answers to those that are asked for; None where nothing is asked for."""
        away = outcome.original.get("away")
        return 1 - outcome.now["away"] / away if away else None

    def _forgotten_how_far(self, outcome: Outcome) -> str:
        now, original = outcome.now, outcome.original
        said = f"the denoising error on the forget set is {now['error']:.4g} ({original['error']:.4g} before"
        said += ")" if self.heldout_loss is None else f", target {self.heldout_loss:.4g})"
        way = self._way(outcome)
        return said if way is None else f"{said}, and the answers went {100 * way:.0f} % of the way that was asked for"

    def _as_before(self, outcome: Outcome) -> str | None:
        way = self._way(outcome)
        if way is not None:
            return f"the answers went {100 * way:.0f} % of the way that was asked for" if way < LITTLE else None
        now, original = outcome.now["error"], outcome.original["error"]
        if now <= (1 + UNCHANGED) * original:
            return f"a denoising error of {now:.4g}, {original:.4g} before"
        return None

    def evaluation_loop(self, *args, **kwargs):
        self._noise = self._generator(LOOKING)  # the same noise and timesteps at every evaluation
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The denoising error of a batch."""
        batch = self.prepared(self._prepare_inputs(self.each_once(inputs)), self._noise)
        with torch.no_grad():
            return self.task_loss(model, batch).mean(), None, None


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
