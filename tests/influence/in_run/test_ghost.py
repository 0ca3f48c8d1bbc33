import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_unlearn.influence.in_run import layers
from hf_unlearn.influence.in_run.ghost import GhostRecorder


ASKED = {"targets": True, "gram": True}


def language_batch(tokenizer, examples=3, length=7):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, len(tokenizer), (examples, length), generator=generator)
    ids[:, 4] = ids[:, 2]  # an embedding row that an example reads twice
    ids[0, 5:] = tokenizer.pad_token_id
    return {"input_ids": ids, "attention_mask": (ids != tokenizer.pad_token_id).long()}


def language_losses(model, batch):
    """One loss per example: the sum over its tokens."""
    logits = model(**batch).logits[:, :-1]
    labels = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)


def sequence_losses(model, batch):
    labels = torch.zeros(len(batch["input_ids"]), dtype=torch.long)
    return F.cross_entropy(model(**batch).logits, labels, reduction="none")


def image_batch(size, dtype=torch.float64, examples=4):
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(examples, 1, size, size, generator=generator).to(dtype)
    return {"pixel_values": pixels, "labels": torch.arange(examples)}


def image_losses(model, batch):
    return F.cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["labels"], reduction="none")


def loop(model, names, batch, losses):
    """Every example's gradient of every named parameter from a backward pass of its own: `name -> [batch, …]`."""
    parameters = [dict(model.named_parameters())[name] for name in names]
    rows = []
    for i in range(len(next(iter(batch.values())))):
        loss = losses(model, {k: v[i : i + 1] for k, v in batch.items()}).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)])
    return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def random_targets(parameters, count=3):
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(count, *p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        for name, p in parameters.items()
    }


def flat(gradients):
    return torch.cat([g.flatten(1) for g in gradients.values()], 1)


def record(recorder, model, batch, losses, goals=None, **asked):
    recorder.set_targets(goals or random_targets(recorder.covered))
    with recorder:
        recorder.start(len(next(iter(batch.values()))), **(asked or ASKED))
        model.zero_grad()
        losses(model, batch).sum().backward()
        recorder.stop()
    return recorder


def check(recorder, model, batch, losses, count=3, gram=True, **tolerance):
    targets = random_targets(recorder.covered, count)
    expected = flat(loop(model, list(recorder.covered), batch, losses))
    record(recorder, model, batch, losses, targets, targets=True, gram=gram)
    torch.testing.assert_close(recorder.dots, expected @ flat(targets).T, **tolerance)
    assert recorder.recorded == set(recorder.covered)
    if gram:
        torch.testing.assert_close(recorder.gram, expected @ expected.T, **tolerance)


