"""Models of the libraries' own classes, with sequence-first parts, shared tables, channels last, scaled embeddings and experts:
products of what is covered against a backward pass of each example.
"""

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

from hf_unlearn.influence.in_run.ghost import GhostRecorder
from hf_unlearn.influence.in_run.rows import SHARED


TEXT = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "pad_token_id": 0,
}  # fmt: skip
DECODER = TEXT | {"num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
PICTURE = {"num_channels": 1, "num_labels": 3}
RELATIVE = {
    "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0, "conv_kernel_size": 3,
}  # fmt: skip
STAGES = PICTURE | {"hidden_sizes": [8] * 4, "depths": [1] * 4, "patch_size": 2, "image_size": 32}
BACK = "it is used behind its layer's back"

# Class of the model, its settings, the shape of an input or None for texts, and the ends of names that are not covered, and why.
MODELS = {
    "DeBERTa-v3": ("DebertaV2ForSequenceClassification", TEXT | RELATIVE, None, {
        ".self.query_proj.weight": SHARED, ".self.key_proj.weight": SHARED, "encoder.LayerNorm.weight": SHARED,
        "rel_embeddings.weight": BACK,
    }),
    "Longformer": ("LongformerForSequenceClassification", TEXT | {"attention_window": 4}, None, {}),
    "T5": ("T5ForSequenceClassification", {
        "vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "pad_token_id": 0,
        "eos_token_id": 2, "decoder_start_token_id": 0,
    }, None, {"relative_attention_bias.weight": SHARED}),
    "ConvNeXt": ("ConvNextForImageClassification", STAGES | {"layer_scale_init_value": 1.0}, (1, 32, 32), {
        "layer_scale_parameter": "unsupported layer type 'ConvNextLayer'"
    }),
    "ConvNeXtV2": ("ConvNextV2ForImageClassification", STAGES, (1, 32, 32), {}),
    "SegFormer": ("SegformerForImageClassification", PICTURE | {
        "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 8], "patch_sizes": [3, 3],
        "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 8,
    }, (1, 16, 16), {}),
    "Gemma 3": ("Gemma3ForCausalLM", DECODER, None, {}),
    "Mixtral": ("MixtralForCausalLM", DECODER | {
        "num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"
    }, None, {}),
    "Whisper": ("WhisperForAudioClassification", {
        "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "num_mel_bins": 8,
        "max_source_positions": 10, "classifier_proj_size": 8, "pad_token_id": 0, "decoder_layers": 1,
    }, (8, 20), {}),
    "Whisper's decoder": ("WhisperForCausalLM", {
        "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "vocab_size": 40,
        "max_target_positions": 10, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }, None, {}),
}  # fmt: skip


def built(name):
    class_name, values, shape, uncovered = MODELS[name]
    model_class = getattr(hf, class_name)
    config = hf.Gemma3TextConfig if name == "Gemma 3" else model_class.config_class
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config(**values)).double().eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model, shape, uncovered


def batch_of(shape, examples):
    generator = torch.Generator().manual_seed(1)
    if shape is not None:
        return torch.randn(examples, *shape, generator=generator, dtype=torch.float64)
    ids = torch.randint(3, 40, (examples, 8), generator=generator)
    ids[:, 5] = 2  # T5 classifies by it
    return ids


def losses(model, batch):
    logits = model(batch).logits
    if logits.dim() == 3:
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), batch[:, 1:], reduction="none").sum(1)
    return F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1], reduction="none")


def learned(model, batch, **options):
    """What a recorder has learned, and its products with two targets for a batch of the same or another size."""
    recorder = GhostRecorder(model, **options)
    with recorder:
        recorder.learn_rows(lambda: losses(model, batch), len(batch))
    return recorder


