"""What the checks of language models read, against loops and second implementations, and what they say of planted cases."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from people import planted
from scipy.stats import ks_2samp
from sklearn.metrics import roc_auc_score

from hf_unlearn.audit.check import Reading, Readings
from hf_unlearn.audit.equivalence import compared
from hf_unlearn.audit.language.answers import SAMPLES, Sampled, ToldGreedily
from hf_unlearn.audit.language.attacks import AnswerBegun
from hf_unlearn.audit.language.data import language_data
from hf_unlearn.audit.language.depth import last_norm, lens
from hf_unlearn.audit.language.disturbed import GROUP, Quantised, weights_of
from hf_unlearn.audit.language.family import QUICK, STANDARD
from hf_unlearn.audit.language.likelihood import AnswerProbability, ForgetQuality, TruthRatio
from hf_unlearn.audit.language.membership import (
    MembershipByGradient,
    MembershipByLoss,
    MembershipByMinK,
    MembershipByReference,
)
from hf_unlearn.audit.language.relearning import MARKS, RATE, RelearnRetained, drawn, shown_and_asked
from hf_unlearn.audit.language.subject import LanguageSubject, losses
from hf_unlearn.audit.run import audit
from hf_unlearn.audit.weights import size_of_weights
from hf_unlearn.training.answers import read_answer


@pytest.fixture(scope="module")
def case():
    return planted()


@pytest.fixture(scope="module")
def data(case):
    return language_data(**case.sets, processing_class=case.tokenizer, size="standard", seed=0)


@pytest.fixture(scope="module")
def subject(case):
    return LanguageSubject(case.original, "audited", "original")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What is read of the references is read once."""
    return tmp_path_factory.mktemp("audit")


def audited(model, case, folder, retrained=(), **settings):
    settings = {"original": case.original, "output_dir": folder} | settings
    return audit(
        copy.deepcopy(model),
        **case.sets,
        retrained=retrained,
        processing_class=case.tokenizer,
        progress=False,
        **settings,
    )


