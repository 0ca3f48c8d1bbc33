"""What a diffusion model's original draws, once and for all; and what else a run of VDU goes on with."""

import copy

import pytest
import torch
from image_data import distance, weights
from safetensors.torch import load_file
from vdu_data import arguments, prompted_arguments, trained

from hf_unlearn import VDUTrainer
from hf_unlearn.unlearning.diffusion import own_samples as own_samples_module
from hf_unlearn.unlearning.diffusion.drawing import generate
from hf_unlearn.unlearning.diffusion.own_samples import resembles


@pytest.fixture
def counted(monkeypatch):
    """Seeds of what was drawn."""
    counted, generate = [], own_samples_module.generate
    monkeypatch.setattr(
        own_samples_module, "generate", lambda *a, **k: (counted.append(k["seed"]), generate(*a, **k))[1]
    )
    return counted


def start(pipeline, folder, **values):
    return trained(copy.deepcopy(pipeline), arguments(folder, max_steps=1, **values))


class TestPool:
    def test_read_where_the_same_run_starts_again(self, tiny_ddpm, tmp_path, counted):
        first = start(tiny_ddpm, tmp_path)
        file = tmp_path / "_private" / "replay.safetensors"
        before = file.read_bytes(), file.stat().st_mtime_ns
        again = start(tiny_ddpm, tmp_path, learning_rate=1e-4)
        assert (file.read_bytes(), file.stat().st_mtime_ns) == before
        assert first.own.kept.latents.equal(again.own.kept.latents)
        assert load_file(file)["latents"].shape == (16, 1, 8, 8)
        own = again.own
        again.train()  # nor by a trainer that trains twice
        assert again.own is own
        assert len(counted) == 1
        whole = file.read_bytes()
        file.write_bytes(whole[:100])  # a file that was cut off
        start(tiny_ddpm, tmp_path)
        assert file.read_bytes() == whole

    @pytest.mark.parametrize(
        "change",
        [{"seed": 1}, {"num_inference_steps": 3}, {"own_samples": 17}, "one weight", "two swapped", "scheduler"],
        ids=str,
    )
    def test_drawn_again_for_other_settings_or_another_model(self, tiny_ddpm, tmp_path, counted, change):
        first = start(tiny_ddpm, tmp_path)
        with torch.no_grad():
            weight = tiny_ddpm.unet.conv_out.weight
            if change == "one weight":
                weight[0, 0, 0, 0] += 1e-3
            elif change == "two swapped":
                weight[0, 0, 0, :2] = weight[0, 0, 0, :2].flip(0)
            elif change == "scheduler":
                tiny_ddpm.register_modules(scheduler=type(tiny_ddpm.scheduler)(num_train_timesteps=30))
        other = start(tiny_ddpm, tmp_path, **(change if isinstance(change, dict) else {}))
        assert len(counted) == 2
        kept = first.own.kept.latents, other.own.kept.latents
        assert kept[0].shape != kept[1].shape or not kept[0].equal(kept[1])

    def test_prompts_are_part_of_what_is_drawn(self, tiny_stable_diffusion, tmp_path, counted):
        values = {"forget_prompts": ["a pot"], "redirect_prompt": "a hat", "forget_samples": 2, "max_steps": 1}
        for prompts in (["a photo"], ["a photo"], ["a path"]):
            args = prompted_arguments(tmp_path, **(values | {"replay_prompts": prompts}))
            trained(copy.deepcopy(tiny_stable_diffusion), args)
        assert len(counted) == 3  # forget and replay, then replay
        assert len(set(counted)) == 2  # not from the same noise


class TestForgottenKind:
    def test_the_forget_set_is_what_the_model_draws(self, tiny_ddpm):
        """Then nearly all samples are of its kind, which the next test is about, or all are, which is refused."""
        forget, samples = (generate(tiny_ddpm, 64, seed=seed, num_inference_steps=2) for seed in (11, 12))
        assert resembles(samples, forget).float().mean() > 0.8  # 0.96 ± 0.03 over 8 pairs of seeds

    @pytest.mark.parametrize(("marked", "warned"), [(12, False), (14, True)])
    def test_nearly_everything_is(self, tiny_ddpm, tmp_path, caplog, marked, warned):
        with caplog.at_level("WARNING", "hf_unlearn"):
            trained(tiny_ddpm, arguments(tmp_path, max_steps=1), marker=lambda x: torch.arange(16) < marked)
        found = [message for message in caplog.messages if message.startswith("forget_dataset: ")]
        assert len(found) == warned
        assert not warned or "88 % of what the original draws" in found[0]


class TestGoesOn:
    """Two steps in one go, or one and, in another trainer of the original, one more: what tests/contracts does not try."""

    def halves(self, pipeline, folder, arguments, **values):
        values = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "adam_epsilon": 1e-3} | values
        originals = [copy.deepcopy(pipeline) for _ in range(3)]
        whole = trained(originals[0], arguments(folder / "whole", **values))
        half = trained(originals[1], arguments(folder / "halves", **(values | {"max_steps": 1})))
        args = arguments(folder / "halves", **values)
        rest = VDUTrainer(pipeline=originals[2], args=args, forget_dataset=half.forget_dataset)
        return whole, half, rest

    def check_same(self, rest, whole, half):
        """But for rounding, which an epsilon of 1e-3 lets be at most 1e-3 of a step (see TOLERANCE of the contracts)."""
        ends = [weights(trainer.model) for trainer in (rest, whole, half)]
        assert distance(ends[0], ends[1]) < 1e-3 * distance(ends[1], ends[2])

    def test_with_a_lora(self, tiny_stable_diffusion, tmp_path):
        values = {"trainable": ["lora"], "ema_decay": 0.5, "isotropic_weight": 0.01}
        whole, half, rest = self.halves(tiny_stable_diffusion, tmp_path, prompted_arguments, **values)
        rest.train(resume_from_checkpoint=True)
        assert any("lora_B" in name for name in weights(whole.model))
        self.check_same(rest, whole, half)

    def test_with_checkpoints_of_the_training_run(self, tiny_ddpm, tmp_path):
        """Their moments are read from disk; without them the run cannot go on."""
        unet, paths = copy.deepcopy(tiny_ddpm.unet), []
        for step in range(3):
            with torch.no_grad():
                for parameter in unet.parameters():
                    parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)))
            paths.append(str(tmp_path / f"checkpoint-{step}"))
            unet.save_pretrained(f"{paths[-1]}/unet")
        values = {"stability_weight": 1e-4, "checkpoints": paths, "anchor": "checkpoint_mean", "ema_decay": 0.9}
        whole, half, rest = self.halves(tiny_ddpm, tmp_path, arguments, **values)
        moments = tmp_path / "halves" / "_private" / "moments.safetensors"
        kept = moments.read_bytes()
        moments.unlink()
        with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*moments.safetensors is missing[^\n]*$"):
            rest.train(resume_from_checkpoint=True)
        moments.write_bytes(kept)
        rest.train(resume_from_checkpoint=True)
        assert rest.precision_name == "inverse variance over 3 checkpoints"
        self.check_same(rest, whole, half)
