"""What drives a generator's parameters apart from adapted ones, what moves along the line between the two, and averages."""

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
from hf_unlearn.parameters.reference import average_
from hf_unlearn.parameters.repulsion import DISTANCES, REPULSIONS, Repulsion, extrapolate


SHAPES = {"weight": (7, 3), "scalar": (), "bias": (5,), "kernel": (4, 3, 2, 2)}
SEEDS = st.integers(0, 10**6)
ALL = [(kind, distance) for kind in REPULSIONS for distance in DISTANCES]
# Each kind, distance, number of models and size of a run with each of the others once; 16 bits with each of them too.
PARTS = {1: 17, 6: 10, 2**24: 4}  # a row of a kernel has 12 elements, which runs of 1 or 6 do not hold
PAIRS = [
    (REPULSIONS[k], DISTANCES[d], 1 + (k + d) % 3, list(PARTS)[(k + 2 * d) % 3], torch.bfloat16 if k == d else torch.float32)
    for k in range(3)
    for d in range(3)
]  # fmt: skip


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


def apart(parameters, adapted, distance, reference):
    """d, model by model."""
    if distance == "mean_mse":
        each = [torch.stack([F.mse_loss(parameters[k], one[k]) for k in one]).mean() for one in adapted]
    else:
        each = [sum((parameters[k] - one[k]).square().sum() for k in one) for one in adapted]
    mean = torch.stack(each).mean()
    return mean / apart(reference, adapted, "sum_squares", None) if distance == "relative" else mean


def expected(parameters, adapted, kind, weight, rate, distance, reference):
    """Value and gradients of the formula in fp64."""
    leaves = {name: value.detach().double().requires_grad_() for name, value in parameters.items()}
    adapted, reference = (
        [{name: value.double() for name, value in one.items()} for one in models] for models in (adapted, [reference])
    )
    d = apart(leaves, adapted, distance, *reference)
    penalty = weight * {"el2": torch.exp(-rate * d), "il2": 1 / d, "nl2": -d}[kind]
    gradients = torch.autograd.grad(penalty, list(leaves.values()))
    return penalty.detach(), dict(zip(leaves, gradients, strict=True))


def assert_near(parameters, gradients, tolerance, scale=1.0, around=None):
    """By tensor, relative to its size, and by what is lost in subtracting fp32 points, `around`, that nearly agree in it."""
    for name, gradient in gradients.items():
        error = (parameters[name].grad.double() - scale * gradient).norm()
        size = (scale * gradient).norm()
        lost = 0.0
        if around is not None:
            mean = torch.stack([one[name].double() for one in around]).mean(0)
            away = (parameters[name].detach().double() - mean).norm()
            lost = 4 * torch.finfo(torch.float32).eps * mean.norm() / away
        assert error <= (tolerance + lost) * size, name


# Of fp32: a change of 0.3 between weights of 1 is known to 4 eps = 2e-7, d to as much, and exp(−αd) to αd ≤ 20 times that.
CLOSE = 1e-5


