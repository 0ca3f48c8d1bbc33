"""The cards in `model_cards/` are what the recipes produce: regenerated here, and compared but for what may differ."""

import re
from pathlib import Path

import pytest

from hf_unlearn import cli


ROOT = Path(__file__).parents[1]


def normalised(card: str) -> str:
    """Without what differs between machines and days: figures, digests, dates, versions."""
    card = re.sub(r"(?m)^    - type: accuracy\n      value: .*$", "    - type: accuracy\n      value: #", card)
    card = re.sub(r"\d+\.\d+ %", "# %", card)
    card = re.sub(r"`[0-9a-f]{64}`", "`#`", card)
    card = re.sub(r"(?m)^\| (made on|versions|optimiser steps) \| .*$", r"| \1 | # |", card)
    return card


@pytest.mark.parametrize("recipe", ["pbu_digits"])
def test_the_recipe_writes_the_card_that_is_checked_in(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["unlearn", "--config", str(ROOT / "recipes" / f"{recipe}.yaml"), "--disable_tqdm", "true"]) == 0
    written = (tmp_path / "outputs" / recipe / "README.md").read_text()
    assert normalised(written) == normalised((ROOT / "model_cards" / f"{recipe}.md").read_text())
