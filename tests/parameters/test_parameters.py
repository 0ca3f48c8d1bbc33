import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
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


def anchored(isotropic=0.5, weight=2.0, dtype=torch.float32, seed=0):
    """An anchor, live parameters elsewhere, its two terms there and their gradient."""
    reference, point = random_point(seed, dtype), random_point(seed + 1, dtype)
    fisher = {k: v.square() for k, v in random_point(seed + 2).items()}
    parameters = live(point)
    terms = written_out(parameters, reference, fisher, isotropic, weight)
    gradients = torch.autograd.grad(sum(terms), list(parameters.values()))
    anchor = QuadraticAnchor(reference, isotropic=isotropic, diagonal=fisher, diagonal_weight=weight)
    return anchor, parameters, [term.detach() for term in terms], dict(zip(parameters, gradients, strict=True))


def gradients(parameters):
    return {name: parameter.grad for name, parameter in parameters.items()}


class TestQuadraticAnchor:
    @settings(deadline=None, max_examples=25)
    @given(seed=st.integers(0, 10**6), isotropic=WEIGHTS, weight=WEIGHTS)
    def test_value_and_gradient_are_those_of_the_equation(self, seed, isotropic, weight):
        anchor, parameters, terms, expected = anchored(isotropic, weight, seed=seed)
        values = anchor.value(parameters)
        assert set(values) <= {"isotropic", "fisher"}
        for name, term in zip(("isotropic", "fisher"), terms, strict=True):
            value = values.get(name, torch.tensor(0.0))
            assert value.dtype == torch.float32
            torch.testing.assert_close(value.double(), term, rtol=1e-5, atol=1e-6)
        anchor.add_grad_(parameters)
        torch.testing.assert_close(gradients(parameters), expected, rtol=1e-5, atol=1e-5)

    def test_without_a_diagonal_and_with_one_of_another_name(self):
        reference, point = random_point(0), random_point(1)
        assert QuadraticAnchor(reference).value(point) == {"isotropic": 0}
        named = QuadraticAnchor(reference, diagonal=random_point(2), diagonal_weight=1.0, diagonal_name="stability")
        assert named.value(point).keys() == {"stability"}

    def test_gradient_in_bf16(self):
        anchor, parameters, _, expected = anchored(0.3, 0.7, torch.bfloat16)
        anchor.add_grad_(parameters)
        assert parameters["bias"].grad.dtype == torch.bfloat16
        # Some five roundings to 2⁻⁸, and two terms that may cancel.
        torch.testing.assert_close(gradients(parameters), expected, rtol=5 * 2**-8, atol=1e-2)

    @pytest.mark.parametrize(
        ("dtype", "ratio"),
        [(torch.float32, 1e-6), (torch.bfloat16, 1.0), (torch.bfloat16, 1e-3), (torch.bfloat16, 1e-6)],
    )
    def test_terms_are_reported_apart_however_different_in_size(self, dtype, ratio):
        gamma = 0.1
        reference, point = random_point(0, dtype), random_point(1, dtype)
        fisher = {k: torch.full_like(v, ratio * gamma, dtype=torch.float32) for k, v in reference.items()}
        anchor = QuadraticAnchor(reference, isotropic=gamma, diagonal=fisher, diagonal_weight=1.0)
        terms = anchor.value(point)
        for name, term in zip(("isotropic", "fisher"), written_out(point, reference, fisher, gamma, 1.0), strict=True):
            torch.testing.assert_close(terms[name].double(), term, rtol=5 * torch.finfo(dtype).eps, atol=0)

    @settings(deadline=None, max_examples=10)
    @given(scale=st.floats(-100, 100), split=st.floats(0, 1))
    def test_gradient_is_linear_in_scale_and_added_to_what_is_there(self, scale, split):
        anchor, parameters, _, expected = anchored()
        for parameter in parameters.values():
            parameter.grad.fill_(3.0)
        anchor.add_grad_(parameters, scale * split)
        anchor.add_grad_(parameters, scale * (1 - split))
        wanted = {name: 3 + scale * gradient for name, gradient in expected.items()}
        torch.testing.assert_close(gradients(parameters), wanted, rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize(("elements", "weight"), [(1, 2.0), (6, 0.0), (18, 2.0), (2**24, 0.0)])
    def test_buckets_change_nothing_and_cover_everything(self, monkeypatch, elements, weight):
        monkeypatch.setitem(parameters_module.RUN_ELEMENTS, "cpu", elements)
        anchor, parameters, terms, expected = anchored(0.5, weight)
        anchor.add_grad_(parameters)
        torch.testing.assert_close(gradients(parameters), expected)
        torch.testing.assert_close(sum(anchor.value(parameters).values()).double(), sum(terms), rtol=1e-5, atol=0)
        parameters = live(random_point(1))
        parameters["bias"].grad = None  # a frozen one, and with small buckets one bucket without any gradient
        anchor.add_grad_(parameters)
        assert parameters.pop("bias").grad is None
        expected.pop("bias")
        torch.testing.assert_close(gradients(parameters), expected)

    def test_zero_at_the_reference_and_value_changes_nothing(self):
        anchor, parameters, _, _ = anchored()
        at_reference, elsewhere = live(random_point(0)), live(random_point(1))
        assert all(term == 0 for term in anchor.value(at_reference).values())
        anchor.add_grad_(at_reference)
        assert all((parameter.grad == 0).all() for parameter in at_reference.values())
        torch.testing.assert_close(anchor.value(elsewhere), anchor.value(elsewhere))
        assert_same(live(random_point(1)), elsewhere)
        assert all((parameter.grad == 0).all() for parameter in elsewhere.values())
        assert_same(anchor.reference, random_point(0))
        assert_same(anchor.diagonal, {k: v.square() for k, v in random_point(2).items()})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"isotropic": -1.0}, "isotropic=-1.0"),
            ({"diagonal_weight": -1e-9}, "diagonal_weight=-1e-09"),
            ({"diagonal": {**random_point(2), "bias": torch.ones(4)}, "diagonal_weight": 1.0}, "diagonal: "),
            ({"diagonal": {"weight": torch.ones(4, 3)}, "diagonal_weight": 1.0}, "diagonal: "),
        ],
    )
    def test_refuses(self, options, message):
        with pytest.raises(ValueError, match=message):
            QuadraticAnchor(random_point(0), **options)

    def test_sum_of_anchors(self):
        one = QuadraticAnchor(random_point(3), isotropic=0.2)
        other, parameters, _, _ = anchored()
        apart, both = live(random_point(1)), SumOfAnchors(one, other)
        first, second = one.value(parameters), other.value(parameters)
        expected = {"isotropic": first["isotropic"] + second["isotropic"], "fisher": second["fisher"]}
        torch.testing.assert_close(both.value(parameters), expected)
        both.add_grad_(parameters, 0.5)
        one.add_grad_(apart, 0.5)
        other.add_grad_(apart, 0.5)
        torch.testing.assert_close(gradients(parameters), gradients(apart))


