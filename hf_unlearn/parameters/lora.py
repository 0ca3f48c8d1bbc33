"""Low-rank adapters in parameter space: what holds the product BA of a layer, however it is factored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .reference import Parameters
from .sharding import own, parts_of, sharded_like, whole


class LoRAProductAnchor:
    r"""Isotropic penalty on what a LoRA adapter does to its layer, not on how it is factored:

    $$ \gamma \sum_{\text{layers}} s^2\,\lVert BA - B^*A^* \rVert_F^2 $$

    A and B alone mean nothing: (BM⁻¹)(MA) is the same layer for every invertible M. The product is never formed; with
    rank r everything is an r × r matrix: ‖BA‖² = tr(BᵀB · AAᵀ).

    Args:
        reference (`Mapping[str, Tensor]`): the adapter's parameters before unlearning, shared.
        layers (`Sequence[tuple[str, str, float]]`): for every adapted layer the names of A (r × in) and of B (out × r),
            and its scaling s. Convolutions are flattened.
        isotropic (`float`): γ ≥ 0.
    """

    def __init__(self, reference: Parameters, layers: Sequence[tuple[str, str, float]], *, isotropic: float):
        if isotropic < 0:
            raise ValueError(f"an anchor attracts: isotropic={isotropic} must be ≥ 0")
        for layer in layers:
            if (layer[0] in reference) != (layer[1] in reference):
                raise ValueError(f"layers: of {layer[0]} and {layer[1]} one is frozen; both factors must be trainable")
        self.reference = reference
        self.layers = [layer for layer in layers if layer[0] in reference and layer[1] in reference]
        self.isotropic = isotropic

    @torch.no_grad()
    def value(self, parameters: Parameters) -> dict[str, Tensor]:
        total = torch.zeros(())
        for name_a, name_b, scaling in self.layers:
            (a, b), (a0, b0) = (_factors(of, name_a, name_b) for of in (parameters, self.reference))
            # BA − B₀A₀ = (B − B₀)A + B₀(A − A₀) = [B − B₀, B₀][A; A − A₀], without a difference of large numbers
            factors_b, factors_a = torch.cat([b - b0, b0], 1), torch.cat([a, a - a0])
            squared = ((factors_b.T @ factors_b) * (factors_a @ factors_a.T)).sum()
            total = total.to(squared.device) + scaling**2 * squared.clamp(min=0)
        return {"lora_product": total * self.isotropic}

    @torch.no_grad()
    def add_grad_(self, parameters: Parameters, scale: float = 1.0) -> None:
        for name_a, name_b, scaling in self.layers:
            (a, b), (a0, b0) = (_factors(of, name_a, name_b) for of in (parameters, self.reference))
            da, db = a - a0, b - b0
            weight = 2 * self.isotropic * scaling**2 * scale
            for name, gradient in (
                (name_a, (b.T @ db) @ a + (b.T @ b0) @ da),
                (name_b, db @ (a @ a.T) + b0 @ (da @ a.T)),
            ):
                parameter = parameters[name]
                if parameter.grad is not None:
                    gradient = own(sharded_like(gradient.view(parameter.shape), parameter))
                    own(parameter.grad).add_(gradient, alpha=weight)

    def share_(self, parameters: Parameters, whole: Parameters, shared: Parameters) -> None:
        self.reference = parts_of(self.reference, parameters, whole, shared)


def _factors(tensors: Parameters, *names: str) -> list[Tensor]:
    """As matrices in fp32; whole, since of parts there is no product."""
    return [whole(tensors[name].detach()).flatten(1).float() for name in names]


def lora_layers(model: nn.Module) -> list[tuple[str, str, float]]:
    """Names of A and B and the scaling of every trainable LoRA layer of a PEFT model, as [`LoRAProductAnchor`] wants them.

    Raises:
        ValueError: a layer uses DoRA, whose update is not a scaled product.
    """
    from peft.tuners.lora import LoraLayer

    layers = []
    for prefix, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if getattr(module, "parameter_name", None) is not None:
            raise ValueError(f"peft_config: {prefix} adapts target_parameters, stacked products; use target_modules")
        if getattr(module.get_base_layer(), "groups", 1) > 1:
            raise ValueError(f"peft_config: {prefix} is a convolution with groups > 1, whose A and B do not multiply")
        for adapter, scaling in module.scaling.items():
            if getattr(module, "use_dora", {}).get(adapter):
                raise ValueError(
                    f"peft_config: {prefix} uses DoRA, which has no product BA to penalise; use plain LoRA"
                )
            if adapter in module.lora_A:
                pair = (f"{prefix}.lora_A.{adapter}.weight", f"{prefix}.lora_B.{adapter}.weight")
            else:
                pair = (f"{prefix}.lora_embedding_A.{adapter}", f"{prefix}.lora_embedding_B.{adapter}")
            layers.append((*pair, float(scaling)))
    return layers
