import pytest
import torch
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

    def forward(self, ids):
        return self.convolution(self.linear(self.embedding(ids)).unsqueeze(1))


def lora_model(**options):
    from peft import LoraConfig, get_peft_model

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
    from peft.tuners.lora import LoraLayer

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

    def test_gradient_is_that_of_the_explicit_product(self):
        model = lora_model()
        reference = ReferencePoint.capture(model).parameters
        layers = lora_layers(model)
        anchor = LoRAProductAnchor(reference, layers, isotropic=0.7)
        shift(model)
        parameters = trainable_parameters(model)
        penalty = 0.7 * sum(
            s**2
            * (parameters[b].flatten(1) @ parameters[a].flatten(1) - reference[b].flatten(1) @ reference[a].flatten(1))
            .square()
            .sum()
            for a, b, s in layers
        )
        expected = torch.autograd.grad(penalty, list(parameters.values()))
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        anchor.add_grad_(parameters, 0.5)
        for parameter, gradient in zip(parameters.values(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, 1 + 0.5 * gradient, rtol=1e-4, atol=1e-5)

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

    def test_refuses_dora_and_negative_weights(self):
        with pytest.raises(ValueError, match="DoRA"):
            lora_layers(lora_model(use_dora=True))
        with pytest.raises(ValueError, match="isotropic"):
            LoRAProductAnchor({}, [], isotropic=-1.0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_small_changes_are_not_lost_to_rounding(self, dtype):
        model = lora_model().to(dtype)
        reference = ReferencePoint.capture(model).parameters
        anchor = LoRAProductAnchor(reference, lora_layers(model), isotropic=1.0)
        shift(model, size=1e-4 if dtype == torch.float32 else 1e-2)
        parameters = trainable_parameters(model)
        exact = {k: v.detach().double().requires_grad_() for k, v in parameters.items()}
        penalty = 0
        for a, b, s in anchor.layers:
            product, before = (x[b].flatten(1).double() @ x[a].flatten(1).double() for x in (exact, reference))
            penalty = penalty + s**2 * (product - before).square().sum()
        gradients = torch.autograd.grad(penalty, list(exact.values()))
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        anchor.add_grad_(parameters)
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(anchor.value(parameters)["lora_product"].double(), penalty, rtol=tolerance, atol=0)
        for parameter, gradient in zip(parameters.values(), gradients, strict=True):
            assert (parameter.grad - gradient).norm() < tolerance * gradient.norm()

    def test_refuses_a_layer_with_one_frozen_factor(self):
        model = lora_model()
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
        with pytest.raises(ValueError, match="lora_A"):
            LoRAProductAnchor(ReferencePoint.capture(model).parameters, lora_layers(model), isotropic=1.0)

    def test_refuses_stacked_experts(self):
        from peft import LoraConfig, get_peft_model

        class Experts(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(3, 4, 4))

        config = LoraConfig(r=2, target_parameters=["experts.weight"], target_modules=[])
        with pytest.raises(ValueError, match="target_parameters"):
            lora_layers(get_peft_model(nn.ModuleDict({"experts": Experts()}), config))

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_refuses_grouped_convolutions(self):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), LoraConfig(r=2, target_modules=["0"]))
        with pytest.raises(ValueError, match="groups"):
            lora_layers(model)
