"""What holds a run: the stability term, averaged weights, the guard; and whether a generator forgets."""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from diffusers import DDPMPipeline, UNet2DModel
from image_data import QUIET, distance, same, weights
from transformers import TrainerCallback

from hf_unlearn import VDUConfig, VDUTrainer
from hf_unlearn.examples import ddpm as small_ddpm
from hf_unlearn.parameters.reference import ReferencePoint, trainable_parameters
from hf_unlearn.unlearning.diffusion.drawing import generate
from hf_unlearn.unlearning.diffusion.encoded import EncodedImages
from hf_unlearn.unlearning.diffusion.saving import AverageWeights


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def pictures(n, seed=0):
    return torch.rand(n, 1, 8, 8, generator=seeded(seed)) * 2 - 1


def rows(images):
    return Dataset.from_dict({"pixel_values": images.numpy()}).with_format("torch")


def trainer_of(pipeline, folder, *, forget=None, **values):
    plain = {
        "guard": False,
        "grid_images": 0,
        "replay_samples": 0,
        "forget_loss": "ascent",
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "num_inference_steps": 2,
    }
    args = VDUConfig(output_dir=str(folder), **(QUIET | plain | values.pop("args", {})))
    return VDUTrainer(
        pipeline=pipeline, args=args, forget_dataset=rows(pictures(8)) if forget is None else forget, **values
    )


def built(trainer):
    """The anchor as `train` would build it."""
    trainer.reference, trainer._resuming = ReferencePoint.capture(trainer.model), False
    trainer.anchor = trainer.build_anchor()
    return trainer


def noised(model, scale=0.01, seed=0):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter += scale * torch.randn(parameter.shape, generator=seeded(1000 * seed + index))
    return model


@pytest.fixture
def checkpoints(tiny_ddpm, tmp_path):
    """Folders of U-Nets near the tiny one."""
    folders = []
    for number in range(2):
        folders.append(str(tmp_path / f"saved-{number}"))
        noised(tiny_ddpm.unet, seed=number).save_pretrained(folders[-1])
    return folders


def one_line(error):
    return "\n" not in str(error.value)


