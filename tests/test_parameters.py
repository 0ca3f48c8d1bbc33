import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_unlearn.files import save_tensors
from hf_unlearn.parameters import anchors as parameters_module
from hf_unlearn.parameters.anchors import QuadraticAnchor, SumOfAnchors
from hf_unlearn.parameters.reference import ReferencePoint, trainable_parameters


SHAPES = {"weight": (4, 3), "scalar": (), "bias": (5,), "kernel": (2, 3, 2, 2)}
WEIGHTS = st.floats(0.0, 10.0)


def random_point(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def live(point):
    parameters = {name: nn.Parameter(value.clone()) for name, value in point.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    return parameters


def written_out(parameters, reference, fisher, isotropic, fisher_weight):
    """The two sums of the equation, in float64."""
    change = {k: parameters[k].double() - reference[k].double() for k in reference}
    fisher = fisher or {k: torch.zeros_like(v) for k, v in reference.items()}
    return (
        isotropic * sum(v.square().sum() for v in change.values()),
        fisher_weight * sum((fisher[k].double() * v.square()).sum() for k, v in change.items()),
    )


class TestQuadraticAnchor:
    @settings(deadline=None, max_examples=40)
    @given(seed=st.integers(0, 10**6), isotropic=WEIGHTS, fisher_weight=WEIGHTS, with_fisher=st.booleans())
    def test_value_and_gradient_are_those_of_the_equation(self, seed, isotropic, fisher_weight, with_fisher):
        reference, point = random_point(seed), random_point(seed + 1)
        fisher = {k: v.square() for k, v in random_point(seed + 2).items()} if with_fisher else None
        anchor = QuadraticAnchor(reference, isotropic=isotropic, diagonal=fisher, diagonal_weight=fisher_weight)
        parameters = live(point)
        terms = written_out(parameters, reference, fisher, isotropic, fisher_weight)
        expected = torch.autograd.grad(sum(terms), list(parameters.values()))

        values = anchor.value(parameters)
        torch.testing.assert_close(values["isotropic"].double(), terms[0], rtol=1e-5, atol=1e-6)
        assert values["isotropic"].dtype == torch.float32
        assert set(values) <= {"isotropic", "fisher"}
        torch.testing.assert_close(
            values.get("fisher", torch.tensor(0.0)).double(), terms[1], rtol=1e-4, atol=1e-5 * (1 + isotropic)
        )
        anchor.add_grad_(parameters)
        for parameter, gradient in zip(parameters.values(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-5)

    def test_gradient_in_bf16(self):
        reference, point = random_point(0, torch.bfloat16), random_point(1, torch.bfloat16)
        fisher = {k: v.square() for k, v in random_point(2).items()}
        parameters = live(point)
        terms = written_out(parameters, reference, fisher, 0.3, 0.7)
        expected = torch.autograd.grad(sum(terms), list(parameters.values()))
        QuadraticAnchor(reference, isotropic=0.3, diagonal=fisher, diagonal_weight=0.7).add_grad_(parameters)
        for parameter, gradient in zip(parameters.values(), expected, strict=True):
            assert parameter.grad.dtype == torch.bfloat16
            torch.testing.assert_close(parameter.grad.float(), gradient.float(), rtol=4e-2, atol=1e-2)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("ratio", [1.0, 1e-3, 1e-6])
    def test_terms_are_reported_apart_however_different_in_size(self, dtype, ratio):
        gamma = 0.1
        reference, point = random_point(0, dtype), random_point(1, dtype)
        fisher = {k: torch.full_like(v, ratio * gamma, dtype=torch.float32) for k, v in reference.items()}
        anchor = QuadraticAnchor(reference, isotropic=gamma, diagonal=fisher, diagonal_weight=1.0)
        isotropic, from_fisher = written_out(point, reference, fisher, gamma, 1.0)
        tolerance = {"rtol": 1e-3 if dtype == torch.float32 else 2e-2, "atol": 0.0}
        terms = anchor.value(point)
        torch.testing.assert_close(terms["isotropic"].double(), isotropic, **tolerance)
        torch.testing.assert_close(terms["fisher"].double(), from_fisher, **tolerance)

    @settings(deadline=None, max_examples=20)
    @given(scale=st.floats(-100, 100), split=st.floats(0, 1))
    def test_gradient_is_linear_in_scale_and_added_to_what_is_there(self, scale, split):
        reference, point = random_point(0), random_point(1)
        fisher = {k: v.square() for k, v in random_point(2).items()}
        anchor = QuadraticAnchor(reference, isotropic=0.5, diagonal=fisher, diagonal_weight=2.0)
        once, twice, unit = live(point), live(point), live(point)
        for parameter in once.values():
            parameter.grad.fill_(3.0)
        anchor.add_grad_(once, scale)
        anchor.add_grad_(twice, scale * split)
        anchor.add_grad_(twice, scale * (1 - split))
        anchor.add_grad_(unit)
        for name in reference:
            torch.testing.assert_close(once[name].grad - 3.0, twice[name].grad, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(twice[name].grad, unit[name].grad * scale, rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize("elements", [1, 6, 18, 2**24])
    @pytest.mark.parametrize("fisher_weight", [0.0, 2.0])
    def test_buckets_change_nothing_and_cover_everything(self, monkeypatch, elements, fisher_weight):
        monkeypatch.setitem(parameters_module.RUN_ELEMENTS, "cpu", elements)
        reference, point = random_point(0), random_point(1)
        fisher = {k: v.square() for k, v in random_point(2).items()}
        anchor = QuadraticAnchor(reference, isotropic=0.5, diagonal=fisher, diagonal_weight=fisher_weight)
        parameters = live(point)
        terms = written_out(parameters, reference, fisher, 0.5, fisher_weight)
        anchor.add_grad_(parameters)
        for name, gradient in zip(reference, torch.autograd.grad(sum(terms), list(parameters.values())), strict=True):
            torch.testing.assert_close(parameters[name].grad, gradient)
        torch.testing.assert_close(sum(anchor.value(parameters).values()).double(), sum(terms), rtol=1e-5, atol=0)

    def test_zero_at_the_reference_and_value_changes_nothing(self):
        reference = random_point(0)
        fisher = {k: v.square() for k, v in random_point(2).items()}
        anchor = QuadraticAnchor(reference, isotropic=0.5, diagonal=fisher, diagonal_weight=2.0)
        at_reference, elsewhere = live(reference), live(random_point(1))
        assert all(term == 0 for term in anchor.value(at_reference).values())
        anchor.add_grad_(at_reference)
        assert all((parameter.grad == 0).all() for parameter in at_reference.values())

        first = anchor.value(elsewhere)
        assert anchor.value(elsewhere) == first
        for name in reference:
            assert torch.equal(elsewhere[name], random_point(1)[name])
            assert (elsewhere[name].grad == 0).all()
            assert torch.equal(reference[name], random_point(0)[name])
            assert torch.equal(fisher[name], random_point(2)[name].square())

    def test_parameters_without_gradient_are_skipped(self):
        anchor = QuadraticAnchor(random_point(0), isotropic=0.5)
        parameters, full = live(random_point(1)), live(random_point(1))
        parameters["bias"].grad = None
        anchor.add_grad_(parameters)
        anchor.add_grad_(full)
        assert parameters["bias"].grad is None
        assert all(torch.equal(parameters[k].grad, full[k].grad) for k in SHAPES if k != "bias")

    def test_a_bucket_without_any_gradient_is_skipped(self, monkeypatch):
        monkeypatch.setitem(parameters_module.RUN_ELEMENTS, "cpu", 1)
        anchor = QuadraticAnchor(random_point(0), isotropic=0.5)
        parameters = live(random_point(1))
        parameters["bias"].grad = None
        anchor.add_grad_(parameters)
        assert parameters["bias"].grad is None

    @pytest.mark.parametrize("weights", [{"isotropic": -1.0}, {"diagonal_weight": -1e-9}])
    def test_refuses_negative_weights(self, weights):
        with pytest.raises(ValueError, match=next(iter(weights))):
            QuadraticAnchor(random_point(0), **weights)

    def test_refuses_a_fisher_of_another_model(self):
        fisher = random_point(2)
        for wrong in ({**fisher, "bias": torch.ones(4)}, {k: fisher[k] for k in ("weight", "bias")}):
            with pytest.raises(ValueError, match="diagonal: "):
                QuadraticAnchor(random_point(0), diagonal=wrong, diagonal_weight=1.0)

    def test_sum_of_anchors(self):
        reference = random_point(0)
        fisher = {k: v.square() for k, v in random_point(2).items()}
        one = QuadraticAnchor(reference, isotropic=0.5)
        other = QuadraticAnchor(random_point(3), isotropic=0.2, diagonal=fisher, diagonal_weight=2.0)
        parameters, apart = live(random_point(1)), live(random_point(1))
        both = SumOfAnchors(one, other)
        values = both.value(parameters)
        first, second = one.value(parameters), other.value(parameters)
        torch.testing.assert_close(values["isotropic"], first["isotropic"] + second["isotropic"])
        torch.testing.assert_close(values["fisher"], second["fisher"])
        both.add_grad_(parameters, 0.5)
        one.add_grad_(apart, 0.5)
        other.add_grad_(apart, 0.5)
        assert all(torch.equal(parameters[k].grad, apart[k].grad) for k in SHAPES)


def shift(model, seed=1, size=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


class Noisy(nn.Module):
    """Everything that could give a reference away: dropout, BatchNorm, tied weights, a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.first.weight

    def forward(self, x):
        return self.tied(self.frozen(self.dropout(self.norm(self.first(x)))))


def snapshot(model):
    return (
        {k: v.detach().clone() for k, v in model.state_dict(keep_vars=True).items()},
        {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()},
        [module.training for module in model.modules()],
        torch.get_rng_state(),
    )


def assert_same(before, after):
    torch.testing.assert_close(before, after, rtol=0, atol=0)


class TestReferencePoint:
    def test_call_is_the_model_as_it_was_and_leaves_no_trace(self):
        torch.manual_seed(0)
        model, x = Noisy(), torch.randn(8, 4)
        model(x)  # BatchNorm statistics other than the initial ones
        with torch.no_grad():
            expected = copy.deepcopy(model).eval()(x)
        reference = ReferencePoint.capture(model)
        model.train()
        model.norm.eval()  # flags differ between modules
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            model.norm.train()
            model(3 * x + 1).square().sum().backward()
            optimizer.step()
        model.norm.eval()
        assert not torch.allclose(copy.deepcopy(model).eval()(x), expected, atol=0.1)

        before = snapshot(model)
        output = reference(model, x)
        assert_same(snapshot(model), before)
        torch.testing.assert_close(output, expected)
        assert not output.requires_grad

        reference.restore(model)
        torch.testing.assert_close(copy.deepcopy(model).eval()(x), expected)
        assert model.tied.weight is model.first.weight

    def test_an_error_in_the_forward_leaves_the_training_flags(self):
        model = Noisy().train()
        reference = ReferencePoint.capture(model)
        with pytest.raises(RuntimeError):
            reference(model, torch.randn(8, 5))
        assert all(module.training for module in model.modules())

    def test_later_training_does_not_reach_it(self):
        model = Noisy()
        reference = ReferencePoint.capture(model)
        assert set(reference.parameters) == {"first.weight", "first.bias", "norm.weight", "norm.bias", "tied.bias"}
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.add_(1)
        for name, value in {**reference.parameters, **reference.buffers}.items():
            assert not value.requires_grad
            assert torch.equal(model.state_dict()[name], value + 1)

    def test_restore_refuses_another_model(self):
        with pytest.raises(ValueError, match="model"):
            ReferencePoint.capture(Noisy()).restore(nn.Linear(2, 2))

    @pytest.mark.parametrize("fixture", ["tiny_resnet", "tiny_vit"])
    def test_image_classifiers(self, fixture, request):
        model = request.getfixturevalue(fixture)
        images = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = model(pixel_values=images).logits
        reference = ReferencePoint.capture(model)
        model.train()
        model(pixel_values=images, labels=torch.arange(4)).loss.backward()  # moves running statistics
        shift(model, size=0.1)
        torch.testing.assert_close(reference(model, pixel_values=images).logits, expected)
        reference.restore(model)
        torch.testing.assert_close(model.eval()(pixel_values=images).logits, expected)

    @pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gpt2", "tiny_bert"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_text_models_through_a_file(self, fixture, dtype, request, tokenizer, tmp_path):
        model = request.getfixturevalue(fixture).to(dtype)
        batch = tokenizer(["The fox jumps.", "Paris is the capital of France"], padding=True, return_tensors="pt")
        with torch.no_grad():
            expected = model(**batch).logits
        reference = ReferencePoint.capture(model)
        reference.save(tmp_path / "new" / "reference.safetensors")
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["reference.safetensors"]
        loaded = ReferencePoint.load(tmp_path / "new" / "reference.safetensors")
        assert_same(loaded.parameters, reference.parameters)
        assert_same(loaded.buffers, reference.buffers)
        shift(model.train(), size=0.1)
        assert not torch.allclose(model(**batch).logits, expected, atol=0.1)
        torch.testing.assert_close(loaded(model, **batch).logits, expected)

    def test_tied_word_embeddings(self, tiny_llama, tmp_path):
        from transformers import LlamaForCausalLM

        config = copy.deepcopy(tiny_llama.config)
        config.tie_word_embeddings = True
        model = LlamaForCausalLM(config).eval()
        ids = torch.arange(12).view(2, 6)
        with torch.no_grad():
            expected = model(input_ids=ids).logits
        ReferencePoint.capture(model).save(tmp_path / "reference.safetensors")
        reference = ReferencePoint.load(tmp_path / "reference.safetensors")
        assert "lm_head.weight" not in reference.parameters
        shift(model, size=0.1)
        torch.testing.assert_close(reference(model, input_ids=ids).logits, expected)
        reference.restore(model)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        torch.testing.assert_close(model(input_ids=ids).logits, expected)

    def test_lora_reference_is_the_base_model_and_small(self, tiny_llama):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(tiny_llama, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5))
        reference = ReferencePoint.capture(model)
        assert all("lora_" in name for name in reference.parameters)
        shift(model.train())
        ids = torch.arange(12).view(2, 6)
        with torch.no_grad(), model.disable_adapter():
            expected = model.eval()(input_ids=ids).logits
        assert not torch.allclose(model(input_ids=ids).logits, expected, atol=1e-3)
        torch.testing.assert_close(reference(model.train(), input_ids=ids).logits, expected)


def test_save_tensors_writes_shared_and_strided_tensors(tmp_path):
    from safetensors.torch import load_file

    base = torch.arange(12.0).view(3, 4)
    tensors = {"whole": base, "transposed": base.T, "part": base[1:]}
    save_tensors({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "tensors.safetensors")
    assert_same(load_file(tmp_path / "tensors.safetensors"), tensors)
