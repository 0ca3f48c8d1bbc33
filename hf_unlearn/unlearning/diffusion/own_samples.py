"""Generative replay: what the frozen original draws by itself, without what is to be forgotten.

A generator can be asked for the data it was trained on. Those of its samples that do not show the forgotten kind say what is
to be kept, and no retained data is needed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from ...files import PRIVATE, save_tensors
from ...images import decode
from ...parameters.reference import ReferencePoint
from .architecture import Architecture
from .denoiser import is_prompted
from .drawing import generate
from .encoded import EncodedImages, encode_prompts


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


logger = logging.getLogger(__name__)

# Seeds of what is drawn, apart from each other: the grids' noise must not be that of the replay.
FORGET_SEED, REPLAY_SEED = 1, 2


@dataclass(frozen=True)
class OwnSamples:
    """The original's samples, parted.

    Attributes:
        kept (`EncodedImages`): those without the forgotten kind.
        share (`float`): of the forgotten kind among all that were drawn, in [0, 1].
    """

    kept: EncodedImages
    share: float


def part(
    samples: EncodedImages,
    forget: EncodedImages,
    marker: Callable[[Tensor], Tensor] | None,
    images: Tensor | None = None,
) -> OwnSamples:
    """Take away the samples of the forgotten kind.

    Args:
        samples (`EncodedImages`): what the original draws.
        forget (`EncodedImages`): the forget images.
        marker (callable, *optional*): images `[n, channels, height, width]` in [−1, 1] to bool `[n]`, True for the forgotten
            kind. Default: [`resembles`] the forget images.
        images (`Tensor`, *optional*): the samples as images, where the latents are none.

    Raises:
        ValueError: `marker` gives something else, or nothing is left.
    """
    if marker is None:
        marked = resembles(samples.latents, forget.latents)
    else:
        marked = torch.as_tensor(marker(samples.latents if images is None else images)).cpu()
        if marked.shape != (len(samples),) or marked.dtype != torch.bool:
            raise ValueError(
                f"marker: gave {marked.dtype} of shape {tuple(marked.shape)} for {len(samples)} images; it must mark "
                "each with True (forgotten kind) or False"
            )
    if marked.all():
        raise ValueError(
            f"own_samples: all {len(samples)} samples of the original are of the forgotten kind, so nothing is left to "
            "keep; pass other replay_prompts, a marker or more samples"
        )
    return OwnSamples(samples.select(~marked), marked.float().mean().item())


def resembles(samples: Tensor, forget: Tensor, *, neighbors: int = 10, crowd: int = 10) -> Tensor:
    """Which samples lie among the forget images rather than among other samples: no classifier, no labels.

    A sample is marked if forget images are at least half as frequent among its nearest neighbours as they are among those
    of the typical forget image. The neighbours are looked for among the forget images and `crowd` times as many samples,
    so that the number of samples does not matter.

    Args:
        samples (`Tensor`): `[n, …]`.
        forget (`Tensor`): `[m, …]`.
        neighbors (`int`): how many neighbours are asked, in Euclidean distance; at most half of the forget images.
        crowd (`int`): samples that stand beside each forget image.

    Returns:
        `Tensor`: bool, `[n]`.
    """
    size = len(forget)
    bank = torch.cat([forget, samples[: crowd * size]]).flatten(1).float().numpy()
    count = max(1, min(neighbors, size // 2, len(bank) - 1))
    search = NearestNeighbors(n_neighbors=count).fit(bank)

    def forgotten_share(nearest) -> Tensor:
        return torch.from_numpy(nearest < size).float().mean(1)

    among = forgotten_share(search.kneighbors(return_distance=False))  # of the bank's own rows, each without itself
    outside = samples[crowd * size :].flatten(1).float().numpy()
    if len(outside):
        among = torch.cat([among, forgotten_share(search.kneighbors(outside, return_distance=False))])
    return among[size:] >= 0.5 * among[:size].median().clamp(min=1 / count)


class OwnSamplesMixin:
    """Draws the original's own samples once and keeps them in `_private/`; and draws from the model as it is."""

    pipeline: DiffusionPipeline
    architecture: Architecture
    marker: Callable[[Tensor], Tensor] | None
    replay_prompts: list[str]

    def drawn(self, args: Any, what: int | list[str], seed: int, name: str) -> EncodedImages:
        """Samples of the original: read from `_private/` where the same model has drawn the same before."""
        settings = {
            "what": what,
            "seed": [args.seed, seed],
            "steps": args.num_inference_steps,
            "guidance": args.guidance_scale,
            "scheduler": {k: v for k, v in self.pipeline.scheduler.config.items() if k[0] != "_"},
            "model": _fingerprint(self.architecture.denoiser),
        }
        key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        file = Path(args.output_dir, PRIVATE, f"{name}.safetensors")
        with args.main_process_first(desc=f"drawing {name} samples"):
            latents = _read(file, key)
            if latents is None:
                logger.info("drawing %s samples from the original", what if isinstance(what, int) else len(what))
                latents = generate(
                    self.pipeline.to(args.device),
                    what,
                    seed=1000 * args.seed + seed,
                    num_inference_steps=args.num_inference_steps,
                    guidance_scale=args.guidance_scale,
                    batch_size=args.batch_size,
                    latents=is_prompted(self.pipeline),
                )
                if args.should_save:
                    save_tensors({"latents": latents}, file, {"key": key})
        if not torch.isfinite(latents).all():
            raise ValueError(
                "pipeline: the original's own samples are not finite; its weights or its scheduler are broken"
            )
        if not is_prompted(self.pipeline):
            return EncodedImages(latents)
        told = encode_prompts(what, self.pipeline, device=args.device, guidance_scale=args.guidance_scale)
        return EncodedImages(latents, None, *told, sorted(set(what)))

    def own_samples(self, forget: EncodedImages, given: EncodedImages | None) -> OwnSamples | None:
        """What the original draws apart from the forgotten kind; None where nothing is to be drawn."""
        args, prompted = self.args, is_prompted(self.pipeline)
        if given is None and not args.own_samples:
            return None
        samples = given
        if samples is None:
            prompts = self.replay_prompts
            what = [prompts[i % len(prompts)] for i in range(args.own_samples)] if prompted else args.own_samples
            samples = self.drawn(args, what, REPLAY_SEED, "replay")
        if prompted and self.marker is None:  # the prompts say what is kept
            return OwnSamples(samples, 0.0)
        images = decode(samples.latents, self.pipeline, batch_size=args.batch_size) if prompted else None
        parted = part(samples, forget, self.marker, images)
        logger.info("%d of %d own samples are kept", len(parted.kept), len(samples))
        if parted.share == 0:
            logger.warning(
                "marker: none of %d own samples was taken for the forgotten kind; if the model draws it, they are replayed; "
                "pass a classifier as marker",
                len(samples),
            )
        if parted.share > 0.8:
            logger.warning(
                "forget_dataset: %.0f %% of what the original draws is of its kind; it looks like the whole data, and little "
                "is left to keep",
                100 * parted.share,
            )
        return parted

    # What the model draws now

    def draw(self, count: int, seed: int) -> Tensor:
        """Samples of the model as it is now, by the run's settings; with prompts, of the forgotten and the kept ones in turn.

        Args:
            seed (`int`): of one use; the run's own seed is added. No random state changes.

        Returns:
            `Tensor`: `[count, channels, height, width]` in [−1, 1], on the CPU.
        """
        prompts = self.sample_prompts
        return self._drawn(
            [prompts[i % len(prompts)] for i in range(count)] if is_prompted(self.pipeline) else count, seed
        )

    def _drawn(self, what: int | list[str], seed: int) -> Tensor:
        args = self.args
        return generate(
            self.pipeline.to(args.device),
            what,
            seed=1000 * args.seed + seed,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            batch_size=args.batch_size,
        )

    @contextmanager
    def as_original(self) -> Iterator[None]:
        """The model as it was before the first step, for the time of a `with` block."""
        now = ReferencePoint.capture(self.model)
        self.reference.restore(self.model)
        try:
            yield
        finally:
            now.restore(self.model)

    @property
    def sample_prompts(self) -> list[str]:
        """With prompts: what grids and figures show, the forgotten concept beside what is kept."""
        return list(dict.fromkeys([*self.forget_prompts, *self.replay_prompts[:4]]))


def _fingerprint(model: torch.nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(file: Path, key: str) -> Tensor | None:
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as stored:
            return stored.get_tensor("latents") if (stored.metadata() or {}).get("key") == key else None
    except SafetensorError:  # not what was written
        return None
