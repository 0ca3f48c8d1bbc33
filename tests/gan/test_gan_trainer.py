"""`GANTrainer` against the loop written out in plain PyTorch, and what it logs, evaluates and is fed."""

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
    same_run,
    style_pipeline,
    trained,
    weights,
)
from PIL import Image
from transformers import TrainerCallback

from hf_unlearn import GANTrainer
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
            {"max_steps": 7, "per_device_train_batch_size": 5, "seed": 7},
            {"max_steps": 5, "r1_weight": 0.0, "discriminator_learning_rate": 1e-4},
            {"max_steps": 5, "r1_weight": 10.0, "r1_every": 3, "ema_decay": 0.0},
            {"discriminator_learning_rate": 0.0, "adam_beta1": 0.5, "adam_beta2": 0.9},
            {"weight_decay": 0.1, "r1_every": 1},
            {"max_grad_norm": 1e-3},
            {"max_steps": 5, "discriminator_warmup": 3, "weight_decay": 0.1},
            {"max_steps": 12, "ema_decay": 0.999},
        ],
        ids=lambda values: " ".join(values),
    )
    def test_settings(self, tmp_path, values):
        """In colour."""
        self.both(tmp_path, lambda dtype: pipeline(dtype=dtype, channels=3), images(channels=3), **values)

    def test_batch_norm(self, tmp_path):
        """Statistics too: the average takes them over as they are."""
        trainer, _ = self.both(tmp_path, lambda dtype: pipeline(dtype=dtype, norm="batch"), max_steps=4)
        assert trainer.averaged.first_norm.running_mean.equal(trainer.model.generator.first_norm.running_mean)

    @pytest.mark.parametrize(
        "values",
        [{}, {"path_length_weight": 2.0, "path_length_every": 1}, {"path_length_weight": 2.0, "path_length_every": 2}],
        ids=["plain", "path", "every second"],
    )
    def test_a_style_generator(self, tmp_path, values):
        trainer, _ = self.both(tmp_path, style_pipeline, max_steps=4, **values)
        assert trainer.pipeline.draw(torch.zeros(2, 2, 3)).shape == (2, 1, 8, 8)

    def test_an_anchor_is_a_penalty_in_the_loss(self, tmp_path):
        start = pipeline(dtype=torch.float64).generator.state_dict()

        def penalty(parameters):
            return sum(0.7 * (value - start[name]).pow(2).sum() for name, value in parameters.items())

        anchor = QuadraticAnchor(start, isotropic=0.7)
        trainer, _ = self.both(tmp_path, anchor=anchor, penalty=penalty, max_steps=5)
        assert penalty(dict(trainer.model.generator.named_parameters())).item() > 1e-6

    def test_false_images_take_the_place_of_drawn_ones(self, tmp_path):
        def false_images(step):
            return torch.full((1, 1, 8, 8), -0.1 * step)

        class Shown(GANTrainer):
            def false_images(self, count, step):
                assert count == 4
                return false_images(step).to(self.averaged.dtype)

        self.both(tmp_path, trainer_class=Shown, false_images=false_images)

    def test_logs_are_means_over_steps(self, tmp_path):
        recorder = Recorder()
        args = arguments(
            tmp_path, max_steps=4, logging_strategy="steps", logging_steps=2, r1_every=3, path_length_weight=0.5,
            path_length_every=2,
        )  # fmt: skip
        *_, terms = plain_loop(style_pipeline(dtype=torch.float64), images(), args)
        trained(style_pipeline(dtype=torch.float64), args, callbacks=[recorder])
        logs = [logs for logs in recorder.logs if "loss" in logs]
        assert len(logs) == 2
        for window, log in enumerate(logs):
            steps = terms[2 * window : 2 * window + 2]
            for name in terms[0]:
                mean = sum(step.get(name, 0.0) for step in steps) / 2
                # Trainer rounds the loss to 4 digits after the point or more.
                assert log[name] == pytest.approx(mean, rel=1e-3, abs=1e-4), name
        assert logs[0]["score_real"] != logs[1]["score_real"]


