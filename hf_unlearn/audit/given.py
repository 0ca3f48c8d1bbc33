"""The models of an audit as they were handed over, of which those given by folder or id are in memory one at a time."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch

from ..training.models import load_model
from .check import AuditData, Check, Role, Subject
from .pipelines import load_pipeline


FAMILIES = ("classifiers", "language", "generators")  # folders beside this file, each with a `family`


class Family(Protocol):
    """What the module `family` of a folder offers.

    Attributes:
        NAME (`str`): of its models, as in `"classifier"`.
        QUICK, STANDARD, EVERY (`tuple[type[Check], ...]`): its checks; what is in `EVERY` alone is asked for by name.
    """

    NAME: str
    QUICK: tuple[type[Check], ...]
    STANDARD: tuple[type[Check], ...]
    EVERY: tuple[type[Check], ...]

    def fits(self, model: Any) -> bool: ...

    def subject(self, model: Any, role: Role, name: str) -> Subject: ...

    def check_alike(self, audited: Any, other: Any, argument: str) -> None: ...

    def data(
        self, audited: Any, forget: Any, retain: Any, test: Any, *, processing_class: Any, size: str, seed: int
    ) -> AuditData: ...  # and, of generators, `original`, `marker` and `drawing`

    def forget_loss(self, one: Any, rows: Any) -> float | None: ...

    def cost(self, one: Any, rows: Any) -> tuple[float, float]: ...


@dataclass(frozen=True)
class Place:
    """Where models that are given by folder or id are loaded to.

    Args:
        device (`torch.device` | `str`, *optional*): default: a GPU, if there is one.
        dtype (`torch.dtype`, defaults to float32): of their weights.
    """

    device: torch.device | str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    dtype: torch.dtype = torch.float32


class Handed:
    """One model as it was handed over. An object stays where it is; a name is loaded for as long as it is looked at, and what a function makes is
    dropped after.

    Args:
        argument (`str`): what errors call it, as in `"retrained[2]"`.
        role (`str`): see [`Subject`].
        source: a model, a pipeline, a folder, an id, or a function without arguments that makes one.
        marked (`bool`): an id is that of a pipeline.
        place (`Place`): where what has a name is loaded to.

    Attributes:
        name (`str`): what the report calls it.
        processing_class: what was saved beside it, once it was loaded.
        digest (`str`, *optional*): of its weights, once they were seen.
    """

    def __init__(self, argument: str, role: Role, source: Any, marked: bool = False, place: Place = Place()):
        self.argument, self.role, self.source, self.marked, self.place = argument, role, source, marked, place
        self.name, self.processing_class, self.digest = str(role), None, None
        self.family: Family | None = None
        self._held: Subject | None = None

    @property
    def is_made(self) -> bool:
        """Whether a function makes it, which takes long: it is not looked at before."""
        return callable(self.source) and not hasattr(self.source, "parameters") and not is_pipeline(self.source)

    @contextmanager
    def opened(self) -> Iterator[Subject]:
        """The model for as long as it is looked at; nothing else may keep it.

        Raises:
            ValueError: it cannot be loaded, or no family audits it.
        """
        if self._held is not None:
            yield self._held
            return
        subject = self._subject()
        self.digest = subject.digest
        yield subject

    def hold(self) -> Subject:
        """The model, which stays in memory until [`release`]."""
        if self._held is None:
            self._held = self._subject()
            self.digest = self._held.digest
        return self._held

    def release(self) -> None:
        self._held = None

    def _subject(self) -> Subject:
        source = self.source() if self.is_made else self.source
        loaded, processor, name = _loaded(source, self.argument, self.marked, self.place)
        self.processing_class, self.name = processor, str(name or self.role)
        self.family = next((known for known in families() if known.fits(loaded)), None)
        if self.family is None:
            known = ", ".join(f"{one.NAME}s" for one in families())
            raise ValueError(f"{self.argument}: audits of {type(loaded).__name__} are not there; of {known} they are")
        subject = self.family.subject(loaded, self.role, self.name)
        if self.digest is not None and not self.is_made:
            subject.digest = self.digest  # its weights were seen before
        return subject


def checked(models: Sequence[Handed]) -> tuple[Family, Any]:
    """The family of the audited model, which is the first, and a processor if one was saved beside a model. The audited one is held; of the others each
    is looked at once, beside it, and dropped.

    Raises:
        ValueError: a model that cannot be loaded, of another family or with other outputs; a retrained one that is there twice.
    """
    audited, seen = models[0], {}
    subject, processing_class = audited.hold(), audited.processing_class
    for one in models[1:]:
        if one.is_made:
            continue
        with one.opened() as other:
            check_beside(audited, subject, one, other)
        del other  # before the next one is loaded
        processing_class = processing_class or one.processing_class
    for one in models:
        if one.role == "retrained" and one.digest in seen and not one.is_made:
            raise ValueError(
                f"{one.argument}: has the weights of {key(models, seen[one.digest])}; pass models trained with seeds of their own"
            )
        seen.setdefault(one.digest, one)
    return audited.family, processing_class


def check_beside(audited: Handed, subject: Subject, one: Handed, other: Subject) -> None:
    """Refuse a model that is of another kind than the audited one.

    Raises:
        ValueError: naming the argument.
    """
    if one.family is not audited.family:
        raise ValueError(f"{one.argument}: is a {one.family.NAME}, the audited model a {audited.family.NAME}")
    audited.family.check_alike(subject, other, one.argument)


def key(models: Sequence[Handed], one: Handed) -> str:
    """What the report calls its role: `"audited"`, `"original"`, `"retrained 1"`, …"""
    same = [other for other in models if other.role == one.role]
    return one.role if one.role != "retrained" else f"retrained {same.index(one) + 1}"


def families() -> list[Family]:
    return [importlib.import_module(f"{__package__}.{name}.family") for name in FAMILIES]


def is_pipeline(model: Any) -> bool:
    return hasattr(model, "components") and hasattr(model, "save_pretrained")


def _loaded(model: Any, argument: str, marked: bool, place: Place) -> tuple[Any, Any, str | None]:
    """The model or pipeline, its processor, and its name. `marked`: an id is that of a pipeline. An object stays as it is and where it is."""
    if is_pipeline(model):
        return model, None, model.config.get("_name_or_path") or None
    if isinstance(model, str | Path) and (
        Path(model, "model_index.json").is_file() or (marked and not Path(model).is_dir())
    ):
        return load_pipeline(model, argument, place.dtype).to(place.device), None, str(model)
    try:
        loaded, processor, name = load_model(model, SimpleNamespace(model_init_kwargs={"dtype": place.dtype}), None)
    except ValueError as error:
        raise ValueError(f"{argument}: {str(error).removeprefix('model: ')}") from error
    return loaded.to(place.device) if isinstance(model, str | Path) else loaded, processor, name
