"""Runs that were killed go on from a checkpoint, bit for bit; the best checkpoint comes back."""

from pathlib import Path

import pytest
import torch
from gan_data import (
    Watch,
    arguments,
    images,
    own_images,
    pipeline,
    players,
    same,
    style_pipeline,
    trained,
    weights,
)
from safetensors.torch import load_file

from hf_unlearn import GANPipeline, GANTrainer


EVERY_TWO = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


class Killed(Exception):
    pass


def die_at(step):
    def look(event, now):
        if (event, now) == ("between", step):  # the discriminator has moved, the generator has not
            raise Killed

    return Watch(look)


def equal(first, second):
    """Nested states, bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(equal(*pair) for pair in zip(first, second, strict=True))
    return first == second


def killed(pipe, args, step, data=None):
    trainer = GANTrainer(pipe, args, train_dataset=images() if data is None else data, callbacks=[die_at(step)])
    with pytest.raises(Killed):
        trainer.train()
    return trainer


class TestGoesOn:
    """Six steps in one go, or five, a kill, and the rest from the checkpoint of step 4 in another trainer."""

    def both(self, tmp_path, make=pipeline, data=None, **values):
        values = EVERY_TWO | values
        whole = trained(make(), arguments(tmp_path / "whole", **values), data)
        killed(make(), arguments(tmp_path / "halves", **values), 5, data)
        args = arguments(tmp_path / "halves", **values)
        rest = GANTrainer(make(), args, train_dataset=images() if data is None else data)
        begun = []
        rest.add_callback(Watch(lambda event, step: begun.append(step)))
        rest.train(resume_from_checkpoint=True)
        assert min(begun) == 4
        assert rest.state.global_step == 6
        assert same(players(whole), players(rest))
        assert equal(whole.optimizer.state_dict(), rest.optimizer.state_dict())
        assert equal(whole.lr_scheduler.state_dict(), rest.lr_scheduler.state_dict())
        assert same(weights(whole.pipeline.generator), weights(rest.pipeline.generator))
        return whole, rest

    @pytest.mark.parametrize(
        "values",
        [
            {},
            {"lr_scheduler_type": "linear", "warmup_steps": 2},
            {"adam_beta1": 0.5},
            {"r1_every": 5},
            {"path_length_weight": 1.0, "path_length_every": 1},
            {"discriminator_warmup": 5},
            {"discriminator_learning_rate": 1e-4},
            {"per_device_train_batch_size": 7},
        ],
        ids=lambda values: " ".join(values) or "plain",
    )
    def test_bit_for_bit(self, tmp_path, values):
        self.both(tmp_path, **values)

    def test_batch_norm(self, tmp_path):
        self.both(tmp_path, lambda: pipeline(norm="batch"))

    def test_a_style_generator(self, tmp_path):
        self.both(tmp_path, style_pipeline, path_length_weight=1.0)

    def test_from_a_model_that_is_half_trained_already(self, tmp_path):
        """A pipeline is changed in place: who goes on with the same object gets no other result."""
        whole = trained(pipeline(), arguments(tmp_path / "whole", **EVERY_TWO))
        pipe = pipeline()
        killed(pipe, arguments(tmp_path / "halves", **EVERY_TWO), 5)
        rest = GANTrainer(pipe, arguments(tmp_path / "halves", **EVERY_TWO), train_dataset=images())
        rest.train(resume_from_checkpoint=True)
        assert same(players(whole), players(rest))

    def test_the_guard_remembers(self, tmp_path):
        data = own_images(pipeline())
        whole, rest = self.both(tmp_path, data=data, guard=True, guard_steps=1)
        assert [look.step for look in whole.guard.looks] == list(range(7))
        assert whole.guard.looks == rest.guard.looks
        assert whole.guard.healthy == rest.guard.healthy is not None
        kept = [load_file(trainer.guard._file) for trainer in (whole, rest)]
        assert same(*kept)

    def test_a_folder_by_name(self, tmp_path):
        whole = trained(pipeline(), arguments(tmp_path, **EVERY_TWO))
        rest = GANTrainer(pipeline(), arguments(tmp_path, **EVERY_TWO), train_dataset=images())
        rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert same(players(whole), players(rest))

    def test_the_last_checkpoint_is_all_there_is(self, tmp_path):
        """Nothing is left to train: the players come back as they ended."""
        whole = trained(pipeline(), arguments(tmp_path, **EVERY_TWO))
        rest = GANTrainer(pipeline(), arguments(tmp_path, **EVERY_TWO), train_dataset=images())
        rest.train(resume_from_checkpoint=True)
        assert same(players(whole), players(rest))

    def test_half_of_a_checkpoint_is_skipped(self, tmp_path):
        whole = trained(pipeline(), arguments(tmp_path / "whole", **EVERY_TWO))
        killed(pipeline(), arguments(tmp_path / "halves", **EVERY_TWO), 5)
        newest = tmp_path / "halves" / "checkpoint-4"
        (newest / "trainer_state.json").unlink()
        (newest / "gan.safetensors").write_bytes(b"half of it")
        rest = GANTrainer(pipeline(), arguments(tmp_path / "halves", **EVERY_TWO), train_dataset=images())
        rest.train(resume_from_checkpoint=True)
        assert same(players(whole), players(rest))

    def test_trained_again_after_a_collapse(self, tmp_path):
        """The same trainer goes on from a checkpoint of before: what collapsed later is no reason to stop now."""
        data = own_images(pipeline())
        args = arguments(tmp_path, **EVERY_TWO, guard=True, guard_steps=1, learning_rate=1e-4)

        def look(event, step):
            if (event, step) == ("end", 3) and not done:
                done.append(step)
                for player in (trainer.model.generator, trainer.averaged):
                    for parameter in player.parameters():
                        parameter.data.zero_()

        done = []
        trainer = GANTrainer(pipeline(), args, train_dataset=data, callbacks=[Watch(look)])
        trainer.train()
        assert trainer.guard.collapsed.step == trainer.state.global_step == 3
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert trainer.state.global_step == 6
        assert trainer.guard.collapsed is None


class TestRefused:
    def resume(self, pipe, folder, checkpoint=True, **values):
        trainer = GANTrainer(pipe, arguments(folder, **(EVERY_TWO | values)), train_dataset=images())
        before = players(trainer)
        with pytest.raises(ValueError) as error:
            trainer.train(resume_from_checkpoint=checkpoint)
        assert "\n" not in str(error.value)
        assert same(before, players(trainer))
        return str(error.value)

    def test_none(self, tmp_path):
        assert self.resume(pipeline(), tmp_path).startswith("resume_from_checkpoint: no complete checkpoint in ")
        assert "no checkpoint of a GAN" in self.resume(pipeline(), tmp_path, str(tmp_path / "checkpoint-9"))

    def test_only_half_of_one(self, tmp_path):
        trained(pipeline(), arguments(tmp_path, **(EVERY_TWO | {"max_steps": 2})))
        (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
        assert "no complete checkpoint" in self.resume(pipeline(), tmp_path)

    @pytest.mark.parametrize(
        "other", [lambda: pipeline(latent_dim=5), lambda: pipeline(norm="batch"), style_pipeline],
        ids=["width", "norm", "class"],
    )  # fmt: skip
    def test_of_other_players(self, tmp_path, other):
        trained(pipeline(), arguments(tmp_path, **(EVERY_TWO | {"max_steps": 2})))
        assert "holds the state of other models" in self.resume(other(), tmp_path)


class TestBest:
    """The data are what the model draws before the first step, so training makes it worse."""

    def run(self, tmp_path, **values):
        pipe = pipeline()
        data, seen = own_images(pipe, 40), {}
        values = {
            "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 4,
            "load_best_model_at_end": True, "metric_for_best_model": "eval_fid", "learning_rate": 0.02,
        } | values  # fmt: skip
        look = Watch(lambda event, step: event == "begin" and seen.update({step: players(trainer)}))
        args = arguments(tmp_path, **values)
        trainer = GANTrainer(pipe, args, train_dataset=images(), eval_dataset=data, callbacks=[look])
        trainer.train()
        figures = {log["step"]: log["eval_fid"] for log in trainer.state.log_history if "eval_fid" in log}
        best = min(figures, key=figures.get)
        assert best < 4  # or there would be nothing to load
        return trainer, seen[best], best, figures[best]

    def test_comes_back(self, tmp_path):
        trainer, state, best, figure = self.run(tmp_path, greater_is_better=False)
        assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{best}"
        assert same(players(trainer), state)
        assert trainer.evaluate()["eval_fid"] == figure
        assert same(weights(trainer.pipeline.generator), weights(trainer.averaged))

    def test_a_smaller_distance_is_better(self, tmp_path):
        """Without being told: Transformers takes anything that is not called a loss for a score."""
        trainer, state, *_ = self.run(tmp_path)
        assert same(players(trainer), state)

    def test_is_what_is_saved(self, tmp_path):
        trainer, state, *_ = self.run(tmp_path, greater_is_better=False)
        trainer.save_model()
        loaded = weights(GANPipeline.from_pretrained(tmp_path).generator)
        assert same(loaded, {name[9:]: value for name, value in state.items() if name.startswith("averaged.")})


def test_a_checkpoint_holds_both_players_and_the_average(tmp_path):
    trainer = trained(pipeline(), arguments(tmp_path, **(EVERY_TWO | {"max_steps": 2})))
    assert same(load_file(tmp_path / "checkpoint-2" / "gan.safetensors"), players(trainer))
