"""The losses of a denoiser, example by example in float64: the noise, the weights, what is asked for, and the paper's gradient."""

import copy
import itertools
import math

import pytest
import torch
from datasets import concatenate_datasets
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from image_data import QUIET
from vdu_data import near, rows, seeded

from hf_unlearn import VDUConfig, VDUTrainer
from hf_unlearn.parameters.reference import ReferencePoint
from hf_unlearn.training.noise import NoiseSchedule
from hf_unlearn.unlearning.diffusion.encoded import EncodedImages
from hf_unlearn.unlearning.diffusion.own_samples import OwnSamples
from hf_unlearn.unlearning.diffusion.posterior import ForgottenPosterior


BARE = {
    "guard": False, "grid_images": 0, "own_samples": 0, "per_device_train_batch_size": 4, "max_steps": 1,
    "num_inference_steps": 2,
}  # fmt: skip
PREDICTIONS = ["epsilon", "v_prediction", "sample"]


def pictures(n, seed, spread=0.3):
    """Images that differ little, so that noise makes it doubtful which one it was."""
    common = torch.rand(1, 1, 8, 8, generator=seeded(99)) - 0.5
    return (common + spread * torch.randn(n, 1, 8, 8, generator=seeded(seed))).clamp(-1, 1)


def around(unet, prediction="epsilon"):
    return DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=20, beta_end=0.4, prediction_type=prediction))


def trainer_of(pipeline, folder, *, forget=None, args=None, **data):
    forget = rows(pictures(6, 1)) if forget is None else forget
    args = VDUConfig(output_dir=str(folder), **(QUIET | BARE | (args or {})))
    return VDUTrainer(pipeline=pipeline, args=args, forget_dataset=forget, **data)


def moved(trainer, kept=None, share=0.3):
    """The student away from its original, and own samples without drawing any."""
    trainer.reference = ReferencePoint.capture(trainer.model)
    if kept is not None:
        trainer.own = OwnSamples(EncodedImages(kept), share)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=seeded(parameter.numel()))
    return trainer


def original(trainer):
    model = copy.deepcopy(trainer.model)
    trainer.reference.restore(model)
    return model.eval()


class Written:
    """The forward process in float64."""

    def __init__(self, pipeline):
        self.betas = pipeline.scheduler.betas.double()
        self.bars = torch.cumprod(1 - self.betas, 0)
        self.kind, self.schedule = pipeline.scheduler.config.prediction_type, NoiseSchedule.of(pipeline.scheduler)

    def scales(self, t):
        bars = self.bars[t].view(-1, 1, 1, 1)
        return bars.sqrt(), (1 - bars).sqrt()

    def noisy(self, clean, noise, t):
        alpha, sigma = self.scales(t)
        return alpha * clean.double() + sigma * noise.double()

    def from_clean(self, noisy, clean, t):
        """The answers that stand for clean images behind these noisy ones."""
        (alpha, sigma), clean = self.scales(t), clean.double()
        noise = (noisy.double() - alpha * clean) / sigma
        return {"epsilon": noise, "sample": clean, "v_prediction": alpha * noise - sigma * clean}[self.kind]

    def to_clean(self, noisy, answer, t):
        (alpha, sigma), noisy, answer = self.scales(t), noisy.double(), answer.double()
        of_noise, of_velocity = (noisy - sigma * answer) / alpha, alpha * noisy - sigma * answer
        return {"epsilon": of_noise, "sample": answer, "v_prediction": of_velocity}[self.kind]

    def weight(self, t, weighting, gamma=1.0):
        """On the error of ε: 1, the bound of DDPM's eq. 12, or min(SNR, γ)/SNR; then for the error of the answer's own form."""
        if weighting == "simple":
            return 1.0
        signal, step = self.bars[t] / (1 - self.bars[t]), t.clamp(min=1)
        beta = self.betas[step]
        bound = beta**2 / (2 * beta * (1 - beta) * (1 - self.bars[step]))
        of_noise = {"elbo": bound, "min_snr": signal.clamp(max=gamma) / signal}[weighting]
        return of_noise * {"epsilon": 1.0, "sample": signal, "v_prediction": signal / (signal + 1)}[self.kind]

    def errors(self, answers, targets, t, weighting="simple", gamma=1.0):
        return (self.weight(t, weighting, gamma) * (answers.double() - targets).square().mean((1, 2, 3))).float()

    def true(self, batch):
        return self.from_clean(
            self.noisy(batch["clean"], batch["noise"], batch["timesteps"]), batch["clean"], batch["timesteps"]
        )

    def without(self, batch, answers, forget, keep, share):
        """The guess of the clean images moved by the correction of Bayes' rule, as answers. And the probabilities."""
        noisy, t = batch["noisy"], batch["timesteps"]
        probability, change = ForgottenPosterior(forget, keep, share)(noisy, t, self.schedule)
        return self.from_clean(noisy, self.to_clean(noisy, answers, t) + change.double(), t).float(), probability


