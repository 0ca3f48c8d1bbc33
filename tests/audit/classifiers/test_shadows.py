"""Ways to unlearn whose truth is known, on shadow models of rows that were learned by heart."""

import copy

import numpy as np
import pytest
import torch
from planted_classifiers import CLASSES, Logits, dataset
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from hf_unlearn.audit.classifiers.shadows import SwapTest, UnlearningLiRA, likelihood_ratio, swap_advantage
from hf_unlearn.audit.equivalence import compared
from hf_unlearn.audit.run import audit
from hf_unlearn.ensembles import train_ensemble


def drawn(shift, pairs=6, rows=200, spread=0.7, seed=0):
    """Margins of shadows of which those that had a row give it so much more."""
    random = np.random.default_rng(seed)
    seen = np.zeros((2 * pairs, rows), dtype=bool)
    for pair in range(pairs):
        half = random.permutation(rows)[: rows // 2]
        seen[2 * pair, half] = True
        seen[2 * pair + 1] = ~seen[2 * pair]
    margins = random.normal(0, 3, rows) + random.normal(0, spread, seen.shape)
    return margins + shift * seen, seen


class TestULiRA:
    @pytest.mark.parametrize("pairs", [4, 20])
    def test_the_ratio_against_a_plain_reference(self, pairs):
        """Row by row, with SciPy's densities: one spread for all rows from few shadows, one for each from many."""
        margins, seen = drawn(1.0, pairs, 30)
        found = likelihood_ratio(margins[0], margins[2:], seen[2:])
        laws = [
            [
                (np.mean(values), np.var(values, ddof=1))
                for row in range(30)
                for values in [[m[row] for m, s in zip(margins[2:], seen[2:], strict=True) if s[row] == kind]]
            ]
            for kind in (True, False)
        ]
        if pairs == 4:
            laws = [[(mean, np.mean([v for _, v in law])) for mean, _ in law] for law in laws]
        for row in range(30):
            one, two = (norm.logpdf(margins[0, row], law[row][0], law[row][1] ** 0.5) for law in laws)
            assert found[row] == pytest.approx(one - two)

    def test_the_area_is_that_of_two_known_laws(self):
        """N(δ, σ) against N(0, σ): Φ(δ / σ√2), from above as the laws were fitted on few."""
        margins, seen = drawn(1.0, pairs=40)
        found = UnlearningLiRA().told(margins, seen)
        assert found.value == pytest.approx(norm.cdf(1 / (0.7 * 2**0.5)), abs=0.02)
        assert found.figures["found_at_5%_false_alarms"] == pytest.approx(norm.sf(norm.isf(0.05) - 1 / 0.7), abs=0.04)
        assert found.figures["found_at_1%_false_alarms"] == pytest.approx(norm.sf(norm.isf(0.01) - 1 / 0.7), abs=0.04)

    def test_going_further_is_told_too(self):
        assert UnlearningLiRA().told(*drawn(-1.0)).value > 0.7
        assert SwapTest().told(*drawn(-1.0)).value < -0.3

    def test_of_retraining_nothing_is_told(self):
        """The interval of 6 pairs holds ½, and 0, in 90 of 100 such draws: 60 of them, 3 standard deviations."""
        inside = np.zeros(2)
        for seed in range(60):
            margins, seen = drawn(0.0, seed=seed, rows=60)
            for number, check in enumerate((UnlearningLiRA(), SwapTest())):
                reading = check.told(margins, seen)
                law = compared_to(reading, check)
                inside[number] += law.low <= 0 <= law.high
        assert (np.abs(inside / 60 - 0.9) < 3 * (0.9 * 0.1 / 60) ** 0.5).all()


def compared_to(reading, check):
    from hf_unlearn.audit.check import Readings

    return compared(Readings(reading), check.margin, 10, by_construction=check.by_construction)


class TestSwap:
    def test_by_hand(self):
        margins = np.array([[1.0, 2.0, 0.0, 0.0], [0.0, 3.0, 1.0, 0.0]])
        seen = np.array([[True, True, False, False], [False, False, True, True]])
        assert swap_advantage(margins, seen) == pytest.approx(((1 - 1) / 2 + (1 + 0) / 2) / 2)

    def test_who_is_surer_of_everything_gains_nothing(self):
        margins, seen = drawn(0.0)
        margins[::2] += 100
        assert SwapTest().told(margins, seen).value == pytest.approx(0.0)

    def test_one_model_twice_is_exactly_zero(self):
        margins, seen = drawn(2.0)
        margins[1::2] = margins[::2]
        found = SwapTest().told(margins, seen)
        assert (found.value, found.error) == (0.0, 0.0)
        assert compared_to(found, SwapTest()).status == "within"

    def test_advantage_of_two_known_laws(self):
        """P(N(δ, σ) > N(0, σ)) − P(<) = 2 Φ(δ / σ√2) − 1."""
        margins, seen = drawn(1.0, pairs=40)
        assert SwapTest().told(margins, seen).value == pytest.approx(2 * norm.cdf(1 / (0.7 * 2**0.5)) - 1, abs=0.03)


# On models

SETTINGS = {"epochs": 60, "batch_size": 40, "lr": 3e-3, "optimizer": "adamw"}


@pytest.fixture(scope="module")
def world(rows):
    """Eighty rows with wrong labels; shadows on halves of them, and for each what was trained without any."""
    images, labels = rows.train
    images, labels = images[:600], labels[:600].clone()
    wrong = torch.arange(600) < 80
    labels[wrong] = (labels[wrong] + 1 + torch.arange(80) % 9) % CLASSES
    kept = (~wrong).nonzero().flatten()
    random, halves = np.random.default_rng(0), []
    for _ in range(3):
        order = random.permutation(80)
        halves += [np.sort(order[:40]), np.sort(order[40:])]
    members = [torch.arange(600), *(torch.cat([torch.as_tensor(half), kept]) for half in halves), *[kept] * 6]
    state = train_ensemble(lambda seed: Logits(), images, labels, members, range(40, 40 + len(members)), **SETTINGS)
    made = []
    for number in range(len(members)):
        model = Logits()
        model.load_state_dict({name: value[number] for name, value in state.items()})
        made.append(model.network.eval())
    others = rows.test[1]
    sets = {
        "forget": dataset(images, labels, wrong),
        "retain": dataset(images, labels, ~wrong),
        "test": dataset(rows.test[0], (others + 1) % CLASSES, torch.arange(len(others)) < 100),
    }
    return {"original": made[0], "shadows": list(zip(made[1:7], halves, strict=True)), "clean": made[7:], "sets": sets}


def tried(world, unlearn_fn, **settings):
    given = {
        "shadows": world["shadows"],
        "checks": ["forget_accuracy", "unlearning_lira", "swap_test"],
        "progress": False,
    }
    return audit(
        copy.deepcopy(world["clean"][0]), world["original"], unlearn_fn=unlearn_fn, **world["sets"], **given | settings
    )


def test_who_does_nothing_is_found_and_who_retrains_is_not(world):
    seen = []

    def nothing(model, forget, retain):
        seen.append((len(forget), len(retain), model))
        with torch.no_grad():
            model.head.bias += 1.0  # for all classes alike: what is done to the copy is not done to the shadow
        return model

    digests = [one.head.bias.clone() for one, _ in world["shadows"]]
    found = tried(world, nothing)
    assert [one[:2] for one in seen] == [(40, 520)] * 6
    assert all(torch.equal(one.head.bias, bias) for (one, _), bias in zip(world["shadows"], digests, strict=True))
    for name in ("unlearning_lira", "swap_test"):
        assert found[name].status == "beyond"
        assert found[name].audited == pytest.approx(found[name].original, abs=1e-4)  # before and after are the same
        assert found[name].sees
    assert found["unlearning_lira"].audited > 0.95
    retrained = iter(world["clean"])
    gone = tried(world, lambda model, forget, retain: next(retrained))
    assert gone["swap_test"].status != "beyond"
    assert gone["unlearning_lira"].status != "beyond"
    assert abs(gone["swap_test"].audited) < 0.25  # 40 rows twice of 3 pairs: a standard deviation of 0.07
    assert gone["unlearning_lira"].original > 0.95
    assert gone["unlearning_lira"].retrained == ()


def test_the_auc_of_originals_against_scikit_learn(world):
    """LiRA by a plain loop over shadows and rows, from the models themselves."""
    found = tried(world, lambda model, forget, retain: model)["unlearning_lira"]
    pixels, labels = world["sets"]["forget"]["pixel_values"][:], world["sets"]["forget"]["label"][:]
    margins, seen = [], []
    for model, half in world["shadows"]:
        with torch.no_grad():
            p = model(pixels).logits.double().softmax(1)[torch.arange(80), labels]
        margins.append((p / (1 - p)).log().numpy())
        seen.append(np.isin(np.arange(80), half))
    areas = []
    for k in range(6):
        others = [j for j in range(6) if j // 2 != k // 2]
        score = []
        spreads = [
            np.mean([np.var([margins[j][r] for j in others if seen[j][r] == kind], ddof=1) for r in range(80)])
            for kind in (True, False)
        ]
        for r in range(80):
            laws = [np.mean([margins[j][r] for j in others if seen[j][r] == kind]) for kind in (True, False)]
            one, two = (norm(mean, v**0.5).logpdf(margins[k][r]) for mean, v in zip(laws, spreads, strict=True))
            score.append(one - two)
        areas.append(roc_auc_score(seen[k], score))
    assert found.audited == pytest.approx(np.mean(areas), abs=1e-3)


def test_shadows_are_trained_here_where_models_are_small(world):
    asked = []
    found = tried(world, lambda model, forget, retain: asked.append(forget["id"][:].tolist()) or model, shadows=6)
    assert len(asked) == 6
    for one, two in zip(asked[::2], asked[1::2], strict=True):
        assert set(one) | set(two) == set(range(80))
        assert not set(one) & set(two)
    assert found["unlearning_lira"].n == 80
    assert found["swap_test"].audited > 0.2  # learned by heart, if not as well as by the original


def test_what_stops_goes_on_and_another_function_is_tried_anew(world, tmp_path):
    calls = []

    def twice(model, forget, retain):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return model

    with pytest.raises(KeyboardInterrupt):
        tried(world, twice, output_dir=tmp_path)
    whole = tried(world, twice, output_dir=tmp_path)
    assert len(calls) == 4 + 1 + 3  # the first one shows that it is the same function, two are kept
    again = tried(world, lambda model, forget, retain: calls.append(1) or model, output_dir=tmp_path)
    assert len(calls) == 8 + 1
    assert again["swap_test"].readings.audited.value == whole["swap_test"].readings.audited.value
    tried(
        world, lambda model, forget, retain: calls.append(1) or copy.deepcopy(world["original"]), output_dir=tmp_path
    )
    assert len(calls) == 9 + 6


def test_refused(world, tiny_resnet):
    def same(model, forget, retain):
        return model

    one, half = world["shadows"][0]
    for change, message in (
        ({"unlearn_fn": "pbu"}, "unlearn_fn: str is no function"),
        ({"train_fn": world["original"]}, "train_fn: Network is no function"),
        ({"unlearn_fn": None}, "shadows: are to be unlearned"),
        ({"training_seeds": 1}, "training_seeds=1: must be 0"),
        ({"shadows": 5}, "shadows=5: must be an even number"),
        ({"shadows": [(one, half)]}, "shadows: 1 models"),
        ({"shadows": [one] * 6}, r"shadows\[0\]: Network is no pair"),
        ({"shadows": [(one, [80])] * 6}, r"shadows\[0\]: its rows must be numbers of rows of forget, 0 to 79"),
        ({"shadows": [(one, half)] * 6}, r"shadows\[0\] and \[1\]: each must"),
    ):
        with pytest.raises(ValueError, match=f"^{message}") as error:
            tried(world, **{"unlearn_fn": same} | change)
        assert "\n" not in str(error.value)
    nothing = tried(world, lambda model, forget, retain: None)
    assert set(nothing.failed) == {"unlearning_lira", "swap_test"}
    assert "unlearn_fn: returned NoneType" in nothing.failed["swap_test"]
    assert nothing.verdict.word == "undetermined"
    assert "unlearn_fn" in tried(world, None, shadows=None).skipped["swap_test"]