class TestPrecision:
    def test_two_checkpoints_have_a_variance(self, tiny_ddpm, checkpoints, tmp_path, caplog):
        args = {"stability_weight": 0.1, "checkpoints": checkpoints}
        with caplog.at_level(logging.INFO, "hf_unlearn"):
            trainer = built(trainer_of(tiny_ddpm, tmp_path / "out", args=args))
        assert trainer.precision_name == "inverse variance over 2 checkpoints"
        assert "inverse variance over 2 checkpoints" in caplog.text
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    def test_a_single_checkpoint_falls_back_to_the_fisher_and_says_so(self, tiny_ddpm, checkpoints, tmp_path, caplog):
        args = {"stability_weight": 0.1, "checkpoints": checkpoints[:1]}
        trainer = trainer_of(tiny_ddpm, tmp_path / "out", args=args)
        with caplog.at_level(logging.WARNING, "hf_unlearn"):
            trainer.train()
        warnings = [r.getMessage() for r in caplog.records if "Fisher" in r.getMessage()]
        assert len(warnings) == 1
        assert "\n" not in warnings[0]
        self.assert_is_the_fisher_and_told(trainer, tmp_path)

    def test_without_checkpoints_likewise(self, tiny_ddpm, tmp_path):
        trainer = trainer_of(tiny_ddpm, tmp_path / "out", args={"stability_weight": 0.1})
        trainer.train()
        self.assert_is_the_fisher_and_told(trainer, tmp_path)

    def assert_is_the_fisher_and_told(self, trainer, tmp_path):
        assert trainer.precision_name.startswith("fisher")
        assert trainer.provenance().hyperparameters["anchor_precision"] == trainer.precision_name
        assert trainer.precision_name in str(trainer.model_card(tmp_path / "out"))
        assert (tmp_path / "out" / "_private" / "fisher.safetensors").is_file()
        (anchor,) = trainer.anchor.anchors
        values = torch.cat([value.flatten() for value in anchor.diagonal.values()])
        assert values.mean().item() == pytest.approx(0.5, rel=1e-4)  # a mean precision of one, halved
        assert values.max() > 5 * values.mean()  # and no identity
        assert values.min() >= 0

    def test_the_fisher_is_that_of_the_forget_images(self, tiny_ddpm, tmp_path):
        """Of the last bias it is known: every answer moves by one, so that F is the number of pixels."""
        trainer = built(trainer_of(tiny_ddpm, tmp_path, args={"stability_weight": 0.1}))
        fisher = trainer._compute_fisher()
        draws = [fisher["conv_out.bias"].item()]
        for seed in range(1, 40):
            trainer.args.seed = seed
            draws.append(trainer._compute_fisher()["conv_out.bias"].item())
        assert torch.tensor(draws).mean().item() == pytest.approx(64, rel=0.5)

    def test_isotropic_is_half_the_squared_distance(self, tiny_ddpm, tmp_path):
        trainer = built(trainer_of(tiny_ddpm, tmp_path, args={"stability_weight": 0.7, "stability": "isotropic"}))
        start, moved = weights(tiny_ddpm.unet), noised(tiny_ddpm.unet)
        terms = trainer.anchor.value(trainable_parameters(moved))
        expected = 0.7 * 0.5 * distance(start, weights(moved)) ** 2
        assert sum(terms.values()).item() == pytest.approx(expected, rel=1e-4)
        assert trainer.precision_name.startswith("isotropic")

    def test_stands_beside_the_isotropic_weight(self, tiny_ddpm, tmp_path):
        args = {"stability_weight": 0.7, "stability": "isotropic", "isotropic_weight": 0.2}
        trainer = built(trainer_of(tiny_ddpm, tmp_path, args=args))
        moved = noised(tiny_ddpm.unet)
        expected = (0.7 * 0.5 + 0.2) * distance(weights(tiny_ddpm.unet), weights(moved)) ** 2
        assert sum(trainer.anchor.value(trainable_parameters(moved)).values()).item() == pytest.approx(
            expected, rel=1e-4
        )

    def test_without_a_weight_there_is_no_term_and_no_name(self, tiny_ddpm, checkpoints, tmp_path):
        trainer = built(trainer_of(tiny_ddpm, tmp_path / "out", args={"checkpoints": checkpoints}))
        assert trainer.anchor is None
        assert trainer.precision_name is None
        assert "anchor_precision" not in trainer.provenance().hyperparameters

    def test_a_mean_of_one_checkpoint_can_be_the_centre(self, tiny_ddpm, checkpoints, tmp_path):
        args = {
            "stability_weight": 1.0,
            "stability": "isotropic",
            "checkpoints": checkpoints[:1],
            "anchor": "checkpoint_mean",
        }
        trainer = built(trainer_of(tiny_ddpm, tmp_path / "out", args=args))
        saved = UNet2DModel.from_pretrained(checkpoints[0])
        assert sum(trainer.anchor.value(trainable_parameters(saved)).values()).item() == pytest.approx(0, abs=1e-8)
        assert sum(trainer.anchor.value(trainable_parameters(tiny_ddpm.unet)).values()).item() > 0.01

    @pytest.mark.parametrize("count", [0, 1])
    def test_inverse_variance_of_fewer_than_two_is_refused(self, count, tiny_ddpm, checkpoints, tmp_path):
        args = {"stability_weight": 0.1, "stability": "inverse_variance", "checkpoints": checkpoints[:count] or None}
        with pytest.raises(ValueError, match=f"^checkpoints: K = {count}") as error:
            trainer_of(tiny_ddpm, tmp_path / "out", args=args).train()
        assert one_line(error)

    def test_checkpoints_that_do_not_differ_are_refused(self, tiny_ddpm, tmp_path):
        folders = [str(tmp_path / name) for name in ("first", "second")]
        for folder in folders:
            tiny_ddpm.unet.save_pretrained(folder)
        args = {"stability_weight": 0.1, "checkpoints": folders}
        with pytest.raises(ValueError, match="^checkpoints: all 2 hold the same parameters") as error:
            trainer_of(tiny_ddpm, tmp_path / "out", args=args).train()
        assert one_line(error)

    def test_checkpoints_of_another_architecture_are_refused(self, tiny_ddpm, checkpoints, tmp_path):
        other = UNet2DModel(**{**tiny_ddpm.unet.config, "block_out_channels": (8, 16)})
        other.save_pretrained(tmp_path / "other")
        args = {"stability_weight": 0.1, "checkpoints": [checkpoints[0], str(tmp_path / "other")]}
        with pytest.raises(ValueError, match="^checkpoints: .*other") as error:
            trainer_of(tiny_ddpm, tmp_path / "out", args=args).train()
        assert one_line(error)

    @pytest.mark.parametrize("stability", ["inverse_variance", "fisher", "isotropic"])
    def test_holds_the_parameters(self, stability, tiny_ddpm, checkpoints, tmp_path):
        start, moves = weights(tiny_ddpm.unet), {}
        for weight in (0.0, 1e-3):
            pipeline = DDPMPipeline(copy.deepcopy(tiny_ddpm.unet), tiny_ddpm.scheduler)
            args = {
                "stability_weight": weight * {"inverse_variance": 1, "fisher": 1e4, "isotropic": 1e4}[stability],
                "stability": stability,
                "checkpoints": checkpoints,
                "optim": "sgd",
                "learning_rate": 0.02,
                "max_steps": 12,
            }
            trainer_of(pipeline, tmp_path / f"{weight}", args=args).train()
            moves[weight] = distance(start, weights(pipeline.unet))
        assert 0 < moves[1e-3] < 0.8 * moves[0.0]