@pytest.fixture(params=PREDICTIONS)
def pipeline(request, tiny_ddpm):
    return around(tiny_ddpm.unet, request.param)


class TestTheNoiseOfABatch:
    @pytest.fixture
    def trainer(self, tiny_ddpm, tmp_path):
        return lambda **values: trainer_of(tiny_ddpm, tmp_path, args={"forget_loss": "ascent", **values})

    def test_noisy_is_the_clean_image_with_the_batchs_own_noise(self, pipeline, tmp_path):
        trainer, clean = trainer_of(pipeline, tmp_path, args={"forget_loss": "ascent"}), pictures(32, 2)
        batch = trainer.prepared({"latents": clean}, seeded(0))
        assert torch.equal(batch["clean"], clean)
        expected = Written(pipeline).noisy(clean, batch["noise"], batch["timesteps"]).float()
        torch.testing.assert_close(batch["noisy"], expected, rtol=1e-5, atol=1e-5)
        noise = batch["noise"].flatten()
        assert noise.mean().abs() < 0.1
        assert 0.9 < noise.std() < 1.1

    def test_is_a_function_of_the_generator_alone(self, trainer):
        trainer, clean = trainer(), {"latents": pictures(8, 2)}
        torch.manual_seed(1)
        first, state = trainer.prepared(clean, seeded(5)), torch.get_rng_state()
        torch.manual_seed(2)
        second, third = trainer.prepared(clean, seeded(5)), trainer.prepared(clean, seeded(6))
        for name in ("noise", "timesteps", "noisy"):
            assert torch.equal(first[name], second[name])
            assert not torch.equal(first[name], third[name])
        torch.manual_seed(1)
        assert torch.equal(state, torch.get_rng_state())

    def test_latents_with_a_spread_are_drawn_anew_at_each_use(self, trainer):
        trainer, mean = trainer(), pictures(2000, 2)
        first = trainer.prepared({"latents": mean, "latents_std": torch.full_like(mean, 0.4)}, seeded(5))
        again = trainer.prepared({"latents": mean, "latents_std": torch.full_like(mean, 0.4)}, seeded(5))
        assert torch.equal(first["clean"], again["clean"])
        change = first["clean"] - mean
        assert change.std() == pytest.approx(0.4, rel=0.02)
        correlation = (change * first["noise"]).mean() / 0.4
        assert correlation.abs() < 0.02  # not the noise that is taken away again

    @pytest.mark.parametrize(
        ("share", "expected"), [([0, 1], range(20)), ([0.25, 0.5], range(5, 10)), ([0.99, 1], [19])]
    )
    def test_timesteps_stay_in_the_share_of_t_range(self, share, expected, trainer):
        batch = trainer(t_range=share).prepared({"latents": pictures(400, 2)}, seeded(0))
        assert sorted(set(batch["timesteps"].tolist())) == list(expected)


class TestTaskLoss:
    def test_is_the_weighted_error(self, pipeline, tmp_path):
        args = {"snr_gamma": 3.0, "forget_loss": "ascent"}
        trainer, written = moved(trainer_of(pipeline, tmp_path, args=args)), Written(pipeline)
        batch = trainer.prepared({"latents": pictures(40, 2)}, seeded(0))
        assert 0 in batch["timesteps"]
        answers = trainer.model(batch["noisy"], batch["timesteps"]).sample
        for weighting in ("simple", "elbo", "min_snr"):
            trainer.args.loss_weighting = weighting
            expected = written.errors(answers, written.true(batch), batch["timesteps"], weighting, 3.0)
            # 1 − ᾱ of the first step is a difference that fp32 has to four digits.
            torch.testing.assert_close(trainer.task_loss(trainer.model, batch), expected, rtol=1e-3, atol=1e-6)

    def test_a_learned_variance_stands_behind_the_answer(self, tiny_ddpm, tmp_path):
        trainer = trainer_of(tiny_ddpm, tmp_path, args={"forget_loss": "ascent"})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            wide = UNet2DModel(**{**tiny_ddpm.unet.config, "out_channels": 2}).eval()
        batch = trainer.prepared({"latents": pictures(5, 2)}, seeded(0))
        with torch.no_grad():
            answer = wide(batch["noisy"], batch["timesteps"]).sample
            assert answer.shape[1] == 2
            expected = Written(tiny_ddpm).errors(answer[:, :1], batch["noise"].double(), batch["timesteps"], "min_snr")
            torch.testing.assert_close(trainer.task_loss(wide, batch), expected, rtol=1e-4, atol=1e-6)


