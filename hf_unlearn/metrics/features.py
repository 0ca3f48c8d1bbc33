"""Images in, features out: what distances between sets of images are measured on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files import first_line
from ..images import signed
from ..modes import in_eval_mode
from .moments import Moments


AT_ONCE = 1024  # rows of features that are centred together


@dataclass(frozen=True, eq=False)
class Features:
    """One feature vector an image, and the name of what computed them: figures of different extractors say nothing
    about each other.

    Args:
        values (`Tensor` or array): `[n, d]`; kept as float64, without gradient, where it is.
        extractor (`str`): name of the extractor; it becomes part of every result.

    Raises:
        ValueError: `values` is not a matrix, is empty or has numbers that are not finite.
    """

    values: Tensor
    extractor: str

    def __post_init__(self):
        values = torch.as_tensor(self.values).detach().to(torch.float64)
        if values.ndim != 2 or not values.numel():
            raise ValueError(f"features of {self.extractor!r}: must be [n, d], got {list(values.shape)}")
        if not values.isfinite().all():
            raise ValueError(f"features of {self.extractor!r}: must be finite, got NaN or infinity")
        object.__setattr__(self, "values", values)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def size(self) -> int:
        """Numbers of an image, d."""
        return self.values.shape[1]


class FeatureMoments:
    """Count, mean and covariance of features that come in parts: all that a Fréchet distance asks for, d² numbers of however many images.

    ```python
    reference = FeatureMoments()
    for images in batches:
        reference.update(features_of(images, extractor))
    ```
    """

    def __init__(self):
        self._moments: Moments | None = None
        self.extractor = ""

    def update(self, features: Features) -> FeatureMoments:
        """Take in some more; returns itself.

        Args:
            features ([`Features`]): of some images.

        Raises:
            ValueError: features of another extractor.
        """
        if self._moments is None:
            self._moments, self.extractor = Moments(features.size), features.extractor
        if (self.extractor, self.size) != (features.extractor, features.size):
            raise ValueError(
                f"features: of {features.extractor!r} with {features.size} numbers, others were of {self.extractor!r} with "
                f"{self.size}; use one extractor"
            )
        for rows in features.values.split(AT_ONCE):
            self._moments.update(rows.cpu().numpy())
        return self

    def __len__(self) -> int:
        return 0 if self._moments is None else self._moments.count

    @property
    def size(self) -> int:
        """Numbers of an image, d."""
        return 0 if self._moments is None else len(self._moments.mean)

    @property
    def mean(self) -> Tensor:
        """`[d]`, float64."""
        return torch.from_numpy(self._moments.mean)

    @property
    def covariance(self) -> Tensor:
        """Unbiased, `[d, d]`, float64."""
        return torch.from_numpy(self._moments.covariance)


def check_comparable(
    real: Features | FeatureMoments, fake: Features | FeatureMoments, *, at_least: int, hint: str = ""
) -> None:
    """Raise `ValueError` unless the two come from one extractor and have `at_least` images each."""
    if (real.extractor, real.size) != (fake.extractor, fake.size):
        sides = " and ".join(f"{side.extractor!r} with {side.size}" for side in (real, fake))
        raise ValueError(f"real, fake: must be features of one extractor, got {sides}")
    if min(len(real), len(fake)) < at_least:
        raise ValueError(f"real, fake: need at least {at_least} images each, got {len(real)} and {len(fake)}{hint}")


@torch.no_grad()
def features_of(
    images: Tensor,
    extractor: Callable[[Tensor], Tensor],
    *,
    batch_size: int = 64,
    name: str | None = None,
    value_range: tuple[float, float] | None = None,
) -> Features:
    """Run an extractor over images.

    Args:
        images (`Tensor`): `[n, c, h, w]`, float in `value_range`.
        extractor (callable, e.g. [`ClassifierFeatures`] or any `nn.Module`): takes such images, returns `[n, d]`. A
            module runs in eval mode, on the device of its parameters, and gets its modes back.
        batch_size (`int`, defaults to 64): images at a time.
        name (`str`, defaults to `extractor.name`): goes into the result.
        value_range (`(-1, 1)` or `(0, 1)`, *optional*): of the images. By default (−1, 1), and images without a value below 0 are
            refused, since nearly always they are in [0, 1]: a distance between sets of two ranges says nothing.

    Returns:
        [`Features`]: in the CPU's memory.

    Raises:
        ValueError: the images are not as above, the features are not finite, or there is no name.
    """
    name = name or getattr(extractor, "name", None)
    if not isinstance(name, str):
        raise ValueError(f"name: {type(extractor).__name__} has no `name`, pass one")
    _check(images)
    images = signed(images, "images", value_range=value_range)
    with in_eval_mode(extractor) if isinstance(extractor, nn.Module) else nullcontext():
        return Features(torch.cat([extractor(batch).cpu() for batch in _batches(images, extractor, batch_size)]), name)


class ClassifierFeatures(nn.Module):
    """The features that an image classifier of transformers decides on: the input of its head, one vector an image.

    Called with images `[n, c, h, w]`, float in [-1, 1], it returns `[n, d]`. Images are resized to the size that the
    classifier wants (bilinear, antialiased, no cropping), and one channel is repeated where it wants more.

    Args:
        model (`PreTrainedModel`): e.g. `ResNetForImageClassification`, `ViTForImageClassification`.
        processor (image processor, *optional*): its `size`, `image_mean` and `image_std` are followed; by default the
            size is `model.config.image_size`, or else the images' own, and pixels stay in [-1, 1].
        name (`str`, defaults to the model's id, path or class): goes into every result; give one where a path on this
            machine should not.
        head (`str`, defaults to `"classifier"`): name of the submodule that turns features into logits.

    Raises:
        ValueError: the model has no such head.

    Example:

    ```python
    extractor = ClassifierFeatures(AutoModelForImageClassification.from_pretrained("me/digits"))
    reference = features_of(real_images, extractor)
    frechet_distance(reference, features_of(generated_images, extractor)).distance
    ```
    """

    def __init__(self, model: nn.Module, processor: Any = None, *, name: str | None = None, head: str = "classifier"):
        super().__init__()
        self.model = model
        self.name = name or model.config.name_or_path or type(model).__name__
        try:
            model.get_submodule(head)
        except AttributeError:
            raise ValueError(f"head: {type(model).__name__} has no submodule {head!r}, name its last layer") from None
        self.head = head
        self.channels = getattr(model.config, "num_channels", None)
        self.size, self.mean, self.std = getattr(model.config, "image_size", None), 0.5, 0.5
        if processor is not None:
            size = processor.size
            edge = size.get("shortest_edge")
            self.size = (edge, edge) if edge else (size["height"], size["width"])
            if processor.do_normalize:
                self.mean, self.std = processor.image_mean, processor.image_std
            else:
                self.mean, self.std = 0.0, 1.0

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> ClassifierFeatures:
        """Of a folder or an id with an image classifier and its processor.

        Args:
            name (`str` or `Path`): what `from_pretrained` of transformers takes.
            kwargs: as for [`ClassifierFeatures`]; `name` defaults to the last part of the path or the id.

        Raises:
            OSError, ValueError: of transformers, where there is no such thing.
        """
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        model = AutoModelForImageClassification.from_pretrained(name).eval()
        return cls(model, AutoImageProcessor.from_pretrained(name), **({"name": Path(name).name} | kwargs))

    def forward(self, images: Tensor) -> Tensor:
        return self._features_and_logits(images)[0]

    @torch.no_grad()
    def classify(self, images: Tensor, *, batch_size: int = 64) -> Tensor:
        """The most likely class of every image.

        Args:
            images (`Tensor`): `[n, c, h, w]`, float in [-1, 1].
            batch_size (`int`, defaults to 64): images at a time.

        Returns:
            `Tensor`: `[n]`, int64, in the CPU's memory.
        """
        with in_eval_mode(self):
            logits = (self._features_and_logits(batch)[1] for batch in _batches(images, self, batch_size))
            return torch.cat([batch.argmax(-1).cpu() for batch in logits])

    def _features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        seen = []
        hook = self.model.get_submodule(self.head).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            logits = self.model(pixel_values=self._prepared(images)).logits
        finally:
            hook.remove()
        return seen[0].flatten(1), logits

    def _prepared(self, images: Tensor) -> Tensor:
        images, channels = images.float(), images.shape[1]
        if self.channels not in (None, channels):
            if channels != 1:
                raise ValueError(f"images: must have {self.channels} channels or one, got {channels}")
            images = images.expand(-1, self.channels, -1, -1)
        if self.size is not None:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        mean, std = (images.new_tensor(value).reshape(-1, 1, 1) for value in (self.mean, self.std))
        return (((images + 1) / 2 - mean) / std).to(self.model.dtype)


def inception_features() -> nn.Module:
    """Inception v3 with the weights that published FID and KID figures were computed with: `[n, 2048]`.

    Raises:
        ValueError: torch-fidelity is not installed or its weights cannot be had.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        return _Inception(FrechetInceptionDistance(feature=2048).inception)
    except (ImportError, OSError) as error:
        raise ValueError(
            f"Inception cannot be had ({first_line(error)}): `pip install torch-fidelity`, or pass a ClassifierFeatures"
        ) from error


class _Inception(nn.Module):
    """torchmetrics' Inception takes RGB bytes and resizes them itself."""

    name = "inception-v3-compat"

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(((images + 1) * 127.5).round().byte().expand(-1, 3, -1, -1))


def _batches(images: Tensor, extractor: Callable, batch_size: int) -> Iterator[Tensor]:
    """Parts of the images, checked, on the extractor's device."""
    _check(images)
    if not (images.abs() <= 1).all():
        raise ValueError("images: must be in [−1, 1]")
    parameter = next(extractor.parameters(), None) if isinstance(extractor, nn.Module) else None
    for batch in images.split(batch_size):
        yield batch if parameter is None else batch.to(parameter.device)


def _check(images: Tensor) -> None:
    if images.ndim != 4 or not len(images) or not images.is_floating_point():
        raise ValueError(f"images: must be float [n, c, h, w], got {images.dtype} {list(images.shape)}")
    if not images.isfinite().all():
        raise ValueError("images: must be finite, got NaN or infinity")
