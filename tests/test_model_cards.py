"""`model_cards/` holds the card of each recipe that runs on a CPU in minutes, and an index of all."""

import re
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_unlearn.hub.valid import check_card
from hf_unlearn.jobs.recipe.reading import shipped_recipes


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import model_cards  # noqa: E402


def test_the_index_names_every_recipe():
    assert (ROOT / "model_cards" / "README.md").read_text() == model_cards.index()
    assert set(model_cards.QUICK) < set(model_cards.made()) <= set(shipped_recipes())
    for name in model_cards.made():
        text = (ROOT / "model_cards" / f"{name}.md").read_text()
        check_card(text)
        assert str(Path.home()) not in text
        assert "/tmp" not in text
        for picture in re.findall(r"\]\(<?(pictures/[^>)]+)", text):
            assert (ROOT / "model_cards" / picture).is_file(), (name, picture)
        assert "```python" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", model_cards.QUICK)
def test_a_recipe_makes_its_card(name, tmp_path):
    """The same fields and sections, whatever the figures."""
    made, kept = model_cards.card_of(name, tmp_path / name), (ROOT / "model_cards" / f"{name}.md").read_text()
    assert model_cards.structure(made) == model_cards.structure(kept)
    assert ModelCard(made).data.to_dict().keys() == ModelCard(kept).data.to_dict().keys()
