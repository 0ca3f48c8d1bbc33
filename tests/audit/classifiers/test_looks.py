import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from planted_classifiers import FORGOTTEN, masked
from scipy.stats import gumbel_r, norm
from sklearn.metrics import roc_auc_score

from hf_unlearn.audit.check import Reading, Readings
from hf_unlearn.audit.classifiers.distances import (
    AnswerDistance,
    InterpolatedMembership,
    MarginDivergence,
    MembershipByLikelihood,
    interpolated,
    signal,
    sketched,
    weights_apart,
)
from hf_unlearn.audit.classifiers.family import data as family_data
from hf_unlearn.audit.classifiers.membership import MembershipByLoss
from hf_unlearn.audit.classifiers.relearning import RelearnBesideNew, RelearnForget, never_seen, trained
from hf_unlearn.audit.classifiers.subject import ClassifierSubject, look_at, pooled
from hf_unlearn.audit.equivalence import sampling_error
from hf_unlearn.audit.weights import size_of_weights


def error_of(reading, references=()):
    """Standard error of an AUC."""
    return sampling_error(reading, references)[0] / norm.ppf(0.95)


@pytest.fixture(scope="module")
def parts(models, sets):
    subject = ClassifierSubject(models.originals[0], "audited", "a")
    return family_data(subject, **sets, processing_class=None, size="standard", seed=0)


