"""Scores against densities, closed forms and second implementations; the bank of them in fp32 against fp64."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from hf_unlearn.filtering.fitting.background import Moments
from hf_unlearn.filtering.fitting.forms import (
    RIDGE,
    augmented,
    basis_of,
    lda,
    linear_svc,
    mean_difference,
    pseudo_clean,
    quadratic,
)
from hf_unlearn.filtering.scores import ROWS, Score, ScoreBank


def gaussian(count, dimension, seed, shift=0.0):
    """Correlated, with variances that differ, and the law it is from."""
    random = np.random.default_rng([seed, dimension])
    root = random.standard_normal((dimension, dimension)) * np.linspace(0.3, 2, dimension)
    mean = random.standard_normal(dimension) + shift
    rows = np.random.default_rng([seed, dimension, 1]).standard_normal((count, dimension)) @ root.T + mean
    return rows, mean, root @ root.T


def moments_of(rows):
    moments = Moments(rows.shape[1])
    moments.update(rows)
    return moments


def two_kinds(undesired=20, clean=30, dimension=6, seed=0):
    return gaussian(undesired, dimension, seed, shift=1.0)[0], gaussian(clean, dimension, seed + 100)[0]


def points(dimension, count=50):
    return np.random.default_rng(9).standard_normal((count, dimension)) * 3


def shrinkage_by_loops(y, variances):
    """Schäfer and Strimmer (2005), with S_ij the mean of the products: λ = Σ Var(S_ij) / Σ (S_ij − T_ij)²."""
    n, k = y.shape
    centred = y - y.mean(0)
    noise = distance = 0.0
    for i in range(k):
        for j in range(k):
            products = [centred[row, i] * centred[row, j] for row in range(n)]
            mean = sum(products) / n
            noise += sum((value - mean) ** 2 for value in products) / (n * (n - 1))
            distance += (mean - (variances[i] if i == j else 0)) ** 2
    return min(1.0, noise / distance)


def ratio_of_densities(x, marks, pool, shrinkage, ridge=RIDGE):
    """log N(x; μ_U, (1 − λ) S + λ Σ_P + ρI) − log N(x; m_P, Σ_P + ρI), with dense matrices."""
    covariance = np.cov(pool.T)
    added = ridge * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    of_marks = (1 - shrinkage) * np.cov(marks.T) + shrinkage * covariance + added
    return multivariate_normal.logpdf(x, marks.mean(0), of_marks) - multivariate_normal.logpdf(
        x, pool.mean(0), covariance + added
    )


class TestQuadratic:
    @pytest.mark.parametrize("marks", [3, 5, 8, 40, 200])  # fewer and more than dimensions: C⁻¹ in closed form
    def test_is_a_ratio_of_two_densities(self, marks):
        undesired, pool = two_kinds(marks, 500, dimension=8)
        score = quadratic(undesired, basis_of(moments_of(pool)))
        x = points(8)
        differences = score(x) - ratio_of_densities(x, undesired, pool, score.shrinkage)
        np.testing.assert_allclose(differences, differences[0], rtol=1e-8)
        assert score.directions.shape == (8, min(marks - 1, 8))  # the rank of centred marks: none is there twice
        assert len(score.gains) == min(marks - 1, 8)

    def test_constant_is_that_of_the_background(self):
        """½‖y‖² − ½ (y − μ)ᵀ C⁻¹ (y − μ), without constants: at y = μ it is ½‖μ‖²."""
        undesired, pool = two_kinds(20, 500)
        basis = basis_of(moments_of(pool))
        score = quadratic(undesired, basis)
        centre = undesired.mean(0)
        y = (centre - basis.mean) @ basis.whitening
        assert score(centre[None])[0] == pytest.approx(0.5 * y @ y)

    @pytest.mark.parametrize("marks", [3, 4, 10, 50])
    def test_shrinkage_against_loops(self, marks):
        undesired, pool = two_kinds(marks, 300, dimension=5)
        basis = basis_of(moments_of(pool))
        expected = shrinkage_by_loops((undesired - basis.mean) @ basis.whitening, basis.variances)
        assert quadratic(undesired, basis).shrinkage == pytest.approx(expected)

    def test_two_marks_give_a_linear_score(self):
        undesired, pool = two_kinds(2, 500)
        score = quadratic(undesired, basis_of(moments_of(pool)))
        assert score.shrinkage == 1.0
        assert score.directions.shape == (6, 0)
        np.testing.assert_allclose(score.squares, 0, atol=1e-12)
        steps = score(np.linspace(-3, 3, 7)[:, None] * np.ones(6))
        np.testing.assert_allclose(np.diff(steps, 2), 0, atol=1e-9)
        differences = score(points(6)) - ratio_of_densities(points(6), undesired, pool, 1.0)
        np.testing.assert_allclose(differences, differences[0], atol=1e-10)

    @pytest.mark.parametrize("components", [None, 3])
    def test_the_space_does_not_matter(self, components):
        """Rotated, moved and scaled: the ridge is a share of the variance."""
        undesired, pool = two_kinds(10, 400)
        rotation = np.linalg.qr(np.random.default_rng(2).standard_normal((6, 6)))[0]

        def moved(rows):
            return 7 * rows @ rotation + 11

        score = quadratic(undesired, basis_of(moments_of(pool), components))
        other = quadratic(moved(undesired), basis_of(moments_of(moved(pool)), components))
        assert other.shrinkage == pytest.approx(score.shrinkage)
        np.testing.assert_allclose(other(moved(points(6))), score(points(6)), rtol=1e-7, atol=1e-8)

    def test_fewer_components_are_a_projection_first(self):
        """But for the ridge, which is a share of the variance of all directions."""
        undesired, pool = two_kinds(12, 600)
        covariance = np.cov(pool.T)
        values, vectors = np.linalg.eigh(covariance)
        top = vectors[:, np.argsort(values)[::-1][:3]]
        ridge = RIDGE * values.mean() / np.sort(values)[::-1][:3].mean()
        inside = basis_of(moments_of(pool @ top), ridge=ridge)
        score, projected = quadratic(undesired, basis_of(moments_of(pool), 3)), quadratic(undesired @ top, inside)
        assert projected.shrinkage == pytest.approx(score.shrinkage)
        np.testing.assert_allclose(score(points(6)), projected(points(6) @ top), rtol=1e-8)

    def test_background_is_white_up_to_the_ridge(self):
        pool = two_kinds(2, 500)[1]
        basis = basis_of(moments_of(pool))
        y = (pool - basis.mean) @ basis.whitening
        np.testing.assert_allclose(np.cov(y.T), np.diag(basis.variances), atol=1e-10)
        assert (np.diff(basis.variances) <= 0).all()
        added = RIDGE * np.trace(np.cov(pool.T)) / 6
        whitened = basis.whitening.T @ (np.cov(pool.T) + added * np.eye(6)) @ basis.whitening
        np.testing.assert_allclose(whitened, np.eye(6), atol=1e-10)

    def test_directions_without_variance(self):
        """The ridge keeps them finite; what leaves the background's plane counts."""
        pool = two_kinds(2, 500)[1]
        pool[:, 3:] = 5.0
        undesired = pool[:10] + np.array([0, 0, 0, 1.0, 0, 0])
        score = quadratic(undesired, basis_of(moments_of(pool)))
        assert np.isfinite(score(points(6))).all()
        assert score(undesired).min() > score(pool[10:]).max()

    def test_background_of_one_point(self):
        with pytest.raises(ValueError, match=r"^unmarked: all samples have the same[^\n]*$"):
            basis_of(moments_of(np.ones((200, 3))))