def lora(model, **options):
    from peft import LoraConfig, get_peft_model

    options = {"target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False} | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **options))


def _unlike_initialisation(model):
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model


class TestAgainstALoop:
    @pytest.mark.parametrize(
        ("name", "count", "form_gradients", "examples"), [("tiny_llama", 1, True, 3), ("tiny_llama", 5, False, 3),
        ("tiny_llama", 5, True, 1), ("tiny_bert", 3, True, 3), ("tiny_resnet", 3, True, 4), ("tiny_resnet", 3, False, 4)],
    )  # fmt: skip
    def test_all_is_covered(self, name, count, form_gradients, examples, request, tokenizer, monkeypatch):
        """Bert's position and type ids are of one row that all examples share."""
        monkeypatch.setattr(layers, "FORMING_POSITIONS", -(10**6))
        model = _unlike_initialisation(request.getfixturevalue(name).double())
        recorder = GhostRecorder(model, form_gradients=form_gradients)
        assert not recorder.uncovered
        assert not recorder.mixes_examples
        if name == "tiny_resnet":
            check(recorder, model, image_batch(12), image_losses, count)
        else:
            losses = sequence_losses if name == "tiny_bert" else language_losses
            check(recorder, model, language_batch(tokenizer, examples=examples), losses, count)

    def test_what_was_not_asked_is_none(self, tiny_llama, tokenizer):
        model = tiny_llama.double()
        recorder = record(GhostRecorder(model), model, language_batch(tokenizer), language_losses, targets=True)
        assert recorder.dots.dtype == torch.float64
        assert recorder.gram is None

    def test_gpt2_with_tied_embeddings(self, tiny_gpt2, tokenizer):
        model = tiny_gpt2.double()
        recorder = GhostRecorder(model)
        assert not recorder.uncovered
        assert "transformer.wte.weight" in recorder.covered
        assert "lm_head.weight" not in recorder.covered
        check(recorder, model, language_batch(tokenizer), language_losses, gram=False)
        recorder = GhostRecorder(model, layers=["transformer.wpe", "transformer.h.*", "transformer.ln_f"])
        assert recorder.uncovered == {
            "transformer.wte.weight": "tied to transformer.wte, which is not seen: excluded by layers="
        }
        check(recorder, model, language_batch(tokenizer), language_losses)

    def test_vit(self, tiny_vit):
        model = tiny_vit.double()
        recorder = GhostRecorder(model)
        assert set(recorder.uncovered) == {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}
        assert set(recorder.uncovered.values()) == {"unsupported layer type 'ViTEmbeddings'"}
        check(recorder, model, image_batch(16), image_losses)

    def test_adapters(self, tiny_llama, tokenizer):
        model = lora(copy.deepcopy(tiny_llama)).double().eval()
        recorder = GhostRecorder(model)
        assert recorder.matrices == set(recorder.covered)
        assert len(recorder.covered) == 12
        assert all(".lora_A." in name or ".lora_B." in name for name in recorder.covered)
        check(recorder, model, language_batch(tokenizer), language_losses)
        recorder = GhostRecorder(lora(copy.deepcopy(tiny_llama), target_modules=["q_proj", "embed_tokens"]))
        assert not recorder.uncovered
        model = lora(tiny_llama, use_dora=True).double().eval()
        recorder = GhostRecorder(model)
        assert all("magnitude" in name for name in recorder.uncovered)
        check(recorder, model, language_batch(tokenizer), language_losses)

    @pytest.mark.parametrize("autocast", [False, True])
    def test_bf16_is_accumulated_in_fp32(self, autocast, tiny_llama, tokenizer):
        def losses(model, batch):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return language_losses(model, batch)

        batch, rounded = language_batch(tokenizer), tiny_llama if autocast else copy.deepcopy(tiny_llama).bfloat16()
        exact = tiny_llama.double() if not autocast else tiny_llama
        exact.load_state_dict(rounded.state_dict())
        # few parameters, where the forward pass's own rounding has not spread yet
        recorder = GhostRecorder(
            rounded, layers=None if autocast else ["lm_head", "model.norm", "model.layers.1.mlp.*"]
        )
        targets = loop(exact, list(recorder.covered), batch, language_losses)
        expected = flat(targets)
        record(recorder, rounded, batch, losses, targets)
        assert recorder.dots.dtype == recorder.gram.dtype == torch.float32
        # bf16 rounds by 2⁻⁹, each of some ten operations in a row: 0.02, and of what cancels that share of the norms
        bound = 0.03 * float(expected.norm()) ** 2 / len(expected)
        for seen in (recorder.dots, recorder.gram):
            torch.testing.assert_close(seen.to(expected), expected @ expected.T, rtol=0.03, atol=bound)


class TestTraining:
    """What the recorder must leave alone."""

    @pytest.mark.parametrize(
        ("name", "train"),
        [("tiny_llama", True), ("tiny_gpt2", True), ("tiny_bert", True), ("tiny_vit", False), ("tiny_resnet", True), ("tiny_resnet", False)],
    )  # fmt: skip
    def test_models_train_as_without_it(self, name, train, request, tokenizer):
        """The same operations on other memory: no further apart than their rounding."""
        model, gram = request.getfixturevalue(name).train(train), name != "tiny_gpt2"
        image = name in ("tiny_vit", "tiny_resnet")
        batch = image_batch(16, torch.float32) if image else language_batch(tokenizer)
        losses = image_losses if image else sequence_losses if name == "tiny_bert" else language_losses
        results = []
        recorder = GhostRecorder(model)
        for recording in (False, True):
            model.zero_grad()
            torch.manual_seed(0)
            if recording:
                recorder.set_targets(random_targets(recorder.covered))
                recorder.attach()
                recorder.start(len(next(iter(batch.values()))), targets=True, gram=gram)
            values = losses(model, batch)
            values.mean().backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            results.append((values.detach(), gradients))
        (plain_values, plain), (values, recorded) = results
        torch.testing.assert_close(values, plain_values)
        torch.testing.assert_close(recorded, plain, rtol=1e-4, atol=1e-6)
        expected = _dots(random_targets(recorder.covered), {name: recorded[name] for name in recorder.covered})
        torch.testing.assert_close(recorder.dots.sum(0), expected, rtol=1e-3, atol=1e-4)

    def test_in_place_activations(self):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 2)
        )
        x = torch.randn(3, 1, 5, 5)
        model(x).sum().backward()
        plain = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        with GhostRecorder(model) as recorder:
            recorder.start(3, gram=True)
            model(x).sum().backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], plain)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_activation_checkpointing(self, tiny_llama, tokenizer, use_reentrant):
        model = tiny_llama.double().train()
        batch, recorder = language_batch(tokenizer), GhostRecorder(model)
        record(recorder, model, batch, language_losses)
        plain = (recorder.dots, recorder.gram)
        plain_gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        assert model.is_gradient_checkpointing
        record(
            recorder, model, batch, language_losses
        )  # with the Gram matrix, so a second record of a layer would raise
        torch.testing.assert_close((recorder.dots, recorder.gram), plain)
        torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, plain_gradients)

    def test_the_input_is_saved_as_an_alias_and_freed(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        saved = []
        with GhostRecorder(model) as recorder:
            recorder.start(5, gram=True)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
                x = torch.randn(5, 3)
                output = model(x)
            addresses = [t.data_ptr() for t in saved if t.shape == x.shape]
            assert addresses == [x.data_ptr()] * 2  # Linear's own and ours
            saved.clear()
            kept = weakref.ref(x.untyped_storage())
            output.sum().backward()
            del x
            assert kept() is None

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpointing_still_drops_the_inputs(self, use_reentrant):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        inner = []
        block[2].register_forward_pre_hook(lambda module, args: inner.append(weakref.ref(args[0])))
        with GhostRecorder(block) as recorder:
            recorder.start(2, gram=True)
            x = torch.randn(2, 8, requires_grad=True)
            output = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=use_reentrant)
            assert inner[0]() is None
            output.sum().backward()
        assert recorder.recorded == set(recorder.covered)

    def test_disarmed_hooks_add_no_node(self):
        model, x = nn.Sequential(nn.Linear(3, 4)), torch.randn(2, 3)
        positions, embedding = torch.arange(5).unsqueeze(0), nn.Sequential(nn.Embedding(5, 2))
        with GhostRecorder(model) as recorder, GhostRecorder(embedding) as shared:
            recorder.start(2, gram=True)
            shared.start(3, gram=True)
            assert "Tap" in model(x).grad_fn.name()
            assert embedding(positions).shape == (3, 5, 2)
            with torch.no_grad():
                assert model(x).grad_fn is None
                assert embedding(positions).shape == (1, 5, 2)
            recorder.stop()
            assert "Tap" not in model(x).grad_fn.name()

    def test_nothing_is_left_behind(self, tiny_llama):
        recorder = GhostRecorder(tiny_llama)
        recorder.attach()
        recorder.attach()
        assert any(module._forward_hooks for module in tiny_llama.modules())
        assert all(len(module._forward_hooks) <= 1 for module in tiny_llama.modules())
        recorder.detach()
        with pytest.raises(KeyError), recorder:
            raise KeyError
        assert not any(module._forward_hooks or module._forward_hooks_with_kwargs for module in tiny_llama.modules())


