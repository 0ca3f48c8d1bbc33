"""VDU runs that go on from a checkpoint, and runs of several processes: the same model as in one go."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from image_data import distance, same, weights
from safetensors.torch import load_file
from vdu_data import arguments, images, prompted_arguments, trained

from hf_unlearn import VDUTrainer
from hf_unlearn.unlearning.checkpoint import MARKER
from hf_unlearn.unlearning.diffusion import replay_pool


EVERY_THREE = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}


def checkpoints_of(pipeline, folder, count=3):
    """Folders of a run that never happened: the model's weights, moved a little at random."""
    generator = torch.Generator().manual_seed(5)
    unet = copy.deepcopy(pipeline.unet)
    for step in range(count):
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        unet.save_pretrained(folder / f"checkpoint-{step}" / "unet")
    return [str(folder)]


class TestGoesOn:
    """Six steps in one go, or three and, in another trainer of the original, three more."""

    def both(self, pipeline, tmp_path, arguments=arguments, **values):
        values = EVERY_THREE | values
        originals = [copy.deepcopy(pipeline) for _ in range(3)]
        whole = trained(originals[0], arguments(tmp_path / "whole", **values))
        half = trained(originals[1], arguments(tmp_path / "halves", **(values | {"max_steps": 3})))
        args = arguments(tmp_path / "halves", **values)
        rest = VDUTrainer(pipeline=originals[2], args=args, forget_dataset=half.forget_dataset)
        rest.train(resume_from_checkpoint=True)
        assert rest.state.global_step == 6
        assert not same(weights(half.model), weights(rest.model))
        return whole, rest

    @pytest.mark.parametrize(
        "values",
        [
            {},
            {"ema_decay": 0.9},
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "isotropic_weight": 0.01},
            {"stability_weight": 1e-4, "stability": "fisher"},
            {"guard": True, "guard_steps": 1, "utility_tolerance": 1e9},
        ],
        ids=lambda values: " ".join(values) or "plain",
    )
    def test_bit_for_bit(self, tiny_ddpm, tmp_path, values):
        whole, rest = self.both(tiny_ddpm, tmp_path, **values)
        assert same(weights(whole.model), weights(rest.model))
        if whole.guard:
            assert whole.guard.state == rest.guard.state

    def test_with_checkpoints(self, tiny_ddpm, tmp_path):
        paths = checkpoints_of(tiny_ddpm, tmp_path / "run")
        values = {"stability_weight": 1e-4, "checkpoints": paths, "anchor": "checkpoint_mean"}
        whole, rest = self.both(tiny_ddpm, tmp_path, **values)
        assert rest.precision_name == "inverse variance over 3 checkpoints"
        assert same(weights(whole.model), weights(rest.model))

    def test_with_a_lora(self, tiny_stable_diffusion, tmp_path):
        values = {"trainable": ["lora"], "ema_decay": 0.5, "isotropic_weight": 0.01}
        whole, rest = self.both(tiny_stable_diffusion, tmp_path, prompted_arguments, **values)
        assert any("lora_B" in name for name in weights(whole.model))
        assert same(weights(whole.model), weights(rest.model))

    def test_from_a_model_that_is_half_unlearned_already(self, tiny_ddpm, tmp_path):
        """A pipeline is changed in place: whoever goes on with the same object still keeps what the original drew."""
        original = weights(tiny_ddpm.unet)
        whole = trained(copy.deepcopy(tiny_ddpm), arguments(tmp_path / "whole", **EVERY_THREE))
        trained(tiny_ddpm, arguments(tmp_path / "halves", **(EVERY_THREE | {"max_steps": 3})))
        assert not same(original, weights(tiny_ddpm.unet))
        rest = VDUTrainer(
            pipeline=tiny_ddpm, args=arguments(tmp_path / "halves", **EVERY_THREE), forget_dataset=images()
        )
        rest.train(resume_from_checkpoint=True)
        assert same(weights(whole.model), weights(rest.model))


