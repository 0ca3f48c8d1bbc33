"""The fields of a dataclass as its source declares them: their types, help and ranges, without importing what it imports.

Importing torch, transformers and trl takes seconds, and a misspelt key should be answered at once.
"""

from __future__ import annotations

import ast
import builtins
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin


UNKNOWN = object()  # a default that only running the source would tell


@dataclass(frozen=True)
class Key:
    """A field of a dataclass.

    Attributes:
        name (`str`): of the field.
        hint: its type; `Any` for what only the real class knows, and enumerations as `Literal` of their values.
        default: its default, or [`UNKNOWN`].
        help (`str`): what the docstring of its class says of it, on one line.
        owner (`str`): module of the class that has it first; others may declare it anew.
        rules (`tuple[str, ...]`): ranges it has to keep, as [`~hf_unlearn.training.checks.within`] reads them.
    """

    name: str
    hint: Any
    default: Any
    help: str
    owner: str
    rules: tuple[str, ...] = ()

    @property
    def every(self) -> tuple[Any, ...]:
        """`(float, NoneType)` for `float | None`."""
        return alternatives(self.hint)

    @property
    def kinds(self) -> tuple[Any, ...]:
        """`(list[str],)` for `list[str] | None`."""
        return tuple(kind for kind in self.every if kind is not NoneType)

    @property
    def optional(self) -> bool:
        return NoneType in self.every or Any in self.every

    @property
    def element(self) -> Any:
        """`str` for `list[str] | None`; None where it takes no list."""
        lists = [(*get_args(kind), Any)[0] for kind in self.kinds if (get_origin(kind) or kind) is list]
        return lists[0] if lists else None


def alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)


@cache
def keys_of(module: str, name: str) -> Mapping[str, Key]:
    """The fields of a dataclass that `__init__` takes.

    Args:
        module (`str`): that the class can be imported from, as in `"trl"`.
        name (`str`): of the class.

    Raises:
        LookupError: there is no such class in the source, or it is declared in a way that only running it would tell.
    """
    stub = _stub(module, name)
    helps, found = {}, {}
    for kind in reversed(stub.__mro__[:-1]):
        helps |= helps_of(kind.__doc__ or "")
        found = {key: declared for key, declared in found.items() if key not in kind.gone}  # a class variable now
        for key, declared in kind.declared.items():
            before = found.get(key, (None, kind.__module__))
            if declared[0] is str and any(get_origin(choice) is Literal for choice in alternatives(before[0])):
                declared = (before[0], *declared[1:])  # another default for the same words
            found[key] = (*declared, before[-1])
    rules = {key: set() for key in found}
    for owner in {kind.__module__ for kind in stub.__mro__[:-1]}:
        for rule, names in _ranges(owner).items():
            for key in names:
                rules.get(key, set()).add(rule)
    return {
        key: Key(key, hint, default, helps.get(key, text), owner, tuple(sorted(rules[key])))
        for key, (hint, default, text, owner) in found.items()
    }


def helps_of(docstring: str) -> dict[str, str]:
    """`{field: what a docstring says of it}`; it lists fields as "name, other (`type`, …): text."."""
    entry = r"^( +)([a-z]\w*(?:, [a-z]\w*)*) ?\((?:`[^\n]*?|\*optional[^\n]*?)\):((?:[^\n]*\n)(?:\1 +\S[^\n]*\n)*)"
    found = re.findall(entry, f"{docstring}\n", flags=re.MULTILINE)
    return {name: " ".join(text.split()) for _, names, text in found for name in names.split(", ")}


# Sources


@cache
def _source(module: str) -> tuple[ast.Module, str]:
    """What a module says, and the package that its relative imports start from."""
    path = None
    for part in module.split("."):  # `find_spec` of importlib would import the packages above
        # This package may be installed in a way that no path tells of.
        own = path is None and part == __name__.partition(".")[0]
        spec = sys.modules[part].__spec__ if own else PathFinder.find_spec(part, path)
        if spec is None or spec.origin is None:
            raise LookupError(module)
        path = spec.submodule_search_locations
    package = module if path is not None else module.rpartition(".")[0]
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8")), package


def docstring_of(module: str, name: str) -> str:
    """Of a class.

    Raises:
        LookupError: there is no such class in the source.
    """
    return _docstring(_definition(module, name)[1])


@cache
def _definition(module: str, name: str) -> tuple[str, ast.ClassDef]:
    """A class, and the module that defines it: imports are followed, also those for type checkers alone."""
    tree, package = _source(module)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                    return _definition(".".join([*above, *filter(None, [node.module])]), alias.name)
    raise LookupError(f"{module}.{name}")


@cache
def _stub(module: str, name: str) -> type:
    """An empty class with the bases of a real one, so that Python itself says in which order they count."""
    module, node = _definition(module, name)
    if not all(isinstance(base, ast.Name) for base in node.bases):
        raise LookupError(f"{module}.{name}")
    declared = {
        line.target.id: (_hint(line.annotation, module), *_default(line.value))
        for line in node.body
        if isinstance(line, ast.AnnAssign) and not ast.unparse(line.annotation).startswith("ClassVar")
    }
    gone = {ast.unparse(line.target) for line in node.body if isinstance(line, ast.AnnAssign)} - declared.keys()
    members = {"__doc__": _docstring(node), "__module__": module, "declared": declared, "gone": gone}
    return type(name, tuple(_stub(module, base.id) for base in node.bases), members)


def _docstring(node: ast.ClassDef) -> str:
    """Also where it is put together of text and other docstrings, which are those of the bases."""
    for line in node.body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "__doc__":
            parts = (part.value for part in ast.walk(line.value) if isinstance(part, ast.Constant))
            return "".join(part for part in parts if isinstance(part, str))
    return ast.get_docstring(node, clean=False) or ""


class _Names(dict):
    """What the names in an annotation mean."""

    def __init__(self, module: str):
        super().__init__(Any=Any, ClassVar=ClassVar, Literal=Literal, Union=Union)
        self.module = module

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            raise KeyError(name)  # which makes `eval` look there
        try:
            node = _definition(self.module, name)[1]
        except (LookupError, OSError):
            return Any
        assigned = [line.value for line in node.body if isinstance(line, ast.Assign)]
        values = tuple(value.value for value in assigned if isinstance(value, ast.Constant))
        return Literal[values] if values and any("Enum" in ast.unparse(base) for base in node.bases) else Any


def _hint(annotation: ast.expr, module: str) -> Any:
    return eval(ast.unparse(annotation), {}, _Names(module))  # the source of a package that would be imported


def _default(value: ast.expr | None) -> tuple[Any, str]:
    """A field's default, and the help in its metadata."""
    text = ""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        if isinstance(metadata := given.get("metadata"), ast.Dict):
            for key, words in zip(metadata.keys, metadata.values, strict=True):
                if isinstance(words, ast.Constant) and ast.unparse(key) == "'help'":
                    text = " ".join(words.value.split())
        value = given.get("default")
    try:
        return ast.literal_eval(value), text
    except (ValueError, TypeError):
        return UNKNOWN, text


@cache
def _ranges(module: str) -> dict[str, tuple[str, ...]]:
    """The tables of a module that are called `RANGES` or `…_RANGES`, which [`check_fields`] reads."""
    found: dict[str, tuple[str, ...]] = {}
    for node in _source(module)[0].body:
        if isinstance(node, ast.Assign) and any(ast.unparse(target).endswith("RANGES") for target in node.targets):
            for rule, names in ast.literal_eval(node.value).items():
                found[rule] = (*found.get(rule, ()), *names)
    return found
