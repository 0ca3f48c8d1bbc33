"""The noise of shuffled epochs, against permutations that are really drawn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_unlearn.influence.report.observations import Observations, Steps
from hf_unlearn.influence.report.shuffling import FLOOR, MIN_PAIRS, Shuffling, ShufflingMeter, together


STEPS, BATCH, TARGETS = 8, 150, 3
EXAMPLES = STEPS * BATCH


def gains(generator, steps, half_life):
    """`[steps, targets, examples]`: Gaussian, correlated over steps as 2^(−lag / half_life)."""
    keep = 0.5 ** (1 / half_life)
    values = [generator.normal(size=(TARGETS, EXAMPLES))]
    for _ in range(steps - 1):
        values.append(keep * values[-1] + np.sqrt(1 - keep**2) * generator.normal(size=(TARGETS, EXAMPLES)))
    return np.stack(values)


def sizes(last=BATCH):
    """`[STEPS]`: of the batches of an epoch."""
    return np.array([BATCH] * (STEPS - 1) + [last])


def shuffled_sums(generator, values, draws, size, kept):
    """`[draws, targets]`: Σ_t m_t over the steps `kept` of an epoch, in random orders."""
    step_of, kept = np.repeat(np.arange(STEPS), size), np.isin(np.arange(STEPS), kept)
    by_example = values.transpose(2, 0, 1) * (kept / size)[:, None]  # [examples, steps, targets]
    examples = np.arange(len(step_of))
    return np.array([by_example[generator.permutation(examples), step_of].sum(0) for _ in range(draws)])


def exact(half_life):
    """[`Shuffling`] with ρ at every lag."""
    return Shuffling(STEPS, tuple(0.5 ** (lag / half_life) for lag in range(1, STEPS)))


class TestShare:
    @pytest.mark.parametrize(
        ("half_life", "last", "first"), [(0.2, BATCH, 0), (2.0, BATCH, 0), (20.0, BATCH, 0), (4.0, 1, 0), (4.0, 75, 0), (10.0, BATCH, 3)]
    )  # fmt: skip
    def test_is_what_random_orders_leave(self, half_life, last, first):
        """Of whole epochs, of those with a smaller last batch, and of the end of one; variances of 3,000 orders are within 8 %."""
        generator, size, kept = np.random.default_rng(0), sizes(last), np.arange(first, STEPS)
        values = gains(generator, STEPS, half_life)[..., : size.sum()] * np.linspace(0.5, 2, STEPS)[:, None, None]
        drawn = shuffled_sums(generator, values, 3000, size, kept).var(0)
        variance = values[kept].var(-1) / size[kept, None]
        left = exact(half_life).share(kept + 5 * STEPS, variance, size[kept], size.sum())
        np.testing.assert_allclose((variance * left).sum(0), drawn, rtol=0.15)
        assert (drawn < (0.95 if last == BATCH else 1.05) * variance.sum(0)).all()

    def test_is_of_each_epoch_alone(self):
        variance = np.ones((2 * STEPS, 1))
        variance[:STEPS] = np.linspace(0.1, 3, STEPS)[:, None]
        shuffling, size = Shuffling(STEPS, (0.9, 0.7, 0.4, 0.1)), np.tile(sizes(), 2)
        both = shuffling.share(np.arange(2 * STEPS), variance, size, EXAMPLES)
        for epoch in (slice(STEPS), slice(STEPS, None)):
            alone = shuffling.share(np.arange(STEPS), variance[epoch], sizes(), EXAMPLES)
            np.testing.assert_allclose(both[epoch], alone)

    def test_long_epochs_take_little_memory(self):
        length = 50_000  # a matrix of steps by steps would take 20 GB
        variance = np.full((length, 1), 2.0)
        left = Shuffling(length, (0.3,)).share(np.arange(length), variance, np.full(length, 4), 4 * length)
        np.testing.assert_allclose(left, 1 - 0.3, atol=1e-4)

    def test_nothing_is_left_where_gains_never_change_but_it_stays_positive(self):
        left = Shuffling(STEPS, (1.0,) * 4).share(np.arange(STEPS), np.ones((STEPS, 2)), sizes(), EXAMPLES)
        assert (left == FLOOR).all()

    def test_steps_without_noise_keep_it(self):
        left = Shuffling(STEPS, (0.5,) * 4).share(np.arange(STEPS), np.zeros((STEPS, 2)), sizes(), EXAMPLES)
        assert (left == 1).all()


def measured(values, orders, *, backwards=True, weight=None, size=None):
    """[`ShufflingMeter`] over epochs with the given orders."""
    ends = np.cumsum(sizes() if size is None else size)
    meter = ShufflingMeter(values.shape[-1], values.shape[1], STEPS)
    steps = range(len(orders) * STEPS)
    for step in reversed(steps) if backwards else steps:
        examples = torch.tensor(np.split(orders[step // STEPS], ends[:-1])[step % STEPS])
        of_batch = torch.tensor(values[step][:, examples].T)
        of_weight = torch.ones(len(examples)) if weight is None else weight[examples]
        meter.add(step, examples, of_weight, of_batch)
    return meter.result()


def of_bins(half_life):
    """ρ in the four bins of seven lags, weighted as often as they are met: lag l comes l times in an epoch's boundary."""
    bins = [[lag for lag in range(1, STEPS) if (lag - 1) * 4 // (STEPS - 1) == place] for place in range(4)]
    return [np.average([0.5 ** (lag / half_life) for lag in lags], weights=lags) for lags in bins]


def drawn_batch_by_batch(seed):
    generator = np.random.default_rng(seed)
    return np.concatenate([generator.choice(EXAMPLES, BATCH, replace=False) for _ in range(STEPS)])


class TestMeter:
    @pytest.fixture
    def run(self):
        generator = np.random.default_rng(1)
        orders = [generator.permutation(EXAMPLES) for _ in range(12)]
        return gains(generator, 12 * STEPS, 3.0), orders

    def test_finds_the_correlation(self, run):
        found = measured(*run)
        assert found.steps_per_epoch == STEPS
        np.testing.assert_allclose(found.correlation, of_bins(3.0), atol=0.06)

    @pytest.mark.parametrize("scale", [1e-30, 1.0, 1e12])
    def test_direction_and_scale_do_not_matter(self, scale, run):
        values, orders = run
        scaled = values * scale * np.linspace(0.1, 5, len(values))[:, None, None] + 7 * scale
        np.testing.assert_allclose(
            measured(scaled, orders, backwards=False).correlation, measured(*run).correlation, atol=1e-5
        )

    def test_small_batches_are_not_biased_by_their_means(self):
        generator = np.random.default_rng(6)
        constant = np.repeat(generator.normal(size=(1, 1, 64)), 60 * STEPS, axis=0)  # ρ = 1, batches of eight
        orders = [generator.permutation(64) for _ in range(60)]
        found = measured(constant, orders, size=np.full(STEPS, 8))
        assert np.mean(found.correlation) > 0.93  # 1 − 1/b is 0.875

    def test_weights_count_as_in_the_batch_mean(self):
        generator = np.random.default_rng(5)
        orders = [generator.permutation(EXAMPLES) for _ in range(12)]
        kept, changing = gains(generator, 1, 1.0)[[0] * 12 * STEPS], gains(generator, 12 * STEPS, 0.1)
        heavy = np.arange(EXAMPLES) % 2 == 0  # w = 3, and their gains never change; those of the others always do
        values, weight = np.where(heavy, kept, changing), torch.where(torch.tensor(heavy), 3.0, 1.0)
        # An example's part in the batch's mean is w·a: of the variance 9 parts in 10 are the heavy ones'.
        np.testing.assert_allclose(measured(values, orders, weight=weight).correlation, 0.9, atol=0.05)
        np.testing.assert_allclose(measured(values, orders).correlation, 0.5, atol=0.06)

    def test_a_target_that_nothing_moves_is_not_counted(self, run):
        values, orders = run
        dead = values.copy()
        dead[:, 1] = 0.25
        np.testing.assert_allclose(measured(dead, orders).correlation, of_bins(3.0), atol=0.08)
        assert measured(np.full_like(values, 0.25), orders) is None

    @settings(deadline=None, max_examples=150)
    @given(rows=st.integers(1, 120), batch=st.integers(1, 40), epochs=st.integers(1, 5), left=st.integers(0, 3))
    def test_runs_of_any_size(self, rows, batch, epochs, left):
        """Gains that never change have ρ = 1, wherever it is known; a run may end in the middle of an epoch."""
        length = -(-rows // batch)
        if length < 2:
            return
        generator, meter = np.random.default_rng(rows), ShufflingMeter(rows, 1, length)
        always = torch.tensor(generator.normal(size=(rows, 1)))
        steps = [part for _ in range(epochs) for part in torch.tensor(generator.permutation(rows)).split(batch)]
        for step in reversed(range(len(steps) - min(left, length - 1))):
            meter.add(step, steps[step], torch.ones(len(steps[step])), always[steps[step]])
        found = meter.result()
        if epochs == 1:
            assert found is None
        if found is not None:
            assert len(found.correlation) == min(4, length - 1)
            assert np.isfinite(found.correlation).all()
            assert (np.diff(found.correlation) <= 0).all()
            observed = np.arange(len(steps) - min(left, length - 1))
            size = np.array([len(steps[step]) for step in observed])
            share = found.share(observed, np.ones((len(observed), 1)), size, rows)
            assert ((share > 0) & (share <= 1)).all()
            if rows >= 100 and 20 <= batch <= 33:
                np.testing.assert_allclose(
                    found.correlation, 1, atol=0.55
                )  # of all these runs the furthest off is by 0.45

    @settings(deadline=None, max_examples=100)
    @given(st.lists(st.integers(0, 70), min_size=1, max_size=6))
    def test_bins_with_few_looks_go_together(self, pairs):
        groups = together(np.array(pairs))
        assert sum(groups, []) == list(range(len(pairs)))
        enough = [sum(pairs[place] for place in group) >= MIN_PAIRS for group in groups]
        assert all(enough) or len(groups) == 1

    def test_of_three_bins_the_first_stays_alone(self):
        assert together(np.array([30, 10, 10, 10])) == [[0], [1, 2, 3]]

    def test_two_epochs_and_a_last_batch_of_one_will_do(self):
        generator, size = np.random.default_rng(8), sizes(1)
        values = gains(generator, 2 * STEPS, 3.0)[..., : size.sum()]
        found = measured(values, [generator.permutation(size.sum()) for _ in range(2)], size=size)
        np.testing.assert_allclose(found.correlation, of_bins(3.0), atol=0.25)

    @pytest.mark.parametrize(
        "orders",
        [
            pytest.param([np.arange(EXAMPLES)], id="one epoch"),
            pytest.param([np.arange(EXAMPLES)] * 6, id="always the same order"),
            pytest.param(list(np.random.default_rng(3).integers(0, EXAMPLES, (6, EXAMPLES))), id="with replacement"),
            pytest.param(
                [drawn_batch_by_batch(epoch) for epoch in range(6)], id="batches without, epochs with replacement"
            ),
        ],
    )
    def test_is_silent_where_it_cannot_know(self, run, orders):
        assert measured(run[0], orders) is None


class TestObservations:
    def test_sigma_is_that_of_shuffled_epochs(self):
        generator = np.random.default_rng(4)
        values = gains(generator, STEPS, 4.0)
        order = generator.permutation(EXAMPLES)
        rows = np.stack([values[t][:, order[t * BATCH : (t + 1) * BATCH]] for t in range(STEPS)])  # [T, C, b]
        size = np.full(STEPS, BATCH)
        steps = Steps(np.arange(STEPS), 1.0 * size, size, rows.mean(-1), rows.var(-1, ddof=1) / BATCH)
        value = rows.transpose(0, 2, 1).reshape(EXAMPLES, TARGETS)
        step, weight = np.repeat(np.arange(STEPS), BATCH), np.ones(EXAMPLES)
        plain = Observations(np.arange(EXAMPLES), tuple("abc"), step, order, weight, value, steps)
        shuffled = replace(plain, shuffling=exact(4.0))
        drawn = shuffled_sums(generator, values, 3000, sizes(), np.arange(STEPS)).std(0)
        np.testing.assert_allclose(shuffled.sigma, drawn, rtol=0.3)
        assert (plain.sigma > 1.5 * drawn).all()
        np.testing.assert_allclose(
            plain.example_mu().mu * plain.sigma, shuffled.example_mu().mu * shuffled.sigma, rtol=1e-10
        )
