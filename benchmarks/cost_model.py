"""What a step costs on GPUs, on paper: memory, bytes between them, seconds; and where the constants are from.

Counted of each shape, without memory (`shapes.py`): parameters, operations of both passes, bytes that autograd keeps. Measured here (`growth.py`), at three
sizes: how many operations a method's step has beside plain training, and the slope of memory, and of time, on what is counted. Assumed: a GPU's data
sheet, and how much of its operations is reached. So what is said of GPUs are predictions, which `gpu.py` is there to check.

A step of n examples, F and B operations of a forward and a backward pass, r the method's operations by those of plain training on n examples:

    memory   = copies + slope · (n · kept + loss) + gathered
    compute  = r · n · (F + B) / (rate · utilisation)
    passing  = 48 bytes · trained / (bandwidth · efficiency)         clipping and AdamW read and write weights, gradients and moments
    network  = bytes between GPUs / the slowest link
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls


# Data sheet of an H200 SXM: operations a second in bf16 without sparsity, bytes a second of its memory, bytes of it, bytes a second of one direction to
# another GPU of the machine, and to one of another machine by 400 Gbit/s.
RATE, BANDWIDTH, CAPACITY, INSIDE, OUTSIDE = 989e12, 4.8e12, 141e9, 450e9, 50e9
A_MACHINE = 8
ASSUMED = (
    0.4  # share of the operations that is reached: 38 to 43 % in Llama 3's own training on H100s (arXiv 2407.21783)
)
GPUS = (1, 8, 64)
TOUCHED = (
    48  # bytes a trained parameter in float32: norm and clipping 12, AdamW 28, gradient written and set to none 8
)
GB = 1e9


@dataclass(frozen=True)
class Fit:
    """Constants, and how far off they are.

    Attributes:
        constants (`tuple[float, ...]`): one for each thing that is counted.
        errors (`tuple[float, ...]`): predicted by measured, less 1, row by row.
    """

    constants: tuple[float, ...]
    errors: tuple[float, ...]

    @property
    def worst(self) -> float:
        return max(map(abs, self.errors))


def fit(measured: Sequence[float], *counted: Sequence[float]) -> Fit:
    """`measured = Σ constant · counted`, by least squares of relative errors, no constant below zero."""
    shares = np.array(counted, dtype=float).T / np.array(measured, dtype=float)[:, None]
    constants, _ = nnls(shares, np.ones(len(shares)))
    return Fit(tuple(constants.tolist()), tuple((shares @ constants - 1).tolist()))


# The constants that are measured

COPIES = {  # beside weights, gradients and two moments, in parameters: what a method holds of the trained ones
    "plain, 2 texts": 0, "plain, 6 texts": 0, "npo, 2 + 4 texts": 1, "redirect, 2 + 4 texts": 0, "f-INE, 2 texts": 1,
}  # fmt: skip
TEXTS = {name: 2 if name in ("plain, 2 texts", "f-INE, 2 texts") else 6 for name in COPIES}


def along_parameters(growth: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in growth["rows"] if row["along"] == "parameters"]


def counted_bytes(row: dict[str, Any], shapes: dict[str, Any]) -> float:
    """Of a row of `growth.py`: four copies of the parameters in float32, what the method holds, what autograd keeps."""
    shape = shapes[f"Llama × {row['times']}"]
    return 4 * (4 + COPIES[row["part"]]) * row["parameters"] + TEXTS[row["part"]] * shape["kept"]


def memory_fit(growth: dict[str, Any], shapes: dict[str, Any]) -> Fit:
    """Bytes a byte that is counted."""
    rows = along_parameters(growth)
    return fit([row["mb"] * 2**20 for row in rows], [counted_bytes(row, shapes) for row in rows])


def time_fit(growth: dict[str, Any]) -> Fit:
    """Seconds an operation, a parameter, and a step, whatever its size."""
    rows = along_parameters(growth)
    seconds, operations, parameters = ([row[name] for row in rows] for name in ("seconds", "operations", "parameters"))
    return fit(seconds, operations, parameters, [1.0] * len(rows))


def operations_by_plain(growth: dict[str, Any], part: str, plain: str, times: int = 16) -> float:
    """Operations of a method's step by those of plain training on the forget rows alone."""
    found = {(row["part"], row["times"]): row["operations"] for row in growth["rows"] if "operations" in row}
    return found[part, times] / found[plain, times]