class TestForgetLosses:
    def prepared(self, pipeline, folder, name, **args):
        trainer = trainer_of(pipeline, folder, args={"forget_loss": name, "heldout_loss": 0.7, **args})
        moved(trainer, kept=pictures(9, 3))
        return trainer, trainer.prepared({"latents": pictures(6, 1)}, seeded(3))

    def error(self, pipeline, model, batch, weighting="min_snr"):
        written = Written(pipeline)
        answers = model(batch["noisy"], batch["timesteps"]).sample
        return written.errors(answers, written.true(batch), batch["timesteps"], weighting)

    def test_ascent_match_and_npo_are_functions_of_the_error(self, pipeline, tmp_path):
        trainer, batch = self.prepared(pipeline, tmp_path, "ascent")
        now, before = self.error(pipeline, trainer.model, batch), self.error(pipeline, original(trainer), batch)
        torch.testing.assert_close(trainer.forget_loss(trainer.model, batch), -now, rtol=1e-4, atol=1e-6)
        trainer.forget_loss_name = "match"
        expected = abs(now.mean().item() - 0.7)
        assert trainer.forget_loss(trainer.model, batch).item() == pytest.approx(expected, rel=1e-4)
        # NPO is the paper's, with half the squared error of an image's 64 pixels as −log p.
        trainer.forget_loss_name = "npo"
        assert (now - before).abs().max() > 0.01
        log_ratio = -(64 / 2) * (now - before).double()  # log p_θ/p_θ*
        for beta in (0.05, 1.0):
            trainer.args.preference_beta = beta
            expected = (-2 / beta * torch.log(1 / (1 + torch.exp(beta * log_ratio))) / 32).float()
            torch.testing.assert_close(trainer.forget_loss(trainer.model, batch), expected, rtol=1e-4, atol=1e-6)

    def test_uniform_asks_for_the_answer_to_an_image_of_noise(self, pipeline, tmp_path):
        trainer, batch = self.prepared(pipeline, tmp_path, "uniform")
        written, t = Written(pipeline), batch["timesteps"]
        surrogate = 2 * torch.special.ndtr(batch["noise"].double()) - 1
        surrogate = torch.stack([surrogate[row - 1].flip(-1) for row in range(6)])
        answers = trainer.model(batch["noisy"], t).sample
        expected = written.errors(answers, written.from_clean(batch["noisy"], surrogate, t), t, "min_snr")
        torch.testing.assert_close(trainer.forget_loss(trainer.model, batch), expected, rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize(
        ("prediction", "share", "caution"),
        [("epsilon", 0.3, 1.0), ("epsilon", 0.0, 10.0), ("v_prediction", 0.3, 10.0), ("sample", 0.3, 3.0)],
    )
    def test_redirect_asks_for_the_originals_answer_without_the_forgotten_part(
        self, prediction, share, caution, tiny_ddpm, tmp_path
    ):
        pipeline = around(tiny_ddpm.unet, prediction)
        trainer, _ = self.prepared(pipeline, tmp_path, "redirect", own_samples=1, caution=caution)
        trainer.own = OwnSamples(EncodedImages(pictures(9, 3)), share)
        mixed = torch.cat([pictures(6, 1), pictures(9, 3)])
        batch = trainer.prepared({"latents": mixed}, seeded(3))
        odds = caution * (share / (1 - share) if share else (1 / 10) / (9 / 10))
        written, model = Written(pipeline), original(trainer)
        with torch.no_grad():
            answers = model(batch["noisy"], batch["timesteps"]).sample
        target, p = written.without(batch, answers, pictures(6, 1), pictures(9, 3), odds / (1 + odds))
        assert torch.minimum(p, 1 - p).max() > 0.02  # not all of them are certain
        student = trainer.model(batch["noisy"], batch["timesteps"]).sample
        expected = written.errors(student, target.double(), batch["timesteps"], "min_snr")
        torch.testing.assert_close(trainer.forget_loss(trainer.model, batch), expected, rtol=2e-3, atol=1e-4)
        # Under redirect, what is kept is held to the same.
        torch.testing.assert_close(trainer.replay_loss(trainer.model, batch), expected, rtol=2e-3, atol=1e-4)

    def test_redirect_with_retained_data_counts_the_kinds_there(self, tiny_ddpm, tmp_path):
        pipeline = around(tiny_ddpm.unet)
        trainer = moved(trainer_of(pipeline, tmp_path, retain_dataset=rows(pictures(9, 3)), args={"caution": 4.0}))
        assert trainer.forget_loss_name == "redirect"
        assert trainer.replay_weight == 0
        odds = 4 * 6 / 9
        assert trainer.posterior.share == pytest.approx(odds / (1 + odds))
        torch.testing.assert_close(trainer.posterior.forget, pictures(6, 1))
        torch.testing.assert_close(trainer.posterior.keep, pictures(9, 3))

    def test_bounded_means_redirect_or_match(self, tiny_ddpm, tmp_path):
        assert trainer_of(tiny_ddpm, tmp_path, args={"own_samples": 5}).forget_loss_name == "redirect"
        assert trainer_of(tiny_ddpm, tmp_path, args={"heldout_loss": 0.2}).forget_loss_name == "match"
        for guard in (True, False):  # with nothing to keep, the advice does not lead to another error
            with pytest.raises(ValueError, match="redirect.*retain_dataset=$") as error:
                trainer_of(tiny_ddpm, tmp_path, args={"guard": guard})
            assert "\n" not in str(error.value)

    @pytest.mark.parametrize(("prediction", "guidance"), [("epsilon", 0.7), ("v_prediction", 0.0)])
    def test_redirect_of_a_prompt_goes_to_the_neutral_one_and_beyond(
        self, prediction, guidance, tiny_stable_diffusion, tmp_path
    ):
        pipeline = tiny_stable_diffusion
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type=prediction)
        with torch.no_grad():  # a random text encoder hardly tells prompts apart
            for parameter in pipeline.text_encoder.parameters():
                parameter += 0.5 * torch.randn(parameter.shape, generator=seeded(parameter.numel()))
        images = torch.rand(4, 3, 8, 8, generator=seeded(0)) * 2 - 1
        forget = rows(images, prompt="a photo")
        forget = concatenate_datasets(
            [forget.select([0, 1]), forget.select([2, 3]).map(lambda row: row | {"prompt": "hot"})]
        )
        told = {"a photo": "a a", "hot": "a pot"}
        args = {"negative_guidance": guidance, "redirect_prompt": told}
        trainer = moved(trainer_of(pipeline, tmp_path, forget=forget, args=args))
        assert trainer.forget_loss_name == "redirect"
        stored = trainer.data_collator([trainer.forget_dataset[row] for row in range(4)])
        batch = trainer.prepared(stored, seeded(3))
        model, answers = original(trainer), {}
        with torch.no_grad():
            for kind, prompts in (("asked", list(told)), ("neutral", list(told.values()))):
                states = pipeline.encode_prompt(prompts, "cpu", 1, False)[0].repeat_interleave(2, 0)
                answers[kind] = model(batch["noisy"], batch["timesteps"], encoder_hidden_states=states).sample
            states = pipeline.encode_prompt(list(told), "cpu", 1, False)[0].repeat_interleave(2, 0)
            student = trainer.model(batch["noisy"], batch["timesteps"], encoder_hidden_states=states).sample
        assert (answers["asked"] - answers["neutral"]).abs().amax((1, 2, 3)).min() > 1e-3
        assert (answers["neutral"][0] - answers["neutral"][2]).abs().max() > 1e-3
        target = answers["neutral"] - guidance * (answers["asked"] - answers["neutral"])
        torch.testing.assert_close(trainer.answer_without(batch), target, rtol=1e-4, atol=1e-5)
        expected = Written(pipeline).errors(student, target.double(), batch["timesteps"], "min_snr")
        torch.testing.assert_close(trainer.forget_loss(trainer.model, batch).detach(), expected, rtol=1e-3, atol=1e-6)


