"""The one way to publish: whatever it is, it is written into a folder with its card, and the folder is sent."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

from .adapters import save_merged
from .allowed import CARD, RECORD, publishable_files
from .card import plain_card
from .loading import diffusion_task, is_pipeline, loaded, loading_code, processor_loader
from .origin import check_is_not_original_repository, inherited, origin, origins_of, revision_of, said_of
from .publish import check_publishable, publish_folder
from .record import earlier_of, files_of, other_record, read_record, write_record
from .sending import Publication, check_repo_id, check_token, with_owner


if TYPE_CHECKING:
    from .audited import Audited


REPORT = "report.json"  # by which the folder of an influence report is recognised
METADATA = ("license", "language", "tags", "datasets")


@dataclass(frozen=True)
class Written:
    """What was written to be published.

    Args:
        folder (`Path`): with the card.
        originals (`Sequence[str]`): what it was made from: never published onto.
        commit_message (`str`): where the caller gives none.
        allow_adapter (`bool`, defaults to `False`): see [`~hf_unlearn.hub.publish.check_publishable`].
        card (`str`, *optional*): instead of the one in the folder.
        left_out (`dict[str, str]`, defaults to `{}`): what was not written, and why.
        repo_type (`str`, defaults to `"model"`): where it belongs.
    """

    folder: Path
    originals: Sequence[str | None]
    commit_message: str
    allow_adapter: bool = False
    card: str | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    repo_type: str = "model"


class Publishable(Protocol):
    """What says by itself how it is written: trainers, filters, filtered pipelines, influence reports."""

    def _check_audit(self, audit: Audited) -> None:
        """Refuse one that is of something else."""
        ...

    def _written(
        self, repo_id: str, audit: Audited | None, *, token: str | bool | None, **options: Any
    ) -> AbstractContextManager[Written | None]:
        """Write it; None on processes that do not publish. Options are those of [`publish`] that it does not know itself."""
        ...


def publish(
    what: Any,
    repo_id: str,
    *,
    audit: Audited | None = None,
    private: bool | None = True,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
    allow_adapter: bool = False,
    run_as_future: bool = False,
    show: Callable[[str], Any] = print,
    **options: Any,
) -> Publication | None:
    """Publish a model, a pipeline, a filter, a report, or the folder that one of them was saved to, in one commit.

    Only what a loader needs goes up, with the card: see [`~hf_unlearn.hub.allowed.publishable_files`]. The same commit deletes the weights of
    whatever was there before. Nothing is ever published onto the repository of the model that it was made from.

    Args:
        what: a folder (`str` or `Path`), a trainer of hf_unlearn, a model of transformers or PEFT (which is merged), a `DiffusionPipeline`,
            a [`FASTSafetyChecker`], a [`FilteredPipeline`], or an [`InfluenceReport`], which goes into a dataset's repository.
        repo_id (`str`): `"name"` or `"owner/name"`; made if it is not there.
        audit ([`AuditReport`], *optional*): of this model: its figures, and each check that failed or did not run, come onto the card.
        private (`bool`, *optional*, defaults to `True`): only where the repository is made now; None: as the owner has set it.
        revision (`str`, *optional*): branch, made if it is not there. Default: `main`.
        create_pr (`bool`, defaults to `False`): make it a pull request.
        dry_run (`bool`, defaults to `False`): say what would go up, and send nothing.
        token (`str` or `bool`, *optional*): of the Hub. Default: the one saved by `hf auth login`.
        commit_message (`str`, *optional*): first line of the commit.
        allow_adapter (`bool`, defaults to `False`): accept an adapter without its base. Whoever takes it off has the original.
        run_as_future (`bool`, defaults to `False`): of a folder or a trainer: upload in the background.
        show (callable, defaults to `print`): is given what goes up, what is left out, and why, before anything is sent.
        options: of what is no folder: `license`, `language`, `tags`, `datasets` of the card (default: what the card of its base model says),
            `max_shard_size`; of a model `processing_class`, which is saved with it; of a filter `card`, instead of ours; of a report
            `columns`, those joined columns of the training data that may be seen. Others stay.

    Returns:
        [`~hf_unlearn.hub.sending.Publication`]: what went up and its commit. None on processes other than the first.

    Raises:
        ValueError: it cannot be published, or not there; nothing was sent.
        TypeError: an option that there is not.
        OSError: the Hub did not take it. In one line, with what to do; the repository is as it was.
    """
    repo_id = check_repo_id(repo_id)
    if audit is not None and not hasattr(audit, "check_is_of"):
        raise ValueError(
            f"audit: is a {type(audit).__name__}; pass an AuditReport, as of AuditReport.load('audit.json')"
        )
    if audit is not None:
        _check_audit(what, audit)
    _check_kind(what)
    if not isinstance(what, str | Path) and not dry_run:  # what is written first may be large
        check_token(token)
    with suppress(OSError) if dry_run else nullcontext():
        repo_id = with_owner(repo_id, token)
    with _written(what, repo_id, audit, token, options) as written:
        if written is None:
            return None
        if run_as_future and not hasattr(what, "args") and not isinstance(what, str | Path):
            raise ValueError("run_as_future=True: is for folders and trainers, whose files stay; leave it out")
        return publish_folder(
            written.folder,
            repo_id,
            token=token,
            revision=revision,
            private=private,
            commit_message=commit_message or written.commit_message,
            create_pr=create_pr,
            originals=written.originals,
            allow_adapter=allow_adapter or written.allow_adapter,
            run_as_future=run_as_future,
            dry_run=dry_run,
            audit=audit,
            card=written.card,
            left_out=written.left_out,
            repo_type=written.repo_type,
            show=show,
        )


def _check_audit(what: Any, audit: Audited) -> None:
    if isinstance(what, str | Path):
        check_publishable(what)
        what = loaded(Path(what))
    if hasattr(what, "_check_audit"):
        what._check_audit(audit)
    else:
        audit.check_is_of(what)


def check_options(what: Any, options: dict[str, Any], known: Sequence[str]) -> None:
    """Refuse an option that would be ignored.

    Raises:
        TypeError: naming it, and those that there are.
    """
    for name in options:
        if name not in known:
            raise TypeError(
                f"{name}: no option where a {type(what).__name__} is published; there are {', '.join(known) or 'none'}"
            )


def _written(what: Any, repo_id: str, audit: Any, token: Any, options: dict[str, Any]) -> AbstractContextManager:
    if isinstance(what, str | Path) and Path(what, REPORT).is_file():
        import hf_unlearn

        what = hf_unlearn.InfluenceReport.load_from_disk(what)
    if isinstance(what, str | Path):
        check_options(Path(), options, ())
        return nullcontext(Written(Path(what), (), "Upload unlearned model"))
    if hasattr(what, "_written"):
        return what._written(repo_id, audit, token=token, **options)
    if is_pipeline(type(what)):
        return _pipeline(what, repo_id, audit, token, options)
    return _model(what, repo_id, audit, token, options)


def _check_kind(what: Any) -> None:
    known = isinstance(what, str | Path) or hasattr(what, "_written") or is_pipeline(type(what))
    if not known and not (hasattr(what, "save_pretrained") and hasattr(what, "state_dict")):
        raise ValueError(
            f"what: {type(what).__name__} cannot be published; pass a model, a pipeline, a filter, an influence report, a trainer of "
            "hf_unlearn, or the folder that one of them was saved to"
        )


@contextmanager
def _model(model: Any, repo_id: str, audit: Any, token: Any, options: dict[str, Any]) -> Iterator[Written]:
    """A model of transformers, or of PEFT."""
    check_options(model, options, (*METADATA, "processing_class", "max_shard_size"))
    if hasattr(model, "register_to_config"):
        raise ValueError(f"what: {type(model).__name__} is part of a pipeline; pass the pipeline")
    if hasattr(model, "peft_config") and not hasattr(model, "get_base_model"):
        raise ValueError(
            "what: holds an adapter that add_adapter put in; load it as a PeftModel, which is merged here"
        )
    processing_class, max_shard_size = options.pop("processing_class", None), options.pop("max_shard_size", None)
    whole = model.get_base_model() if hasattr(model, "peft_config") else model
    names = [getattr(whole.config, "_name_or_path", None), getattr(whole, "name_or_path", None)]
    names += [getattr(processing_class, "name_or_path", None)]
    originals = [origin(name) for name in names if name]
    check_is_not_original_repository(repo_id, originals)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sharded = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        if hasattr(model, "peft_config"):
            save_merged(model, folder)
        else:
            model.save_pretrained(folder, **sharded)
        if processing_class is not None:
            processing_class.save_pretrained(folder)
        base, revision = originals[0] if originals else None, getattr(whole.config, "_commit_hash", None)
        code = loading_code(type(whole), repo_id, processor=processor_loader(processing_class))
        _write_card(folder, repo_id, "transformers", code, None, base, revision, audit, token, options)
        yield Written(folder, originals, "Upload model")


@contextmanager
def _pipeline(pipeline: Any, repo_id: str, audit: Any, token: Any, options: dict[str, Any]) -> Iterator[Written]:
    check_options(pipeline, options, (*METADATA, "max_shard_size"))
    max_shard_size = options.pop("max_shard_size", None)
    originals = [origin(name) for name in origins_of(pipeline)]
    check_is_not_original_repository(repo_id, originals)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pipeline.save_pretrained(folder, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
        base = origin(pipeline.config.get("_name_or_path") or (originals[0] if originals else None))
        library = type(pipeline).__module__.split(".")[0]
        code = loading_code(type(pipeline), repo_id, num_inference_steps=_steps(pipeline))
        _write_card(
            folder,
            repo_id,
            library,
            code,
            diffusion_task(type(pipeline)),
            base,
            revision_of(base),
            audit,
            token,
            options,
        )
        yield Written(folder, originals, "Upload pipeline")


def _steps(pipeline: Any) -> int | None:
    """Denoising steps of the code on the card: as many as it was trained with, where it takes more unless it is told."""
    default = signature(type(pipeline).__call__).parameters.get("num_inference_steps")
    config = getattr(getattr(pipeline, "scheduler", None), "config", {})
    trained = config.get("num_train_timesteps")
    return trained if default is not None and trained is not None and (default.default or 0) > trained else None


def _is_as_saved(folder: Path, source: Path) -> bool:
    """Whether these weights are those of a folder that says how they were made: then its card is theirs."""
    if not (source / CARD).is_file() or not (source / RECORD).is_file():
        return False
    said = {
        name: part for name, part in read_record(source / RECORD)["files"].items() if name.endswith(".safetensors")
    }
    return said == files_of({path.relative_to(folder).as_posix(): path for path in folder.rglob("*.safetensors")})


def _write_card(
    folder: Path,
    repo_id: str,
    library: str,
    code: str,
    tag: str | None,
    base: str | None,
    revision: str | None,
    audit: Any,
    token: Any,
    given: dict[str, Any],
) -> None:
    from huggingface_hub import metadata_load, metadata_save

    given = {name: value for name, value in given.items() if value}
    if base is not None and _is_as_saved(folder, Path(base)):
        for name in (CARD, RECORD, *(f"pictures/{path.name}" for path in Path(base, "pictures").glob("*.png"))):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(Path(base, name), folder / name)
        if given:
            metadata_save(folder / CARD, (metadata_load(folder / CARD) or {}) | given)
        return
    metadata = inherited(said_of(base, revision, token), given)
    card = plain_card(
        repo_id.split("/")[-1],
        library,
        code,
        base_model=base,
        base_revision=revision,
        nearest=metadata.pop("base_model", None),
        pipeline_tag=tag,
        audit=audit,
        **metadata,
    )
    card.save(folder / CARD)
    earlier = earlier_of(base, revision, token)
    write_record(
        other_record("model", base_model=base, base_revision=revision, earlier=earlier),
        folder,
        publishable_files(folder),
    )
