"""docs/scaling.md: what growth.py, estimate_parts.py and gpu.py measured, and what the cost model says of GPUs."""

from __future__ import annotations

import math
from typing import Any

from cost_model import (
    A_MACHINE,
    ASSUMED,
    BANDWIDTH,
    CAPACITY,
    GB,
    GPUS,
    INSIDE,
    OUTSIDE,
    RATE,
    TOUCHED,
    Case,
    along_parameters,
    counted_bytes,
    memory_fit,
    operations_by_plain,
    predicted,
    time_fit,
    used,
)


UNITS = {"rows": "rows", "parameters": "parameters", "targets": "targets", "concepts": "concepts"}
NOTES = {
    "f-INE: records": "shards of 20,000 rows",
    "influence: index": "shards of 1 MB",
    "PBU: a step": "memory with its data, which are made there",
    "metric: accuracy": "summed over batches",
    "metric: Fréchet distance": "holds all features",
}


def exponent(first: float, last: float, times: float) -> float:
    return math.log(max(last, 1e-9) / max(first, 1e-9)) / math.log(times)


def slope_of(values: list[float], times: list[int]) -> float:
    """Of the logarithms, by least squares."""
    xs, ys = [math.log(time) for time in times], [math.log(max(value, 1e-9)) for value in values]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)


