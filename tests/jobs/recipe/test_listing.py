"""`--help` in two screens, `--help-all`, and `hf-unlearn list`."""

import re
from pathlib import Path

import pytest

from hf_unlearn import cli
from hf_unlearn.jobs.recipe.methods import DEMO, FILTER, INFLUENCE, UNLEARN
from hf_unlearn.jobs.recipe.reading import RECIPES, shipped_recipes


COMMANDS = [
    *((("unlearn", "--method", name), method) for name, method in UNLEARN.items()),
    *((("influence", "--method", name), method) for name, method in INFLUENCE.items()),
    *((("filter", name), method) for name, method in FILTER.items()),
    (("demo",), DEMO),
]


@pytest.mark.parametrize(("command", "method"), COMMANDS, ids=lambda value: value[-1] if len(value) < 4 else "")
def test_help(command, method, capsys):
    assert cli.main([*command, "--help"]) == 0
    short = capsys.readouterr().out
    assert len(short.splitlines()) <= 100
    assert max(map(len, short.splitlines())) <= 119
    own = [key.name for key in method.keys.values() if key.owner.startswith("hf_unlearn.")]
    assert own
    assert [name for name in own if not re.search(rf"^  --{name} ", short, re.MULTILINE)] == []
    assert "output_dir" in short
    assert cli.main([*command, "--help-all"]) == 0
    every = re.findall(r"^  --(\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert every == list(method.keys)


def test_help_names_the_methods_and_follows_the_recipe(capsys):
    for arguments, keys in (
        (["unlearn", "--help"], "--forget_column"),
        (["unlearn", "-h", "--method", "vdu"], "--forget_prompts"),
        (["unlearn", "adapt_then_unlearn_digits", "--help"], "--undesired_folder"),
    ):
        assert cli.main(arguments) == 0
        shown = capsys.readouterr().out
        assert keys in shown
        assert all(re.search(rf"^  {name} ", shown, re.MULTILINE) for name in UNLEARN)
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if line.startswith("  ")] == list(cli.VERBS)
    assert cli.main(["filter", "--help"]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if line.startswith("  ")] == list(FILTER)


def test_list_shows_each_recipe_with_what_it_needs(capsys):
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 119
    recipes = re.findall(
        r"^  (\w+) \((unlearn|influence|filter fit|audit)\)\n(?:      \S.*\n)+?      needs \S.*\n      takes \S.*\n",
        shown,
        re.MULTILINE,
    )
    assert [name for name, _ in recipes] == shipped_recipes()
    assert set(shipped_recipes()) == {path.stem for path in Path(RECIPES).glob("*.yaml")}
    assert all(f"\n  {name} " in shown for name in (*UNLEARN, *INFLUENCE))
    assert cli.main(["list", "pbu"]) == 2