def products_agree(recorder, model, batch):
    parameters = list(recorder.covered.values())
    each = losses(model, batch)
    rows = [torch.autograd.grad(one, parameters, retain_graph=True, materialize_grads=True) for one in each]
    generator = torch.Generator().manual_seed(3)
    goals = [torch.randn(2, *p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    expected = sum(torch.stack(h).flatten(1) @ goal.flatten(1).T for *h, goal in zip(*rows, goals, strict=True))
    recorder.set_targets(dict(zip(recorder.covered, goals, strict=True)))
    with recorder:
        recorder.start(len(batch), targets=True)
        losses(model, batch).sum().backward()
    # Norms of transformers compute in fp32.
    torch.testing.assert_close(recorder.dots, expected, rtol=1e-5, atol=1e-7 * expected.abs().max().item())


@pytest.mark.parametrize("name", MODELS)
def test_equals_a_loop(name):
    model, shape, uncovered = built(name)
    recorder = learned(model, batch_of(shape, 4))
    for end, why in uncovered.items():
        found = [reason for name, reason in recorder.uncovered.items() if name.endswith(end)]
        assert set(found) == {why}
    ends = (*uncovered, *(end.replace("weight", "bias") for end in uncovered))
    assert all(name.endswith(ends) for name in recorder.uncovered)
    products_agree(recorder, model, batch_of(shape, 3))  # the last batch of an epoch is smaller


class Misleading(nn.Module):
    """A table with as many rows as there are examples, a layer that has positions first, and one with both outside."""

    def __init__(self):
        super().__init__()
        self.table, self.of_table = nn.Embedding(4, 6), nn.Linear(6, 6)
        self.sequence_first, self.interleaved, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.early, self.late, self.faint = nn.Linear(6, 6), nn.Embedding(4, 6), nn.Linear(6, 6, bias=False)

    def forward(self, x):
        rows = self.of_table(self.table(torch.arange(4)))
        x = x + self.late(torch.zeros(len(x), 4, dtype=torch.long))  # alike in all examples
        hidden = self.sequence_first(x.transpose(0, 1)).tanh()  # [positions, batch, width]
        hidden = self.interleaved(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2]).transpose(0, 1)
        hidden = F.linear(self.early(hidden).tanh() + rows, self.early.weight)
        hidden = hidden + 1e-4 * F.linear(hidden, self.faint.weight)
        return type("Outputs", (), {"logits": self.head(hidden.mean(1))})


@pytest.mark.parametrize("examples", [2, 4])
def test_sizes_that_fit_by_chance(examples):
    torch.manual_seed(0)
    model = Misleading().double()
    batch = torch.randn(examples, 4, 6, dtype=torch.float64)
    recorder = learned(model, batch)
    assert recorder.uncovered == {
        "table.weight": SHARED, "of_table.weight": SHARED, "of_table.bias": SHARED, "early.weight": BACK,
        "faint.weight": BACK,
    }  # fmt: skip
    products_agree(recorder, model, batch)
    products_agree(recorder, model, batch[:1])


def test_a_gradient_that_is_not_finite():
    """It reaches every row, and tells nothing of whose they are."""
    model, batch = Misleading().double(), torch.randn(3, 4, 6, dtype=torch.float64)
    batch[2, 1, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="^train_dataset: a batch has a gradient that is not finite"):
        learned(model, batch)


class Prompted(nn.Module):
    """As prompt tuning: a shared row that the model itself repeats."""

    def __init__(self):
        super().__init__()
        self.prompt, self.head = nn.Embedding(2, 6), nn.Linear(6, 3)

    def forward(self, x):
        prompt = self.prompt(torch.arange(2)[None]).repeat(len(x), 1, 1)
        return type("Outputs", (), {"logits": self.head(torch.cat([prompt, x], 1).tanh().mean(1))})


def test_a_shared_row_that_the_model_repeats():
    model, batch = Prompted().double(), torch.randn(3, 4, 6, dtype=torch.float64)
    recorder = learned(model, batch)
    assert recorder.uncovered == {"prompt.weight": SHARED}
    products_agree(recorder, model, batch)


QV = {"target_modules": ["q_proj", "v_proj"]}
ADAPTERS = {
    "IA3": QV | {"feedforward_modules": []}, "Vera": QV | {"r": 4}, "AdaLora": QV | {"total_step": 10}, "LoHa": QV, "LoKr": QV,
    "Lora": {"target_modules": ["embed_tokens", "q_proj"]}, "TrainableTokens": {"token_indices": [3, 4]},
}  # fmt: skip


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_that_hold_their_parameters_in_containers(kind):
    import peft

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **ADAPTERS[kind])
        model = peft.get_peft_model(hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)), config).double().eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
    recorder = learned(model, batch_of(None, 4))
    assert not recorder.uncovered
    assert set(recorder.covered) == {name for name, p in model.named_parameters() if p.requires_grad}
    products_agree(recorder, model, batch_of(None, 3))


def test_layers_that_are_taken_out():
    model = Misleading().double()
    batch = torch.randn(4, 4, 6, dtype=torch.float64)
    recorder = learned(model, batch, layers=["!*table", "!early", "!faint"])
    assert set(recorder.uncovered.values()) == {"excluded by layers="}
    assert {name.split(".")[0] for name in recorder.covered} == {"late", "sequence_first", "interleaved", "head"}
    only = learned(model, batch, layers=["*e*", "!*table", "!early", "!late"])
    assert {name.split(".")[0] for name in only.covered} == {"sequence_first", "interleaved", "head"}
    with pytest.raises(ValueError, match="^layers: '!nothing' matches no module"):
        GhostRecorder(model, layers=["!nothing"])
