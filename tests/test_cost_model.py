"""The cost model says what its formulas do, and its fits find constants that are known."""

import itertools
import json
import random
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def model(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cost_model

    return cost_model


def test_fits_find_what_was_put_in(model):
    draw = random.Random(0)
    first, second = ([draw.uniform(1, 100) for _ in range(9)] for _ in range(2))
    fit = model.fit([3 * a + 7 * b + 2 for a, b in zip(first, second, strict=True)], first, second, [1] * 9)
    assert fit.constants == pytest.approx((3, 7, 2))
    assert fit.worst < 1e-9
    counted, measured = [1.0, 3.0, 8.0], [2.0, 4.0, 16.0]
    best = model.fit(measured, counted)

    def lost(each):
        return sum((each * x / y - 1) ** 2 for x, y in zip(counted, measured, strict=True))

    (slope,) = best.constants
    assert lost(slope) < min(lost(slope * 0.99), lost(slope * 1.01))
    assert best.errors == pytest.approx([slope * x / y - 1 for x, y in zip(counted, measured, strict=True)])
    assert model.fit(measured, [1, 2, 8], [8, 2, 1]).constants == pytest.approx(
        (2, 0)
    )  # the second would be below zero


SHAPE = {
    "parameters": 1000, "trained": 1000, "layers": 10, "forward": 2e6, "backward": 4e6, "again": 6e6, "kept": 5000, "kept_again": 500,
}  # fmt: skip


def said(model, gpus, shape=SHAPE, **changes):
    plain = {
        "name": "",
        "shape": "",
        "examples": 2,
        "trained_on": 3,
        "operations": 1.5,
        "weight_bytes": 4,
        "sharded": False,
        "copies": 1,
        "forwards": 1,
    }
    return model.predicted(model.Case(**(plain | changes)), shape, gpus, model.Fit((1.0,), ()), (0.5, 0.25))


def test_one_gpu_by_hand(model):
    found = said(model, 1, loss_bytes=7.0)
    assert found["memory"] == 1000 * (4 + 16) + 3 * (500 + 450 + 7)
    assert found["sent"] == found["network"] == 0
    assert found["compute"] == pytest.approx(1.5 * 2 * 8e6 / (989e12 * 0.5))
    assert found["passing"] == pytest.approx(48 * 1000 / (4.8e12 * 0.25))
    assert found["seconds"] == pytest.approx(found["compute"] + found["passing"])
    once = said(model, 1, checkpointed=False)
    assert once["memory"] == 1000 * (4 + 16) + 3 * 5000
    assert once["compute"] == pytest.approx(found["compute"] * 6 / 8)


def test_what_is_shared_and_what_is_sent(model):
    activations = 3 * 950
    for gpus in (8, 64):
        link = 450e9 if gpus == 8 else 50e9
        all_of_it, shared = said(model, gpus), said(model, gpus, sharded=True)
        assert all_of_it["memory"] == said(model, 1)["memory"]
        assert shared["memory"] == pytest.approx(20000 / gpus + 2 * 4000 / 10 + activations)
        assert all_of_it["sent"] == pytest.approx((gpus - 1) / gpus * 2 * 4000)  # a ring's all-reduce
        assert shared["sent"] == pytest.approx((gpus - 1) / gpus * (3 * 4000 + 4000))  # three passes, gradients once
        assert shared["network"] == pytest.approx(shared["sent"] / link)
        assert shared["compute"] == all_of_it["compute"] == said(model, 1)["compute"]
        assert shared["at_best"] <= shared["seconds"]


def test_a_frozen_weight_costs_its_bytes_alone(model):
    lora = SHAPE | {"parameters": 1100, "trained": 100}
    found = said(model, 8, lora, weight_bytes=2, copies=0)
    assert found["memory"] == 2 * 1000 + 16 * 100 + 3 * 950
    assert found["sent"] == pytest.approx(7 / 8 * 2 * 400)


def test_every_row_of_a_gpu_that_is_compared_has_its_case(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scaling_report

    growth, influence = (
        json.loads((BENCHMARKS / "results" / f"{name}.json").read_text()) for name in ("growth", "influence_cost")
    )
    assert set(scaling_report.PREDICTED.values()) <= {case.name for case in scaling_report.cases(growth, influence)}


def test_slopes_of_powers_are_their_exponents(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scaling_report

    for power, factor in itertools.product((0.0, 1.0, 2.5), (1e-3, 5.0)):
        values = [factor * times**power for times in (1, 4, 16)]
        assert scaling_report.slope_of(values, [1, 4, 16]) == pytest.approx(power)
        assert scaling_report.exponent(values[1], values[2], 4) == pytest.approx(power)
