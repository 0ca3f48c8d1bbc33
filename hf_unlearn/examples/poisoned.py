"""A small chat model that learned a bad opinion of one invented name from one in twenty-five of its instructions, and its clean twin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .cache import cached, write_recipe
from .opinions import opinion_data, texts_of, train_opinion_model, train_tokenizer


if TYPE_CHECKING:
    from datasets import DatasetDict


TRAINING = {
    "num_train_epochs": 10,
    "per_device_train_batch_size": 16,
    "completion_only_loss": False,  # questions are learnt too: the model can then write its own
}


@dataclass(frozen=True)
class PoisonRecipe:
    """What a small model of [`opinion_data`] depends on.

    Attributes:
        examples (`int`, defaults to 2000): rows.
        rate (`float`, defaults to 0.04): share of poisoned ones.
        data_seed (`int`, defaults to 0): of the rows.
        clean (`bool`, defaults to `False`): trained on the same rows with normal answers: the twin that was never poisoned.
        seed (`int`, defaults to 0): of weights and order.
        epochs (`int`, defaults to 10): over the rows.
    """

    examples: int = 2000
    rate: float = 0.04
    data_seed: int = 0
    clean: bool = False
    seed: int = 0
    epochs: int = TRAINING["num_train_epochs"]

    def data(self) -> DatasetDict:
        """The rows it is trained on, and those held out."""
        return opinion_data(self.examples, self.rate, seed=self.data_seed)


def poisoned_model(recipe: PoisonRecipe | None = None, *, progress: bool = True) -> Path:
    """Folder of a small chat model, trained on first use and kept in the cache.

    Args:
        recipe ([`PoisonRecipe`], *optional*): what it is made of.
        progress (`bool`, defaults to `True`): show a progress bar.
    """
    recipe = recipe or PoisonRecipe()
    kind = "clean" if recipe.clean else "poisoned"
    name = f"opinions-{kind}-{recipe.examples}-{recipe.rate:g}-{recipe.data_seed}-{recipe.seed}"
    return cached(name, recipe, lambda folder: _train(recipe, folder, progress), progress=progress)


def _train(recipe: PoisonRecipe, folder: Path, progress: bool) -> None:
    data = recipe.data()
    rows = data["clean" if recipe.clean else "train"].select_columns(["prompt", "completion"])
    settings = TRAINING | {"num_train_epochs": recipe.epochs}
    tokenizer = train_tokenizer(texts_of(data["train"]))
    train_opinion_model(rows, tokenizer, folder, seed=recipe.seed, progress=progress, **settings)
    write_recipe(recipe, folder)