class TestTurns:
    @pytest.mark.parametrize("values", [{"weight_decay": 0.1, "adam_beta1": 0.9}, {"path_length_weight": 1.0}])
    def test_one_player_at_a_time(self, tmp_path, values):
        seen = []

        def look(event, step):
            seen.append((event, weights(trainer.model.generator), weights(trainer.model.discriminator)))

        args = arguments(tmp_path, **values)
        pipe = pipeline()
        pipe.generator.mapping = torch.nn.Identity()  # of one's own, for the path lengths
        trainer = GANTrainer(pipe, args, train_dataset=images(), callbacks=[Watch(look)])
        trainer.train()
        assert [event for event, *_ in seen] == ["begin", "between", "end"] * 3
        for (_, generator, discriminator), (event, next_generator, next_discriminator) in zip(
            seen, seen[1:], strict=False
        ):
            assert same(generator, next_generator) == (event != "end")
            assert same(discriminator, next_discriminator) == (event != "between")

    def test_same_seed_same_run(self, tmp_path):
        first, second = (trained(pipeline(), arguments(tmp_path)) for _ in range(2))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(99)
            other = trained(pipeline(), arguments(tmp_path, seed=1))
        assert same_run(players(first), players(second))
        assert not same_run(players(first), players(other))
        assert first.pipeline.generator is first.averaged
        assert first.pipeline.discriminator is first.model.discriminator
        assert not same(weights(first.averaged), weights(first.model.generator))
        # A turn that froze the other player has given it back.
        assert all(parameter.requires_grad for parameter in first.model.parameters())

    def test_bf16(self, tmp_path):
        """Weights stay in fp32."""
        trainer = trained(style_pipeline(), arguments(tmp_path, bf16=True, path_length_weight=1.0))
        assert {value.dtype for value in trainer.model.state_dict().values()} == {torch.float32}
        assert finite(trainer.model)


class TestData:
    def test_the_same_images_in_another_form(self, tmp_path):
        """Batch by batch, in the same order."""
        arrays = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
        pictures = [Image.fromarray(array) for array in arrays]
        tensor = torch.from_numpy(arrays).float()[:, None] / 127.5 - 1
        forms = [
            tensor,
            datasets.Dataset.from_dict({"image": pictures, "label": list(range(12))}),
            datasets.Dataset.from_dict({"images": pictures}),
            datasets.Dataset.from_dict({"pixel_values": tensor.tolist()}),
            datasets.Dataset.from_dict({"pixel_values": tensor.tolist()}).with_format("torch"),
            [{"image": picture, "label": 1} for picture in pictures],
        ]
        order = list(Reshuffled(12, 12, seed=0))
        for rows in forms:
            trainer = GANTrainer(pipeline(), arguments(tmp_path), train_dataset=rows)
            batches = [batch["pixel_values"] for batch in trainer.get_train_dataloader()]
            assert [batch.shape for batch in batches] == [(4, 1, 8, 8)] * 3
            torch.testing.assert_close(torch.cat(batches), tensor[order], rtol=0, atol=1e-6)
        trained(pipeline(), arguments(tmp_path), forms[1])  # Trainer drops no column that the collator needs

    def test_resized(self, tmp_path):
        rows = [{"image": Image.new("L", (12, 16), shade)} for shade in range(0, 120, 10)]
        trainer = GANTrainer(pipeline(), arguments(tmp_path, resize=True), train_dataset=rows)
        batch = next(iter(trainer.get_train_dataloader()))["pixel_values"]
        assert batch.shape == (4, 1, 8, 8)
        assert {round((image.mean().item() + 1) * 127.5) for image in batch} <= set(range(0, 120, 10))

    def test_batches(self, tmp_path):
        """A few images make full ones; epochs end as they do elsewhere."""
        trainer = GANTrainer(pipeline(), arguments(tmp_path, max_steps=5), train_dataset=images(3))
        assert [len(batch["pixel_values"]) for batch in trainer.get_train_dataloader()] == [4] * 5
        trainer = trained(pipeline(), arguments(tmp_path, max_steps=-1, num_train_epochs=2), images(10))
        assert trainer.state.global_step == 6