def growth_table(growth: dict[str, Any]) -> str:
    lines = [
        "| part | along | × 1 is | processor seconds × 1 / × 4 / × 16 | exponent (all; larger two) | MB × 1 / × 4 / × 16 | exponent (all; larger two) |",
        "|---|---|---|---|---|---|---|",
    ]
    parts: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in growth["rows"]:
        parts.setdefault((row["along"], row["part"]), []).append(row)
    for (along, part), rows in sorted(parts.items(), key=lambda item: [*UNITS, "once"].index(item[0][0])):
        rows = sorted(rows, key=lambda row: row["times"])
        times = [row["times"] for row in rows]
        if along == "once" or len(rows) < 3:
            continue
        cells = []
        for name, form in (("seconds", "{:.2g}"), ("mb", "{:.0f}")):
            values = [row[name] for row in rows]
            cells.append(" / ".join(form.format(value) for value in values))
            if name == "mb" and max(values) < 2:
                cells.append("—")
            else:
                last = exponent(values[-2], values[-1], times[-1] / times[-2])
                cells.append(f"{slope_of(values, times):.2f}; {last:.2f}")
        note = f" ({NOTES[part]})" if NOTES.get(part) else ""
        size = rows[0].get("parameters", rows[0]["size"]) if along == "parameters" else rows[0]["size"]
        lines.append(f"| {part}{note} | {UNITS[along]} | {size:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def estimate_table(found: dict[str, Any]) -> str:
    names = list(found["rows"][0]["parts"])
    lines = [
        "| parameters | " + " | ".join(names) + " | sum | measured peak | sum / measured |",
        "|" + "---|" * (len(names) + 4),
    ]
    for row in found["rows"]:
        sizes = [row["parts"][name] / 2**20 for name in names]
        cells = [
            f"{row['parameters'] / 1e6:.0f} M",
            *(f"{size:.0f}" for size in sizes),
            f"{sum(sizes):.0f}",
            f"{row['measured_mb']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + f" | {sum(sizes) / row['measured_mb']:.2f} |")
    return "\n".join(lines)


def fit_table(growth: dict[str, Any], shapes: dict[str, Any]) -> str:
    memory, time = memory_fit(growth, shapes), time_fit(growth)
    lines = [
        "| step | parameters | operations | memory counted, MB | measured | predicted, less 1 | processor seconds | predicted, less 1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, of_memory, of_time in zip(along_parameters(growth), memory.errors, time.errors, strict=True):
        lines.append(
            f"| {row['part']} | {row['parameters'] / 1e6:.1f} M | {row['operations'] / 1e9:.1f} G | {counted_bytes(row, shapes) / 2**20:.0f} | {row['mb']:.0f} | "
            f"{100 * of_memory:+.0f} % | {row['seconds']:.2f} | {100 * of_time:+.0f} % |"
        )
    return "\n".join(lines)


def cases(growth: dict[str, Any], influence: dict[str, Any]) -> list[Case]:
    """What is predicted."""
    vocabulary, tokens = 128256, 2048
    logits = 2 * 4 * vocabulary * tokens  # of a text in float32, and their gradient
    texts = {
        name: operations_by_plain(growth, f"{name}, 2 + 4 texts", "plain, 2 texts") for name in ("redirect", "npo")
    }
    seen = influence["training"]["rows"]["LoRA: all layers"]
    looking = seen["seeing"]["median"] + seen["look_in_steps"] / 10  # a look every ten steps, the default
    denoising = {
        weights: operations_by_plain(growth, f"VDU, {weights}", f"plain, 1 batch, {weights}", 1)
        for weights in ("all", "cross_attention")
    }
    found = [
        Case("Llama 8B, LoRA: plain SFT", "Llama 8B, LoRA", 1, 1, 1.0, 2, False, 0, 0, logits),
        Case("Llama 8B, LoRA: f-INE", "Llama 8B, LoRA", 1, 1, looking, 2, False, 1, 0, logits),
        Case("Llama 8B, LoRA: `redirect`", "Llama 8B, LoRA", 1, 3, texts["redirect"], 2, False, 0, 0, logits),
        Case("Llama 8B, full: plain SFT", "Llama 8B, full", 1, 1, 1.0, 4, True, 0, 0, logits),
        Case("Llama 8B, full: `redirect`", "Llama 8B, full", 1, 3, texts["redirect"], 4, True, 0, 0, logits),
        Case("Llama 8B, full: `npo`", "Llama 8B, full", 1, 3, texts["npo"], 4, True, 1, 1, logits),
    ]
    for shape, title, batch in (("sd15", "SD 1.5", 4), ("sdxl", "SDXL", 2)):
        for weights, word in (("cross_attention", "cross-attention"), ("all", "all weights")):
            what = f"{shape}, {weights}"
            found.append(Case(f"{title}, {word}: plain", what, batch, batch, 1.0, 4, False, 0, 0, 0.0, False))
            found.append(
                Case(f"{title}, {word}: VDU", what, batch, 4 * batch, denoising[weights], 4, False, 1, 0, 0.0, False)
            )
    return found


def prediction_table(growth: dict[str, Any], shapes: dict[str, Any], influence: dict[str, Any]) -> str:
    memory, shares = memory_fit(growth, shapes), (ASSUMED, used(growth)[1])
    lines = [
        "| a step (prediction) | GPUs | GB a GPU | GB sent by each | seconds | of which compute / passing over weights / network | "
        "with the network behind compute |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases(growth, influence):
        for gpus in GPUS:
            said = predicted(case, shapes[case.shape], gpus, memory, shares)
            parts = [f"{100 * (said[name] / said['seconds']):.0f} %" for name in ("compute", "passing", "network")]
            over = said["memory"] / CAPACITY
            room = " (does not fit)" if over > 1 else " (may not fit)" if over * (1 + memory.worst) > 1 else ""
            lines.append(
                f"| {case.name} | {gpus} | {said['memory'] / GB:.0f}{room} | {said['sent'] / GB:.2g} | {said['seconds']:.2g} | {' / '.join(parts)} | {said['at_best']:.2g} |"
            )
    return "\n".join(lines)


def shape_table(shapes: dict[str, Any]) -> str:
    lines = [
        "| shape | parameters | trained | an example | operations forward / backward / backward with checkpointing | kept for backward, GB / with checkpointing |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in shapes.items():
        operations = " / ".join(f"{row[part] / 1e12:.3g} T" for part in ("forward", "backward", "again"))
        kept = " / ".join(f"{row[part] / GB:.2g}" for part in ("kept", "kept_again"))
        lines.append(
            f"| {name} | {row['parameters'] / 1e6:,.0f} M | {row['trained'] / 1e6:,.1f} M | {row['examples']} | {operations} | {kept} |"
        )
    return "\n".join(lines)


PREDICTED = {  # row of gpu.py: the case
    ("Llama 8B, LoRA", "plain, 1 text"): "Llama 8B, LoRA: plain SFT",
    ("Llama 8B, LoRA", "f-INE, 1 text"): "Llama 8B, LoRA: f-INE",
    ("Llama 8B, LoRA", "UnlearnSFT, 1 + 2 texts, redirect"): "Llama 8B, LoRA: `redirect`",
    **{
        (f"{shape}, {weights}", row): f"{title}, {word}: {what}"
        for shape, title in (("sd15", "SD 1.5"), ("sdxl", "SDXL"))
        for weights, word in (("cross_attention", "cross-attention"), ("all", "all weights"))
        for row, what in (("plain, 1 batch", "plain"), ("VDU", "VDU"))
    },
}


def gpu_table(found: dict[str, Any], growth: dict[str, Any], shapes: dict[str, Any], influence: dict[str, Any]) -> str:
    memory, shares = memory_fit(growth, shapes), (ASSUMED, used(growth)[1])
    known = {case.name: predicted(case, shapes[case.shape], 1, memory, shares) for case in cases(growth, influence)}
    lines = [
        "| part | row | seconds a step | predicted | GB in steps | predicted | GB in the run | |",
        "|" + "---|" * 8,
    ]
    for row in found["rows"]:
        said, case = (
            row.get("failed") or row.get("left_out") or "",
            known.get(PREDICTED.get((row["part"], row["name"]))),
        )
        cells = [f"{row['seconds']:.3g}" if "seconds" in row else "—", f"{case['seconds']:.2g}" if case else "—"]
        cells += [
            f"{row['step_mb'] * 2**20 / GB:.1f}" if "step_mb" in row else "—",
            f"{case['memory'] / GB:.0f}" if case else "—",
        ]
        cells.append(f"{row['run_mb'] * 2**20 / GB:.1f}" if "run_mb" in row else "—")
        lines.append(f"| {row['part']} | {row['name']} | {' | '.join(cells)} | {said} |")
    return "\n".join(lines)


def render(
    growth: dict[str, Any],
    shapes: dict[str, Any],
    influence: dict[str, Any],
    estimates: dict[str, Any] | None,
    gpu: dict[str, Any] | None,
) -> str:
    memory, time, (utilisation, efficiency) = memory_fit(growth, shapes), time_fit(growth), used(growth)
    apart = (
        ""
        if time.constants[1]
        else " What passing over parameters takes was not told apart: the whole bandwidth is assumed."
    )
    parts = [
        f"""# Scaling

How cost grows, measured on a CPU; and what it would be on GPUs, **predicted**, beside which a run of `benchmarks/gpu.py` can be put. Written by
`python benchmarks/report.py` from `benchmarks/results/*.json`.

## How time and memory grow

`python benchmarks/growth.py`: one process, one thread, torch {growth["torch"]}. Many other programs ran on the machine: time is the processor's, of one or two
repeats only, and exponents of time are rough; memory is the most that the process held above what it held before, which has a grain of some MB.
Of steps of trainers, time is one step, memory the whole run from making the model on.

{growth_table(growth)}

An exponent of memory near 0 along rows is a part through which data stream. `FAST` keeps marks and a sample of the unmarked; an index writes its rows as
they come; records are written in shards; the Fréchet distance holds the features of all images, 8 bytes a number, and grows with them.
"""
    ]
    if estimates:
        parts.append(f"""## What `hf-unlearn estimate` says of memory

`python benchmarks/estimate_parts.py`: MB by part, and the most that a run of the same recipe then held above what the process held before (NPO, a Llama in float32).
Activations are what a step holds at its peak beside the gradients: of few texts they are gone when the last gradient is there.

{estimate_table(estimates)}
""")
    parts.append(f"""## The cost model

Counted on tensors without memory (`python benchmarks/shapes.py`), an example each:

{shape_table(shapes)}

The model is `benchmarks/cost_model.py`. For a step on n examples, with the operations F and B of both passes:

- **memory** = slope · (copies of the parameters + what autograd keeps). Copies: a frozen weight 4 bytes, 2 under a LoRA in bf16; a trained one 16 (weight, gradient, AdamW's
  moments), and 4 more where a method holds the original's value or a target's gradient. With FSDP2 all but the gathered layers is divided by the number of GPUs.
- **compute** = r · n · (F + B) / (rate · utilisation), r the operations of the method's step by those of plain training on the forget rows, as they were counted in `growth.py`; of f-INE, which looks at a LoRA's layers alone, its
  time by that of stock training under a LoRA ([measured](benchmarks/influence.md)).
- **passing over weights** = {TOUCHED} bytes · trained parameters / (bandwidth · efficiency): clipping and AdamW.
- **network**: DDP reduces the gradients once; FSDP2 gathers the weights for each pass, and scatters the gradients.

Its constants, fitted by least squares of relative errors on the steps of the table below, three sizes of five steps: the slope of memory is {memory.constants[0]:.2f}
(worst error {100 * memory.worst:.0f} %); a step takes {time.constants[0] * 1e9:.3g} s for each 10⁹ operations, {time.constants[1] * 1e9:.2g} s for each 10⁹ parameters and {time.constants[2]:.2g} s besides
(worst error {100 * time.worst:.0f} %).
That is {100 * utilisation:.0f} % of the operations and {100 * efficiency:.0f} % of the bytes a second that this processor's best product and copy reach.{apart}

{fit_table(growth, shapes)}

## Predictions for GPUs

**Nothing in this table was measured on a GPU.** Data sheet of an H200: {RATE / 1e12:.0f} T operations a second in bf16, {BANDWIDTH / 1e12:.1f} TB/s, {CAPACITY / GB:.0f} GB; {INSIDE / GB:.0f} GB/s to the {A_MACHINE - 1}
others of a machine, {OUTSIDE / GB:.0f} GB/s to another machine. {100 * ASSUMED:.0f} % of the operations are assumed to be reached, as Llama 3
405B's training did on H100s (38 to 43 %, [arXiv 2407.21783](https://arxiv.org/abs/2407.21783)), and of the bandwidth the share above: the weakest assumptions, by which seconds may be
off by a factor of two. Memory may be off by the error above and by what kernels and the allocator hold besides. Each GPU takes one text of 2,048 tokens to forget and two to keep, or 4 (SDXL: 2)
latents to forget and as many to keep; activation checkpointing for the Llama. LoRA and U-Nets run under DDP, a whole Llama under FSDP2.

{prediction_table(growth, shapes, influence)}

Before the first step of a run under FSDP2 each GPU holds the whole model and its original once, 8 bytes a parameter ([why](many_processes.md#processes-that-share-the-parameters)):
{8 * shapes["Llama 8B, full"]["parameters"] / GB:.0f} GB for a Llama 8B in float32, whatever the number of GPUs.
""")
    if gpu:
        parts.append(f"""## Measured on a GPU

`python benchmarks/gpu.py`:

{gpu_table(gpu, growth, shapes, influence)}
""")
    else:
        parts.append("""## Measured on a GPU

Nothing yet. `python benchmarks/gpu.py` answers in one run of eight minutes: Llama 3.1 8B with LoRA, f-INE and unlearning beside plain SFT; Stable Diffusion 1.5 and SDXL, VDU beside plain training;
CLIP ViT-L/14 as a filter on 1,000 images. Tests run it with tiny models on the CPU.
""")
    return "\n".join(parts)