def _dots(targets, gradients):
    return sum(targets[name].flatten(1) @ gradients[name].flatten() for name in gradients)


class TestBatchNorm:
    def test_in_train_mode_shares_sum_to_the_batch_gradient(self, tiny_resnet):
        model = _unlike_initialisation(tiny_resnet.double().train())
        other, recorder = copy.deepcopy(model), GhostRecorder(model)
        targets = random_targets(recorder.covered)
        record(recorder, model, image_batch(12), image_losses, targets)
        gradients = {name: model.get_parameter(name).grad for name in recorder.covered}
        torch.testing.assert_close(recorder.dots.sum(0), _dots(targets, gradients))
        squared = sum(g.square().sum() for g in gradients.values())
        torch.testing.assert_close(recorder.gram.sum(), squared)
        image_losses(other, image_batch(12)).sum().backward()  # statistics move as without the recorder
        torch.testing.assert_close(list(model.buffers()), list(other.buffers()))

    def test_layers_that_mix_examples_are_named(self, tiny_resnet):
        recorder = GhostRecorder(tiny_resnet, layers=["classifier.1"])
        assert recorder.mixes_examples == []
        tiny_resnet.train()
        assert "resnet.embedder.embedder.normalization" in recorder.mixes_examples
        assert len(recorder.mixes_examples) == sum(isinstance(m, nn.BatchNorm2d) for m in tiny_resnet.modules())


