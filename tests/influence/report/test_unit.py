"""μ's unit: whether there is one, and intervals that cover."""

from dataclasses import replace

import numpy as np
import pytest
from made_up import of_themselves, record

from hf_unlearn.influence.calibration import LEFT_OUT, calibrated, influential
from hf_unlearn.influence.report.report import InfluenceReport
from hf_unlearn.influence.report.shuffling import variance_of_start
from hf_unlearn.influence.report.unit import UNITS, said_of, widened


EXAMPLES, TARGETS, BATCH = 40, 3, 5
NAMES = tuple("abc")


@pytest.fixture
def observations():
    """Forty examples whose gains are always the same, in four epochs."""
    generator = np.random.default_rng(0)
    gains = generator.normal(size=(EXAMPLES, TARGETS))
    order = np.concatenate([generator.permutation(EXAMPLES) for _ in range(4)]).reshape(-1, BATCH)
    return record(
        [(step, batch, np.ones(BATCH), gains[batch]) for step, batch in enumerate(order)],
        examples=EXAMPLES,
        targets=NAMES,
    )


def about(**facts):
    return {"run_id": "r", "targets": list(NAMES), **facts}


class TestWhetherThereIsOne:
    @pytest.mark.parametrize(
        ("facts", "words"),
        [
            ({"observation": "in_run"}, "n_calibration_runs"),
            ({"observation": "in_run", "scale": 2.0}, "n_calibration_runs"),
            ({"observation": "propagated", "order_only": "of the moon"}, "of the moon"),
        ],
    )
    def test_order_only(self, observations, facts, words):
        report = InfluenceReport.from_observations(observations, about(**facts))
        assert report.order_only
        assert words in report.unit
        assert "no unit" in said_of(report.manifest)
        assert np.isnan(list(report.sigma.values())).all()
        plain = InfluenceReport.from_observations(observations, about())
        for name in ("mu", "mu_low", "mu_high"):  # bounds of the noise alone
            assert report.dataset[name][:] == plain.dataset[name][:]
            assert report.group([100, 101])[name][:] == plain.group([100, 101])[name][:]
        assert "order only" in report.summary().caption
        assert "no unit" in report.dataset_card("me/report")

    @pytest.mark.parametrize(
        ("observation", "by", "paper"),
        [
            ("propagated", "f-INE", "2510.10510"),
            ("finished", "influence functions with EK-FAC", "2308.03296"),
            ("segments", "SOURCE", "2405.12186"),
        ],
    )
    def test_a_card_names_what_was_done(self, observations, observation, by, paper):
        report = InfluenceReport.from_observations(observations, about(observation=observation))
        card = report.dataset_card("me/report")
        assert f"taught a model, by {by} ([arXiv:{paper}]" in card
        assert f"note={{{by}}}" in card
        assert ("There are no intervals" in card) == ("with its interval" not in card) == (observation == "finished")
        assert report._record()["method"]["arxiv"] == paper

    def test_of_themselves_examples_have_none(self):
        observations, mu = of_themselves()
        manifest = {"run_id": "r", "targets": ["self"], "observation": "propagated"}
        report = InfluenceReport.from_observations(observations, manifest)
        assert report.order_only
        assert report.dataset["mu"][:] == pytest.approx(mu)

    def test_known(self, observations):
        report = InfluenceReport.from_observations(observations, about(observation="propagated"))
        assert not report.order_only
        assert report.unit == UNITS["propagated"]
        calibrated = about(observation="in_run", gain=0.25, unit_error=0.1)
        found = InfluenceReport.from_observations(observations, calibrated, scale=2.0)
        plain = InfluenceReport.from_observations(observations, about())
        np.testing.assert_allclose(found.dataset["mu"][:], np.array(plain.dataset["mu"][:]) / 8)
        members = [100, 103, 107]
        np.testing.assert_allclose(found.group(members)["mu"][:], np.array(plain.group(members)["mu"][:]) / 8)
        assert found.sigma["a"] == pytest.approx(2 * plain.sigma["a"])


