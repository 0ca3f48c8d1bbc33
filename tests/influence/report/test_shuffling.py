"""The noise of shuffled epochs, against permutations that are really drawn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_unlearn.influence.report import shuffling
from hf_unlearn.influence.report.observations import Observations, Steps
from hf_unlearn.influence.report.shuffling import PANEL, Panel, Shuffling, panel_of


STEPS, BATCH, TARGETS = 8, 30, 3
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


def looked_at(values, orders, *, size=None, rows=None, weight=None, first=0, steps=None):
    """[`Panel`] of the rows over epochs with the given orders, swept backwards."""
    size = sizes() if size is None else size
    number, rows = size.sum(), np.arange(size.sum()) if rows is None else rows
    steps = len(orders) * len(size) if steps is None else steps
    panel = Panel(number, steps, len(size), first)
    weight = torch.ones(values.shape[-1]) if weight is None else weight
    for step in reversed(range(first, steps)):
        if step in panel.looks:
            panel.look(step, weight[rows], torch.tensor(values[step][:, rows].T))
        batches = np.split(orders[step // len(size)], np.cumsum(size)[:-1])
        panel.add(step, torch.tensor(batches[step % len(size)]))
    return panel


class TestPanel:
    @pytest.mark.parametrize(
        ("half_life", "last", "first"), [(0.2, BATCH, 0), (2.0, BATCH, 0), (20.0, BATCH, 0), (4.0, 1, 0), (10.0, BATCH, 3)]
    )  # fmt: skip
    def test_is_what_random_orders_leave(self, half_life, last, first):
        """Of whole epochs, with a smaller last batch, and of the end of one; variances of 6,000 orders are within 6 % (three sd)."""
        generator, size = np.random.default_rng(0), sizes(last)
        values = gains(generator, STEPS, half_life)[..., : size.sum()] * np.linspace(0.5, 2, STEPS)[:, None, None]
        drawn = shuffled_sums(generator, values, 6000, size, np.arange(first, STEPS)).var(0)
        found = looked_at(values, [generator.permutation(size.sum())], size=size, first=first).result()
        assert found.steps == (STEPS - first,)
        np.testing.assert_allclose(found.variance[0], drawn, rtol=0.06)
        independent = (values[first:].var(-1, ddof=1) / size[first:, None]).sum(0)
        assert (drawn < (0.95 if last == BATCH else 1.05) * independent).all()

    def test_epochs_are_for_themselves_and_early_ones_are_read_off_fewer_steps(self):
        generator = np.random.default_rng(1)
        smooth = gains(generator, 1, 1.0) + np.linspace(0, 1, STEPS)[:, None, None] * gains(generator, 1, 1.0)
        values = np.concatenate([smooth * scale for scale in (0.1, 1.0, 3.0)])
        orders = [generator.permutation(EXAMPLES) for _ in range(3)]
        panel = looked_at(values, orders)
        assert [sum(epoch == e for epoch, _ in panel.looks.values()) for e in range(3)] == [shuffling.FEWER, 8, 8]
        early, middle, late = np.array(panel.result().variance)
        np.testing.assert_allclose(late, 9 * middle, rtol=1e-9)
        np.testing.assert_allclose(early, 0.01 * middle, rtol=0.1)

    def test_a_panel_stands_for_all(self):
        generator = np.random.default_rng(2)
        values, order = gains(generator, STEPS, 4.0), [generator.permutation(EXAMPLES)]
        some = looked_at(values, order, rows=np.arange(0, EXAMPLES, 2)).result()
        np.testing.assert_allclose(some.variance, looked_at(values, order).result().variance, rtol=0.35)

    def test_gains_that_never_change_are_no_noise(self):
        generator = np.random.default_rng(3)
        values = np.repeat(gains(generator, 1, 1.0), STEPS, 0)
        np.testing.assert_allclose(looked_at(values, [np.arange(EXAMPLES)]).result().variance, 0, atol=1e-12)

    def test_weights_count_as_in_the_batch_mean(self):
        """An example's part in the mean is w·a: those of weight 3 whose gains never change leave the noise to the others."""
        generator = np.random.default_rng(4)
        changing = gains(generator, STEPS, 0.1)
        heavy = np.arange(EXAMPLES) % 2 == 0
        values = np.where(heavy, 0.0, changing)
        weight = torch.where(torch.tensor(heavy), 3.0, 1.0)
        plain = np.array(looked_at(values, [np.arange(EXAMPLES)]).result().variance)
        weighted = np.array(looked_at(values, [np.arange(EXAMPLES)], weight=weight).result().variance)
        np.testing.assert_allclose(weighted, plain / 4, rtol=0.1)  # w / w̄ is 1/2 for those that change

    def test_with_replacement_every_draw_is_for_itself(self):
        generator = np.random.default_rng(5)
        values = np.repeat(gains(generator, 1, 1.0), STEPS, 0)
        panel = looked_at(values, [generator.integers(0, EXAMPLES, EXAMPLES)])
        assert not panel.is_shuffled
        np.testing.assert_allclose(panel.result().variance[0], STEPS * values[0].var(-1, ddof=1) / BATCH)

    def test_an_order_that_never_changes_is_noticed(self):
        generator = np.random.default_rng(6)
        values, order = gains(generator, 2 * STEPS, 1.0), generator.permutation(EXAMPLES)
        assert looked_at(values, [order, order]).never_changes
        assert not looked_at(values, [order, order[::-1].copy()]).never_changes
        assert not looked_at(values, [order]).never_changes

    @settings(deadline=None, max_examples=80)
    @given(rows=st.integers(2, 60), batch=st.integers(1, 20), epochs=st.integers(1, 5), left=st.integers(0, 3), first=st.integers(0, 3))  # fmt: skip
    def test_runs_of_any_size(self, rows, batch, epochs, left, first):
        """A run may end in the middle of an epoch, and a sweep begin there: every epoch that was swept has its variance."""
        size = np.array([len(part) for part in torch.arange(rows).split(batch)])
        steps = epochs * len(size) - min(left, len(size) - 1)
        first = min(first, steps - 1)
        generator = np.random.default_rng(rows)
        values = generator.normal(size=(epochs * len(size), 1, rows))
        panel = looked_at(
            values, [generator.permutation(rows) for _ in range(epochs)], size=size, first=first, steps=steps
        )
        found, observed = panel.result(), np.arange(first, steps)
        variances = found.variances(observed, np.ones((len(observed), 1)))
        assert sum(found.steps) == len(observed)
        assert np.isfinite(variances).all()
        assert (variances >= 0).all()
        np.testing.assert_allclose(variances.sum(), np.nansum(found.variance))

    def test_the_panel_is_all_of_a_small_set_and_a_part_of_a_large_one(self):
        assert panel_of(7, seed=0) == list(range(7))
        some = panel_of(5000, seed=0)
        assert len(set(some)) == len(some) == PANEL
        assert some != panel_of(5000, seed=1)