class TestRefused:
    @pytest.fixture
    def run(self, tiny_ddpm, tmp_path):
        """A run of three steps, and what goes on from it."""
        values = {
            "ema_decay": 0.9,
            "stability_weight": 1e-4,
            "checkpoints": checkpoints_of(tiny_ddpm, tmp_path / "run"),
        }
        pipeline = copy.deepcopy(tiny_ddpm)
        trained(tiny_ddpm, arguments(tmp_path / "out", **(EVERY_THREE | values | {"max_steps": 3})))

        def resume(**other):
            args = arguments(tmp_path / "out", **(EVERY_THREE | values | other))
            trainer = VDUTrainer(pipeline=copy.deepcopy(pipeline), args=args, forget_dataset=images())
            trainer.train(resume_from_checkpoint=True)
            return trainer

        return resume

    @pytest.mark.parametrize("file", ["_private/moments.safetensors", "checkpoint-3/ema.safetensors",
                                      "_private/reference.safetensors"])  # fmt: skip
    def test_a_file_is_missing(self, run, tmp_path, file):
        (tmp_path / "out" / file).unlink()
        with pytest.raises(ValueError, match=f"^resume_from_checkpoint: .*{file.split('/')[1]} is missing") as error:
            run()
        assert "\n" not in str(error.value)

    def test_an_average_can_be_left_out(self, run, tmp_path):
        (tmp_path / "out" / "checkpoint-3" / "ema.safetensors").unlink()
        assert run(ema_decay=0.0).state.global_step == 6

    def test_half_of_a_checkpoint(self, run, tmp_path):
        (tmp_path / "out" / "checkpoint-3" / MARKER).unlink()
        with pytest.raises(ValueError, match="^resume_from_checkpoint: no complete checkpoint in "):
            run()


class TestPool:
    """What the original draws is drawn once."""

    @pytest.fixture
    def counted(self, monkeypatch):
        """How often something was drawn."""
        counted, generate = [], replay_pool.generate
        monkeypatch.setattr(replay_pool, "generate", lambda *a, **k: (counted.append(k["seed"]), generate(*a, **k))[1])
        return counted

    def start(self, pipeline, folder, **values):
        return trained(copy.deepcopy(pipeline), arguments(folder, max_steps=1, **values))

    def test_read_where_the_same_run_starts_again(self, tiny_ddpm, tmp_path, counted):
        first = self.start(tiny_ddpm, tmp_path)
        file = tmp_path / "_private" / "replay.safetensors"
        before = file.read_bytes(), file.stat().st_mtime_ns
        again = self.start(tiny_ddpm, tmp_path, learning_rate=1e-4)
        assert (file.read_bytes(), file.stat().st_mtime_ns) == before
        assert len(counted) == 1
        assert first.own.kept.latents.equal(again.own.kept.latents)
        # And not read from somewhere else: what stands in the file is what is kept.
        assert load_file(file)["latents"].shape == (16, 1, 8, 8)

    def test_a_trainer_that_trains_twice_keeps_what_the_original_drew(self, tiny_ddpm, tmp_path, counted):
        trainer = self.start(tiny_ddpm, tmp_path)
        own = trainer.own
        trainer.train()
        assert trainer.own is own
        assert len(counted) == 1

    @pytest.mark.parametrize(
        "values",
        [{"seed": 1}, {"num_inference_steps": 3}, {"replay_samples": 17}],
        ids=lambda values: next(iter(values)),
    )
    def test_drawn_again_for_other_settings(self, tiny_ddpm, tmp_path, counted, values):
        first = self.start(tiny_ddpm, tmp_path)
        other = self.start(tiny_ddpm, tmp_path, **values)
        assert len(counted) == 2
        kept = first.own.kept.latents, other.own.kept.latents
        assert kept[0].shape != kept[1].shape or not kept[0].equal(kept[1])

    @pytest.mark.parametrize("change", ["one weight", "two swapped", "scheduler"])
    def test_drawn_again_for_another_model(self, tiny_ddpm, tmp_path, counted, change):
        self.start(tiny_ddpm, tmp_path)
        with torch.no_grad():
            weight = tiny_ddpm.unet.conv_out.weight
            if change == "one weight":
                weight[0, 0, 0, 0] += 1e-3
            elif change == "two swapped":
                weight[0, 0, 0, :2] = weight[0, 0, 0, :2].flip(0)
            else:
                tiny_ddpm.register_modules(scheduler=type(tiny_ddpm.scheduler)(num_train_timesteps=30))
        self.start(tiny_ddpm, tmp_path)
        assert len(counted) == 2

    def test_a_file_that_was_cut_off_is_drawn_again(self, tiny_ddpm, tmp_path, counted):
        self.start(tiny_ddpm, tmp_path)
        file = tmp_path / "_private" / "replay.safetensors"
        whole = file.read_bytes()
        file.write_bytes(whole[:100])
        self.start(tiny_ddpm, tmp_path)
        assert file.read_bytes() == whole

    def test_prompts_are_part_of_what_is_drawn(self, tiny_stable_diffusion, tmp_path, counted):
        values = {"forget_prompts": ["a pot"], "forget_samples": 2, "max_steps": 1}
        for prompts in (["a photo"], ["a photo"], ["a path"]):
            args = prompted_arguments(tmp_path, **(values | {"replay_prompts": prompts}))
            trained(copy.deepcopy(tiny_stable_diffusion), args)
        assert len(counted) == 3  # forget and replay, then replay
        assert len(set(counted)) == 2  # not from the same noise


