"""What one layer adds to per-example gradients, by layer type, from its input x and the gradient y of its output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D


CHUNK_ELEMENTS = 2**26  # the largest intermediate, unless one example alone needs more: 256 MiB in fp32
CACHED_ELEMENTS = 2**20  # the same for gradients that a CPU forms: what stays in its caches is twice as fast
FORMING_POSITIONS = 40  # to write a gradient down takes as long as the products of about so many positions
CONTAINERS = (nn.ParameterDict, nn.ParameterList)  # as adapters have their parameters in
OVERSAMPLING = 8  # of the randomised singular value decomposition

Factors = tuple[Tensor, Tensor]  # U [C, rows, r], V [C, columns, r]: G_c = U_c V_cᵀ


@torch.no_grad()
def low_rank(gradients: Tensor, rank: int) -> Factors:
    """The factors of matrices' best approximations by a rank: a randomised singular value decomposition.

    From a random state of its own, always the same. Exact where the matrices have no more than this rank.

    Args:
        gradients (`Tensor`): G, `[C, rows, columns]`.
        rank (`int`): cut to the smaller side where it is above.

    Returns:
        U `[C, rows, rank]` and V `[C, columns, rank]` with G ≈ U Vᵀ, in the dtype of G.
    """
    smaller = min(gradients.shape[1:])
    rank = min(rank, smaller)
    with torch.random.fork_rng([gradients.device] if gradients.device.type == "cuda" else []):
        torch.manual_seed(0)
        u, singular, v = torch.svd_lowrank(
            gradients.to(_accumulator(gradients.dtype)), min(rank + OVERSAMPLING, smaller)
        )
    u = u[..., :rank] * singular[..., None, :rank]
    return u.to(gradients.dtype).contiguous(), v[..., :rank].to(gradients.dtype).contiguous()


class PerExampleGradients(Protocol):
    """The gradients h_i of one parameter for the examples of a batch, in whatever form the layer has them."""

    def dots(self, targets: Tensor | Factors, form_gradients: bool) -> Tensor:
        """⟨G_c, h_i⟩ as `[batch, C]`; `targets` is G, `[C, *parameter.shape]`, or of a linear layer its factors."""

    def gram(self) -> Tensor:
        """⟨h_i, h_j⟩ as `[batch, batch]`."""

    def factors(self) -> Factors | None:
        """r `[batch, groups, positions, rows]` and c `[batch, groups, positions, columns]` with h_i = Σ_t r_t c_tᵀ; None where there are none."""


def forming_is_cheaper(positions: int, targets: int) -> bool:
    """Whether all dots of a layer take longer than its examples' gradients, written down, and the dots with those."""
    return positions * targets > positions + 2 * targets + FORMING_POSITIONS


class VectorGradients:
    """Of a bias or of a norm's scale. It is no larger than y, so it is simply there: `values` is `[batch, elements]`."""

    def __init__(self, values: Tensor):
        self.values = values

    def dots(self, targets: Tensor, form_gradients: bool) -> Tensor:
        return self.values @ targets.flatten(1).to(self.values.dtype).T

    def gram(self) -> Tensor:
        return self.values @ self.values.T

    def factors(self) -> Factors:
        rows = self.values[:, None, None]
        return rows, torch.ones_like(rows[..., :1])