class TestShuffling:
    def test_an_epoch_that_was_not_looked_at_is_of_independent_draws_and_the_end_of_one_has_its_part(self):
        known = Shuffling(4, ((np.nan,), (2.0,), (8.0,)), (4, 4, 2))
        independent = np.array([1.0, 1, 1, 1, 1, 3, 3, 1, 5, 5])[:, None]
        found = known.variances(np.arange(10), independent)[:, 0]
        np.testing.assert_allclose(found, [1, 1, 1, 1, 0.25, 0.75, 0.75, 0.25, 4, 4])
        np.testing.assert_allclose(known.variances(np.arange(6, 10), independent[6:])[:, 0], [0.75, 0.25, 4, 4])
        assert (known.variances(np.arange(4, 8), np.zeros((4, 1)))[:, 0] == 0.5).all()


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
        shuffled = replace(plain, shuffling=looked_at(values, [order]).result())
        drawn = shuffled_sums(generator, values, 3000, sizes(), np.arange(STEPS)).std(0)
        np.testing.assert_allclose(shuffled.sigma, drawn, rtol=0.05)
        assert (plain.sigma > 1.3 * drawn).all()
        np.testing.assert_allclose(
            plain.example_mu().mu * plain.sigma, shuffled.example_mu().mu * shuffled.sigma, rtol=1e-10
        )