DRIVER = """
import sys
from pathlib import Path

import torch
from diffusers import DDPMPipeline
from safetensors.torch import save_file
from vdu_data import arguments, images

from hf_unlearn import VDUTrainer
from hf_unlearn.unlearning.diffusion import replay_pool

torch.set_num_threads(1)
root = Path(sys.argv[1])
generate = replay_pool.generate


def noted(*args, **kwargs):
    if kwargs["seed"] % 1000 == replay_pool.REPLAY_SEED:  # not the grids
        print("drawn", flush=True)
    return generate(*args, **kwargs)


replay_pool.generate = noted
args = arguments(
    root / "out", per_device_train_batch_size=2, grid_images=4, guard=True, guard_steps=1, utility_tolerance=1e9,
    ema_decay=0.5, stability_weight=1e-4, save_strategy="steps", save_steps=2,
)
trainer = VDUTrainer(pipeline=DDPMPipeline.from_pretrained(root / "original"), args=args, forget_dataset=images())
trainer.train()
trainer.save_model()
end = {name: value.clone() for name, value in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()}
save_file(end, root / f"end-{args.process_index}.safetensors")
save_file({"own": trainer.own.kept.latents.clone()}, root / f"own-{args.process_index}.safetensors")
print("all done", flush=True)
"""


def test_two_processes_stay_one_model(tiny_ddpm, tmp_path):
    """Noise is each process's own, so one process with twice the batch ends near them and not at the same place."""
    tiny_ddpm.save_pretrained(tmp_path / "original")
    (tmp_path / "driver.py").write_text(DRIVER)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(tmp_path / "driver.py"), str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, "\n".join(line for line in run.stderr.splitlines() if "rank" in line)[-3000:]
    assert (run.stdout.count("all done"), run.stdout.count("drawn")) == (2, 1)
    ends = [load_file(tmp_path / f"end-{rank}.safetensors") for rank in (0, 1)]
    assert same(*ends)
    assert same(*(load_file(tmp_path / f"own-{rank}.safetensors") for rank in (0, 1)))
    assert same(load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors"), ends[0])
    for file in ("_private/samples/before.png", "pictures/after.png", "checkpoint-2/unlearning.json", "README.md"):
        assert (tmp_path / "out" / file).is_file()
    start, alone = weights(tiny_ddpm.unet), copy.deepcopy(tiny_ddpm)
    trained(alone, arguments(tmp_path / "alone", ema_decay=0.5, stability_weight=1e-4))
    assert 0 < distance(weights(alone.unet), ends[0]) < distance(start, ends[0])
