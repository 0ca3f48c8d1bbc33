"""Segments against explicit products over their steps, and their noise against shuffled epochs."""

import numpy as np
import pytest
import torch

from hf_unlearn.influence.finished.checkpoints import Segment
from hf_unlearn.influence.finished.unrolled import Unrolled, basis_of, target_shares


P, C, N, BATCH = 4, 2, 12, 3


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(P, P, generator=generator, dtype=torch.float64)
    gradients = torch.randn(N, P, generator=generator, dtype=torch.float64)
    return h @ h.T / P, gradients, torch.randn(C, P, generator=generator, dtype=torch.float64)


def through(segments, h, gradients, targets, root=None, decay=None, weights=None):
    """Gains, noise by segment and the vectors left, of one curvature in all segments, the last first."""
    root = torch.ones(P, dtype=torch.float64) if root is None else root
    decay = torch.zeros(P, dtype=torch.float64) if decay is None else decay
    share = torch.ones(N, dtype=torch.float64) if weights is None else weights / weights.mean()
    unrolled, found = Unrolled(N / BATCH, N), []
    unrolled.add(targets, 1.0)
    for segment in reversed(segments):
        basis = basis_of(unrolled.vectors, root, decay, lambda v: v @ h, lambda v: v @ h @ v.T)
        found.append(unrolled.through(segment, basis, gradients @ basis.probes.T, share))
    return [one[0] for one in found], [one[2] for one in found], unrolled.vectors


def test_gains_are_those_of_gradient_flow_and_near_those_of_steps():
    h, gradients, targets = problem()
    root, decay = torch.tensor([0.5, 1.0, 2.0, 0.1]).double(), torch.full((P,), 0.3, dtype=torch.float64)
    rates = np.linspace(0.002, 0.001, 400)
    (gains,), _, left = through([Segment(0, 400, rates)], h, gradients, targets, root, decay)

    exact = h @ torch.diag(root**2) + torch.diag(decay)  # λ ← (1 − η (H P + decay)) λ
    z = float(rates.sum())
    torch.testing.assert_close(left[:C], targets @ torch.matrix_exp(-z * exact).T, rtol=1e-8, atol=1e-10)
    lam, total = targets.clone(), torch.zeros_like(targets)
    for rate in rates[::-1]:
        total += rate * lam
        lam = lam - rate * lam @ exact.T
    explicit = gradients @ (total * root**2).T
    torch.testing.assert_close(gains, explicit, rtol=5e-3, atol=5e-3 * explicit.abs().max().item())


def test_segments_compose():
    h, gradients, targets = problem()
    rates = np.full(14, 0.05)
    one = through([Segment(0, 14, rates)], h, gradients, targets)
    two = through([Segment(0, 5, rates[:5]), Segment(5, 14, rates[5:])], h, gradients, targets)
    torch.testing.assert_close(sum(two[0]), sum(one[0]), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(two[2], one[2], rtol=1e-8, atol=1e-10)
    # An epoch, of four steps, that both have a part of is one epoch still.
    torch.testing.assert_close(sum(two[1]), sum(one[1]), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_noise_is_that_of_shuffled_epochs(weighted):
    h, gradients, targets = problem(1)
    h = 4 * h
    weights = torch.tensor([1.0, 3.0] * (N // 2)).double() if weighted else torch.ones(N).double()
    steps, rate = 4 * N // BATCH, 0.05
    _, (noise,), _ = through([Segment(0, steps, np.full(steps, rate))], h, gradients, targets, weights=weights)
    random, losses = np.random.default_rng(0), []
    flow = torch.matrix_exp(-rate * h)
    middle = torch.matrix_exp(-rate / 2 * h)  # a step's share of the integral, as if it were in its middle
    carried = [targets @ middle.T]
    for _ in range(steps - 1):
        carried.append(carried[-1] @ flow.T)
    products = torch.stack([rate * gradients @ one.T for one in reversed(carried)])  # [steps, N, C]
    for _ in range(3000):
        order = np.concatenate([random.permutation(N) for _ in range(4)]).reshape(steps, BATCH)
        share = (weights / weights.mean()).numpy()[order][..., None]
        batches = products.numpy()[np.arange(steps)[:, None], order]
        centre = (share * 0 + 1) * (products.numpy() * (weights / weights.mean()).numpy()[:, None]).mean(1)[:, None]
        losses.append((share * (batches - centre)).mean(1).sum(0))
    measured = np.var(losses, axis=0)
    # n/(n − 1) of drawing without replacement, and 3,000 draws: a standard error of 2.6 %.
    np.testing.assert_allclose(noise * N / (N - 1), measured, rtol=0.1)


def test_the_window():
    assert target_shares([20, 40, 160, 180, 200], 0.2) == [0, 0, 0, 0.5, 0.5]
    assert target_shares([20, 200], 0.0) == [0, 1]