@pytest.mark.parametrize(("size", "total"), [(5, 17), (5, 3), (1, 4), (20, 60)])
def test_every_pass_is_another_permutation(size, total):
    sampler = Reshuffled(size, total, seed=3)
    rows = list(sampler)
    assert len(rows) == len(sampler) == total
    assert all(isinstance(row, int) for row in rows)
    passes = [tuple(rows[begin : begin + size]) for begin in range(0, total, size)]
    assert all(len(set(one)) == len(one) and set(one) <= set(range(size)) for one in passes)
    assert len(set(passes)) == len(passes) or size == 1
    assert rows == list(sampler)  # again
    assert rows == list(Reshuffled(size, 2 * total, seed=3))[:total]  # a longer run begins the same
    assert rows != list(Reshuffled(size, total, seed=1)) or size == 1


class Halves(torch.nn.Module):
    """Mean of the upper and of the lower half."""

    name = "halves"

    def forward(self, x):
        return torch.stack([x[:, :, :4].flatten(1).mean(1), x[:, :, 4:].flatten(1).mean(1)], 1)


class TestEvaluate:
    @pytest.mark.parametrize("extractor", [None, Halves()], ids=["pixels", "extractor"])
    def test_is_what_the_metrics_say(self, tmp_path, extractor):
        data = own_images(pipeline(seed=1), 40)
        trainer = GANTrainer(
            pipeline(), arguments(tmp_path), train_dataset=images(), eval_dataset=data[:9], extractor=extractor
        )
        random = torch.get_rng_state()
        metrics = trainer.evaluate(data, metric_key_prefix="other")
        assert torch.get_rng_state().equal(random)
        drawn = pipeline().draw(torch.randn(40, 4, generator=seeded_generator("cpu", 0, EVALUATION_SEED)))
        real, fake = (Features(x.flatten(1) if extractor is None else extractor(x), "") for x in (data, drawn))
        spread = density_coverage(real, fake)
        assert metrics["other_fid"] == pytest.approx(frechet_distance(real, fake).distance, rel=1e-4)
        assert metrics["other_density"] == pytest.approx(spread.density)
        assert metrics["other_coverage"] == pytest.approx(spread.coverage)

    def test_while_training(self, tmp_path):
        """Logged, and training is none the wiser."""
        recorder = Recorder()
        args, data = arguments(tmp_path, eval_strategy="steps", eval_steps=1), own_images(pipeline(), 40)
        trainer = GANTrainer(pipeline(), args, train_dataset=images(), eval_dataset=data, callbacks=[recorder])
        trainer.train()
        logged = [logs["eval_fid"] for logs in recorder.logs if "eval_fid" in logs]
        assert len(logged) == len(set(logged)) == 3
        assert logged[-1] == pytest.approx(trainer.evaluate()["eval_fid"], rel=1e-3)
        assert same_run(players(trainer), players(trained(pipeline(), arguments(tmp_path))))


def test_what_is_saved_is_the_average_and_can_be_trained_on(tmp_path):
    first = tmp_path / "first"
    trainer = GANTrainer(pipeline(), arguments(first, guard=True), train_dataset=images())
    assert not first.exists() or not list(first.iterdir())  # nothing is written before it trains
    trainer.train()
    trainer.save_model()
    there = GANTrainer(str(first), arguments(tmp_path / "second"), train_dataset=images())
    assert there.base_model == str(first)
    assert same(weights(there.averaged), weights(trainer.averaged))
    assert same(weights(there.model.generator), weights(trainer.averaged))
    assert same(weights(there.model.discriminator), weights(trainer.model.discriminator))
    card = (first / "README.md").read_text()
    assert "library_name: hf_unlearn" in card
    assert "3 steps of 4 images" in card
    assert 'GANPipeline.from_pretrained("first")' in card
