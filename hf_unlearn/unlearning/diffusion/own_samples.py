"""Generative replay: what the frozen original draws by itself, without what is to be forgotten.

A generator can be asked for the data it was trained on. Those of its samples that do not show the forgotten kind say what is
to be kept, and no retained data is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from .encoded import EncodedImages


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
    marks: Callable[[Tensor], Tensor] | None,
    images: Tensor | None = None,
) -> OwnSamples:
    """Take away the samples of the forgotten kind.

    Args:
        samples (`EncodedImages`): what the original draws.
        forget (`EncodedImages`): the forget images.
        marks (callable, *optional*): images `[n, channels, height, width]` in [−1, 1] to bool `[n]`, True for the forgotten
            kind. Default: [`resembles`] the forget images.
        images (`Tensor`, *optional*): the samples as images, where the latents are none.

    Raises:
        ValueError: `marks` gives something else, or nothing is left.
    """
    if marks is None:
        marked = resembles(samples.latents, forget.latents)
    else:
        marked = torch.as_tensor(marks(samples.latents if images is None else images)).cpu()
        if marked.shape != (len(samples),) or marked.dtype != torch.bool:
            raise ValueError(
                f"replay_filter: gave {marked.dtype} of shape {tuple(marked.shape)} for {len(samples)} images; it must mark "
                "each with True (forgotten kind) or False"
            )
    if marked.all():
        raise ValueError(
            f"replay_samples: all {len(samples)} samples of the original are of the forgotten kind, so nothing is left to "
            "keep; pass other replay_prompts, a replay_filter or more samples"
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
