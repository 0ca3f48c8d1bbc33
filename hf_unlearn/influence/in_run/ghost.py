"""Per-example gradients as dot products, norms and a Gram matrix, out of one ordinary backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn

from .layers import Factors, PerExampleGradients, Rule, linear, mixes_examples, rule_for
from .prompts import SharedPrompt, repeats_prompt


class GhostRecorder:
    r"""Sees the gradient h_i of every example of a batch while the batch's loss is backwarded, without forming it:

    $$ \langle G_c, h_i\rangle = \sum_t y_{it} \cdot (G_c\, x_{it}), \qquad
       \langle h_i, h_j\rangle = \sum_{t,s} (y_{it} \cdot y_{js})\,(x_{it} \cdot x_{js}) $$

    for a linear layer with input x and output gradient y at positions t (the "ghost" products of In-Run Data Shapley,
    arXiv 2406.11011); other layers likewise, see [`~hf_unlearn.influence.in_run.layers.RULES`]. LoRA layers are linear.

        recorder = GhostRecorder(model)
        recorder.set_targets({name: ... for name in recorder.covered})
        with recorder:
            recorder.start(len(batch), targets=True)
            loss(model, batch).backward()  # training as always: same values, same gradients, bit by bit
            recorder.stop()
        recorder.dots  # [batch, C]

    Everything is with respect to the loss that was backwarded: h_i is example i's share of its gradient, so Σ_i h_i is the
    gradient of the covered parameters. A mean over examples must be multiplied back by the caller.

    The input of a layer is kept by its autograd node, as an alias of what autograd keeps for the layer anyway, so both
    kinds of activation checkpointing still save their memory. (Under autocast, and in an RMSNorm in half precision, that
    is the input before the cast: up to one more activation per layer.)

    Cost: dots take per layer as many operations as C forward passes, and hold the smaller of the layer's input and output,
    or 256 MiB of it at a time; tokens without a gradient (padding, and in the head all with masked labels) are left out.
    Norms and the Gram matrix work token by token as above, or form one layer's gradients, or some of their rows, for a
    moment, whichever takes fewer operations. With `form_gradients` dots of several targets do so too where that is cheaper:
    with 8 targets and 40 positions a sixth of the operations.

    What it relies on: the batch is the first axis of every covered layer's input, or is flattened into it example by
    example (`[batch · positions, d]`); sequence-first models and ids of positions without a batch axis cannot be told
    from that if the sizes happen to fit. Whole forward and backward passes lie between `start` and `stop`.

    Args:
        model (`nn.Module`): not a wrapper such as DistributedDataParallel. What is trainable is looked at once, here.
        layers (`Sequence[str]`, *optional*): patterns (as of file names) of the names of the modules to see; default all.
        form_gradients (`bool`, defaults to `True`): see above.

    Attributes:
        covered (`dict[str, nn.Parameter]`): trainable parameters that are seen, by their name in `named_parameters()`.
        matrices (`set[str]`): names of covered weights that only linear layers use: their targets may be factors.
        uncovered (`dict[str, str]`): names of the other trainable parameters, and why.
        recorded (`set[str]`): names of covered parameters that took part since `start`. One that has a gradient but is not
            here was used behind its layer's back, as a fused loss uses the head.
        dots (`Tensor`): ⟨G_c, h_i⟩, `[batch, C]`, after the backward pass. fp32, as the other two; fp64 for an fp64 model.
        squared_norms (`Tensor`): ‖h_i‖², `[batch]`.
        gram (`Tensor`): ⟨h_i, h_j⟩, `[batch, batch]`.

    Raises:
        ValueError: a pattern in `layers` matches no module, or nothing trainable is left.
    """

    def __init__(self, model: nn.Module, *, layers: Sequence[str] | None = None, form_gradients: bool = True):
        self.form_gradients = form_gradients
        self.dots: Tensor | None = None
        self.squared_norms: Tensor | None = None
        self.gram: Tensor | None = None
        self.recorded: set[str] = set()
        self._model = model
        self._layers, self.covered, self.uncovered, self._tied = _survey(model, layers)
        if not self.covered:
            raise ValueError(
                f"model: no trainable parameter is covered; the reasons are {set(self.uncovered.values())}"
            )
        others = {name for layer in self._layers if layer.rule is not linear for name in layer.names.values()}
        linears = {layer.names.get("weight") for layer in self._layers if layer.rule is linear}
        self.matrices: set[str] = linears & self.covered.keys() - others
        self._targets: dict[str, Tensor | Factors] = {}
        self._count = 0
        self._handles: list[torch.utils.hooks.RemovableHandle | SharedPrompt] = []
        self._pass: _Pass | None = None

    @property
    def mixes_examples(self) -> list[str]:
        """Names of the BatchNorm layers in train mode. With them h_i is a share of the batch's gradient, and not the
        gradient that the example would have alone.
        """
        return [name for name, module in self._model.named_modules() if mixes_examples(module)]

    @property
    def tied(self) -> dict[str, list[str]]:
        """Covered parameters that several layers share, with the layers. Norms and Gram matrix are refused with them."""
        return self._tied

    def attach(self) -> None:
        """Hook the layers. Until `start` the hooks do nothing."""
        self.detach()
        for layer in self._layers:
            hook = partial(self._see, layer)
            self._handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))
        if repeats_prompt(self._model):
            self._handles.append(SharedPrompt(self._model))

    def detach(self) -> None:
        """Remove the hooks."""
        self.stop()
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> GhostRecorder:
        self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def set_targets(self, gradients: Mapping[str, Tensor | Factors]) -> None:
        """The gradients G that dots are taken with.

        A weight in [`matrices`] may have factors instead, G_c = U_c V_cᵀ as a pair U `[C, rows, r]`, V `[C, columns, r]`
        of the weight's own rows and columns ([`~hf_unlearn.influence.in_run.layers.low_rank`] makes them). Its dots then take
        r · (rows + columns) operations a token and target instead of rows · columns, and as much less memory.

        Args:
            gradients (`Mapping[str, Tensor | tuple[Tensor, Tensor]]`): for every covered parameter `[C, *parameter.shape]`,
                or factors, of any float dtype, on the parameter's device. Kept, not copied; the dtype of the layer's
                activations spares a cast per pass. Other names are ignored.

        Raises:
            ValueError: a covered parameter is missing, a shape does not fit, or factors of what is no linear layer's weight.
        """
        counts, targets = set(), {}
        for name, parameter in self.covered.items():
            if name not in gradients:
                raise ValueError(f"gradients: {name} is missing; give all of covered, or choose fewer with layers=")
            gradient = gradients[name]
            if isinstance(gradient, tuple):
                self._check_factors(name, gradient)
                targets[name] = (gradient[0].detach(), gradient[1].detach())
            else:
                shape = tuple(gradient.shape)
                if shape[1:] != parameter.shape:
                    raise ValueError(f"gradients[{name!r}]: shape {shape} must be (C, *{tuple(parameter.shape)})")
                targets[name] = gradient.detach()
            counts.add(len(gradient[0] if isinstance(gradient, tuple) else gradient))
        if len(counts) > 1:
            raise ValueError(f"gradients: the number of targets C differs between parameters: {sorted(counts)}")
        self._targets, self._count = targets, counts.pop()

    def clear_targets(self) -> None:
        """Let go of the targets, to have room for the next ones."""
        self._targets, self._count = {}, 0

    def _check_factors(self, name: str, factors: Factors) -> None:
        if name not in self.matrices:
            raise ValueError(
                f"gradients[{name!r}]: is no weight of linear layers alone; give the gradient, not factors"
            )
        (rows, columns), shapes = self.covered[name].shape, [tuple(factor.shape) for factor in factors]
        count, *_, rank = shapes[0]
        if shapes != [(count, rows, rank), (count, columns, rank)]:
            raise ValueError(f"gradients[{name!r}]: factors {shapes} must be [(C, {rows}, r), (C, {columns}, r)]")

    def start(self, batch_size: int, *, targets: bool = False, norms: bool = False, gram: bool = False) -> None:
        """Arm the hooks for the passes until `stop`, and reset what is recorded.

        Several passes over the same examples add up. That is exact for dots; norms of a sum need cross terms, so with
        `norms` or `gram` a layer that is used a second time raises.

        Args:
            batch_size (`int`): examples per batch.
            targets, norms, gram (`bool`): what to record.

        Raises:
            ValueError: nothing to record, no targets set, or norms of a parameter that two layers share.
            RuntimeError: the hooks are not attached. Later, in the backward pass: a layer's input has no batch axis, or a
                layer is used twice and norms were asked.
        """
        if not self._handles:
            raise RuntimeError(
                "start: the hooks are not in place; call attach(), or use the recorder in a with statement"
            )
        if not (targets or norms or gram):
            raise ValueError("start: nothing to record; set targets, norms or gram")
        if targets and not self._targets:
            raise ValueError("start: targets=True, but there are none; call set_targets() first")
        if self._tied and (norms or gram):
            name, owners = next(iter(self._tied.items()))
            raise ValueError(
                f"start: no norms of {name}, tied between {' and '.join(owners)}; exclude it with layers="
            )
        parameter = next(iter(self.covered.values()))
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        zeros = partial(torch.zeros, dtype=dtype, device=parameter.device)
        self.dots = zeros(batch_size, self._count) if targets else None
        self.squared_norms = zeros(batch_size) if norms else None
        self.gram = zeros(batch_size, batch_size) if gram else None
        self.recorded = set()
        self._pass = _Pass(batch_size)

    def stop(self) -> None:
        """Disarm the hooks; what was recorded stays."""
        self._pass = None

    def _see(self, layer: _Layer, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        if self._pass is None or not output.requires_grad:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        shared = isinstance(module, nn.Embedding) and len(output) == 1
        examples = self._pass.batch_size if shared else None
        return _Tap.apply(output, x.detach() if "weight" in layer.names else None, examples, self, layer, self._pass)

    @torch.no_grad()
    def _record(self, layer: _Layer, x: Tensor | None, y: Tensor) -> None:
        batch, module = self._pass.batch_size, layer.module
        # Tokens can be flattened into the first axis; ids cannot, as ids without a batch axis are more likely positions.
        fits = len(y) == batch or (len(y) % batch == 0 and (batch == 1 or not isinstance(module, nn.Embedding)))
        if y.dim() < 2 or not fits:
            raise RuntimeError(
                f"{layer.name}: its output {tuple(y.shape)} has no axis of batch_size={batch} examples; exclude it with layers="
            )
        for local, gradients in layer.rule(module, x, y, batch, set(layer.names)).items():
            name = layer.names[local]
            if self.dots is not None:
                dots = gradients.dots(self._targets[name], self.form_gradients)
                self.dots += dots.to(self.dots)
            if self.gram is not None or self.squared_norms is not None:
                if name in self.recorded:
                    raise RuntimeError(
                        f"{layer.name}: used a second time since start(), so its norms need cross terms; exclude it with "
                        "layers=, or call start() before every pass"
                    )
                self._record_norms(gradients)
            self.recorded.add(name)

    def _record_norms(self, gradients: PerExampleGradients) -> None:
        if self.gram is None:
            self.squared_norms += gradients.squared_norms().to(self.squared_norms)
            return
        gram = gradients.gram().to(self.gram)
        self.gram += gram
        if self.squared_norms is not None:
            self.squared_norms += gram.diagonal()


@dataclass(frozen=True)
class _Layer:
    name: str
    module: nn.Module
    rule: Rule
    names: dict[str, str]  # "weight" and "bias" -> the covered parameter's full name


@dataclass(frozen=True, eq=False)
class _Pass:
    """What lies between one start and its stop: a graph that was built in another is not recorded."""

    batch_size: int


class _Tap(torch.autograd.Function):
    """Identity on a layer's output that remembers the layer's input and, in the backward pass, hands both over.

    `save_for_backward`, and not the hook's closure, keeps x: so activation checkpointing can drop and recompute it, and
    a recomputation, which runs the hooks again, leaves no second record. A single row of embeddings that all examples
    share is expanded, so that every example's part of the gradient arrives before they are summed, as broadcasting would.
    """

    @staticmethod
    def forward(ctx, output, x, examples, recorder, layer, current):
        ctx.save_for_backward(x)
        ctx.examples, ctx.recorder, ctx.layer, ctx.current = examples, recorder, layer, current
        if examples is not None:
            output = output.expand(examples, *output.shape[1:])
        # An alias with the output's version counter, but not a view: views from a Function forbid ReLU(inplace=True)
        return output.detach()

    @staticmethod
    def backward(ctx, y):
        if ctx.recorder._pass is ctx.current:
            (x,) = ctx.saved_tensors
            ctx.recorder._record(ctx.layer, x, y)
        return y if ctx.examples is None else y.sum(0, keepdim=True), None, None, None, None, None


def _survey(
    model: nn.Module, patterns: Sequence[str] | None
) -> tuple[list[_Layer], dict[str, nn.Parameter], dict[str, str], dict[str, list[str]]]:
    """The layers to hook; covered and uncovered parameters; and the covered ones that several modules own."""
    modules = dict(model.named_modules())
    for pattern in patterns or []:
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise ValueError(f"layers: {pattern!r} matches no module; they are named like {list(modules)[-1]!r}")
    owners: dict[int, list[tuple[str, str]]] = {}
    for module_name, module in modules.items():
        for local, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module_name, local))

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
    layers = [_Layer(owner, modules[owner], rule_for(modules[owner]), names) for owner, names in seen.items()]
    return layers, covered, uncovered, tied


def _refusal(module_name: str, module: nn.Module, local: str, patterns: Sequence[str] | None) -> str | None:
    if patterns is not None and not any(fnmatchcase(module_name, pattern) for pattern in patterns):
        return "excluded by layers="
    if "experts" in module_name.split("."):  # it gets some of the tokens, without their examples
        return "an expert of a mixture does not see whole examples"
    rule = rule_for(module)
    if isinstance(rule, str):
        return rule
    return None if local in ("weight", "bias") else f"unsupported parameter of layer type '{type(module).__name__}'"
