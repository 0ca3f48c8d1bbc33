"""What drives a generator's parameters apart from adapted ones, and what moves along the line between the two."""

import io
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_unlearn.parameters import anchors as parameters_module
from hf_unlearn.parameters.anchors import QuadraticAnchor, SumOfAnchors
from hf_unlearn.parameters.reference import average_
from hf_unlearn.parameters.repulsion import DISTANCES, REPULSIONS, Repulsion, extrapolate


SHAPES = {"weight": (7, 3), "scalar": (), "bias": (5,), "kernel": (4, 3, 2, 2)}
SEEDS = st.integers(0, 10**6)


def point(seed, size=1.0, around=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    values = {name: size * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: (value + (around[name] if around else 0)).to(dtype) for name, value in values.items()}


def scene(seed=0, models=1, dtype=torch.float32):
    """A reference, models adapted from it, and where unlearning has come to: all in each other's neighbourhood."""
    reference = point(seed, dtype=dtype)
    adapted = [point(seed + 1 + k, 0.3, reference, dtype) for k in range(models)]
    return reference, adapted, point(seed + 9, 0.2, reference, dtype)


def live(values):
    parameters = {name: nn.Parameter(value.clone()) for name, value in values.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    return parameters


def doubled(values):
    return {name: value.detach().double() for name, value in values.items()}


def apart(parameters, adapted, distance, reference):
    """d, model by model."""
    if distance == "mean_mse":
        each = [torch.stack([F.mse_loss(parameters[k], one[k]) for k in one]).mean() for one in adapted]
    else:
        each = [sum((parameters[k] - one[k]).square().sum() for k in one) for one in adapted]
    mean = torch.stack(each).mean()
    return mean / apart(reference, adapted, "sum_squares", None) if distance == "relative" else mean


def written_out(parameters, adapted, kind, weight, rate, distance, reference):
    d = apart(parameters, adapted, distance, reference)
    return weight * {"el2": torch.exp(-rate * d), "il2": 1 / d, "nl2": -d}[kind]


def expected(parameters, adapted, kind, weight, rate, distance, reference):
    """Value and gradients of the formula in fp64."""
    leaves = {name: value.requires_grad_() for name, value in doubled(parameters).items()}
    penalty = written_out(leaves, [doubled(one) for one in adapted], kind, weight, rate, distance, doubled(reference))
    gradients = torch.autograd.grad(penalty, list(leaves.values()))
    return penalty.detach(), dict(zip(leaves, gradients, strict=True))


def assert_near(parameters, gradients, tolerance, scale=1.0):
    """By tensor, relative to its size."""
    for name, gradient in gradients.items():
        error = (parameters[name].grad.double() - scale * gradient).norm()
        assert error <= tolerance * (scale * gradient).norm(), name


ALL = [(kind, distance) for kind in REPULSIONS for distance in DISTANCES]


class TestRepulsion:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("models", [1, 2, 3])
    @pytest.mark.parametrize(("kind", "distance"), ALL)
    def test_value_and_gradient_are_those_of_the_formula(self, kind, distance, models, dtype):
        reference, adapted, now = scene(models=models, dtype=dtype)
        options = {"kind": kind, "weight": 1.7, "rate": 0.6, "distance": distance, "reference": reference}
        repulsion, parameters = Repulsion(adapted, **options), live(now)
        value, gradients = expected(now, adapted, **options)
        tolerance = 1e-5 if dtype == torch.float32 else 4e-2
        actual = repulsion.value(parameters)
        assert actual.keys() == {"repulsion"}
        assert actual["repulsion"].dtype == torch.float32
        assert not actual["repulsion"].requires_grad
        torch.testing.assert_close(actual["repulsion"].double(), value, rtol=tolerance, atol=0)
        repulsion.add_grad_(parameters)
        assert all(parameter.grad.dtype == dtype for parameter in parameters.values())
        if dtype == torch.bfloat16 and models > 1:
            tolerance = 0.15  # of a mean in 16 bits, which is rounded by a good part of the way to a scalar
        assert_near(parameters, gradients, tolerance)

    @settings(deadline=None, max_examples=60)
    @given(
        seed=SEEDS,
        models=st.integers(1, 4),
        which=st.sampled_from(ALL),
        weight=st.floats(0.01, 100),
        rate=st.floats(0.01, 2),
    )
    def test_the_same_for_all_points_and_weights(self, seed, models, which, weight, rate):
        reference, adapted, now = scene(seed, models)
        options = {
            "kind": which[0],
            "weight": weight,
            "rate": rate,
            "distance": which[1],
            "reference": reference,
        }
        repulsion, parameters = Repulsion(adapted, **options), live(now)
        value, gradients = expected(now, adapted, **options)
        torch.testing.assert_close(repulsion.value(now)["repulsion"].double(), value, rtol=1e-4, atol=0)
        repulsion.add_grad_(parameters)
        assert_near(parameters, gradients, 1e-4)

    @pytest.mark.parametrize("elements", [1, 3, 6, 18, 2**24])
    @pytest.mark.parametrize(("kind", "distance"), ALL)
    def test_neither_runs_nor_the_memory_layout_change_anything(self, monkeypatch, elements, kind, distance):
        reference, adapted, now = scene(models=2)
        options = {"kind": kind, "weight": 1.7, "rate": 0.6, "distance": distance, "reference": reference}
        value, gradients = expected(now, adapted, **options)
        monkeypatch.setitem(parameters_module.RUN_ELEMENTS, "cpu", elements)
        # Each in another layout: what is live, what repels, and the gradient.
        parameters = live(now)
        with torch.no_grad():
            parameters["kernel"].data = now["kernel"].contiguous(memory_format=torch.channels_last)
        parameters["kernel"].grad = torch.zeros(SHAPES["kernel"]).transpose(1, 2).contiguous().transpose(1, 2)
        adapted[1]["kernel"] = adapted[1]["kernel"].contiguous(memory_format=torch.channels_last)
        assert parameters["kernel"].stride() != now["kernel"].stride() != parameters["kernel"].grad.stride()
        repulsion = Repulsion(adapted, **options)
        parts = [part for run in repulsion._runs for part in run]
        # A row of a kernel has 12 elements, which no run holds that is to hold 1 to 6.
        assert len(parts) == {1: 17, 3: 14, 6: 10, 18: 8, 2**24: 4}[elements]
        torch.testing.assert_close(repulsion.value(parameters)["repulsion"].double(), value, rtol=1e-5, atol=0)
        repulsion.add_grad_(parameters)
        assert_near(parameters, gradients, 1e-5)

    @settings(deadline=None, max_examples=30)
    @given(which=st.sampled_from(ALL), scale=st.floats(-10, 10), seed=SEEDS)
    def test_scale_multiplies_what_is_added_to_the_gradient(self, which, scale, seed):
        reference, adapted, now = scene(seed, 2)
        repulsion = Repulsion(adapted, kind=which[0], distance=which[1], reference=reference)
        once, scaled = live(now), live(now)
        repulsion.add_grad_(once)
        for parameter in scaled.values():
            parameter.grad.fill_(3)
        repulsion.add_grad_(scaled, scale)
        for name in SHAPES:
            torch.testing.assert_close(scaled[name].grad, 3 + scale * once[name].grad, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("elements", [1, 2**24])
    @pytest.mark.parametrize(("kind", "distance"), ALL)
    def test_parameters_without_gradient_count_but_get_none(self, monkeypatch, kind, distance, elements):
        monkeypatch.setitem(parameters_module.RUN_ELEMENTS, "cpu", elements)
        reference, adapted, now = scene(models=2)
        repulsion = Repulsion(adapted, kind=kind, distance=distance, reference=reference)
        parameters, full = live(now), live(now)
        parameters["bias"].grad = None
        repulsion.add_grad_(parameters)
        repulsion.add_grad_(full)
        assert parameters["bias"].grad is None
        assert all(torch.equal(parameters[name].grad, full[name].grad) for name in SHAPES if name != "bias")
        assert all(torch.equal(parameters[name], now[name]) for name in SHAPES)

    @settings(deadline=None, max_examples=30)
    @given(seed=SEEDS, models=st.integers(2, 5), distance=st.sampled_from(DISTANCES))
    def test_distance_is_the_average_over_the_models(self, seed, models, distance):
        reference, adapted, now = scene(seed, models)
        together = Repulsion(adapted, distance=distance, reference=reference).distance(now)
        absolute = distance if distance != "relative" else "sum_squares"
        alone = [Repulsion([one], distance=absolute) for one in adapted]
        average = sum(one.distance(now) for one in alone) / models
        if distance == "relative":
            average = average / (sum(one.distance(reference) for one in alone) / models)
        torch.testing.assert_close(together, average, rtol=1e-4, atol=0)

    @pytest.mark.parametrize("distance", DISTANCES)
    def test_many_models_cost_the_memory_of_one(self, distance):
        def size(models):
            reference, adapted, _ = scene(models=models)
            file = io.BytesIO()
            torch.save(vars(Repulsion(adapted, distance=distance, reference=reference)), file)
            return file.tell()

        assert size(5) < size(1) + 200

    @pytest.mark.parametrize("models", [1, 2])
    def test_later_training_of_the_models_does_not_reach_it(self, models):
        reference, adapted, now = scene(models=models)
        adapted = [live(one) for one in adapted]
        reference = live(reference)
        repulsion = Repulsion(adapted, reference=reference)
        before = repulsion.value(now)["repulsion"]
        with torch.no_grad():
            for one in (*adapted, reference):
                for value in one.values():
                    value.add_(1)
        assert torch.equal(repulsion.value(now)["repulsion"], before)
        assert not any(value.requires_grad for value in repulsion.mean.values())

    @pytest.mark.parametrize("models", [1, 3])
    @pytest.mark.parametrize(("kind", "start"), [("el2", math.exp(-0.6)), ("il2", 1.0), ("nl2", -1.0)])
    def test_relative_distance_is_one_where_unlearning_begins(self, kind, start, models):
        reference, adapted, _ = scene(models=models)
        repulsion = Repulsion(adapted, kind=kind, weight=1.7, rate=0.6, reference=reference)
        assert repulsion.distance(reference).item() == pytest.approx(1, rel=1e-5)
        assert repulsion.value(reference)["repulsion"].item() == pytest.approx(1.7 * start, rel=1e-5)

    @settings(deadline=None, max_examples=30)
    @given(seed=SEEDS, models=st.integers(1, 3), kind=st.sampled_from(REPULSIONS), unit=st.floats(1e-3, 1e3))
    def test_relative_distance_has_no_unit(self, seed, models, kind, unit):
        def rescaled(values):
            return {name: unit * value for name, value in values.items()}

        reference, adapted, now = scene(seed, models)
        parameters, larger = live(now), live(rescaled(now))
        plain = Repulsion(adapted, kind=kind, reference=reference)
        other = Repulsion([rescaled(one) for one in adapted], kind=kind, reference=rescaled(reference))
        torch.testing.assert_close(other.value(larger), plain.value(parameters), rtol=1e-3, atol=0)
        plain.add_grad_(parameters)
        other.add_grad_(larger)
        assert_near(larger, {name: p.grad.double() / unit for name, p in parameters.items()}, 1e-3)

    @settings(deadline=None, max_examples=60)
    @given(
        seed=SEEDS,
        models=st.integers(1, 3),
        which=st.sampled_from(ALL),
        step=st.floats(0.1, 10),
        rate=st.floats(0.1, 1),
    )
    def test_a_step_of_gradient_descent_leads_away_however_long(self, seed, models, which, step, rate):
        reference, adapted, now = scene(seed, models)
        repulsion = Repulsion(adapted, kind=which[0], rate=rate, distance=which[1], reference=reference)
        parameters = live(now)
        before = repulsion.distance(parameters), repulsion.value(parameters)["repulsion"]
        repulsion.add_grad_(parameters)
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.sub_(step * parameter.grad)
        assert repulsion.distance(parameters) > before[0]
        assert repulsion.value(parameters)["repulsion"] < before[1]

    def test_far_away_only_the_exponential_lets_go(self):
        reference, adapted, _ = scene()
        far = {name: adapted[0][name] + 100 * (reference[name] - adapted[0][name]) for name in SHAPES}
        norms = {}
        for kind in REPULSIONS:
            repulsion = Repulsion(adapted, kind=kind, reference=reference)
            assert repulsion.distance(far).item() == pytest.approx(1e4, rel=1e-3)
            parameters = live(far)
            repulsion.add_grad_(parameters)
            norms[kind] = sum(p.grad.square().sum().item() for p in parameters.values())
        assert norms["el2"] == 0 < norms["il2"] < 1e-6 < 1 < norms["nl2"]

    @pytest.mark.parametrize("kind", REPULSIONS)
    def test_without_weight_there_is_nothing(self, kind):
        reference, adapted, now = scene()
        repulsion, parameters = Repulsion(adapted, kind=kind, weight=0.0, reference=reference), live(now)
        repulsion.add_grad_(parameters)
        assert repulsion.value(parameters)["repulsion"] == 0
        assert all((parameter.grad == 0).all() for parameter in parameters.values())

    @pytest.mark.parametrize(("kind", "distance"), ALL)
    def test_beside_an_anchor(self, kind, distance):
        reference, adapted, now = scene(models=2)
        options = {"kind": kind, "weight": 1.7, "rate": 0.6, "distance": distance, "reference": reference}
        both = SumOfAnchors(QuadraticAnchor(reference, isotropic=0.4), Repulsion(adapted, **options))
        parameters = live(now)
        value, gradients = expected(now, adapted, **options)
        pull = {name: 0.8 * (now[name].double() - reference[name].double()) for name in SHAPES}
        terms = both.value(parameters)
        assert terms.keys() == {"isotropic", "repulsion"}
        torch.testing.assert_close(terms["repulsion"].double(), value, rtol=1e-5, atol=0)
        both.add_grad_(parameters, 0.5)
        assert_near(parameters, {name: pull[name] + gradients[name] for name in SHAPES}, 1e-4, scale=0.5)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"kind": "l2"}, "^repulsion='l2'.*el2, il2, nl2"),
            ({"distance": "cosine"}, "distance='cosine'.*relative, mean_mse, sum_squares"),
            ({"weight": -1e-9}, "weight=-1e-09 must be ≥ 0"),
            ({"rate": 0.0}, "rate=0.0 > 0"),
            ({"rate": -1.0}, "rate=-1.0 > 0"),
            ({"adapted": []}, "^adapted: no model"),
            ({"adapted": [point(1), {"weight": torch.ones(7, 3)}]}, "^adapted: .*different names"),
            ({"reference": {"weight": torch.ones(7, 3)}}, "^adapted: .*different names"),
            ({"reference": None}, "^reference: missing"),
            ({"adapted": [point(0)]}, "^adapted: equals the model"),
            ({"adapted": [point(0), point(0)]}, "^adapted: equals the model"),
        ],
    )
    def test_refuses(self, change, match):
        with pytest.raises(ValueError, match=match) as error:
            Repulsion(**({"adapted": [point(1)], "reference": point(0)} | change))
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("distance", ["mean_mse", "sum_squares"])
    def test_absolute_distances_need_no_reference(self, distance):
        _, adapted, now = scene()
        alone = Repulsion(adapted, distance=distance).value(now)
        assert torch.equal(
            alone["repulsion"], Repulsion(adapted, distance=distance, reference=now).value(now)["repulsion"]
        )


