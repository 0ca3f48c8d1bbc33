"""What is published of an adapted model: one set of weights, as if there had never been an adapter."""

import json

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_unlearn.hub.adapters import check_mergeable, merged_state_dict, save_merged
from hf_unlearn.hub.allowed import left_behind
from hf_unlearn.hub.publish import check_publishable


TOKENS = {"input_ids": torch.arange(12).view(2, 6)}
IMAGES = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).sin().view(2, 3, 8, 8)}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(tied=False):
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=32, tie_word_embeddings=tied, **SIZES))


def tied_llama():
    return llama(tied=True)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def vit():
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=5, **SIZES))


def resnet():
    return ResNetForImageClassification(
        ResNetConfig(num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5)
    )


CASES = {
    "llama": (llama, {"target_modules": ["q_proj", "v_proj"]}),
    "llama, tied": (tied_llama, {"target_modules": ["q_proj", "v_proj"]}),
    "llama, embeddings": (llama, {"target_modules": ["embed_tokens", "lm_head"]}),
    "llama, tied and saved whole": (
        tied_llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "llama, tied and adapted": (tied_llama, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "gpt2, transposed": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "vit, head saved whole": (
        vit,
        {"target_modules": r".*attention.*(query|value|q_proj|v_proj)", "modules_to_save": ["classifier"]},
    ),
    "vit, biases": (vit, {"target_modules": "all-linear", "bias": "all"}),
    "resnet": (resnet, {"target_modules": ["convolution"]}),
}


def shake(model):
    """Gives every trainable tensor a value that matters: LoRA starts at zero, which no test would notice."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model.eval()


def adapted(build, lora):
    torch.manual_seed(0)
    return shake(get_peft_model(build(), LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, **lora)))


@torch.no_grad()
def logits(model):
    return model(**(IMAGES if model.config.model_type in ("vit", "resnet") else TOKENS)).logits


def assert_close(actual, expected):
    """Each weight is W + s·BA: a sum of at most five terms of size 1, which another memory may round otherwise."""
    torch.testing.assert_close(dict(actual), dict(expected), rtol=1e-6, atol=1e-6)


def assert_same_logits(actual, expected):
    """(W + s·BA) x or W x + s·B(A x): some ten layers of sums of at most 32 terms; another adapter is 1e-2 away."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def assert_says_the_same(build, state, model):
    plain = build()
    plain.load_state_dict(state)
    assert_same_logits(logits(plain.eval()), logits(model))
    return plain


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*", "ignore:.*tied.*", "ignore:Careful, disabling adapter")
class TestSaveMerged:
    @pytest.mark.parametrize("case", CASES)
    def test_stock_transformers_loads_the_adapted_model(self, case, tmp_path):
        build, lora = CASES[case]
        model = adapted(build, lora)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        wanted = logits(model)
        with model.disable_adapter():
            assert (wanted - logits(model)).abs().max() > 1e-2  # else anything would do
        save_merged(model, tmp_path)

        auto = AutoModelForCausalLM if build in (llama, tied_llama, gpt2) else AutoModelForImageClassification
        loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            assert ("lm_head.weight" in file.keys()) == (build is llama)  # noqa: SIM118
        assert_same_logits(logits(loaded.eval()), wanted)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert_same_logits(logits(model), wanted)
        # peft 0.21 adds the delta twice to a weight that two adapted layers share.
        if lora["target_modules"] != ["embed_tokens"]:
            _, state = merged_state_dict(model)
            assert_close(state, model.merge_and_unload().state_dict())  # PEFT's own merge, in place

    def test_nothing_of_the_adapter_or_the_original_is_on_disk(self, tmp_path):
        model = adapted(*CASES["vit, head saved whole"])
        model.config.name_or_path = "/elsewhere/secret"
        save_merged(model, tmp_path)
        assert check_publishable(tmp_path) == ["config.json", "model.safetensors"]
        assert left_behind(tmp_path) == {}
        vit().save_pretrained(tmp_path / "plain")  # writes other names than those of its state dict
        with (
            safe_open(tmp_path / "model.safetensors", "pt") as file,
            safe_open(tmp_path / "plain/model.safetensors", "pt") as plain,
        ):
            assert set(file.keys()) == set(plain.keys())
            head = file.get_tensor("classifier.weight")
        assert not torch.equal(head, model.base_model.model.classifier.original_module.weight)
        assert "secret" not in (tmp_path / "config.json").read_text()
        assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["ViTForImageClassification"]


class TestMergedStateDict:
    def test_shares_what_is_not_adapted(self):
        model = adapted(llama, {"target_modules": ["q_proj"]})
        base, state = merged_state_dict(model)
        assert base is model.get_base_model()
        assert state["lm_head.weight"].data_ptr() == base.lm_head.weight.data_ptr()
        assert not any(tensor.requires_grad for tensor in state.values())

    def test_several_active_adapters_add_up(self):
        model = adapted(llama, {"target_modules": ["q_proj"]})
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        model.base_model.set_adapter(["default", "second"])
        assert_says_the_same(llama, merged_state_dict(shake(model))[1], model)

    def test_inactive_adapters_are_left_out(self):
        model = adapted(vit, {"target_modules": "all-linear", "modules_to_save": ["classifier"]})
        only = merged_state_dict(model)[1]
        model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", modules_to_save=["classifier"]))
        model.set_adapter("other")
        other = merged_state_dict(shake(model))[1]
        assert (other["classifier.weight"] - only["classifier.weight"]).abs().max() > 0.1
        model.set_adapter("default")
        assert_close(merged_state_dict(model)[1], only)

    def test_an_active_adapter_without_a_head_uses_the_original_one(self):
        model = adapted(vit, {"target_modules": "all-linear", "modules_to_save": ["classifier"]})
        model.add_adapter("other", LoraConfig(r=2, target_modules=["fc1"]))
        model.set_adapter("other")
        plain = assert_says_the_same(vit, merged_state_dict(shake(model))[1], model)
        assert torch.equal(plain.classifier.weight, model.base_model.model.classifier.original_module.weight)

    def test_a_merged_adapter_is_not_added_twice(self):
        model = adapted(llama, {"target_modules": ["q_proj"]})
        wanted = merged_state_dict(model)[1]
        model.merge_adapter()
        assert_close(merged_state_dict(model)[1], wanted)

    def test_keeps_the_dtype_of_the_base(self):
        torch.manual_seed(0)
        base = llama().to(torch.bfloat16)
        model = shake(get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])))
        state = merged_state_dict(model)[1]
        layer = base.model.layers[0].self_attn.q_proj
        assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
        exact = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
        # One rounding, and one of the delta.
        folded = state["model.layers.0.self_attn.q_proj.weight"].double()
        torch.testing.assert_close(folded, exact, rtol=2**-7, atol=2**-9)

    def test_names_of_the_model_itself_stay(self):
        class Odd(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.base_layer = torch.nn.Linear(3, 3)
                self.lora_A = torch.nn.Linear(3, 3)
                self.original_module = torch.nn.Linear(3, 3)

        model = shake(get_peft_model(Odd(), LoraConfig(r=2, target_modules=["base_layer"])))
        assert merged_state_dict(model)[1].keys() == Odd().state_dict().keys()

    @pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer")
    def test_refuses_grouped_convolutions(self):
        model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=2))
        with pytest.raises(ValueError, match="a grouped convolution at '0'"):
            merged_state_dict(get_peft_model(model, LoraConfig(r=2, target_modules=["0"])))

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize(
        ("build", "config", "what"),
        [
            (llama, LoraConfig(target_modules=["q_proj"], use_dora=True), "Dora"),
            (llama, LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1]), "TrainableTokens"),
            (vit, LoraConfig(target_modules="all-linear", lora_bias=True), "lora_bias"),
            (llama, IA3Config(target_modules=["v_proj"], feedforward_modules=[]), "IA3"),
            (llama, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2), "PROMPT_TUNING"),
            (tied_llama, LoraConfig(target_modules=["embed_tokens"]), "ties"),
            (tied_llama, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "ties"),
        ],
        ids=["dora", "tokens", "bias", "ia3", "prompt", "tied lora", "tied module"],
    )
    def test_refuses_what_cannot_be_folded(self, build, config, what, tmp_path):
        model = get_peft_model(build(), config)
        with pytest.raises(ValueError) as early:  # before a step is taken
            check_mergeable(model)
        with pytest.raises(ValueError) as error:
            save_merged(shake(model), tmp_path / "out")
        message = str(error.value)
        assert str(early.value) == message
        assert what in message
        assert "merge_adapter=False" in message
        assert "\n" not in message
        assert not (tmp_path / "out").exists()

    def test_refuses_a_layer_it_does_not_know(self):
        """Layers for quantized bases come as classes of their own, with the same names for their tensors."""
        from peft.tuners.lora import Linear

        class Linear4bit(Linear):
            pass

        model = adapted(llama, {"target_modules": ["q_proj"]})
        model.base_model.model.model.layers[1].self_attn.q_proj.__class__ = Linear4bit
        with pytest.raises(ValueError, match="Linear4bit at 'model.layers.1.self_attn.q_proj'"):
            merged_state_dict(model)

    def test_refuses_a_model_without_adapter(self):
        with pytest.raises(ValueError, match="must be a PeftModel"):
            merged_state_dict(llama())
