"""Images and prompts in: what a denoiser sees of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from ...images import image_column, look, pixels, to_latents
from .architecture import AT_ONCE, PROMPT_COLUMNS, cast
from .pipelines import architecture_of
from .text_side import TextSide, quiet, tell_of_length


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class EncodedImages(TorchDataset):
    """Images as the denoiser sees them, in memory on the CPU, with what it is told about them.

    Args:
        latents (`Tensor`): clean inputs, `[n, channels, height, width]`: images in [−1, 1], or means of VAE latents, scaled.
        latents_std (`Tensor`, *optional*): standard deviation of the VAE's posterior, same shape; each use draws from it.
        conditioning (`dict[str, Tensor]`): keyword arguments of the denoiser's forward, a row of a table each.
        rows (`Tensor`, *optional*): `[n]`, the row of the tables that belongs to each image.
        prompts (`list[str]`): the prompt of each row of the tables; empty where they are not known.
    """

    def __init__(
        self,
        latents: Tensor,
        latents_std: Tensor | None = None,
        conditioning: dict[str, Tensor] | None = None,
        rows: Tensor | None = None,
        prompts: Sequence[str] = (),
    ):
        self.latents, self.latents_std = latents, latents_std
        self.conditioning = conditioning or {}
        self.rows = torch.arange(len(latents)) if rows is None else rows
        self.prompts = list(prompts)
        self.neutral: dict[
            str, Tensor
        ] = {}  # tables like those of the conditioning, of what each prompt is redirected to

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int | Tensor) -> dict[str, Any]:
        """One image, or a batch of those that a tensor of indices names."""
        item = {"latents": self.latents[index]}
        if self.latents_std is not None:
            item["latents_std"] = self.latents_std[index]
        for name, tables in (("conditioning", self.conditioning), ("neutral", self.neutral)):
            if tables:
                item[name] = {argument: table[self.rows[index]] for argument, table in tables.items()}
        return item

    def select(self, keep: Tensor) -> EncodedImages:
        """The images that a mask or a list of indices names."""
        std = None if self.latents_std is None else self.latents_std[keep]
        return EncodedImages(self.latents[keep], std, self.conditioning, self.rows[keep], self.prompts)


@torch.no_grad()
def encode(
    dataset: Any,
    pipeline: DiffusionPipeline,
    *,
    device: torch.device | str,
    resize: bool = False,
    batch_size: int = 8,
    argument: str = "forget_dataset",
    guidance_scale: float | None = None,
) -> EncodedImages:
    """What the denoiser sees of a dataset of images (and prompts).

    Args:
        dataset: rows with `image` (PIL) or `pixel_values` (in [−1, 1]) and, for a prompted model, `prompt`, `text` or
            `caption` (for one that is told a class also `label`).
        device: where VAE and text encoder run.
        argument (`str`): what to call the dataset in an error.
        guidance_scale (`float`, *optional*): as of [`encode_prompts`].

    Raises:
        ValueError: a column is missing, or an image does not fit the model.
    """
    if len(dataset) == 0:
        raise ValueError(f"{argument}: is empty; pass rows, or leave it out")
    first = dataset[0]
    column = image_column(first, argument)
    architecture = architecture_of(pipeline)
    prompted, shape = architecture.is_prompted, architecture.resolution
    prompt_column = next((name for name in architecture.columns if name in first), None)
    if prompted and prompt_column is None:
        raise ValueError(
            f"{argument}: prompts are missing for a prompted model; add a column named one of {', '.join(architecture.columns)}"
        )
    means, stds, prompts = [], [], []
    look(dataset, column, shape, resize=resize, argument=argument)
    for begin in range(0, len(dataset), batch_size):
        rows = [dataset[row] for row in range(begin, min(begin + batch_size, len(dataset)))]
        for name in (column, prompt_column) if prompted else (column,):
            if empty := [begin + row for row, values in enumerate(rows) if values[name] is None]:
                raise ValueError(f"{argument}: row {empty[0]} has no {name}; remove it or fill it in")
        images, numbers = [row[column] for row in rows], range(begin, begin + len(rows))
        images = pixels(images, shape, resize=resize, argument=argument, rows=numbers, whole=False)
        if not prompted:
            means.append(images)
            continue
        prompts += [str(row[prompt_column]) for row in rows]
        mean, std = to_latents(images, pipeline.vae.to(device), device)
        means.append(mean)
        stds.append(std)
    if not prompted:
        return EncodedImages(torch.cat(means))
    told = encode_prompts(prompts, pipeline, device=device, guidance_scale=guidance_scale)
    return EncodedImages(torch.cat(means), torch.cat(stds), *told, sorted(set(prompts)))


@torch.no_grad()
def encode_prompts(
    prompts: Sequence[str],
    pipeline: DiffusionPipeline,
    *,
    device: torch.device | str,
    guidance_scale: float | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """`(conditioning, rows)`: each different prompt once, in sorted order, as keyword arguments of the denoiser, and which one each is.

    Args:
        guidance_scale (`float`, *optional*): what a denoiser is told that takes the scale as an input (latent consistency, arXiv
            2310.04378). Default: the pipeline's own.
    """
    different, architecture = sorted(set(prompts)), architecture_of(pipeline)
    for name in architecture.encoders_there:
        getattr(pipeline, name).to(device)
    if isinstance(architecture, TextSide):
        tell_of_length("prompts", architecture, different)
    with quiet():
        parts = [
            cast(architecture.conditioning(different[begin : begin + AT_ONCE], device, guidance_scale), torch.float32)
            for begin in range(0, len(different), AT_ONCE)
        ]
    place = {prompt: row for row, prompt in enumerate(different)}
    told = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
    return told, torch.tensor([place[prompt] for prompt in prompts])


def prompts_of(dataset: Any, columns: Sequence[str] = PROMPT_COLUMNS) -> list[str]:
    """The different prompts of a dataset, in their order; none where it has no column of them."""
    if dataset is None or len(dataset) == 0:
        return []
    if isinstance(dataset, EncodedImages):
        return dataset.prompts
    column = next((name for name in columns if name in dataset[0]), None)
    if column is None:
        return []
    rows = dataset[column] if isinstance(dataset, Dataset) else (row[column] for row in dataset)
    return list(dict.fromkeys(str(prompt) for prompt in rows if prompt is not None))


def some_prompts(dataset: Any, count: int, columns: Sequence[str] = PROMPT_COLUMNS) -> list[str]:
    """The first different prompts of a dataset, at most `count` of its first hundred rows."""
    rows = [dataset[row] for row in range(min(len(dataset), 100))] if not isinstance(dataset, EncodedImages) else []
    column = next((name for name in columns if rows and name in rows[0]), None)
    return [] if column is None else list(dict.fromkeys(str(row[column]) for row in rows))[:count]
