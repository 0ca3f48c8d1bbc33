"""Grids and figures of what a generator draws while it forgets: all from the same noise, and without a trace in the run."""

import copy

import numpy as np
import pytest
import torch
from image_data import distance, same, weights
from PIL import Image
from transformers import TrainerCallback
from vdu_data import arguments, images, prompted_arguments, prompted_images, trained

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


class TestGrids:
    def test_before_during_and_after(self, tiny_ddpm, tmp_path):
        original = copy.deepcopy(tiny_ddpm)
        trainer = trained(tiny_ddpm, arguments(tmp_path, grid_images=4, grid_steps=2, max_steps=4))
        private = "_private/samples"
        names = {"before", "step-2", "step-4", "after"}
        assert pictures(tmp_path) == {f"{private}/{name}.png" for name in names} | {"pictures/after.png"}
        assert (tmp_path / "pictures/after.png").read_bytes() == (tmp_path / private / "after.png").read_bytes()
        shown = {name: np.asarray(Image.open(tmp_path / private / f"{name}.png")) for name in names}
        assert shown["before"].shape == (2 * 68, 2 * 68, 3)  # framed
        np.testing.assert_array_equal(shown["step-4"], shown["after"])
        assert len({picture.tobytes() for picture in shown.values()}) == 3
        # The first and the last one are what these two models draw.
        for name, pipeline in (("before", original), ("after", trainer.pipeline)):
            expected = grid(generate(pipeline, 4, seed=3, num_inference_steps=2))
            np.testing.assert_array_equal(shown[name], np.asarray(expected))

    def test_what_does_not_learn_draws_the_same(self, tiny_ddpm, tmp_path):
        trained(tiny_ddpm, arguments(tmp_path, grid_images=4, learning_rate=0.0))
        before, after = ((tmp_path / "_private/samples" / f"{name}.png").read_bytes() for name in ("before", "after"))
        assert before == after

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
        expected = grid(generate(trainer.pipeline, 4, seed=3, num_inference_steps=2))
        shown = np.asarray(Image.open(tmp_path / "pictures/after.png"))
        np.testing.assert_array_equal(shown, np.asarray(expected))

    def test_with_prompts(self, tiny_stable_diffusion, tmp_path):
        args = prompted_arguments(
            tmp_path, forget_prompts=["a photo"], forget_samples=2, replay_prompts=["pot"], grid_images=4, max_steps=1
        )
        trainer = trained(tiny_stable_diffusion, args)
        assert trainer.sample_prompts == ["a photo", "pot"]
        expected = grid(generate(trainer.pipeline, ["a photo", "pot"] * 2, seed=3, num_inference_steps=2))
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "pictures/after.png")), np.asarray(expected))

    def test_no_grids(self, tiny_ddpm, tmp_path):
        trained(tiny_ddpm, arguments(tmp_path))
        assert pictures(tmp_path) == set()

    def test_only_the_last_one_is_published(self, tiny_ddpm, tmp_path):
        trainer = trained(tiny_ddpm, arguments(tmp_path, grid_images=1, grid_steps=1))
        trainer.save_model()
        assert [name for name in publishable_files(tmp_path) if name.endswith(".png")] == ["pictures/after.png"]


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
        self.reference = features_of(
            torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)), corners, name="c"
        )
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
        distances = [
            frechet_distance(self.reference, features_of(i, corners, name="c")).distance for i in (before, after)
        ]
        assert self.logged(trainer, "fid") == [(0, distances[0]), (3, distances[1])]

    def test_a_resumed_run_is_compared_with_the_original(self, tiny_ddpm, tmp_path):
        values = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3}
        whole = self.run(copy.deepcopy(tiny_ddpm), tmp_path / "whole", callbacks=["pul"], **values)
        half = copy.deepcopy(tiny_ddpm)
        self.run(half, tmp_path / "halves", callbacks=["pul"], **(values | {"max_steps": 3}))
        rest = self.run(half, tmp_path / "halves", resume=True, callbacks=["pul"], **values)
        assert self.logged(rest, "pul")[-1] == self.logged(whole, "pul")[-1]
        assert self.logged(whole, "pul")[-1][1] != 0
        assert same(weights(whole.model), weights(rest.model))

    def test_nothing_to_forget_is_said_before_the_first_step(self, tiny_ddpm, tmp_path):
        trainer = VDUTrainer(pipeline=tiny_ddpm, args=arguments(tmp_path), forget_dataset=images())
        trainer.add_callback(PULCallback(trainer, darkness, [7], samples=2))
        with pytest.raises(ValueError, match="^before: nothing to unlearn"):
            trainer.train()
        assert trainer.state.global_step == 0

    @pytest.mark.parametrize("what", ["grids", "figures"])
    def test_looking_changes_nothing(self, tiny_ddpm, tmp_path, what):
        plain, watched = copy.deepcopy(tiny_ddpm), tiny_ddpm
        torch.manual_seed(0)
        trained(plain, arguments(tmp_path / "plain"))
        state = torch.get_rng_state()
        torch.manual_seed(0)
        if what == "grids":
            trained(watched, arguments(tmp_path / "watched", grid_images=2, grid_steps=1))
        else:
            self.run(watched, tmp_path / "watched")
        assert torch.get_rng_state().equal(state)
        assert same(weights(plain.unet), weights(watched.unet))
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
        assert seen[-1].equal(expected)
        assert self.logged(trainer, "pul") == [(1, 0.0)]