class Reuse(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.layer(self.layer(x).tanh())).squeeze(-1)


class TestSeveralPasses:
    def test_dots_of_a_layer_used_twice(self):
        torch.manual_seed(0)
        model, batch = Reuse().double(), {"x": torch.randn(4, 3, dtype=torch.float64)}
        check(GhostRecorder(model), model, batch, lambda model, batch: model(batch["x"]), gram=False)

    def test_the_gram_matrix_of_a_layer_used_twice_is_refused(self):
        model = Reuse()
        with GhostRecorder(model) as recorder:
            recorder.start(4, gram=True)
            with pytest.raises(RuntimeError, match="layer: used a second time since start"):
                model(torch.randn(4, 3)).sum().backward()

    def test_passes_add_up_and_start_resets(self):
        torch.manual_seed(0)
        model, x = nn.Linear(3, 1), torch.randn(4, 3)
        with GhostRecorder(model) as recorder:
            recorder.set_targets(random_targets(recorder.covered))
            recorder.start(4, targets=True)
            model(x).sum().backward()
            once = recorder.dots.clone()
            model(x).sum().backward()
            torch.testing.assert_close(recorder.dots, 2 * once)
            recorder.start(4, targets=True)
            model(x).sum().backward()
            torch.testing.assert_close(recorder.dots, once)

    def test_a_graph_from_before_start_is_not_recorded(self):
        model, x = nn.Linear(3, 1), torch.randn(4, 3)
        with GhostRecorder(model) as recorder:
            recorder.start(4, gram=True)
            earlier = model(x).sum()
            recorder.start(4, gram=True)
            earlier.backward()
            assert not recorder.recorded
            assert not recorder.gram.any()


