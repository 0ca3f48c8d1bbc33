"""What holds a run: the stability term, averaged weights, the guard; and whether a generator forgets."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from image_data import QUIET, distance, same, weights
from transformers import TrainerCallback
from vdu_data import near, rows, seeded

from hf_unlearn import VDUConfig, VDUTrainer
from hf_unlearn.examples import ddpm as small_ddpm
from hf_unlearn.parameters.reference import ReferencePoint, trainable_parameters
from hf_unlearn.unlearning.diffusion.drawing import generate
from hf_unlearn.unlearning.diffusion.encoded import EncodedImages
from hf_unlearn.unlearning.diffusion.saving import AverageWeights


PLAIN = {
    "guard": False, "grid_images": 0, "own_samples": 0, "forget_loss": "ascent", "per_device_train_batch_size": 4,
    "max_steps": 3, "learning_rate": 1e-3, "num_inference_steps": 2,
}  # fmt: skip


def pictures(n, seed=0):
    return torch.rand(n, 1, 8, 8, generator=seeded(seed)) * 2 - 1


def trainer_of(pipeline, folder, *, forget=None, args=None, **data):
    forget = rows(pictures(8)) if forget is None else forget or None
    args = VDUConfig(output_dir=str(folder), **(QUIET | PLAIN | (args or {})))
    return VDUTrainer(pipeline=pipeline, args=args, forget_dataset=forget, **data)


def built(trainer):
    """The anchor as `train` would build it."""
    trainer.reference, trainer._resuming = ReferencePoint.capture(trainer.model), False
    trainer.anchor = trainer.build_anchor()
    return trainer


def value(trainer, model):
    """Of the anchor at another model's parameters."""
    return sum(trainer.anchor.value(trainable_parameters(model)).values()).item()


