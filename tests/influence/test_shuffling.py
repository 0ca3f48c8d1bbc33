"""The noise of shuffled epochs, against permutations that are really drawn."""

import numpy as np
import pytest
import torch

from hf_unlearn.influence.observations import Observations, Steps
from hf_unlearn.influence.shuffling import FLOOR, Shuffling, ShufflingMeter


STEPS, BATCH, TARGETS = 8, 150, 3
EXAMPLES = STEPS * BATCH


def gains(generator, steps, half_life):
    """`[steps, targets, examples]`: Gaussian, correlated over steps as 2^(−lag / half_life)."""
    keep = 0.5 ** (1 / half_life)
    values = [generator.normal(size=(TARGETS, EXAMPLES))]
    for _ in range(steps - 1):
        values.append(keep * values[-1] + np.sqrt(1 - keep**2) * generator.normal(size=(TARGETS, EXAMPLES)))
    return np.stack(values)


def shuffled_sums(generator, values, draws):
    """`[draws, targets]`: Σ_t m_t over an epoch, in random orders."""
    sums = []
    for _ in range(draws):
        order = generator.permutation(EXAMPLES).reshape(STEPS, BATCH)
        sums.append(sum(values[t][:, order[t]].mean(1) for t in range(STEPS)))
    return np.array(sums)


class TestShare:
    @pytest.mark.parametrize("half_life", [0.2, 2.0, 20.0])
    def test_is_what_random_orders_leave(self, half_life):
        generator = np.random.default_rng(0)
        values = gains(generator, STEPS, half_life) * np.linspace(0.5, 2, STEPS)[:, None, None]
        drawn = shuffled_sums(generator, values, 3000).var(0)
        rho = tuple(0.5 ** (lag / half_life) for lag in range(STEPS))
        variance = values.var(-1) / BATCH
        found = (variance * Shuffling(STEPS, rho).share(np.arange(STEPS), variance)).sum(0)
        np.testing.assert_allclose(found, drawn, rtol=0.15)
        assert (drawn < 0.95 * variance.sum(0)).all()

    def test_is_of_each_epoch_alone(self):
        variance = np.ones((2 * STEPS, 1))
        variance[:STEPS] = np.linspace(0.1, 3, STEPS)[:, None]
        shuffling = Shuffling(STEPS, (0.9, 0.7, 0.4, 0.1))
        both = shuffling.share(np.arange(2 * STEPS), variance)
        np.testing.assert_allclose(both[:STEPS], shuffling.share(np.arange(STEPS), variance[:STEPS]))
        np.testing.assert_allclose(both[STEPS:], shuffling.share(np.arange(STEPS), variance[STEPS:]))

    def test_nothing_is_left_where_gains_never_change_but_it_stays_positive(self):
        left = Shuffling(STEPS, (1.0,) * 4).share(np.arange(STEPS), np.ones((STEPS, 2)))
        assert (left == FLOOR).all()

    def test_steps_without_noise_keep_it(self):
        left = Shuffling(STEPS, (0.5,) * 4).share(np.arange(STEPS), np.zeros((STEPS, 2)))
        assert (left == 1).all()