class TestLook:
    def test_is_what_the_model_says(self, models, parts):
        model = models.originals[0]
        look = look_at(model, parts.forget)
        with torch.no_grad():
            pixels = parts.forget.inputs["pixel_values"]
            torch.testing.assert_close(look.logits, model(pixels).logits)
            torch.testing.assert_close(look.features[-1], model.body(pixels.flatten(1)).relu())
        p = look.logits.double().softmax(1)[:, FORGOTTEN]
        torch.testing.assert_close(look.losses.exp().reciprocal(), p, rtol=1e-4, atol=1e-9)

    def test_a_model_of_transformers_is_seen_at_every_depth(self, tiny_bert):
        from hf_unlearn.audit.classifiers.data import Part

        ids = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]])
        mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
        look = look_at(tiny_bert, Part({"input_ids": ids, "attention_mask": mask}, torch.tensor([0, 1])))
        hidden = tiny_bert(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        assert len(look.features) == len(hidden) + 1  # and what the head is given
        torch.testing.assert_close(look.features[1][1], hidden[1][1, :2].mean(0).detach())

    def test_pooling(self):
        assert torch.equal(pooled(torch.arange(8.0).view(1, 2, 2, 2), None), torch.tensor([[1.5, 5.5]]))
        assert torch.equal(pooled(torch.arange(4.0).view(1, 2, 2), None), torch.tensor([[1.0, 2.0]]))


class TestMembership:
    def test_auc_and_its_error_against_scikit_learn_and_the_bootstrap(self):
        random = np.random.default_rng(0)
        members, others = random.normal(0.7, 1, 60), random.normal(0, 1, 90)

        def auc(one, two):
            return roc_auc_score([1] * len(one) + [0] * len(two), np.concatenate([one, two]))

        resampled = [auc(random.choice(members, 60), random.choice(others, 90)) for _ in range(600)]
        found = Reading.auc_of(members, others)
        assert found.value == pytest.approx(auc(members, others))
        assert error_of(found) == pytest.approx(np.std(resampled), rel=0.12)  # 3 standard errors of 600: 9 %
        # Two samples of one law: (n + m + 1) / 12 n m, of the rank sum.
        same = [error_of(Reading.auc_of(random.normal(size=80), random.normal(size=50))) for _ in range(50)]
        assert np.mean(same) == pytest.approx(np.sqrt(131 / (12 * 80 * 50)), rel=0.05)

    def test_models_that_find_the_same_rows_hard_are_compared_more_sharply(self):
        """The bootstrap over rows of the difference of two areas, both models on the same rows."""
        random = np.random.default_rng(1)
        hard, hard_other = random.normal(size=70), random.normal(size=50)
        one, two = ((hard + 0.4 + random.normal(0, 0.3, 70), hard_other + random.normal(0, 0.3, 50)) for _ in range(2))
        found = error_of(Reading.auc_of(*one), [Reading.auc_of(*two)])
        resampled = []
        for _ in range(400):
            rows, others = random.choice(70, 70), random.choice(50, 50)
            resampled.append(np.subtract(*(Reading.auc_of(a[rows], b[others]).value for a, b in (one, two))))
        assert found == pytest.approx(np.std(resampled), rel=0.15)
        assert found < 0.6 * error_of(Reading.auc_of(*one))

    def test_it_is_seen_where_rows_were_learned_by_heart(self, models, parts):
        """A loss of 0 on the forget rows alone: a model that looks them up."""
        model = copy.deepcopy(models.originals[0])
        known = {tuple(row.flatten().tolist()) for row in parts.forget.inputs["pixel_values"]}
        forward = model.forward

        def by_heart(pixel_values, labels=None):
            output = forward(pixel_values)
            for number, row in enumerate(pixel_values):
                if tuple(row.flatten().tolist()) in known:
                    output.logits[number, FORGOTTEN] += 100
            return output

        model.forward = by_heart
        found = MembershipByLoss().read(ClassifierSubject(model, "audited", "a"), parts, 0)
        assert found.value > 0.99
        assert found.figures["found_at_5%_false_alarms"] > 0.99


class TestLiRA:
    def test_against_a_plain_reference(self, models, parts):
        """Row by row, as in the paper: one less the tail of the law of models without the row, at the observed margin."""

        def margin(model, part):
            with torch.no_grad():
                p = model(part.inputs["pixel_values"]).logits.double().softmax(1)[:, FORGOTTEN]
            return torch.log(p / (1 - p)).numpy()

        target, shadows = models.originals[1], models.retrained[:4]
        check = MembershipByLikelihood()
        read = [check.read(ClassifierSubject(one, "retrained", "a"), parts, 0) for one in (target, *shadows)]
        found = check.compared(read[0], read[1:])
        spread = (
            np.mean([np.var([margin(one, parts.forget)[row] for one in shadows], ddof=1) for row in range(30)]) ** 0.5
        )
        scores, truth = [], []
        for part, member in ((parts.forget, 1), (parts.test_forget, 0)):
            seen, law = margin(target, part), np.mean([margin(one, part) for one in shadows], axis=0)
            scores += [1 - norm.sf(value, center, spread * 40) for value, center in zip(seen, law, strict=True)]
            truth += [member] * len(part)
        assert found.value == pytest.approx(roc_auc_score(truth, scores), abs=1e-3)

    def test_finds_what_a_loss_alone_does_not(self, parts):
        """Rows whose margins differ far more among each other than by membership."""
        random = np.random.default_rng(0)
        hard, hard_unseen = random.normal(0, 10, 60), random.normal(0, 10, 60)

        def reading(shift):
            noise = random.normal(0, 0.3, (2, 60))
            return replace(
                Reading.mean_of(hard + shift + noise[0]), figures={"unseen": (hard_unseen + noise[1]).tolist()}
            )

        found = MembershipByLikelihood().settled(
            Readings(reading(1.5), reading(0.0), tuple(reading(0.0) for _ in range(4))), parts
        )
        assert found.audited.value > 0.98
        assert found.audited.figures["found_at_5%_false_alarms"] > 0.9
        for one in (found.original, *found.retrained):
            assert abs(one.value - 0.5) < 4 * error_of(one)  # 5 of them


class TestRelearning:
    def test_steps_are_adamws(self, models, parts):
        """Against a loop by hand, with the rate in units of the weights."""
        model, other = (copy.deepcopy(models.originals[0]) for _ in range(2))
        batch = parts.retain.select(range(32))
        rate = (
            0.01
            * torch.cat([w.detach().flatten() for w in (model.body.weight, model.head.weight)])
            .square()
            .mean()
            .sqrt()
            .item()
        )
        assert 0.01 * size_of_weights(model) == pytest.approx(rate, rel=1e-5)
        next(trained(model, lambda step: batch))
        optimizer = torch.optim.AdamW(other.parameters(), lr=rate, weight_decay=0.0)
        torch.nn.functional.cross_entropy(other(batch.inputs["pixel_values"]).logits, batch.labels).backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)

    def test_the_heads_row_of_the_class_is_wiped_first(self, models, parts):
        hidden = RelearnForget().prepared(masked(models.originals[0]), parts)
        plain = RelearnForget().prepared(copy.deepcopy(models.originals[0]), parts)
        for one, two in zip(hidden.parameters(), plain.parameters(), strict=True):
            assert torch.equal(one, two)
        others = [c for c in range(10) if c != FORGOTTEN]
        torch.testing.assert_close(plain.head.bias[FORGOTTEN], plain.head.bias[others].mean())
        assert torch.equal(plain.head.weight[others], models.originals[0].head.weight[others])

    def test_a_class_that_nobody_saw(self, parts):
        """The same pixels of each row in one other order for all, rows and labels as they were."""
        new = never_seen(parts)
        for name in ("forget", "test_forget"):
            one, two = (getattr(data, name).inputs["pixel_values"].flatten(1) for data in (parts, new))
            assert torch.equal(one.sort(1).values, two.sort(1).values)
            assert (one == two).float().mean() < 0.6  # many pixels are blank
        assert torch.equal(new.forget.labels, parts.forget.labels)
        both = [
            torch.cat([data.forget.inputs["pixel_values"], data.test_forget.inputs["pixel_values"]]).flatten(1)
            for data in (parts, new)
        ]
        assert torch.equal(both[0].var(0).sort().values, both[1].var(0).sort().values)  # one order for all
        assert new.retain is parts.retain

    def test_what_is_known_is_back_sooner_than_what_is_new(self, models, parts):
        """A model that never saw the class, and the same with one hidden unit that sees it, from which nothing leads to the answers."""
        plain, knows = (copy.deepcopy(models.retrained[0]) for _ in range(2))
        pixels = torch.cat([part.inputs["pixel_values"].flatten(1) for part in (parts.forget, parts.retain)])
        target = torch.cat([torch.ones(len(parts.forget)), -torch.ones(len(parts.retain))])
        design = torch.cat([pixels, torch.ones(len(pixels), 1)], 1)
        direction = torch.linalg.solve(design.T @ design + 10 * torch.eye(65), design.T @ target)
        with torch.no_grad():
            for model in (plain, knows):
                model.head.weight[:, 0] = 0
            knows.body.weight[0], knows.body.bias[0] = 30 * direction[:64], 30 * direction[64]
        check = RelearnBesideNew()
        one, two = (check.read(ClassifierSubject(model, "audited", "a"), parts, 0) for model in (knows, plain))
        assert one.value > two.value + check.margin
        assert len(one.figures["new"]) == len(one.figures["curve"]) == 8