@pytest.fixture
def checkpoints(tiny_ddpm, tmp_path):
    """Folders of two U-Nets near the tiny one."""
    folders = [str(tmp_path / f"saved-{number}") for number in range(2)]
    for number, folder in enumerate(folders):
        near(tiny_ddpm.unet, seed=number).save_pretrained(folder)
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

    @pytest.mark.parametrize("count", [0, 1])
    def test_with_fewer_it_is_the_fisher_and_says_so(self, count, tiny_ddpm, checkpoints, tmp_path, caplog):
        args = {"stability_weight": 0.1, "checkpoints": checkpoints[:count] or None}
        trainer = trainer_of(tiny_ddpm, tmp_path / "out", args=args)
        start = copy.deepcopy(trainer.model)
        with caplog.at_level(logging.WARNING, "hf_unlearn"):
            trainer.train()
        warnings = [r.getMessage() for r in caplog.records if "Fisher" in r.getMessage()]
        assert len(warnings) == 1
        assert "\n" not in warnings[0]
        assert trainer.precision_name.startswith("fisher")
        assert trainer.provenance().hyperparameters["anchor_precision"] == trainer.precision_name
        assert trainer.precision_name in str(trainer.model_card(tmp_path / "out"))
        assert (tmp_path / "out" / "_private" / "fisher.safetensors").is_file()
        (anchor,) = trainer.anchor.anchors
        values = torch.cat([part.flatten() for part in anchor.diagonal.values()])
        assert values.mean().item() == pytest.approx(0.5, rel=1e-4)  # a mean precision of one, halved
        assert values.max() > 5 * values.mean()  # and no identity
        assert values.min() >= 0
        change = [
            (now - before).flatten() for now, before in zip(near(start).parameters(), start.parameters(), strict=True)
        ]
        expected = 0.1 * (values * torch.cat(change).square()).sum().item()
        assert value(trainer, near(start)) == pytest.approx(expected, rel=1e-4)

    def test_the_fisher_is_that_of_the_forget_images(self, tiny_ddpm, tmp_path):
        """Of the last bias it is known: every answer moves by one, so that F is the number of pixels."""
        trainer = built(trainer_of(tiny_ddpm, tmp_path, args={"stability_weight": 0.1}))
        fisher = trainer._compute_fisher()
        draws = [fisher["conv_out.bias"].item()]
        for seed in range(1, 40):
            trainer.args.seed = seed
            draws.append(trainer._compute_fisher()["conv_out.bias"].item())
        assert torch.tensor(draws).mean().item() == pytest.approx(64, rel=0.5)

    @pytest.mark.parametrize("beside", [0.0, 0.2])
    def test_isotropic_is_half_the_squared_distance(self, beside, tiny_ddpm, tmp_path):
        """And stands beside the isotropic weight."""
        args = {"stability_weight": 0.7, "stability": "isotropic", "isotropic_weight": beside}
        trainer, moved = built(trainer_of(tiny_ddpm, tmp_path, args=args)), near(tiny_ddpm.unet)
        expected = (0.7 * 0.5 + beside) * distance(weights(tiny_ddpm.unet), weights(moved)) ** 2
        assert value(trainer, moved) == pytest.approx(expected, rel=1e-4)
        assert trainer.precision_name.startswith("isotropic")

    def test_without_a_weight_there_is_no_term_and_no_name(self, tiny_ddpm, checkpoints, tmp_path):
        trainer = built(trainer_of(tiny_ddpm, tmp_path / "out", args={"checkpoints": checkpoints}))
        assert trainer.anchor is None
        assert trainer.precision_name is None
        assert "anchor_precision" not in trainer.provenance().hyperparameters

    def test_a_mean_of_one_checkpoint_can_be_the_centre(self, tiny_ddpm, checkpoints, tmp_path):
        args = {"stability_weight": 1.0, "stability": "isotropic", "anchor": "checkpoint_mean"}
        trainer = built(trainer_of(tiny_ddpm, tmp_path / "out", args=args | {"checkpoints": checkpoints[:1]}))
        assert value(trainer, UNet2DModel.from_pretrained(checkpoints[0])) == pytest.approx(0, abs=1e-8)
        assert value(trainer, tiny_ddpm.unet) > 0.01

    @pytest.mark.parametrize("count", [0, 1])
    def test_inverse_variance_of_fewer_than_two_is_refused(self, count, tiny_ddpm, checkpoints, tmp_path):
        args = {"stability_weight": 0.1, "stability": "inverse_variance", "checkpoints": checkpoints[:count] or None}
        with pytest.raises(ValueError, match=f"^checkpoints: {('missing', 'K = 1')[count]}") as error:
            trainer_of(tiny_ddpm, tmp_path / "out", args=args).train()
        assert one_line(error)


class Steps(TrainerCallback):
    """The parameters after every step."""

    def __init__(self, model):
        self.model, self.points = model, []

    def on_step_end(self, args, state, control, **kwargs):
        self.points.append(weights(self.model))


def test_the_average_is_the_recursion_written_out_and_does_not_change_the_steps(tiny_ddpm, tmp_path):
    """It replaces the last step at the end, and is what is saved."""
    start, decay, runs = weights(tiny_ddpm.unet), 0.3, {}
    for ema in (0.0, decay):
        pipeline = DDPMPipeline(copy.deepcopy(tiny_ddpm.unet), tiny_ddpm.scheduler)
        runs[ema] = Steps(pipeline.unet)
        # Plain steps: Adam would make whole ones of rounding errors.
        args = {"ema_decay": ema, "max_steps": 6, "optim": "sgd", "learning_rate": 0.1}
        trainer = trainer_of(pipeline, tmp_path, args=args, callbacks=[runs[ema]])
        trainer.train()
    points = runs[decay].points
    assert len(points) == 6
    assert all(distance(*pair) < 1e-4 for pair in zip(points, runs[0.0].points, strict=True))
    average = {name: part.double() for name, part in start.items()}
    for step, point in enumerate(points, start=1):
        rate = min(decay, (1 + step) / (10 + step))
        average = {name: rate * part + (1 - rate) * point[name].double() for name, part in average.items()}
    now = weights(pipeline.unet)
    for name, part in average.items():
        torch.testing.assert_close(now[name], part.float(), rtol=1e-5, atol=1e-6)
    assert distance(now, points[-1]) > 1e-3
    trainer.save_model()
    assert same(weights(DDPMPipeline.from_pretrained(tmp_path).unet), now)


