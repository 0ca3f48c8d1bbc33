"""The keys of `hf-unlearn app`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...training.checks import SEEDS, check_fields
from .checks import check_device


LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass
class AppJob:
    """What `hf-unlearn app` opens, and where it listens.

    Args:
        open (`list[str]`, *optional*): folders or ids: a pipeline, one that was saved with its filter, a pipeline and a filter, an original and
            its unlearned pipeline, or a filter alone. `"digits-gan"` and its kin are small models, trained on first use. Default:
            `"digits-gan"`.
        prompts (`list[str]`, *optional*): what a prompted pipeline is asked for at first, in turn.
        encoder (`str`, *optional*): what a new filter sees images with: `"digits"`, a folder or an id of an image model. Default: the
            generator's own latents, of a [`GANPipeline`].
        num_inference_steps, guidance_scale (*optional*): of a diffusion pipeline at first. Default: its own.
        seed (`int`, defaults to 0): of all samples, at first.
        batch_size (`int`, defaults to 16): images drawn at a time.
        device (`str`, *optional*): as in `"cuda"`. Default: a GPU, if there is one.
        dtype (`"float16"` | `"bfloat16"`, *optional*): of the pipelines' weights. Default: float32.
        output_dir (`str`, *optional*): gets a folder for each filter that is saved. `null` leaves saving out, and other
            encoders than `encoder`: for an app that anybody visits. Default: `"app"`.
        host (`str`, *optional*): address to listen at. Default: 127.0.0.1, which no other machine reaches; with another one nothing is
            published from the page, since it would be with your token.
        port (`int`, *optional*): to listen at, 1 to 65535. Default: the first free one from 7860 on.

    Raises:
        ValueError: a value that is not allowed.
    """

    open: list[str] | None = None
    prompts: list[str] | None = None
    encoder: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    batch_size: int = 16
    device: str | None = None
    dtype: Literal["float16", "bfloat16"] | None = None
    output_dir: str | None = "app"
    host: str | None = None
    port: int | None = None

    def __post_init__(self):
        if self.open is not None and not 1 <= len(self.open) <= 2:
            raise ValueError(f"open: {len(self.open)} are named; name one, or two that belong together")
        if self.open is not None and len(set(self.open)) < len(self.open):
            raise ValueError(f"open: {self.open[0]!r} is named twice; an original and what it became are two folders")
        if self.prompts is not None and not (self.prompts and all(prompt.strip() for prompt in self.prompts)):
            raise ValueError("prompts: has nothing to ask for; list some, or leave it out")
        check_fields(self, {"≥ 1": ("batch_size", "num_inference_steps", "port"), SEEDS: ("seed",)})
        if self.port is not None and self.port > 65535:
            raise ValueError(f"port={self.port}: must be from 1 to 65535")
        if self.output_dir is not None and Path(self.output_dir).is_file():
            raise ValueError(f"output_dir: {self.output_dir!r} is a file; name a folder")
        check_device(self.device)

    @property
    def is_for_others(self) -> bool:
        """Whether other machines reach the page."""
        return self.host is not None and self.host not in LOOPBACK
