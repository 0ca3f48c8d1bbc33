"""The guard: real collapse is seen and undone, NaN stops a run, looking changes nothing."""

import json
import logging
import re

import pytest
import torch
from gan_data import (
    Watch,
    arguments,
    finite,
    images,
    own_images,
    pipeline,
    players,
    same,
    same_run,
    style_pipeline,
    trained,
    weights,
)

from hf_unlearn import GANPipeline, GANTrainer
from hf_unlearn.gan.collapse import DRAWN_SEED
from hf_unlearn.metrics.features import Features
from hf_unlearn.metrics.generation import density_coverage
from hf_unlearn.modes import seeded_generator


SLOW = {"guard": True, "guard_steps": 1, "learning_rate": 1e-4, "max_steps": 6}


def flatten(trainer):
    """Mode collapse: whatever the latents, one grey image."""
    with torch.no_grad():
        for player in (trainer.model.generator, trainer.averaged):
            for parameter in player.parameters():
                parameter.zero_()


class Run:
    """A GAN that covers its data from the beginning, and meets `accident` at the `event` of a step."""

    def __init__(self, folder, accident, *, at=4, event="end", make=pipeline, data=None, **values):
        pipe = make()
        self.seen = {}
        data = own_images(pipe) if data is None else data
        args = arguments(folder, **(SLOW | values))

        def look(now, step):
            if now == "begin":  # after the average and the guard of the step before
                self.seen[step] = players(self.trainer)
            if (now, step) == (event, at):
                accident(self.trainer)

        self.trainer = GANTrainer(pipe, args, train_dataset=data, callbacks=[Watch(look)])


class TestCollapse:
    @pytest.mark.parametrize("make", [pipeline, lambda: pipeline(norm="batch"), style_pipeline])
    def test_is_undone(self, tmp_path, caplog, make):
        run = Run(tmp_path, flatten, make=make)
        with caplog.at_level(logging.WARNING, "hf_unlearn"):
            run.trainer.train()
        assert run.trainer.state.global_step == 4
        assert [look.step for look in run.trainer.guard.looks] == [0, 1, 2, 3, 4]
        assert run.trainer.guard.collapsed.step == 4
        assert run.trainer.guard.collapsed.coverage < 0.5 * run.trainer.guard.best
        (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("hf_unlearn")]
        assert message.startswith("mode collapse at step 4: what is drawn covers ")
        assert message.endswith("going back to step 3")
        assert same(players(run.trainer), run.seen[3])  # all of it: both players, the average, the path lengths
        assert same(weights(run.trainer.pipeline.generator), weights(run.trainer.averaged))
        if make is not style_pipeline:
            run.trainer.save_model()
            healthy = {name[9:]: value for name, value in run.seen[3].items() if name.startswith("averaged.")}
            assert same(weights(GANPipeline.from_pretrained(tmp_path).generator), healthy)
        else:  # a second run forgets the first
            run.trainer.train()
            assert [look.step for look in run.trainer.guard.looks] == [0, 1, 2, 3, 4]

    @pytest.mark.parametrize(
        ("at", "every", "steps", "looks"),
        [(4, 3, 8, [0, 3, 6]), (6, 4, 6, [0, 4, 6]), (25, None, 25, [*range(0, 25, 2), 25])],
        ids=["between two looks", "in the last step", "a tenth of the run by default"],
    )
    def test_when_it_looks(self, tmp_path, at, every, steps, looks):
        """What happens between two looks is seen at the second, and the state of the first comes back."""
        run = Run(tmp_path, flatten, at=at, guard_steps=every, max_steps=steps)
        run.trainer.train()
        assert [look.step for look in run.trainer.guard.looks] == looks
        assert (run.trainer.state.global_step, run.trainer.guard.healthy) == (looks[-1], looks[-2])
        assert same(players(run.trainer), run.seen[looks[-2]])

    def test_how_far_down_is_collapse(self, tmp_path):
        """A third of the data are what the collapsed generator draws: coverage falls to a third, not to nothing."""

        def one_of_three(tolerance):
            data = torch.cat([own_images(pipeline(), 60), 1e-3 * (images(30) - 0.75)])
            run = Run(tmp_path, flatten, data=data, collapse_tolerance=tolerance)
            run.trainer.train()
            return run.trainer

        trainer = one_of_three(0.05)
        before, after = trainer.guard.looks[3].coverage, trainer.guard.looks[4].coverage
        assert trainer.guard.collapsed is None
        assert trainer.state.global_step == 6
        assert 0 < after < 0.7 * before
        assert trainer.guard.healthy == 3  # not kept as healthy either
        assert one_of_three(0.7).guard.collapsed.step == 4

    def test_coverage_is_the_metric_s(self, tmp_path):
        """Of what an extractor sees: here, means of rows of pixels."""
        data, seen = torch.cat([own_images(pipeline(), 30), images(10)]), []

        class Rows(torch.nn.Module):
            def forward(self, x):
                seen.append(len(x))
                return x.mean(3).flatten(1)

        args = arguments(tmp_path, **(SLOW | {"max_steps": 1, "guard_examples": 70}))
        trainer = GANTrainer(pipeline(), args, train_dataset=data, extractor=Rows())
        trainer.train()
        assert sum(seen) == 40 + 2 * 70  # the real ones once
        drawn = pipeline().draw(torch.randn(70, 4, generator=seeded_generator("cpu", 0, DRAWN_SEED)))
        real, fake = (Features(x.mean(3).flatten(1), "rows") for x in (data, drawn))
        covered = density_coverage(real, fake, k=5).coverage
        assert 0 < covered < 1
        assert trainer.guard.looks[0].coverage == pytest.approx(covered)


