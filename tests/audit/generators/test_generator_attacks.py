"""Every check runs on every kind of generator, and leaves it as it was; what attacks do, against second implementations."""

import copy

import pytest
import torch
from datasets import Dataset
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from gan_data import pipeline as tiny_gan
from planted import classes, images, pipeline
from same_weights import same, weights
from text_to_image_data import tiny
from torch import nn

from hf_unlearn.audit.generators import data as audit_data
from hf_unlearn.audit.generators import denoising, family, relearning, searched
from hf_unlearn.audit.generators.data import Asked, Images
from hf_unlearn.audit.generators.denoising import Denoising, denoising_loss, finetuned
from hf_unlearn.audit.generators.disturbed import sampler_of
from hf_unlearn.audit.generators.subject import GeneratorSubject, draw
from hf_unlearn.audit.run import audit
from hf_unlearn.training.noise import NoiseSchedule


SMALL = {"num_inference_steps": 2, "height": 8, "width": 8}


def bright(images):
    return images.mean((1, 2, 3)) > 0


def sets(prompted, channels):
    """Bright images to forget, dark ones to keep."""
    shown = 1 - 0.5 * torch.rand(24, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    shown[..., 0, 0] = -0.1
    if not prompted:
        return {"forget": shown, "retain": -shown}
    said = {"forget": ["a red dog on a beach"] * 24, "retain": ["a red cat on a beach", "a blue house"] * 12}
    pixels = {"forget": shown, "retain": -shown}
    return {
        name: Dataset.from_dict({"pixel_values": pixels[name].numpy(), "prompt": said[name]}).with_format("torch")
        for name in said
    }


@pytest.fixture
def short(monkeypatch):
    for name, number in (("DRAWS", 60), ("ASKED", 24)):
        monkeypatch.setitem(getattr(audit_data, name), "standard", number)
    monkeypatch.setattr(relearning, "MARKS", (1, 2))
    monkeypatch.setattr(searched, "TRIES", 1)
    monkeypatch.setitem(searched.WORD, "steps", 2)
    monkeypatch.setitem(searched.LATENT, "steps", 3)


def state(pipe):
    """Weights, modes, gradients and settings of all parts."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return (
        {f"{name}.{key}": value for name, part in parts.items() for key, value in weights(part).items()},
        {name: [module.training for module in part.modules()] for name, part in parts.items()},
        {name: [one.requires_grad for one in part.parameters()] for name, part in parts.items()},
        {name: [one.grad for one in part.parameters()] for name, part in parts.items()},
        {name: part for name, part in pipe.components.items() if name not in parts and name != "scheduler"},
        dict(pipe.config),
        dict(getattr(pipe, "scheduler", pipe).config),
        getattr(getattr(pipe, "scheduler", None), "num_inference_steps", None),
        getattr(pipe, "_progress_bar_config", None),
    )


@pytest.mark.parametrize("kind", ["ddpm", "gan", "sd", pytest.param("sd3", marks=pytest.mark.slow)])
def test_every_check_runs_and_leaves_the_model_as_it_was(kind, short, tiny_ddpm):
    pipe = {"ddpm": lambda: tiny_ddpm, "gan": tiny_gan}.get(kind, lambda: tiny(kind))()
    part = getattr(pipe, GeneratorSubject(pipe, "audited", "").part)
    part.train()
    other = copy.deepcopy(pipe)
    with torch.no_grad():
        next(getattr(other, GeneratorSubject(other, "audited", "").part).parameters()).mul_(1.01)
    prompted, before, random = kind.startswith("sd"), state(pipe), torch.random.get_rng_state()
    given = sets(prompted, 3 if prompted else 1)
    drawing = SMALL if prompted else None if kind == "gan" else {"num_inference_steps": 2}
    found = audit(pipe, other, **given, marker=bright, drawing=drawing, progress=False)
    assert found.failed.keys() <= ({"others_distance"} if kind == "sd3" else set())  # all its draws are bright
    there = {one.name for one in found.results} | found.failed.keys()
    assert there | found.skipped.keys() == {one.name for one in family.EVERY}
    expected = {
        "ddpm": {"from_picture", "sampler", "rounded", "relearn_forget", "relearn_others", "relearn_unrelated"},
        "gan": {"latent_search", "rounded", "relearn_forget", "relearn_others", "relearn_unrelated"},
        "sd": {"paraphrased", "reordered", "seed_search", "from_picture", "word_search", "guidance", "negative_prompt", "sampler", "rounded"}
        | {"relearn_forget", "relearn_others", "relearn_unrelated"},
        "sd3": {"paraphrased", "seed_search", "from_picture", "guidance", "negative_prompt", "rounded", "relearn_forget", "relearn_others"},
    }[kind]  # fmt: skip
    assert expected | {"drawn", "others_distance"} <= there
    after = state(pipe)
    assert same(before[0], after[0])
    assert before[1:] == after[1:]
    assert torch.equal(random, torch.random.get_rng_state())
    assert found.residual.loss is not None


class TestDrawing:
    def test_an_image_is_a_function_of_its_seed(self):
        """Whatever is drawn beside it."""
        pipe, asked = pipeline(), Asked((5, 6, 7))
        one = draw(pipe, asked, {"num_inference_steps": 3})
        torch.testing.assert_close(draw(pipe, asked[1:2], {"num_inference_steps": 3}), one[1:2])
        assert not torch.equal(one[0], one[1])

    @pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
    def test_from_given_noise_as_the_stock_pipeline_from_its_own(self, scheduler):
        pipe, seeds = pipeline(), (5, 6, 7)
        pipe.scheduler = scheduler()
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        stock = pipe(3, generator=generators, num_inference_steps=4, output_type="pt").images * 2 - 1
        noise = torch.cat([torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        given = type("Data", (), {"drawing": {"num_inference_steps": 4}})()
        subject = GeneratorSubject(pipe, "audited", "")
        if scheduler is DDIMScheduler:
            torch.testing.assert_close(searched.denoised(subject.pipe, noise, seeds, given), stock)
        else:  # the generators have not drawn the first noise
            assert searched.denoised(subject.pipe, noise, seeds, given).shape == stock.shape

    @pytest.mark.parametrize("kind", ["sd", "sd3", "flux"])
    def test_latents_of_a_prompted_pipeline_are_of_its_own_shape(self, kind):
        pipe, asked = tiny(kind), Asked((5, 6), ("a red dog", "a blue house"))
        given = type("Data", (), {"drawing": SMALL})()
        shape = searched.latent_shape(pipe, asked, given)
        noise = torch.cat([torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)])
        drawn = draw(pipe, asked, SMALL, latents=noise)
        assert not torch.equal(drawn[0], drawn[1])
        if kind != "flux":  # which packs its noise after drawing it
            torch.testing.assert_close(drawn, draw(pipe, asked, SMALL))

    def test_another_sampler_goes_along_the_same_schedule(self):
        pipe = pipeline()
        pipe.scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.002)
        for name in ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"):
            other = sampler_of(name, pipe)
            assert type(other).__name__ == name
            torch.testing.assert_close(other.alphas_cumprod, pipe.scheduler.alphas_cumprod)


class TestDenoising:
    @pytest.mark.parametrize("kind", ["sd", "sdxl", "pixart", "sd3"])
    def test_what_a_denoiser_is_told_is_what_its_pipeline_tells_it(self, kind):
        """A row a prompt, each as if it were alone."""
        pipe = tiny(kind)
        drawing = {"height": 8, "width": 8} | (
            {"use_resolution_binning": False, "clean_caption": False} if kind == "pixart" else {}
        )
        model = Denoising(pipe, drawing)
        both, one = model.told(["a red dog", "a blue house"]), model.told(["a blue house"])
        clean = torch.randn(1, pipe.vae.config.latent_channels, 4, 4, generator=torch.Generator().manual_seed(0))
        noise, times = torch.ones_like(clean), torch.tensor([300])
        with torch.no_grad():
            expected = model.losses(clean, one, noise, times)
            found = [model.losses(clean, denoising.rows_of(both, torch.tensor([row])), noise, times) for row in (0, 1)]
        torch.testing.assert_close(found[1], expected)
        assert not torch.allclose(found[0], expected)

    def test_the_loss_of_an_unknown_noise_is_its_variance(self):
        """A denoiser that answers 0 has the mean square of the noise as its loss."""
        pipe = pipeline()
        pipe.unet.forward = lambda sample, timestep, return_dict=True: (torch.zeros_like(sample),)
        value = denoising_loss(pipe, Images(images([0], 40)[0]), {}, 0)
        assert value == pytest.approx(1.0, abs=0.06)  # 40 · 10 · 16 squares: a standard deviation of 0.018

    def test_bayes_rule_has_the_lowest_loss_on_its_own_pictures(self):
        known, unknown = (
            denoising_loss(pipeline(without=without), Images(images([0])[0]), {}, 0) for without in (None, 0)
        )
        assert known < 0.7 * unknown

    def test_finetuning_is_adamw_on_the_denoising_loss(self):
        """The first step against the one written out."""
        pipe, other = pipeline(without=0), pipeline(without=0)
        shown = Images(images([0], 8)[0])
        rows = torch.arange(8)
        next(finetuned(pipe, shown, lambda step: rows, (1,), {}, 0))
        generator = denoising.seeded_generator("cpu", 0, 51)
        schedule = NoiseSchedule.of(other.scheduler)
        noise = torch.randn(shown.pixels.shape, generator=generator)
        times = torch.randint(1000, (8,), generator=generator)
        size = other.unet.pictures.weight.square().mean().sqrt().item()
        optimizer = torch.optim.AdamW(other.unet.parameters(), lr=denoising.RATE * size, weight_decay=0.0)
        (other.unet(schedule.add_noise(shown.pixels, noise, times), times).sample - noise).square().mean().backward()
        nn.utils.clip_grad_norm_(other.unet.parameters(), 1.0)
        optimizer.step()
        torch.testing.assert_close(weights(pipe.unet), weights(other.unet))

    def test_relearning_moves_towards_the_kind(self):
        pipe = pipeline(without=0)
        shown = Images(images([0], 40)[0])
        before = denoising_loss(pipe, shown, {}, 0)
        *_, trained = finetuned(pipe, shown, lambda step: torch.arange(32), (20, 200), {}, 0)
        assert denoising_loss(trained, shown, {}, 0) < before


class TestSearches:
    def test_the_nearest_image_of_a_linear_generator_is_its_projection(self):
        class Linear(nn.Module):
            latent_shape = (3,)

            def __init__(self):
                super().__init__()
                basis = torch.linalg.qr(torch.randn(16, 3, generator=torch.Generator().manual_seed(0))).Q
                self.basis = nn.Parameter(basis)

            def forward(self, latents):
                return type("Output", (), {"sample": (latents @ self.basis.T).view(-1, 1, 4, 4)})()

        generator = Linear()
        wanted = images([0, 1, 2], 6)[0]
        with torch.no_grad():
            projected = (wanted.flatten(1) @ generator.basis @ generator.basis.T).view_as(wanted)
        searched.LATENT, kept = searched.LATENT | {"steps": 2000, "prior": 0.0}, searched.LATENT
        try:
            found, error = searched.nearest_images(generator, wanted, 0)
        finally:
            searched.LATENT = kept
        torch.testing.assert_close(found, projected.clamp(-1, 1), atol=1e-3, rtol=0)
        assert error == pytest.approx(float((projected - wanted).square().mean()), abs=1e-4)

    def test_a_searched_word_lowers_the_loss_and_changes_its_row_alone(self, monkeypatch):
        monkeypatch.setitem(searched.WORD, "steps", 30)
        monkeypatch.setitem(searched.WORD, "rate", 0.1)
        pipe = GeneratorSubject(tiny("sd"), "audited", "").copy("text_encoder")
        before = weights(pipe.text_encoder)
        shown = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
        given = type("Data", (), {
            "forget": Images(shown, ("a red dog",) * 8), "forget_prompts": ("a red dog",), "retain_prompts": ("a red cat",), "drawing": SMALL,
        })()  # fmt: skip
        word, losses = searched.with_word(pipe, given, 0)
        assert word == "dog"
        assert sum(losses[-10:]) < sum(losses[:10])
        after = weights(pipe.text_encoder)
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        assert len(changed) == 1
        rows = (before[changed[0]] != after[changed[0]]).any(1).nonzero().flatten().tolist()
        assert rows == pipe.tokenizer("dog", add_special_tokens=False).input_ids

    def test_a_picture_of_the_kind_is_drawn_as_the_kind_again(self):
        """Noised by 0.6, Bayes' rule still knows which of three it was, in part; who knows two of them cannot draw it."""
        shown = Images(images([0], 60)[0])
        given = type("Data", (), {
            "forget": shown, "drawing": {"num_inference_steps": 10}, "marker": lambda self, drawn: (classes(drawn) == 0, None),
        })()  # fmt: skip
        knows, never = (
            searched.FromPicture().read(GeneratorSubject(pipeline(without=without), "audited", ""), given, 0).value
            for without in (None, 0)
        )
        assert knows > 0.4 > never == 0.0


def test_batches_of_relearning():
    """A quarter of the kind where some is there; all that is there where nothing else is."""
    shown = Images(torch.arange(30.0).view(30, 1, 1, 1))
    rows = relearning.batches_of(shown, 10, 0)(0)
    assert (len(rows), int((rows < 10).sum())) == (32, 8)
    assert int(relearning.batches_of(shown, 30, 0)(0).max()) < 30
    assert len(relearning.batches_of(shown, 0, 0)(0)) == 32
