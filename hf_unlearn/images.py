"""The one place where a picture changes form: PIL of every mode, array, tensor in [−1, 1], VAE latents, grid, data URI."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from .files import first_line


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


IMAGE_COLUMNS = ("pixel_values", "image", "images")
BICUBIC = Image.Resampling.BICUBIC
SMALLEST = 64  # pixels; in a grid, smaller images are enlarged, each pixel a square
LOOKED_AT = 64  # rows of a dataset that are read before a run
ROUNDING = 0.01  # beyond its range a value may be, of whoever made it
# What whole numbers mean by their type, as in PIL and numpy: black and white.
BY_TYPE = {torch.bool: 1, torch.uint8: 255, torch.uint16: 65535}
ORIENTATION = 0x0112  # of EXIF
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R 601, PIL's


def image_column(columns: Iterable[str], argument: str) -> str:
    """Which of the columns holds the images.

    Raises:
        ValueError: none.
    """
    column = next((name for name in IMAGE_COLUMNS if name in columns), None)
    if column is None:
        raise ValueError(
            f"{argument}: has no images; name the column one of {', '.join(IMAGE_COLUMNS)} (rename_column)"
        )
    return column


def is_pil(image: Any) -> bool:
    return hasattr(image, "getbands")


def of_pil(image: Image.Image, name: str = "image") -> Tensor:
    """A PIL image as a tensor: upright as its EXIF data says, the current frame, what is transparent over white.

    | mode | becomes |
    |---|---|
    | `1`, `L`; `LA`, `La` | grey |
    | `P`, `PA`, `RGB`, `RGBA`, `RGBa`, `RGBX`, `CMYK`, `YCbCr`, `HSV`, `LAB` | RGB, as PIL converts it |
    | `I;16` of any byte order | grey, 0 to 65535 |
    | `I`, `F` | grey, 0 to 255; refused where it ends at 1 or below, which may mean 0 to 1 |
    | what PIL cannot convert (`LAB` before PIL 13) | refused |

    Stock image processors of transformers 5.23 and diffusers 0.42 do otherwise with four of them: they cut 16 bits off at 255,
    read `F` in 0…1 as black, do not turn images, and diffusers leaves out transparency (what is behind it shows).

    Args:
        name (`str`): what to call it in an error.

    Returns:
        `Tensor`: `[1 or 3, height, width]` in [−1, 1], fp32; a value of `F` that is not finite stays as it is.

    Raises:
        ValueError: an image without pixels, that cannot be read, or of which nobody can tell what its values mean.
    """
    if 0 in image.size:
        raise ValueError(f"{name} is {image.width} × {image.height}, it has no pixels")
    try:
        if image.getexif().get(ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            # Of another byte order numpy gives another type; torch has none of it.
            values, white = np.asarray(image).astype(np.float32), 65535
            if isinstance(clear := image.info.get("transparency"), int):
                values[values == clear] = white
        elif image.mode in ("I", "F"):
            values, white = np.asarray(image).astype(np.float32), 255
        else:
            values, white = np.asarray(_opaque(image)).astype(np.float32), 255
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} of mode {image.mode!r} cannot be read ({first_line(error)}); convert it to RGB"
        ) from error
    if image.mode in ("I", "F"):
        seen = values[np.isfinite(values)]
        low, high = (seen.min(), seen.max()) if seen.size else (0, 0)
        if low < 0 or high > 255 or 0 < high <= 1:
            raise ValueError(
                f"{name} of mode {image.mode!r} has values from {low:g} to {high:g}; rescale them to be in [0, 255]"
            )
    tensor = torch.from_numpy(values) / white * 2 - 1
    return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1).contiguous()


def _opaque(image: Image.Image) -> Image.Image:
    """Grey or RGB, over white."""
    grey = image.mode in ("1", "L", "LA", "La")
    if image.mode == "La":
        image = image.convert("LA")  # PIL 13 has no direct way from La
    if {"A", "a"} & set(image.getbands()) or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("L" if grey else "RGB")


def signed(
    images: Tensor, argument: str, *, value_range: tuple[float, float] | None = None, whole: bool = True
) -> Tensor:
    """Images of any type in [−1, 1], fp32: bool, uint8 and uint16 by their type, others by their range.

    Args:
        images (`Tensor`): of any shape.
        argument (`str`): what to call them in an error.
        value_range (`(-1, 1)` or `(0, 1)`, *optional*): of floats. By default (−1, 1); and then images without a value below 0,
            nearly always ones in [0, 1], are refused.
        whole (`bool`, defaults to `True`): they are all there are; part of a set may well be bright.

    Raises:
        ValueError: values beyond the range, or nowhere below 0. Such as are not finite pass.
    """
    check_value_range(value_range)
    if white := BY_TYPE.get(images.dtype):
        return images.float() / white * 2 - 1
    if images.is_complex():
        raise ValueError(f"{argument}: is {images.dtype}; give real numbers in [−1, 1]")
    images = images.float()
    if not images.numel():
        return images
    known = torch.where(images.isfinite(), images, 0)
    low, high = known.aminmax()
    least, most = value_range or (-1, 1)
    if low < least - ROUNDING or high > most + ROUNDING:
        furthest = max(-low, high) if least or low >= -ROUNDING else low
        bounds = "[−1, 1]" if least else "[0, 1]"
        raise ValueError(f"{argument}: pixel values reach {furthest:.3g}, the model's are in {bounds}; rescale them")
    if value_range is None and whole:
        check_signed(low, high, argument)
    return images * 2 - 1 if least == 0 else images


def check_value_range(value_range: tuple[float, float] | None) -> None:
    if value_range is not None and tuple(value_range) not in ((-1, 1), (0, 1)):
        raise ValueError(f"value_range={value_range!r}: must be (-1, 1) or (0, 1)")


def check_signed(low: float | Tensor, high: float | Tensor, argument: str) -> None:
    """Refuse a whole set of images whose values go from `low` to `high`, if these are not in [−1, 1] by all appearance."""
    if low >= 0 and high > 0:
        raise ValueError(
            f"{argument}: has no pixel below 0, so it is in [0, 1] and not in [−1, 1]; give images * 2 - 1 (or, where there is "
            "such an argument, value_range=)"
        )


def pixels(
    images: Sequence[Any],
    shape: tuple[int, int, int],
    *,
    resize: bool,
    argument: str = "forget_dataset",
    rows: Sequence[int | str] | None = None,
    whole: bool = True,
) -> Tensor:
    """Images as tensors in [−1, 1], `[n, channels, height, width]`, fp32.

    Args:
        images: PIL images as for [`of_pil`], or arrays and tensors `[channels, height, width]` as for [`signed`].
        shape: `(channels, height, width)` of the model.
        resize (`bool`): fit PIL images to the model: the short side scaled (bicubic), the rest cropped at the centre.
        rows (`Sequence`, *optional*): what to call them in an error: which rows of a dataset they are. Default: from 0.
        whole (`bool`, defaults to `True`): see [`signed`].

    Raises:
        ValueError: another size or number of channels, values that are not as they must be, or pixels that are not finite.
    """
    rows = range(len(images)) if rows is None else rows
    if isinstance(images, Tensor):
        if len(images):
            _check_shape(images[0], shape, argument)
        known = torch.full((len(images),), images.dtype in BY_TYPE)
        tensors = signed(images, argument, whole=False)
    else:
        made = [
            _fitting(image, shape, resize, f"{argument}: image {row}", argument)
            for row, image in zip(rows, images, strict=True)
        ]
        known = torch.tensor(
            [is_pil(image) or tensor.dtype in BY_TYPE for image, tensor in zip(images, made, strict=True)]
        )
        tensors = torch.stack([signed(tensor, argument, whole=False) for tensor in made])
    if not (finite := tensors.isfinite().flatten(1).all(1)).all():
        raise ValueError(
            f"{argument}: an image holds NaN or infinite pixels (row {rows[int(finite.int().argmin())]}); remove it"
        )
    if whole and not known.all():
        check_signed(*tensors[~known].aminmax(), argument)
    return tensors.clamp(-1, 1)


def _fitting(image: Any, shape: tuple[int, int, int], resize: bool, name: str, argument: str) -> Tensor:
    """A PIL image in [−1, 1], an array as it is."""
    channels, height, width = shape
    if not is_pil(image):
        try:
            tensor = image if isinstance(image, Tensor) else torch.as_tensor(_for_torch(np.asarray(image)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} is a {type(image).__name__} that holds no pixels; remove it") from error
        _check_shape(tensor, shape, argument)
        return tensor
    if channels not in (1, 3):
        raise ValueError(f"{argument}: PIL images cannot have the model's {channels} channels; pass pixel_values")
    tensor = of_pil(image, name)
    if channels == 1 and len(tensor) == 3:
        if image.mode not in ("P", "PA") or not (tensor == tensor[:1]).all():
            raise ValueError(f"{argument}: images have 3 channels, the model has 1; convert them to grey first")
        tensor = tensor[:1]
    if resize:
        tensor = _by_band(tensor, lambda band: ImageOps.fit(band, (width, height), BICUBIC))
    if tuple(tensor.shape[1:]) != (height, width):
        raise ValueError(
            f"{argument}: an image is {tensor.shape[2]} × {tensor.shape[1]}, the model draws {width} × {height}; set resize=True"
        )
    return tensor.expand(channels, -1, -1)


def _for_torch(array: np.ndarray) -> np.ndarray:
    """The same numbers as torch takes them: in this machine's byte order, and not turned round."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))


