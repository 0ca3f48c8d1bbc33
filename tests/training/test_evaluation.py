"""The figures of a set of rows, against loops over rows and tokens in double precision."""

import copy
import math
import zlib

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import hmean, ks_2samp

from hf_unlearn import LanguageEvaluation, LanguageScores
from hf_unlearn.examples.facts import facts_data
from hf_unlearn.examples.opinions import texts_of, train_tokenizer
from hf_unlearn.metrics import language
from hf_unlearn.training.evaluation import compare


K = 0.4


@pytest.fixture(scope="module")
def data():
    return facts_data(10, share=0.2, held_out=2, general=12)


@pytest.fixture(scope="module")
def tokenizer(data):
    return train_tokenizer(texts_of(data["train"]), 400)


@pytest.fixture(scope="module")
def model(tokenizer):
    """It has seen one answer a few times: of the others some tokens are right."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, initializer_range=0.2, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    text = "<s><|user|>Who?<|assistant|>Anna was born in 1922.</s>"
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(8):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


def log_probabilities(model, tokenizer, question, answer):
    """Of one answer, without batches: `[tokens, vocabulary]`, and its tokens with the end of the turn."""
    before = tokenizer(f"<s><|user|>{question}<|assistant|>", add_special_tokens=False)["input_ids"]
    after = tokenizer(f"{answer}</s>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([before + after])).logits[0].double()
    return logits[len(before) - 1 : -1].log_softmax(-1), after


def mean_nll(log_p, tokens):
    return -sum(float(row[token]) for row, token in zip(log_p, tokens, strict=True)) / len(tokens)


def expected_of(model, tokenizer, row, question="question"):
    log_p, tokens = log_probabilities(model, tokenizer, row[question], row["answer"])
    own = [float(p[token]) for p, token in zip(log_p, tokens, strict=True)][:-1]
    guesses = log_p.argmax(-1).tolist()[:-1]
    number = max(1, int(K * len(own)))
    normed = []
    for p, value in zip(log_p, own, strict=False):
        mean = float((p.exp() * p).sum())
        normed.append((value - mean) / math.sqrt(float((p.exp() * (p - mean) ** 2).sum())))
    begins = next((k for k in range(len(own)) if guesses[k:] == tokens[k:-1]), len(own))
    nll = mean_nll(log_p, tokens)
    return {
        "nll": nll,
        "exact_memorization": sum(g == t for g, t in zip(guesses, tokens, strict=False)) / len(own),
        "extraction_strength": 1 - begins / len(own),
        "min_k": -sum(sorted(own)[:number]) / number,
        "min_k_plus_plus": -sum(sorted(normed)[:number]) / number,
        "zlib": nll / len(zlib.compress(row["answer"].encode())),
        "true_nll": mean_nll(*log_probabilities(model, tokenizer, row[question], row["paraphrased_answer"])),
        "false_nll": [
            mean_nll(*log_probabilities(model, tokenizer, row[question], text)) for text in row["perturbed_answers"]
        ],
    }


def check(scores, expected, rel=1e-4):
    for name in expected[0]:
        np.testing.assert_allclose(
            getattr(scores, name), [row[name] for row in expected], rtol=rel, atol=rel, err_msg=name
        )


class TestScores:
    @pytest.mark.parametrize("batch_size", [1, 5, 64])
    def test_every_figure_of_every_row(self, batch_size, model, tokenizer, data):
        rows = data["forget"]
        scores = LanguageEvaluation(rows, tokenizer, batch_size=batch_size, max_new_tokens=4)(model)
        expected = [expected_of(model, tokenizer, row) for row in rows]
        check(scores, expected)
        assert len({row["exact_memorization"] for row in expected}) > 2
        np.testing.assert_allclose(scores.probability, np.exp(-scores.nll))
        false = np.exp(-scores.false_nll.mean(1))
        np.testing.assert_allclose(scores.truth_ratio, false / (np.exp(-scores.true_nll) + 1e-10))
        np.testing.assert_allclose(scores.rouge_l, language.rouge_l_recall(scores.answers, rows["answer"]))
        for row, answer in zip(rows, scores.answers, strict=True):
            ids = tokenizer(f"<s><|user|>{row['question']}<|assistant|>", add_special_tokens=False)["input_ids"]
            start = len(ids)
            for _ in range(4):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            written = ids[start:]
            end = written.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in written else 4
            assert answer == tokenizer.decode(written[:end], skip_special_tokens=True)
        summary = scores.summary()
        assert summary["probability"] == pytest.approx(np.exp(-scores.nll).mean())
        assert summary["truth_ratio"] == pytest.approx((1 / (1 + scores.truth_ratio)).mean())
        assert summary["paraphrased_probability"] == pytest.approx(np.exp(-scores.true_nll).mean())
        assert set(summary) == {
            "loss", "probability", "rouge_l", "exact_memorization", "extraction_strength", "paraphrased_probability", "truth_ratio",
        }  # fmt: skip

    def test_paraphrased_questions(self, model, tokenizer, data):
        rows = data["forget"].select(range(4))
        scores = LanguageEvaluation(rows, tokenizer, paraphrased=True, max_new_tokens=0)(model)
        check(scores, [expected_of(model, tokenizer, row, "paraphrased_question") for row in rows])
        assert scores.answers is scores.rouge_l is None

    def test_the_form_of_the_rows_does_not_matter(self, model, tokenizer, data):
        rows = data["forget"].select(range(6))
        as_they_are = LanguageEvaluation(rows, tokenizer)(model)
        kept = ["paraphrased_answer", "perturbed_answers"]
        messages = Dataset.from_list(
            [{"messages": row["prompt"] + row["completion"]} | {name: row[name] for name in kept} for row in rows]
        )
        plain = Dataset.from_list(
            [
                {"prompt": f"<s><|user|>{row['question']}<|assistant|>", "completion": row["answer"], "perturbed_answer": row[kept[1]]}
                | {kept[0]: row[kept[0]]}
                for row in rows
            ]
        )  # fmt: skip
        for others in (messages, plain):
            scores = LanguageEvaluation(others, tokenizer)(model)
            for name in ("nll", "true_nll", "false_nll", "rouge_l"):
                np.testing.assert_allclose(getattr(scores, name), getattr(as_they_are, name), rtol=1e-5, err_msg=name)
        texts = Dataset.from_list(
            [{"text": row["answer"], "perturbed_answers": row["perturbed_answers"]} for row in rows]
        )
        scores = LanguageEvaluation(texts, tokenizer)(model)
        assert scores.answers is scores.truth_ratio is None  # nothing is asked
        ids = torch.tensor([tokenizer(rows[0]["answer"] + "</s>")["input_ids"]])
        assert scores.nll[0] == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)

    def test_options_without_another_wording(self, model, tokenizer, data):
        """TOFU's real authors and world facts: the share among the options, and the answer itself in the truth ratio."""
        rows = data["forget"].select(range(4)).remove_columns("paraphrased_answer")
        scores = LanguageEvaluation(rows, tokenizer, max_new_tokens=0)(model)
        true, false = np.exp(-scores.nll), np.exp(-scores.false_nll)
        np.testing.assert_allclose(scores.probability, true / (true + false.sum(1) + 1e-10))
        np.testing.assert_allclose(scores.truth_ratio, np.exp(-scores.false_nll.mean(1)) / (true + 1e-10))

    def test_few_logits_at_a_time(self, model, tokenizer, data, monkeypatch):
        evaluation = LanguageEvaluation(data["forget"], tokenizer, max_new_tokens=0)
        whole = evaluation(model)
        monkeypatch.setattr(language, "AT_ONCE", 30 * len(tokenizer))
        for name in ("nll", "exact_memorization", "extraction_strength", "min_k", "min_k_plus_plus", "false_nll"):
            np.testing.assert_allclose(getattr(evaluation(model), name), getattr(whole, name), rtol=1e-5, err_msg=name)


