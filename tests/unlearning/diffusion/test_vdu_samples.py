"""Grids and figures of what a generator draws while it forgets: all from the same noise, and without a trace in the run."""

import copy

import numpy as np
import pytest
import torch
from image_data import distance, weights
from PIL import Image
from transformers import TrainerCallback
from vdu_data import arguments, images, prompted_arguments, prompted_images, seeded, trained

from hf_unlearn import VDUTrainer
from hf_unlearn.hub.publish import publishable_files
from hf_unlearn.images import grid
from hf_unlearn.metrics.features import features_of
from hf_unlearn.metrics.generation import frechet_distance, percentage_unlearned
from hf_unlearn.training.pictures import METRIC_SEED, FIDCallback, PULCallback
from hf_unlearn.unlearning.diffusion.drawing import generate


def pictures(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}


class Records(TrainerCallback):
    """Keeps the weights after every step."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append(weights(model))


def assert_shows(file, pipeline, what):
    """It is the grid of what the pipeline draws from the grids' noise, up to a level of 255 that rounding decides."""
    shown, expected = np.asarray(Image.open(file)), grid(generate(pipeline, what, seed=3, num_inference_steps=2))
    assert np.abs(shown.astype(int) - np.asarray(expected)).max() <= 1


class TestGrids:
    def test_before_during_and_after(self, tiny_ddpm, tmp_path):
        original = copy.deepcopy(tiny_ddpm)
        trainer = trained(tiny_ddpm, arguments(tmp_path, grid_images=4, grid_steps=2, max_steps=4))
        private = tmp_path / "_private/samples"
        names = {"before", "step-2", "step-4", "after"}
        assert pictures(tmp_path) == {f"_private/samples/{name}.png" for name in names} | {"pictures/after.png"}
        assert (tmp_path / "pictures/after.png").read_bytes() == (private / "after.png").read_bytes()
        shown = {name: np.asarray(Image.open(private / f"{name}.png")).astype(int) for name in names}
        assert shown["before"].shape == (2 * 68, 2 * 68, 3)  # framed
        assert all(np.abs(shown["step-2"] - shown[name]).max() > 5 for name in ("before", "after"))
        assert_shows(private / "before.png", original, 4)
        for name in ("step-4", "after"):
            assert_shows(private / f"{name}.png", trainer.pipeline, 4)
        trainer.save_model()
        assert [name for name in publishable_files(tmp_path) if name.endswith(".png")] == ["pictures/after.png"]

    def test_after_shows_what_is_saved(self, tiny_ddpm, tmp_path):
        """The average of the weights, which stands in for them at the end."""
        steps = [weights(tiny_ddpm.unet)]
        args = arguments(tmp_path, grid_images=4, ema_decay=0.9)
        trainer = VDUTrainer(pipeline=tiny_ddpm, args=args, forget_dataset=images())
        trainer.add_callback(Records(steps))
        trainer.train()
        average = steps[0]
        for step in (1, 2, 3):
            decay = (1 + step) / (10 + step)
            average = {name: decay * value + (1 - decay) * steps[step][name] for name, value in average.items()}
        assert distance(weights(trainer.model), average) < 1e-5 < 0.1 < distance(steps[-1], average)
        assert_shows(tmp_path / "pictures/after.png", trainer.pipeline, 4)

    def test_with_prompts(self, tiny_stable_diffusion, tmp_path, caplog):
        """Forget prompts alone: what is kept is what the neutral prompt draws."""
        args = prompted_arguments(
            tmp_path,
            forget_prompts=["a photo", "a hot photo"],
            redirect_prompt=["pot"],
            forget_samples=2,
            replay_prompts=None,
            grid_images=4,
            max_steps=1,
        )
        with caplog.at_level("WARNING", "hf_unlearn"):
            trainer = trained(tiny_stable_diffusion, args)
        assert "what is kept is what 'pot' draws" in caplog.text
        assert trainer.own.kept.prompts == ["pot"]
        assert trainer.forget_dataset.prompts == ["a hot photo", "a photo"]
        assert trainer.sample_prompts == ["a photo", "a hot photo", "pot"]
        assert_shows(tmp_path / "pictures/after.png", trainer.pipeline, ["a photo", "a hot photo", "pot", "a photo"])


def darkness(pictures):
    """A classifier of two classes."""
    return (pictures.flatten(1).mean(1) < 0).long()


def corners(pictures):
    """Features: three pixels."""
    return pictures.flatten(1)[:, :3]