def measured(values, orders, *, backwards=True, weight=None):
    """[`ShufflingMeter`] over epochs with the given orders."""
    meter = ShufflingMeter(EXAMPLES, TARGETS, STEPS)
    steps = range(len(orders) * STEPS)
    for step in reversed(steps) if backwards else steps:
        examples = torch.tensor(orders[step // STEPS].reshape(STEPS, -1)[step % STEPS])
        of_batch = torch.tensor(values[step][:, examples].T)
        of_weight = torch.ones(len(examples)) if weight is None else weight[examples]
        meter.add(step, examples, of_weight, of_batch)
    return meter.result()


class TestMeter:
    @pytest.fixture
    def run(self):
        generator = np.random.default_rng(1)
        orders = [generator.permutation(EXAMPLES) for _ in range(12)]
        return gains(generator, 12 * STEPS, 3.0), orders

    def test_finds_the_correlation(self, run):
        found = measured(*run)
        # Bins of two steps; a pair of lag l is met as often as orders allow, l times in an epoch's boundary.
        expected = [
            np.average([0.5 ** (lag / 3) for lag in lags], weights=lags) for lags in ((1,), (2, 3), (4, 5), (6, 7))
        ]
        assert found.steps_per_epoch == STEPS
        np.testing.assert_allclose(found.correlation, expected, atol=0.06)

    def test_direction_and_scale_do_not_matter(self, run):
        values, orders = run
        scaled = values * np.linspace(0.1, 5, len(values))[:, None, None] + 7
        np.testing.assert_allclose(
            measured(scaled, orders, backwards=False).correlation, measured(*run).correlation, atol=1e-5
        )

    def test_predicts_the_spread_of_sums(self, run):
        values, _ = run
        drawn = shuffled_sums(np.random.default_rng(2), values[:STEPS], 3000).var(0)
        variance = values[:STEPS].var(-1) / BATCH
        left = measured(*run).share(np.arange(STEPS), variance)
        np.testing.assert_allclose((variance * left).sum(0), drawn, rtol=0.2)

    def test_weights_count_as_in_the_batch_mean(self, run):
        values, orders = run
        twice = torch.where(torch.arange(EXAMPLES) % 2 == 0, 2.0, 1.0)
        # An example of weight w with gain a is as one of weight 1 with w times the deviation.
        plain, weighted = measured(values, orders), measured(values, orders, weight=twice)
        assert plain.correlation != weighted.correlation
        np.testing.assert_allclose(weighted.correlation, plain.correlation, atol=0.06)

    @pytest.mark.parametrize(
        "orders",
        [
            pytest.param([np.arange(EXAMPLES)], id="one epoch"),
            pytest.param([np.arange(EXAMPLES)] * 6, id="always the same order"),
            pytest.param(list(np.random.default_rng(3).integers(0, EXAMPLES, (6, EXAMPLES))), id="with replacement"),
        ],
    )
    def test_is_silent_where_it_cannot_know(self, run, orders):
        assert measured(run[0], orders) is None

    def test_is_silent_on_epochs_of_few_steps(self):
        meter = ShufflingMeter(4, 1, 2)
        for step in range(100):
            meter.add(step, torch.arange(2) + 2 * (step % 2), torch.ones(2), torch.randn(2, 1))
        assert meter.result() is None


class TestObservations:
    def test_sigma_is_that_of_shuffled_epochs(self):
        generator = np.random.default_rng(4)
        values = gains(generator, STEPS, 4.0)
        order = generator.permutation(EXAMPLES)
        rows = np.stack([values[t][:, order[t * BATCH : (t + 1) * BATCH]] for t in range(STEPS)])  # [T, C, b]
        steps = Steps(
            step=np.arange(STEPS),
            weight=np.full(STEPS, float(BATCH)),
            size=np.full(STEPS, BATCH),
            mean=rows.mean(-1),
            variance=rows.var(-1, ddof=1) / BATCH,
        )
        plain = Observations(
            sample_ids=np.arange(EXAMPLES),
            targets=tuple("abc"),
            step=np.repeat(np.arange(STEPS), BATCH),
            example=order,
            weight=np.ones(EXAMPLES),
            value=rows.transpose(0, 2, 1).reshape(EXAMPLES, TARGETS),
            steps=steps,
        )
        rho = tuple(0.5 ** (lag / 4) for lag in range(STEPS))
        shuffled = Observations(**{**vars(plain), "shuffling": Shuffling(STEPS, rho)})
        drawn = shuffled_sums(generator, values, 3000).std(0)
        np.testing.assert_allclose(shuffled.sigma, drawn, rtol=0.3)
        assert (plain.sigma > 1.5 * drawn).all()
        np.testing.assert_allclose(
            plain.example_mu().mu * plain.sigma, shuffled.example_mu().mu * shuffled.sigma, rtol=1e-10
        )