def alone(model, answer):
    """Mean loss of one answer's tokens, without a batch, in plain torch."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([answer.ids])).logits[0, :-1].double()
    return float(F.cross_entropy(logits, torch.tensor(answer.labels[1:]), ignore_index=-100))


class TestReadings:
    def test_losses_are_those_of_single_answers(self, case, data):
        part = data.forget.select(range(5))
        found = losses(case.original, part).detach().numpy()
        np.testing.assert_allclose(found, [alone(case.original, one) for one in part.answers], rtol=1e-4, atol=1e-5)

    def test_greedy_answers(self, case, data, subject):
        reading = ToldGreedily().read(subject, data, 0)
        right = []
        for row in data.forget.rows:
            ids = torch.tensor([read_answer(row, case.tokenizer).prompt])
            ids = case.original.generate(ids, do_sample=False, max_new_tokens=20)[0, ids.shape[1] :]
            text = case.tokenizer.decode(ids, skip_special_tokens=True)
            right.append(row["completion"][0]["content"].split()[-1].strip(".") in text)
        assert reading.per_example == tuple(map(float, right))
        assert sum(right) > 20

    def test_begun_answers_need_no_question_to_be_understood(self, case, data):
        """A model that refuses whole answers goes on with one that is begun."""
        subject = LanguageSubject(case.refusing, "audited", "refusing")
        assert ToldGreedily().read(subject, data, 0).value < 0.1
        assert AnswerBegun().read(subject, data, 0).value > 0.25

    def test_sampled_answers_come_with_their_probability(self, case, data, subject):
        """Those of 8 × 32 draws that are the answer, word for word, beside the probability of its tokens; 4 standard errors."""
        reading = Sampled().read(subject, data, 0)
        exact = math.fsum(math.exp(-alone(case.original, one) * len(one.counted)) for one in data.forget.answers) / 32
        assert exact - 4 * math.sqrt(0.25 / (32 * SAMPLES)) < reading.value  # other wordings tell too
        assert reading.figures["told_at_least_once"] >= reading.value
        assert Sampled().read(subject, data, 0).per_example == reading.per_example
        assert Sampled().read(subject, data, 1).per_example != reading.per_example

    def test_probability_and_truth_ratio(self, case, data, subject):
        nll = np.array([alone(case.original, one) for one in data.forget.answers])
        np.testing.assert_allclose(
            AnswerProbability().read(subject, data, 0).per_example, np.exp(-nll), rtol=1e-3, atol=1e-5
        )

        def of(text, row):
            return alone(
                case.original,
                read_answer(row | {"completion": [{"role": "assistant", "content": text}]}, case.tokenizer),
            )

        for row, share in list(zip(data.forget.rows, TruthRatio().read(subject, data, 0).per_example, strict=True))[
            :4
        ]:
            false = np.mean([of(text, row) for text in row["perturbed_answers"]])
            true = of(row["completion"][0]["content"], row)
            assert share == pytest.approx(math.exp(-true) / (math.exp(-true) + math.exp(-false)), rel=1e-3)

    def test_logit_lens_of_the_last_layer_would_be_the_model(self, case, data):
        """A model whose last layer does nothing says what the lens reads below it."""
        model = copy.deepcopy(case.original)
        with torch.no_grad():
            for weight in (
                model.model.layers[-1].self_attn.o_proj.weight,
                model.model.layers[-1].mlp.down_proj.weight,
            ):
                weight.zero_()
        found = lens(model, data.forget)
        assert found.shape == (1, 32)
        np.testing.assert_allclose(found[0], [alone(model, one) for one in data.forget.answers], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(lens(case.original, data.forget), found, rtol=1e-4, atol=1e-5)

    def test_last_norm_of_other_architectures(self, tiny_gpt2, tiny_llama):
        assert last_norm(tiny_gpt2) is tiny_gpt2.transformer.ln_f
        assert last_norm(tiny_llama) is tiny_llama.model.norm

    def test_quantised_weights(self, case, data):
        """All layers but the head, in groups where they divide."""
        model, before = copy.deepcopy(case.original), case.original.state_dict()
        with torch.no_grad():
            Quantised().disturb(model, 4)
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == {name for name in before if "_proj" in name}
        assert len(list(weights_of(model))) == len(changed)
        wide = torch.nn.Linear(2 * GROUP, 3)
        holder = copy.deepcopy(case.original)
        holder.model.extra = wide
        groups = wide.weight.detach().clone().view(-1, GROUP)
        with torch.no_grad():
            Quantised().disturb(holder, 8)
        step = groups.abs().amax(1, keepdim=True) / 127
        torch.testing.assert_close(holder.model.extra.weight.view(-1, GROUP), (groups / step).round() * step)


class TestMembership:
    def test_auc_is_that_of_scikit_learn(self, case, data, subject):
        members, others = ([alone(case.original, one) for one in part.answers] for part in (data.forget, data.test))
        auc = roc_auc_score([1] * 32 + [0] * 32, [-one for one in members + others])
        assert MembershipByLoss().read(subject, data, 0).value == pytest.approx(auc, abs=1e-6)
        assert auc > 0.9

    def test_gradients_of_members_are_small(self, case, data, subject):
        check, few = MembershipByGradient(), data.forget.select(range(3))
        found = check.scores(subject, few, 0)
        for row, norm in zip(range(3), found, strict=True):
            model = copy.deepcopy(case.original)
            one = few.answers[row]
            model(input_ids=torch.tensor([one.ids]), labels=torch.tensor([one.labels])).loss.backward()
            squares = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
            assert norm == pytest.approx(math.sqrt(squares), rel=1e-3)
        assert check.read(subject, data, 0).value > 0.9

    def test_reference_takes_off_what_is_hard_by_itself(self, data):
        """Losses of 4 models that differ by a constant and by one row."""
        hard, easy = [5.0, 1.0, 3.0], [2.0, 4.0]
        readings = [Reading.mean_of(hard, unseen=easy) for _ in range(4)]
        known = Reading.mean_of([4.0, 0.5, 2.5], unseen=easy)
        found = MembershipByReference().settled(Readings(known, known, tuple(readings)), data)
        assert (found.audited.value, found.original.value) == (1.0, 1.0)
        assert [one.value for one in found.retrained] == [0.5] * 4

    def test_privleak_stands_beside_min_k(self, data):
        readings = Readings(Reading(0.9), Reading(0.95), (Reading(0.5), Reading(0.6), Reading(0.4)))
        found = MembershipByMinK().settled(readings, data)
        assert found.audited.figures["privleak"] == pytest.approx(
            100 * (0.55 - 0.9) / 0.45
        )  # the last one is left out
        assert found.retrained[2].figures["privleak"] == pytest.approx(100 * (0.55 - 0.4) / 0.45)
        assert found.audited.value == 0.9

    def test_forget_quality_is_that_of_tofu(self, data):
        random = np.random.default_rng(0)
        laws = [random.lognormal(shift, 1, 60) for shift in (2, 0, 0, 0)]
        readings = [Reading.mean_of(law) for law in laws]
        found = ForgetQuality().settled(Readings(readings[0], None, tuple(readings[1:])), data)
        pooled = ks_2samp(laws[0], np.concatenate(laws[1:3]))
        assert found.audited.value == pytest.approx(pooled.statistic)
        expected = np.mean([ks_2samp(laws[0], law).pvalue for law in laws[1:3]])
        assert found.audited.figures["forget_quality"] == pytest.approx(expected)
        assert found.audited.value > 0.5 > max(one.value for one in found.retrained)
        assert 0.02 < found.audited.error < 0.15


class TestRelearning:
    def test_shown_and_asked_are_not_one(self, data):
        shown, asked = shown_and_asked(data, 0)
        prompts = [json.dumps(row["prompt"]) for part in (shown, asked) for row in part.rows]
        assert (len(shown), len(asked), len(set(prompts))) == (5, 27, 32)

    def test_every_row_comes_once_an_epoch(self, data):
        batch = drawn(data.retain, 0)
        seen = [
            row["id"] if "id" in row else json.dumps(row["prompt"]) for step in range(4) for row in batch(step).rows
        ]
        assert len(set(seen)) == len(seen) == 32
        assert len(drawn(data.forget.select([0, 1]), 0)(MARKS[-1] - 1)) == 2

    def test_first_step_is_that_of_adamw(self, case, data):
        """Which moves every weight with a gradient by the rate, the first time."""
        from hf_unlearn.audit.language import relearning

        model = copy.deepcopy(case.original)
        rate = RATE * size_of_weights(model)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        steps = relearning.trained(model, drawn(data.retain, 0), rate)
        next(steps)  # MARKS[0] steps
        moved = max(float((value - before[name]).abs().max()) for name, value in model.state_dict().items())
        assert rate < moved < 1.01 * MARKS[0] * rate

    def test_what_was_refused_comes_back_from_retained_rows(self, case, data):
        """And not in a twin that never saw them: 0.5 against 0.1, of 27 rows."""
        subjects = [LanguageSubject(model, "audited", "a") for model in (case.refusing, case.twin)]
        refused, twin = (RelearnRetained().read(one, data, 0) for one in subjects)
        assert refused.figures["curve"][0] < 0.1 < refused.value
        assert refused.figures["steps"] == [0, *MARKS]
        assert refused.value == max(refused.figures["curve"])
        assert refused.value > twin.value + 0.15


class TestPlantedCases:
    def test_the_original_is_not_forgotten(self, case, folder):
        references = [case.reference(1), case.reference(2), case.twin]
        report = audited(case.original, case, folder, references, checks="quick")
        assert not report.failed
        assert report.verdict.word == "not forgotten"
        assert report[report.verdict.decided_by].layer == "output"
        assert all(one.audited == one.original for one in report.results)
        assert {one.name for one in report.results} == {check.name for check in QUICK}

    @pytest.mark.slow
    def test_a_taught_refusal_is_suppressed(self, case, folder):
        report = audited(case.refusing, case, folder, case.retrained)
        assert not report.failed
        assert report.verdict.word == "suppressed", str(report.verdict)
        assert {one.name for one in report.results} == {check.name for check in STANDARD}
        assert report["answer"].audited < 0.1 < 0.8 < report["answer"].original
        assert all(one.status == "within" for one in report.results if one.layer == "output")
        assert report["answer_begun"].status == "beyond"

    @pytest.mark.slow
    def test_one_more_retrained_model_is_no_worse_than_the_others(self, case, folder):
        """With few rows most margins are wide; what is beyond or unclear would be wrong."""
        report = audited(case.twin, case, folder, case.retrained)
        assert report.verdict.word in ("forgotten", "undetermined")
        deciding = [one for one in report.results if one.layer in ("output", "below")]
        assert {one.status for one in deciding} <= {"within", "blind"}
        quick = audited(case.twin, case, folder, case.retrained, checks=[check.name for check in QUICK])
        assert quick.verdict.word == "forgotten", str(quick.verdict)

    def test_without_references(self, case, folder):
        """More than half of the telling words are memory, by whatever way they came; less proves nothing."""
        settings = {"checks": "quick"}
        beside = [
            audited(model, case, folder, **settings).verdict for model in (case.original, case.refusing, case.twin)
        ]
        assert (beside[0].word, beside[2].word) == ("not forgotten", "undetermined")
        assert beside[1].word in ("suppressed", "undetermined")  # 72 % when begun, where 71 % would be too little
        assert (
            "as the original"
            not in (by := audited(case.original, case, folder, original=None, **settings).verdict).why
        )
        assert by.word == "not forgotten"

    @pytest.mark.parametrize(("right", "status"), [(32, "beyond"), (28, "beyond"), (20, "unknown"), (4, "unknown")])
    def test_what_a_stranger_may_say(self, data, right, status):
        readings = Readings(Reading.mean_of([1.0] * right + [0.0] * (32 - right)))
        assert compared(readings, 0.05, 20, never_seen=AnswerBegun().never_seen(data)).status == status
        sets = {name: rows.remove_columns("perturbed_answers") for name, rows in planted().sets.items()}
        bare = language_data(**sets, processing_class=data.tokenizer, size="quick", seed=0)
        assert AnswerBegun().never_seen(bare) is None