class TestHealthy:
    @pytest.mark.parametrize("data", [images(40), images(1), images(2)], ids=["far", "one", "two"])
    def test_nothing_learnt_yet_is_no_collapse(self, tmp_path, data):
        run = Run(tmp_path, lambda trainer: None, data=data)
        run.trainer.train()
        assert run.trainer.guard.collapsed is None
        assert run.trainer.state.global_step == 6
        if len(data) == 40:
            assert {look.coverage for look in run.trainer.guard.looks} == {0.0}

    def test_little_learnt_is_nothing_to_lose(self, tmp_path):
        """Three of forty images are covered, and then, of black images alone, none."""

        def blacken(trainer):
            flatten(trainer)
            for player in (trainer.model.generator, trainer.averaged):
                player.to_image.bias.data.fill_(-50.0)

        run = Run(tmp_path, blacken, data=torch.cat([own_images(pipeline(), 3), images(37) - 0.5]))
        run.trainer.train()
        assert 0 < run.trainer.guard.best < 0.1
        assert run.trainer.guard.looks[-1].coverage == 0
        assert run.trainer.guard.collapsed is None
        assert run.trainer.state.global_step == 6

    @pytest.mark.parametrize("make", [lambda: pipeline(norm="batch"), style_pipeline])
    def test_looking_changes_nothing(self, tmp_path, make):
        data = own_images(make())
        random = torch.get_rng_state()
        ends = []
        for number, values in enumerate([SLOW, SLOW | {"guard_steps": 3}, SLOW | {"guard": False}]):
            torch.set_rng_state(random)
            trainer = trained(make(), arguments(tmp_path / str(number), **values), data)
            ends.append((players(trainer), torch.get_rng_state()))
        assert same_run(ends[0][0], ends[1][0])
        assert same_run(ends[0][0], ends[2][0])
        assert ends[0][1].equal(ends[2][1])


def poison(trainer):
    trainer.model.generator.to_image.bias.data.fill_(float("nan"))


def poison_data(trainer):
    trainer.train_dataset.images.fill_(float("nan"))