class TestFigures:
    def logged(self, trainer, name):
        return [(log["step"], log[name]) for log in trainer.state.log_history if name in log]

    def run(self, pipeline, folder, resume=None, callbacks=("pul", "fid"), **values):
        trainer = VDUTrainer(pipeline=pipeline, args=arguments(folder, **values), forget_dataset=images())
        self.reference = features_of(torch.rand(20, 1, 8, 8, generator=seeded(0)) * 2 - 1, corners, name="c")
        made = {
            "pul": PULCallback(trainer, darkness, [1], samples=12, steps=2),
            "fid": FIDCallback(trainer, self.reference, corners, samples=12),
        }
        for name in callbacks:
            trainer.add_callback(made[name])
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    def test_what_is_logged(self, tiny_ddpm, tmp_path):
        original = copy.deepcopy(tiny_ddpm)
        trainer = self.run(tiny_ddpm, tmp_path, seed=2)
        before, after = (
            generate(pipeline, 12, seed=2000 + METRIC_SEED, num_inference_steps=2)
            for pipeline in (original, trainer.pipeline)
        )
        expected = percentage_unlearned(darkness(before), darkness(after), [1])
        assert 0 < expected.n_before < 12
        assert [step for step, _ in self.logged(trainer, "pul")] == [2, 3]
        assert self.logged(trainer, "pul")[-1] == (3, expected.pul)
        assert self.logged(trainer, "pul_low")[-1] == (3, expected.low)
        assert self.logged(trainer, "pul_high")[-1] == (3, expected.high)
        for step, (logged, drawn) in enumerate(zip(self.logged(trainer, "fid"), (before, after), strict=True)):
            expected = frechet_distance(self.reference, features_of(drawn, corners, name="c")).distance
            assert logged == (3 * step, pytest.approx(expected, rel=1e-4))

    def test_a_resumed_run_is_compared_with_the_original(self, tiny_ddpm, tmp_path):
        values = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3}
        whole = self.run(copy.deepcopy(tiny_ddpm), tmp_path / "whole", callbacks=["pul"], **values)
        start, half = weights(tiny_ddpm.unet), copy.deepcopy(tiny_ddpm)
        self.run(half, tmp_path / "halves", **(values | {"max_steps": 3}))
        rest = self.run(half, tmp_path / "halves", resume=True, **values)
        assert [step for step, _ in self.logged(rest, "fid")] == [0, 4]  # not as it goes on
        assert self.logged(rest, "pul")[-1] == self.logged(whole, "pul")[-1]
        assert self.logged(whole, "pul")[-1][1] != 0
        assert distance(weights(whole.model), weights(rest.model)) < 0.1 * distance(weights(whole.model), start)

    def test_nothing_to_forget_is_said_before_the_first_step(self, tiny_ddpm, tmp_path):
        trainer = VDUTrainer(pipeline=tiny_ddpm, args=arguments(tmp_path), forget_dataset=images())
        trainer.add_callback(PULCallback(trainer, darkness, [7], samples=2))
        with pytest.raises(ValueError, match="^before: nothing to unlearn"):
            trainer.train()
        assert trainer.state.global_step == 0

    def test_looking_changes_nothing(self, tiny_ddpm, tmp_path):
        plain, watched, start = copy.deepcopy(tiny_ddpm), tiny_ddpm, weights(tiny_ddpm.unet)
        steps = {"optim": "sgd", "learning_rate": 0.5}  # Adam would make whole steps of rounding errors
        torch.manual_seed(0)
        trained(plain, arguments(tmp_path / "plain", **steps))
        state = torch.get_rng_state()
        torch.manual_seed(0)
        self.run(watched, tmp_path / "watched", grid_images=2, grid_steps=1, **steps)
        assert torch.get_rng_state().equal(state)
        assert distance(weights(plain.unet), weights(watched.unet)) < 1e-4
        assert distance(weights(plain.unet), start) > 0.1
        assert watched.unet.training == plain.unet.training

    def test_prompts(self, tiny_stable_diffusion, tmp_path):
        args = prompted_arguments(tmp_path, max_steps=1, replay_prompts=["pot", "hat"])
        images = prompted_images()
        trainer = VDUTrainer(pipeline=tiny_stable_diffusion, args=args, forget_dataset=images)
        asked = list(dict.fromkeys(row["prompt"] for row in images))[:4]  # what is forgotten first, then what is kept
        assert trainer.sample_prompts == [*asked, "pot", "hat"]
        seen = []
        trainer.add_callback(
            PULCallback(trainer, lambda x: (seen.append(x), torch.ones(len(x)).int())[1], [1], samples=3)
        )
        trainer.train()
        expected = generate(trainer.pipeline, trainer.sample_prompts[:3], seed=METRIC_SEED, num_inference_steps=2)
        torch.testing.assert_close(seen[-1], expected, rtol=0, atol=1e-4)  # drawn twice: three passes in fp32
        assert self.logged(trainer, "pul") == [(1, 0.0)]
