"""Logits where they are read: the same, no others, and no more at once than there is room for."""

import copy
from functools import partial

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.func import functional_call
from vocabulary_rows import Rows

from hf_unlearn.training import logits as module
from hf_unlearn.training.answers import as_inputs
from hf_unlearn.training.logits import answered, in_batches, logits_at, only_at, places_of


IDS = [[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15], [16, 17, 18, 19, 20]]
PLACES = [[6, 2], [1], []]


@pytest.fixture(params=["llama", "gpt2", "lora", "lora of the head", "prompt tuning"])
def model(request, tiny_llama, tiny_gpt2):
    base = tiny_gpt2 if request.param == "gpt2" else tiny_llama
    if request.param in ("llama", "gpt2"):
        return base
    settings = {"r": 2, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    config = {
        "lora": lambda: LoraConfig(target_modules=["q_proj"], **settings),
        "lora of the head": lambda: LoraConfig(target_modules=["lm_head"], **settings),
        "prompt tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }[request.param]
    return get_peft_model(base, config()).eval()


def expected(model, inputs, places):
    with torch.no_grad():
        whole = model(**inputs, use_cache=False).logits[:, -inputs["input_ids"].shape[1] :]
    return torch.stack([whole[row, place] for row, some in enumerate(places) for place in sorted(some)])


class TestLogitsAt:
    def test_are_those_of_the_whole(self, model):
        inputs = as_inputs(IDS, torch.device("cpu"))
        places = places_of(PLACES, 8, torch.device("cpu"))
        with torch.no_grad(), Rows(model.config.vocab_size) as rows:
            found = logits_at(model, inputs, places)
        torch.testing.assert_close(found, expected(model, inputs, PLACES), rtol=1e-5, atol=1e-6)
        assert rows.most == 3  # of 24
        with torch.no_grad(), Rows(model.config.vocab_size) as rows:  # and nothing is left behind
            whole = model(**inputs).logits
        assert whole.shape[1] >= 8
        assert rows.most >= 24

    def test_gradients_are_those_of_the_whole(self, tiny_llama):
        inputs, places = as_inputs(IDS, torch.device("cpu")), places_of(PLACES, 8, torch.device("cpu"))
        weights = torch.randn(3, tiny_llama.config.vocab_size, generator=torch.Generator().manual_seed(0))

        def gradients(logits):
            tiny_llama.zero_grad()
            (logits.log_softmax(-1) * weights).sum().backward()
            return [parameter.grad.clone() for parameter in tiny_llama.parameters()]

        whole = tiny_llama(**inputs, use_cache=False).logits[places]
        some = gradients(logits_at(tiny_llama, inputs, places))
        for one, other in zip(some, gradients(whole), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    def test_of_none_there_is_a_gradient_of_zero(self, tiny_llama):
        """A process without predictions has to give its share to the others nevertheless."""
        nothing = torch.zeros(3, 8, dtype=torch.bool)
        logits = logits_at(tiny_llama, as_inputs(IDS, torch.device("cpu")), nothing)
        assert logits.shape == (0, tiny_llama.config.vocab_size)
        logits.sum().backward()
        assert all(not parameter.grad.any() for parameter in tiny_llama.parameters())

    def test_through_a_wrapper(self, tiny_llama):
        """A frozen state of the model, which is no module and has no head."""
        inputs, places = as_inputs(IDS, torch.device("cpu")), places_of(PLACES, 8, torch.device("cpu"))
        state = {name: 2 * value for name, value in tiny_llama.state_dict().items()}
        other = copy.deepcopy(tiny_llama)
        other.load_state_dict(state)

        def forward(**kwargs):
            return functional_call(tiny_llama, state, (), kwargs)

        with Rows(tiny_llama.config.vocab_size) as rows, torch.no_grad():
            found = logits_at(forward, inputs, places, model=tiny_llama)
        assert rows.most == 3
        torch.testing.assert_close(found, expected(other, inputs, PLACES), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("how", [partial(torch.compile, backend="eager"), lambda model: model.__call__])
    def test_without_a_head_that_can_be_watched(self, tiny_llama, how):
        inputs, places = as_inputs(IDS, torch.device("cpu")), places_of(PLACES, 8, torch.device("cpu"))
        wanted, forward = expected(tiny_llama, inputs, PLACES), how(tiny_llama)
        with torch.no_grad(), Rows(tiny_llama.config.vocab_size) as rows:
            torch.testing.assert_close(logits_at(forward, inputs, places), wanted, rtol=1e-5, atol=1e-6)
        assert rows.most == 24  # a hook would be compiled with the rest, and stay
        with torch.no_grad():
            assert forward(**inputs, use_cache=False).logits.shape[:2] == (3, 8)

    def test_a_failure_leaves_the_head_as_it_was(self, tiny_llama):
        with pytest.raises(RuntimeError, match="no"), only_at(tiny_llama, torch.ones(1, 1, dtype=torch.bool)):
            raise RuntimeError("no")
        assert not tiny_llama.lm_head._forward_pre_hooks


def test_what_counts_is_said_one_token_before():
    labels = torch.tensor([[7, -100, 8, 9], [-100, -100, -100, 5]])
    assert answered(labels).tolist() == [[False, True, True, False], [False, False, True, False]]


@pytest.mark.parametrize(
    ("room", "cut"),
    [(100, [[4, 2], [0, 1], [3]]), (5, [[4, 2], [0], [1, 3]]), (1, [[4], [2], [0], [1], [3]])],
)
def test_batches_have_room(monkeypatch, tiny_llama, room, cut):
    monkeypatch.setattr(module, "AT_ONCE", room * tiny_llama.config.vocab_size)
    counts = [4, 3, 2, 1, 3]
    assert in_batches([4, 2, 0, 1, 3], counts, 2, tiny_llama) == cut
    assert in_batches([4, 2, 0, 1, 3], counts, 2, lambda: None) == [[4, 2], [0, 1], [3]]  # no vocabulary is known
