import numpy as np
import pytest
from scipy.stats import entropy as scipy_entropy

from hf_unlearn.audit.membership import entropy, membership_by_entropy


def logits(sharpness, n=60, classes=10, seed=0):
    """Predictions that grow more certain with `sharpness`."""
    return sharpness * np.random.default_rng(seed).normal(size=(n, classes))


SURE, UNSURE = logits(30, seed=1), logits(0.1, seed=2)


class TestEntropy:
    def test_against_scipy(self):
        z = logits(3, n=25)
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        np.testing.assert_allclose(entropy(z), scipy_entropy(p, axis=1), rtol=1e-12)

    def test_bounds(self):
        assert entropy(np.zeros((1, 10)))[0] == pytest.approx(np.log(10))
        assert entropy([[2000.0, 0, 0]])[0] == 0  # no overflow, and 0 · log 0 is 0
        np.testing.assert_allclose(entropy(SURE), entropy(SURE + 123.0), rtol=1e-9)


class TestMembership:
    def test_separable_entropies_give_all_or_nothing(self):
        assert membership_by_entropy(SURE, UNSURE, logits(30, seed=3)) == 1.0
        assert membership_by_entropy(SURE, UNSURE, logits(0.1, seed=3)) == 0.0

    def test_a_mixture_gives_its_share(self):
        suspects = np.concatenate([logits(30, n=30, seed=3), logits(0.1, n=10, seed=4)])
        assert membership_by_entropy(SURE, UNSURE, suspects) == 0.75

    def test_the_order_of_the_arguments_matters(self):
        assert membership_by_entropy(UNSURE, SURE, logits(30, seed=3)) == 0.0

    def test_the_same_distribution_is_about_chance(self):
        shares = [
            membership_by_entropy(*(logits(1, n=200, seed=10 * trial + part) for part in range(3)))
            for trial in range(60)
        ]
        assert 0.4 < np.mean(shares) < 0.6

    def test_groups_of_different_sizes_count_alike(self):
        few = logits(0.1, n=6, seed=5)
        assert membership_by_entropy(SURE, few, few) == 0.0
        # One class of 600 against 6 with the same law: an attacker that saw them all would call everything a member.
        shares = [
            membership_by_entropy(
                logits(1, n=600, seed=s), logits(1, n=20, seed=s + 50), logits(1, n=200, seed=s + 99)
            )
            for s in range(12)
        ]
        assert np.mean(shares) < 0.8

    @pytest.mark.parametrize("position", [0, 1, 2])
    def test_an_empty_group_is_refused_by_name(self, position):
        groups = [SURE, UNSURE, SURE]
        groups[position] = np.empty((0, 10))
        with pytest.raises(ValueError, match="^" + ("members", "nonmembers", "suspects")[position] + ": is empty"):
            membership_by_entropy(*groups)
