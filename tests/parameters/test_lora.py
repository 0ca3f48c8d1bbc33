import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from hf_unlearn.parameters.lora import LoRAProductAnchor, lora_layers
from hf_unlearn.parameters.reference import ReferencePoint, trainable_parameters


class Mixed(nn.Module):
    """One layer of every kind that LoRA treats differently."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.linear = nn.Linear(6, 9)
        self.convolution = nn.Conv2d(1, 4, 3)


def lora_model(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        targets = ["embedding", "linear", "convolution"]
        config = LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False, **options)
        return get_peft_model(Mixed(), config)


def shift(model, seed=1, size=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def delta_weights(model):
    """What PEFT itself would merge into every layer."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return [layer.get_delta_weight("default").detach().clone() for layer in layers]


class TestLoRAProductAnchor:
    @pytest.mark.parametrize("rslora", [False, True])
    def test_value_is_the_change_of_the_weights_that_peft_would_merge(self, rslora):
        model = lora_model(use_rslora=rslora)
        reference, before = ReferencePoint.capture(model).parameters, delta_weights(model)
        anchor = LoRAProductAnchor(reference, lora_layers(model), isotropic=0.7)
        assert len(anchor.layers) == 3
        shift(model)
        expected = 0.7 * sum((b - a).square().sum() for a, b in zip(before, delta_weights(model), strict=True))
        torch.testing.assert_close(sum(anchor.value(trainable_parameters(model)).values()), expected)

    def test_is_the_same_for_every_factorisation(self):
        model = lora_model()
        anchor = LoRAProductAnchor(ReferencePoint.capture(model).parameters, lora_layers(model), isotropic=1.0)
        mixing = torch.tensor([[2.0, 1.0], [-0.5, 0.5]])

        def refactor():
            with torch.no_grad():
                for name_a, name_b, _ in anchor.layers:
                    a, b = parameters[name_a], parameters[name_b]
                    a.copy_((mixing @ a.flatten(1)).view_as(a))
                    b.copy_((b.flatten(1) @ mixing.inverse()).view_as(b))

        parameters = trainable_parameters(model)
        refactor()
        assert anchor.value(parameters)["lora_product"] < 1e-3
        assert max((parameters[k] - v).abs().max() for k, v in anchor.reference.items()) > 0.1
        shift(model)
        before = anchor.value(parameters)["lora_product"]
        refactor()
        torch.testing.assert_close(anchor.value(parameters)["lora_product"], before, rtol=1e-4, atol=1e-4)

    def test_gradient_is_zero_at_the_reference_and_only_where_there_is_one(self):
        model = lora_model()
        anchor = LoRAProductAnchor(ReferencePoint.capture(model).parameters, lora_layers(model), isotropic=1.0)
        parameters = trainable_parameters(model)
        for parameter in list(parameters.values())[1:]:
            parameter.grad = torch.zeros_like(parameter)
        anchor.add_grad_(parameters)
        assert next(iter(parameters.values())).grad is None
        assert all((parameter.grad == 0).all() for parameter in list(parameters.values())[1:])

    @pytest.mark.parametrize(("dtype", "size", "tolerance"), [
        (torch.float32, 0.3, 1e-4), (torch.float32, 1e-4, 1e-4), (torch.bfloat16, 1e-2, 2e-2),
    ])  # fmt: skip
    def test_value_and_gradient_are_those_of_the_explicit_product(self, dtype, size, tolerance):
        """In fp64; small changes are not lost to rounding, and gradients are added to with a factor."""
        model = lora_model().to(dtype)
        reference = ReferencePoint.capture(model).parameters
        anchor = LoRAProductAnchor(reference, lora_layers(model), isotropic=0.7)
        shift(model, size=size)
        parameters = trainable_parameters(model)
        exact = {k: v.detach().double().requires_grad_() for k, v in parameters.items()}
        penalty = 0
        for a, b, s in anchor.layers:
            product, before = (x[b].flatten(1).double() @ x[a].flatten(1).double() for x in (exact, reference))
            penalty = penalty + 0.7 * s**2 * (product - before).square().sum()
        gradients = torch.autograd.grad(penalty, list(exact.values()))
        there = size if dtype == torch.float32 else 0  # as large as what is added: neither hides the other
        for parameter in parameters.values():
            parameter.grad = torch.full_like(parameter, there)
        anchor.add_grad_(parameters, 0.5)
        torch.testing.assert_close(anchor.value(parameters)["lora_product"].double(), penalty, rtol=tolerance, atol=0)
        for parameter, gradient in zip(parameters.values(), gradients, strict=True):
            assert (parameter.grad - there - 0.5 * gradient).norm() < 0.5 * tolerance * gradient.norm()


class TestRefusals:
    def test_negative_weights_and_a_layer_with_one_frozen_factor(self):
        with pytest.raises(ValueError, match="isotropic"):
            LoRAProductAnchor({}, [], isotropic=-1.0)
        model = lora_model()
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
        with pytest.raises(ValueError, match="lora_A"):
            LoRAProductAnchor(ReferencePoint.capture(model).parameters, lora_layers(model), isotropic=1.0)

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_what_is_no_scaled_product(self):
        experts = nn.Module()
        experts.weight = nn.Parameter(torch.zeros(3, 4, 4))
        stacked = LoraConfig(r=2, target_parameters=["experts.weight"], target_modules=[])
        grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
        for model, message in (
            (lora_model(use_dora=True), "DoRA"),
            (get_peft_model(nn.ModuleDict({"experts": experts}), stacked), "target_parameters"),
            (get_peft_model(grouped, LoraConfig(r=2, target_modules=["0"])), "groups"),
        ):
            with pytest.raises(ValueError, match=message):
                lora_layers(model)