def shift(model, seed=1, size=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


class Noisy(nn.Module):
    """Everything that could give a reference away: dropout, BatchNorm, tied weights, a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.dropout = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.frozen, self.tied = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4)
        self.tied.weight = self.first.weight

    def forward(self, x):
        return self.tied(self.frozen(self.dropout(self.norm(self.first(x)))))


def snapshot(model):
    state = {k: v.detach().clone() for k, v in model.state_dict(keep_vars=True).items()}
    grads = {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()}
    return state, grads, [module.training for module in model.modules()], torch.get_rng_state()


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

    def test_an_error_in_the_forward_leaves_the_training_flags_and_another_model_is_refused(self):
        model = Noisy().train()
        reference = ReferencePoint.capture(model)
        with pytest.raises(RuntimeError):
            reference(model, torch.randn(8, 5))
        assert all(module.training for module in model.modules())
        with pytest.raises(ValueError, match="model"):
            reference.restore(nn.Linear(2, 2))

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

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_tied_word_embeddings_through_a_file(self, tiny_llama, dtype, tmp_path):
        from transformers import LlamaForCausalLM

        config = copy.deepcopy(tiny_llama.config)
        config.tie_word_embeddings = True
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(dtype).eval()
        ids = torch.arange(12).view(2, 6)
        with torch.no_grad():
            expected = model(input_ids=ids).logits
        captured = ReferencePoint.capture(model)
        captured.save(tmp_path / "new" / "reference.safetensors")
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["reference.safetensors"]
        reference = ReferencePoint.load(tmp_path / "new" / "reference.safetensors")
        assert_same(reference.parameters, captured.parameters)
        assert_same(reference.buffers, captured.buffers)
        assert "lm_head.weight" not in reference.parameters
        shift(model.train(), size=0.1)
        assert not torch.allclose(model(input_ids=ids).logits, expected, atol=0.1)
        torch.testing.assert_close(reference(model, input_ids=ids).logits, expected)
        reference.restore(model.eval())
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


def test_save_tensors_is_complete_or_not_at_all(tmp_path, monkeypatch):
    base, path = torch.arange(12.0).view(3, 4), tmp_path / "tensors.safetensors"
    tensors = {"whole": base, "transposed": base.T.contiguous(), "part": base[1:]}  # that share memory
    save_tensors(tensors, path, {"step": "3"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"step": "3"}
        assert_same({name: file.get_tensor(name) for name in file.keys()}, tensors)  # noqa: SIM118

    def killed(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    before = path.read_bytes()
    monkeypatch.setattr("safetensors.torch.save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        save_tensors(tensors, path)
    assert path.read_bytes() == before
