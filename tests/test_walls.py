"""The walls of the house: what may import what, annotations included, and no circles."""

import ast
import graphlib
from functools import cache
from pathlib import Path

import pytest

import hf_unlearn


ROOT = Path(hf_unlearn.__file__).parent
GROUND = {"brute_force", "data", "images", "modes", "files", "plots", "ensembles", "tradeoff"}
# Each may import what stands before it. The wings (one a verb) stand beside each other and may not.
FLOORS = [GROUND, {"parameters", "metrics", "hub"}, {"training"}, {"gan"}, {"influence", "unlearning", "filtering", "audit"},
          {"examples"}, {"jobs"}, {"app"}, {"cli"}]  # fmt: skip
# Inside a wing the folders import the wing's own files, not each other; these are the exceptions.
EXCEPTIONS = {
    ("influence.propagated", "influence.report"),  # the sweep records what the report reads
    ("jobs.filter", "jobs.recipe"),  # what a job runs is what its recipe asked for
    ("jobs.demo", "jobs.recipe"),
    ("filtering.fitting", "filtering.encoding"),  # a fitter looks through an encoder
}


def module(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


@cache
def imports():
    """`{module: modules}` below hf_unlearn, as tuples of names; every import counts, wherever it stands."""
    files = {module(path): path for path in sorted(ROOT.rglob("*.py"))}
    found = {}
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name[:-1]
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else ()
                target = (*base, *(node.module or "").split(".")) if node.module else base
                if not node.level:
                    if target[0] != "hf_unlearn":
                        continue
                    target = target[1:]
                for alias in node.names:
                    whole = (*target, alias.name)
                    found[name].add(whole if whole in files else target)
    return found


def floor(name):
    return next(number for number, rooms in enumerate(FLOORS) if name[0] in rooms)


def test_every_module_has_a_floor():
    rooms = set.union(*FLOORS)
    assert {name[0] for name in imports() if name} == rooms


def test_imports_go_down():
    wrong = [
        f"{'.'.join(name)} imports {'.'.join(target)}"
        for name, targets in imports().items()
        for target in targets
        if name and target and name[0] != target[0] and floor(target) >= floor(name) > 0
    ]
    ground = [
        f"{'.'.join(name)} imports {'.'.join(target)}"
        for name, targets in imports().items()
        for target in targets
        if name and target and floor(name) == 0 and floor(target) > 0
    ]
    assert wrong + ground == []


def test_folders_of_a_wing_do_not_know_each_other():
    wrong = [
        f"{'.'.join(name)} imports {'.'.join(target)}"
        for name, targets in imports().items()
        for target in targets
        if len(name) > 2 and len(target) > 2 and name[0] == target[0] and name[1] != target[1]
        and (".".join(name[:2]), ".".join(target[:2])) not in EXCEPTIONS
    ]  # fmt: skip
    assert wrong == []


def test_no_circles():
    try:
        graphlib.TopologicalSorter(imports()).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" → ".join(".".join(name) for name in error.args[1]))


def test_the_package_itself_imports_nothing():
    assert imports()[()] == set()
