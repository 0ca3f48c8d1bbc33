"""Audits of language models of every kind that loads, end to end, and what they refuse; the models are not trained."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from hf_unlearn.audit.digests import digest_of
from hf_unlearn.audit.language.family import EVERY, QUICK, STANDARD
from hf_unlearn.audit.language.subject import LanguageSubject
from hf_unlearn.audit.run import audit


WORDS = [
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "phone",
    "shoes",
    "order",
    "Paris",
    "Rome",
    "capital",
    "sentence",
]


def texts(count, start):
    """Plain texts, no two alike."""
    pick = [[WORDS[(start + row * step + row // 7) % len(WORDS)] for step in (1, 2, 3, 4)] for row in range(count)]
    return Dataset.from_dict({"text": [f"The {' '.join(words)} {start + row}." for row, words in enumerate(pick)]})


@pytest.fixture
def sets():
    return {"forget": texts(6, 0), "retain": texts(8, 20), "test": texts(4, 40)}


def another(model, seed):
    """Of the same kind, with other weights."""
    model = copy.deepcopy(model)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.std().nan_to_num() * torch.randn_like(parameter))
    return model


def audited(model, sets, tokenizer, references=0, **settings):
    retrained = [another(model, seed) for seed in range(references)]
    return audit(model, retrained=retrained, **sets, processing_class=tokenizer, progress=False, **settings)


class TestModels:
    @pytest.mark.slow
    def test_every_check_of_plain_texts(self, tiny_gpt2, sets, tokenizer):
        report = audited(tiny_gpt2, sets, tokenizer, 3, checks=[check.name for check in EVERY])
        assert report.failed == {}
        assert set(report.skipped) == {"truth_ratio", "forget_quality"}
        assert report.family == "language model"
        assert report.sizes == {"forget": 6, "retain": 8, "test": 4}
        assert report.residual.loss > 1
        assert (report.verdict.word, report.verdict.needs[-1]) == ("undetermined", "more than 6 forget examples")

    def test_models_and_random_state_stay_as_they_were(self, tiny_llama, sets, tokenizer):
        model, before = tiny_llama.train(), torch.get_rng_state()
        model.get_input_embeddings().weight.requires_grad_(False)
        digest = digest_of(model)
        first, second = (audited(model, sets, tokenizer, checks=checks) for checks in ("standard", "quick"))
        assert digest_of(model) == digest
        assert model.training
        assert not model.get_input_embeddings().weight.requires_grad
        assert all(parameter.grad is None for parameter in model.parameters())
        assert torch.equal(torch.get_rng_state(), before)
        assert {one.name for one in second.results} < {one.name for one in first.results}
        assert all(first[one.name].audited == one.audited for one in second.results)

    def test_adapters_are_looked_at_as_they_are_and_merged_for_attacks(self, tiny_llama, sets, tokenizer):
        model = get_peft_model(copy.deepcopy(tiny_llama), LoraConfig(r=2, target_modules="all-linear"))
        torch.nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
        subject = LanguageSubject(model, "audited", "a")
        merged, ids = subject.copy(), torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            torch.testing.assert_close(merged(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(merged(ids).logits, tiny_llama(ids).logits, atol=1e-3)
        assert not hasattr(merged, "peft_config")
        assert all(parameter.requires_grad for parameter in merged.parameters())
        assert audited(model, sets, tokenizer, checks=["answer", "logit_lens", "relearn_few"]).failed == {}

    def test_from_a_folder_with_its_tokenizer(self, tiny_llama, sets, tokenizer, tmp_path):
        for part in (tiny_llama, tokenizer):
            part.save_pretrained(tmp_path / "model")
        report = audit(str(tmp_path / "model"), **sets, checks=["answer", "unseen_loss"], progress=False)
        same = audited(tiny_llama, sets, tokenizer, checks=["answer", "unseen_loss"])
        assert [one.audited for one in report.results] == pytest.approx([one.audited for one in same.results])

    @pytest.mark.slow
    def test_from_a_folder_in_16_bits(self, tiny_llama, sets, tokenizer, tmp_path):
        """Every check reads such weights; answers differ as bfloat16 rounds, to three digits."""
        for part in (tiny_llama, tokenizer):
            part.save_pretrained(tmp_path / "model")
        name, checks = str(tmp_path / "model"), [check.name for check in STANDARD]
        report = audit(name, **sets, checks=checks, dtype=torch.bfloat16, device="cpu", progress=False)
        assert report.failed == {}
        whole = audited(tiny_llama, sets, tokenizer, checks=["unseen_loss"])["unseen_loss"].audited
        assert report["unseen_loss"].audited == pytest.approx(whole, rel=0.01)
        assert report["unseen_loss"].audited != whole


class TestChecks:
    def test_names_are_unique_and_quick_ones_are_standard(self):
        names = [check.name for check in EVERY]
        assert len(set(names)) == len(names)
        assert set(QUICK) < set(STANDARD) < set(EVERY)
        assert all(check.what and check.title and check.margin > 0 for check in EVERY)

    def test_costs_are_told_of_every_check(self, tiny_llama, sets, tokenizer):
        report = audited(tiny_llama, sets, tokenizer, checks=["answer"])
        assert audited(tiny_llama, sets, tokenizer, checks="quick").estimated_seconds > report.estimated_seconds > 0

    def test_without_retained_and_unseen_rows(self, tiny_llama, sets, tokenizer):
        report = audited(tiny_llama, {"forget": sets["forget"]}, tokenizer)
        assert report.skipped["relearn_retained"] == report.skipped["utility_lost"] == "there are no retain rows"
        assert report.skipped["membership_min_k"] == "there are no test rows"
        assert {"answer", "answer_begun", "quantised", "logit_lens"} <= {one.name for one in report.results}

    def test_a_prompt_without_room_is_not_passed(self, tiny_llama, sets, tokenizer):
        tiny_llama.config.max_position_embeddings = 40  # enough for each row, too little for four of them
        report = audited(tiny_llama, sets, tokenizer, checks=["answer", "asked_after_examples"])
        assert "leaves no room for an answer in the model's 40" in report.failed["asked_after_examples"]


class TestRefused:
    def test_lines(self, tiny_llama, tiny_bert, sets, tokenizer):
        wider, broken = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
        wider.resize_token_embeddings(tokenizer.vocab_size + 4)
        with torch.no_grad():
            broken.lm_head.weight[0, 0] = torch.nan
        larger = copy.deepcopy(tokenizer)
        larger.add_tokens(["phone"])
        prompts = get_peft_model(
            copy.deepcopy(tiny_llama), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        )
        assert LanguageSubject(prompts, "audited", "a").copy() is not prompts
        for change, message in (
            ({"original": wider}, "original: knows 304 tokens, the audited model 300"),
            ({"original": tiny_bert}, "original: is a classifier, the audited model a language model"),
            ({"retrained": [tiny_llama]}, r"retrained\[0\]: has the weights of audited"),
            ({"model": broken}, "model: gives outputs that are not finite"),
            ({"processing_class": None}, "processing_class: is missing"),
            ({"processing_class": larger}, "processing_class: gives token 30[0-9], but the models know 300"),
            (
                {"retain": Dataset.from_dict({"text": ["word " * 200]})},
                "retain: a row of [0-9,]+ tokens is longer than the 128",
            ),
            ({"forget": None}, "forget: missing"),
            ({"test": sets["forget"]}, "test: 6 of its"),
            ({"checks": ["forget_accuracy"]}, "checks: 'forget_accuracy' is none of answer"),
            ({"checks": ["truth_ratio"]}, "checks: none can be done"),
        ):
            arguments = {"model": tiny_llama, **sets, "processing_class": tokenizer, "progress": False} | change
            with pytest.raises(ValueError, match=f"^{message}") as error:
                audit(**arguments)
            assert "\n" not in str(error.value)