class TestLinear:
    @pytest.mark.parametrize("form", [mean_difference, linear_svc, lda])
    def test_is_a_scalar_projection(self, form):
        """Not a cosine: it grows with the point, by 1 a step along v; and undesired marks lie higher."""
        undesired, clean = two_kinds(40, 50)
        score = form(undesired, clean)
        assert np.linalg.norm(score.weight) == pytest.approx(1)
        assert score.bias == 0
        assert not score.mean.any()
        np.testing.assert_allclose(score(points(6)), points(6) @ score.weight)
        np.testing.assert_allclose(score(points(6) + 3 * score.weight), score(points(6)) + 3)
        assert score(undesired).mean() > score(clean).mean()
        np.testing.assert_allclose(form(clean, undesired).weight, -score.weight, atol=1e-3)

    def test_mean_difference(self):
        undesired, clean = two_kinds()
        direction = np.sum(undesired, 0) / 20 - np.sum(clean, 0) / 30
        expected = points(6) @ direction / np.sqrt(direction @ direction)
        np.testing.assert_allclose(mean_difference(undesired, clean)(points(6)), expected)

    def test_linear_svc_minimizes_its_objective(self):
        """½ ‖(w, b)‖² + Σ max(0, 1 − y f)², the squared hinge of liblinear at C = 1, by another optimizer."""
        undesired, clean = two_kinds()
        rows, signs = np.concatenate([undesired, clean]), np.repeat([1.0, -1.0], [20, 30])

        def objective(w):
            return 0.5 * w @ w + (np.maximum(0, 1 - signs * (rows @ w[:-1] + w[-1])) ** 2).sum()

        found = minimize(objective, np.zeros(7), method="BFGS", options={"gtol": 1e-8}).x[:-1]
        np.testing.assert_allclose(linear_svc(undesired, clean).weight, found / np.linalg.norm(found), atol=1e-3)

    def test_lda_is_fishers_direction_with_the_shrinkage_of_ledoit_and_wolf(self):
        undesired, clean = two_kinds()
        within = np.concatenate([undesired - undesired.mean(0), clean - clean.mean(0)])
        n, d = within.shape
        covariance = within.T @ within / n
        target = np.trace(covariance) / d * np.eye(d)
        noise = sum(((np.outer(row, row) - covariance) ** 2).sum() for row in within) / n**2
        shrinkage = min(1.0, noise / ((covariance - target) ** 2).sum())
        shrunk = (1 - shrinkage) * covariance + shrinkage * target
        direction = np.linalg.inv(shrunk) @ (undesired.mean(0) - clean.mean(0))
        score = lda(undesired, clean)
        assert score.shrinkage == pytest.approx(shrinkage)
        np.testing.assert_allclose(score.weight, direction / np.linalg.norm(direction))

    @pytest.mark.parametrize("form", [mean_difference, lda])
    def test_both_kinds_the_same(self, form):
        undesired = two_kinds()[0]
        with pytest.raises(ValueError, match=r"^undesired, clean: both kinds of marks are the same[^\n]*$"):
            form(undesired, undesired)


