"""Publishes one whole model or pipeline: refuses what is not whole or could be taken apart, and uploads an allow-list."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, strided
from torch.nn import Module

from .adapters import UNFUSED
from .allowed import (
    ADAPTER,
    ADAPTER_CONFIG,
    CARD,
    CONFIG,
    INNER,
    LORA,
    PIPELINE,
    RECORD,
    TRANSFORMERS,
    Weights,
    components_of,
    indexed_shards,
    is_filtered,
    left_behind,
    publishable_files,
    unreadable,
    weights_of,
)
from .audited import Audited, audit_section, results_of, with_audit
from .card import plain_card
from .loading import class_in, diffusion_task, is_pipeline, loading_code
from .origin import ADAPTER_BASE, HubId, named_in, without_local_paths
from .record import as_bytes, read_record, renewed
from .sending import Publication, send
from .valid import check_card


logger = logging.getLogger(__name__)


def check_publishable(folder: str | Path, *, allow_adapter: bool = False) -> list[str]:
    """[`publishable_files`] of a folder that holds one whole model, or one whole pipeline.

    Args:
        folder (`str` or `Path`): what would be published.
        allow_adapter (`bool`, defaults to `False`): accept an adapter (of PEFT, or a LoRA file of diffusers) without its
            base model. Whoever takes it off has the model from before the unlearning.

    Raises:
        ValueError: no weights, shards missing, two sets of weights side by side, a component of a pipeline missing, a
            pipeline beside another model or an adapter, or an adapter without `allow_adapter`.
    """
    files = publishable_files(folder)
    folder = Path(folder)
    components = components_of(folder)
    if components is not None:
        return _check_pipeline(folder, files, components)
    files, whole = _one_set_of_weights(folder, files, TRANSFORMERS)
    adapters = [name for name in (ADAPTER_CONFIG, LORA) if name in files]
    if adapters:
        both = ["weights"] * whole + adapters
        if len(both) > 1:
            # from_pretrained would put the adapter onto these weights; if they are the original, they undo everything.
            raise ValueError(
                f"folder={str(folder)!r}: has both {both[0]} and {both[1]}; "
                "save the merged model into an empty folder and publish that"
            )
        if not allow_adapter:
            raise ValueError(
                "allow_adapter=False: an adapter can be taken off, which undoes the unlearning; "
                "publish merged weights (merge_adapter=True), or pass allow_adapter=True"
            )
    if not whole and LORA not in files and not {ADAPTER_CONFIG, ADAPTER} <= set(files):
        raise _no_weights(folder, TRANSFORMERS)
    return files


def publish_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    private: bool | None = True,
    commit_message: str = "Upload unlearned model",
    create_pr: bool = False,
    originals: Sequence[str | None] = (),
    allow_adapter: bool = False,
    run_as_future: bool = False,
    dry_run: bool = False,
    audit: Audited | None = None,
    card: str | None = None,
    left_out: Mapping[str, str] | None = None,
    repo_type: str = "model",
    show: Callable[[str], Any] = logger.info,
) -> Publication:
    """Uploads the publishable files of `folder` and nothing else, in one commit that also deletes what is left in the repository
    of an earlier model: see [`~hf_unlearn.hub.superseded.superseded`]. Who loads from it gets what was pushed last.

    Args:
        folder (`str` or `Path`): holds a saved model.
        repo_id (`str`): `"name"` or `"owner/name"`; made if it is not there.
        token (`str` or `bool`, *optional*): of the Hub. Default: the one saved by `hf auth login`.
        revision (`str`, *optional*): branch, made if it is not there. Default: `main`.
        private (`bool`, *optional*, defaults to `True`): only where the repository is made now; None: as the owner has set it.
        commit_message (`str`, defaults to `"Upload unlearned model"`): first line of the commit.
        create_pr (`bool`, defaults to `False`): make it a pull request.
        originals (`Sequence[str]`, defaults to `()`): what the model was made from, besides what its card says: never pushed onto.
        allow_adapter (`bool`, defaults to `False`): see [`check_publishable`].
        run_as_future (`bool`, defaults to `False`): upload in the background. `folder` must stay as it is until then.
        dry_run (`bool`, defaults to `False`): send nothing.
        audit ([`~hf_unlearn.AuditReport`], *optional*): of the model, for the card and the provenance; the caller has seen to it that it is.
        card (`str`, *optional*): README.md instead of the one in `folder`, which is given a plain one where there is none.
        left_out (`dict[str, str]`, *optional*): what else is to be told that stays, and why.
        repo_type (`str`, defaults to `"model"`): `"dataset"`: all of `folder` is published, which is a dataset.
        show (callable): is given a text that says what goes up, what does not, and why. Default: the log.

    Returns:
        [`~hf_unlearn.hub.sending.Publication`]: its `commit` is a `Future` with `run_as_future=True`.

    Raises:
        ValueError: see [`check_publishable`] and [`~hf_unlearn.hub.origin.check_is_not_original_repository`]; no file was sent.
        OSError: see [`~hf_unlearn.hub.sending.send`].
    """
    from huggingface_hub import ModelCard

    folder = Path(folder)
    if repo_type == "model":
        names, left = check_publishable(folder, allow_adapter=allow_adapter), left_behind(folder)
    else:
        names, left = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()], {}
    has_record = (folder / RECORD).is_file() and not (folder / RECORD).is_symlink()
    record = read_record(folder / RECORD) if has_record else None
    files: dict[str, Path | bytes] = {name: folder / name for name in names if name != RECORD}
    for name in files:
        if Path(name).name in (PIPELINE, CONFIG, ADAPTER_CONFIG) and (cleaned := _cleaned(folder / name)) is not None:
            files[name] = cleaned
    if card is None and CARD in files:
        card = _addressed((folder / CARD).read_text(encoding="utf-8"), folder, repo_id)
    elif card is None and repo_type == "model":
        card = _card_of(folder, repo_id)
    if card is not None:
        card = card if audit is None or audit_section(audit) in card else with_audit(ModelCard(card), audit).content
        check_card(card)
        files[CARD] = card.encode()
        files |= results_of(card)
    files[RECORD] = as_bytes(renewed(record, files, audit))
    parents = [one["parent"]["repository"] for one in [*record["earlier"], record]] if record else []
    return send(
        files,
        repo_id,
        originals=[*originals, *named_in(folder), *(HubId(name) for name in parents if name)],
        left_out={name: why for name, why in left.items() if name not in files} | dict(left_out or {}),
        repo_type=repo_type,
        token=token,
        revision=revision,
        private=private,
        commit_message=commit_message,
        create_pr=create_pr,
        run_as_future=run_as_future,
        dry_run=dry_run,
        show=show,
    )


def _addressed(card: str, folder: Path, repo_id: str) -> str:
    """A card as it lies in a folder, whose code loads that folder: on the Hub it loads the repository."""
    title = re.search(r"^# (.+)$", card, flags=re.MULTILINE)  # which a run calls the folder by
    here = {".", folder.resolve().name, title[1] if title else "."}
    names = "|".join(re.escape(json.dumps(name)) for name in here)
    loads = re.compile(rf"((?:from_pretrained|load_lora_weights)\(|\bfilter=)(?:{names})(?=[,)])")

    def code(block: re.Match) -> str:
        return loads.sub(lambda found: found[1] + json.dumps(repo_id), block[0])

    return re.sub(r"^```python\n.*?^```$", code, card, flags=re.DOTALL | re.MULTILINE)


def _card_of(folder: Path, repo_id: str) -> str:
    """For a folder without a card: what it is. Without any, the repository would keep one that describes other weights."""
    kind = class_in(folder)
    name, code, task, base = repo_id.split("/")[-1], None, None, None
    if kind is not None:
        library, code = kind.__module__.split(".")[0], loading_code(kind, repo_id)
        task = diffusion_task(kind) if is_pipeline(kind) else None
    elif (folder / ADAPTER_CONFIG).is_file():
        library, base = "peft", json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get(ADAPTER_BASE)
    else:
        library = "transformers" if (folder / CONFIG).is_file() else "diffusers"
    return plain_card(name, library, code, base_model=base, pipeline_tag=task).content


def forget_local_paths(folder: str | Path) -> None:
    """Take out of a saved pipeline where its models came from, if that is a folder on this machine: diffusers 0.42 writes it."""
    folder = Path(folder)
    for file in (folder / PIPELINE, folder / CONFIG, *folder.glob(f"*/{CONFIG}")):
        if file.is_file() and (cleaned := _cleaned(file)) is not None:
            file.write_bytes(cleaned)


def _cleaned(file: Path) -> bytes | None:
    """A config without local paths; None where it has none."""
    content = json.loads(file.read_text(encoding="utf-8"))
    cleaned = without_local_paths(content)
    return None if cleaned == content else (json.dumps(cleaned, indent=2, sort_keys=True) + "\n").encode()


def save_settings(model: Any, folder: Path) -> None:
    """All that `save_pretrained` of a model, a processor or a pipeline writes, except the weights: tried before training.

    Raises:
        ValueError: two of the weights share memory, and the model does not say so, or one is no tensor: no file could hold them.
    """
    from transformers import PreTrainedModel
    from transformers.utils import logging

    _check_weights(model)
    if hasattr(model, "components"):
        model.save_config(folder)
        for name, component in model.components.items():
            if component is not None:
                save_settings(component, folder / name)
    elif isinstance(model, PreTrainedModel):
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # of no shards
        try:
            model.save_pretrained(folder, state_dict={})
        finally:
            if bars:
                logging.enable_progress_bar()
    elif hasattr(model, "save_config"):
        model.save_config(folder)
    elif hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)


def _check_weights(model: Any) -> None:
    tied = getattr(model, "all_tied_weights_keys", None) or {}  # of transformers 5.23
    spans = []
    for name, value in model.state_dict().items() if isinstance(model, Module) else ():
        if {"base_layer", "modules_to_save", "original_module"}.intersection(name.split(".")):
            return  # of an adapter: see check_mergeable
        if not isinstance(value, Tensor) or value.layout != strided:
            kind = type(value).__name__ if not isinstance(value, Tensor) else "sparse"
            raise ValueError(f"{name} is {kind}, no tensor that a file of weights could hold")
        if name not in tied and value.data_ptr():  # none of a meta tensor, of one that is empty, and of a DTensor
            last = sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
            spans.append((value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size(), name))
    spans.sort()
    for (_, end, one), (start, _, other) in pairwise(spans):
        if start < end:
            raise ValueError(f"{one} and {other} are one tensor, or overlap; give each its own, as by clone()")


def _check_pipeline(folder: Path, files: list[str], components: list[str]) -> list[str]:
    for name in (CONFIG, TRANSFORMERS.single, TRANSFORMERS.index, ADAPTER_CONFIG, LORA):
        if (folder / name).exists():
            # Only one of the two is unlearned. Beside a LoRA it may be that, on top of the original pipeline.
            raise ValueError(
                f"folder={str(folder)!r}: has both {PIPELINE} and {name}; "
                "save the pipeline, with adapters merged, into an empty folder and publish that"
            )
    checked = [name for name in files if name.count("/") == 0 or name.startswith("pictures/")]
    models = 0
    filtered = is_filtered(folder)
    for component in components:
        inside = folder / component
        own = [name.removeprefix(f"{component}/") for name in files if name.startswith(f"{component}/")]
        if not own:
            raise ValueError(
                f"folder={str(folder)!r}: {PIPELINE} names {component}, which is no folder with a config; "
                "save the pipeline again (not as a link)"
            )
        if filtered and component == INNER:
            own = sorted(set(check_publishable(inside)).intersection(own))
        elif CONFIG in own:
            models += 1
            weights = weights_of(inside)
            own, whole = _one_set_of_weights(inside, own, weights)
            _refuse_adapter(inside, own)
            if not whole:
                raise _no_weights(inside, weights)
        checked += [f"{component}/{name}" for name in own]
    if not models:
        raise ValueError(f"folder={str(folder)!r}: {PIPELINE} names no model; save the pipeline again")
    return sorted(checked)


def _one_set_of_weights(folder: Path, files: list[str], weights: Weights) -> tuple[list[str], bool]:
    """`files` without what is left of an earlier save in shards, and whether they hold all weights."""
    missing = sorted(indexed_shards(folder, weights).difference(files)) if weights.index in files else []
    sharded = weights.index in files and not missing
    if weights.single in files:
        # Stock from_pretrained takes the single file then, which is the older of the two if the last save was sharded.
        if sharded:
            raise ValueError(
                f"folder={str(folder)!r}: has both {weights.single} and {weights.index}; "
                "delete the one of an earlier save"
            )
        files = [name for name in files if name != weights.index and not fnmatchcase(name, weights.shard)]
    elif missing:
        raise ValueError(
            f"folder={str(folder)!r}: {weights.index} names {missing[0]}, which is not there; save the model again"
        )
    return files, weights.single in files or sharded


def _refuse_adapter(folder: Path, files: list[str]) -> None:
    from safetensors import SafetensorError, safe_open

    found = (folder / ADAPTER_CONFIG).exists()
    for name in (name for name in files if name.endswith(".safetensors")):
        try:
            with safe_open(folder / name, "numpy") as weights:
                # diffusers 0.42 writes the layers of an active adapter into the file, beside the original weights.
                found = found or any("base_layer" in key.split(".") for key in weights.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise unreadable(folder, name) from error
    if found:
        raise ValueError(f"folder={str(folder)!r}: holds an adapter, {UNFUSED} into an empty folder and publish that")


def _no_weights(folder: Path, weights: Weights) -> ValueError:
    return ValueError(
        f"folder={str(folder)!r}: no {weights.single} to publish; save the model there first (not as a link)"
    )