class TestReplay:
    def test_student_and_original_see_the_same_noise(self, tiny_ddpm, tmp_path):
        """At θ* nothing is to be replayed, and NPO has the value that it has at the reference."""
        args = {"forget_loss": "npo", "own_samples": 8, "logging_strategy": "steps", "logging_steps": 1}
        marks = {"marker": lambda images: torch.arange(len(images)) < 3}
        trainer = trainer_of(tiny_ddpm, tmp_path, args=args, **marks)
        trainer.train()
        first = trainer.state.log_history[0]
        # Answers of size one, in fp32: differences of some 1e-7 where a sum is taken in another order, squared.
        assert first["replay_loss"] == pytest.approx(0.0, abs=1e-11)
        assert first["forget_loss"] == pytest.approx(2 / 0.1 * math.log(2) / 32, rel=1e-5)

    def test_is_the_distance_to_the_originals_answers_on_its_own_samples(self, pipeline, tmp_path):
        kept = pictures(9, 3)
        trainer = moved(trainer_of(pipeline, tmp_path, args={"forget_loss": "npo", "own_samples": 9}), kept=kept)
        forget = trainer.prepared({"latents": pictures(6, 1)}, seeded(3))
        batch = trainer.replay_inputs(forget, seeded(4))
        assert len(batch["clean"]) == 6
        for image in batch["clean"]:
            assert any(torch.equal(image, own) for own in kept)
        with torch.no_grad():
            target = original(trainer)(batch["noisy"], batch["timesteps"]).sample.double()
        answers = trainer.model(batch["noisy"], batch["timesteps"]).sample
        expected = Written(pipeline).errors(answers, target, batch["timesteps"], "min_snr")
        torch.testing.assert_close(trainer.replay_loss(trainer.model, batch), expected, rtol=1e-4, atol=1e-7)

    def test_every_own_sample_has_its_turn(self, tiny_ddpm, tmp_path):
        trainer = moved(trainer_of(tiny_ddpm, tmp_path, args={"forget_loss": "npo"}), kept=pictures(9, 3))
        forget = trainer.prepared({"latents": pictures(200, 1)}, seeded(3))
        drawn = trainer.replay_inputs(forget, seeded(4))["clean"]
        counts = torch.tensor([sum(torch.equal(image, own) for image in drawn) for own in pictures(9, 3)])
        assert counts.sum() == 200
        assert counts.min() > 8


