"""Mean and variance of a model's parameters over several checkpoints of one training run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.trainer_utils import sort_checkpoints

from ..files import save_tensors, undamaged


# Where weights are looked for. Each library prefers one of its two files when a folder holds both; so do we.
WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
)
SHARDS = ("diffusion_pytorch_model-*-of-*.safetensors", "model-*-of-*.safetensors")


@dataclass(frozen=True)
class ParameterMoments:
    r"""Mean and variance of every parameter over K checkpoints θ⁽¹⁾ … θ⁽ᴷ⁾ of one training run:

    $$ \mu_i = \frac{1}{K} \sum_k \theta_i^{(k)}, \qquad v_i = \frac{1}{K-1} \sum_k (\theta_i^{(k)} - \mu_i)^2 $$

    the diagonal Gaussian of SWAG (arXiv 1902.02476) and the prior of variational diffusion unlearning (arXiv
    2510.04058). SWAG divides by K; with the few checkpoints that unlearning has, that is too small by a fifth at K = 5,
    so this is the unbiased estimate. Runs from different initialisations must not be mixed: their parameters do not
    correspond.

    Attributes:
        mean (`dict[str, Tensor]`): μ, fp32, on the CPU.
        variance (`dict[str, Tensor]`): v, fp32, same names and shapes; all zeros if `count` is 1.
        count (`int`): K ≥ 1.
    """

    mean: dict[str, Tensor]
    variance: dict[str, Tensor]
    count: int

    @classmethod
    def from_checkpoints(
        cls,
        checkpoints: str | Path | Sequence[str | Path],
        like: Mapping[str, Tensor],
        *,
        subfolder: str = "unet",
    ) -> ParameterMoments:
        """Read safetensors checkpoints, one parameter at a time: memory is two fp32 copies of `like` and a few tensors of
        the size of its largest one, however many checkpoints there are. Nothing else in them is read.

        Args:
            checkpoints (`str`, `Path` or a sequence of them): folders or Hub ids. A folder is a diffusers or transformers
                model, a pipeline, or a trainer's `checkpoint-<step>`; weights may be sharded and of any float type. One
                folder alone that holds `checkpoint-<step>` folders stands for all of these.
            like (`Mapping[str, Tensor]`): the parameters that are wanted, by their names in the files; only names and
                shapes count. A model that `from_pretrained` renames while loading (ViT, old diffusers attention) is
                refused as another architecture.
            subfolder (`str`): where a pipeline or a checkpoint keeps the model, `"unet_ema"` for diffusers' averaged
                weights. Weights beside it are used only if it has none.

        Raises:
            ValueError: there are no checkpoints, or one is given twice, is not there, is not readable safetensors, is of
                another architecture or holds NaN or infinity; or several do not differ in any wanted parameter.
        """
        if not like:
            raise ValueError("like: it is empty; give the parameters whose moments are wanted")
        labels = _expand(checkpoints)
        if not labels:
            raise ValueError("checkpoints: the list is empty; give at least one, or two for a variance")
        weights = [_weights(label, subfolder) for label in labels]
        for i, file in enumerate(weights):
            if file.parent.resolve() in {earlier.parent.resolve() for earlier in weights[:i]}:
                raise ValueError(f"checkpoints: {labels[i]} is given twice")
        mean, variance = {}, {}
        with ExitStack() as stack:
            opened = {label: _open(file, like, stack) for label, file in zip(labels, weights, strict=True)}
            for name in like:
                mean[name], variance[name] = _mean_and_variance(_read(opened, name))
        if len(labels) > 1 and not any(v.any() for v in variance.values()):
            raise ValueError(f"checkpoints: all {len(labels)} hold the same parameters, so there is no variance")
        return cls(mean, variance, len(labels))

    def precision(self, floor: float) -> dict[str, Tensor]:
        r"""The weights of Σᵢ Pᵢ (θᵢ − μᵢ)², as [`~hf_unlearn.parameters.anchors.QuadraticAnchor`] takes them:

        $$ P_i = \frac{1}{2 \max(v_i,\ \text{floor} \cdot \bar v)}, \qquad \bar v = \text{mean of } v \text{ over all parameters} $$

        Args:
            floor (`float`): > 0, a share of the mean variance; without it a parameter that never moved could not move.

        Returns:
            `dict[str, Tensor]`: P, fp32, between 1/(2 max v) and 1/(2 floor·v̄).

        Raises:
            ValueError: `floor` is not a positive number, or the moments are of a single checkpoint.
        """
        if not 0 < floor < float("inf"):
            raise ValueError(f"floor={floor}: it is a share of the mean variance and must be > 0")
        if self.count < 2:
            raise ValueError("checkpoints: a single one has no variance, so no precision; give two or more")
        total = torch.stack([v.sum(dtype=torch.float64) for v in self.variance.values()]).sum().item()
        lowest = floor * total / sum(v.numel() for v in self.variance.values())
        return {name: 0.5 / v.clamp(min=lowest) for name, v in self.variance.items()}

    def save(self, path: str | Path) -> None:
        """Write to one `.safetensors` file, complete or not at all."""
        tensors = {f"mean/{name}": tensor for name, tensor in self.mean.items()}
        tensors |= {f"variance/{name}": tensor for name, tensor in self.variance.items()}
        save_tensors(tensors, path, {"count": str(self.count)})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> ParameterMoments:
        """Read what [`~ParameterMoments.save`] wrote.

        Raises:
            ValueError: the file is missing or damaged.
        """
        parts: dict[str, dict[str, Tensor]] = {"mean": {}, "variance": {}}
        with undamaged(path), safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                kind, name = key.split("/", 1)
                parts[kind][name] = file.get_tensor(key).to(device)
            return cls(parts["mean"], parts["variance"], int(file.metadata()["count"]))


def _expand(checkpoints: str | Path | Sequence[str | Path]) -> list[str]:
    checkpoints = [checkpoints] if isinstance(checkpoints, str | Path) else list(checkpoints)
    if len(checkpoints) == 1:
        steps = [p for p in sort_checkpoints(str(checkpoints[0])) if re.fullmatch(r"checkpoint-\d+", Path(p).name)]
        checkpoints = steps or checkpoints
    return [str(checkpoint) for checkpoint in checkpoints]


def _weights(checkpoint: str, subfolder: str) -> Path:
    """The file of a checkpoint to start reading at: its weights, or their index."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        # Whole names, because "*" matches "/" here: "*.safetensors" is every file of every model of a pipeline.
        files = [*WEIGHT_FILES, *SHARDS]
        try:
            folder = Path(snapshot_download(checkpoint, allow_patterns=files + [f"{subfolder}/{f}" for f in files]))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"checkpoints: {checkpoint} is neither a folder nor a Hub model within reach ({type(error).__name__})"
            ) from error
    for place in (folder / subfolder, folder):
        for name in WEIGHT_FILES:
            if (place / name).is_file():
                return place / name
    raise ValueError(
        f"checkpoints: {checkpoint} holds no {WEIGHT_FILES[1]} or {WEIGHT_FILES[2]}, nor does its {subfolder}/; "
        "only safetensors are read"
    )