class TestInterpolatedMembership:
    def test_against_a_plain_reference(self):
        """IAM as its authors compute it: SciPy's Gumbel law by moments, step by step and row by row."""
        random = np.random.default_rng(0)
        observed, shadows, fitted = (
            random.uniform(0, 1, 20),
            random.uniform(0, 0.6, (3, 20)),
            random.uniform(0.6, 1, 20),
        )
        alphas, total = np.linspace(0, 1, 100), np.zeros(20)
        for i, alpha in enumerate(alphas[:-1]):
            between = shadows + (fitted - shadows) * alpha
            beta = between.std() * 6**0.5 / np.pi
            for row in range(20):
                law = gumbel_r(between[:, row].mean() - beta * np.euler_gamma, beta)
                total[row] += alphas[i + 1] * law.cdf(observed[row])
        np.testing.assert_allclose(interpolated(observed, shadows, fitted), total / alphas[1:].sum(), rtol=1e-9)

    def test_from_generalising_to_fitted(self):
        assert signal(np.array([0.0, 1.0])).tolist() == [0.0, 1.0]
        assert (np.diff(signal(np.linspace(0, 1, 50))) > 0).all()
        shadows, fitted = np.full((1, 9), 0.3) + np.linspace(-0.05, 0.05, 9), np.full(9, 0.9)
        scores = [interpolated(np.full(9, at), shadows, fitted).mean() for at in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)]
        assert (np.diff(scores) > 0).all()
        assert scores[0] < 0.01
        assert scores[-1] > 0.9

    def test_of_models(self, by_heart):
        rows = family_data(
            ClassifierSubject(by_heart.originals[0], "audited", "a"),
            **by_heart.sets,
            processing_class=None,
            size="standard",
            seed=0,
        )
        check = InterpolatedMembership()
        original, *gone = (
            check.read(ClassifierSubject(one, "audited", "a"), rows, 0)
            for one in (by_heart.originals[0], *by_heart.retrained[:4])
        )
        found = check.settled(Readings(gone[0], original, tuple(gone[1:])), rows)
        assert found.original.value > 0.7
        assert all(one.value < 0.2 for one in (found.audited, *found.retrained))


