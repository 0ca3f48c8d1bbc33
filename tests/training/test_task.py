from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_unlearn.modes import seeded_generator
from hf_unlearn.training.losses import cross_entropy, mean_over_predictions


class TestCrossEntropy:
    @settings(deadline=None, max_examples=40)
    @given(
        logits=st.lists(st.floats(-20, 20, width=32), min_size=24, max_size=24),
        targets=st.lists(st.sampled_from([-100, 0, 1, 2]), min_size=8, max_size=8),
    )
    def test_sequences_against_torch_one_by_one(self, logits, targets):
        logits, targets = torch.tensor(logits).view(2, 4, 3), torch.tensor(targets).view(2, 4)
        actual = cross_entropy(logits, targets)
        for row in range(2):
            if (targets[row] == -100).all():
                assert actual[row] == 0
            else:
                torch.testing.assert_close(actual[row], F.cross_entropy(logits[row], targets[row]))

    def test_classification_and_deeper_shapes(self):
        generator = torch.Generator().manual_seed(0)
        logits, targets = torch.randn(4, 3, generator=generator), torch.tensor([0, 1, -100, 2])
        expected = F.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
        torch.testing.assert_close(cross_entropy(logits, targets), expected)
        maps, classes = torch.randn(2, 3, 5, 4, generator=generator), torch.randint(4, (2, 3, 5), generator=generator)
        expected = F.cross_entropy(maps.movedim(-1, 1), classes, reduction="none").mean((1, 2))
        torch.testing.assert_close(cross_entropy(maps, classes), expected)
        assert cross_entropy(maps.bfloat16(), classes).dtype == torch.float32

    def test_ignored_predictions_have_no_gradient(self):
        logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
        targets = torch.tensor([[0, -100, 2, -100], [-100] * 4])
        assert torch.equal(
            torch.autograd.grad(cross_entropy(logits, targets).sum(), logits)[0].any(-1), targets != -100
        )

    def test_ignored_values_may_be_anything(self):
        values = torch.tensor([[1.0, torch.inf], [torch.nan, 3.0]])
        means = mean_over_predictions(values, torch.tensor([[5, -100], [-100, 5]]))
        torch.testing.assert_close(means, torch.tensor([1.0, 3.0]))


def drawn(*key):
    return torch.rand(4, generator=seeded_generator("cpu", *key))


class TestSeededGenerator:
    @settings(deadline=None, max_examples=20)
    @given(key=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5))
    def test_the_same_key_gives_the_same_numbers(self, key):
        first = drawn(*key)
        torch.rand(3)  # what others draw meanwhile does not matter
        assert torch.equal(drawn(*key), first)

    def test_every_key_of_a_length_gives_others(self):
        """Seed, process and step count up from 0, and none may stand in for another; nor may its place."""
        for keys in ([*product(range(4), repeat=3), (3, 0, 14), (3, 14, 0)], [(0, 1), (1, 0)], [(1,), (2,)]):
            assert len({tuple(drawn(*key).tolist()) for key in keys}) == len(keys)

    def test_keys_side_by_side_are_not_correlated(self):
        rows = np.stack([torch.randn(500, generator=seeded_generator("cpu", 0, step)).numpy() for step in range(40)])
        correlations = np.corrcoef(rows)[np.triu_indices(40, 1)]
        assert np.abs(correlations).max() < 5 / 500**0.5
        assert correlations.std() == pytest.approx(1 / 500**0.5, rel=0.15)

    def test_leaves_the_global_generator_alone(self):
        before = torch.get_rng_state()
        drawn(1, 2)
        assert torch.equal(torch.get_rng_state(), before)
