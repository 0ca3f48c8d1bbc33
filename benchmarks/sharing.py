"""Memory of a process that unlearns: alone, and one of two that hold all parameters each (DDP) or share them (FSDP2).

    python benchmarks/sharing.py [--quick]

Processes of this machine's CPU, one thread each, over gloo. A Llama with random weights learns away random texts by NPO, with the original's answers and an
isotropic anchor: weights, original, gradients and AdamW's two moments, in float32. Memory is the most that a process held (VmHWM) above what it
held before the model was made, as a multiple of the weights; of two the larger. glibc gives back at once what is freed (MALLOC_MMAP_THRESHOLD_). How accelerate is
brought to share on a CPU is a matter of the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rows import by_line, high_water, rounded, save


HERE = Path(__file__).parent
RESULTS = HERE / "results" / "sharing.json"
SIZES = {"full": (512, 8), "quick": (64, 2)}  # width, layers
WAYS = {"one process": (1, False), "two, DDP": (2, False), "two, FSDP2": (2, True)}
ROWS, TOKENS, WORDS, STEPS = 8, 32, 4096, 3


def one(folder: Path, size: str, shared: bool) -> None:
    """A process's run; leaves what it held."""
    import torch
    from sharded import environment, told_of_accelerators
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_unlearn import UnlearnConfig, UnlearnTrainer

    torch.set_num_threads(1)
    width, layers = SIZES[size]
    rank = int(os.environ.get("RANK", 0))
    settings = {
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "guard": False,
    }
    settings |= {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "forget_loss": "npo",
        "isotropic_weight": 0.1,
        "forget": "examples",
    }
    with environment("LlamaDecoderLayer") if shared else tempfile.TemporaryDirectory():
        args = UnlearnConfig(
            str(folder / "run"), use_cpu=True, replay_weight=0.0, dataloader_pin_memory=False, **settings
        )
        if shared:
            told_of_accelerators()
        from datasets import Dataset

        ids = torch.randint(3, WORDS, (ROWS, TOKENS)).tolist()
        rows = Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * TOKENS] * ROWS})
        before = high_water(begin=True)
        config = LlamaConfig(
            vocab_size=WORDS, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=8,
            num_key_value_heads=8, max_position_embeddings=TOKENS, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        weights = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
        trainer = UnlearnTrainer(model, args, forget_dataset=rows)
        trainer.train()
    held = {"weights": weights, "peak": high_water() - before}
    (folder / f"{rank}.json").write_text(json.dumps(held))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def measured(way: str, size: str) -> dict[str, float]:
    processes, shared = WAYS[way]
    contracts = HERE.parent / "tests" / "contracts"
    path = os.pathsep.join(map(str, [HERE, contracts, contracts.parent, os.environ.get("PYTHONPATH", HERE.parent)]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with tempfile.TemporaryDirectory() as folder:
        mine = [__file__, "--in", folder, "--size", size, *(["--shared"] if shared else [])]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        subprocess.run([sys.executable, *(launcher if processes > 1 else []), *mine], env=environment, check=True)
        found = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json"))]
    return {"processes": processes, "weights_mb": found[0]["weights"], "peak": max(row["peak"] / row["weights"] for row in found)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model; writes nothing")
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=SIZES, help=argparse.SUPPRESS)
    parser.add_argument("--shared", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.folder:
        one(asked.folder, asked.size, asked.shared)
        return
    found = {}
    for way in WAYS:
        found[way] = rounded(measured(way, "quick" if asked.quick else "full"))
        print(way, json.dumps(found[way]), flush=True)
    if not asked.quick:
        save(RESULTS, by_line(found))


if __name__ == "__main__":
    main()