class TestPseudoClean:
    @pytest.mark.parametrize("factor", [0.5, 1.0])
    def test_rule_of_the_paper(self, factor):
        undesired, unmarked = two_kinds(10, 400)
        undesired = undesired + 3
        mean = undesired.mean(0)
        lowest = min(mark @ mean / np.linalg.norm(mean) for mark in undesired)
        low = {tuple(row) for row in unmarked if row @ mean / np.linalg.norm(mean) < factor * lowest}
        seen = set()
        for seed in range(60):
            drawn = pseudo_clean(undesired, unmarked, factor=factor, seed=seed)
            assert drawn.shape == (10, 6)
            assert len({tuple(row) for row in drawn}) == 10
            seen |= {tuple(row) for row in drawn}
        assert seen <= low
        assert len(seen) > 0.8 * min(len(low), 600 * 0.6)

    def test_where_few_lie_low(self):
        undesired = np.full((5, 2), 1.0)
        unmarked = np.array([[0.0, 0.0], [3.0, 3.0], [0.9, 0.9]], np.float32)
        drawn = pseudo_clean(undesired, unmarked, factor=1.0)
        assert sorted(map(tuple, drawn)) == sorted(map(tuple, unmarked[[0, 2]].astype(float)))
        assert drawn.dtype == np.float64
        np.testing.assert_array_equal(pseudo_clean(undesired, unmarked, factor=0.5), [[0, 0]])

    def test_none_lies_low(self):
        with pytest.raises(ValueError, match=r"^unmarked: no sample lies far enough[^\n]*$"):
            pseudo_clean(np.ones((5, 2)), np.full((9, 2), 2.0), factor=1.0)


class TestAugmented:
    def test_moments(self):
        rows = two_kinds(40, 2)[0]
        drawn = augmented(rows, 100_000, seed=1)
        np.testing.assert_allclose(drawn.mean(0), rows.mean(0), atol=0.05)
        np.testing.assert_allclose(np.cov(drawn.T), np.diag(rows.var(0)), atol=0.05 * rows.var(0).max())
        assert (augmented(rows, 5, seed=1) != augmented(rows, 5, seed=2)).all()


def mixed_scores():
    """Linear and quadratic, of different ranks and origins."""
    undesired, pool = two_kinds(12, 400)
    basis = basis_of(moments_of(pool), 4)
    random = np.random.default_rng(4)
    moved = Score("mean_difference", random.standard_normal(6), random.standard_normal(6), bias=0.7)
    return [
        mean_difference(undesired, pool),
        quadratic(undesired, basis),
        quadratic(undesired[:2], basis),  # without directions
        moved,
        quadratic(undesired[:4] + 2, basis),
    ]