def used(growth: dict[str, Any]) -> tuple[float, float]:
    """Shares of its own best product, and of its own best copy, that a step gets out of this machine; at most one."""
    machine = next(row for row in growth["rows"] if row["part"] == "products")
    operation, parameter, _ = time_fit(growth).constants
    utilisation = 1 / operation / machine["operations_a_second"] if operation else 1.0
    efficiency = TOUCHED / parameter / machine["bytes_a_second"] if parameter else 1.0
    return min(1.0, utilisation), min(1.0, efficiency)


# Predictions


@dataclass(frozen=True)
class Case:
    """A run of a method on a shape.

    Attributes:
        name, shape (`str`): for the reader, and of the counted one.
        examples (`int`): forget examples of a GPU and step.
        trained_on (`int`): examples of which activations are kept at once.
        operations (`float`): of a step by those of plain training on `examples`.
        weight_bytes (`int`): of a weight.
        sharded (`bool`): FSDP2, else every GPU holds all (DDP).
        copies (`int`): of the trained parameters beside weights, gradients and moments.
        forwards (`int`): passes of the frozen original that a step makes.
        loss_bytes (`float`): of an example, for logits and their gradient.
        checkpointed (`bool`): whether activations are computed again.
    """

    name: str
    shape: str
    examples: int
    trained_on: int
    operations: float
    weight_bytes: int
    sharded: bool
    copies: int
    forwards: int
    loss_bytes: float = 0.0
    checkpointed: bool = True


def predicted(
    case: Case, shape: dict[str, Any], gpus: int, memory: Fit, shares: tuple[float, float]
) -> dict[str, float]:
    """A step's memory on each GPU, bytes that each sends, and seconds by where they go.

    Args:
        case ([`Case`]): what runs.
        shape (`dict`): what was counted of its model.
        gpus (`int`): how many; machines have eight.
        memory ([`Fit`]): slope of memory on what is counted.
        shares (`tuple[float, float]`): of the data sheet's operations and bandwidth that are reached.
    """
    parameters, trained = shape["parameters"], shape["trained"]
    frozen = parameters - trained
    weights = case.weight_bytes * frozen + 4 * trained  # what is trained is in float32
    states = 4 * trained * (3 + case.copies)  # gradients, moments, copies
    split = gpus if case.sharded else 1
    layer = 2 * weights / shape["layers"] if split > 1 else 0.0  # gathered: this one, and the next
    kept, backward = shape["kept"], shape["backward"]
    if case.checkpointed:  # what is kept between blocks, and one block that is computed again
        kept = shape["kept_again"] + (shape["kept"] - shape["kept_again"]) / shape["layers"]
        backward = shape["again"]
    held = (weights + states) / split + layer + case.trained_on * (kept + case.loss_bytes)
    passes = shape["forward"] + backward
    link = INSIDE if gpus <= A_MACHINE else OUTSIDE
    sent = 0.0
    if gpus > 1:
        gathers = weights * (2 + case.forwards) if case.sharded else 0.0
        reduced = 4 * trained * (1 if case.sharded else 2)
        sent = (gpus - 1) / gpus * (gathers + reduced)
    utilisation, efficiency = shares
    compute = case.operations * case.examples * passes / (RATE * utilisation)
    passing = TOUCHED * trained / split / (BANDWIDTH * efficiency)
    network = sent / link
    return {
        "memory": memory.constants[0] * held,
        "sent": sent,
        "compute": compute,
        "passing": passing,
        "network": network,
        "seconds": compute + passing + network,
        "at_best": max(compute, network) + passing,
    }
