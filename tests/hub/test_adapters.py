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

from hf_unlearn.hub.adapters import merged_state_dict, save_merged
from hf_unlearn.hub.allowed import left_behind
from hf_unlearn.hub.publish import check_publishable


TOKENS = {"input_ids": torch.arange(12).view(2, 6)}


def llama(tied=False):
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def vit():
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_labels=5,
    )
    return ViTForImageClassification(config)


def resnet():
    return ResNetForImageClassification(
        ResNetConfig(num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5)
    )


def images():
    return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).sin().view(2, 3, 8, 8)}


CASES = {
    "llama": (llama, {"target_modules": ["q_proj", "v_proj"]}, AutoModelForCausalLM, TOKENS),
    "llama, tied": (lambda: llama(tied=True), {"target_modules": ["q_proj", "v_proj"]}, AutoModelForCausalLM, TOKENS),
    "llama, embeddings": (llama, {"target_modules": ["embed_tokens", "lm_head"]}, AutoModelForCausalLM, TOKENS),
    "llama, tied and saved whole": (
        lambda: llama(tied=True),
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        AutoModelForCausalLM,
        TOKENS,
    ),
    "llama, tied and adapted": (
        lambda: llama(tied=True),
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        AutoModelForCausalLM,
        TOKENS,
    ),
    "gpt2, transposed": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}, AutoModelForCausalLM, TOKENS),
    "vit, head saved whole": (
        vit,
        {"target_modules": r".*attention.*(query|value|q_proj|v_proj)", "modules_to_save": ["classifier"]},
        AutoModelForImageClassification,
        images(),
    ),
    "vit, biases": (vit, {"target_modules": "all-linear", "bias": "all"}, AutoModelForImageClassification, images()),
    "resnet": (resnet, {"target_modules": ["convolution"]}, AutoModelForImageClassification, images()),
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
def logits(model, inputs):
    return model(**inputs).logits


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*", "ignore:.*tied.*")
class TestSaveMerged:
    @pytest.mark.parametrize("case", CASES)
    def test_stock_transformers_loads_the_adapted_model(self, case, tmp_path):
        build, lora, auto, inputs = CASES[case]
        model = adapted(build, lora)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        wanted = logits(model, inputs)
        with model.disable_adapter():
            original = logits(model, inputs)
        assert (wanted - original).abs().max() > 1e-2  # else anything would do

        save_merged(model, tmp_path)

        loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            assert ("lm_head.weight" in file.keys()) == (case in ("llama", "llama, embeddings"))  # noqa: SIM118
        torch.testing.assert_close(logits(loaded.eval(), inputs), wanted, rtol=1e-5, atol=1e-5)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert torch.equal(logits(model, inputs), wanted)
        if lora.get("target_modules") == ["embed_tokens"]:
            return  # peft 0.21 adds the delta twice to a weight that two adapted layers share
        # bit for bit what PEFT's own merge gives, which changes the model
        _, state = merged_state_dict(model)
        merged = model.merge_and_unload().state_dict()
        assert state.keys() == merged.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in merged.items())

    def test_nothing_of_the_adapter_or_the_original_is_on_disk(self, tmp_path):
        model = adapted(*CASES["vit, head saved whole"][:2])
        model.config.name_or_path = "/elsewhere/secret"
        save_merged(model, tmp_path)
        assert check_publishable(tmp_path) == ["config.json", "model.safetensors"]
        assert left_behind(tmp_path) == []
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
        shake(model)
        plain = llama()
        plain.load_state_dict(merged_state_dict(model)[1])
        torch.testing.assert_close(logits(plain.eval(), TOKENS), logits(model, TOKENS), rtol=1e-5, atol=1e-5)

    def test_inactive_adapters_are_left_out(self):
        model = adapted(vit, {"target_modules": "all-linear", "modules_to_save": ["classifier"]})
        only = merged_state_dict(model)[1]
        model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", modules_to_save=["classifier"]))
        model.set_adapter("other")
        shake(model)
        other = merged_state_dict(model)[1]
        assert not torch.equal(other["classifier.weight"], only["classifier.weight"])
        model.set_adapter("default")
        state = merged_state_dict(model)[1]
        assert state.keys() == only.keys()
        assert all(torch.equal(state[name], only[name]) for name in only)

    def test_an_active_adapter_without_a_head_uses_the_original_one(self):
        model = adapted(vit, {"target_modules": "all-linear", "modules_to_save": ["classifier"]})
        model.add_adapter("other", LoraConfig(r=2, target_modules=["fc1"]))
        model.set_adapter("other")
        shake(model)
        plain = vit()
        plain.load_state_dict(merged_state_dict(model)[1])
        assert torch.equal(plain.classifier.weight, model.base_model.model.classifier.original_module.weight)
        torch.testing.assert_close(logits(plain.eval(), images()), logits(model, images()), rtol=1e-5, atol=1e-5)

    def test_a_merged_adapter_is_not_added_twice(self):
        model = adapted(llama, {"target_modules": ["q_proj"]})
        wanted = merged_state_dict(model)[1]
        model.merge_adapter()
        state = merged_state_dict(model)[1]
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)

    def test_keeps_the_dtype_of_the_base(self):
        torch.manual_seed(0)
        base = llama().to(torch.bfloat16)
        model = shake(get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])))
        state = merged_state_dict(model)[1]
        layer = base.model.layers[0].self_attn.q_proj
        assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
        exact = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
        assert torch.equal(state["model.layers.0.self_attn.q_proj.weight"], exact.to(torch.bfloat16))

    def test_names_of_the_model_itself_stay(self):
        class Odd(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.base_layer = torch.nn.Linear(3, 3)
                self.lora_A = torch.nn.Linear(3, 3)
                self.original_module = torch.nn.Linear(3, 3)

        model = shake(get_peft_model(Odd(), LoraConfig(r=2, target_modules=["base_layer"])))
        assert merged_state_dict(model)[1].keys() == Odd().state_dict().keys()

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
            (lambda: llama(tied=True), LoraConfig(target_modules=["embed_tokens"]), "ties"),
            (lambda: llama(tied=True), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "ties"),
        ],
        ids=["dora", "tokens", "bias", "ia3", "prompt", "tied lora", "tied module"],
    )
    def test_refuses_what_cannot_be_folded(self, build, config, what, tmp_path):
        model = shake(get_peft_model(build(), config))
        with pytest.raises(ValueError) as error:
            save_merged(model, tmp_path / "out")
        message = str(error.value)
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
