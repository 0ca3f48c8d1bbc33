import numpy as np
import pytest
from made_up import of_themselves, record

from hf_unlearn.influence.report.observations import step_statistics


EXAMPLES, STEPS, BATCH, TARGETS = 12, 9, 5, 2


def draw(seed=0, steps=STEPS, batch=BATCH, examples=EXAMPLES, targets=TARGETS, offset=0.3):
    generator = np.random.default_rng(seed)
    return [
        (
            3 * step,
            generator.permutation(examples)[:batch],
            generator.integers(1, 6, batch).astype(float),
            generator.normal(offset, 1, (batch, targets)),
        )
        for step in range(steps)
    ]


def mean_of(weight, value, kept):
    """The weighted mean by its definition; None of nothing."""
    pairs = [(w, v) for w, v, keep in zip(weight, value, kept, strict=True) if keep]
    return sum(w * v for w, v in pairs) / sum(w for w, _ in pairs) if pairs else None


def delta(batch, group):
    """m(B) − m(B∖S), by leaving S out; for a batch that is not emptied by it."""
    _, members, weight, value = batch
    everything = np.ones(len(members), dtype=bool)
    return mean_of(weight, value, everything) - mean_of(weight, value, [i not in group for i in members])


def total_sigma(batches):
    """√Σσ², with σ² the variance of a weighted mean over the draw of its members."""
    total = 0.0
    for _, members, weight, value in batches:
        share = [w / sum(weight) for w in weight]
        mean = sum(s * v for s, v in zip(share, value, strict=True))
        total = total + len(members) / (len(members) - 1) * sum(
            (s * (v - mean)) ** 2 for s, v in zip(share, value, strict=True)
        )
    return np.sqrt(total)


def test_statistics_of_a_step():
    """Without weights the variance is the squared standard error; of one example there is none."""
    value = np.random.default_rng(0).normal(2, 1, (7, 3))
    weight, mean, variance = step_statistics(np.ones(7), value)
    assert weight == 7
    np.testing.assert_allclose(mean, value.mean(0))
    np.testing.assert_allclose(variance, value.var(0, ddof=1) / 7)
    weight, mean, variance = step_statistics(np.array([4.0]), np.array([[1.0, 2.0]]))
    assert weight == 4
    np.testing.assert_allclose(mean, [1, 2])
    assert np.isnan(variance).all()


def test_signal_of_an_example_is_what_the_batch_loses_without_it():
    batches = draw()
    signals = record(batches).signals()
    expected = [delta(batch, {example}) for batch in batches for example in batch[1]]
    np.testing.assert_allclose(signals, expected)


def test_mu_of_examples():
    batches = draw()
    expected = np.zeros((EXAMPLES, TARGETS))
    count = np.zeros(EXAMPLES, dtype=int)
    for batch in batches:
        for example in batch[1]:
            expected[example] += delta(batch, {example}) / total_sigma(batches)
            count[example] += 1
    estimates = record(batches).example_mu()
    np.testing.assert_allclose(estimates.mu, expected)
    assert estimates.n_observations.tolist() == count.tolist()


def test_intervals_of_examples_are_students_over_their_own_observations():
    from scipy import stats

    batches = draw(1)
    estimates = record(batches).example_mu(confidence=0.8)
    own = np.array([delta(batch, {4}) for batch in batches if 4 in batch[1]]) / total_sigma(batches)
    mean, error = own.mean(0), stats.sem(own, axis=0)
    low, high = stats.t.interval(0.8, len(own) - 1, mean, error)
    np.testing.assert_allclose(estimates.low[4], len(own) * low)
    np.testing.assert_allclose(estimates.high[4], len(own) * high)


def test_examples_seen_never_and_once():
    draws = np.random.default_rng(0).normal(size=(2, 3, 2))
    batches = [(step, np.array([0, 1, 2 + step]), np.ones(3), draws[step]) for step in (0, 1)]
    estimates = record(batches, examples=6).example_mu()
    assert estimates.n_observations.tolist() == [2, 2, 1, 1, 0, 0]
    assert np.isfinite(estimates.mu).all(1).tolist() == [True] * 4 + [False] * 2
    for bound in (estimates.low, estimates.high):
        assert np.isfinite(bound).all(1).tolist() == [True] * 2 + [False] * 4


