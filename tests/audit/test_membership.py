import numpy as np
import pytest
from scipy.stats import entropy as scipy_entropy

from hf_unlearn.audit.membership import entropy, membership_by_entropy


def logits(sharpness, n=60, seed=0):
    """Predictions that grow more certain with `sharpness`."""
    return sharpness * np.random.default_rng(seed).normal(size=(n, 10))


SURE, UNSURE = logits(30, seed=1), logits(0.1, seed=2)


def test_entropy():
    z = logits(3)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    np.testing.assert_allclose(entropy(z), scipy_entropy(p, axis=1), rtol=1e-12)
    assert entropy(np.zeros((1, 10)))[0] == pytest.approx(np.log(10))
    assert entropy([[2000.0, 0, 0]])[0] == 0  # no overflow, and 0 · log 0 is 0
    np.testing.assert_allclose(entropy(SURE), entropy(SURE + 123.0), rtol=1e-9)


def test_separable_entropies_give_all_nothing_or_the_share():
    members, others = logits(30, n=30, seed=3), logits(0.1, n=10, seed=4)
    assert membership_by_entropy(SURE, UNSURE, members) == 1.0
    assert membership_by_entropy(SURE, UNSURE, others) == 0.0
    assert membership_by_entropy(UNSURE, SURE, members) == 0.0
    assert membership_by_entropy(SURE, UNSURE, np.concatenate([members, others])) == 0.75


def test_the_attacker_is_the_documented_one_on_groups_of_one_size():
    """In between, a kernel of another width or another C answers otherwise."""
    from sklearn.svm import SVC

    members, nonmembers, suspects = logits(2, n=90, seed=5), logits(1, n=40, seed=6), logits(1.5, n=200, seed=7)
    for first, second in ((members, nonmembers), (nonmembers, members)):
        features = np.concatenate([entropy(first[:40]), entropy(second[:40])])[:, None]
        attacker = SVC(C=3, gamma="auto", kernel="rbf").fit(features, [1] * 40 + [0] * 40)
        share = attacker.predict(entropy(suspects)[:, None]).mean()
        assert 0.1 < share < 0.9
        assert membership_by_entropy(first, second, suspects) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_an_empty_group_is_refused_by_name(position):
    groups = [SURE, UNSURE, SURE]
    groups[position] = np.empty((0, 10))
    with pytest.raises(ValueError, match="^" + ("members", "nonmembers", "suspects")[position] + ": is empty"):
        membership_by_entropy(*groups)
