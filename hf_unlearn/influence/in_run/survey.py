"""Which layers of a model are seen, which of their parameters, and why the others are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from .layers import CONTAINERS, Rule, channels_first_norm, channels_last_norm, convolution, rule_for


@dataclass(frozen=True)
class Layer:
    name: str
    module: nn.Module
    rule: Rule | None  # None: to be computed again
    names: dict[str, str]  # "weight" and "bias" -> the covered parameter's full name

    def leading_axes(self, y: Tensor) -> int:
        """How many of its output's first axes may hold examples; the others are features."""
        if self.rule in (convolution, channels_first_norm, None):
            return min(1, y.dim())
        return y.dim() - (self.module.weight.dim() if self.rule is channels_last_norm else 1)


def survey(
    model: nn.Module, patterns: Sequence[str] | None
) -> tuple[list[Layer], dict[str, nn.Parameter], dict[str, str], dict[str, list[str]]]:
    """The layers to hook; covered and uncovered parameters; and the covered ones that several modules own."""
    modules = dict(model.named_modules())
    for pattern in patterns or []:
        if not any(fnmatchcase(name, pattern.removeprefix("!")) for name in modules):
            raise ValueError(f"layers: {pattern!r} matches no module; they are named like {list(modules)[-1]!r}")
    owners: dict[int, list[tuple[str, str]]] = {}
    for module_name, module in modules.items():
        for local, parameter in module.named_parameters(recurse=False):
            owner = module_name
            while owner and isinstance(modules[owner], CONTAINERS):  # the layer that it belongs to uses what it holds
                owner, _, part = owner.rpartition(".")
                local = f"{part}.{local}"
            owners.setdefault(id(parameter), []).append((owner, local))

    covered, uncovered, tied = {}, {}, {}
    seen: dict[str, dict[str, str]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owning = owners[id(parameter)]
        refusals = [(owner, _refusal(owner, modules[owner], local, patterns)) for owner, local in owning]
        refusal = next(((owner, why) for owner, why in refusals if why), None)
        if refusal is not None:
            owner, why = refusal
            uncovered[name] = why if len(owning) == 1 else f"tied to {owner}, which is not seen: {why}"
            continue
        covered[name] = parameter
        if len(owning) > 1:
            tied[name] = [owner for owner, _ in owning]
        for owner, local in owning:
            seen.setdefault(owner, {})[local] = name
    layers = [Layer(owner, modules[owner], rule_for(modules[owner]), names) for owner, names in seen.items()]
    return layers, covered, uncovered, tied


def _refusal(module_name: str, module: nn.Module, local: str, patterns: Sequence[str] | None) -> str | None:
    taken = [pattern for pattern in patterns or [] if not pattern.startswith("!")]
    out = [pattern[1:] for pattern in patterns or [] if pattern.startswith("!")]
    if (taken and not _matches(module_name, taken)) or _matches(module_name, out):
        return "excluded by layers="
    if "experts" in module_name.split(".")[:-1]:  # it gets some of the tokens, without their examples
        return "an expert of a mixture does not see whole examples"
    rule = rule_for(module)
    if rule is None or isinstance(rule, str):
        return rule
    return None if local in ("weight", "bias") else f"unsupported parameter of layer type '{type(module).__name__}'"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
