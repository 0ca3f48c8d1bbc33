"""Unlearning with adapters: the penalty on the product, the reference, what is saved and what is resumed."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from language_data import check_resuming, nll, without_dropout
from language_data import settings as language_settings
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer, DataCollatorForSeq2Seq

from hf_unlearn import UnlearnConfig, UnlearnSFTConfig, UnlearnSFTTrainer, UnlearnTrainer


TEXTS = ["The quick fox.", "Paris is the capital of France.", "My order never"]
GAMMA, BETA, RATE = 0.7, 0.1, 0.02


def settings(folder, config=UnlearnConfig, **changes):
    return language_settings(
        folder, config, **{"learning_rate": RATE, "preference_beta": BETA, "isotropic_weight": GAMMA} | changes
    )


def texts(tokenizer):
    rows = [dict(tokenizer(text)) for text in TEXTS]
    return Dataset.from_list([{**row, "labels": row["input_ids"]} for row in rows])


def images(model):
    size = getattr(model.config, "image_size", 16)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(4, model.config.num_channels, size, size, generator=generator)
    return Dataset.from_dict({"pixel_values": pixels.tolist(), "labels": [3] * 4}).with_format("torch")


CASES = {
    "llama": ("tiny_llama", {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8}),
    "llama, rank-stabilised": ("tiny_llama", {"target_modules": "all-linear", "r": 4, "use_rslora": True}),
    "gpt2": ("tiny_gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "r": 2}),
    "vit": ("tiny_vit", {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}),
    "resnet": ("tiny_resnet", {"target_modules": r".*layer\.\d\.convolution", "modules_to_save": ["classifier.1"]}),
}


class Case:
    def __init__(self, name, request):
        fixture, options = CASES[name]
        self.base = request.getfixturevalue(fixture)
        self.tokenizer = request.getfixturevalue("tokenizer")
        self.config = LoraConfig(**options)
        self.is_text = fixture in ("tiny_llama", "tiny_gpt2")
        self.rows = texts(self.tokenizer) if self.is_text else images(self.base)
        self.auto = AutoModelForCausalLM if self.is_text else AutoModelForImageClassification
        without_dropout(self.base)

    def trainer(self, folder, model=None, callbacks=None, **changes):
        return UnlearnTrainer(
            self.base if model is None else model, callbacks=callbacks, forget_dataset=self.rows,
            args=settings(folder, forget="examples" if self.is_text else "class", **changes),
            data_collator=DataCollatorForSeq2Seq(self.tokenizer) if self.is_text else None,
            processing_class=self.tokenizer if self.is_text else None,
            peft_config=self.config if model is None else None,
        )  # fmt: skip

    def adapted(self):
        """With an adapter that does something, as one that was trained does."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            model = get_peft_model(copy.deepcopy(self.base), self.config)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.data.add_(0.1 * torch.randn_like(parameter))
                assert parameter.requires_grad == ("lora_" in name or "modules_to_save" in name)
        return model

    def logits(self, model):
        if isinstance(model, torch.nn.Module):
            model.eval()
        with torch.no_grad():
            if self.is_text:
                rows = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in self.rows]
                return torch.cat(rows)
            return model(pixel_values=self.rows["pixel_values"][:]).logits

    def forget_loss(self, model, original):
        """Of the trainer's defaults, by hand: NPO of a text, or redirection away from class 3."""
        if self.is_text:
            values = []
            for row in self.rows:
                ids = torch.tensor(row["input_ids"])
                with torch.no_grad():
                    reference = nll(original, ids, ids, "sum")
                values.append(
                    -2 / BETA * F.logsigmoid(BETA * (nll(model, ids, ids, "sum") - reference)) / (len(ids) - 1)
                )
        else:
            pixels = self.rows["pixel_values"][:]
            with torch.no_grad():
                p = original(pixel_values=pixels).logits.softmax(-1)
            p[:, 3] = 0
            values = -(p / p.sum(-1, keepdim=True) * model(pixel_values=pixels).logits.log_softmax(-1)).sum(-1)
        return sum(values) / len(values)


@pytest.fixture(params=CASES)
def case(request):
    return Case(request.param, request)


@pytest.fixture
def llama(request):
    return Case("llama", request)


