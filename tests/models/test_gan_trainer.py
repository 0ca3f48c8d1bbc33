"""`GANTrainer` against the loop written out in plain PyTorch, and what it logs, evaluates and is fed."""

import copy

import datasets
import numpy as np
import pytest
import torch
from gan_data import (
    Watch,
    arguments,
    check_equal,
    finite,
    images,
    own_images,
    pipeline,
    plain_loop,
    players,
    same,
    style_pipeline,
    trained,
    weights,
)
from PIL import Image
from scipy.linalg import sqrtm
from transformers import TrainerCallback

from hf_unlearn import GANConfig, GANTrainer
from hf_unlearn.gan.players import Reshuffled
from hf_unlearn.gan.trainer import EVALUATION_SEED
from hf_unlearn.metrics.features import Features
from hf_unlearn.metrics.generation import density_coverage, frechet_distance
from hf_unlearn.modes import seeded_generator
from hf_unlearn.parameters.anchors import QuadraticAnchor


class Recorder(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


class TestAgainstThePlainLoop:
    """In double precision, where nothing but a wrong formula makes a difference."""

    def both(self, tmp_path, make=pipeline, data=None, trainer_class=GANTrainer, **values):
        loop = {key: values.pop(key) for key in ("penalty", "false_images") if key in values}
        anchor = values.pop("anchor", None)
        data = images() if data is None else data
        args = arguments(tmp_path, **values)
        pipe = make(dtype=torch.float64)
        expected = plain_loop(pipe, data, args, **loop)
        trainer = trainer_class(pipe, args, train_dataset=data)
        trainer.anchor = anchor
        trainer.train()
        # The running mean of the path lengths may be kept in single precision.
        check_equal(trainer, expected, **({"rtol": 1e-5, "atol": 1e-7} if args.path_length_weight else {}))
        return trainer, expected

    @pytest.mark.parametrize(
        "values",
        [
            {"max_steps": 1},
            {"max_steps": 7},
            {"max_steps": 5, "r1_weight": 0.0},
            {"max_steps": 5, "r1_weight": 10.0, "r1_every": 1},
            {"max_steps": 5, "r1_every": 3},
            {"discriminator_learning_rate": 1e-4},
            {"discriminator_learning_rate": 0.0},
            {"adam_beta1": 0.5, "adam_beta2": 0.9},
            {"weight_decay": 0.1},
            {"max_grad_norm": 1e-3},
            {"max_steps": 5, "discriminator_warmup": 3},
            {"max_steps": 12, "ema_decay": 0.999},
            {"max_steps": 4, "ema_decay": 0.0},
            {"max_steps": 5, "path_length_weight": 2.0, "path_length_every": 2},
            {"seed": 7},
            {"per_device_train_batch_size": 5},
        ],
        ids=lambda values: " ".join(values),
    )
    def test_settings(self, tmp_path, values):
        self.both(tmp_path, **values)

    def test_batch_norm(self, tmp_path):
        """Statistics too: the average takes them over as they are."""
        trainer, _ = self.both(tmp_path, lambda dtype: pipeline(dtype=dtype, norm="batch"), max_steps=4)
        assert trainer.averaged.first_norm.running_mean.equal(trainer.model.generator.first_norm.running_mean)

    @pytest.mark.parametrize(
        "values", [{}, {"path_length_weight": 2.0, "path_length_every": 1}], ids=["plain", "path"]
    )
    def test_a_style_generator(self, tmp_path, values):
        trainer, _ = self.both(tmp_path, style_pipeline, max_steps=4, **values)
        assert trainer.pipeline.draw(torch.zeros(2, 2, 3)).shape == (2, 1, 8, 8)

    def test_colour(self, tmp_path):
        self.both(tmp_path, lambda dtype: pipeline(dtype=dtype, channels=3), images(channels=3))

    def test_an_anchor_is_a_penalty_in_the_loss(self, tmp_path):
        start = pipeline(dtype=torch.float64).generator.state_dict()

        def penalty(parameters):
            return sum(0.7 * (value - start[name]).pow(2).sum() for name, value in parameters.items())

        anchor = QuadraticAnchor(start, isotropic=0.7)
        trainer, _ = self.both(tmp_path / "held", anchor=anchor, penalty=penalty, max_steps=5)
        free, _ = self.both(tmp_path / "free", max_steps=5)
        assert not same(weights(trainer.averaged), weights(free.averaged))

    def test_false_images_take_the_place_of_drawn_ones(self, tmp_path):
        def false_images(step):
            return torch.full((1, 1, 8, 8), -0.1 * step)

        class Shown(GANTrainer):
            def false_images(self, count, step):
                assert count == 4
                return false_images(step).to(self.averaged.dtype)

        self.both(tmp_path, trainer_class=Shown, false_images=false_images)

    def test_single_precision(self, tmp_path):
        """Gradients too small for fp32 move a weight either way, so that only most of them are where they should be."""
        args = arguments(tmp_path, learning_rate=1e-3)
        loop = plain_loop(pipeline(), images(), args)
        trainer = trained(pipeline(), args)
        for player, expected in zip((trainer.model.generator, trainer.model.discriminator), loop, strict=False):
            ours, theirs = (torch.cat([v.flatten() for v in p.state_dict().values()]) for p in (player, expected))
            assert ((ours - theirs).abs() < 1e-5).double().mean() > 0.98

    def test_logs_are_means_over_steps(self, tmp_path):
        recorder = Recorder()
        args = arguments(
            tmp_path, max_steps=4, logging_strategy="steps", logging_steps=2, r1_every=3, path_length_weight=0.5,
            path_length_every=2,
        )  # fmt: skip
        *_, terms = plain_loop(pipeline(), images(), args)
        trained(pipeline(), args, callbacks=[recorder])
        logs = [logs for logs in recorder.logs if "loss" in logs]
        assert len(logs) == 2
        for window, log in enumerate(logs):
            steps = terms[2 * window : 2 * window + 2]
            for name in terms[0]:
                mean = sum(step.get(name, 0.0) for step in steps) / 2
                # Trainer rounds the loss to 4 digits after the point or more.
                assert log[name] == pytest.approx(mean, rel=1e-3, abs=1e-4), name
        assert logs[0]["score_real"] != logs[1]["score_real"]

    def test_an_anchor_is_logged(self, tmp_path):
        recorder = Recorder()
        pipe = pipeline()
        trainer = GANTrainer(
            pipe,
            arguments(tmp_path, logging_strategy="steps", logging_steps=3),
            train_dataset=images(),
            callbacks=[recorder],
        )
        start = weights(trainer.model.generator)
        trainer.anchor = QuadraticAnchor(start, isotropic=0.25)
        trainer.train()
        moved = sum((v - start[k]).square().sum().item() for k, v in trainer.model.generator.state_dict().items())
        (log,) = [logs for logs in recorder.logs if "loss" in logs]
        assert log["isotropic"] == pytest.approx(0.25 * moved, rel=1e-4)
        assert moved > 0


class TestTurns:
    @pytest.mark.parametrize("values", [{}, {"weight_decay": 0.1, "adam_beta1": 0.9}, {"path_length_weight": 1.0}])
    def test_one_player_at_a_time(self, tmp_path, values):
        seen = []

        def look(event, step):
            seen.append((event, weights(trainer.model.generator), weights(trainer.model.discriminator)))

        args = arguments(tmp_path, **values)
        trainer = GANTrainer(pipeline(), args, train_dataset=images(), callbacks=[Watch(look)])
        trainer.train()
        assert [event for event, *_ in seen] == ["begin", "between", "end"] * 3
        for (_, generator, discriminator), (event, next_generator, next_discriminator) in zip(
            seen, seen[1:], strict=False
        ):
            assert same(generator, next_generator) == (event != "end")
            assert same(discriminator, next_discriminator) == (event != "between")

    def test_warm_up_leaves_the_generator(self, tmp_path):
        pipe = pipeline()
        before = weights(pipe.generator), weights(pipe.discriminator)
        trainer = trained(pipe, arguments(tmp_path, discriminator_warmup=3, weight_decay=0.1))
        assert same(before[0], weights(trainer.model.generator))
        assert same(before[0], weights(trainer.averaged))
        assert not same(before[1], weights(trainer.model.discriminator))

    def test_the_pipeline_holds_the_average_and_the_discriminator(self, tmp_path):
        pipe = pipeline()
        trainer = trained(pipe, arguments(tmp_path))
        assert trainer.pipeline is pipe
        assert pipe.generator is trainer.averaged
        assert pipe.discriminator is trainer.model.discriminator
        assert not same(weights(pipe.generator), weights(trainer.model.generator))

    def test_both_can_move_again(self, tmp_path):
        """A turn that froze the other player has given it back."""
        trainer = trained(pipeline(), arguments(tmp_path))
        assert all(parameter.requires_grad for parameter in trainer.model.parameters())
        again = trained(trainer.pipeline, arguments(tmp_path))
        assert not same(players(trainer), players(again))

    def test_same_seed_same_run(self, tmp_path):
        first, second = (trained(pipeline(), arguments(tmp_path)) for _ in range(2))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(99)
            other = trained(pipeline(), arguments(tmp_path, seed=1))
        assert same(players(first), players(second))
        assert not same(players(first), players(other))

    @pytest.mark.parametrize("values", [{}, {"path_length_weight": 1.0}], ids=["plain", "path"])
    def test_bf16(self, tmp_path, values):
        """Weights stay in fp32, and move about as they would there."""
        trainer = trained(pipeline(), arguments(tmp_path, bf16=True, **values))
        assert {value.dtype for value in trainer.model.state_dict().values()} == {torch.float32}
        assert finite(trainer.model)

    def test_path_lengths_of_a_saturated_generator(self, tmp_path):
        """Where tanh is flat, no image moves with its style: the penalty has no direction, and makes no NaN."""
        pipe = pipeline()
        with torch.no_grad():
            pipe.generator.to_image.bias.fill_(50.0)
        trainer = trained(pipe, arguments(tmp_path, path_length_weight=1.0, max_steps=1))
        assert finite(trainer.model)
        assert finite(trainer.averaged)

    def test_it_learns(self, tmp_path):
        """Bright images come out where grey ones did."""
        pipe = pipeline()
        latents = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        before = (pipe.draw(latents).mean() - images(64).mean()).abs()
        args = arguments(tmp_path, max_steps=80, learning_rate=5e-3, ema_decay=0.9, per_device_train_batch_size=16)
        trained(pipe, args, images(64))
        assert (pipe.draw(latents).mean() - images(64).mean()).abs() < 0.5 * before


class TestData:
    def pictures(self, n=12):
        arrays = np.random.default_rng(0).integers(0, 256, (n, 8, 8), dtype=np.uint8)
        return arrays, [Image.fromarray(array) for array in arrays]

    @pytest.mark.parametrize("form", ["image", "images", "pixel_values", "torch", "list"])
    def test_the_same_images_in_another_form(self, tmp_path, form):
        """Gradient descent, where rounding stays rounding."""
        arrays, pictures = self.pictures()
        tensor = torch.from_numpy(arrays).float()[:, None] / 127.5 - 1
        rows = {
            "image": lambda: datasets.Dataset.from_dict({"image": pictures, "label": list(range(12))}),
            "images": lambda: datasets.Dataset.from_dict({"images": pictures}),
            "pixel_values": lambda: datasets.Dataset.from_dict({"pixel_values": tensor.tolist()}),
            "torch": lambda: datasets.Dataset.from_dict({"pixel_values": tensor.tolist()}).with_format("torch"),
            "list": lambda: [{"image": picture, "label": 1} for picture in pictures],
        }[form]()
        values = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 5}
        expected = trained(pipeline(), arguments(tmp_path, **values), tensor)
        trainer = trained(pipeline(), arguments(tmp_path, **values), rows)
        for name, value in players(expected).items():
            torch.testing.assert_close(trainer.players()[name], value, rtol=1e-4, atol=1e-6)

    def test_resized(self, tmp_path):
        rows = [{"image": Image.new("L", (12, 16), shade)} for shade in range(0, 120, 10)]
        trainer = GANTrainer(pipeline(), arguments(tmp_path, resize=True), train_dataset=rows)
        batch = next(iter(trainer.get_train_dataloader()))["pixel_values"]
        assert batch.shape == (4, 1, 8, 8)
        assert {round((image.mean().item() + 1) * 127.5) for image in batch} <= set(range(0, 120, 10))

    def test_few_images_make_full_batches(self, tmp_path):
        trainer = GANTrainer(pipeline(), arguments(tmp_path, max_steps=5), train_dataset=images(3))
        assert [len(batch["pixel_values"]) for batch in trainer.get_train_dataloader()] == [4] * 5

    def test_epochs(self, tmp_path):
        trainer = trained(pipeline(), arguments(tmp_path, max_steps=-1, num_train_epochs=2), images(10))
        assert trainer.state.global_step == 6