class MatrixGradients:
    r"""Of a matrix that multiplies every position t of an example: h_i = Σ_t r_t c_tᵀ. For `nn.Linear` r is y and c is x.

    Dots are Σ_t r_t · (G c_t) or, the same number of operations, Σ_t c_t · (Gᵀ r_t): the one with the smaller vector in
    the middle is taken; or of h_i formed, where there are several targets. Norms are Σ_{t,s} (r_t·r_s)(c_t·c_s), or of h_i formed, whichever takes fewer operations.

    Args:
        rows (`Tensor`): r, `[batch, groups, positions, rows of the matrix]`; the groups of a convolution, else one.
        columns (`Tensor`): c, `[batch, groups, positions, columns of the matrix]`.
    """

    def __init__(self, rows: Tensor, columns: Tensor):
        dtype = _working_dtype(rows.dtype)
        self.rows, self.columns = rows.to(dtype), columns.to(dtype)

    def dots(self, targets: Tensor | Factors, form_gradients: bool) -> Tensor:
        (_, _, positions, r), c = self.rows.shape, self.columns.shape[-1]
        if isinstance(targets, tuple):
            return self._factored_dots(*targets)
        if form_gradients and forming_is_cheaper(positions, len(targets)):
            return self.formed_dots(targets)
        rows, columns, places = self._tokens_that_count(len(targets))
        targets = targets.to(rows.dtype)
        wide, narrow, targets = (columns, rows, targets.mT) if c >= r else (rows, columns, targets)
        dots = []
        step = max(1, CHUNK_ELEMENTS // narrow.shape[1])
        for a, b in zip(wide.split(step), narrow.split(step), strict=True):
            # One by one: stacked they would be copied where they have to be transposed
            products = ((a @ target).mul_(b).sum(1, dtype=_accumulator(b.dtype)) for target in targets)
            dots.append(torch.stack(list(products), dim=1))
        return self._by_example(torch.cat(dots), places)

    def _factored_dots(self, u: Tensor, v: Tensor) -> Tensor:
        """Σ_t (r_t U_c) · (c_t V_c): as many operations as the layer has rows and columns, times the rank."""
        rows, columns = (side.flatten(0, 2) for side in (self.rows, self.columns))
        left, right = (
            (side @ factor.to(side.dtype).transpose(0, 1).flatten(1)).view(len(side), *u.shape[::2])
            for side, factor in ((rows, u), (columns, v))
        )
        return self._by_example(left.mul_(right).sum(2, dtype=_accumulator(left.dtype)), None)

    def _tokens_that_count(self, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """r `[tokens, rows]`, c `[tokens, columns]`, and their places where those with r = 0 were left out.

        Padding has no gradient, and in the head nor has any token whose label is masked.
        """
        rows, columns = (side.flatten(0, 2) for side in (self.rows, self.columns))
        (r, c), on_cpu = (rows.shape[1], columns.shape[1]), rows.device.type == "cpu"
        # To look is one pass over r. Elsewhere than on a CPU it makes the host wait: worth it for the head alone.
        if count * min(r, c) < 64 or not (on_cpu or r >= 8 * c):
            return rows, columns, None
        places = torch.linalg.vector_norm(rows, 1, dim=1).nonzero().squeeze(1)
        if len(places) > 0.9 * len(rows):
            return rows, columns, None
        return rows[places], columns[places], places

    def _by_example(self, dots: Tensor, places: Tensor | None) -> Tensor:
        """Summed over an example's tokens: `[batch, C]`."""
        batch, _, positions, _ = self.rows.shape
        if places is not None:
            dots = dots.new_zeros(batch * positions, dots.shape[1]).index_copy_(0, places, dots)
        return dots.reshape(batch, positions, -1).sum(1)

    def formed_dots(self, targets: Tensor) -> Tensor:
        """The same through h_i, and for several groups too: C times fewer operations where there are many positions."""
        (_, groups, _, r), c = self.rows.shape, self.columns.shape[-1]
        targets = targets.reshape(len(targets), groups, r, c)
        return sum(h @ targets[:, :, part].flatten(1).to(h.dtype).T for part, h in self._formed())

    def gram(self) -> Tensor:
        (batch, groups, positions, r), c = self.rows.shape, self.columns.shape[-1]
        if batch * positions**2 * (r + c) >= (positions + batch) * r * c:
            return sum(h @ h.T for _, h in self._formed())
        rows, columns = (side.transpose(0, 1).flatten(1, 2) for side in (self.rows, self.columns))
        pairs = (rows @ rows.mT).mul_(columns @ columns.mT).view(groups, batch, positions, batch, positions)
        return pairs.sum((0, 2, 4), dtype=_accumulator(pairs.dtype))

    def factors(self) -> Factors:
        return self.rows, self.columns

    def _formed(self) -> Iterator[tuple[slice, Tensor]]:
        """Some rows of every h_i at a time, `[batch, elements]`: sums over elements need no more at once."""
        (batch, groups, _, r), c = self.rows.shape, self.columns.shape[-1]
        elements = min(CHUNK_ELEMENTS, CACHED_ELEMENTS) if self.rows.device.type == "cpu" else CHUNK_ELEMENTS
        step = max(1, elements // (batch * groups * c))
        for begin in range(0, r, step):
            part = slice(begin, begin + step)
            h = torch.matmul(self.rows[..., part].mT, self.columns).flatten(1)
            yield part, h.to(_accumulator(h.dtype))


class ConvolutionGradients:
    """Of the kernels of a convolution: dots are ⟨y_i, G * x_i⟩ with G stacked into one convolution, so x is not unfolded;
    the Gram matrix unfolds it and goes on as that of matrices does.
    """

    def __init__(self, module: nn.Conv2d, x: Tensor, y: Tensor, batch: int):
        dtype = _working_dtype(y.dtype)
        self.module, self.x, self.y, self.batch = module, x.to(dtype), y.to(dtype), batch

    def dots(self, targets: Tensor, form_gradients: bool) -> Tensor:
        module, (_, out, *space) = self.module, self.y.shape
        count, positions = len(targets), math.prod(space)
        smaller = module.weight[0].numel() <= positions * count
        if form_gradients and smaller and forming_is_cheaper(positions, count):
            return self._matrices().formed_dots(targets)
        # Group by group: its kernels for every target, [groups · C · out/groups, in/groups, height, width]
        kernels = targets.to(self.x.dtype).unflatten(1, (module.groups, -1)).transpose(0, 1).flatten(0, 2)
        dots = []
        step = max(1, CHUNK_ELEMENTS // (positions * out * count))
        for x, y in zip(self.x.split(step), self.y.split(step), strict=True):
            convolved = F.conv2d(x, kernels, None, module.stride, module.padding, module.dilation, module.groups)
            # reshape: PyTorch gives channels last where x had them, as in ConvNeXt
            convolved = convolved.reshape(len(x), module.groups, count, -1)
            convolved.mul_(y.reshape(len(x), module.groups, 1, -1))
            dots.append(convolved.sum((1, 3), dtype=_accumulator(x.dtype)))
        return torch.cat(dots).reshape(self.batch, -1, count).sum(1)

    def gram(self) -> Tensor:
        return self._matrices().gram()

    def factors(self) -> Factors:
        return self._matrices().factors()

    def _matrices(self) -> MatrixGradients:
        module = self.module
        # torch.nn.functional.unfold knows no padding='same', which may be uneven
        padded = F.pad(self.x, module._reversed_padding_repeated_twice)
        patches = F.unfold(padded, module.kernel_size, module.dilation, 0, module.stride)
        return MatrixGradients(self._by_position(self.y.flatten(2)), self._by_position(patches))

    def _by_position(self, channels_first: Tensor) -> Tensor:
        """`[rows, channels, positions]` as `[batch, groups, positions, channels of a group]`."""
        split = channels_first.unflatten(0, (self.batch, -1)).unflatten(2, (self.module.groups, -1))
        return split.permute(0, 2, 1, 4, 3).flatten(2, 3)


class LookupGradients:
    """Of an embedding: h_i has y_t added to row id_t. Dots read those rows of G, the Gram matrix adds y_t·y_s over equal ids."""

    def __init__(self, ids: Tensor, y: Tensor):
        self.ids, self.y = ids, y.to(_working_dtype(y.dtype))  # [batch, positions], [batch, positions, width]

    def dots(self, targets: Tensor, form_gradients: bool) -> Tensor:
        dots = []
        step = max(1, CHUNK_ELEMENTS // (self.y[0].numel() * len(targets)))
        for ids, y in zip(self.ids.split(step), self.y.split(step), strict=True):
            products = targets[:, ids].to(y.dtype).mul_(y)  # [C, examples, positions, width]
            dots.append(products.sum((2, 3), dtype=_accumulator(y.dtype)).T)
        return torch.cat(dots)

    def gram(self) -> Tensor:
        batch, positions = self.ids.shape
        gram = []
        step = max(1, CHUNK_ELEMENTS // (batch * positions**2))
        for ids, y in zip(self.ids.split(step), self.y.split(step), strict=True):
            same = ids.reshape(-1, 1) == self.ids.reshape(1, -1)
            pairs = (y.flatten(0, 1) @ self.y.flatten(0, 1).T).mul_(same).view(len(ids), positions, batch, positions)
            gram.append(pairs.sum((1, 3), dtype=_accumulator(pairs.dtype)))
        return torch.cat(gram)

    def factors(self) -> None:
        return None  # one side would be as long as the vocabulary


# A rule: (module, x, y, batch, names) -> the gradients of those of its parameters; x is None if "weight" is not asked.
Rule = Callable[[nn.Module, Tensor | None, Tensor, int, set[str]], dict[str, PerExampleGradients]]


def linear(module, x, y, batch, names) -> dict[str, PerExampleGradients]:
    gradients: dict[str, PerExampleGradients] = {}
    if "weight" in names:
        rows, columns = _tokens(y, batch).unsqueeze(1), _tokens(x, batch).unsqueeze(1)
        gradients["weight"] = (
            MatrixGradients(columns, rows) if isinstance(module, Conv1D) else MatrixGradients(rows, columns)
        )
    if "bias" in names:
        gradients["bias"] = VectorGradients(_tokens(y, batch).sum(1, dtype=_accumulator(y.dtype)))
    return gradients


def convolution(module, x, y, batch, names) -> dict[str, PerExampleGradients]:
    gradients: dict[str, PerExampleGradients] = {}
    if "weight" in names:
        gradients["weight"] = ConvolutionGradients(module, x, y, batch)
    if "bias" in names:
        gradients["bias"] = VectorGradients(_sum_over_space(y, batch))
    return gradients


def embedding(module, ids, y, batch, names, *, scale: float = 1.0) -> dict[str, PerExampleGradients]:
    if module.padding_idx is not None:
        y = y.masked_fill((ids == module.padding_idx).unsqueeze(-1), 0)
    return {"weight": LookupGradients(ids.reshape(batch, -1), _tokens(y if scale == 1 else scale * y, batch))}


def channels_last_norm(module, x, y, batch, names) -> dict[str, PerExampleGradients]:
    values = {"bias": y} if "bias" in names else {}
    if "weight" in names:
        values["weight"] = y * _normalized(module, x)
    shape = (batch, -1, module.weight.numel())
    return {name: VectorGradients(v.reshape(shape).sum(1, dtype=_accumulator(v.dtype))) for name, v in values.items()}


def channels_first_norm(module, x, y, batch, names) -> dict[str, PerExampleGradients]:
    values = {"bias": y} if "bias" in names else {}
    if "weight" in names:
        values["weight"] = y * _normalized(module, x)
    return {name: VectorGradients(_sum_over_space(v, batch)) for name, v in values.items()}


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    Conv1D: linear,
    nn.Conv2d: convolution,
    nn.Embedding: embedding,
    nn.LayerNorm: channels_last_norm,
    nn.RMSNorm: channels_last_norm,
    nn.GroupNorm: channels_first_norm,
    nn.BatchNorm1d: channels_first_norm,
    nn.BatchNorm2d: channels_first_norm,
    nn.BatchNorm3d: channels_first_norm,
}


def rule_for(module: nn.Module) -> Rule | None | str:
    """The rule for a layer; None for one that has to be computed again for each example ([`~hf_unlearn.influence.in_run.recomputed`]); or in words
    why it cannot be seen at all.
    """
    kind = type(module).__name__
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "its weight is used by nn.MultiheadAttention, not by the layer itself"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
        return f"unsupported layer type '{kind}' with max_norm or scale_grad_by_freq"
    for known, rule in RULES.items():
        # A subclass may scale, quantise or merge: only the forward that the rule was written for will do.
        if isinstance(module, known) and type(module).forward is known.forward:
            return None if getattr(module, "padding_mode", "zeros") != "zeros" else rule
    if _is_rms_norm(module):
        return channels_last_norm
    if isinstance(module, nn.Embedding) and (scale := _scale_of(module)) is not None:
        return partial(embedding, scale=scale)
    has_forward = type(module).forward is not nn.Module.forward
    own = {id(parameter) for parameter in _own_parameters(module)}
    alone = all(id(parameter) in own for parameter in module.parameters() if parameter.requires_grad)
    again = alone and not any(isinstance(child, _BatchNorm) for child in module.modules())
    return None if has_forward and again else f"unsupported layer type '{kind}'"


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Those of no part of it that is a layer itself."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if isinstance(child, CONTAINERS):
            yield from _own_parameters(child)


def mixes_examples(module: nn.Module) -> bool:
    """Whether it is a BatchNorm that would now normalise with the statistics of the batch."""
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether one of transformers' many RMSNorms really scales x / rms(x): its name says so, and so does a trial.

    The weight may enter as w or as 1 + w (Gemma): the gradient is the same.
    """
    if not type(module).__name__.endswith(("RMSNorm", "T5LayerNorm")):
        return False
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 1 or len(list(module.parameters())) != 1 or _epsilon(module) is None:
        return False
    x = torch.linspace(-1, 2, len(weight), dtype=weight.dtype, device=weight.device).unsqueeze(0)
    try:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(module.forward(x).sum(), weight)
    except Exception:  # it wants more than x, such as a gate
        return False
    return torch.allclose(gradient.float(), _normalized(module, x)[0].float(), rtol=2e-2, atol=1e-3)


@torch.no_grad()
def _scale_of(module: nn.Embedding) -> float | None:
    """c of a lookup that multiplies its rows by c, as Gemma's does, by a trial with a small table; None of anything else."""
    padding = -1 if module.padding_idx is None else module.padding_idx
    # Not in their order: a table of positions may look at how many there are, and give its first rows.
    ids = [row for row in (3, 2, 1) if row != padding]
    table = torch.linspace(-1, 2, max(4, padding + 1) * module.embedding_dim, device=module.weight.device)
    table = table.to(module.weight.dtype).view(-1, module.embedding_dim)
    try:
        given = torch.tensor([ids], device=table.device)
        found = torch.func.functional_call(module, {"weight": table}, (given,)).double().squeeze(0)
        rows = table[ids].double()
        scale = (found * rows).sum() / rows.square().sum()
        same = torch.allclose(found, scale * rows, rtol=2e-2, atol=1e-3 * scale.abs().item())
    except Exception:  # it takes no ids, such as a mask that positions are counted from
        return None
    return scale.to(module.weight.dtype).item() if same else None


def _epsilon(module: nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _normalized(module: nn.Module, x: Tensor) -> Tensor:
    """What the module multiplies by its weight, in fp32."""
    if isinstance(module, nn.RMSNorm):  # its default eps depends on the input's dtype
        return F.rms_norm(x, module.normalized_shape, None, module.eps).to(_accumulator(x.dtype))
    x = x.to(_accumulator(x.dtype))
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, None, None, module.eps)
    if isinstance(module, _BatchNorm):
        if mixes_examples(module):
            return F.batch_norm(x, None, None, training=True, eps=module.eps)
        mean, variance = (statistic.to(x.dtype) for statistic in (module.running_mean, module.running_var))
        return F.batch_norm(x, mean, variance, eps=module.eps)
    return F.rms_norm(x, module.weight.shape, None, _epsilon(module))


def _tokens(value: Tensor, batch: int) -> Tensor:
    """`[batch, …, d]`, or with the first axes flattened, as `[batch, positions, d]`."""
    return value.reshape(batch, -1, value.shape[-1])


def _sum_over_space(value: Tensor, batch: int) -> Tensor:
    """`[rows, channels, …]` as `[batch, channels]`."""
    summed = value.flatten(2).sum(2, dtype=_accumulator(value.dtype)) if value.dim() > 2 else value
    return summed.reshape(batch, -1, value.shape[1]).sum(1, dtype=_accumulator(value.dtype))


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of matrix products. bf16 stays, for speed; fp16 could overflow or vanish."""
    return dtype if dtype in (torch.bfloat16, torch.float64) else torch.float32


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
