"""ESD: a prompt's answer moved to the other side of the empty prompt's, from prompts alone (arXiv 2303.07345, ICCV 2023)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...modes import in_eval_mode
from ...parameters.sharding import is_shared
from ...training.checks import check_fields
from ..objective import Batch
from ..outcome import Outcome
from .config import DiffusionUnlearnConfig
from .drawing import steps_of
from .encoded import EncodedImages, encode_prompts
from .trainer import DiffusionUnlearnTrainer


RANGES = {"≥ 0": ("negative_guidance", "start_guidance")}
TRAINED = {"x": ["cross_attention"], "u": ["!cross_attention"]}


@dataclass
class ESDConfig(DiffusionUnlearnConfig):
    """Configuration of [`ESDTrainer`]: [`DiffusionUnlearnConfig`] and these. No image is needed; where nothing is kept beside, none is drawn.

    Other defaults than there, the authors' for Stable Diffusion 1: learning rate 1e-5, 1,000 steps of one prompt, Adam, a plain
    squared error (`loss_weighting="simple"`), no guard and nothing replayed (`own_samples=0`). `t_range` is no setting here.

    > What ESD asks for
        variant (`"x"` | `"u"`, defaults to `"x"`): train cross-attention, for what prompts name (a style, an artist); or everything but
            that, for what shall not be drawn without being named either.
        trainable (`list[str]`, *optional*): instead of what `variant` trains, as in [`DiffusionUnlearnConfig`].
        negative_guidance (`float`, defaults to 1.0): η, how far beyond the answer to the empty prompt.
        start_guidance (`float`, defaults to 3.0): scale of the guidance by which the student draws the noisy images it is trained on.
        num_inference_steps (`int`, *optional*): denoising steps from noise to an image, of which as many are taken as it happens. Default:
            the pipeline's own.
        forget_samples (`int`, defaults to 16): rows of prompts, in turn; figures of the run are means over as many noisy images.
    """

    forget_loss: ClassVar[str] = "redirect"  # class attributes are no fields: ESD has one loss, on all timesteps
    t_range: ClassVar[list[float]] = [0.0, 1.0]

    learning_rate: float = 1e-5
    per_device_train_batch_size: int = 1
    max_steps: int = 1000
    loss_weighting: Literal["simple", "elbo", "min_snr"] = "simple"
    own_samples: int = 0
    guard: bool = False
    forget_samples: int = 16
    variant: Literal["x", "u"] = "x"
    trainable: list[str] | None = None
    negative_guidance: float = 1.0
    start_guidance: float = 3.0

    def _check_unlearn_arguments(self) -> None:
        super()._check_unlearn_arguments()
        check_fields(self, RANGES)
        if not self.forget_prompts:
            raise ValueError("forget_prompts: missing; name prompts that ask for the concept, as ESD takes no images")
        if self.trainable is None:
            self.trainable = list(TRAINED[self.variant])


class ESDTrainer(DiffusionUnlearnTrainer):
    r"""Makes a prompted diffusion model answer a prompt as if it was guided away from it, without any image.

    $$ \big\lVert \epsilon_\theta(x_t, c) - \epsilon_0(x_t, \varnothing) + \eta\,[\epsilon_0(x_t, c) - \epsilon_0(x_t, \varnothing)] \big\rVert^2 $$

    x_t is what the student as it is draws from pure noise, guided towards c, when it is left at a random timestep. Arguments as for
    [`~hf_unlearn.unlearning.diffusion.trainer.DiffusionUnlearnTrainer`], `args` an [`ESDConfig`] with `forget_prompts`.

    ```python
    trainer = ESDTrainer(pipeline=pipe, args=ESDConfig(output_dir="without-van-gogh", forget_prompts=["Van Gogh"]))
    trainer.train()
    ```
    """

    _method = "esd"
    _title = "Erasing concepts (ESD)"
    _paper = "2303.07345"
    _config_class = ESDConfig
    _told = ("variant", "negative_guidance", "start_guidance")
    _figure_names = {"away": ("distance", "Squared distance to the answers that are asked for", "", 1)}

    def _from_prompts(self, args: ESDConfig, prompts: list[str]) -> EncodedImages:
        """Prompts with a place for an image each, which holds none: zeros."""
        shape = self.architecture.latent_shape
        told = encode_prompts(prompts, self.pipeline, device=args.device, guidance_scale=args.guidance_scale)
        return EncodedImages(torch.zeros(1, 1, 1, 1).expand(len(prompts), *shape), None, *told, sorted(set(prompts)))

    @property
    def _times(self) -> Tensor:
        """Timesteps that the student is left at, from pure noise downwards, `[steps]`."""
        steps = steps_of(self.pipeline, self.args.num_inference_steps)
        left = torch.arange(steps, 0, -1, device=self.args.device) / steps
        return (left * len(self.schedule)).round().long() - 1

    @torch.no_grad()
    def prepared(self, batch: Batch, generator: torch.Generator) -> Batch:
        """For a prompt without an image what the student makes of noise by DDIM (arXiv 2010.02502) before it is left at a random timestep.
        `clean` and `noise` are what its last guided answer takes that for.
        """
        if batch["latents"].any():  # of what is kept
            return super().prepared(batch, generator)
        shape, device = batch["latents"].shape, self.args.device
        noise = torch.randn(shape, generator=generator, device=device)
        clean, noisy, times = torch.zeros_like(noise), noise.clone(), self._times
        taken = torch.randint(len(times), (len(noisy),), generator=generator, device=device)
        last = longest = int(taken.max())
        if is_shared(self.model):  # those that share it answer together, also one whose images are all left already
            longest = int(self.accelerator.gather(taken.max()[None]).max())
        with in_eval_mode(self.model):
            for step in range(longest):
                on = (taken > step).nonzero()[:, 0] if step < last else taken.argmax()[None]
                now, later = (times[place].expand(len(on)) for place in (step, step + 1))
                told = {name: value[on] for name, value in batch["conditioning"].items()}
                part = {
                    "clean": clean[on],
                    "noise": noise[on],
                    "noisy": noisy[on],
                    "timesteps": now,
                    "conditioning": told,
                }
                answer = self.guided(self.model, part, self.args.start_guidance)
                if step < last:
                    clean[on], noise[on] = self.schedule.parts(answer, noisy[on], now)
                    noisy[on] = self.schedule.add_noise(clean[on], noise[on], later)
        return {
            "clean": clean, "noise": noise, "noisy": noisy, "timesteps": times[taken], "conditioning": batch["conditioning"],
        }  # fmt: skip

    @torch.no_grad()
    def answer_without(self, batch: Batch) -> Tensor:
        """ε₀(∅) − η (ε₀(c) − ε₀(∅)): guidance with a negative scale."""
        return self.guided(self.reference_forward, batch, -self.args.negative_guidance)

    # How a run came out: without images there is no denoising error

    def forget_figures(self, model: Callable) -> dict[str, Any]:
        """`away`, the squared distance to the answers that are asked for, on what the student draws now."""
        away = self.mean_of(lambda batch: self.forget_loss(model, batch), self.forget_dataset)
        return {"away": away, "loss": away}

    def _forgotten_how_far(self, outcome: Outcome) -> str:
        return f"the answers went {100 * self._way(outcome):.0f} % of the way that was asked for"
