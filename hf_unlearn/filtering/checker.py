"""The fitted filter as a model of transformers: judges images, texts or latents, and fits Stable Diffusion's slot."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from ..files import first_line
from .card import encoder_id, filter_card
from .config import ACTIONS, DOWNLOAD_OPTIONS, SCHEMA_VERSION, SUFFIXES, FASTConfig, FilterOutput, Verdict
from .encoding.checkpoints import dtype_of
from .encoding.encoders import FilterEncoder
from .encoding.latents import as_rows
from .integrity import check_size, fingerprint, fingerprint_of_scores
from .pushing import FilterPushMixin
from .scores import ScoreBank


if TYPE_CHECKING:
    from transformers import CLIPImageProcessor


logger = logging.getLogger(__name__)

GIVES_OUT = "action='flag': the filter gives out what it flags; the caller has to look at the flags."


class FASTSafetyChecker(FilterPushMixin, PreTrainedModel):
    """Releases an input only if every score of it is finite and not above its threshold.

    ```python
    checker = FASTSafetyChecker.from_pretrained("me/no-weapons")
    output = checker(images)  # output.images, output.flags, output.scores
    slot = {"safety_checker": checker, "feature_extractor": checker.feature_extractor}
    pipe = StableDiffusionPipeline.from_pretrained("…", **slot)  # in place of the stock one
    ```

    Args:
        config ([`FASTConfig`]).

    Raises:
        ValueError: a config of another version, or without concepts.
    """

    config_class = FASTConfig
    config: FASTConfig
    main_input_name = "images"
    _no_split_modules: list[str] = []

    def __init__(self, config: FASTConfig):
        super().__init__(config)
        if config.schema_version != SCHEMA_VERSION:
            raise ValueError(
                f"schema_version={config.schema_version!r}: this version reads {SCHEMA_VERSION}; fit the filter again, or "
                "install the version of hf_unlearn that wrote it"
            )
        if not config.concepts or config.embedding_size < 1:
            raise ValueError("concepts: the config names none, so nothing would be filtered; fit the filter again")
        names = [concept.get("name") if isinstance(concept, dict) else None for concept in config.concepts]
        if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
            raise ValueError(f"concepts: must have different names, the config has {names}; fit the filter again")
        if config.action not in ACTIONS:
            raise ValueError(f"action={config.action!r}: must be one of {', '.join(ACTIONS)}")
        if config.action == "flag":
            logger.warning(GIVES_OUT)
        limits = {"components": config.embedding_size, "directions": config.components * len(config.concepts)}
        for name, most in limits.items():
            value = getattr(config, name)
            if type(value) is not int or not 0 <= value <= most:
                raise ValueError(f"{name}={value!r}: must be from 0 to {most}; fit the filter again")
        self.bank = ScoreBank(config.embedding_size, len(config.concepts), config.components, config.directions)
        self.encoder: FilterEncoder | None = None
        spec = config.encoder_spec
        if spec is not None and spec.get("kind") != "custom" and spec.get("reference") is None:
            self.encoder = FilterEncoder.from_spec(spec)
        self.post_init()

    def _init_weights(self, module) -> None:
        pass  # what is missing is refused, never made up

    @classmethod
    def around(cls, config: FASTConfig, bank: ScoreBank, encoder: FilterEncoder | None) -> FASTSafetyChecker:
        """A model of parts that are there already: none of them is made anew.

        Args:
            config (`FASTConfig`): concepts, action, and what the bank holds.
            bank (`ScoreBank`): scores and thresholds.
            encoder (`FilterEncoder`, *optional*): None for scores of latents.

        Raises:
            ValueError: the encoder is not the one that the config names.
        """
        with torch.device("meta"):
            checker = cls(config)
        checker.bank, checker.encoder = bank, encoder
        checker._check_encoder()
        return checker.eval()

    # What it is

    @property
    def concepts(self) -> tuple[str, ...]:
        """Names, in the order of the scores' columns."""
        return tuple(concept["name"] for concept in self.config.concepts)

    @property
    def thresholds(self) -> dict[str, float]:
        """τ of every concept."""
        return dict(zip(self.concepts, self.bank.threshold.tolist(), strict=True))

    def set_threshold(self, concept: str, value: float) -> None:
        """Draw the line elsewhere: what was promised, and measured, of the old one no longer holds and is deleted.

        Args:
            concept (`str`): one of `concepts`.
            value (`float`): scores above it are blocked.

        Raises:
            ValueError: an unknown concept, or a threshold that is not finite.
        """
        if concept not in self.concepts:
            raise ValueError(f"concept={concept!r}: is not one of {', '.join(map(repr, self.concepts))}")
        if not abs(value) <= torch.finfo(torch.float32).max:
            raise ValueError(f"value={value}: must be finite; take another action to release everything")
        index = self.concepts.index(concept)
        self.bank.threshold.data[index] = value
        entry = self.config.concepts[index]
        entry["threshold"] = {"value": float(self.bank.threshold[index]), "rule": "fixed", "promise": None}
        entry["figures"] = {}

    @property
    def feature_extractor(self) -> CLIPImageProcessor:
        """What Stable Diffusion's pipelines want beside a safety checker; the filter prepares the images itself and looks at nothing
        that comes out of it.
        """
        from transformers import CLIPImageProcessor

        return CLIPImageProcessor()

    @property
    def action(self) -> str:
        """`"blank"` or `"flag"`: what a call does to what is not released. Pipelines have actions of their own."""
        return self.config.action

    @action.setter
    def action(self, action: str) -> None:
        if action not in ACTIONS:
            raise ValueError(f"action={action!r}: must be one of {', '.join(ACTIONS)}")
        if action == "flag":
            logger.warning(GIVES_OUT)
        self.config.action = action

    # Judging

    @torch.no_grad()
    def judge(
        self, inputs: Any, *, batch_size: int | None = None, value_range: tuple[float, float] | None = None
    ) -> Verdict:
        """Flags and scores: the one place that decides.

        Args:
            inputs: PIL images, or images `[n, channels, height, width]` in [−1, 1]; texts, for a filter of texts; latents
                `[n, …]`, for one without encoder.
            batch_size (`int`, *optional*): of the encoder.
            value_range (`(-1, 1)` or `(0, 1)`, *optional*): of a tensor of images. By default (−1, 1), and a tensor without a value
                below 0 is refused: in [0, 1], as a pipeline gives it with `output_type="pt"`, all of it would seem bright.

        Returns:
            [`Verdict`]: on the CPU.

        Raises:
            ValueError: inputs that cannot be read, or an encoder or latents of another size than the filter was fitted on.
        """
        if self.encoder is None:
            if self.config.encoder_spec is not None:
                raise ValueError(f"encoder: missing; pass the one it was fitted with, {self._encoder_name()}")
            embeddings = as_rows(inputs, "inputs")
        else:
            embeddings = self.encoder(inputs, batch_size=batch_size, value_range=value_range)
        if embeddings.shape[1] != self.bank.dimension:
            raise ValueError(
                f"inputs: give embeddings of {embeddings.shape[1]} numbers, the filter was fitted on {self.bank.dimension}"
            )
        scores = self.bank(embeddings).cpu()
        released = (scores.isfinite() & (scores <= self.bank.threshold.cpu())).all(1)
        return Verdict(~released, scores)

    def forward(self, images: Any, clip_input: Tensor | None = None) -> FilterOutput | tuple[Any, list[bool]]:
        """Judge, and blank what is not released.

        Args:
            images: as for [`~FASTSafetyChecker.judge`], or an array `[n, height, width, channels]` in [0, 1].
            clip_input (`Tensor`, *optional*): given by Stable Diffusion's pipelines, and not looked at: the filter prepares the
                images itself. With it the answer is the slot's, `(images, flags)`.
        """
        in_slot = clip_input is not None
        seen, value_range = images, None
        if isinstance(images, np.ndarray) and self.encoder is not None:
            if images.ndim != 4:
                raise ValueError(f"images: an array must be [n, height, width, channels], got {list(images.shape)}")
            seen, value_range = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2), (0, 1)
        if in_slot and isinstance(seen, Tensor):
            value_range = value_range or (-1, 1)
            seen = seen.clamp(*value_range)  # what a VAE decodes is not clamped yet; NaN stays NaN
        verdict = self.judge(seen, value_range=value_range)
        flags = verdict.flags.tolist()
        if self.action == "blank":
            # diffusers 0.42 takes flagged tensors as they are, in [0, 1], and scales the others from [−1, 1].
            images = _blanked(images, verdict.flags, 0.0 if in_slot or self.encoder is None else -1.0)
        elif in_slot and isinstance(images, Tensor) and any(flags):
            images = images.clone()
            images[verdict.flags] = (images[verdict.flags] / 2 + 0.5).clamp(0, 1)
        return (images, flags) if in_slot else FilterOutput(images=images, flags=flags, scores=verdict.scores)

    # Files

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        push_to_hub: bool = False,
        *,
        is_main_process: bool = True,
        max_shard_size: int | str | None = None,
        variant: str | None = None,
    ) -> None:
        """Write config and weights, those of the encoder too unless it is the user's own or a reference to the Hub.

        Args:
            is_main_process, max_shard_size, variant: as for [`~transformers.PreTrainedModel.save_pretrained`].

        Raises:
            ValueError: `push_to_hub=True`, or an encoder that is missing.
        """
        if push_to_hub:
            raise ValueError("push_to_hub=True: save with save_pretrained, publish with push_to_hub()")
        self._check_encoder()
        encoder = self.encoder
        if encoder is not None:
            self.config.encoder_spec = encoder.spec
            has_weights = not encoder.stored and encoder.model.state_dict()
            self.config.encoder_fingerprint = encoder.fingerprint() if has_weights else None
        self.config.fingerprint = fingerprint(self.config, self.bank, self.encoder)
        state = self.state_dict()
        if encoder is not None and not encoder.stored:
            state = {name: value for name, value in state.items() if not name.startswith("encoder.")}
        sharded = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        super().save_pretrained(
            save_directory, state_dict=state, is_main_process=is_main_process, variant=variant, **sharded
        )
        if encoder is not None and encoder.stored:
            encoder.save_tokenizer(save_directory)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args: Any,
        encoder: FilterEncoder | None = None,
        **kwargs: Any,
    ) -> FASTSafetyChecker:
        """Load a filter, whole or not at all.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): folder or Hub id.
            encoder ([`FilterEncoder`], *optional*): the one that it was fitted with, where that is the user's own.
            kwargs: `revision`, `token`, `subfolder`, `dtype` (of the encoder; scores stay in fp32), …

        Raises:
            OSError: no such folder or repository, or files that are missing.
            ValueError: weights that are missing, unexpected, broken or not finite, another version, or another encoder.
        """
        name = str(pretrained_model_name_or_path)
        hub = {key: kwargs.pop(key) for key in DOWNLOAD_OPTIONS if key in kwargs}
        wanted = [kwargs.pop(key, None) for key in ("torch_dtype", "dtype")]
        subfolder = kwargs.pop("subfolder", None) or ""
        info_wanted = kwargs.pop("output_loading_info", False)
        as_saved = {"ignore_mismatched_sizes": False, "use_safetensors": True, "state_dict": None, "config": None}
        for key in (*as_saved, *FASTConfig.__annotations__):
            if key in kwargs and kwargs.pop(key) not in (None, as_saved.get(key)):
                raise ValueError(f"{key}: a filter is loaded as it was saved; leave it out")
        folder = Path(name)
        if not folder.is_dir():
            patterns = [f"{subfolder}/*.{suffix}" if subfolder else f"*.{suffix}" for suffix in SUFFIXES]
            try:
                folder = Path(snapshot_download(name, allow_patterns=patterns, **hub))
            except (OSError, ValueError) as error:
                raise OSError(
                    f"{name!r}: is no folder, and cannot be had from the Hub ({first_line(error)})"
                ) from error
        folder = folder / subfolder
        if not (folder / "config.json").is_file():
            raise OSError(f"{name}: has no config.json of a filter{f' in {subfolder}' if subfolder else ''}")
        try:
            check_size(lambda: cls(FASTConfig.from_pretrained(folder)), folder, name)
            checker, info = super().from_pretrained(
                folder,
                *model_args,
                use_safetensors=True,
                output_loading_info=True,
                local_files_only=True,
                dtype=torch.float32,  # exact for any narrower one; the encoder gets its own below
                **kwargs,
            )
        except (SafetensorError, RuntimeError, TypeError, KeyError, AttributeError) as error:
            if any(first_line(error).endswith(f"unexpected keyword argument {key!r}") for key in kwargs):
                raise TypeError(f"from_pretrained() {first_line(error).partition(' ')[2]}") from error
            raise ValueError(f"{name}: the filter's files are broken ({first_line(error)}); save it again") from error
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if found := sorted(str(key) for key in info[kind]):
                raise ValueError(
                    f"{name}: {len(found)} {kind.replace('_', ' ')} in the filter's weights, as {found[0]}"
                )
        if kwargs.get("device_map") is None and any(p.is_meta for p in checker.parameters()):
            raise ValueError(f"{name}: weights of the filter were not loaded; save it again")
        checker.config._name_or_path = name
        checker._attach(
            encoder, folder, {key: value for key, value in hub.items() if key not in ("revision", "proxies")}
        )
        checker._check_weights(name)
        checker._cast_encoder(next((dtype for dtype in wanted if dtype not in (None, "auto")), None))
        return (checker, info) if info_wanted else checker

    def _check_weights(self, name: str) -> None:
        for key, value in self.state_dict().items():
            if value.is_meta:
                raise ValueError(
                    f"{name}: {key} is not in memory, so it cannot be checked; load it without device_map"
                )
            if value.is_floating_point() and not value.isfinite().all():
                raise ValueError(f"{name}: {key} is not finite; save the filter again")
        if self.config.fingerprint == fingerprint(self.config, self.bank, self.encoder):
            return
        if self.config.fingerprint != fingerprint_of_scores(self.config, self.bank):
            raise ValueError(
                f"{name}: scores, thresholds or encoder are not those that its config.json was written for; save it again"
            )
        logger.warning(
            "%s: was saved by an earlier version, whose fingerprint leaves out the encoder's weights and the action: whether these "
            "are as they were saved is not known. Save it again.",
            name,
        )

    def _attach(self, given: FilterEncoder | None, folder: Path, hub: dict[str, Any]) -> None:
        """The encoder that the weights do not hold."""
        spec = self.config.encoder_spec
        if given is not None and (spec is None or self.encoder is not None):
            raise ValueError(
                "encoder: the filter has its own" if spec else "encoder: the filter judges latents, without one"
            )
        if self.encoder is not None:
            self.encoder.load_tokenizer(folder)
        elif spec is not None:
            if given is None and spec.get("kind") == "custom":
                raise ValueError(
                    f"encoder: the filter was fitted with the user's own, {self._encoder_name()}; pass encoder=FilterEncoder.own(…)"
                )
            self.encoder = given if given is not None else FilterEncoder.from_reference(spec, **hub)
            if given is not None and (other := _differing(given.spec, spec)):
                raise ValueError(
                    f"encoder: has another {other} than the one the filter was fitted with, {spec.get(other)!r}; pass the same"
                )
            expected = self.config.encoder_fingerprint
            if given is not None and expected is not None and given.fingerprint() != expected:
                raise ValueError(
                    f"encoder: has other weights than the one the filter was fitted with, {self._encoder_name()}"
                )
        self._check_encoder()

    def _cast_encoder(self, dtype: torch.dtype | str | None) -> None:
        """To the precision asked for, or to the one that it was saved in."""
        if self.encoder is not None and (dtype is not None or self.encoder.stored):
            own = (self.config.encoder_spec or {}).get("config", {}).get("dtype")
            self.encoder.to(
                dtype if isinstance(dtype, torch.dtype) else dtype_of(str(dtype or own).removeprefix("torch."))
            )

    def _check_encoder(self) -> None:
        spec, encoder = self.config.encoder_spec, self.encoder
        if (encoder is None) != (spec is None):
            raise ValueError(f"encoder: must be the one the filter was fitted with, {self._encoder_name()}")
        if encoder is not None:
            size = encoder._embedding_size
            if size is not None and size != self.bank.dimension:
                raise ValueError(
                    f"encoder: gives {size} numbers an input, the filter was fitted on {self.bank.dimension}"
                )

    def _encoder_name(self) -> str:
        return repr((self.config.encoder_spec or {}).get("name"))

    # On the Hub

    _commit_message = "Upload filter"
    _kind = "filter"

    def _made_from(self) -> list[str | None]:
        return [encoder_id(self.config.encoder_spec)]

    def _card(self, repo_id: str, **metadata: Any) -> str:
        return filter_card(self.config, repo_id, **metadata)


def _differing(given: dict[str, Any], saved: dict[str, Any]) -> str | None:
    """The first setting in which two encoders see inputs differently."""
    settings = ["kind", "preprocessing", "layer", "pooling", "normalize", "max_length"]
    settings += [] if saved.get("kind") == "custom" else ["architecture"]
    return next((name for name in settings if given.get(name) != saved.get(name)), None)


def _blanked(images: Any, flags: Tensor, black: float) -> Any:
    """Copies, black (or empty) where flagged."""
    if isinstance(images, Tensor):
        return images.masked_fill(flags.to(images.device).view(-1, *[1] * (images.ndim - 1)), black)
    if isinstance(images, np.ndarray):
        images = images.copy()
        images[flags.numpy()] = 0.0
        return images
    return [_blank(item) if flag else item for item, flag in zip(images, flags.tolist(), strict=True)]


def _blank(item: Any) -> Any:
    if isinstance(item, Image.Image):
        return Image.new("RGB", item.size)
    return "" if isinstance(item, str) else torch.zeros_like(torch.as_tensor(item))
