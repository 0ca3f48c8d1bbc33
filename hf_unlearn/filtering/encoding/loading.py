"""How an encoder comes to be: from a checkpoint, from what a filter's file says of it, from the Hub again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import torch

from ...files import first_line
from .checkpoints import (
    commit_of,
    dtype_of,
    has_optional_pooler,
    hub_options_of,
    in_one_line,
    load_weights,
    model_class_of,
    pooler_of,
    read_spec,
    sentence_settings,
)
from .preprocessing import ImagePreprocessing


class LoadsEncoders:
    """The loading half of [`~hf_unlearn.FilterEncoder`]."""

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        layer: int | None = None,
        pooling: Literal["pooled", "mean", "first"] | None = None,
        normalize: bool | None = None,
        preprocessing: ImagePreprocessing | None = None,
        max_length: int | None = None,
        store: bool = True,
        dtype: torch.dtype = torch.float32,
        **hub_options: Any,
    ) -> Self:
        """Of a checkpoint on the Hub or in a folder: CLIP or SigLIP (the half for images), an image backbone, an image
        classifier (without its head), a text encoder. What sentence-transformers keeps beside a model, the pooling and
        the longest text, is followed.

        Args:
            name_or_path (`str` or `Path`): as for `from_pretrained` of transformers.
            revision (`str`, *optional*): branch, tag or commit.
            layer, pooling, preprocessing, max_length: as for [`FilterEncoder`].
            normalize (`bool`, *optional*): defaults to `True` for texts, `False` for images.
            store (`bool`, defaults to `True`): whether the weights go into a filter's file, or only a reference to the
                Hub: id, commit and fingerprint.
            dtype (`torch.dtype`, defaults to `torch.float32`): of the model.
            hub_options: `cache_dir`, `token`, `local_files_only`, `force_download`.

        Raises:
            OSError: there is no such checkpoint.
            ValueError: it is of another kind, needs its own code, or lacks weights, which would be random.
        """
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

        name = str(name_or_path)
        local = Path(name).is_dir()
        if not store and local:
            raise ValueError(
                "store: a folder cannot be referred to, only the Hub; publish the encoder or set store=True"
            )
        source = hub_options_of(hub_options) | {"revision": revision}
        if not local:
            source["revision"] = commit_of(name, source)
        config = in_one_line(AutoConfig.from_pretrained, name, trust_remote_code=False, **source)
        model_class = model_class_of(config, name)
        kind = "image" if model_class.main_input_name == "pixel_values" else "text"
        options = {"add_pooling_layer": False} if has_optional_pooler(model_class) and pooling != "pooled" else {}
        if config.model_type == "clip":  # the half's own config may lack the size of the projection
            config.vision_config.projection_dim = config.projection_dim
            options["config"] = config.vision_config
        model = load_weights(model_class, name, dtype=dtype, **options, **source)
        if kind == "image" and preprocessing is None:
            try:
                processor = AutoImageProcessor.from_pretrained(name, **source)
            except (OSError, ValueError, ImportError) as error:
                raise ValueError(
                    f"preprocessing: the image processor of {name!r} cannot be had "
                    f"({first_line(error)}); pass preprocessing=ImagePreprocessing(...)"
                ) from error
            preprocessing = ImagePreprocessing.of(processor, model.config)
        tokenizer = None
        if kind == "text":
            tokenizer = in_one_line(AutoTokenizer.from_pretrained, name, trust_remote_code=False, **source)
            pooling, max_length = sentence_settings(name, source, pooling, max_length, layer)
        encoder = cls(
            model,
            kind=kind,
            preprocessing=preprocessing,
            tokenizer=tokenizer,
            max_length=max_length,
            layer=layer,
            pooling=pooling,
            normalize=kind == "text" if normalize is None else normalize,
            name=Path(name).name if local else name,
        )
        if not store:
            encoder.reference = {"id": name, "revision": source["revision"], "dtype": encoder._dtype_name}
            encoder.reference["sha256"] = encoder.fingerprint()
        once, again = encoder._try(), encoder._try()
        if not once.isfinite().all():
            raise ValueError(f"name_or_path: {name!r} gives embeddings that are not finite in {encoder._dtype_name}")
        if not torch.allclose(once, again):  # masked autoencoders hide patches in eval mode too
            raise ValueError(f"name_or_path: {type(model).__name__} gives another embedding each time; use another")
        return encoder

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """The same encoder with untrained weights, to be filled; a text encoder needs its tokenizer as well.

        Raises:
            ValueError: the spec is not one of [`FilterEncoder.spec`], or of the user's own encoder.
        """
        model_class, config, arguments = read_spec(spec)
        config.dtype = None  # of the weights, which reaches some parts of a model only; who fills them casts the whole
        return cls(model_class(config, **pooler_of(spec)).eval().requires_grad_(False), **arguments)

    @classmethod
    def from_reference(cls, spec: dict[str, Any], **hub_options: Any) -> Self:
        """The encoder that a spec with a reference means: from the Hub, and only if the weights are the same.

        Args:
            spec (`dict`): [`FilterEncoder.spec`] of an encoder with `store=False`.
            hub_options: `cache_dir`, `token`, `local_files_only`, `force_download`.

        Raises:
            OSError: there is no such checkpoint.
            ValueError: the weights are others, or the spec has no reference.
        """
        from transformers import AutoTokenizer

        model_class, config, arguments = read_spec(spec)
        reference = spec["reference"]
        if not isinstance(reference, dict) or not {"id", "revision", "dtype", "sha256"} <= reference.keys():
            raise ValueError(f"spec: has no complete reference to the Hub, got {reference!r}")
        source = hub_options_of(hub_options) | {"revision": reference["revision"]}
        dtype = dtype_of(reference["dtype"])
        model = load_weights(model_class, reference["id"], dtype=dtype, config=config, **pooler_of(spec), **source)
        encoder = cls(model, **arguments)
        if (found := encoder.fingerprint()) != reference["sha256"]:
            raise ValueError(
                f"reference: weights of {reference['id']!r} at {reference['revision']} have fingerprint {found[:12]}…, "
                f"the filter was fitted with {str(reference['sha256'])[:12]}…; pass the encoder that it was fitted with"
            )
        if encoder.kind == "text":
            encoder.tokenizer = in_one_line(
                AutoTokenizer.from_pretrained, reference["id"], trust_remote_code=False, **source
            )
        return encoder.to(dtype_of(spec["config"].get("dtype")))

    def save_tokenizer(self, folder: str | Path) -> None:
        """Write the tokenizer's files; nothing where there is none."""
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def load_tokenizer(self, folder: str | Path) -> None:
        """Read what [`FilterEncoder.save_tokenizer`] wrote; nothing for images.

        Raises:
            OSError, ValueError: there is no tokenizer in the folder.
        """
        if self.kind == "text":
            from transformers import AutoTokenizer

            self.tokenizer = in_one_line(AutoTokenizer.from_pretrained, str(folder), trust_remote_code=False)