class TestExtrapolate:
    @settings(deadline=None, max_examples=40)
    @given(seed=SEEDS, scale=st.floats(-3, 3))
    def test_closed_form(self, seed, scale):
        reference, (adapted,), _ = scene(seed)
        moved = extrapolate(reference, adapted, scale)
        for name, value in moved.items():
            start, way = reference[name].double(), adapted[name].double() - reference[name].double()
            torch.testing.assert_close(value.double(), start + scale * way, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_both_ends_are_exact_and_minus_one_mirrors(self, dtype):
        reference, adapted = point(0, dtype=dtype), point(1)
        at = {scale: extrapolate(reference, adapted, scale) for scale in (0, 1, -1)}
        for name, value in reference.items():
            assert at[0][name].dtype == at[1][name].dtype == dtype
            assert torch.equal(at[0][name], value)
            assert torch.equal(at[1][name], adapted[name].to(dtype))
            mirrored = 2 * value - adapted[name].to(dtype)
            torch.testing.assert_close(
                at[-1][name], mirrored, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
            )

    def test_gives_new_tensors_without_gradient(self):
        reference, adapted = live(point(0)), live(point(1))
        for value in extrapolate(reference, adapted, 0.0).values():
            assert not value.requires_grad
            value.fill_(7)
        assert all(torch.equal(reference[name], value) for name, value in point(0).items())
        assert all(torch.equal(adapted[name], value) for name, value in point(1).items())

    def test_away_from_the_model_is_where_the_repulsion_leads(self):
        reference, (adapted,), _ = scene()
        repulsion, parameters = Repulsion([adapted], reference=reference), live(reference)
        repulsion.add_grad_(parameters)
        away = extrapolate(reference, adapted, -1.0)
        way = torch.cat([(away[name] - reference[name]).flatten() for name in SHAPES])
        descent = -torch.cat([parameters[name].grad.flatten() for name in SHAPES])
        assert F.cosine_similarity(way, descent, 0).item() == pytest.approx(1, abs=1e-5)


class TestAverage:
    @pytest.mark.parametrize("decay", [0.0, 0.05, 0.5, 0.999])
    def test_each_step_keeps_the_smaller_decay(self, decay):
        average, history = point(0), [point(seed) for seed in range(1, 41)]
        shares = [1.0]  # of where it began and of each model since
        for step, now in enumerate(history):
            average_(average, now, decay, step)
            kept = min(decay, (1 + step) / (10 + step))
            shares = [kept * share for share in shares] + [1 - kept]
        assert sum(shares) == pytest.approx(1)
        for name, value in average.items():
            exact = sum(share * now[name].double() for share, now in zip(shares, [point(0), *history], strict=True))
            torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("steps", [1, 2, 5, 20])
    def test_what_is_left_of_the_beginning_has_a_closed_form(self, steps):
        """The product of (1 + k)/(10 + k) over the first n steps is one over n + 9 choose 9."""
        average, now = {"x": torch.ones(3, dtype=torch.float64)}, {"x": torch.zeros(3, dtype=torch.float64)}
        for step in range(steps):
            average_(average, now, 0.999999, step)
        torch.testing.assert_close(average["x"], torch.full((3,), 1 / math.comb(steps + 9, 9), dtype=torch.float64))

    def test_is_that_of_diffusers(self):
        """Its first step copies the model, and its count is one ahead."""
        layer = nn.Linear(3, 2)
        other = EMAModel(layer.parameters(), decay=0.7)
        other.step(layer.parameters())
        average = {name: value.detach().clone() for name, value in layer.named_parameters()}
        for step in range(1, 40):
            with torch.no_grad():
                for index, value in enumerate(layer.parameters()):
                    value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(10 * step + index)))
            average_(average, dict(layer.named_parameters()), 0.7, step)
            other.step(layer.parameters())
        torch.testing.assert_close(list(average.values()), [value.detach() for value in other.shadow_params])

    def test_goes_by_names_in_place_and_without_gradient(self):
        average = point(0)
        kept = dict(average)
        now = live({"more": torch.ones(2), **dict(reversed(point(1).items()))})
        average_(average, now, 0.999, 3)
        for name, value in point(0).items():
            assert average[name] is kept[name]
            assert not average[name].requires_grad
            torch.testing.assert_close(average[name], 4 / 13 * value + 9 / 13 * now[name].detach())
        assert all(torch.equal(now[name], value) for name, value in point(1).items())

    @pytest.mark.parametrize("step", [0, 5, 1000])
    def test_what_stands_still_stays(self, step):
        average = point(0)
        average_(average, point(0), 0.99, step)
        assert all(torch.equal(average[name], value) for name, value in point(0).items())
