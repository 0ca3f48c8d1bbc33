"""Two processes on CPU (gloo), started by torchrun, against one process with the same global batch."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from brute_force import same
from safetensors.torch import load_file

from hf_unlearn.influence.report.records import read_observations


# All runs of one launch, one after the other: what costs time is importing the libraries.
DRIVER = """
import gc, json, sys
from pathlib import Path

import torch
from brute_force import MLP, settings, vectors
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_unlearn.influence.trainer import InfluenceTrainer

torch.set_num_threads(1)
gc.freeze()  # every train() collects garbage
folder, processes = Path(sys.argv[1]), int(sys.argv[2])


def tokens(n, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, 50, (3 + 5 * row % 7,), generator=generator).tolist() for row in range(n)]
    return Dataset.from_dict({"id": [f"r{row}" for row in range(n)], "input_ids": rows})


def padded(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


def llama():
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.2, pad_token_id=0,
    ))


def run(name, kind="mlp", **changes):
    torch.manual_seed(0)
    if kind == "mlp":
        model, rows, targets, collate = MLP(), vectors(16), vectors(4, seed=1), None
    else:
        model, rows, targets, collate = llama(), tokens(16, 0), tokens(4, 1), padded
    if kind == "adapter":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian"))
    args = settings(folder / name, **({"per_device_train_batch_size": 4 // processes, "max_steps": 6} | changes))
    try:
        trainer = InfluenceTrainer(model, args, collate, rows, target_dataset={"a": targets, "b": targets.select([0])})
        trainer.train()
        error = None
        top = trainer.influence.top(3, "a")["sample_id"][:]
    except ValueError as raised:
        error, top = str(raised), None
    save_file({k: v.clone() for k, v in model.state_dict().items()}, folder / f"{name}-{args.process_index}.safetensors")
    (folder / f"{name}-{args.process_index}.json").write_text(json.dumps({"error": error, "top": top}))


run("sgd", max_grad_norm=0.3)
run("adam", optim="adamw_torch", learning_rate=1e-2, max_grad_norm=0.5, target_every=2, target_batch_size=2)
run("accumulated", per_device_train_batch_size=2 // processes, gradient_accumulation_steps=2)
run("tokens", "llama")
run("tokens accumulated", "llama", per_device_train_batch_size=2 // processes, gradient_accumulation_steps=2)
run("tokens of each", "llama", average_tokens_across_devices=False)
run("adapter", "adapter")
run("uneven", max_steps=-1, num_train_epochs=1, per_device_train_batch_size=6 // processes)
run("propagated", observation="propagated")
print("all done", flush=True)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of the two processes' runs, and of the one process's."""
    root = tmp_path_factory.mktemp("distributed")
    (root / "driver.py").write_text(DRIVER)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    folders = [root / "two", root / "one"]
    for folder in folders:
        folder.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(root / "driver.py"), str(folders[0]), "2"]
    # A process that waits for another for ever is what the time limit is for.
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, "\n".join(line for line in run.stderr.splitlines() if "rank0" in line)[-3000:]
    assert run.stdout.count("all done") == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["driver.py", str(folders[1]), "1"])
        runpy.run_path(str(root / "driver.py"))
    return folders


def end(folder, name, rank=0):
    return load_file(folder / f"{name}-{rank}.safetensors"), json.loads((folder / f"{name}-{rank}.json").read_text())


NAMES = ["sgd", "adam", "accumulated", "tokens", "tokens accumulated", "adapter"]


@pytest.mark.parametrize("name", NAMES)
def test_same_weights_and_records_as_one_process(name, runs):
    (two, notes), (one, expected_notes) = (end(folder, name) for folder in runs)
    assert same(two, end(runs[0], name, rank=1)[0])
    for key, value in one.items():
        np.testing.assert_allclose(two[key], value, rtol=1e-4, atol=1e-5, err_msg=key)
    assert notes["error"] is expected_notes["error"] is None
    seen, expected = (read_observations(folder / name / "_private" / "influence")[0] for folder in runs)
    assert expected.steps.step.tolist() == seen.steps.step.tolist() == list(range(6))
    order, expected_order = (np.lexsort((o.example, o.step)) for o in (seen, expected))
    for column in ("step", "example", "weight", "value"):
        first, second = getattr(seen, column)[order], getattr(expected, column)[expected_order]
        np.testing.assert_allclose(first, second, rtol=2e-3, atol=1e-4 * np.abs(second).max())
    for column in ("weight", "size", "mean", "variance"):
        first, second = getattr(seen.steps, column), getattr(expected.steps, column)
        np.testing.assert_allclose(first, second, rtol=5e-3, atol=1e-4 * np.abs(second).max())


def test_every_process_can_report(runs):
    assert end(runs[0], "sgd", 0)[1]["top"] == end(runs[0], "sgd", 1)[1]["top"] == end(runs[1], "sgd")[1]["top"]


def test_losses_that_each_process_divides_by_its_own_tokens(runs):
    """Training differs from that of one process, so only the first step, from the same weights, can be the same."""
    seen, expected = (read_observations(folder / "tokens of each" / "_private" / "influence")[0] for folder in runs)
    first, second = ((o.example[o.step == 0], o.value[o.step == 0]) for o in (seen, expected))
    np.testing.assert_allclose(
        first[1][np.argsort(first[0])],
        second[1][np.argsort(second[0])],
        rtol=1e-3,
        atol=1e-4 * np.abs(second[1]).max(),
    )
    assert same(end(runs[0], "tokens of each", 0)[0], end(runs[0], "tokens of each", 1)[0])


def test_a_last_batch_that_does_not_come_out_even(runs):
    """accelerate fills it up with rows from the start, which train, and so are seen, again."""
    seen = read_observations(runs[0] / "uneven" / "_private" / "influence")[0]
    assert seen.steps.size.tolist() == [6, 6, 6]
    assert set(seen.example) == set(range(16))


def test_propagated_is_refused(runs):
    start = end(runs[0], "propagated")[0]
    for rank in (0, 1):
        weights, notes = end(runs[0], "propagated", rank)
        assert notes["error"] == "observation='propagated': runs in one process only; use 'in_run' with several"
        assert same(weights, start)
    assert not Path(runs[0], "propagated", "_private").exists()
    assert end(runs[1], "propagated")[1]["error"] is None
