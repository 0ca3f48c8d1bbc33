"""What a recipe and a command line say, as values of the types that their keys ask for.

A recipe is flat YAML. Every value is read as the same words on the command line would be, so that `3e-4`, `no` and `null` mean what
they say. The command line wins.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ...training.checks import check_number, now_called, shown
from .declared import Key


RECIPES = Path(__file__).parents[2] / "recipes"
# Keys that recipes of generators had before, and that mean nothing there.
OF_LABELS = {
    "forget", "forget_accuracy", "bn", "fisher", "fisher_samples", "loss_reduction", "retain_loss", "rmu_layer",
    "rmu_coefficient", "pdu_rate",
}  # fmt: skip
ELSEWHERE = {"model": "pipeline", "pipeline": "model"}  # what recipes of other verbs call it
TRUTH = dict.fromkeys(("true", "t", "yes", "y", "1"), True) | dict.fromkeys(("false", "f", "no", "n", "0"), False)
NULL = "null"
FLAGS = ("json", "dry_run")  # that the command line takes apart from keys
READERS = {
    bool: lambda word: TRUTH[word.lower()],
    int: int,
    float: float,
    dict: json.loads,
}  # in the order they are tried


class UsageError(Exception):
    """The command line or the recipe is wrong."""


def nearest(word: str, known: Iterable[str], otherwise: str) -> str:
    """What may have been meant.

    Args:
        otherwise (`str`): what to say where nothing known is like it.
    """
    if now := now_called(word, known := list(known)):
        return now
    if word in OF_LABELS:
        return "only models with labels or tokens have it; leave it out"
    if (other := ELSEWHERE.get(word)) in known:
        return f"did you mean {other!r}?"
    found = difflib.get_close_matches(word[:100], known, n=1)
    return f"did you mean {found[0]!r}?" if found else otherwise


# The command line


def options(arguments: Sequence[str], named: str | None = None) -> dict[str, list[str]]:
    """`{key: the words that follow it}`; a first argument that is no key is the recipe.

    Args:
        named (`str`, *optional*): a key that all words before the first one belong to instead.

    Raises:
        UsageError: a word that belongs to no key.
    """
    first = [*takewhile(lambda argument: not argument.startswith("--"), arguments)] if named else []
    found: dict[str, list[str]] = {named: first} if first else {}
    words: list[str] | None = None
    for place, argument in enumerate(arguments[len(first) :]):
        if argument.startswith("--"):
            key, equals, value = argument.removeprefix("--").partition("=")
            if first and key == named:
                raise UsageError(f"{named}: given twice, as words and by --{named}; keep one of them")
            if equals and key.replace("-", "_") in FLAGS:
                raise UsageError(f"--{key}: takes no value; write it alone")
            words = found[key.replace("-", "_")] = [value] if equals else []
        elif words is not None:
            words.append(argument)
        elif place == 0:
            found["config"] = [argument]
        else:
            raise _unexpected(argument)
    return found


def _unexpected(word: str) -> UsageError:
    return UsageError(f"unexpected argument {shown(word)}; keys are written --key value")


def one(given: Mapping[str, Sequence[str]], key: str) -> str | None:
    """The word that follows a key; None where the key is not given.

    Raises:
        UsageError: none or several.
    """
    if key not in given:
        return None
    if not given[key]:
        raise UsageError(f"{key}: has no value; write one behind it")
    if len(given[key]) > 1:
        raise _unexpected(given[key][1])
    return given[key][0]


def of_command_line(given: Mapping[str, Sequence[str]], keys: Mapping[str, Key], otherwise: str) -> dict[str, Any]:
    """Values of the words that [`options`] found.

    Raises:
        UsageError: naming the key and the fix.
    """
    values = {}
    for name, words in given.items():
        positive = keys.get(name.removeprefix("no_"))
        if name in keys and keys[name].element is not None and (listed := _listed(words)) is not None:
            values[name] = [convert(keys[name], word, keys[name].element) for word in listed]
        elif name in keys and keys[name].element is not None and len(words) != 1:
            values[name] = [convert(keys[name], word, keys[name].element) for word in words] or one(given, name)
        elif name in keys:
            values[name] = True if bool in keys[name].kinds and not words else value_of(keys[name], one(given, name))
        elif positive is not None and bool in positive.kinds and not words:
            values[positive.name] = False
        else:
            raise UsageError(f"unknown key {shown(name)}; {nearest(name, keys, otherwise)}")
    return values


def _listed(words: Sequence[str]) -> list[str] | None:
    """What stands in `[3, 8]`, a list as recipes have it; None where the words are none."""
    import yaml

    text = " ".join(words)
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        found = yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        return None
    return found if all(isinstance(one, str) for one in found) else None


def value_of(key: Key, word: str) -> Any:
    """A single word as a value: also one of a list, where the key takes no plain word.

    Raises:
        UsageError: naming the key and what it takes.
    """
    if word == NULL and key.optional:
        return None
    if key.element is not None and str not in key.kinds:
        return [convert(key, word, key.element)]
    return convert(key, word, *key.kinds)


def convert(key: Key, word: str, *kinds: Any) -> Any:
    """A word as a value of the first of `kinds` that it is one of.

    Raises:
        UsageError: naming the key and what it takes; also for a number out of its range.
    """
    plain = {get_origin(kind) or kind for kind in kinds}
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices and all(isinstance(choice, str) for choice in choices):
        if word in choices:
            return word
        guess = nearest(word, choices, "") if len(choices) > 5 else now_called(word, choices)
        raise UsageError(f"{key.name}={shown(word)}: must be one of {', '.join(choices)}{guess and f'; {guess}'}")
    for kind, read in READERS.items():
        if kind in plain:
            try:
                value = read(word)
            except (KeyError, ValueError, RecursionError):
                continue
            if isinstance(value, kind):
                _check_range(key, value)
                return value
    if str in plain or not plain & set(READERS):
        return os.path.expanduser(word) if word.startswith("~/") else word  # as a shell would
    raise UsageError(f"{key.name}: {shown(word)} is not allowed; expected {described(kinds)}")


def _check_range(key: Key, value: Any) -> None:
    for rule in key.rules:
        try:
            check_number(key.name, value, rule)
        except ValueError as error:
            raise UsageError(str(error)) from error


def described(kinds: Iterable[Any]) -> str:
    """`"float | None"`."""
    names = (kind.__name__ if get_origin(kind) is None and isinstance(kind, type) else str(kind) for kind in kinds)
    return " | ".join(names).replace("typing.", "").replace("NoneType", "None")


# Recipes


def recipe_file(path: str) -> Path:
    """The file, or the recipe of that name that came with the package (`recipes/pbu_digits.yaml`, or `pbu_digits`)."""
    file = Path(path)
    shipped = RECIPES / file.with_suffix(".yaml").name if file.name else file
    return shipped if not file.exists() and shipped.is_file() else file


def load_recipe(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A recipe twice: with every scalar as it is written, and as YAML understands it.

    Raises:
        UsageError: not readable, not YAML, no mapping, a key twice, or a value that stands for another one.
    """
    import yaml

    try:
        text = recipe_file(path).read_text(encoding="utf-8")
        # A few lines of lists of lists of the same list are as long as one likes when they are written out.
        alias = next((token for token in yaml.scan(text) if isinstance(token, yaml.AliasToken)), None)
        if alias is not None:
            line = alias.start_mark.line + 1
            raise UsageError(f"{path}: line {line}: *{alias.value[:20]} stands for another value; write it out")
        words, values, tree = yaml.load(text, Loader=yaml.BaseLoader), yaml.safe_load(text), yaml.compose(text)
    except OSError as error:
        known = nearest(Path(path).stem, shipped_recipes(), "give the path of a recipe, or a name of hf-unlearn list")
        raise UsageError(f"config: cannot read {shown(path)} ({error.strerror}); {known}") from error
    except RecursionError:
        raise UsageError(f"{path}: is nested too deeply; a recipe has lines like 'method: pbu'") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not text in UTF-8 (byte {error.start}); save it as UTF-8") from error
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1}: {error.problem})" if mark else ""
        raise UsageError(f"{path}: is not YAML{place}; a recipe has lines like 'method: pbu'") from error
    if not isinstance(values, dict):
        kind = "empty" if values is None else f"a {type(values).__name__}"
        raise UsageError(f"{path}: is {kind}, not a mapping of keys to values; a recipe has lines like 'method: pbu'")
    keys = [str(key.value) for key, _ in tree.value]
    if twice := [key for key in words if keys.count(key) > 1]:
        raise UsageError(f"{path}: key {shown(twice[0])} occurs {keys.count(twice[0])} times; keep one of them")
    return words, values


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def of_recipe(path: str, keys: Mapping[str, Key], others: Iterable[str], otherwise: str) -> dict[str, Any]:
    """The values that a recipe gives.

    Args:
        others: keys that it may have besides, which are left alone.

    Raises:
        UsageError: naming the recipe, the key and the fix.
    """
    words, values = load_recipe(path)
    given, others = {}, set(others) - set(keys)
    try:
        for name, word in words.items():
            if name in keys:
                given[name] = _entry(keys[name], word, values[name])
            elif name not in others:
                raise UsageError(f"unknown key {shown(name)}; {nearest(name, [*keys, *others], otherwise)}")
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error.__cause__
    return given


def _entry(key: Key, word: Any, value: Any) -> Any:
    if isinstance(value, list):
        if any(isinstance(element, list | dict) for element in value):
            raise UsageError(f"{key.name}: {shown(value)} is nested; a list may hold plain values only")
        if key.element is not None:
            return [convert(key, element, key.element) for element in word]
    elif isinstance(value, dict):
        if dict in {get_origin(kind) or kind for kind in key.kinds}:
            return value
    elif value is not None:
        return value_of(key, word)
    elif key.optional:
        return None
    text = NULL if value is None else shown(value)
    raise UsageError(f"{key.name}: {text} is not allowed; expected {described(key.every)}")