class Steps(TrainerCallback):
    """The parameters after every step."""

    def __init__(self, model):
        self.model, self.points = model, []

    def on_step_end(self, args, state, control, **kwargs):
        self.points.append(weights(self.model))


class TestAverage:
    @pytest.mark.parametrize("decay", [0.3, 0.999])
    def test_is_the_recursion_written_out(self, decay, tiny_ddpm, tmp_path):
        start = weights(tiny_ddpm.unet)
        steps = Steps(tiny_ddpm.unet)
        trainer = trainer_of(tiny_ddpm, tmp_path, args={"ema_decay": decay, "max_steps": 6}, callbacks=[steps])
        assert isinstance(trainer.ema, AverageWeights)
        trainer.train()
        assert len(steps.points) == 6
        average = {name: value.double() for name, value in start.items()}
        for step, point in enumerate(steps.points, start=1):
            rate = min(decay, (1 + step) / (10 + step))
            average = {name: rate * value + (1 - rate) * point[name].double() for name, value in average.items()}
        now = weights(tiny_ddpm.unet)
        for name, value in average.items():
            torch.testing.assert_close(now[name], value.float(), rtol=1e-5, atol=1e-6)
        assert distance(now, steps.points[-1]) > 1e-3  # the model holds the average, not the last step

    def test_is_what_is_saved(self, tiny_ddpm, tmp_path):
        trainer = trainer_of(tiny_ddpm, tmp_path, args={"ema_decay": 0.9})
        trainer.train()
        trainer.save_model()
        saved = DDPMPipeline.from_pretrained(tmp_path)
        assert same(weights(saved.unet), weights(tiny_ddpm.unet))

    def test_does_not_change_the_steps(self, tiny_ddpm, tmp_path):
        runs = []
        for decay in (0.0, 0.9):
            pipeline = DDPMPipeline(copy.deepcopy(tiny_ddpm.unet), tiny_ddpm.scheduler)
            steps = Steps(pipeline.unet)
            trainer_of(pipeline, tmp_path / f"{decay}", args={"ema_decay": decay}, callbacks=[steps]).train()
            runs.append(steps.points)
        assert all(same(first, second) for first, second in zip(*runs, strict=True))