class TestDistances:
    def test_weights_in_few_numbers(self, models):
        """Distances of the sketches are those of the weights: 1,024 numbers, a standard error of 2.2 %."""
        flat = [torch.cat([p.detach().flatten() for p in one.parameters()]) for one in models.retrained[:3]]
        sketches = [sketched(one) for one in models.retrained[:3]]
        for i, j in ((0, 1), (1, 2), (2, 0)):
            expected = float((flat[i] - flat[j]).norm() / flat[j].norm())
            assert weights_apart(sketches[i], sketches[j]) == pytest.approx(expected, rel=0.1)
        assert weights_apart(sketches[0], sketched(models.retrained[0])) == 0.0
        assert weights_apart(sketches[0], sketched(torch.nn.Linear(3, 4))) is None

    def test_figures_beside_the_answers(self, models, parts):
        """KL by hand, and weights: an original is its own; they decide nothing, and what was compared is not in the report."""
        made = [models.originals[1], models.originals[0], *models.retrained[:3]]
        check = AnswerDistance()
        readings = [check.read(ClassifierSubject(one, "audited", "a"), parts, 0) for one in made]
        found = check.settled(Readings(readings[0], readings[1], tuple(readings[2:])), parts)
        p = [look_at(one, parts.forget).probabilities for one in made]
        mean = (p[2] + p[3]) / 2  # the last one is left out
        assert found.audited.figures["kl"] == pytest.approx(
            float((mean * (mean / p[0]).log()).sum(1).mean()), rel=1e-6
        )
        assert found.original.figures["weights_from_original"] == 0.0
        assert 0.5 < found.audited.figures["weights_from_original"] < 2
        assert 0.5 < found.retrained[0].figures["weights_from_retrained"] < 2
        assert not {"rows", "weights"} & set(found.audited.figures)

    def readings(self, *margins):
        made = [Reading.mean_of(one) for one in margins]
        return Readings(made[0], None, tuple(made[1:]))

    def test_margin_divergence_is_half_a_squared_shift(self, parts):
        """By hand: each model against others, one spread for all rows."""
        random = np.random.default_rng(0)
        margins = random.normal(size=(5, 30)) * 0.4 + random.normal(size=30) * 3
        found = MarginDivergence().settled(self.readings(margins[0] + 2, *margins[1:]), parts)
        others = margins[1:4]  # as many as each retrained model has
        expected = ((margins[0] + 2 - others.mean(0)) ** 2).mean() / (2 * others.var(0, ddof=1).mean() * (1 + 1 / 3))
        assert found.audited.value == pytest.approx(expected)
        left = margins[[2, 3, 4]]
        expected = ((margins[1] - left.mean(0)) ** 2).mean() / (2 * left.var(0, ddof=1).mean() * (1 + 1 / 3))
        assert found.retrained[0].value == pytest.approx(expected)

    def test_of_retrained_models_it_is_one_half(self, parts):
        """E (x − mean)² = σ² (1 + 1/R): half a nat, whatever R and σ."""
        random = np.random.default_rng(1)
        for count in (3, 8):
            margins = random.normal(size=(count + 1, 4000)) * 2.5
            found = MarginDivergence().settled(self.readings(*margins), parts)
            assert found.audited.value == pytest.approx(0.5, rel=0.08)

    def test_answers_are_told_by_their_total_variation(self, parts):
        def reading(*answers):
            return Reading(0.0, figures={"answers": list(answers)})

        same = reading(0.5, 0.5, 0.0)
        found = AnswerDistance().settled(
            Readings(reading(0, 0, 1), reading(0.4, 0.5, 0.1), (same, same, reading(0.7, 0.3, 0.0))), parts
        )
        assert found.audited.value == pytest.approx(1.0)
        assert found.original.value == pytest.approx(0.1)
        assert found.retrained[2].value == pytest.approx(0.2)
        assert found.retrained[0].value == pytest.approx(0.1)  # from the mean of the two others
