from dataclasses import replace

import pytest

from hf_unlearn.audit.check import Reading, Readings
from hf_unlearn.audit.residual import residual_mu
from hf_unlearn.audit.result import CheckResult
from hf_unlearn.audit.verdict import decide


KNOWS, GONE = Reading.mean_of([1.0] * 100), Reading.mean_of([0.0] * 100)


def result(
    name="a",
    layer="output",
    status="within",
    low=-0.01,
    high=0.02,
    margin=0.05,
    sees=True,
    retrained=(GONE,) * 5,
    audited=GONE,
):
    return CheckResult(
        name=name, title=f"check {name}", unit="%", layer=layer, paper=None, what="", stated=0.05,
        readings=Readings(audited, KNOWS, retrained), distance=(low + high) / 2, low=low, high=high, margin=margin, status=status, sees=sees,
    )  # fmt: skip


def beyond(name, layer, low=0.5):
    return result(name, layer, "beyond", low, low + 0.1)


NEAR = residual_mu(2.0, (1.8, 1.9, 2.0, 2.1, 2.2), original=-50.0, checks=5)
FINE = [result("output"), result("below", "below"), result("distance", "distance"), result("beside", "beside")]


def verdict(results, residual=NEAR, references=5, rows=100, failed=(), left_out=()):
    return decide(
        results, residual, references=references, forget_examples=rows, failed=dict(failed), left_out=left_out
    )


def test_forgotten_needs_all_of_it():
    found = verdict(FINE)
    assert (found.word, found.needs) == ("forgotten", ())
    assert found.decided_by in ("output", "below")


@pytest.mark.parametrize("layer", ["output", "below", "distance"])
@pytest.mark.parametrize("status", ["unclear", "blind", "beyond"])
def test_one_check_that_is_not_within_is_enough(layer, status):
    one = beyond("bad", layer) if status == "beyond" else result("bad", layer, status, high=0.2)
    word = {"output": "not forgotten", "below": "suppressed"}.get(layer) if status == "beyond" else None
    found = verdict([*FINE, one])
    assert (found.word, found.decided_by) == (word or "undetermined", "bad")
    assert "check bad" in found.why
    assert "%" in found.why  # its number
    assert found.needs or word


def test_what_was_lost_decides_nothing():
    assert verdict([*FINE, beyond("bad", "beside")]).word == "forgotten"


def test_output_goes_before_what_lies_below_and_the_farthest_decides():
    every = [beyond("probe", "below", 0.9), beyond("accuracy", "output", 0.2), beyond("other", "output", 0.3), *FINE]
    assert (verdict(every).word, verdict(every).decided_by) == ("not forgotten", "other")
    assert verdict([beyond("one", "below", 0.2), beyond("two", "below", 0.3), *FINE]).decided_by == "two"


def test_what_did_not_run_is_not_passed():
    found = verdict(FINE, failed={"attack": "out of memory"})
    assert (found.word, found.decided_by) == ("undetermined", "attack")
    assert "out of memory" in found.why
    assert verdict([*FINE, beyond("probe", "below")], failed={"attack": "x"}).word == "suppressed"  # which is worse


def test_what_decides_nothing_may_fail():
    """Through `judged`, which knows the layers."""
    from types import SimpleNamespace

    from hf_unlearn.audit.classifiers.answers import ForgetAccuracy, UnseenError
    from hf_unlearn.audit.run import judged

    rows = SimpleNamespace(classes=(3,), sizes={"forget": 100})
    found = {"forget_accuracy": Readings(GONE, KNOWS, (GONE,) * 5)}
    losses = {"audited": [2.0], "original": [-50.0], "retrained": [1.8, 1.9, 2.0, 2.1, 2.2]}
    for name, blocks in (("unseen_error", False), ("forget_accuracy", True)):
        word = judged([ForgetAccuracy(), UnseenError()], found, losses, rows, failed={name: "out of memory"})[2]
        assert (word.decided_by == name) == blocks