class TestGuard:
    def test_restores_a_state_within_tolerance(self, tiny_ddpm, tmp_path):
        start = weights(tiny_ddpm.unet)
        args = {"guard": True, "guard_steps": 2, "learning_rate": 0.5, "max_steps": 6, "utility_tolerance": 0.5}
        trainer = trainer_of(tiny_ddpm, tmp_path, args=args, retain_dataset=rows(pictures(6, 1)))
        trainer.train()
        assert trainer.guard.looks[-1].utility_drop > 0.5  # it was destroyed
        assert not trainer.guard.looks[-1].kept
        assert trainer.guard.best.kept
        assert trainer.guard.best.step < 6
        if trainer.guard.best.step == 0:
            assert same(weights(tiny_ddpm.unet), start)
        assert trainer.utility_drop(trainer.guard.state.baseline) == pytest.approx(
            trainer.guard.best.utility_drop, abs=1e-6
        )

    def test_drift_is_a_share_of_the_originals_own_error(self, tiny_ddpm, tmp_path):
        """The distance on its own samples to its own answers, brute force; at the original it is nothing."""
        args = {"guard": True, "replay_samples": 6, "forget_loss": "npo", "loss_weighting": "simple", "max_steps": 1}
        trainer = trainer_of(tiny_ddpm, tmp_path, args=args, replay_filter=lambda images: torch.arange(6) < 1)
        trainer.train()
        assert trainer.guard.looks[0].utility_drop == 0
        trainer.reference.restore(trainer.model)
        assert trainer.utility() == 0
        with torch.no_grad():
            trainer.model.conv_out.bias += 0.5
        assert trainer.utility() == pytest.approx(0.25 / trainer._own_error, rel=1e-4)
        assert trainer._own_error > 0

    def test_has_something_to_look_at(self, tiny_ddpm, tmp_path):
        with pytest.raises(ValueError, match="^guard: ") as error:
            trainer_of(tiny_ddpm, tmp_path, args={"guard": True})
        assert one_line(error)

    @pytest.mark.parametrize("broken", ["weights", "images"])
    def test_stops_before_a_step_that_is_not_finite(self, broken, tiny_ddpm, tmp_path):
        class Breaks(TrainerCallback):
            def on_step_begin(self, args, state, control, model=None, **kwargs):
                if broken == "weights" and state.global_step == 2:
                    with torch.no_grad():
                        model.conv_out.bias.fill_(torch.nan)
                self.before = weights(model)

        latents = pictures(8)
        if broken == "images":
            latents[:, :, 3, 3] = torch.nan
        watch = Breaks()
        trainer = trainer_of(
            tiny_ddpm, tmp_path, forget=EncodedImages(latents), callbacks=[watch], args={"guard": True},
            retain_dataset=rows(pictures(6, 1)),
        )  # fmt: skip
        with pytest.raises(FloatingPointError, match=f"at step {3 if broken == 'weights' else 1} ") as error:
            trainer.train()
        assert one_line(error)
        now = weights(tiny_ddpm.unet)
        for name, value in watch.before.items():
            assert torch.equal(now[name].nan_to_num(7.0), value.nan_to_num(7.0))

    def test_an_original_that_draws_nan_is_refused(self, tiny_ddpm, tmp_path):
        with torch.no_grad():
            tiny_ddpm.unet.conv_out.bias.fill_(torch.nan)
        trainer = trainer_of(tiny_ddpm, tmp_path, args={"replay_samples": 4})
        with pytest.raises(ValueError, match="not finite") as error:
            trainer.train()
        assert one_line(error)

    def test_looking_and_drawing_change_nothing(self, tiny_ddpm, tmp_path):
        """Dropout takes from the global random state, which a look or a grid could move."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            unet = UNet2DModel(**{**tiny_ddpm.unet.config, "dropout": 0.3})
        ends = []
        for name, looks in (
            ("quiet", {}),
            (
                "watched",
                {"guard": True, "guard_steps": 1, "utility_tolerance": 1e9, "grid_images": 4, "grid_steps": 1},
            ),
        ):
            pipeline = DDPMPipeline(copy.deepcopy(unet), tiny_ddpm.scheduler)
            args = {"replay_samples": 8, "forget_loss": "redirect", **looks}
            trainer = trainer_of(
                pipeline, tmp_path / name, args=args, replay_filter=lambda images: torch.arange(8) < 3
            )
            trainer.train()
            ends.append(weights(pipeline.unet))
        assert len(trainer.guard.looks) == 4
        assert len(list((tmp_path / "watched" / "_private" / "samples").iterdir())) >= 4
        assert trainer.guard.best.step == 3
        assert same(*ends)
        assert distance(weights(unet), ends[0]) > 1e-3


def blobs(n, side, seed):
    """A bright spot on the left or on the right, jittered, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.arange(8.0).view(1, 8, 1), torch.arange(8.0).view(1, 1, 8)
    row = 2.5 + 2 * torch.rand(n, 1, 1, generator=generator)
    column = (1 if side == "left" else 5) + torch.rand(n, 1, 1, generator=generator)
    images = 2 * torch.exp(-((x - column).square() + (y - row).square()) / 2.5) - 1
    return (images + 0.05 * torch.randn(n, 8, 8, generator=generator)).clamp(-1, 1).unsqueeze(1)