class TestRepulsion:
    @pytest.mark.parametrize(("kind", "distance", "models", "elements", "dtype"), PAIRS)
    def test_value_and_gradient_are_those_of_the_formula(self, monkeypatch, kind, distance, models, elements, dtype):
        """However parameters are cut into runs, and each in another memory layout: live, repelling, the gradient."""
        monkeypatch.setitem(parameters_module.RUN_ELEMENTS, "cpu", elements)
        reference, adapted, now = scene(models=models, dtype=dtype)
        options = {"kind": kind, "weight": 1.7, "rate": 0.6, "distance": distance, "reference": reference}
        value, gradients = expected(now, adapted, **options)
        parameters = live(now)
        with torch.no_grad():
            parameters["kernel"].data = now["kernel"].contiguous(memory_format=torch.channels_last)
        parameters["kernel"].grad = (
            torch.zeros(SHAPES["kernel"], dtype=dtype).transpose(1, 2).contiguous().transpose(1, 2)
        )
        adapted[-1]["kernel"] = adapted[-1]["kernel"].contiguous(memory_format=torch.channels_last)
        assert parameters["kernel"].stride() != now["kernel"].stride() != parameters["kernel"].grad.stride()
        if distance != "relative":
            options["reference"] = None  # which they do without
        repulsion = Repulsion(adapted, **options)
        assert sum(map(len, repulsion._runs)) == PARTS[elements]
        assert (len(repulsion._runs) == 1) == (elements == 2**24)
        tolerance = CLOSE if dtype == torch.float32 else 4e-2
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

    @settings(deadline=None, max_examples=40)
    @given(
        seed=SEEDS, models=st.integers(1, 4), which=st.sampled_from(ALL), weight=st.floats(0.01, 100), rate=st.floats(0.01, 2),
        unit=st.floats(1e-3, 1e3),
    )  # fmt: skip
    def test_the_same_for_all_points_and_weights(self, seed, models, which, weight, rate, unit):
        """A relative distance has no unit; by the others, exp(−αd) would be 0 or 1 elsewhere."""
        reference, adapted, now = scene(seed, models)
        if which[1] == "relative":
            reference, *adapted, now = (
                {name: unit * value for name, value in one.items()} for one in (reference, *adapted, now)
            )
        options = {"kind": which[0], "weight": weight, "rate": rate, "distance": which[1], "reference": reference}
        repulsion, parameters = Repulsion(adapted, **options), live(now)
        value, gradients = expected(now, adapted, **options)
        torch.testing.assert_close(repulsion.value(now)["repulsion"].double(), value, rtol=10 * CLOSE, atol=0)
        repulsion.add_grad_(parameters)
        assert_near(parameters, gradients, 10 * CLOSE, around=adapted)

    @settings(deadline=None, max_examples=20)
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

    @pytest.mark.parametrize(("kind", "distance", "elements"), [("el2", "mean_mse", 1), ("nl2", "relative", 2**24)])
    def test_parameters_without_gradient_count_but_get_none(self, monkeypatch, kind, distance, elements):
        monkeypatch.setitem(parameters_module.RUN_ELEMENTS, "cpu", elements)
        reference, adapted, now = scene(models=2)
        repulsion = Repulsion(adapted, kind=kind, distance=distance, reference=reference)
        parameters, full = live(now), live(now)
        parameters["bias"].grad = None
        repulsion.add_grad_(parameters)
        repulsion.add_grad_(full)
        assert parameters["bias"].grad is None
        for name in SHAPES.keys() - {"bias"}:
            torch.testing.assert_close(parameters[name].grad, full[name].grad)
        assert all(torch.equal(parameters[name], now[name]) for name in SHAPES)

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
        adapted, reference = [live(one) for one in adapted], live(reference)
        repulsion = Repulsion(adapted, reference=reference)
        before = repulsion.value(now)["repulsion"]
        with torch.no_grad():
            for one in (*adapted, reference):
                for value in one.values():
                    value.add_(1)
        torch.testing.assert_close(repulsion.value(now)["repulsion"], before)
        assert not any(value.requires_grad for value in repulsion.mean.values())

    @pytest.mark.parametrize(
        ("kind", "start", "models"), [("el2", math.exp(-0.6), 1), ("il2", 1.0, 3), ("nl2", -1.0, 2)]
    )
    def test_relative_distance_is_one_where_unlearning_begins(self, kind, start, models):
        reference, adapted, _ = scene(models=models)
        repulsion = Repulsion(adapted, kind=kind, weight=1.7, rate=0.6, reference=reference)
        assert repulsion.distance(reference).item() == pytest.approx(1, rel=CLOSE)
        assert repulsion.value(reference)["repulsion"].item() == pytest.approx(1.7 * start, rel=CLOSE)

    def test_far_away_only_the_exponential_lets_go(self):
        reference, adapted, _ = scene()
        far = {name: adapted[0][name] + 100 * (reference[name] - adapted[0][name]) for name in SHAPES}
        norms = {}
        for kind in REPULSIONS:
            repulsion, parameters = Repulsion(adapted, kind=kind, reference=reference), live(far)
            assert repulsion.distance(far).item() == pytest.approx(1e4, rel=1e-3)
            repulsion.add_grad_(parameters)
            norms[kind] = sum(p.grad.square().sum().item() for p in parameters.values())
        assert norms["el2"] == 0 < norms["il2"] < 1e-6 < 1 < norms["nl2"]

    def test_without_weight_there_is_nothing(self):
        reference, adapted, now = scene()
        for kind in REPULSIONS:
            repulsion, parameters = Repulsion(adapted, kind=kind, weight=0.0, reference=reference), live(now)
            repulsion.add_grad_(parameters)
            assert repulsion.value(parameters)["repulsion"] == 0
            assert all((parameter.grad == 0).all() for parameter in parameters.values())

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"kind": "l2"}, "^repulsion='l2'.*el2, il2, nl2"),
            ({"distance": "cosine"}, "distance='cosine'.*relative, mean_mse, sum_squares"),
            ({"weight": -1e-9}, "weight=-1e-09 must be ≥ 0"),
            ({"rate": 0.0}, "rate=0.0 > 0"),
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


class TestExtrapolate:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_closed_form(self, dtype):
        reference, adapted = point(0, dtype=dtype), point(1)
        at = {scale: extrapolate(reference, adapted, scale) for scale in (0, 1, -1, 2.5)}
        for name, value in reference.items():
            end = adapted[name].to(dtype)
            assert at[0][name].dtype == at[1][name].dtype == dtype
            assert torch.equal(at[0][name], value)
            assert torch.equal(at[1][name], end)
            for scale in (-1, 2.5):
                expected = value.double() + scale * (end.double() - value.double())
                atol = 1e-5 if dtype == torch.float32 else 0.1  # 2⁻⁸ of 2.5 changes of up to 5, twice
                torch.testing.assert_close(at[scale][name].double(), expected, rtol=1e-5, atol=atol)

    def test_gives_new_tensors_without_gradient(self):
        reference, adapted = live(point(0)), live(point(1))
        for value in extrapolate(reference, adapted, 0.0).values():
            assert not value.requires_grad
            value.fill_(7)
        for seed, given_ in ((0, reference), (1, adapted)):
            assert all(torch.equal(given_[name], value) for name, value in point(seed).items())


class TestAverage:
    def test_what_is_left_of_the_beginning_has_a_closed_form(self):
        """The product of (1 + k)/(10 + k) over the first n steps is one over n + 9 choose 9."""
        average, now = {"x": torch.ones(3, dtype=torch.float64)}, {"x": torch.zeros(3, dtype=torch.float64)}
        for step in range(20):
            average_(average, now, 0.999999, step)
            torch.testing.assert_close(average["x"], torch.full_like(now["x"], 1 / math.comb(step + 10, 9)))

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
        average_(average := point(0), point(0), 0.99, 1000)  # what stands still stays
        assert all(torch.equal(average[name], value) for name, value in point(0).items())