def assert_near(found, expected):
    """fp32: below 30 summands, of at most 100 each, so some √30 · 100 · 6e-8 = 3e-5."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def bank_of(scores):
    return ScoreBank.of(scores, np.arange(len(scores)))


class TestScoreBank:
    def test_backgrounds_of_their_own(self):
        """The bank has one basis, so it takes no scores that were fitted against others."""
        undesired, pool = two_kinds(12, 400)
        other = two_kinds(12, 400, seed=7)[1] * 2
        scores = [quadratic(undesired, basis_of(moments_of(rows))) for rows in (pool, other)]
        with pytest.raises(ValueError, match="^scores: quadratic ones of one bank must have one background$"):
            bank_of(scores)

    @pytest.mark.parametrize("chosen", [[0], [0, 3], [1], [2], [2, 0], [4, 1, 2], [0, 1, 2, 3, 4]])
    def test_any_mixture_against_fp64(self, chosen):
        scores, x = [mixed_scores()[index] for index in chosen], points(6, 200)
        found = bank_of(scores)(torch.from_numpy(x))
        assert found.dtype == torch.float32
        assert_near(found, torch.from_numpy(np.stack([score(x) for score in scores], 1)).float())

    @pytest.mark.parametrize(("chosen", "saved"), [([1], True), ([4, 1, 2], True), ([0, 1], False), ([1, 3], False)])
    def test_of_many_rows_directions_in_the_basis_are_read_there(self, chosen, saved):
        """Only where all are: a linear score's may lie outside, and would lose what does."""
        scores, x = [mixed_scores()[index] for index in chosen], points(6, 2 * ROWS + 76)
        bank = bank_of(scores)
        found = bank(torch.from_numpy(x))
        assert (bank._inside() is not None) == saved
        assert_near(found, torch.from_numpy(np.stack([score(x) for score in scores], 1)).float())
        few = torch.cat([bank(torch.from_numpy(part)) for part in np.split(x, 100)])
        torch.testing.assert_close(
            found, few, rtol=0, atol=1e-5 * float(few.abs().max())
        )  # what thresholds leave room for

    def test_without_thresholds_everything_is_blocked(self):
        bank = ScoreBank.of(mixed_scores())
        assert (bank(torch.from_numpy(points(6))) > bank.threshold).all()

    @pytest.mark.parametrize(
        "cast",
        [
            lambda bank: bank.half(),
            lambda bank: bank.double(),
            lambda bank: bank.to("cpu", torch.bfloat16),
            lambda bank: torch.nn.Sequential(bank).half()[0],
            lambda bank: bank.to(torch.float16).float(),
        ],
        ids=["half", "double", "to", "inside", "and back"],
    )
    def test_is_never_cast(self, cast):
        expected = bank_of(mixed_scores())
        bank, x = cast(bank_of(mixed_scores())), torch.from_numpy(points(6)).bfloat16()
        for name, value in bank.state_dict().items():
            assert value.dtype == torch.float32
            assert value.equal(expected.state_dict()[name])
        assert_near(bank(x), expected(x.double()))  # inputs in 16 bits are scored in 32
        with torch.autocast("cpu", torch.bfloat16):
            assert_near(bank(x), expected(x.float()))

    def test_moves_and_takes_a_state(self):
        bank, x = bank_of(mixed_scores()), torch.from_numpy(points(6))
        moved = bank_of(mixed_scores()).to("meta")
        assert all(value.is_meta and value.dtype == torch.float32 for value in moved.parameters())
        ranks = sum(len(score.gains) for score in mixed_scores() if score.gains is not None)
        for other in (moved.to_empty(device="cpu"), ScoreBank(6, 5, 4, ranks)):
            other.load_state_dict(bank.state_dict())
            assert_near(other(x), bank(x))
            assert torch.equal(other.threshold, torch.arange(5.0))
            assert not any(parameter.requires_grad for parameter in other.parameters())

    @pytest.mark.parametrize(
        ("bad", "chosen"), [(np.nan, [0]), (np.inf, [0, 1, 2, 3, 4]), (-np.inf, [1]), (1e38, [0, 1, 2, 3, 4])]
    )
    def test_what_is_not_finite_stays_in_its_row(self, bad, chosen):
        bank, x = bank_of([mixed_scores()[index] for index in chosen]), points(6)
        x[7, 2] = bad
        found = bank(torch.from_numpy(x)).isfinite()
        assert found[[row for row in range(50) if row != 7]].all()
        assert np.isfinite(bad) or not found[7].any()  # of what is large squares overflow, projections need not

    def test_rows_do_not_depend_on_each_other(self):
        bank, x = bank_of(mixed_scores()), torch.from_numpy(points(6))
        assert_near(bank(x), torch.cat([bank(row[None]) for row in x]))
        shuffled = torch.randperm(50, generator=torch.Generator().manual_seed(0))
        assert_near(bank(x[shuffled]), bank(x)[shuffled])