def on_the_left(images):
    return images[..., :4].mean((1, 2, 3)) > images[..., 4:].mean((1, 2, 3))


class TestAGeneratorForgets:
    """A small U-Net that draws spots on the left and on the right as often; those on the left are to go."""

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        recipe = small_ddpm.Recipe("blobs", size=8, channels=(16, 32), steps=240, checkpoints=1)
        images = torch.cat([blobs(300, "left", 0), blobs(300, "right", 1)])
        return small_ddpm.train(recipe, images, tmp_path_factory.mktemp("blobs") / "original", progress=False)

    def drawn(self, pipeline):
        return generate(pipeline, 100, seed=7, num_inference_steps=10, batch_size=100)

    def unlearned(self, folder, output_dir, replay_filter=None, **values):
        pipeline = DDPMPipeline.from_pretrained(folder)
        before = self.drawn(pipeline)
        assert 0.35 < on_the_left(before).float().mean() < 0.65
        settings = {"replay_samples": 200, "num_inference_steps": 10, "max_steps": 40, "grid_images": 0} | values
        trainer = VDUTrainer(
            pipeline=pipeline,
            args=VDUConfig(output_dir=str(output_dir), **(QUIET | settings)),
            forget_dataset=rows(blobs(60, "left", 5)),
            replay_filter=replay_filter,
        )
        trainer.train()
        return before, self.drawn(pipeline)

    def far(self, images):
        """How far images are from any real one, in the mean."""
        real = torch.cat([blobs(300, "left", 0), blobs(300, "right", 1)])
        return torch.cdist(images.flatten(1), real.flatten(1)).amin(1).mean().item()

    def assert_the_rest_is_well(self, before, after):
        kept = after[~on_the_left(after)]
        assert self.far(kept) < 1.3 * self.far(before)
        mean = blobs(300, "right", 1).mean(0)
        assert (kept.mean(0) - mean).abs().max() < 0.3  # of a range of 2
        assert (kept.std(0).mean() / before[~on_the_left(before)].std(0).mean()).item() > 0.6  # and not one image

    def test_with_a_classifier_of_its_samples(self, folder, tmp_path):
        before, after = self.unlearned(folder, tmp_path, on_the_left)
        assert on_the_left(after).float().mean() < 0.05
        self.assert_the_rest_is_well(before, after)

    def test_from_forget_images_alone(self, folder, tmp_path):
        """A model that was hardly trained: some of its samples are too unlike real ones to be told, and are replayed."""
        before, after = self.unlearned(folder, tmp_path)
        assert on_the_left(after).float().mean() < 0.6 * on_the_left(before).float().mean()
        self.assert_the_rest_is_well(before, after)

    def test_plain_ascent_destroys_it(self, folder, tmp_path):
        """Why a bounded loss is the default: what comes out is neither the one nor the other."""
        settings = {"forget_loss": "ascent", "replay_samples": 0, "guard": False, "max_steps": 30}
        before, after = self.unlearned(folder, tmp_path, **settings)
        assert self.far(after) > 4 * self.far(before)
