"""Per-example gradients as dot products and a Gram matrix, out of one ordinary backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object, reduce
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ...parameters.sharding import is_sharded, own, stacked, summed, whole
from .layers import Factors, PerExampleGradients, linear, mixes_examples
from .prompts import SharedPrompt, repeats_prompt
from .recomputed import recomputed
from .rows import FIRST, SHARED, Reached, Rows, rows_of
from .survey import Layer, survey
from .taps import Look, Pass, Seen, Tap
from .wanted import checked


Visitor = Callable[[Layer, Mapping[str, PerExampleGradients]], None]


class GhostRecorder:
    r"""Sees the gradient h_i of every example of a batch while the batch's loss is backwarded, without forming it:

    $$ \langle G_c, h_i\rangle = \sum_t y_{it} \cdot (G_c\, x_{it}), \qquad
       \langle h_i, h_j\rangle = \sum_{t,s} (y_{it} \cdot y_{js})\,(x_{it} \cdot x_{js}) $$

    for a linear layer with input x and output gradient y at positions t (the "ghost" products of In-Run Data Shapley,
    arXiv 2406.11011); other layers likewise, see [`~hf_unlearn.influence.in_run.layers.RULES`]. LoRA layers are linear. A layer
    of another kind runs again, example by example, if it has no parts with parameters of their own.

        recorder = GhostRecorder(model)
        with recorder:
            recorder.learn_rows(lambda: losses(model, batch), len(batch))  # leaves .grad behind
            recorder.set_targets({name: ... for name in recorder.covered})
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
    The Gram matrix works token by token as above, or forms one layer's gradients, or some of their rows, for a moment,
    whichever takes fewer operations. With `form_gradients` dots of several targets do so too where that is cheaper:
    with 8 targets and 40 positions a sixth of the operations.

    Where the batch is in a layer's output, [`learn_rows`] finds out, and gives up layers that compute what all examples
    share. Without it the batch is taken to be the first axis, alone or with positions (`[batch · positions, d]`). Whole forward
    and backward passes lie between `start` and `stop`.

    Args:
        model (`nn.Module`): not a wrapper such as DistributedDataParallel. What is trainable is looked at once, here.
        layers (`Sequence[str]`, *optional*): patterns (as of file names) of the names of the modules to see; `!pattern` takes
            modules out. Default all.
        form_gradients (`bool`, defaults to `True`): see above.

    Attributes:
        covered (`dict[str, nn.Parameter]`): trainable parameters that are seen, by their name in `named_parameters()`.
        matrices (`set[str]`): names of covered weights that only linear layers use: their targets may be factors.
        uncovered (`dict[str, str]`): names of the other trainable parameters, and why.
        recorded (`set[str]`): names of covered parameters that took part since `start`. One that has a gradient but is not
            here was used behind its layer's back, as a fused loss uses the head.
        learned (`int`): size of the largest batch that `learn_rows` has seen; 0 where it should look at the next one.
        dots (`Tensor`): ⟨G_c, h_i⟩, `[batch, C]`, after the backward pass. fp32, as the Gram matrix; fp64 for an fp64 model.
        gram (`Tensor`): ⟨h_i, h_j⟩, `[batch, batch]`.

    Raises:
        ValueError: a pattern in `layers` matches no module, or nothing trainable is left.
    """

    def __init__(self, model: nn.Module, *, layers: Sequence[str] | None = None, form_gradients: bool = True):
        self.form_gradients = form_gradients
        self.dots: Tensor | None = None
        self.gram: Tensor | None = None
        self.recorded: set[str] = set()
        self._model = model
        self._layers, self.covered, self.uncovered, self._tied = survey(model, layers)
        self._check_covered()
        self.learned = 0
        self._rows: dict[str, Rows] = {}
        self._expands = True
        self._targets: dict[str, Tensor | Factors] = {}
        self._count = 0
        self._visitor: Visitor | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle | SharedPrompt] = []
        self._pass: Pass | None = None

    @property
    def matrices(self) -> set[str]:
        others = {name for layer in self._layers if layer.rule is not linear for name in layer.names.values()}
        linears = {layer.names.get("weight") for layer in self._layers if layer.rule is linear}
        return linears & self.covered.keys() - others

    @property
    def mixes_examples(self) -> list[str]:
        """Names of the BatchNorm layers in train mode. With them h_i is a share of the batch's gradient, and not the
        gradient that the example would have alone.
        """
        return [name for name, module in self._model.named_modules() if mixes_examples(module)]

    @property
    def tied(self) -> dict[str, list[str]]:
        """Covered parameters that several layers share, with the layers. The Gram matrix is refused with them."""
        return self._tied

    def attach(self) -> None:
        """Hook the layers. Until `start` the hooks do nothing."""
        self.detach()
        for layer in self._layers:
            hook = partial(self._see, layer)
            # Before those of FSDP2, which gathers a layer's parameters again when the gradient of what came out of them arrives.
            self._handles.append(layer.module.register_forward_hook(hook, with_kwargs=True, prepend=True))
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
        self._targets, self._count = checked(gradients, self.covered, self.matrices)

    def share(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """From now on processes share the model's parameters (FSDP2), each of which sees the examples of its own batches.

        Targets may then be shared as they are: what a layer needs of them is gathered while it is there. All processes call what runs the model
        together, with as many examples or with others.

        Args:
            parameters (`Mapping[str, nn.Parameter]`): the model's own by name, as they are shared.
        """
        self.covered = {name: parameters[name] for name in self.covered}

    def clear_targets(self) -> None:
        """Let go of the targets, to have room for the next ones."""
        self._targets, self._count = {}, 0

    def learn_rows(self, losses: Callable[[], Tensor], batch_size: int, examples: Sequence[int] | None = None) -> None:
        """Find out from a batch where each layer has its examples, by a backward pass of one example's loss, then of another's.

        Layers that no example has for itself, those that have to run again and cannot, and parameters whose gradient is not what
        their layer's products say are not covered any more. A layer that no gradient arrives at stays as it is. The passes
        replace `.grad`, and BatchNorm must be in eval mode.

        Args:
            losses: runs the model on the batch and returns `[batch]` losses. Called three times, with the same random numbers.
            batch_size (`int`): examples in it.
            examples (`Sequence[int]`, *optional*): those with a loss to speak of, default all; the first and the last are taken.

        Raises:
            ValueError: nothing trainable is left.
            FloatingPointError: a gradient is not finite, so it does not tell where the examples are.
        """
        self._check_attached("learn_rows")
        chosen = range(batch_size) if examples is None else examples
        chosen = [chosen[0], chosen[-1]]  # also of one: processes that share a model pass as often as each other
        try:
            look = self._looked(losses, batch_size, chosen)
        except RuntimeError:
            if not self._expands:
                raise
            # What a shared row goes into may repeat it for every example itself: it is then not expanded here, and not seen.
            self._expands = False
            look = self._looked(losses, batch_size, chosen)
        self.learned = max(self.learned, batch_size)
        refused = {}
        for layer in self._layers:
            calls = [rows_of(seen, batch_size) for (name, _), seen in look.reached.items() if name == layer.name]
            found = set(calls) - {None}
            if SHARED in found:
                refused |= dict.fromkeys(layer.names.values(), SHARED)
            elif len(found) > 1:
                refused |= dict.fromkeys(layer.names.values(), "its examples are now on one axis, now on another")
            elif layer.rule is None and (layer.name in look.failed or found - {FIRST}):
                refused |= dict.fromkeys(
                    layer.names.values(), f"unsupported layer type '{type(layer.module).__name__}'"
                )
            elif found:
                self._rows[layer.name] = found.pop()
        self.give_up(self._refused_by_any(refused))
        self.give_up(self._refused_by_any(self._disagreeing(losses, batch_size, look)))

    def _refused_by_any(self, refused: dict[str, str]) -> dict[str, str]:
        """Of all processes that share the parameters: they gather the same targets."""
        if not is_sharded(self.covered.values()):
            return refused
        return {name: why for found in gather_object([refused]) for name, why in found.items()}

    def _looked(self, losses: Callable[[], Tensor], batch_size: int, examples: Sequence[int]) -> Look:
        look = Look()
        for look.example in examples:
            self._pass = Pass(batch_size, look)
            self._model.zero_grad()
            losses()[look.example].backward()
            gradients = [p.grad for p in self.covered.values() if p.grad is not None]
            wrong = sum((~own(gradient).isfinite()).any().float() for gradient in gradients)
            if gradients and summed(wrong, gradients[0]):
                raise FloatingPointError(
                    "train_dataset: a batch has a gradient that is not finite; look at its rows and at the model's weights"
                )
        self.stop()
        return look

    def _disagreeing(self, losses: Callable[[], Tensor], batch_size: int, look: Look) -> dict[str, str]:
        """Parameters of which autograd, whose gradients g of one example are in `.grad`, says another ⟨g, g⟩ than the layers do. Where processes share
        them, g is the mean over an example of each, and so are the products with it.
        """
        mean = {name: p.grad.detach().clone() for name, p in self.covered.items() if p.grad is not None}
        if not mean:
            return {}
        kept = self._targets, self._count
        self.set_targets({name: stacked([mean.get(name, torch.zeros_like(p))]) for name, p in self.covered.items()})
        self.start(batch_size, targets=True)
        self._pass.by_name = {}
        self._model.zero_grad()
        losses()[look.example].backward()
        found = self._pass.by_name
        self.stop()
        self._targets, self._count = kept
        parts = torch.stack([own(g).to(self.dots.dtype).square().sum() for g in mean.values()])
        squares = dict(zip(mean, summed(parts, next(iter(mean.values()))).tolist(), strict=True))
        if is_sharded(mean.values()):
            dots = reduce(parts.new_tensor([found.get(name, 0.0) for name in mean]), "mean")
            found = dict(zip(mean, dots.tolist(), strict=True))
        # What is nothing but rounding, as the gradient of a key's bias, agrees with nothing.
        loose = any(p.dtype.itemsize < 4 for p in mean.values()) or look.loose
        share, floor = (0.1, 1e-3) if loose else (1e-2, 1e-7)
        bound = floor * sum(squares.values())
        return {
            name: "it is used behind its layer's back"
            for name, square in squares.items()
            if abs(found.get(name, 0.0) - square) > share * square + bound or (square and name not in self.recorded)
        }

    def give_up(self, refused: Mapping[str, str]) -> None:
        """See parameters no more, by name, and why. One that another layer uses too is not seen there either.

        Raises:
            ValueError: nothing trainable is left.
        """
        if not refused:
            return
        self.uncovered |= refused
        self.covered = {name: p for name, p in self.covered.items() if name not in refused}
        self._tied = {name: owners for name, owners in self._tied.items() if name in self.covered}
        kept = [
            replace(layer, names={local: name for local, name in layer.names.items() if name in self.covered})
            for layer in self._layers
        ]
        self._layers = [layer for layer in kept if layer.names]
        self._check_covered()
        self.attach()

    def _check_covered(self) -> None:
        if not self.covered:
            raise ValueError(
                f"model: no trainable parameter is covered; the reasons are {set(self.uncovered.values())}; use "
                "observation='propagated', which sees all"
            )

    def _check_attached(self, what: str) -> None:
        if not self._handles:
            raise RuntimeError(
                f"{what}: the hooks are not in place; call attach(), or use the recorder in a with statement"
            )

    def start(
        self, batch_size: int, *, targets: bool = False, gram: bool = False, visitor: Visitor | None = None
    ) -> None:
        """Arm the hooks for the passes until `stop`, and reset what is recorded.

        Several passes over the same examples add up. That is exact for dots; products of a sum need cross terms, so with
        `gram` a layer that is used a second time raises.

        Args:
            batch_size (`int`): examples per batch.
            targets, gram (`bool`): what to record.
            visitor (callable, *optional*): is given each layer and its parameters' [`PerExampleGradients`] by their local name.

        Raises:
            ValueError: nothing to record, no targets set, or a Gram matrix of a parameter that two layers share.
            RuntimeError: the hooks are not attached. Later, in the backward pass: a layer's output has no batch axis, or a
                layer is used twice and the Gram matrix was asked for.
        """
        self._check_attached("start")
        if not (targets or gram or visitor):
            raise ValueError("start: nothing to record; set targets or gram")
        if targets and not self._targets:
            raise ValueError("start: targets=True, but there are none; call set_targets() first")
        if self._tied and gram:
            name, owners = next(iter(self._tied.items()))
            raise ValueError(
                f"start: no Gram matrix of {name}, tied between {' and '.join(owners)}; exclude it with layers=['!{owners[0]}']"
            )
        parameter = next(iter(self.covered.values()))
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        zeros = partial(torch.zeros, dtype=dtype, device=parameter.device)
        self.dots = zeros(batch_size, self._count) if targets else None
        self.gram = zeros(batch_size, batch_size) if gram else None
        self.recorded = set()
        self._pass, self._visitor = Pass(batch_size), visitor

    def stop(self) -> None:
        """Disarm the hooks; what was recorded stays."""
        self._pass = None

    def _see(self, layer: Layer, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """The forward hook: puts a tap behind the layer that will see the gradient of what it gave."""
        current = self._pass
        outputs = list(output) if type(output) is tuple else [output]
        places = [place for place, one in enumerate(outputs) if isinstance(one, Tensor) and one.requires_grad]
        if current is None or not places:
            return None
        shared = self._expands and isinstance(module, nn.Embedding) and len(outputs[0]) == 1
        number = current.calls[layer.name]
        current.calls[layer.name] += 1
        device = outputs[places[0]].device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        arguments, structure = [], None
        if layer.rule is None:  # it will run again, so it needs all that it was given
            arguments, structure = tree_flatten((args, kwargs))
        elif "weight" in layer.names:
            arguments = [args[0] if args else next(iter(kwargs.values()))]
        kept = [each.detach() for each in arguments if isinstance(each, Tensor)]
        plain = [None if isinstance(each, Tensor) else (each,) for each in arguments]
        seen = Seen(
            layer,
            current,
            number,
            len(outputs),
            places,
            current.batch_size if shared else None,
            plain,
            structure,
            autocast,
        )
        if current.look is not None:
            current.look.loose |= autocast is not None or outputs[places[0]].dtype.itemsize < 4
        if current.look is not None and layer.rule is None:
            given = [one.detach() if isinstance(one, Tensor) else one for one in outputs]
            if not seen.call(kept).repeats(module, given, current.batch_size):
                current.look.failed.add(layer.name)
        tapped = Tap.apply(self, seen, *(outputs[place] for place in places), *kept)
        for place, one in zip(places, tapped, strict=True):
            outputs[place] = one
        return tuple(outputs) if type(output) is tuple else outputs[0]

    def _gathered(self, name: str) -> Tensor | Factors:
        target = self._targets[name]
        return target if isinstance(target, tuple) else whole(target)

    @torch.no_grad()
    def _record(self, seen: Seen, kept: Sequence[Tensor], ys: Sequence[Tensor]) -> None:
        """The backward pass has arrived at a tap: add what its layer has to the products."""
        # y is the gradient of what was backwarded, a mean or a sum, so all products are with shares of that one gradient. Nothing
        # of it is kept: a layer's part is added to [batch, C] numbers while its x and y are there anyway.
        layer, batch, module = seen.layer, self._pass.batch_size, seen.layer.module
        y = ys[0]
        if (look := self._pass.look) is not None:
            look.reached.setdefault((layer.name, seen.number), []).append(
                Reached.by(y, look.example, layer.leading_axes(y))
            )
            return
        targets = {} if self.dots is None else {local: self._gathered(name) for local, name in layer.names.items()}
        if layer.name not in self._rows and self.learned:  # no gradient had arrived here
            if not any(one.any() for one in ys):
                self.recorded |= set(layer.names.values())
                return
            self.learned = 0  # to look again at the next batch
        rows = self._rows.get(layer.name, FIRST)
        axes = layer.leading_axes(y)
        # Tokens can be flattened into the first axis; ids cannot, as ids without a batch axis are more likely positions.
        positions = y.shape[rows.axis] // batch if axes > rows.axis else 0
        fits = positions and y.shape[rows.axis] == positions * batch
        if layer.name not in self._rows and isinstance(module, nn.Embedding):
            fits = fits and (positions == 1 or batch == 1)
        if not fits:
            raise RuntimeError(
                f"{layer.name}: its output {tuple(y.shape)} has no axis of batch_size={batch} examples; exclude it with "
                f"layers=['!{layer.name}']"
            )
        if layer.rule is None:
            by_output: list[Tensor | None] = [None] * seen.outputs
            for place, one in zip(seen.places, ys, strict=True):
                by_output[place] = one
            found = recomputed(module, seen.call(kept), by_output, batch, layer.names)
        else:
            x = kept[0] if kept else None
            if isinstance(module, nn.Embedding):  # ids of one row that all examples share, such as positions
                x = x.expand(y.shape[:-1])
            x, y = (None if value is None else rows.examples_first(value, batch) for value in (x, y))
            found = layer.rule(module, x, y, batch, set(layer.names))
        if self._visitor is not None:
            self._visitor(layer, found)
        for local, gradients in found.items():
            name = layer.names[local]
            if self.dots is not None:
                dots = gradients.dots(targets[local], self.form_gradients).to(self.dots)
                self.dots += dots
                if self._pass.by_name is not None:
                    self._pass.by_name[name] = self._pass.by_name.get(name, 0.0) + dots.sum().item()
            if self.gram is not None:
                if name in self.recorded:
                    raise RuntimeError(
                        f"{layer.name}: used a second time since start(), so its Gram matrix needs cross terms; exclude it with "
                        f"layers=['!{layer.name}'], or call start() before every pass"
                    )
                self.gram += gradients.gram().to(self.gram)
            self.recorded.add(name)