def assert_close(actual, expected):
    """Logits of order 1 that a few layers in fp32 gave, of sums of at most 300 terms in any order."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def explicit_product(model, original):
    """γ Σ ‖s(BA − B*A*)‖², every product formed, and γ‖θ − θ*‖² of what is trained besides."""
    now, then = dict(model.named_parameters()), dict(original.named_parameters())
    total = 0
    for name in now:
        if "lora_A" in name:
            layer = model.get_submodule(name.split(".lora_A")[0])
            other = name.replace("lora_A", "lora_B")
            change = now[other].flatten(1) @ now[name].flatten(1) - then[other].flatten(1) @ then[name].flatten(1)
            total = total + (layer.scaling["default"] * change).square().sum()
        elif now[name].requires_grad and "lora_B" not in name:
            assert "modules_to_save" in name
            total = total + (now[name] - then[name]).square().sum()
    return GAMMA * total


def test_two_steps_with_the_product_penalty_equal_plain_torch(case, tmp_path):
    model = case.adapted()
    original, student = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    trainer = case.trainer(tmp_path, model, **({} if case.is_text else {"forget_loss": "redirect"}))
    trainer.train()
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=RATE)
    for step in range(2):
        penalty = explicit_product(student, original.requires_grad_(False))
        forget = case.forget_loss(student, original)
        assert trainer.state.log_history[step]["forget_loss"] == pytest.approx(forget.item(), rel=1e-4)
        optimizer.zero_grad()
        (forget + penalty).backward()
        optimizer.step()
    after = explicit_product(student, original).item()
    logged = trainer.state.log_history[1]
    assert after > 0
    assert logged["anchor_lora_product"] + logged.get("anchor_isotropic", 0) == pytest.approx(after, rel=1e-3)
    assert ("anchor_isotropic" in logged) == bool(case.config.modules_to_save)
    start = dict(original.named_parameters())
    for (name, actual), expected in zip(model.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, msg=name)
        assert expected.requires_grad or torch.equal(actual, start[name]), name


def test_without_the_penalty_the_step_is_another(llama, tmp_path):
    models = [llama.adapted() for _ in range(2)]
    for model, weight in zip(models, (0.0, GAMMA), strict=True):
        llama.trainer(tmp_path, model, isotropic_weight=weight).train()
    assert max((a - b).abs().max() for a, b in zip(*(m.parameters() for m in models), strict=True)) > 1e-3


def test_the_reference_is_the_adapter_as_it_was_and_both_ways_to_save(case, tmp_path):
    model = case.adapted()
    before, without = case.logits(model), case.logits(case.base)
    trainer = case.trainer(tmp_path, model, learning_rate=0.3)
    trainer.train()
    moved, reference = case.logits(model), case.logits(trainer.reference_forward)
    assert_close(reference, before)
    for other in (moved, without):
        assert (reference - other).abs().max() > 0.01
    assert all("lora_" in name or "modules_to_save" in name for name in trainer.reference.parameters)

    trainer.save_model()  # merged: a stock model
    assert not [*tmp_path.glob("adapter_*"), *tmp_path.glob("*.bin")]
    loaded = case.auto.from_pretrained(tmp_path)
    assert not isinstance(loaded, PeftModel)
    assert not [name for name in loaded.state_dict() if "lora" in name]
    assert_close(case.logits(loaded), moved)
    assert_close(case.logits(copy.deepcopy(model).merge_and_unload()), moved)
    if case.is_text:
        assert AutoTokenizer.from_pretrained(tmp_path)(TEXTS[0]) == case.tokenizer(TEXTS[0])

    trainer.args.merge_adapter = False
    trainer.save_model(tmp_path / "apart")
    names = {path.name for path in (tmp_path / "apart").iterdir()}
    assert "adapter_model.safetensors" in names
    assert not [name for name in names if name.startswith("model") or name.endswith(".bin")]
    assert_close(case.logits(PeftModel.from_pretrained(copy.deepcopy(case.base), tmp_path / "apart")), moved)


@pytest.mark.parametrize("case", ["llama", "resnet"], indirect=True)
def test_a_new_adapter_starts_from_the_base_model(case, tmp_path):
    before = case.logits(case.base)
    trainer = case.trainer(tmp_path, learning_rate=0.3)
    assert isinstance(trainer.model, PeftModel)
    trainer.train()
    assert_close(case.logits(trainer.reference_forward), before)
    assert (case.logits(trainer.model) - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("case", "start"),
    [("vit", "a new adapter"), ("resnet", "an adapter"), ("llama", "an adapter with a name")],
    indirect=["case"],
)
def test_resuming_ends_where_an_uninterrupted_run_does(case, start, tmp_path):
    def model():
        if start == "a new adapter":
            return None
        if start == "an adapter":
            return case.adapted()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return get_peft_model(copy.deepcopy(case.base), case.config, adapter_name="mine")

    base = case.base

    def make(folder, **steps):
        case.base = copy.deepcopy(base)
        return case.trainer(
            folder, model(), per_device_train_batch_size=2, replay_weight=1.0, guard=case.is_text, **steps
        )

    check_resuming(tmp_path, make)
    assert not list(tmp_path.glob("killed/checkpoint-*/model*.safetensors"))


class TestInstructions:
    ROWS = Dataset.from_dict({"prompt": ["Who?", "Where is it"], "completion": [" The fox", "?"]})

    def trainer(self, model, tokenizer, folder, **changes):
        return UnlearnSFTTrainer(
            model, args=settings(folder, UnlearnSFTConfig, replay_weight=1.0, **changes), forget_dataset=self.ROWS,
            processing_class=tokenizer,
            peft_config=LoraConfig(target_modules=["q_proj", "o_proj"], r=4, init_lora_weights="gaussian"),
        )  # fmt: skip

    def test_forgets_with_a_new_adapter_and_saves_a_stock_model(self, tiny_llama, tokenizer, tmp_path):
        base = copy.deepcopy(tiny_llama.state_dict())
        trainer = self.trainer(tiny_llama, tokenizer, tmp_path, optim="adamw_torch", learning_rate=1e-2, max_steps=4)
        assert trainer.args.gradient_checkpointing
        trainer.train()
        first, *_, last = [log for log in trainer.state.log_history if "forget_loss" in log]
        per_token = sum(1 / sum(label != -100 for label in row["labels"]) for row in trainer.forget_dataset) / 2
        assert first["forget_loss"] == pytest.approx(2 / BETA * math.log(2) * per_token, rel=1e-5)
        assert first["replay_loss"] == pytest.approx(0, abs=1e-6)
        assert last["forget_loss"] < first["forget_loss"]
        trainer.save_model()
        assert not list(tmp_path.glob("adapter_*"))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        batch = AutoTokenizer.from_pretrained(tmp_path)(TEXTS, padding=True, return_tensors="pt")
        assert_close(loaded(**batch).logits, trainer.model.eval()(**batch).logits)
        changed = {name for name, value in loaded.state_dict().items() if not torch.equal(value, base[name])}
        assert changed == {f"model.layers.{i}.self_attn.{n}_proj.weight" for i in range(2) for n in "qo"}

    def test_gradient_checkpointing_changes_nothing(self, tiny_llama, tokenizer, tmp_path):
        runs = []
        for gradient_checkpointing in (True, False):
            model = copy.deepcopy(tiny_llama)
            changes = {"gradient_checkpointing": gradient_checkpointing, "learning_rate": 0.5}
            trainer = self.trainer(model, tokenizer, tmp_path, **changes)
            trainer.train()
            runs.append(dict(trainer.model.named_parameters()))
        for name, value in runs[0].items():
            torch.testing.assert_close(value, runs[1][name], rtol=1e-4, atol=1e-6, msg=name)
        assert any(value.abs().max() > 0 for name, value in runs[0].items() if "lora_B" in name)


class TestRefusals:
    """Each in one line that names the argument, before anything is written."""

    @pytest.mark.parametrize(
        ("case", "changes", "message"),
        [
            (
                "llama",
                {"fisher_weight": 0.1, "fisher": "monte_carlo"},
                r"fisher_weight: [^\n]+ set it to 0 and use isotropic_weight",
            ),
            ("resnet", {"bn": "train"}, r"bn='train': [^\n]+"),
            ("dora", {}, r"merge_adapter=True: Dora[^\n]+"),
            ("two adapters", {}, r"peft_config: the model has an adapter already[^\n]+"),
            ("for inference", {}, r"model: none of its parameters is trainable; [^\n]+is_trainable=True"),
        ],
    )
    def test_of(self, case, changes, message, request, tmp_path):
        name, case = case, Case(case if case in CASES else "llama", request)
        case.config.use_dora = name == "dora"
        if name == "two adapters":
            case.base = case.adapted()
        model = None
        if name == "for inference":
            case.adapted().save_pretrained(tmp_path / "adapter")
            model = PeftModel.from_pretrained(case.base, tmp_path / "adapter")
        with pytest.raises(ValueError, match=rf"^{message}$"):
            case.trainer(tmp_path / "out", model, **changes)
        assert not list(tmp_path.glob("out/*"))