@pytest.mark.parametrize("accepted", [True, False])
def test_an_average_that_is_not_accepted_gives_way_to_the_last_step(accepted, caplog):
    model, states = torch.nn.Linear(2, 1), iter(range(1, 4))
    average = AverageWeights(model, 0.1, lambda: accepted)
    state = SimpleNamespace(global_step=0)
    average.on_train_begin(None, state, None)
    for state.global_step in states:
        with torch.no_grad():
            model.weight.fill_(state.global_step)
        average.on_step_end(None, state, None)
    average.on_train_end(None, state, None)
    assert bool((model.weight == 3).all()) == (not accepted)
    assert ("keeping the last ones" in caplog.text) == (not accepted)


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
            trainer.guard.best.utility_drop, rel=1e-4, abs=1e-6
        )

    def test_drift_is_a_share_of_the_originals_own_error(self, tiny_ddpm, tmp_path):
        """The distance on its own samples to its own answers, brute force; at the original it is nothing."""
        args = {"guard": True, "own_samples": 6, "forget_loss": "npo", "loss_weighting": "simple", "max_steps": 1}
        trainer = trainer_of(tiny_ddpm, tmp_path, args=args, marker=lambda images: torch.arange(6) < 1)
        trainer.train()
        # Answers of size one, in fp32: differences of some 1e-7 where a sum is taken in another order, squared.
        assert trainer.guard.looks[0].utility_drop == pytest.approx(0, abs=1e-11)
        trainer.reference.restore(trainer.model)
        assert trainer.utility() == pytest.approx(0, abs=1e-11)
        with torch.no_grad():
            trainer.model.conv_out.bias += 0.5
        assert trainer.utility() == pytest.approx(0.25 / trainer._own_error, rel=1e-4)
        assert trainer._own_error > 0

    def test_with_prompts_it_judges_what_the_sampler_sees(self, tiny_stable_diffusion, tmp_path, caplog):
        """Guided answers, brute force: a change of ε(c) alone counts by the square of the scale, one of both answers once."""
        pipeline, scale = tiny_stable_diffusion, 7.5
        args = {
            "forget_prompts": ["a photo"],
            "forget_samples": 2,
            "own_samples": 4,
            "guard": True,
            "max_steps": 1,
            "learning_rate": 0.0,
        }
        args |= {"replay_prompts": ["hot", "a pot"], "loss_weighting": "simple", "trainable": ["all"]}
        trainer = trainer_of(pipeline, tmp_path, args=PLAIN | args | {"forget_loss": "redirect"}, forget=())
        with caplog.at_level(logging.WARNING, "hf_unlearn"):
            trainer.train()
        assert trainer.guard.looks[-1].utility_drop == pytest.approx(0, abs=1e-9)
        assert trainer.guidance == scale
        assert "still have 7.5 times the effect" in caplog.text  # nothing was learned, and that is said
        with torch.no_grad():
            trainer.model.conv_out.weight *= 0.3
        assert trainer.remaining_effect() == pytest.approx(0.3 * scale, rel=1e-3)
        trainer.reference.restore(trainer.model)
        original, kept = copy.deepcopy(trainer.model), trainer.own.kept
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=seeded(parameter.numel()))
            squared, own = [], []
            for batch in trainer._batches(kept, None):
                empty = pipeline.encode_prompt("", "cpu", 1, False)[0].expand(len(batch["clean"]), -1, -1)
                told = batch["conditioning"]["encoder_hidden_states"]
                now, before = (
                    [
                        model(batch["noisy"], batch["timesteps"], encoder_hidden_states=states).sample
                        for states in (told, empty)
                    ]
                    for model in (trainer.model, original)
                )
                change = [new - old for new, old in zip(now, before, strict=True)]
                squared.append((scale * change[0] + (1 - scale) * change[1]).square().mean())
                own.append((before[0] - batch["noise"]).square().mean())
        expected = (sum(squared) / sum(own)).item()
        assert trainer.utility() == pytest.approx(expected, rel=1e-3)
        trainer.reference.restore(trainer.model)
        with torch.no_grad():
            trainer.model.conv_out.bias += 0.5
        assert trainer.utility() == pytest.approx(0.25 / trainer._own_error, rel=1e-3)

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
        data = {"forget": EncodedImages(latents), "retain_dataset": rows(pictures(6, 1))}
        trainer = trainer_of(tiny_ddpm, tmp_path, **data, callbacks=[watch], args={"guard": True})
        with pytest.raises(FloatingPointError, match=f"at step {3 if broken == 'weights' else 1} ") as error:
            trainer.train()
        assert one_line(error)
        now = weights(tiny_ddpm.unet)
        for name, part in watch.before.items():
            assert torch.equal(now[name].nan_to_num(7.0), part.nan_to_num(7.0))

    def test_an_original_that_draws_nan_is_refused(self, tiny_ddpm, tmp_path):
        with torch.no_grad():
            tiny_ddpm.unet.conv_out.bias.fill_(torch.nan)
        trainer = trainer_of(tiny_ddpm, tmp_path, args={"own_samples": 4})
        with pytest.raises(ValueError, match="not finite") as error:
            trainer.train()
        assert one_line(error)

    def test_looking_and_drawing_change_nothing(self, tiny_ddpm, tmp_path):
        """Dropout takes from the global random state, which a look or a grid could move."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            unet = UNet2DModel(**{**tiny_ddpm.unet.config, "dropout": 0.3})
        ends, watching = (
            [],
            {"guard": True, "guard_steps": 1, "utility_tolerance": 1e9, "grid_images": 4, "grid_steps": 1},
        )
        for name, looks in (("quiet", {}), ("watched", watching)):
            pipeline = DDPMPipeline(copy.deepcopy(unet), tiny_ddpm.scheduler)
            # Plain steps: Adam would make whole ones of rounding errors.
            args = {"own_samples": 8, "forget_loss": "redirect", "optim": "sgd", "learning_rate": 0.1, **looks}
            marks = {"marker": lambda images: torch.arange(8) < 3}
            trainer = trainer_of(pipeline, tmp_path / name, args=args, **marks)
            trainer.train()
            ends.append(weights(pipeline.unet))
        assert len(trainer.guard.looks) == 4
        assert len(list((tmp_path / "watched" / "_private" / "samples").iterdir())) >= 4
        assert trainer.guard.best.step == 3
        assert distance(*ends) < 1e-4
        assert distance(weights(unet), ends[0]) > 1e-2


def blobs(n, side, seed):
    """A bright spot on the left or on the right, jittered, with a little noise."""
    generator = seeded(seed)
    y, x = torch.arange(8.0).view(1, 8, 1), torch.arange(8.0).view(1, 1, 8)
    row = 2.5 + 2 * torch.rand(n, 1, 1, generator=generator)
    column = (1 if side == "left" else 5) + torch.rand(n, 1, 1, generator=generator)
    images = 2 * torch.exp(-((x - column).square() + (y - row).square()) / 2.5) - 1
    return (images + 0.05 * torch.randn(n, 8, 8, generator=generator)).clamp(-1, 1).unsqueeze(1)


def on_the_left(images):
    return images[..., :4].mean((1, 2, 3)) > images[..., 4:].mean((1, 2, 3))


class ExactDenoiser(UNet2DModel):
    """What a perfect training would end at: images are Gaussians around spots, `exp(100 w)` says how frequent each is."""

    def __init__(self, spots):
        super().__init__(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=8,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        )  # fmt: skip
        for name in list(self._modules):
            delattr(self, name)
        self.spots = torch.nn.Parameter(spots.flatten(1))
        self.w = torch.nn.Parameter(torch.zeros(len(spots)))
        self.register_buffer("bars", DDIMScheduler().alphas_cumprod, persistent=False)

    def forward(self, sample, timestep, **kwargs):
        x, bar = sample.flatten(1), self.bars[timestep].expand(len(sample)).unsqueeze(1)
        spread = bar * 0.1**2 + 1 - bar
        differences = x.unsqueeze(1) - bar.sqrt().unsqueeze(2) * self.spots
        shares = (100 * self.w - differences.square().sum(2) / (2 * spread)).softmax(1)
        noise = (shares.unsqueeze(2) * differences).sum(1) * (1 - bar).sqrt() / spread
        return SimpleNamespace(sample=noise.view_as(sample))


def drawn(pipeline, count=100, seed=7):
    return generate(pipeline, count, seed=seed, num_inference_steps=10, batch_size=count)


def unlearned(pipeline, forget, output_dir, marker=None, **values):
    """What it draws before and after it has forgotten images like these."""
    before = drawn(pipeline)
    assert 0.3 < on_the_left(before).float().mean() < 0.7
    settings = {"own_samples": 200, "num_inference_steps": 10, "max_steps": 40, "grid_images": 0} | values
    args = VDUConfig(output_dir=str(output_dir), **(QUIET | settings))
    VDUTrainer(pipeline=pipeline, args=args, forget_dataset=rows(forget), marker=marker).train()
    return before, drawn(pipeline)


def far(images, real):
    """How far images are from any real one, in the mean."""
    return torch.cdist(images.flatten(1), real.flatten(1)).amin(1).mean().item()


def assert_the_rest_is_well(before, after, real):
    """`real` are images of what is kept."""
    was, kept = before[~on_the_left(before)], after[~on_the_left(after)]
    assert far(kept, real) < 1.3 * far(was, real)
    assert (kept.mean(0) - real.mean(0)).abs().max() < 0.3  # of a range of 2
    assert (kept.std(0).mean() / was.std(0).mean()).item() > 0.6  # and not one image


@pytest.mark.parametrize(("marker", "left"), [(on_the_left, 0.1), (None, 0.2)])
def test_a_perfect_generator_forgets(marker, left, tmp_path):
    """What it draws on the left, told by a classifier or by images alone, and nothing else."""
    right = blobs(6, "right", 1)
    pipeline = DDPMPipeline(ExactDenoiser(torch.cat([blobs(6, "left", 0), right])), DDIMScheduler())
    own = drawn(pipeline, 120, seed=11)
    before, after = unlearned(pipeline, own[on_the_left(own)], tmp_path, marker, learning_rate=1e-3)
    # Of 0.46, over 6 seeds: none is left with the classifier, 0.04 ± 0.01 without.
    assert on_the_left(after).float().mean() < left
    # Over these seeds: farther by a factor of 0.97 to 1.02, a mean 0.06 to 0.13 away, 1.00 to 1.06 of the deviation.
    assert_the_rest_is_well(before, after, right)


@pytest.mark.slow
class TestASmallUNetForgets:
    """One that was hardly trained: some of its samples are too unlike real ones to be told, and are replayed."""

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        recipe = small_ddpm.Recipe("blobs", size=8, channels=(16, 32), steps=240, checkpoints=1)
        images = torch.cat([blobs(300, "left", 0), blobs(300, "right", 1)])
        return small_ddpm.train(recipe, images, tmp_path_factory.mktemp("blobs") / "original", progress=False)

    @pytest.mark.parametrize(("marker", "share"), [(on_the_left, 0.1), (None, 0.6)])
    def test_by_the_default_loss(self, marker, share, folder, tmp_path):
        pipeline = DDPMPipeline.from_pretrained(folder)
        before, after = unlearned(pipeline, blobs(60, "left", 5), tmp_path, marker)
        assert on_the_left(after).float().mean() < share * on_the_left(before).float().mean()
        assert_the_rest_is_well(before, after, blobs(300, "right", 1))

    def test_plain_ascent_destroys_it(self, folder, tmp_path):
        """Why a bounded loss is the default: what comes out is neither the one nor the other."""
        settings = {"forget_loss": "ascent", "own_samples": 0, "guard": False, "max_steps": 30}
        before, after = unlearned(DDPMPipeline.from_pretrained(folder), blobs(60, "left", 5), tmp_path, **settings)
        real = torch.cat([blobs(300, "left", 0), blobs(300, "right", 1)])
        assert far(after, real) > 4 * far(before, real)
