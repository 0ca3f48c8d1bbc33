"""Keys read from sources are the fields that the classes have once they are imported."""

from dataclasses import MISSING, fields
from enum import Enum
from importlib import import_module
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

import hf_unlearn
from hf_unlearn.jobs.recipe.declared import UNKNOWN, alternatives, keys_of
from hf_unlearn.jobs.recipe.methods import APP, DEMO, FILTER, INFLUENCE, UNLEARN, imported_keys
from hf_unlearn.jobs.recipe.unlearn import PRESETS


CLASSES = sorted(
    {
        kind
        for methods in (UNLEARN, INFLUENCE, FILTER, {"": DEMO, "app": APP})
        for m in methods.values()
        for kind in m.classes
    }
)


def known(hint):
    """A hint as a source can tell it: enumerations as their values, and nothing of other classes."""
    kinds = set()
    for kind in alternatives(hint):
        if isinstance(kind, type) and issubclass(kind, Enum):
            kinds |= {Literal[tuple(member.value for member in kind)]}
        elif get_origin(kind) is list:
            kinds.add(list[known(get_args(kind)[0]).pop()])
        else:
            plain = get_origin(kind) in (Literal, dict) or kind in (str, int, float, bool, dict, list, NoneType)
            kinds.add(kind if plain else Any)
    return kinds


@pytest.mark.parametrize(("module", "name"), CLASSES, ids=lambda value: value.rpartition(".")[2])
def test_keys_are_the_fields(module, name):
    kind = getattr(import_module(module), name)
    hints, keys = get_type_hints(kind), keys_of(module, name)
    taken = {field.name: field for field in fields(kind) if field.init}
    assert list(keys) == list(taken)
    for key in keys.values():
        # A word that this package gives another default keeps the choices that the library has.
        assert known(key.hint) == known(hints[key.name]) or (hints[key.name] is str and {str} < known(key.hint))
        default = taken[key.name].default
        if key.default is not UNKNOWN and default is not MISSING:
            assert key.default == getattr(default, "value", default)
        if key.owner.startswith("hf_unlearn."):
            assert key.help or key.name == "hub_strategy", key.name
    # Where a library is not understood, the classes themselves are read.
    assert [(key.name, key.hint) for key in imported_keys(module, name).values()] == [(n, hints[n]) for n in taken]


CONFIGURED = [method for method in (*UNLEARN.values(), *INFLUENCE.values()) if method.config]


@pytest.mark.parametrize("method", CONFIGURED, ids=lambda method: method.config)
def test_ranges_are_those_that_the_config_keeps(method, tmp_path):
    config, keys = getattr(hf_unlearn, method.config), keys_of(*method.classes[1])
    outside = {"> 0": 0, "≥ 0": -1, "≥ 1": 0, "≥ 2": 1}
    ruled = [(key, rule) for key in keys.values() for rule in key.rules]
    assert ruled
    for key, rule in ruled:
        value = outside.get(rule, 2)
        with pytest.raises(ValueError, match=f"^{key.name}="):
            config(str(tmp_path), use_cpu=True, **{"bf16": False, key.name: value})


def test_presets_are_those_of_the_configs():
    configs = {name: getattr(hf_unlearn, method.config) for name, method in UNLEARN.items() if method.config}
    assert {name for name, config in configs.items() if hasattr(config, "paper")} == set(PRESETS)