def _open(weights: Path, like: Mapping[str, Tensor], stack: ExitStack) -> dict[str, Any]:
    """For every wanted parameter the open file that holds it; names and shapes are checked, no tensor is read."""
    file = weights
    try:
        if weights.suffix == ".json":
            shards = json.loads(weights.read_text(encoding="utf-8"))["weight_map"]
            opened = {}
            for file in sorted({weights.with_name(shards[name]) for name in like if name in shards}):
                opened[file.name] = stack.enter_context(safe_open(file, "pt"))
            found = {name: opened[shards[name]] for name in like if name in shards}
        else:
            whole = stack.enter_context(safe_open(file, "pt"))
            found = dict.fromkeys(whole.keys(), whole)
        shapes = {name: tuple(found[name].get_slice(name).get_shape()) for name in like if name in found}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"checkpoints: {file} cannot be read ({error})") from error
    for name, tensor in like.items():
        if name not in found:
            raise ValueError(f"checkpoints: {weights} is of another architecture, it has no {name}")
        if shapes[name] != tuple(tensor.shape):
            raise ValueError(
                f"checkpoints: {weights} is of another architecture, its {name} has shape {shapes[name]}, "
                f"not {tuple(tensor.shape)}"
            )
    return found


def _read(opened: Mapping[str, Mapping[str, Any]], name: str) -> Iterable[Tensor]:
    for label, files in opened.items():
        tensor = files[name].get_tensor(name).float()
        if not tensor.isfinite().all():
            raise ValueError(f"checkpoints: {label} holds NaN or infinity in {name}")
        yield tensor


def _mean_and_variance(tensors: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Welford's updates, on differences from the first tensor: fp32 has them exactly where a parameter hardly moves."""
    tensors = iter(tensors)
    first, count = next(tensors), 1
    mean, squares = torch.zeros_like(first), torch.zeros_like(first)
    for count, tensor in enumerate(tensors, start=2):
        change = tensor - first - mean
        mean.add_(change, alpha=1 / count)
        squares.addcmul_(change, change, value=(count - 1) / count)
    return first + mean, squares / max(count - 1, 1)
