"""Fixtures of the tests that train GANs."""

import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def light_garbage_collection():
    """Every `Trainer.train()` collects garbage: half a second of looking at what the libraries have imported."""
    import hf_unlearn.gan.trainer  # noqa: F401

    gc.collect()
    gc.freeze()
