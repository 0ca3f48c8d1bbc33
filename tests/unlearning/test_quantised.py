"""QLoRA: adapters on weights in 4 bits. Beside the same model with the weights that the 4 bits stand for. `make test-quantised` has bitsandbytes."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_unlearn import InfluenceConfig, InfluenceTrainer, UnlearnSFTConfig, UnlearnSFTTrainer
from hf_unlearn.hub.adapters import check_mergeable, save_merged


pytest.importorskip("bitsandbytes")
QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
ADAPTER = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
TOKENS = torch.arange(3, 25).view(2, 11)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sizes that are whole blocks of 64, as all that people use are."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("quantised") / "base"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def in_4_bits(folder, **kwargs):
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **kwargs)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings)


def whole(folder, **kwargs):
    """What the 4 bits stand for, by Transformers' own means, as a model that knows nothing of them."""
    plain = LlamaForCausalLM.from_pretrained(folder)
    plain.load_state_dict(in_4_bits(folder, **kwargs).dequantize().state_dict())
    return plain


def rows(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (n, 9), generator=generator).tolist()
    return Dataset.from_list(
        [{"id": number, "input_ids": row, "labels": [-100] * 4 + row[4:]} for number, row in enumerate(ids)]
    )


@torch.no_grad()
def logits(model):
    return model.eval()(TOKENS).logits


def adapted(model):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(**ADAPTER))


def shaken(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


@pytest.mark.parametrize("nested", [False, True])
def test_a_merged_model_is_a_stock_model_that_says_the_same(nested, folder, tmp_path):
    given = {"bnb_4bit_use_double_quant": nested}
    quantised = shaken(adapted(in_4_bits(folder, **given)))
    expected = logits(shaken(adapted(whole(folder, **given))))
    check_mergeable(quantised)
    before = {name: value.clone() for name, value in quantised.state_dict().items()}
    save_merged(quantised, tmp_path / "out")
    for name, value in quantised.state_dict().items():
        assert torch.equal(value, before[name]), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not getattr(loaded, "is_quantized", False)
    assert not hasattr(loaded.config, "quantization_config")
    # Sums of at most 128 terms, through two layers.
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    for other in (whole(folder), shaken(adapted(LlamaForCausalLM.from_pretrained(folder)))):
        assert (logits(other) - expected).abs().max() > 0.1


def unlearned(model, folder, tokenizer):
    args = UnlearnSFTConfig(
        str(folder), forget_loss="npo", max_steps=4, optim="sgd", learning_rate=0.1, per_device_train_batch_size=4, guard_steps=2, max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True}, **QUIET,
    )  # fmt: skip
    trainer = UnlearnSFTTrainer(
        model, args, forget_dataset=rows(8), retain_dataset=rows(8, seed=1), processing_class=tokenizer
    )
    trainer.train()
    return trainer


def test_trains_as_with_the_weights_that_they_stand_for(folder, tokenizer, tmp_path):
    """Through looks of the guard, in eval mode, after which bitsandbytes would let no gradient through on some CPUs."""
    trainers = [
        unlearned(adapted(make(folder)), tmp_path / name, tokenizer)
        for name, make in (("bits", in_4_bits), ("whole", whole))
    ]
    found, expected = ({n: p.detach() for n, p in t.model.named_parameters() if p.requires_grad} for t in trainers)
    assert found.keys() == expected.keys()
    assert {p.dtype for p in found.values()} == {torch.float32}
    start = dict(adapted(whole(folder)).named_parameters())
    for name, value in found.items():
        moved = (expected[name] - start[name]).abs().max().item()
        assert moved > 1e-4
        torch.testing.assert_close(
            value, expected[name], rtol=0, atol=1e-2 * moved, msg=lambda m, name=name: f"{name}: {m}"
        )
    trainers[0].save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "bits")
    torch.testing.assert_close(logits(loaded), logits(trainers[1].model), rtol=1e-3, atol=1e-3)
    card = (tmp_path / "bits" / "README.md").read_text()
    assert "nf4, 4 bits; saved is what these stand for, with the adapter" in card


def test_influence_is_that_of_the_weights_that_they_stand_for(folder, tmp_path):
    def recorded(model, folder):
        args = InfluenceConfig(
            str(folder), max_steps=3, learning_rate=1e-2, per_device_train_batch_size=4, observation="in_run", **QUIET
        )
        trainer = InfluenceTrainer(shaken(model), args, train_dataset=rows(8), target_dataset=rows(3, seed=2))
        trainer.train()
        return trainer.influence.observations.value

    found, expected = (recorded(adapted(make(folder)), tmp_path / make.__name__) for make in (in_4_bits, whole))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-2, atol=1e-2 * abs(expected).max())
