"""What models write by themselves, against token after token in plain torch."""

import pytest
import torch
from chat_data import CHATS, greedy, made_parrot, said, tokens_of, with_template

from hf_unlearn.unlearning.language.own_samples import own_texts
from hf_unlearn.unlearning.language.written import written


@pytest.fixture(scope="module")
def tokenizer(tokenizer):
    return with_template(tokenizer)


class TestWritten:
    PROMPTS = ["The fox", "Paris is", "My order never arrived and", "shoes"]

    @pytest.fixture
    def prompts(self, tokenizer):
        return [tokenizer(text)["input_ids"] for text in self.PROMPTS]

    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    @pytest.mark.parametrize("batch_size", [1, 3, 128])
    def test_the_likeliest_whatever_the_generation_config(self, name, batch_size, prompts, tokenizer, request):
        model = request.getfixturevalue(f"tiny_{name}")
        for key, value in {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "num_beams": 2, "min_p": 0.5}.items():
            setattr(model.generation_config, key, value)
        texts = written(model, tokenizer, prompts, max_new_tokens=15, temperature=0, batch_size=batch_size)
        plain = [greedy(model, prompt, 15, {tokenizer.eos_token_id}) for prompt in prompts]
        assert texts == plain
        assert any(len(set(text)) < len(text) for text in plain)  # which a penalty would have undone
        stop = plain[0][4]
        texts = written(
            model, tokenizer, prompts, max_new_tokens=15, temperature=0, batch_size=batch_size, stop=[stop]
        )
        assert texts == [greedy(model, prompt, 15, {stop, tokenizer.eos_token_id}) for prompt in prompts]

    def test_draws_from_the_models_own_distribution(self, tiny_llama, tokenizer):
        """4,000 draws of one token: shares within five standard deviations of what the model says."""
        for key, value in {"top_k": 1, "temperature": 0.1, "top_p": 0.1}.items():
            setattr(tiny_llama.generation_config, key, value)
        prompt = tokenizer("The fox")["input_ids"]
        tiny_llama.train()
        state = torch.get_rng_state()
        texts = written(tiny_llama, tokenizer, [prompt] * 4000, max_new_tokens=1, batch_size=4000)
        assert torch.equal(state, torch.get_rng_state())
        assert tiny_llama.training
        p = said(tiny_llama.eval(), prompt)[-1].exp()
        counts = torch.tensor([token for (token,) in texts]).bincount(minlength=len(p))
        assert ((counts - 4000 * p).abs() <= 5 * (4000 * p * (1 - p)).sqrt() + 1).all()
        assert written(tiny_llama, tokenizer, [prompt] * 8, seed=1) == written(
            tiny_llama, tokenizer, [prompt] * 8, seed=1
        )
        assert written(tiny_llama, tokenizer, [prompt] * 8, seed=1) != written(
            tiny_llama, tokenizer, [prompt] * 8, seed=2
        )

    def test_no_further_than_the_model_has_positions(self, tiny_gpt2, tokenizer):
        prompts = [[5] * length for length in (120, 127, 128, 130)]
        texts = written(tiny_gpt2, tokenizer, prompts, max_new_tokens=50, temperature=0, batch_size=1)
        assert [len(text) for text in texts] == [8, 1, 0, 0]

    def test_own_texts_are_turns_of_the_template(self, tiny_llama, tokenizer):
        start = tokenizer("user:", add_special_tokens=False)["input_ids"]
        texts = own_texts(tiny_llama, tokenizer, 12, chat=True, max_new_tokens=10)
        assert 0 < len(texts) <= 12
        for ids, begin, answer in texts:
            assert (ids[:begin], begin) == (start, len(start))
            assert tokenizer.decode(ids[:answer]).endswith("\nassistant:\n")
        assert texts == own_texts(tiny_llama, tokenizer, 12, chat=True, max_new_tokens=10)
        asked = ["Who?", "Where is Rome?"]
        for ids, begin, answer in own_texts(tiny_llama, tokenizer, 5, chat=True, prompts=asked, max_new_tokens=10):
            assert tokenizer.decode(ids[:begin]) in [f"user: {question}\nassistant:\n" for question in asked]
            assert begin == answer < len(ids)
        for ids, begin, answer in own_texts(tiny_llama, tokenizer, 12, chat=False, max_new_tokens=10):
            assert (ids[0], begin, answer) == (tokenizer.bos_token_id, 1, 1)
            assert 1 < len(ids) <= 11

    def test_a_question_ends_where_the_template_ends_it(self, tokenizer):
        """Here by no special token: a model of this template goes on and answers."""
        whole = tokens_of(tokenizer, CHATS[:1])[0][0]
        texts = [ids for ids, _, _ in own_texts(made_parrot(tokenizer), tokenizer, 20, chat=True, max_new_tokens=60)]
        assert sum(ids == whole for ids in texts) > 10
        assert not [ids for ids in texts if tokenizer.decode(ids).count("assistant:") > 1]