class TestIntervals:
    def test_of_a_report_are_wider_than_its_noise(self, observations):
        members = {"x": [100, 101, 102], "y": [110, 111]}
        report = InfluenceReport.from_observations(observations, about(observation="propagated"))
        plain = replace(report, manifest=about())
        for found, noise in zip(report.group(members), plain.group(members), strict=True):
            assert found["mu"] == noise["mu"]
            assert found["mu_low"] < noise["mu_low"] < noise["mu_high"] < found["mu_high"]
        for found, noise in zip(report.group(members, method="gaussian"), plain.group(members, method="gaussian"), strict=True):  # fmt: skip
            assert found == noise

    @pytest.mark.parametrize("sign", [-1, 1])
    def test_cover_what_they_are_made_for(self, sign):
        """Of true μ that are off by the factor and the sum that the widths stand for, and noise beside, 95 %."""
        generator, n = np.random.default_rng(1), 20_000
        true = sign * np.exp(generator.normal(size=n))
        mu = true * np.exp(0.3 * generator.normal(size=n)) + 0.2 * generator.normal(size=n) + 0.5 * generator.normal(size=n)  # fmt: skip
        manifest = {"observation": "propagated"}
        low, high = widened(mu, mu - 0.98, mu + 0.98, manifest, 0.95, widths=(0.3, 0.2))
        assert 0.93 < ((low <= true) & (true <= high)).mean() < 0.985
        assert (low < mu).all()
        assert (mu < high).all()

    def test_are_of_the_sign_of_mu_where_only_its_size_is_unknown(self):
        mu = np.array([-2.0, 3.0])
        low, high = widened(mu, mu, mu, {"observation": "propagated"}, 0.95, widths=(0.5, 0.0))
        np.testing.assert_allclose(low, [-2 * np.exp(0.98), 3 * np.exp(-0.98)], rtol=1e-3)
        np.testing.assert_allclose(high, [-2 * np.exp(-0.98), 3 * np.exp(0.98)], rtol=1e-3)
        wider = widened(mu, mu, mu, {"observation": "propagated", "unit_error": 1.0}, 0.95, widths=(0.5, 0.0))
        assert (wider[0] < low).all()
        assert (wider[1] > high).all()


class TestCalibration:
    """Losses that are drawn from a law that is known: σ twice that of the records, of whose signals a third is there."""

    def drawn(self, observations, groups, seed, noise=1.0):
        generator = np.random.default_rng(seed)
        sigma = 2 * observations.sigma
        change = np.stack(
            [
                observations.group_signals([group]).sum(1)[0] if len(group) else np.zeros(TARGETS)
                for group in groups
            ]
        )  # fmt: skip
        return 0.7 + change / 3 + noise * sigma * generator.normal(size=(len(groups), TARGETS))

    def groups(self, observations, runs, seed=0):
        generator = np.random.default_rng(seed)
        nobody = np.zeros(0, dtype=int)
        return [influential(observations, generator) if run % 2 else nobody for run in range(runs)]

    def test_finds_both(self, observations):
        groups = self.groups(observations, 400)
        found = calibrated(observations, self.drawn(observations, groups, 1), groups)
        assert found["scale"] == pytest.approx(2, rel=0.1)
        assert found["gain"] == pytest.approx(1 / 3, rel=0.5)
        assert found["unit_error"] < 0.4

    def test_its_error_is_that_which_it_makes(self, observations):
        logs, errors = [], []
        for seed in range(150):
            groups = self.groups(observations, 16, seed)
            observations_of = replace(observations, value=20 * observations.value)
            steps = replace(observations.steps, mean=20 * observations.steps.mean)
            louder = replace(
                observations_of, steps=steps
            )  # signals twenty times as large as their noise would have them
            found = calibrated(louder, self.drawn(louder, groups, seed), groups)
            logs.append(np.log(found["gain"] / found["scale"]))
            errors.append(found["unit_error"])
        assert np.mean(logs) == pytest.approx(np.log(1 / 6), abs=0.1)
        assert np.std(logs) < 1.3 * np.mean(errors)

    def test_without_a_trace_of_signals_there_is_no_unit(self, observations):
        groups = self.groups(observations, 8)
        found = calibrated(observations, self.drawn(observations, groups, 3, noise=50.0), groups)
        assert "could not tell" in found["order_only"]
        assert "gain" not in found

    def test_whole_runs_alone_say_the_scale(self, observations):
        nobody = [np.zeros(0, dtype=int)] * 3
        losses = self.drawn(observations, nobody, 4)
        found = calibrated(observations, losses, nobody)
        expected = np.sqrt((losses.var(0, ddof=1) / observations.sigma**2).mean())
        assert found == {"scale": pytest.approx(expected), "unit_error": pytest.approx(1 / np.sqrt(4 * np.sqrt(3)))}

    def test_leaves_out_those_that_matter(self, observations):
        for seed in range(5):
            group = influential(observations, np.random.default_rng(seed))
            assert len(group) == round(LEFT_OUT * EXAMPLES)
            expected = np.abs(observations.group_signals([group]).sum(1)).sum()
            anyhow = [np.random.default_rng(s).choice(EXAMPLES, len(group), replace=False) for s in range(50)]
            assert expected > np.median([np.abs(observations.group_signals([g]).sum(1)).sum() for g in anyhow])


def test_start_is_half_of_what_a_linear_loss_would_have():
    """Two tensors of other scales and one that is always the same; 2,000 draws."""
    import torch

    generator = torch.Generator().manual_seed(0)
    cotangents = torch.randn(TARGETS, 30, generator=generator)

    def draw():
        wide, narrow = 3 * torch.randn(4, 5, generator=generator), 0.1 * torch.randn(6, generator=generator)
        return [wide, narrow, torch.ones(4)]

    draws = [draw() for _ in range(2000)]
    losses = torch.stack([cotangents @ torch.cat([part.flatten() for part in parts]) for parts in draws])
    found = variance_of_start(cotangents, draws)
    np.testing.assert_allclose(found, losses.var(0) / 2, rtol=0.1)
    few = variance_of_start(cotangents, draws[:4])
    np.testing.assert_allclose(few, found, rtol=0.5)