def _check_shape(image: Tensor, shape: tuple[int, int, int], argument: str) -> None:
    if (found := tuple(image.shape)) != tuple(shape):
        channels, height, width = shape
        hints = {(height, width, channels): "put its channels first", (height, width): "add its one channel"}
        raise ValueError(
            f"{argument}: an image has shape {found}, the model's is {tuple(shape)}; {hints.get(found, 'resize it')}"
        )


def grey_images(dataset, size: int) -> Tensor:
    """The column `image` as `[n, 1, size, size]` in [−1, 1], fp32: colours as their luminance, the whole image stretched."""
    weights = torch.tensor(LUMINANCE).view(3, 1, 1)
    made = [of_pil(image, f"image {row}") for row, image in enumerate(dataset["image"])]
    grey = [image if len(image) == 1 else (image * weights).sum(0, keepdim=True) for image in made]
    return torch.stack([_by_band(image, lambda band: band.resize((size, size), BICUBIC)) for image in grey])


def _by_band(image: Tensor, resized: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Each band in fp32, so that nothing is rounded or cut off whatever the mode was."""
    bands = [resized(Image.fromarray(band.numpy())) for band in image]
    return torch.from_numpy(np.stack([np.asarray(band) for band in bands])).clamp(-1, 1)


def look(dataset: Any, column: str, shape: tuple[int, int, int], *, resize: bool, argument: str) -> None:
    """Refuse a dataset of which some rows, the first and others all over it, do not fit a model: see [`pixels`]."""
    rows = sorted({round(place) for place in np.linspace(0, len(dataset) - 1, min(LOOKED_AT, len(dataset)))})
    images = {row: image for row in rows if (image := dataset[row][column]) is not None}
    if images:
        pixels(list(images.values()), shape, resize=resize, argument=argument, rows=list(images))


def grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """One picture of images `[n, channels, height, width]` in [−1, 1], in rows of `columns` (default: a square)."""
    from diffusers.utils import make_image_grid

    columns = columns or max(1, round(len(images) ** 0.5))
    images = images[: len(images) // columns * columns] if len(images) >= columns else images
    columns = min(columns, len(images))
    arrays = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array) for array in arrays]
    scale = max(1, -(-SMALLEST // pictures[0].width))
    pictures = [
        image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) for image in pictures
    ]
    framed = [ImageOps.expand(image.convert("RGB"), border=2, fill="#868e96") for image in pictures]
    return make_image_grid(framed, rows=len(framed) // columns, cols=columns)


def data_uri(image: Image.Image, *, form: str = "PNG", **options: Any) -> str:
    """An address that holds a picture, for pages: upright, grey or RGB of 8 bits, what is transparent over white.

    Args:
        image: of any mode; values of `I` and `F` beyond [0, 255] are cut off, which PIL does.
        form (`str`, defaults to `"PNG"`): file format as PIL names it.
        options: for PIL's `save`.
    """
    if image.mode.startswith("I;16"):  # PIL would cut 16 bits off at 255
        image = Image.fromarray(((of_pil(image)[0] + 1) * 127.5).round().byte().numpy())
    elif image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode not in ("L", "RGB"):
        image = _opaque(image)
    file = BytesIO()
    image.save(file, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


@torch.no_grad()
def to_latents(images: Tensor, vae: nn.Module, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents that a VAE makes of images in [−1, 1], scaled as denoisers see them, fp32 on the CPU:
    the way back of [`of_latents`].
    """
    config = vae.config
    with _upcast(vae):
        posterior = vae.encode(images.to(device, vae.dtype)).latent_dist
    mean, deviation = posterior.mean.float(), posterior.std.float()
    mean = mean - (getattr(config, "shift_factor", None) or 0.0)
    if (channels := _channels(config, mean)) is not None:
        mean, deviation = (mean - channels[0]) / channels[1], deviation / channels[1]
    scale = getattr(config, "scaling_factor", None) or 1
    return (mean * scale).cpu(), (deviation * scale).cpu()


@torch.no_grad()
def of_latents(latents: Tensor, vae: nn.Module, device: torch.device | str) -> Tensor:
    """What a VAE makes of scaled latents `[n, channels, height, width]`, about in [−1, 1]: its shift, its factor, and the mean and
    the deviation of its channels are undone first.
    """
    config = vae.config
    latents = latents / (getattr(config, "scaling_factor", None) or 1)
    if (channels := _channels(config, latents)) is not None:
        latents = latents * channels[1] + channels[0]
    latents = latents + (getattr(config, "shift_factor", None) or 0)
    with _upcast(vae):
        return vae.decode(latents.to(device, vae.dtype), return_dict=False)[0]


def _channels(config: Any, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and deviation of a VAE's channels, shaped to go with latents; None where it has none."""
    found = [getattr(config, name, None) for name in ("latents_mean", "latents_std")]
    if None in found:
        return None
    mean, deviation = (torch.tensor(value).to(like).view(1, -1, 1, 1) for value in found)
    return mean, deviation


@contextmanager
def _upcast(vae: nn.Module) -> Iterator[None]:
    """SDXL's first VAE overflows in half precision."""
    dtype = vae.dtype
    overflows = dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if overflows:
        vae.to(dtype=torch.float32)
    try:
        yield
    finally:
        if overflows:
            vae.to(dtype=dtype)


def decode(latents: Tensor, pipeline: DiffusionPipeline, *, batch_size: int = 8) -> Tensor:
    """Images of VAE latents, `[n, channels, height, width]` in [−1, 1], fp32 on the CPU."""
    vae = pipeline.vae
    parts = [of_latents(part, vae, vae.device).float().cpu() for part in latents.split(batch_size)]
    return torch.cat(parts).clamp(-1, 1)
