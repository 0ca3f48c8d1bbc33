"""What models write by themselves, against token after token in plain torch."""

import pytest
import torch
from chat_data import greedy, said

from hf_unlearn.training.answers import greedy_answers, written


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
        said = greedy_answers(model, tokenizer, prompts, max_new_tokens=15, batch_size=batch_size)
        assert said == tokenizer.batch_decode(plain, skip_special_tokens=True)
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