class TestWhatIsSeen:
    def test_frozen_parameters(self, tiny_resnet):
        model = tiny_resnet.double()
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.endswith("bias") or "stages.1" in name
        recorder = GhostRecorder(model)
        assert set(recorder.covered) == {name for name, p in model.named_parameters() if p.requires_grad}
        check(recorder, model, image_batch(12), image_losses)

    def test_a_bias_alone_keeps_no_input(self):
        model = nn.Linear(3, 4)
        model.weight.requires_grad = False
        saved = []
        with GhostRecorder(model) as recorder:
            recorder.start(2, gram=True)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
                model(torch.randn(2, 3)).sum().backward()
        assert not saved
        torch.testing.assert_close(recorder.gram, torch.full((2, 2), 4.0))

    def test_layers(self, tiny_llama, tokenizer):
        model = tiny_llama.double()
        recorder = GhostRecorder(model, layers=["*.self_attn.?_proj", "lm_head"])
        assert len(recorder.covered) == 2 * 4 + 1
        assert set(recorder.uncovered.values()) == {"excluded by layers="}
        assert recorder.covered.keys() | recorder.uncovered.keys() == {name for name, _ in model.named_parameters()}
        check(recorder, model, language_batch(tokenizer), language_losses)

    def test_a_layer_tied_to_an_unsupported_one(self):
        model = nn.Module()
        model.proj, model.other = nn.Linear(3, 3, bias=False), nn.Module()
        model.other.weight = model.proj.weight
        model.head = nn.Linear(3, 1)
        recorder = GhostRecorder(model)
        assert recorder.uncovered == {
            "proj.weight": "tied to other, which is not seen: unsupported layer type 'Module'"
        }

    def test_experts_do_not_count_as_seen(self):
        model = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)]), "gate": nn.Linear(2, 1)})
        recorder = GhostRecorder(model)
        assert set(recorder.covered) == {"gate.weight", "gate.bias"}
        assert "expert" in recorder.uncovered["experts.0.weight"]

    def test_a_parameter_used_behind_its_layers_back_is_not_recorded(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        with GhostRecorder(model) as recorder:
            recorder.start(4, gram=True)
            F.linear(model[0](torch.randn(4, 3)), model[1].weight).sum().backward()
        assert recorder.recorded == {"0.weight", "0.bias"}

    def test_tokens_flattened_into_the_batch_axis(self):
        class Flattening(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.norm, self.last = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)

            def forward(self, x):
                hidden = self.norm(self.first(x.reshape(-1, 3))).tanh()
                return self.last(hidden).view(len(x), -1).logsumexp(1)

        torch.manual_seed(0)
        model, batch = Flattening().double(), {"x": torch.randn(4, 6, 3, dtype=torch.float64)}
        check(GhostRecorder(model), model, batch, lambda model, batch: model(batch["x"]))

    @pytest.mark.parametrize(
        ("layer", "examples", "x"),
        [
            (nn.Linear(3, 2), 4, torch.randn(6, 3)),
            (nn.Linear(3, 2), 4, torch.randn(3)),
            (nn.Embedding(8, 2), 2, torch.arange(4)),  # four positions, not two of each example
        ],
        ids=["rows", "one row", "ids"],
    )
    def test_a_layer_without_a_batch_axis(self, layer, examples, x):
        model = nn.Sequential(layer)
        with GhostRecorder(model) as recorder:
            recorder.start(examples, gram=True)
            with pytest.raises(
                RuntimeError, match=rf"^0: its output \(.*\) has no axis of batch_size={examples} examples"
            ):
                model(x).sum().backward()


class TestFactors:
    def test_which_weights_may_have_them(self, tiny_llama, tiny_gpt2, tiny_resnet):
        assert not any("embed" in name or "norm" in name for name in GhostRecorder(tiny_llama).matrices)
        tied = GhostRecorder(tiny_gpt2).matrices  # the head is the embedding
        assert tied == {n for n, p in tiny_gpt2.named_parameters() if ".h." in n and p.dim() == 2}
        assert GhostRecorder(tiny_resnet).matrices == {"classifier.1.weight"}


class TestErrors:
    def test_constructor_and_start(self, tiny_llama, tiny_gpt2):
        with pytest.raises(ValueError, match=r"layers: 'nothing.\*' matches no module; they are named like 'lm_head'"):
            GhostRecorder(tiny_llama, layers=["lm_head", "nothing.*"])
        with pytest.raises(ValueError, match="no trainable parameter is covered"):
            GhostRecorder(nn.MultiheadAttention(2, 1))
        recorder = GhostRecorder(nn.Linear(3, 2))
        with pytest.raises(RuntimeError, match="call attach"):
            recorder.start(2, gram=True)
        with recorder:
            with pytest.raises(ValueError, match="nothing to record"):
                recorder.start(2)
            with pytest.raises(ValueError, match="call set_targets"):
                recorder.start(2, targets=True)
        message = "^start: no Gram matrix of transformer.wte.weight, tied between transformer.wte and lm_head; exclude it with"
        with GhostRecorder(tiny_gpt2) as recorder, pytest.raises(ValueError, match=message):
            recorder.start(2, gram=True)

    def test_targets(self):
        recorder = GhostRecorder(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3, bias=False)))
        factors = torch.zeros(2, 3, 1), torch.zeros(2, 4, 1)
        good = {"0.weight": torch.zeros(2, 5, 4), "1.weight": factors}
        recorder.set_targets(good | {"another": torch.zeros(1)})
        for change, message in (
            ({"0.weight": (torch.zeros(2, 5, 1), torch.zeros(2, 4, 1))}, "no weight of linear layers alone"),
            ({"1.weight": factors[::-1]}, r"must be \[\(C, 3, r\), \(C, 4, r\)\]"),
            ({"1.weight": (factors[0], torch.zeros(2, 4, 2))}, r"must be \[\(C, 3, r\), \(C, 4, r\)\]"),
            ({"1.weight": torch.zeros(3, 4)}, r"gradients\['1.weight'\]: shape \(3, 4\) must be \(C, \*\(3, 4\)\)"),
            ({"0.weight": torch.zeros(1, 5, 4)}, r"number of targets C differs between parameters: \[1, 2\]"),
        ):
            with pytest.raises(ValueError, match=message):
                recorder.set_targets(good | change)
        with pytest.raises(ValueError, match=r"gradients: 1.weight is missing"):
            recorder.set_targets({"0.weight": good["0.weight"]})
        recorder.clear_targets()
        with recorder, pytest.raises(ValueError, match="call set_targets"):
            recorder.start(2, targets=True)