class Recorder(VDUTrainer):
    """Keeps the batches as they were prepared, and the gradients as the optimiser finds them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches, self.gradients = [], []

    def prepared(self, batch, generator):
        prepared = super().prepared(batch, generator)
        self.batches.append(prepared)
        return prepared

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.gradients.append({name: p.grad.clone() for name, p in self.model.named_parameters()})
        return loss


class TestThePaper:
    @pytest.fixture
    def checkpoints(self, tiny_ddpm, tmp_path):
        folders = [tmp_path / f"checkpoint-{number}" for number in range(3)]
        for number, folder in enumerate(folders):
            model = near(tiny_ddpm.unet, seed=number)
            for index, (parameter, start) in enumerate(
                zip(model.parameters(), tiny_ddpm.unet.parameters(), strict=True)
            ):
                if index % 3:  # they hardly move, and meet the floor
                    parameter.data = start + (parameter.data - start) / 10 ** (index % 3 / 2)
            model.save_pretrained(folder / "unet")
        return [str(folder) for folder in folders]

    def test_switches_everything_else_off(self, tiny_ddpm, checkpoints, tmp_path):
        args = VDUConfig.paper(str(tmp_path), checkpoints=checkpoints, **QUIET, grid_images=0, max_steps=1)
        trainer = VDUTrainer(pipeline=tiny_ddpm, args=args, forget_dataset=rows(pictures(6, 1)))
        trainer.train()
        assert trainer.forget_loss_name == "ascent"
        assert (trainer.guard, trainer.own, trainer.ema, trainer.replay_weight) == (None, None, None, 0)
        assert (args.forget_weight, args.stability_weight, args.isotropic_weight) == (0.5, 0.5, 0)
        assert args.max_grad_norm == 0
        assert trainer.precision_name == "inverse variance over 3 checkpoints"

    def test_the_forget_loss_estimates_the_sum_over_images_and_timesteps(self, tiny_ddpm, checkpoints, tmp_path):
        """Its mean over every pair of image and timestep, with one noise for each image."""
        args = VDUConfig.paper(str(tmp_path / "out"), checkpoints=checkpoints, **QUIET, grid_images=0)
        trainer = moved(VDUTrainer(pipeline=tiny_ddpm, args=args, forget_dataset=rows(pictures(3, 1))))
        noise, betas = torch.randn(3, 1, 8, 8, generator=seeded(5)), tiny_ddpm.scheduler.betas.double()
        bars = torch.cumprod(1 - betas, 0)
        values, total = [], 0.0
        with torch.no_grad():
            for row, t in itertools.product(range(3), range(20)):
                image, one = pictures(3, 1)[row : row + 1], noise[row : row + 1]
                noisy = (bars[t].sqrt() * image.double() + (1 - bars[t]).sqrt() * one.double()).float()
                batch = {
                    "clean": image,
                    "noise": one,
                    "timesteps": torch.tensor([t]),
                    "noisy": noisy,
                    "conditioning": {},
                }
                values.append(trainer.forget_loss(trainer.model, batch).item())
                error = (one - trainer.model(noisy, t).sample).square().sum().item()
                step = max(t, 1)  # the step that ends at x₀ counts as its neighbour
                total += betas[step] ** 2 / (2 * betas[step] * (1 - betas[step]) * (1 - bars[step])) * error
        assert sum(values) / len(values) == pytest.approx(-float(total), rel=1e-4)

    @pytest.mark.parametrize(("anchor", "accumulation"), [("checkpoint_mean", 2), ("original", 1)])
    def test_gradient_is_that_of_the_objective(self, anchor, accumulation, tiny_ddpm, checkpoints, tmp_path):
        gamma, floor = 0.3, 0.05
        unet = copy.deepcopy(tiny_ddpm.unet)
        settings = QUIET | {
            "gamma": gamma, "anchor": anchor, "variance_floor": floor, "checkpoints": checkpoints, "grid_images": 0,
            "per_device_train_batch_size": 3, "gradient_accumulation_steps": accumulation, "max_steps": 2,
            "learning_rate": 1e-7, "optim": "sgd",
        }  # fmt: skip
        args = VDUConfig.paper(str(tmp_path / "out"), **settings)
        trainer = Recorder(pipeline=tiny_ddpm, args=args, forget_dataset=rows(pictures(12, 1)))
        trainer.train()
        assert len(trainer.gradients) == 2 * accumulation

        states = [UNet2DModel.from_pretrained(folder, subfolder="unet").state_dict() for folder in checkpoints]
        stacked = {name: torch.stack([state[name] for state in states]).double() for name in states[0]}
        variance = {name: value.var(0, correction=1) for name, value in stacked.items()}
        lowest = floor * torch.cat([value.flatten() for value in variance.values()]).mean()
        assert any((value < lowest).any() for value in variance.values())
        start = {name: value.clone().double() for name, value in unet.state_dict().items()}
        for step in range(2):
            batches = trainer.batches[step * accumulation : (step + 1) * accumulation]
            answers = [unet(batch["noisy"], batch["timesteps"]).sample for batch in batches]
            errors = [
                Written(tiny_ddpm).errors(answer, batch["noise"].double(), batch["timesteps"], "elbo")
                for answer, batch in zip(answers, batches, strict=True)
            ]
            error = 12 * 20 * 64 * torch.cat(errors).mean()  # images, timesteps, pixels
            stability = 0
            for name, parameter in unet.named_parameters():
                center = stacked[name].mean(0) if anchor == "checkpoint_mean" else start[name]
                change = (parameter.double() - center).square()
                stability = stability + (change / (2 * variance[name].clamp(min=lowest))).sum()
            loss = (1 - gamma) * -error + gamma * stability
            expected = torch.autograd.grad(loss, list(unet.parameters()))
            actual = trainer.gradients[(step + 1) * accumulation - 1]
            for (name, parameter), gradient in zip(unet.named_parameters(), expected, strict=True):
                scale = float(gradient.abs().max())
                torch.testing.assert_close(
                    actual[name], gradient, rtol=2e-3, atol=2e-4 * scale + 1e-7 * 12 * 20 * 64, msg=name
                )
                with torch.no_grad():
                    parameter -= 1e-7 * gradient  # as it is: nothing was clipped
        for (name, now), expected in zip(trainer.model.named_parameters(), unet.parameters(), strict=True):
            torch.testing.assert_close(now, expected, rtol=1e-4, atol=1e-5, msg=name)
