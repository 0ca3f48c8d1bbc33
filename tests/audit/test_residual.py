import math

import numpy as np
import pytest
from scipy import stats

from hf_unlearn.audit.residual import interval, largest_of_retrained, residual_mu


class TestInterval:
    @pytest.mark.parametrize("references", [3, 5, 12])
    @pytest.mark.parametrize("mu", [-3.0, 0.0, 0.7, 20.0])
    def test_is_that_of_scipys_noncentral_t(self, mu, references):
        root = math.sqrt(references)
        low, high = interval(mu, references)
        assert stats.nct.cdf(mu * root, references - 1, low * root) == pytest.approx(0.95, abs=2e-4)
        assert stats.nct.cdf(mu * root, references - 1, high * root) == pytest.approx(0.05, abs=2e-4)

    def test_holds_for_what_is_drawn(self):
        random, mu, outside = np.random.default_rng(0), 2.5, np.zeros(2)
        for _ in range(400):
            losses = random.normal(3.0, 0.7, 4)
            found = residual_mu(3.0 - mu * 0.7, losses, original=None, checks=10)
            outside += found.low > mu, found.high < mu
        assert (np.abs(outside / 400 - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 400)).all()

    def test_of_what_lies_beyond_all_numbers(self):
        assert interval(1e6, 5)[0] > 1e5
        assert interval(math.inf, 5) == (math.inf, math.inf)


class TestResidualMu:
    LOSSES = (2.0, 2.2, 2.4, 2.6, 2.8)

    def test_unit_and_sign(self):
        spread = np.std(self.LOSSES, ddof=1)
        found = residual_mu(2.4 - 3 * spread, self.LOSSES, original=0.0, checks=10)
        assert found.mu == pytest.approx(3.0)  # a lower loss than of models that never saw the data
        assert found.original == pytest.approx(2.4 / spread)
        assert found.auc == pytest.approx(stats.norm.cdf(3 / math.sqrt(2)))
        assert residual_mu(2.4 + spread, self.LOSSES, original=None, checks=10).mu == pytest.approx(-1.0)

    @pytest.mark.parametrize("losses", [(), (1.0,), (1.0, 2.0)])
    def test_is_not_known_below_three_references(self, losses):
        found = residual_mu(1.0, losses, original=0.1, checks=10)
        assert (found.mu, found.status) == (None, "unknown")
        assert "needs 3" in found.in_words()

    def test_status(self):
        def status(audited, original, losses=self.LOSSES):
            return residual_mu(audited, losses, original=original, checks=10).status

        assert status(2.4, -20.0) == "within"
        assert (
            status(2.4, 0.8) == "blind"
        )  # endless references would tell the original apart, 5 standard deviations away
        assert status(2.4, 2.3) == "within"  # nothing would
        assert status(2.4, None) == "blind"
        assert status(-60.0, -60.0) == status(60.0, -60.0) == "beyond"
        assert status(-3.0, -60.0) == "unclear"

    def test_one_more_retrained_model_is_within(self):
        """P(|μ̂| ≤ q) = 1 − α/K with μ̂ = t √(1 + 1/R), and the margin is where the interval of q ends."""
        references, checks = 4, 8
        margin = largest_of_retrained(references, checks)
        random, draws = np.random.default_rng(1), 20_000
        losses = random.normal(size=(draws, references + 1))
        mu = (losses[:, 1:].mean(1) - losses[:, 0]) / losses[:, 1:].std(1, ddof=1)
        q = np.quantile(np.abs(mu), 1 - 0.05 / checks)  # 3 standard errors of the level: 0.0017 of 0.00625
        assert stats.t.sf(q / math.sqrt(1 + 1 / references), references - 1) == pytest.approx(
            0.05 / checks / 2, rel=0.3
        )
        at_level = stats.t.ppf(1 - 0.05 / checks / 2, references - 1) * math.sqrt(1 + 1 / references)
        assert margin == pytest.approx(interval(at_level, references)[1])

    def test_models_without_spread(self):
        assert residual_mu(1.0, (2.0, 2.0, 2.0), original=0.0, checks=5).mu == math.inf
        assert residual_mu(2.0, (2.0, 2.0, 2.0), original=0.0, checks=5).mu == 0.0