class TestReshuffled:
    @pytest.mark.parametrize(("size", "total"), [(5, 5), (5, 17), (5, 3), (1, 4), (7, 70)])
    def test_every_pass_is_a_permutation(self, size, total):
        sampler = Reshuffled(size, total, seed=3)
        rows = list(sampler)
        assert len(rows) == len(sampler) == total
        assert all(isinstance(row, int) for row in rows)
        for begin in range(0, total, size):
            one = rows[begin : begin + size]
            assert len(set(one)) == len(one)
            assert set(one) <= set(range(size))
        assert rows == list(sampler)  # again
        assert rows == list(Reshuffled(size, 2 * total, seed=3))[:total]  # a longer run begins the same

    def test_passes_and_seeds_differ(self):
        rows = list(Reshuffled(20, 60, seed=0))
        assert len({tuple(rows[begin : begin + 20]) for begin in (0, 20, 40)}) == 3
        assert rows != list(Reshuffled(20, 60, seed=1))


class Halves(torch.nn.Module):
    """Mean of the upper and of the lower half."""

    name = "halves"

    def forward(self, x):
        return torch.stack([x[:, :, :4].flatten(1).mean(1), x[:, :, 4:].flatten(1).mean(1)], 1)


class TestEvaluate:
    def trainer(self, tmp_path, data, **kwargs):
        pipe = pipeline()
        args = arguments(tmp_path, **kwargs.pop("values", {}))
        return GANTrainer(pipe, args, train_dataset=images(), eval_dataset=data, **kwargs)

    @pytest.mark.parametrize("extractor", [None, Halves()], ids=["pixels", "extractor"])
    def test_is_what_the_metrics_say(self, tmp_path, extractor):
        data = own_images(pipeline(seed=1), 40)
        trainer = self.trainer(tmp_path, data, extractor=extractor)
        metrics = trainer.evaluate()
        latents = torch.randn(40, 4, generator=seeded_generator("cpu", 0, EVALUATION_SEED))
        drawn = pipeline().draw(latents)
        real, fake = (Features(x.flatten(1) if extractor is None else extractor(x), "") for x in (data, drawn))
        spread = density_coverage(real, fake)
        assert metrics["eval_fid"] == pytest.approx(frechet_distance(real, fake).distance, rel=1e-6)
        assert (metrics["eval_density"], metrics["eval_coverage"]) == (spread.density, spread.coverage)

    def test_by_hand(self, tmp_path):
        data = own_images(pipeline(seed=1), 40)
        metrics = self.trainer(tmp_path, data, extractor=Halves()).evaluate(metric_key_prefix="other")
        drawn = pipeline().draw(torch.randn(40, 4, generator=seeded_generator("cpu", 0, EVALUATION_SEED)))
        real, fake = (Halves()(x).double().numpy() for x in (data, drawn))
        covariances = np.cov(real.T), np.cov(fake.T)
        fid = ((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(
            covariances[0] + covariances[1] - 2 * sqrtm(covariances[0] @ covariances[1]).real
        )
        assert metrics["other_fid"] == pytest.approx(fid, rel=1e-4)
        radii = np.sort(np.linalg.norm(real[:, None] - real, axis=2), axis=1)[:, 5]
        inside = np.linalg.norm(real[:, None] - fake, axis=2) < radii[:, None]
        assert metrics["other_coverage"] == pytest.approx(inside.any(1).mean())
        assert metrics["other_density"] == pytest.approx(inside.sum() / (5 * 40))

    def test_the_other_dataset_counts(self, tmp_path):
        trainer = self.trainer(tmp_path, own_images(pipeline(), 40))
        near, far = trainer.evaluate(), trainer.evaluate(images(40))
        assert near["eval_fid"] < far["eval_fid"]
        assert near["eval_coverage"] > far["eval_coverage"] == 0

    def test_while_training(self, tmp_path):
        """Logged, and training is none the wiser."""
        recorder = Recorder()
        values = {"eval_strategy": "steps", "eval_steps": 1}
        trainer = self.trainer(tmp_path, own_images(pipeline(), 40), values=values, callbacks=[recorder])
        trainer.train()
        logged = [logs["eval_fid"] for logs in recorder.logs if "eval_fid" in logs]
        assert len(logged) == len(set(logged)) == 3
        assert logged[-1] == trainer.evaluate()["eval_fid"]
        assert same(players(trainer), players(trained(pipeline(), arguments(tmp_path))))

    def test_changes_no_random_state(self, tmp_path):
        trainer = self.trainer(tmp_path, own_images(pipeline(), 40))
        before = torch.get_rng_state()
        trainer.evaluate()
        assert torch.get_rng_state().equal(before)


class TestSaving:
    def test_what_is_saved_draws_as_the_average(self, tmp_path):
        from hf_unlearn import GANPipeline

        trainer = trained(pipeline(), arguments(tmp_path))
        trainer.save_model()
        loaded = GANPipeline.from_pretrained(tmp_path)
        assert same(weights(loaded.generator), weights(trainer.averaged))
        assert same(weights(loaded.discriminator), weights(trainer.model.discriminator))
        card = (tmp_path / "README.md").read_text()
        assert "library_name: hf_unlearn" in card
        assert "3 steps of 4 images" in card
        assert f"GANPipeline.from_pretrained({str(tmp_path.name)!r}".replace("'", '"') in card.replace("'", '"')

    def test_goes_on_from_what_is_saved(self, tmp_path):
        trainer = trained(pipeline(), arguments(tmp_path / "first"))
        trainer.save_model()
        there = trained(str(tmp_path / "first"), arguments(tmp_path / "second"))
        here = trained(copy.deepcopy(trainer.pipeline), arguments(tmp_path / "third"))
        assert same(players(there), players(here))
        assert there.base_model == str(tmp_path / "first")

    def test_a_good_trainer_writes_nothing_before_it_trains(self, tmp_path):
        GANTrainer(pipeline(), arguments(tmp_path, guard=True), train_dataset=images())
        assert not list(tmp_path.iterdir())

    def test_the_defaults(self, tmp_path):
        args = GANConfig(str(tmp_path), use_cpu=True)
        assert (args.learning_rate, args.adam_beta1, args.adam_beta2, args.max_grad_norm) == (2e-3, 0.0, 0.99, 0.0)
        assert (args.max_steps, args.per_device_train_batch_size, args.weight_decay) == (8_000, 64, 0.0)
        assert args.lr_scheduler_type == "constant"
        assert args.guard is True