def test_signal_of_groups_is_what_the_batch_loses_without_them():
    batches = draw()
    groups = [[0, 1, 2], [3], [4, 5, 6, 7, 8]]
    signals = record(batches).group_signals([np.array(group) for group in groups])
    for group, of_group in zip(groups, signals, strict=True):
        for batch, found in zip(batches, of_group, strict=True):
            if set(batch[1]) <= set(group):
                continue
            np.testing.assert_allclose(found, delta(batch, set(group)), atol=1e-12)


def test_a_group_of_one_is_its_example():
    observations = record(draw())
    signals = observations.group_signals([np.array([example]) for example in range(EXAMPLES)])
    np.testing.assert_allclose(signals.sum(1) / observations.sigma, observations.example_mu().mu)


def test_signals_add_up_to_first_order_in_the_share_of_the_batch():
    batches = draw(batch=200, examples=1000, steps=4)
    observations = record(batches, examples=1000)
    group = np.arange(10)
    together = observations.group_signals([group])[0].sum(0)
    alone = observations.group_signals([np.array([example]) for example in group]).sum((0, 1))
    np.testing.assert_allclose(together, alone, rtol=0.05)


def test_everybody_together_is_no_better_than_the_mean():
    batch = (0, np.arange(4), np.array([1.0, 2, 3, 4]), np.array([[1.0], [2], [3], [4]]))
    signals = record([batch], examples=4, targets=("a",)).signals()[:, 0]
    shares = np.array([1, 2, 3, 4]) / 10
    assert (signals * (1 - shares)).sum() == pytest.approx(0)  # Σ w_i (a_i − m) = 0


@pytest.mark.parametrize("size", [1, 3])
def test_a_batch_that_is_the_group_loses_its_gain_beyond_the_trend(size):
    """Gains of 1, and of 3 at the step of the group: what another batch would have gained is the mean of those around."""
    batches = [
        (step, np.arange(size) + size * (step == 20), np.ones(size), np.full((size, 1), 3.0 if step == 20 else 1.0))
        for step in range(41)
    ]
    observations = record(batches, examples=2 * size, targets=("a",))
    signal = observations.group_signals([np.arange(size) + size])[0, :, 0]
    assert signal[20] == pytest.approx(3 - 1)
    assert not np.delete(signal, 20).any()
    if size == 1:
        assert observations.signals()[20, 0] == pytest.approx(signal[20])


def test_variance_of_batches_of_one_comes_from_neighbouring_steps():
    generator = np.random.default_rng(0)
    batches = [(step, np.array([step % 7]), np.ones(1), generator.normal(0, 2, (1, 2))) for step in range(4000)]
    observations = record(batches, examples=7)
    np.testing.assert_allclose(observations.variance, np.full((4000, 2), 4.0), rtol=0.1)
    assert np.isfinite(observations.example_mu().mu).all()


def test_helpful_examples_are_positive_whatever_the_scale():
    batches = draw(offset=0.0)
    for _, members, _, value in batches:
        value[members == 3], value[members == 4] = 5.0, -5.0
    mu = record(batches).example_mu().mu
    assert (mu[3] > 0).all()
    assert (mu[4] < 0).all()
    scaled = [(step, members, weight, 1000 * value) for step, members, weight, value in batches]
    np.testing.assert_allclose(record(scaled).example_mu().mu, mu)


def test_weight_counts_like_repetition():
    value, again = np.array([[1.0], [4.0], [2.0]]), np.array([0, 1, 1, 1, 2, 2])
    weighted = record([(0, np.arange(3), np.array([1.0, 3.0, 2.0]), value)], examples=3, targets=("a",))
    repeated = record([(0, again, np.ones(6), value[again])], examples=3, targets=("a",))
    groups = [np.array([0]), np.array([1]), np.array([0, 2])]
    np.testing.assert_allclose(weighted.group_signals(groups), repeated.group_signals(groups))


def test_self_influence():
    """Value: gain on itself, the batch's mean gain on it, the variance of that mean."""
    observations, expected = of_themselves()
    assert observations.is_self
    np.testing.assert_allclose(observations.signals()[:, 0], [4 / 3, 0, 3, 6])
    np.testing.assert_allclose(observations.example_mu().mu[:, 0], expected)
    with pytest.raises(ValueError, match=r"^group: .* target_dataset$"):
        observations.group_signals([np.array([0])])


def test_since_leaves_out_the_first_steps():
    batches = draw()
    late = record(batches).since(9)  # steps are 0, 3, 6, 9, …
    expected = record(batches[3:])
    np.testing.assert_allclose(late.example_mu().mu, expected.example_mu().mu)
    assert late.steps.step.tolist() == expected.steps.step.tolist()
