"""Fixtures of the tests that train: a digits classifier that many of them start from."""

import copy

import pytest

from hf_unlearn.examples import classifier
from hf_unlearn.examples import datasets as example_data


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory):
    """Where a classifier of all ten digits is saved with its processor: trained on half of the training split, seconds."""

    folder = tmp_path_factory.mktemp("original") / "digits"
    dataset = example_data.digits()["train"].shuffle(seed=0).select(range(600))
    classifier.train_classifier(dataset, folder, progress=False, num_train_epochs=8)
    return folder


@pytest.fixture(scope="session")
def _digits_model(digits_folder):
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(digits_folder)


@pytest.fixture
def digits_classifier(_digits_model):
    """A fresh copy of that classifier."""
    return copy.deepcopy(_digits_model)


@pytest.fixture(scope="session")
def digits_parts(digits):
    """`forget`: training images of the digit 3; `retain`: validation images of all others; `test`: validation 3s."""
    from hf_unlearn.data import split_by_values

    forget, _ = split_by_values(digits["train"], "label", [3])
    test, retain = split_by_values(digits["validation"], "label", [3])
    return {"forget": forget, "retain": retain, "test": test}
