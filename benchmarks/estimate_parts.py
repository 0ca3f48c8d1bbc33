"""The parts of memory that `hf-unlearn estimate` adds up, beside what the same run then held at most: a Llama that unlearns by NPO, at three sizes.

    python benchmarks/estimate_parts.py [--quick]

One process, one thread, float32 on the CPU; weights, original, gradients, AdamW's moments, activations. Measured is the most that the process held
(VmHWM) above what it held before the run began, of a run of its own after the estimate; glibc gives back at once what is freed
(MALLOC_MMAP_THRESHOLD_). The first size is run once before, or what is imported on the way would count.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from growth import MARK, texts
from rows import high_water, keep
from shapes import SHORT, llama, sizes, words

from hf_unlearn import cli
from hf_unlearn.jobs import watching


RESULTS = Path(__file__).parent / "results" / "estimate_parts.json"
TIMES = (16, 36, 64)  # times 1 M parameters, about
STEPS = 4


def said(*command: str) -> dict:
    """What a command says to machines."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        if cli.main([*command, "--json"]):
            sys.exit(f"{' '.join(command)}: failed")
    return json.loads(out.getvalue().splitlines()[-1])


def compared(times: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        size = sizes(times)
        model = llama(size)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        for part in (model, words(size["vocab_size"])):
            part.save_pretrained(f"{folder}/model")
        del model, part
        texts(16).save_to_disk(f"{folder}/rows")
        run = [
            "npo_sft", "--model", f"{folder}/model", "--forget_dataset", f"{folder}/rows", "--max_length", str(SHORT), "--use_cpu", "true",
            "--bf16", "false", "--gradient_checkpointing", "false", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1",
            "--max_steps", str(STEPS), "--save_strategy", "no", "--disable_tqdm", "true", "--dataloader_pin_memory", "false",
            "--output_dir", f"{folder}/out", "--replay_weight", "0", "--guard", "false",
        ]  # fmt: skip
        parts = said("estimate", *run)["estimate"]["memory_parts"]
        before = high_water(begin=True)
        said("unlearn", *run)
        peak = high_water() - before
    return {"times": times, "parameters": parameters, "parts": parts, "measured_mb": round(peak, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny size; writes nothing")
    given = parser.parse_args()
    if MARK not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {MARK: "65536", "OMP_NUM_THREADS": "1"})
    torch.set_num_threads(1)
    watching.MIN_SECONDS = 0.0  # no time is asked for
    compared(1)
    for times in (1,) if given.quick else TIMES:
        row = compared(times)
        total = sum(row["parts"].values()) / 2**20
        print(json.dumps(row), f"parts {total:.0f} MB, ratio {total / row['measured_mb']:.2f}", flush=True)
        if not given.quick:
            keep(RESULTS, [row], ("times",), torch=torch.__version__)


if __name__ == "__main__":
    main()