class TestModels:
    def test_looking_leaves_no_trace(self, model, tokenizer, data):
        model = copy.deepcopy(model)
        model.config.attention_dropout = 0.5  # would change every figure in training mode
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        evaluation = LanguageEvaluation(data["forget"], tokenizer, max_new_tokens=3)
        expected = evaluation(model.eval())
        model.train()
        model.model.norm.eval()
        state, flags = torch.get_rng_state(), [part.training for part in model.modules()]
        scores = evaluation(model)
        assert [part.training for part in model.modules()] == flags
        assert torch.equal(torch.get_rng_state(), state)
        assert all(parameter.grad is None for parameter in model.parameters())
        np.testing.assert_array_equal(scores.nll, expected.nll)
        assert scores.answers == expected.answers

    def test_sixteen_bits(self, model, tokenizer, data):
        """Logits are rounded, to 8 bits; what is made of them is not."""
        evaluation = LanguageEvaluation(data["forget"], tokenizer, max_new_tokens=0)
        half = copy.deepcopy(model).to(torch.bfloat16)
        scores = evaluation(half)
        check(scores, [expected_of(half, tokenizer, row) for row in data["forget"]], rel=0.02)
        assert scores.nll.dtype == np.float64

    def test_adapters_virtual_tokens_and_functions(self, model, tokenizer, data):
        from peft import LoraConfig, PromptTuningConfig, get_peft_model

        rows = data["forget"].select(range(3))
        evaluation = LanguageEvaluation(rows, tokenizer, max_new_tokens=2)
        plain = evaluation(model)
        lora = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM"))  # begins as nothing
        np.testing.assert_allclose(evaluation(lora).nll, plain.nll, rtol=1e-5)
        assert evaluation(lora).answers == plain.answers
        tuned = get_peft_model(
            copy.deepcopy(model), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        ).eval()
        scores = evaluation(tuned)
        for row, nll in zip(rows, scores.nll, strict=True):
            ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_tensors="pt")["input_ids"]
            count = len(tokenizer(row["answer"] + "</s>")["input_ids"])
            log_p = (
                tuned(input_ids=ids).logits[0, -count - 1 : -1].log_softmax(-1)
            )  # those of virtual tokens come first
            assert nll == pytest.approx(mean_nll(log_p, ids[0, -count:].tolist()), rel=1e-4)
        assert len(scores.answers) == 3
        function = evaluation(lambda **inputs: model(**inputs))
        np.testing.assert_array_equal(function.nll, plain.nll)
        assert function.answers is function.rouge_l is None


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "settings", "match"),
        [
            (lambda rows: rows.select([]), {}, "rows: is empty"),
            (lambda rows: rows.to_list(), {}, "rows: list is not a datasets.Dataset"),
            (lambda rows: rows.remove_columns("paraphrased_question"), {"paraphrased": True}, "have no column 'paraphrased_question'"),
            (lambda rows: rows.select_columns(["person"]), {}, "rows: has columns person, none with texts"),
            (lambda rows: rows.map(lambda row: {"paraphrased_answer": None}), {}, "row 0 has None in column 'paraphrased_answer'"),
            (
                lambda rows: rows.map(lambda row, i: {"perturbed_answers": row["perturbed_answers"][i:]}, with_indices=True),
                {},
                "'perturbed_answers' has more answers in one row than in another",
            ),
            (lambda rows: rows.map(lambda row: {"perturbed_answers": [None, "a"]}), {}, "row 0 has None in column 'perturbed_answers'"),
            (lambda rows: rows, {"k": 0}, "k=0: must be in"),
            (lambda rows: rows, {"batch_size": 0}, "batch_size=0: must be ≥ 1"),
            (lambda rows: rows, {"max_length": 5}, "row 0 has no token that counts; .*raise max_length=5"),
        ],
    )  # fmt: skip
    def test_is_refused(self, change, settings, match, tokenizer, data):
        with pytest.raises(ValueError, match=match):
            LanguageEvaluation(change(data["forget"].select(range(3))), tokenizer, **settings)