class TestNotFinite:
    @pytest.mark.parametrize(
        ("accident", "at", "guard"),
        [(poison, 4, True), (poison, 4, False), (poison_data, 2, True)],  # two batches are fetched already
    )
    def test_the_discriminator_s_turn(self, tmp_path, accident, at, guard):
        run = Run(tmp_path, accident, at=at, event="begin", guard=guard)
        with pytest.raises(FloatingPointError, match="^the discriminator's loss is not finite at step 5") as error:
            run.trainer.train()
        assert "\n" not in str(error.value)
        assert ("the last healthy state, of step 4, is in trainer.pipeline" in str(error.value)) == guard
        assert finite(run.trainer.pipeline.generator)
        assert finite(run.trainer.pipeline.discriminator)
        now = players(run.trainer)
        if accident is poison and not guard:  # the accident itself
            now["gan.generator.to_image.bias"] = run.seen[4]["gan.generator.to_image.bias"]
        assert same(now, run.seen[4])
        run.trainer.save_model()
        assert GANPipeline.from_pretrained(tmp_path).draw(torch.zeros(1, 4)).isfinite().all()

    @pytest.mark.parametrize("guard", [True, False])
    def test_the_generator_s_turn(self, tmp_path, guard):
        """The discriminator has moved; the generator and its average have not."""
        run = Run(tmp_path, lambda trainer: None, guard=guard)
        turn = run.trainer._generator_turn

        def with_logits_of_minus_infinity(model, count):
            if run.trainer.state.global_step == 4:
                run.trainer.model.discriminator.head.bias.data.fill_(float("-inf"))
            return turn(model, count)

        run.trainer._generator_turn = with_logits_of_minus_infinity
        with pytest.raises(FloatingPointError, match="^the generator's loss is not finite at step 5"):
            run.trainer.train()
        now = players(run.trainer)
        for name, value in run.seen[4].items():
            if guard or "discriminator" not in name:
                assert now[name].equal(value)
        assert all(parameter.requires_grad for parameter in run.trainer.model.discriminator.parameters())

    @pytest.mark.parametrize("every", [1, 3, None], ids=["seen by the guard", "seen in the next step", "no guard"])
    def test_after_a_step_that_made_nan(self, tmp_path, every):
        """A finite loss may have a gradient that is not. The average that draws does not take NaN over."""
        run = Run(tmp_path, poison, event="between", at=4, guard=every is not None, guard_steps=every)
        with pytest.raises(FloatingPointError) as error:
            run.trainer.train()
        assert finite(run.trainer.pipeline.generator)
        if every is not None:
            healthy = {1: 4, 3: 3}[every]
            assert run.trainer.guard.healthy == healthy
            assert f"of step {healthy}, is in trainer.pipeline" in str(error.value)
            assert same(players(run.trainer), run.seen[healthy])


class TestResumed:
    def test_the_state_that_is_kept_is_of_the_step_that_is_named(self, tmp_path):
        """Killed after the look of step 3, resumed from step 2: the file is newer than the checkpoint."""
        values = SLOW | {"save_strategy": "steps", "save_steps": 2}
        first = Run(tmp_path, lambda trainer: None, **(values | {"max_steps": 3}))
        first.trainer.train()
        rest = Run(tmp_path, poison, at=2, event="begin", **values)
        with pytest.raises(FloatingPointError) as error:
            rest.trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        (step,) = re.findall(r"of step (\d), is in trainer.pipeline", str(error.value))
        assert same(players(rest.trainer), {"2": rest.seen[2], "3": players(first.trainer)}[step])

    def test_a_healthy_state_that_is_gone_is_not_promised(self, tmp_path, caplog):
        """A checkpoint may be moved to another machine without `_private/`."""
        values = SLOW | {"save_strategy": "steps", "save_steps": 2}
        first = Run(tmp_path, lambda trainer: None, **(values | {"max_steps": 2}))
        first.trainer.train()
        state = json.loads((tmp_path / "checkpoint-2" / "guard.json").read_text())
        assert [look["step"] for look in state["looks"]] == [0, 1, 2]
        first.trainer.save_model()
        assert [path.parent for path in tmp_path.rglob("healthy*")] == [tmp_path / "_private" / "guard"]
        first.trainer.guard._file.unlink()
        rest = Run(tmp_path, flatten, at=3, **values)
        with caplog.at_level(logging.WARNING, "hf_unlearn"):
            rest.trainer.train(resume_from_checkpoint=True)
        (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("hf_unlearn")]
        assert message.endswith("nothing to go back to")
