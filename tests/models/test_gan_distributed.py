"""Two processes, gloo on the CPU: one pair of players, and those of one process with both batches and both latents."""

import os
import subprocess
import sys

import pytest
import torch
from gan_data import arguments, images, own_images, pipeline, plain_loop, same
from safetensors.torch import load_file

from hf_unlearn import GANPipeline


PLAIN = {"max_steps": 5, "discriminator_warmup": 1, "r1_every": 2}
GUARDED = {"guard": True, "guard_steps": 1, "learning_rate": 1e-4, "save_strategy": "steps", "save_steps": 2}

DRIVER = f"""
import sys
from pathlib import Path

import torch
from gan_data import arguments, images, own_images, pipeline, players, style_pipeline
from safetensors.torch import save_file

from hf_unlearn import GANTrainer

torch.set_num_threads(1)
root = Path(sys.argv[1])
guarded = {GUARDED}


def run(name, pipe, data, **values):
    resume = values.pop("resume", None)
    args = arguments(root / name, **values)
    trainer = GANTrainer(pipe, args, train_dataset=data, eval_dataset=images(10, seed=1))
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    figure = torch.tensor(trainer.evaluate()["eval_fid"])
    save_file(players(trainer) | {{"fid": figure}}, root / f"{{name}}-{{args.process_index}}.safetensors")
    return trainer


run("plain", pipeline(dtype=torch.float64), images(), **{PLAIN})
run("batch", pipeline(norm="batch"), images())
own = own_images(pipeline())
run("guarded", pipeline(), own, max_steps=4, **guarded)
trainer = run("guarded", pipeline(), own, max_steps=6, resume=True, **guarded)
rank = trainer.args.process_index
(root / f"looked-{{rank}}").write_text(str([look.step for look in trainer.guard.looks]))

# One process alone sees NaN; if the other went on, it would wait for ever.
trainer = GANTrainer(pipeline(), arguments(root / "nan", max_steps=4, **guarded), train_dataset=own.clone())
if rank == 1:
    trainer.train_dataset.images[:] = float("nan")
    trainer.guard.real = trainer.features(own)
try:
    trainer.train()
except FloatingPointError as error:
    (root / f"refused-{{rank}}").write_text(str(error))

run("style", style_pipeline(), images(), path_length_weight=1.0, path_length_every=2)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What two processes said, and where they wrote: one start for all tests, since it takes longest."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "driver.py").write_text(DRIVER)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(folder / "driver.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    errors = "\n".join(line for line in done.stderr.splitlines() if "rank" in line)[-3000:]
    return folder, errors


def ends(run, name):
    folder, errors = run
    assert (folder / f"{name}-1.safetensors").is_file(), errors
    return [load_file(folder / f"{name}-{rank}.safetensors") for rank in (0, 1)]


@pytest.mark.parametrize("name", ["plain", "batch", "guarded", "style"])
def test_both_end_with_the_same_players(run, name):
    first, second = ends(run, name)
    for end in (first, second):
        end.pop("path_mean")  # each process's own: of the images it drew
    assert same(first, second)


def test_as_one_process_with_both_batches(run, tmp_path):
    first, _ = ends(run, "plain")
    args = arguments(tmp_path, **PLAIN)
    both = plain_loop(pipeline(dtype=torch.float64), images(), args, processes=2)
    for player, prefix in zip(both, ("gan.generator.", "gan.discriminator.", "averaged."), strict=False):
        for name, value in player.state_dict().items():
            torch.testing.assert_close(first[prefix + name], value, rtol=1e-9, atol=1e-10)
    alone = plain_loop(pipeline(dtype=torch.float64), images(), args)[0].state_dict()
    assert not torch.allclose(first["gan.generator.project.weight"], alone["project.weight"], atol=1e-4)


def test_goes_on_from_a_checkpoint(run, tmp_path):
    """In fp32, where a gradient that is almost nothing moves a weight either way."""
    first, _ = ends(run, "guarded")
    args = arguments(tmp_path, max_steps=6, learning_rate=1e-4)
    expected = plain_loop(pipeline(), own_images(pipeline()), args, processes=2)[0].state_dict()
    off = [(first["gan.generator." + name] - value).abs().flatten() for name, value in expected.items()]
    assert (torch.cat(off) < 1e-5).double().mean() > 0.95
    assert [(run[0] / f"looked-{rank}").read_text() for rank in (0, 1)] == ["[0, 1, 2, 3, 4, 5, 6]"] * 2


def test_what_is_saved_is_the_average(run):
    first, _ = ends(run, "guarded")
    saved = GANPipeline.from_pretrained(run[0] / "guarded").generator.state_dict()
    assert same(saved, {name[9:]: value for name, value in first.items() if name.startswith("averaged.")})


def test_what_one_process_cannot_train_on_stops_both(run):
    for rank in (0, 1):
        said = (run[0] / f"refused-{rank}").read_text()
        assert said.startswith("the discriminator's loss is not finite at step 1; the last healthy state, of step 0")