def test_an_output_that_is_fine_with_a_likelihood_that_is_not_is_suppressed():
    losses, settings = (11.8, 11.9, 12.0, 12.1, 12.2), {"original": -50.0, "checks": 5}
    knows = residual_mu(2.0, losses, **settings)  # 63 standard deviations
    assert (knows.status, knows.knows) == ("beyond", True)
    found = verdict(FINE, knows)
    assert (found.word, found.decided_by) == ("suppressed", "residual_mu")
    assert "+63.2" in found.why
    assert verdict([*FINE, beyond("bad", "output")], knows).word == "not forgotten"  # which is worse
    # Retrained models are surer of something wrong than one that says nothing: no memory makes up that difference.
    shrugs = residual_mu(2.0, losses, **settings, chance=1.9)
    assert (shrugs.status, shrugs.knows) == ("beyond", False)
    assert verdict(FINE, shrugs).word == "undetermined"
    assert residual_mu(2.0, losses, **settings, chance=2.3).knows
    assert not residual_mu(90.0, losses, **settings).knows  # driven further


@pytest.mark.parametrize(
    "residual",
    [
        residual_mu(80.0, (1.8, 1.9, 2.0, 2.1, 2.2), original=-50.0, checks=5),  # driven further than retraining
        residual_mu(2.0, (1.8, 1.9, 2.0, 2.1, 2.2), original=1.2, checks=5),
        residual_mu(2.0, (1.8, 2.2), original=-50.0, checks=5),
    ],
)
def test_residual_mu_takes_part(residual):
    found = verdict(FINE, residual)
    assert (found.word, found.decided_by) == ("undetermined", "residual_mu")
    assert found.needs


def test_nothing_is_forgotten_where_the_original_is_not_told_from_retrained_models():
    found = verdict([replace(one, sees=False) for one in FINE])
    assert found.word == "undetermined"
    assert "original" in found.why


@pytest.mark.parametrize("blind_layer", ["output", "below"])
def test_nor_where_one_layer_would_not_notice(blind_layer):
    assert verdict([replace(one, sees=one.layer != blind_layer) for one in FINE]).word == "undetermined"


def test_nor_where_a_check_was_not_asked_for():
    found = verdict(FINE, left_out=["quantised"])
    assert (found.word, found.decided_by) == ("undetermined", "quantised")
    assert verdict([beyond("probe", "below"), *FINE], left_out=["quantised"]).word == "suppressed"


def test_what_would_settle_a_check_of_shadows_is_more_of_them():
    for layer, status in (("below", "unclear"), ("distance", "unclear")):
        open_ = replace(result("swap", layer, status, high=0.2), settle="more shadow models")
        assert verdict([*FINE, open_]).needs == ("more shadow models",)
    further = replace(beyond("lira", "distance"), settle="more shadow models")
    assert "as far as retraining" in verdict([*FINE, further]).needs[0]


def test_few_examples_are_never_forgotten():
    assert verdict(FINE, rows=19).word == "undetermined"
    assert "19 forget examples" in verdict(FINE, rows=19).needs[0]
    assert verdict(FINE, rows=20).word == "forgotten"
    assert verdict([beyond("probe", "below"), *FINE], rows=5).word == "suppressed"


@pytest.mark.parametrize("references", [0, 1])
class TestWithoutReferences:
    def known(self, audited, **changes):
        return result("accuracy", status="unknown", retrained=(), audited=audited, **changes)

    def test_never_forgotten(self, references):
        found = verdict([self.known(GONE), result("below", "below", "unknown", retrained=())], references=references)
        assert found.word == "undetermined"
        assert "retrained" in found.needs[0]

    def test_the_originals_answers_are_not_forgotten(self, references):
        assert verdict([self.known(KNOWS)], references=references).word == "not forgotten"
        mixed = [self.known(KNOWS), replace(self.known(GONE), name="unseen")]
        assert verdict(mixed, references=references).word == "undetermined"

    def test_what_a_stranger_could_not_know_is_suppressed(self, references):
        below = beyond("quantised", "below")
        assert verdict([self.known(GONE), below], references=references).word == "suppressed"
