"""What a command would do: with `--dry_run`, its keys and where each comes from, what is there, and what would be written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...training.checks import shown
from .declared import UNKNOWN, Key
from .methods import Method, NotHereError


# Keys that name something to be read, and what that is. A key of a new job is found by how its name ends.
MODELS = {"model", "original", "retrained", "classifier", "marker", "encoder", "pipeline", "filter"}
SEEDS = {"marker": 1, "encoder": 2}  # of the classifier of digits that has this part
ROWS = {"dataset", "eval_forget", "eval_kept", "eval_heldout"}
MODEL_FILES = ("config.json", "model_index.json", "adapter_config.json")
LONGEST = 60  # characters of a value, for people


@dataclass(frozen=True)
class Value:
    """A key, its value, and where that comes from: `recipe`, `command line`, `preset`, `model` (its own settings), `worked out`, `default`."""

    key: str
    value: Any
    source: str


@dataclass(frozen=True)
class Place:
    """Something that is read: `found` is None where only the Hub could tell."""

    key: str
    value: str
    found: bool | None
    where: str


@dataclass(frozen=True)
class Target:
    """A folder or a repository that is written: what is there now."""

    key: str
    value: str
    now: str


@dataclass(frozen=True)
class Resolved:
    """What a command would do, and what of it this machine cannot."""

    keys: list[Value]
    reads: list[Place]
    writes: list[Target]
    not_here: str | None = None

    def lines(self) -> list[str]:
        """For people."""
        parts = [("keys", [(v.key, _short(_word(v.value)), v.source) for v in self.keys if v.value is not None])]
        parts.append(("reads", [(p.key, p.value, p.where) for p in self.reads]))
        parts.append(("writes", [(t.key, t.value, t.now) for t in self.writes]))
        lines = []
        for title, rows in parts:
            widths = [max((len(row[column]) for row in rows), default=0) for column in range(2)]
            lines += [title, *(f"  {a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in rows)]
        lines += [f"not here\n  {self.not_here}"] if self.not_here else []
        return [*lines, "Nothing was run or written."]


def _short(word: str) -> str:
    return word if len(word) <= LONGEST else f"{word[: LONGEST - 1]}…"


def resolved(method: Method, recipe: Mapping[str, Any], command: Mapping[str, Any]) -> Resolved:
    """What a command would do: checked as it would be before it begins, libraries imported, no model or data loaded.

    Args:
        recipe, command: the values that a recipe and the words of a command give.

    Raises:
        UsageError: a value that is refused.
    """
    given = {**recipe, **command}
    job = method.job_of(given)
    not_here = None
    try:
        settings = method.settings(job, given)
    except NotHereError as error:  # what it would do elsewhere can be told all the same
        settings, not_here = error.settings, str(error)
        for key in error.keys:
            setattr(settings, key, True)
    training = getattr(job, "defaults", dict)()
    values = []
    for name, key in method.keys.items():
        holder = job if hasattr(job, name) else settings
        value = getattr(holder, name, given.get(name))
        if name in command or name in recipe:
            source = "command line" if name in command else "recipe"
        elif _is_default(key, value):
            if not key.owner.startswith("hf_unlearn."):
                continue  # there are more than a hundred in the libraries' configs
            source = "default"
        elif name in training:
            source = "model"
        elif getattr(job, "preset", None):
            source = "preset"
        elif not key.owner.startswith("hf_unlearn."):
            continue  # worked out by a library
        else:
            source = "worked out"
        values.append(Value(name, value, source))
    values.sort(key=lambda value: value.source == "default")
    named = {value.key: value.value for value in values}
    reads = [place for name, value in named.items() for place in _places(name, value, job)]
    return Resolved(values, reads, _targets(named), not_here)


def _is_default(key: Key, value: Any) -> bool:
    value = getattr(value, "value", value)
    return value is None or (key.default is not UNKNOWN and value == key.default) or (
        key.default is UNKNOWN and value in ([], {})
    )  # fmt: skip


# What is read


def _places(name: str, value: Any, job: Any) -> list[Place]:
    words = [word for word in (value if isinstance(value, list) else [value]) if isinstance(word, str) and word]
    if name in MODELS or name.endswith("_model"):
        if name == "model" and getattr(job, "is_trained_from", None) and set(words) <= set(job.is_trained_from):
            return [Place(name, word, True, "built untrained") for word in words]
        return [Place(name, word, *_model(word, SEEDS.get(name, 0))) for word in words]
    if name in ROWS or name.endswith("_dataset"):
        return [Place(name, word, *_rows(word)) for word in words]
    if name.endswith("_folder"):
        return [Place(name, word, *_folder(word)) for word in words]
    return []


def _model(word: str, seed: int) -> tuple[bool | None, str]:
    from ...examples import named

    if Path(word).is_dir():
        held = any((Path(word) / file).is_file() for file in MODEL_FILES)
        return held, "a folder here" if held else f"a folder here without {' or '.join(MODEL_FILES[:2])}"
    if word in named.NAMES:
        return True, named.where(word, seed=seed)
    return _on_the_hub(word, "models")


def _rows(word: str) -> tuple[bool | None, str]:
    from ...examples.datasets import FASHION_MNIST

    name = word if Path(word).exists() else word.partition(":")[0]
    if name in ("digits", "facts", "opinions"):
        return True, "comes with the package"
    if name == "fashion_mnist":
        there = FASHION_MNIST.is_dir()
        return (True, str(FASHION_MNIST)) if there else _on_the_hub("zalando-datasets/fashion_mnist", "datasets")
    if Path(name).is_dir():
        return _folder(name)
    return _on_the_hub(name, "datasets")


def _folder(word: str) -> tuple[bool, str]:
    path = Path(word)
    if not path.is_dir():
        return False, "not found"
    return (True, "a folder here") if any(path.iterdir()) else (False, "an empty folder")


def _on_the_hub(word: str, kind: str) -> tuple[bool | None, str]:
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    if word.count("/") > 1 or word.startswith((".", "/", "~")) or not word.strip("/"):
        return False, "not found"
    if (Path(HF_HUB_CACHE) / f"{kind}--{word.replace('/', '--')}" / "snapshots").is_dir():
        return True, "in the cache of the Hub"
    if HF_HUB_OFFLINE:
        return False, "not found here, and HF_HUB_OFFLINE is set"
    return None, "not here: the Hub is asked for it when it is run"


# What is written


def _targets(named: Mapping[str, Any]) -> list[Target]:
    found = [
        Target(name, value, _now(Path(value)))
        for name, value in named.items()
        if isinstance(value, str) and value and name.endswith("_dir")
    ]
    for name in ("hub_model_id", "repo_id"):
        if named.get(name) and (name == "repo_id" or named.get("push_to_hub")):
            found.append(Target(name, named[name], "a repository on the Hub"))
    return found


def _now(path: Path) -> str:
    if path.is_file():
        return "is a file: refused"
    if not path.is_dir():
        return "new"
    count = sum(1 for _ in os.scandir(path))
    return f"holds {count} files and folders, and those of the same names are replaced" if count else "empty"


def _word(value: Any) -> str:
    value = getattr(value, "value", value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return shown([getattr(part, "value", part) for part in value])
    return shown(value) if isinstance(value, dict) else str(value)