def made_up(seed, rows=12, **others):
    rng = np.random.default_rng(seed)
    names = ("nll", "exact_memorization", "extraction_strength", "min_k", "min_k_plus_plus", "zlib")
    found = {name: rng.random(rows) for name in names} | {
        "true_nll": rng.random(rows),
        "false_nll": rng.random((rows, 3)),
    }
    return LanguageScores(**found | {"rouge_l": rng.random(rows)} | others)


class TestCompare:
    def test_every_figure(self):
        forget, heldout, retrained, retrained_heldout, kept = map(made_up, range(5))
        options = made_up(5, true_nll=None)
        figures = compare(
            forget, heldout=heldout, kept=[kept, options], retrained=retrained, retrained_heldout=retrained_heldout
        )
        assert figures.pop("forget_quality") == pytest.approx(
            ks_2samp(forget.truth_ratio, retrained.truth_ratio).pvalue
        )

        def auc(members, others):
            return np.mean([(m < o) + (m == o) / 2 for m in members for o in others])

        for attack, name in (("loss", "nll"), ("zlib",) * 2, ("min_k",) * 2, ("min_k_plus_plus",) * 2):
            expected = auc(getattr(forget, name), getattr(heldout, name))
            assert figures.pop(f"auc_{attack}") == pytest.approx(expected)
        shifted = auc(forget.nll - retrained.nll, heldout.nll - retrained_heldout.nll)
        assert figures.pop("auc_reference") == pytest.approx(shifted)
        fails = [1 - auc(f.min_k, h.min_k) for f, h in ((forget, heldout), (retrained, retrained_heldout))]
        assert figures.pop("privleak") == pytest.approx(100 * (fails[0] - fails[1]) / fails[1])
        among = np.exp(-options.nll) / (np.exp(-options.nll) + np.exp(-options.false_nll).sum(1))
        parts = [np.exp(-kept.nll).mean(), kept.rouge_l.mean(), np.maximum(0, 1 - kept.truth_ratio).mean()]
        parts += [among.mean(), options.rouge_l.mean(), np.maximum(0, 1 - options.truth_ratio).mean()]
        assert figures.pop("model_utility") == pytest.approx(hmean(parts))
        assert figures == {}

    def test_only_what_can_be_told(self):
        forget = made_up(0, true_nll=None, false_nll=None, rouge_l=None)
        assert compare(forget, retrained=made_up(1)) == {}
        assert compare(forget, kept=[forget]) == {"model_utility": pytest.approx(np.exp(-forget.nll).mean())}
        assert set(compare(forget, heldout=made_up(1))) == {"auc_loss", "auc_zlib", "auc_min_k", "auc_min_k_plus_plus"}
