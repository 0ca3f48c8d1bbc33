"""`FilteredPipeline`: nothing is given out that the filter does not let through, and all else is as without it."""

import copy
import inspect
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AudioPipelineOutput,
    AutoPipelineForImage2Image,
    DDIMScheduler,
    DiffusionPipeline,
    ImagePipelineOutput,
    StableDiffusionImg2ImgPipeline,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from filter_data import (
    BrightnessChecker,
    case,
    fitted_filter,
    in_place_of_the_checker,
    loaders_without_a_filter,
    seeded,
    tiny_gan,
)
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_unlearn import FASTFitter, FASTSafetyChecker, FilterEncoder, GANPipeline
from hf_unlearn.filtering.drawing import saved
from hf_unlearn.filtering.drawing.actions import FilteredImageError, blur
from hf_unlearn.filtering.drawing.pipeline import FilteredPipeline


ALL = ("ddpm", "stable-diffusion", "sdxl", "image-to-image", "gan")
WITH_LATENTS = ("stable-diffusion", "sdxl", "image-to-image")
EVERYTHING, NOTHING = 2.0, -2.0  # thresholds of a mean in [−1, 1]


@pytest.fixture
def gan(request):
    return case("gan", request)


@pytest.fixture
def stable_diffusion(request):
    return case("stable-diffusion", request)


@pytest.fixture(params=ALL)
def each(request):
    return case(request.param, request)


def filtered(given, flagged=None, *, threshold=None, **settings):
    """The case's pipeline with a filter that does not release so many of the images of seed 0."""
    threshold = given.threshold(flagged) if threshold is None else threshold
    return FilteredPipeline(given.pipeline, BrightnessChecker(threshold), **settings)


def equal(first, second):
    if isinstance(first, list):
        return [np.array(image).tolist() for image in first] == [np.array(image).tolist() for image in second]
    return type(first) is type(second) and first.dtype == second.dtype and bool((first == second).all())


class TestReleased:
    """With a filter that lets everything through, an image is the same to the bit."""

    @pytest.mark.parametrize("output_type", ["pil", "np", "pt", None])
    def test_as_without_a_filter(self, each, output_type):
        asked = {} if output_type is None else {"output_type": output_type}
        expected = each.draw(**asked)
        pipe = filtered(each, threshold=EVERYTHING)
        given = each.draw(pipe, **asked)
        assert equal(given.images, expected.images)
        assert isinstance(given, type(expected))
        assert given.filtered == [False] * 4
        assert given.filter_tries == [1] * 4
        assert len(pipe.safety_checker.seen) == 1

    @pytest.mark.parametrize("name", WITH_LATENTS)
    def test_latents(self, name, request):
        given = case(name, request)
        expected = given.draw(output_type="latent").images
        out = given.draw(filtered(given, threshold=EVERYTHING), output_type="latent")
        assert equal(out.images, expected)
        torch.testing.assert_close(out.filter_scores.flatten(), given.brightness(), rtol=0, atol=1e-5)

    def test_the_filter_sees_what_is_drawn(self, each):
        pipe = filtered(each, threshold=EVERYTHING)
        out = each.draw(pipe, output_type="pt")
        assert pipe.safety_checker.seen[0].equal(out.images * 2 - 1)
        assert out.filter_scores.dtype == torch.float32
        assert out.filter_scores.shape == (4, 1)
        torch.testing.assert_close(out.filter_scores.flatten(), each.brightness())

    def test_in_half_precision(self, each):
        expected = each.pipeline.to(torch.bfloat16) and each.draw(output_type="pt").images
        out = each.draw(filtered(each, threshold=EVERYTHING), output_type="pt")
        assert equal(out.images, expected)
        assert each.draw(filtered(each, 2)).filtered.count(True) == 2

    @pytest.mark.parametrize("output_type", ["pil", "np"])
    def test_without_an_image_processor(self, output_type, request):
        given = case("ddim", request)
        pipe = filtered(given, threshold=EVERYTHING)
        expected = given.draw(output_type=output_type).images
        assert equal(given.draw(pipe, output_type=output_type).images, expected)
        as_tensor = given.draw(pipe, output_type="pt").images
        assert isinstance(as_tensor, torch.Tensor)
        assert equal(as_tensor.permute(0, 2, 3, 1).numpy(), given.draw(output_type="np").images)

    def test_what_comes_out_of_the_network_is_not_asked_for(self, request, monkeypatch):
        """As "pt" Kandinsky gives images in [−1, 1], and DeepFloyd leaves out its own checker."""
        given, asked = case("ddim", request), []
        call = type(given.pipeline).__call__

        def remember(
            self, batch_size=1, generator=None, eta=0.0, num_inference_steps=50, output_type="pil", return_dict=True
        ):
            asked.append(output_type)
            return call(self, batch_size, generator, eta, num_inference_steps, output_type=output_type)

        monkeypatch.setattr(type(given.pipeline), "__call__", remember)
        for output_type in ("pil", "np", "pt"):
            given.draw(filtered(given, threshold=EVERYTHING), output_type=output_type)
        assert asked == ["np"] * 3

    def test_positions(self, gan):
        assert equal(filtered(gan, threshold=EVERYTHING)(3, seeded()).images, gan.pipeline(3, seeded()).images)

    def test_gray_images(self):
        pipe = tiny_gan(channels=1)
        out = FilteredPipeline(pipe, BrightnessChecker(EVERYTHING))(2, seeded())
        assert out.images[0].mode == "L"
        assert equal(out.images, pipe(2, seeded()).images)


class TestOutput:
    def test_keeps_the_fields_of_the_pipeline_inside(self, stable_diffusion):
        out = stable_diffusion.draw(filtered(stable_diffusion, 1))
        assert isinstance(out, StableDiffusionPipelineOutput)
        assert out.nsfw_content_detected is None
        assert list(out.keys()) == ["images", "filtered", "filter_scores", "filter_tries"]
        assert out["filtered"] == out.filtered

    def test_as_a_tuple(self, each):
        plain = each.draw(return_dict=False)
        pipe = filtered(each, 1)
        given, out = each.draw(pipe, return_dict=False), each.draw(pipe)
        assert isinstance(given, tuple)
        assert len(given) == len(plain) + 3
        assert given[1:-3] == plain[1:]
        assert equal(given[0], out.images)
        assert given[-3] == out.filtered
        assert given[-2].equal(out.filter_scores)
        assert given[-1] == out.filter_tries

    @pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda out: pickle.loads(pickle.dumps(out))])
    def test_can_be_copied(self, gan, again):
        out = gan.draw(filtered(gan, 1), output_type="pt")
        other = again(out)
        assert type(other) is type(out)
        assert isinstance(other, ImagePipelineOutput)
        assert other.images.equal(out.images)
        assert other.filtered == out.filtered

    def test_its_class_is_made_once(self, gan):
        pipe = filtered(gan, 1)
        assert type(gan.draw(pipe)) is type(gan.draw(pipe))


class TestActions:
    def test_blank(self, each):
        expected = each.draw(output_type="pt").images
        out = each.draw(filtered(each, 2), output_type="pt")
        flagged = torch.tensor(out.filtered)
        assert flagged.tolist() == (each.brightness() >= each.brightness().sort().values[2]).tolist()
        assert out.images[~flagged].equal(expected[~flagged])
        assert out.images[flagged].abs().max() == 0

    @pytest.mark.parametrize("output_type", ["pil", "np"])
    def test_blank_in_other_types(self, each, output_type):
        expected = each.draw(output_type=output_type).images
        out = each.draw(filtered(each, 2), output_type=output_type)
        for image, drawn, flagged in zip(out.images, expected, out.filtered, strict=True):
            assert np.array_equal(np.array(image), np.array(drawn) * (not flagged))
        assert sum(out.filtered) == 2

    def test_blur(self, gan):
        expected = gan.draw(output_type="pt").images
        out = gan.draw(filtered(gan, 2, action="blur"), output_type="pt")
        flagged = torch.tensor(out.filtered)
        assert flagged.sum() == 2
        assert out.images[flagged].equal(blur(expected[flagged]))
        assert out.images[~flagged].equal(expected[~flagged])

    def test_flag_gives_all_out_and_says_so(self, gan, caplog):
        with caplog.at_level(logging.WARNING):
            pipe = filtered(gan, 2, action="flag")
        assert "given out whatever the filter says" in caplog.text
        out = gan.draw(pipe)
        assert equal(out.images, gan.draw().images)
        assert out.filtered.count(True) == 2

    def test_raise(self, gan):
        pipe = filtered(gan, 1, action="raise")
        with pytest.raises(FilteredImageError) as error:
            gan.draw(pipe)
        assert error.value.flags.sum() == 1
        assert error.value.scores.flatten().equal(gan.brightness())
        pipe.safety_checker.threshold.fill_(EVERYTHING)
        assert equal(gan.draw(pipe).images, gan.draw().images)

    def test_a_function(self, gan):
        expected = gan.draw(output_type="pt").images
        given = []

        def negative(images, scores):
            given.append((images, scores))
            return 1 - images

        out = gan.draw(filtered(gan, 2), output_type="pt", filter_action=negative)
        flagged = torch.tensor(out.filtered)
        assert given[0][0].equal(expected[flagged])
        assert given[0][1].equal(out.filter_scores[flagged])
        assert out.images[flagged].equal(1 - expected[flagged])
        assert out.images[~flagged].equal(expected[~flagged])

    def test_a_function_that_gives_no_images(self, gan):
        with pytest.raises(ValueError, match="^action: gave images that are not finite"):
            gan.draw(filtered(gan, 2), filter_action=lambda images, scores: images * torch.inf)

    def test_for_one_call(self, gan):
        pipe = filtered(gan, 2, action="raise")
        assert gan.draw(pipe, filter_action="blank").filtered.count(True) == 2
        assert pipe.action == "raise"

    @pytest.mark.parametrize("action", ["Blank", "none", False])
    def test_unknown(self, gan, action):
        pipe = filtered(gan, 1)
        with pytest.raises(ValueError, match=r"^action=.* must be 'blank', 'blur', 'flag', 'regenerate', 'raise' or"):
            pipe.action = action
        with pytest.raises(ValueError, match="^filter_action="):
            gan.draw(pipe, filter_action=action)
        assert pipe.safety_checker.seen == []

    @pytest.mark.parametrize("tries", [0, -1, 1.5, True, None])
    def test_tries(self, gan, tries):
        with pytest.raises(ValueError, match=f"^max_tries={tries}: must be an integer ≥ 1$"):
            filtered(gan, 1, max_tries=tries)

    @pytest.mark.parametrize("action", ["blank", "blur", "regenerate", "raise"])
    def test_what_is_not_finite_is_not_released(self, gan, action):
        pipe = filtered(gan, threshold=EVERYTHING, action=action)
        latents = torch.randn(4, 4, generator=seeded())
        latents[2, 1] = torch.nan
        if action == "raise":
            with pytest.raises(FilteredImageError, match="^1 of 4"):
                pipe(latents=latents)
            return
        out = pipe(latents=latents, generator=seeded(), output_type="pt")
        assert out.images.isfinite().all()
        assert out.filtered == [False, False, action != "regenerate", False]
        assert out.filter_scores[2].isnan().all() == (action != "regenerate")

    def test_a_broken_network(self, each):
        network = getattr(each.pipeline, "unet", None) or each.pipeline.generator
        torch.nn.init.constant_(list(network.parameters())[-1], torch.nan)
        out = each.draw(filtered(each, threshold=EVERYTHING), output_type="pt", filter_action="regenerate")
        assert out.filtered == [True] * 4
        assert out.images.abs().max() == 0
        assert out.filter_scores.isnan().all()

    def test_the_filter_is_not_asked_what_nan_shows(self, gan):
        pipe = filtered(gan, threshold=EVERYTHING)
        pipe(latents=torch.tensor([[torch.nan] * 4, [0.0] * 4]))
        assert pipe.safety_checker.seen[0].isfinite().all()


class TestRegenerate:
    def test_only_what_is_not_released_is_drawn_again(self, each):
        expected = each.draw(output_type="pt").images
        pipe = filtered(each, 2, action="regenerate", max_tries=20)
        out = each.draw(pipe, output_type="pt")
        first = torch.tensor(each.draw(pipe, filter_action="flag").filtered)
        tries = torch.tensor(out.filter_tries)
        assert out.images[~first].equal(expected[~first])
        assert (tries > 1).equal(first)
        released = ~torch.tensor(out.filtered)
        assert (released & first).any()
        assert (out.filter_scores[released] <= pipe.safety_checker.threshold).all()
        brightness = (out.images * 2 - 1).flatten(1).mean(1)
        torch.testing.assert_close(out.filter_scores[released].flatten(), brightness[released])
        assert len(pipe.safety_checker.seen[1]) == 2

    def test_gives_up(self, each):
        pipe = filtered(each, threshold=NOTHING, action="regenerate", max_tries=2)
        out = each.draw(pipe, output_type="pt")
        assert out.images.abs().max() == 0
        assert out.filtered == [True] * 4
        assert out.filter_tries == [3] * 4
        assert [len(seen) for seen in pipe.safety_checker.seen] == [4, 4, 4]
        assert not pipe.safety_checker.seen[0].equal(pipe.safety_checker.seen[1])
        torch.testing.assert_close(out.filter_scores.flatten(), pipe.safety_checker.seen[2].flatten(1).mean(1))

    def test_a_seed_gives_the_same_again(self, each):
        pipe = filtered(each, 2, action="regenerate")
        first, second, other = (each.draw(pipe, seed=seed, output_type="pt") for seed in (0, 0, 1))
        assert first.images.equal(second.images)
        assert first.filter_tries == second.filter_tries
        assert not first.images.equal(other.images)

    @pytest.mark.parametrize("name", ALL)
    def test_each_place_goes_on_with_its_own_generator(self, name, request):
        """What comes to a place is what this place's generator would draw next, with its prompt."""
        given = case(name, request)
        generators = [seeded(number) for number in range(4)]
        images = given.draw(output_type="pt", generator=generators).images
        brightness = (images * 2 - 1).flatten(1).mean(1)
        threshold = brightness.sort(descending=True).values[:2].mean().item()
        place = int(brightness.argmax())
        states = [generator.get_state() for generator in generators]
        part = {"batch_size": 1, "num_images": 1, "num_images_per_prompt": 1}
        part = {name: value for name, value in part.items() if name in given.arguments}
        each = given.arguments.get("num_images_per_prompt")
        if "prompt" in given.arguments:
            part["prompt"] = given.arguments["prompt"][place // each]
        if "image" in given.arguments:
            part["image"] = given.arguments["image"][[place // each]]
        expected = given.draw(output_type="pt", generator=generators[place], **part).images[0]

        generators = [seeded(number) for number in range(4)]
        pipe = filtered(given, threshold=threshold, action="regenerate", max_tries=1)
        given.draw(pipe, output_type="pt", generator=generators)
        seen = pipe.safety_checker.seen
        assert [len(images) for images in seen] == [4, 1]
        torch.testing.assert_close((seen[1][0] + 1) / 2, expected, rtol=1e-4, atol=1e-5)
        for number, generator in enumerate(generators):
            assert generator.get_state().equal(states[number]) == (number != place)

    def test_several_images_of_several_pictures(self, request):
        """Then diffusers has the pictures in another order than the prompts: nobody guesses which is whose."""
        given = case("image-to-image", request)
        given.arguments["num_images_per_prompt"] = 2
        pipe = filtered(given, 2, action="regenerate", max_tries=1)
        out = given.draw(pipe, output_type="pt")
        first, second = pipe.safety_checker.seen
        assert len(first) == len(second) == 8
        drawn_again = torch.tensor(out.filter_tries) == 2
        assert drawn_again.sum() == 2
        for place in drawn_again.nonzero().flatten().tolist():
            assert out.filtered[place] or torch.allclose(out.images[place], (second[place] + 1) / 2)

    def test_of_one_prompt(self, stable_diffusion):
        stable_diffusion.arguments |= {"prompt": "a photo", "num_images_per_prompt": 3}
        pipe = filtered(stable_diffusion, 2, action="regenerate", max_tries=1)
        stable_diffusion.draw(pipe)
        assert [len(seen) for seen in pipe.safety_checker.seen] == [3, 2]

    @pytest.mark.parametrize("latents", [False, True])
    def test_where_the_arguments_cannot_be_taken_apart(self, stable_diffusion, latents, monkeypatch):
        """All are drawn again then, with other noise, and only the places that were not released are taken."""
        if latents:
            stable_diffusion.arguments |= {"latents": torch.randn(4, 4, 4, 4, generator=seeded(3))}
        monkeypatch.setattr("hf_unlearn.filtering.drawing.calls.Call.for_places", lambda self, places, drawn: None)
        expected = stable_diffusion.draw(output_type="pt").images
        pipe = filtered(stable_diffusion, 1, action="regenerate", max_tries=20)
        out = stable_diffusion.draw(pipe, output_type="pt")
        seen = pipe.safety_checker.seen
        place = int(stable_diffusion.brightness().argmax())
        assert out.filtered == [False] * 4
        assert {len(images) for images in seen} == {4}
        assert len(seen) == max(out.filter_tries) == out.filter_tries[place]
        torch.testing.assert_close(out.images[place], (seen[-1][place] + 1) / 2)
        assert all(out.images[other].equal(expected[other]) for other in range(4) if other != place)

    def test_the_callers_latents_are_for_the_first_draw(self, gan):
        latents = torch.randn(4, 4, generator=seeded(5))
        gan.arguments |= {"latents": latents}
        out = gan.draw(filtered(gan, 2, action="regenerate", max_tries=50), output_type="pt")
        assert out.filtered == [False] * 4
        assert max(out.filter_tries) > 1

    def test_a_pipeline_that_draws_another_number(self, gan, monkeypatch):
        monkeypatch.setattr("hf_unlearn.filtering.drawing.calls._NUMBERS", ())
        with pytest.raises(ValueError, match="^pipeline: drew 4 images again, must draw 2$"):
            gan.draw(filtered(gan, 2, action="regenerate"))

    def test_callbacks(self, stable_diffusion):
        steps = []

        def callback(pipe, step, timestep, values):
            steps.append(step)
            return values

        pipe = filtered(stable_diffusion, threshold=NOTHING, action="regenerate", max_tries=2)
        stable_diffusion.draw(pipe, callback_on_step_end=callback)
        assert steps == [0, 1] * 3

    def test_the_pipelines_own_checker_stays(self, stable_diffusion, monkeypatch):
        """Its images come black and so are released; what it says of an image goes where the image goes."""
        inner, plain = stable_diffusion.pipeline, stable_diffusion.draw(output_type="pt").images
        darkest = plain.flatten(1).mean(1).min().item()
        draws = []

        def check(image, device, dtype):
            draws.append(len(image))
            found = [len(draws) > 1 or place == 0 for place in range(len(image))]
            return image * ~torch.tensor(found).view(-1, 1, 1, 1), found

        monkeypatch.setattr(inner, "run_safety_checker", check)
        pipe = filtered(stable_diffusion, threshold=darkest * 2 - 1 - 0.01, action="regenerate")
        out = stable_diffusion.draw(pipe, output_type="pt")
        assert draws == [4, 3]
        assert out.nsfw_content_detected == [True] * 4
        assert out.filter_tries == [1, 2, 2, 2]
        assert out.images.abs().max() == 0
        assert out.filtered == [False] * 4


class TestLatents:
    @pytest.mark.parametrize("name", WITH_LATENTS)
    def test_are_checked_by_what_they_show(self, name, request):
        given = case(name, request)
        latents = given.draw(output_type="latent").images
        pipe = filtered(given, 2)
        out = given.draw(pipe, output_type="latent")
        assert out.filtered == given.draw(pipe).filtered
        flagged = torch.tensor(out.filtered)
        assert out.images[flagged].abs().max() == 0
        assert out.images[~flagged].equal(latents[~flagged])
        assert given.draw(pipe, output_type="latent", filter_action="flag").images.equal(latents)

    def test_are_drawn_again(self, stable_diffusion):
        pipe = filtered(stable_diffusion, 2, action="regenerate", max_tries=20)
        out, shown = (stable_diffusion.draw(pipe, output_type=kind) for kind in ("latent", "pt"))
        assert out.filter_tries == shown.filter_tries
        decoded = pipe.vae.decode(out.images / pipe.vae.config.scaling_factor).sample
        torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), shown.images)

    @pytest.mark.parametrize(
        "changes",
        [
            {"latents_mean": [0.5, -0.5, 0.25, 0.0], "latents_std": [2.0, 1.0, 0.5, 3.0]},
            {"scaling_factor": 0.5, "force_upcast": True},
        ],
    )
    def test_with_the_scales_of_the_autoencoder(self, changes, request):
        given = case("sdxl", request)
        given.pipeline.vae.register_to_config(**changes)
        pipe = filtered(given, threshold=EVERYTHING)
        shown, latents = (given.draw(pipe, output_type=kind).filter_scores for kind in ("pt", "latent"))
        torch.testing.assert_close(latents, shown, rtol=0, atol=1e-5)

    def test_with_a_shift(self, stable_diffusion):
        """As Stable Diffusion 3 has it; no pipeline here."""
        vae = stable_diffusion.pipeline.vae
        latents = stable_diffusion.draw(output_type="latent").images
        expected = vae.decode(latents / vae.config.scaling_factor + 0.6).sample.clamp(-1, 1).flatten(1).mean(1)
        vae.register_to_config(shift_factor=0.6)
        out = stable_diffusion.draw(filtered(stable_diffusion, threshold=EVERYTHING), output_type="latent")
        torch.testing.assert_close(out.filter_scores.flatten(), expected)

    def test_an_autoencoder_that_overflows_is_upcast_for_a_while(self, request, monkeypatch):
        given, seen = case("sdxl", request), []
        vae, decode = given.pipeline.vae, given.pipeline.vae.decode
        monkeypatch.setattr(
            vae, "decode", lambda latents, **k: seen.append((latents.dtype, vae.dtype)) or decode(latents, **k)
        )
        given.pipeline.vae.register_to_config(force_upcast=True)
        given.pipeline.vae.to(torch.float16)
        latents = given.draw(output_type="latent")
        out = given.draw(filtered(given, threshold=EVERYTHING), output_type="latent")
        assert seen == [(torch.float32, torch.float32)]
        assert given.pipeline.vae.dtype == torch.float16
        assert out.images.equal(latents.images)
        assert out.filter_scores.isfinite().all()

    @pytest.mark.parametrize("action", ["blur", lambda images, scores: images])
    def test_actions_that_need_images(self, stable_diffusion, action):
        pipe = filtered(stable_diffusion, 1)
        with pytest.raises(ValueError, match=r"^action=.*: needs images, but output_type='latent' gives none$"):
            stable_diffusion.draw(pipe, output_type="latent", filter_action=action)
        assert pipe.safety_checker.seen == []

    @pytest.mark.parametrize("name", ["ddpm", "gan"])
    def test_where_there_are_none(self, name, request):
        given = case(name, request)
        with pytest.raises(ValueError, match=r"^output_type='latent': (DDPM|GAN)Pipeline has no vae to check"):
            given.draw(filtered(given, 1), output_type="latent")

    def test_that_are_packed(self, stable_diffusion, monkeypatch):
        packed = StableDiffusionPipelineOutput(torch.zeros(4, 16, 16), None)
        pipe = filtered(stable_diffusion, 1)
        monkeypatch.setattr(type(pipe.pipeline), "__call__", lambda self, output_type="pil", return_dict=True: packed)
        with pytest.raises(ValueError, match=r"^output_type='latent': \[4, 16, 16\] is not \[n, 4, height, width\]"):
            pipe(output_type="latent")


class TestFilterOfLatents:
    """A filter without an encoder judges what a GAN draws from."""

    def pipe(self, gan, threshold, **settings):
        return FilteredPipeline(gan.pipeline, BrightnessChecker(threshold, latents=True), **settings)

    @pytest.mark.parametrize("given", [True, False])
    def test_they_are_judged(self, gan, given):
        latents = gan.pipeline.prepare_latents(4, seeded())
        means = latents.mean(1)
        pipe = self.pipe(gan, means.sort().values[1:3].mean().item())
        out = gan.draw(pipe, output_type="pt", **({"latents": latents} if given else {}))
        assert pipe.safety_checker.seen[0].equal(latents)
        assert len(pipe.safety_checker.seen) == 1
        assert out.filter_scores.flatten().equal(means)
        flagged = torch.tensor(out.filtered)
        assert flagged.sum() == 2
        assert out.images[flagged].abs().max() == 0
        assert out.images[~flagged].equal(gan.draw(output_type="pt").images[~flagged])

    def test_they_are_drawn_again_and_the_images_once(self, gan, monkeypatch):
        first = gan.pipeline.prepare_latents(4, seeded())
        pipe = self.pipe(gan, first.mean(1).sort().values[1:3].mean().item(), action="regenerate", max_tries=20)
        draws, draw = [], GANPipeline.draw
        monkeypatch.setattr(
            GANPipeline, "draw", lambda self, latents, **k: draws.append(latents) or draw(self, latents, **k)
        )
        out = gan.draw(pipe, output_type="pt")
        assert len(draws) == 1
        assert out.filtered == [False] * 4
        kept = first.mean(1) <= pipe.safety_checker.threshold
        assert draws[0][kept].equal(first[kept])
        assert (torch.tensor(out.filter_tries) == 1).equal(kept)
        assert out.filter_scores.flatten().equal(draws[0].mean(1))

    def test_gives_up(self, gan):
        out = gan.draw(self.pipe(gan, -100, action="regenerate"), output_type="pt")
        assert out.filter_tries == [4] * 4
        assert out.filtered == [True] * 4
        assert out.images.abs().max() == 0

    def test_images_that_are_not_finite(self, gan):
        torch.nn.init.constant_(list(gan.pipeline.generator.parameters())[-1], torch.nan)
        out = gan.draw(self.pipe(gan, 100), output_type="pt")
        assert out.filtered == [True] * 4
        assert out.images.abs().max() == 0

    def test_the_callers_latents_of_a_diffusion_model(self, stable_diffusion):
        stable_diffusion.arguments |= {"latents": torch.randn(4, 4, 4, 4, generator=seeded())}
        means = stable_diffusion.arguments["latents"].flatten(1).mean(1)
        pipe = self.pipe(stable_diffusion, means.sort().values[1:3].mean().item())
        assert stable_diffusion.draw(pipe).filtered.count(True) == 2
        with pytest.raises(
            ValueError, match="^safety_checker: judges latents, which StableDiffusionPipeline does not"
        ):
            stable_diffusion.draw(pipe, filter_action="regenerate")

    def test_a_pipeline_that_does_not_draw_from_them(self, gan, monkeypatch):
        images = gan.draw(output_type="pt")
        monkeypatch.setattr(
            GANPipeline,
            "__call__",
            lambda self, num_images=1, generator=None, output_type="pil", return_dict=True: images,
        )
        with pytest.raises(ValueError, match="^safety_checker: judges latents, from which GANPipeline does not draw$"):
            self.pipe(gan, 100)(num_images=4)

    def test_pipelines_without_latents(self, request):
        given = case("ddpm", request)
        with pytest.raises(ValueError, match="^safety_checker: judges latents, which DDPMPipeline does not give"):
            given.draw(self.pipe(given, 0))


@dataclass
class SafeOutput(ImagePipelineOutput):
    """As the pipeline of Safe Latent Diffusion gives one."""

    unsafe_images: list | None = None


class TestRefused:
    def test_no_filter(self, gan):
        for nothing in (None, torch.nn.Identity(), "filter"):
            with pytest.raises(ValueError, match=r"^safety_checker: is .*, must be a FASTSafetyChecker"):
                FilteredPipeline(pipeline=gan.pipeline, safety_checker=nothing)
            pipe = filtered(gan, 1)
            with pytest.raises(ValueError, match="^safety_checker: is "):
                pipe.safety_checker = nothing
            assert gan.draw(pipe).filtered.count(True) == 1

    def test_a_filter_of_texts(self, gan):
        checker = BrightnessChecker(0)
        checker.encoder = SimpleNamespace(kind="text")
        with pytest.raises(ValueError, match="^safety_checker: judges texts, must judge images or latents$"):
            FilteredPipeline(gan.pipeline, checker)

    def test_no_pipeline(self, gan):
        for nothing in (None, gan.pipeline.generator, filtered(gan, 1)):
            with pytest.raises(
                ValueError, match=r"^pipeline: is a .*, must be a pipeline of diffusers without a filter$"
            ):
                FilteredPipeline(nothing, BrightnessChecker(0))

    @pytest.mark.parametrize("name", ["AnimateDiffPipeline", "AudioLDM2Pipeline", "WanPipeline"])
    def test_pipelines_of_other_things(self, name):
        """Known before anything is drawn."""
        kind = getattr(diffusers, name)
        with pytest.raises(ValueError, match=f"^pipeline: {name} draws no images that can be filtered$"):
            FilteredPipeline(kind.__new__(kind), BrightnessChecker(0))

    @pytest.mark.parametrize(
        ("output", "message"),
        [
            (AudioPipelineOutput(audios=np.zeros(3)), "gives a AudioPipelineOutput without images"),
            (SimpleNamespace(images=[]), "gives a SimpleNamespace without images"),
            (
                SafeOutput(torch.zeros(1, 3, 8, 8), unsafe_images=[0]),
                "gives unsafe_images too, which are not",
            ),
            (ImagePipelineOutput(images=[]), "gives images as list, which"),
            (ImagePipelineOutput(images=[torch.zeros(3, 8, 8)]), "gives images as list, which"),
            (ImagePipelineOutput(images=torch.zeros(3, 8, 8)), r"gives images as Tensor of shape \[3, 8, 8\], which"),
            (ImagePipelineOutput(images=np.zeros((1, 8, 8, 3), np.uint8)), "gives images as Tensor of shape"),
            (ImagePipelineOutput(images=torch.zeros(2, 3, 8, 8) - 1), r"gives images that are not in \[0, 1\]"),
            (ImagePipelineOutput(images=torch.zeros(2, 3, 8, 8) + 1.1), r"gives images that are not in \[0, 1\]"),
        ],
    )
    def test_outputs(self, gan, output, message, monkeypatch):
        pipe = filtered(gan, 1)
        monkeypatch.setattr(GANPipeline, "__call__", lambda self, output_type="pil", return_dict=True: output)
        with pytest.raises(ValueError, match=f"^pipeline: {message}"):
            pipe()

    def test_output_types(self, gan):
        pipe = filtered(gan, 1)
        for wanted in ("numpy", None, "mesh"):
            with pytest.raises(ValueError, match=r"^output_type=.*: must be 'pil', 'np', 'pt', 'latent'$"):
                gan.draw(pipe, output_type=wanted)

    def test_arguments_that_the_pipeline_does_not_take(self, gan):
        with pytest.raises(TypeError, match="unexpected keyword argument 'prompt'"):
            gan.draw(filtered(gan, 1), prompt="a photo")


def test_what_a_callback_holds_is_left_alone(stable_diffusion):
    held = []
    pipe = filtered(stable_diffusion, 2)
    out = stable_diffusion.draw(
        pipe,
        output_type="latent",
        callback_on_step_end=lambda pipe, step, time, values: held.append(values["latents"]) or {},
    )
    assert sum(out.filtered) == 2
    assert held[-1].flatten(1).abs().amax(1).min() > 0


class TestOfInpainting:
    def test_a_crop_comes_as_pictures(self, gan, monkeypatch):
        """`padding_mask_crop` of diffusers 0.42 gives no tensors."""
        drawn = gan.draw().images
        asked = []

        def call(self, padding_mask_crop=None, output_type="pil", return_dict=True):
            asked.append(output_type)
            return ImagePipelineOutput(images=drawn)

        pipe = filtered(gan, 2)
        monkeypatch.setattr(GANPipeline, "__call__", call)
        out = pipe(padding_mask_crop=4)
        assert asked == ["pil"]
        assert out.filtered.count(True) == 2
        for image, own, flagged in zip(out.images, drawn, out.filtered, strict=True):
            assert isinstance(image, Image.Image)
            assert np.array_equal(np.array(image), np.array(own) * (not flagged))


class TestAttributes:
    def test_are_those_of_the_pipeline_inside(self, stable_diffusion):
        inner, pipe = stable_diffusion.pipeline, filtered(stable_diffusion, 1)
        assert pipe.unet is inner.unet
        assert pipe.vae_scale_factor == inner.vae_scale_factor
        assert pipe.load_lora_weights.__self__ is inner
        assert not hasattr(pipe, "transformer")
        pipe.set_progress_bar_config(desc="drawing")
        assert inner._progress_bar_config == {"desc": "drawing"}

    def test_are_set_there(self, stable_diffusion):
        inner, pipe = stable_diffusion.pipeline, filtered(stable_diffusion, 1)
        scheduler = DDIMScheduler(steps_offset=1, clip_sample=False, beta_schedule="squaredcos_cap_v2")
        pipe.scheduler = scheduler
        assert inner.scheduler is scheduler
        assert "scheduler" not in vars(pipe)
        pipe.note = "mine"
        assert "note" not in vars(inner)
        assert pipe.note == "mine"

    def test_its_components_are_the_pipeline_and_the_filter(self, stable_diffusion):
        pipe = filtered(stable_diffusion, 1)
        assert pipe.components == {"pipeline": pipe.pipeline, "safety_checker": pipe.safety_checker}
        assert pipe.config["pipeline"] == ("diffusers", "StableDiffusionPipeline")
        assert "FilteredPipeline" in repr(pipe)

    @pytest.mark.parametrize("kind", [StableDiffusionImg2ImgPipeline, AutoPipelineForImage2Image])
    def test_no_other_pipeline_is_made_of_it(self, stable_diffusion, kind):
        pipe = filtered(stable_diffusion, 1)
        with pytest.raises((TypeError, ValueError)):
            kind.from_pipe(pipe)
        with pytest.raises((TypeError, OSError)):
            kind(**pipe.components)

    def test_it_is_made_of_no_other_pipeline(self, gan):
        """That of diffusers would cast the pipeline inside, and forget the settings."""
        for given in (gan.pipeline, filtered(gan, 1)):
            with pytest.raises(
                ValueError, match=r"^from_pipe: make FilteredPipeline\(pipeline=…, safety_checker=…\)$"
            ):
                FilteredPipeline.from_pipe(given, safety_checker=BrightnessChecker(0))

    def test_drawing_methods_are_not_passed_on(self, gan):
        pipe = filtered(gan, 1)
        assert not hasattr(pipe, "draw")
        with pytest.raises(AttributeError, match="^draw: draws past the filter"):
            pipe.draw(torch.zeros(1, 4))

    def test_another_pipeline_or_filter(self, gan):
        pipe = filtered(gan, 1)
        pipe.safety_checker = BrightnessChecker(EVERYTHING)
        assert gan.draw(pipe).filtered == [False] * 4
        pipe.pipeline = tiny_gan(channels=1)
        assert gan.draw(pipe).images[0].mode == "L"

    def test_a_copy(self, gan):
        pipe = filtered(gan, 1)
        assert equal(gan.draw(copy.deepcopy(pipe)).images, gan.draw(pipe).images)

    def test_the_filter_is_removed_with_a_warning(self, gan, caplog):
        with caplog.at_level(logging.WARNING):
            assert filtered(gan, 1).remove_filter() is gan.pipeline
        assert caplog.messages == ["The filter is removed: GANPipeline shows all that it draws."]

    @pytest.mark.parametrize("arguments", [("meta",), ("meta", torch.bfloat16), (torch.device("meta"),)])
    def test_both_go_to_a_device(self, gan, arguments):
        pipe = filtered(gan, 1)
        assert pipe.to(*arguments) is pipe
        assert pipe.device.type == gan.pipeline.generator.device.type == "meta"
        assert pipe.safety_checker.threshold.device.type == "meta"

    def test_the_filter_stays_in_its_precision(self, gan):
        pipe = filtered(gan, 1).to(torch.bfloat16)
        assert pipe.dtype == gan.pipeline.generator.dtype == torch.bfloat16
        assert pipe.safety_checker.threshold.dtype == torch.float32
        assert pipe.to(dtype=torch.float64).dtype == torch.float64

    def test_offloading_is_of_the_pipeline_inside(self, gan, monkeypatch):
        called = []
        monkeypatch.setattr(GANPipeline, "enable_model_cpu_offload", lambda self, *args: called.append((self, *args)))
        filtered(gan, 1).enable_model_cpu_offload(0)
        assert called == [(gan.pipeline, 0)]


def in_a_new_process(code, *arguments):
    paths = [os.path.dirname(__file__), *(path for path in sys.path if path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


class TestSaved:
    def test_round_trip(self, each, tmp_path):
        pipe = filtered(each, 2, action="regenerate", max_tries=5)
        pipe.save_pretrained(tmp_path / "saved")
        with in_place_of_the_checker():
            loaded = FilteredPipeline.from_pretrained(tmp_path / "saved")
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.pipeline) is type(each.pipeline)
        assert (loaded.action, loaded.max_tries) == ("regenerate", 5)
        first, second = (each.draw(one, output_type="np") for one in (pipe, loaded))
        assert equal(first.images, second.images)
        assert first.filtered == second.filtered

    def test_layout(self, gan, tmp_path):
        filtered(gan, threshold=0.25).save_pretrained(tmp_path, card="# Digits\n")
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "README.md",
            "model_index.json",
            "pipeline",
            "safety_checker",
        ]
        assert (tmp_path / "README.md").read_text() == "# Digits\n"
        assert json.loads((tmp_path / "model_index.json").read_text()) == {
            "_class_name": "FilteredPipeline",
            "_diffusers_version": diffusers.__version__,
            "schema_version": 1,
            "pipeline": ["hf_unlearn", "GANPipeline"],
            "safety_checker": ["hf_unlearn", "FASTSafetyChecker"],
            "action": "blank",
            "max_tries": 3,
        }

    def test_no_local_path_is_written(self, gan, tmp_path):
        gan.pipeline.save_pretrained(tmp_path / "private")
        gan.pipeline = GANPipeline.from_pretrained(tmp_path / "private")
        filtered(gan, threshold=0).save_pretrained(tmp_path / "saved")
        files = list((tmp_path / "saved").rglob("*.json"))
        assert len(files) == 4
        assert all("private" not in path.read_text() for path in files)

    def test_settings_can_be_overridden(self, gan, tmp_path):
        filtered(gan, threshold=0, action="blur").save_pretrained(tmp_path)
        with in_place_of_the_checker():
            loaded = FilteredPipeline.from_pretrained(tmp_path, action="raise", max_tries=1, dtype=torch.bfloat16)
        assert (loaded.action, loaded.max_tries) == ("raise", 1)
        assert loaded.dtype == torch.bfloat16

    def test_a_plain_pipeline_with_a_filter(self, each, tmp_path):
        each.pipeline.save_pretrained(tmp_path / "plain")
        checker = BrightnessChecker(each.threshold(2))
        checker.save_pretrained(tmp_path / "filter")
        expected = each.draw(FilteredPipeline(each.pipeline, checker), output_type="np")
        for given in (checker, tmp_path / "filter", str(tmp_path / "filter")):
            with in_place_of_the_checker():
                pipe = FilteredPipeline.from_pretrained(tmp_path / "plain", filter=given)
            pipe.set_progress_bar_config(disable=True)
            out = each.draw(pipe, output_type="np")
            assert equal(out.images, expected.images)
            assert out.filtered == expected.filtered

    def test_where_the_filter_comes_from_is_said(self, gan, tmp_path):
        gan.pipeline.save_pretrained(tmp_path / "plain")
        filtered(gan, threshold=0).save_pretrained(tmp_path / "filtered")
        load = FilteredPipeline.from_pretrained
        with pytest.raises(ValueError, match=r"^filter=None: .*plain' is a pipeline without a filter; pass filter=$"):
            load(tmp_path / "plain")
        with pytest.raises(ValueError, match=r"^filter: .*filtered' has its own"):
            load(tmp_path / "filtered", filter=BrightnessChecker(0))
        for name in ("plain", "filtered"):
            with pytest.raises(ValueError, match="^safety_checker: pass filter="):
                load(tmp_path / name, safety_checker=None)
        with pytest.raises(ValueError, match="^safety_checker: is a int"):
            load(tmp_path / "plain", filter=3)

    def test_parts_passed_on(self, gan, tmp_path):
        filtered(gan, threshold=0).save_pretrained(tmp_path)
        other = tiny_gan().generator
        with in_place_of_the_checker():
            assert FilteredPipeline.from_pretrained(tmp_path, generator=other).generator is other

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda root, index: (root / "model_index.json").unlink(), "has no model_index.json"),
            (lambda root, index: (root / "model_index.json").write_text("{"), "cannot be read"),
            (lambda root, index: (root / "model_index.json").write_text("[]"), "cannot be read"),
            (lambda root, index: index.pop("schema_version"), "schema_version=None, this version reads 1$"),
            (lambda root, index: index.update(schema_version=2), "schema_version=2, this version reads 1$"),
            (lambda root, index: index.update(safety_checker=[None, None]), "the filter is missing$"),
            (lambda root, index: index.update(safety_checker=None), "the filter is missing$"),
            (lambda root, index: index.pop("safety_checker"), "the filter is missing$"),
            (lambda root, index: index.update(safety_checker=["torch.nn", "Identity"]), "the filter is missing$"),
            (
                lambda root, index: index.update(pipeline=["os", "system"]),
                "is no pipeline of diffusers or hf_unlearn$",
            ),
            (lambda root, index: index.update(pipeline=["diffusers", "UNet2DModel"]), "is no pipeline of"),
            (lambda root, index: index.update(pipeline=["hf_unlearn", "FilteredPipeline"]), "is no pipeline of"),
            (lambda root, index: index.update(pipeline=["diffusers", "DDPMPipeline"]), "is of a GANPipeline, must be"),
            (lambda root, index: index.update(pipeline=[None, None]), "must be a library and a class$"),
            (lambda root, index: index.pop("pipeline"), "must be a library and a class$"),
            (lambda root, index: index.pop("action"), "action is missing"),
            (lambda root, index: index.update(action="none"), "^action='none': must be"),
            (lambda root, index: index.update(max_tries=0), "^max_tries=0"),
            (lambda root, index: (root / "safety_checker").rename(root / "other"), "has no folder safety_checker"),
            (lambda root, index: (root / "pipeline").rename(root / "other"), "has no folder pipeline"),
            (lambda root, index: (root / "pipeline/model_index.json").unlink(), "has no model_index.json"),
        ],
    )
    def test_what_is_not_whole_is_not_loaded(self, gan, tmp_path, change, message):
        filtered(gan, threshold=0).save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        before = dict(index)
        change(tmp_path, index)
        if index != before:
            (tmp_path / "model_index.json").write_text(json.dumps(index))
        with in_place_of_the_checker(), pytest.raises(ValueError, match=message) as error:
            FilteredPipeline.from_pretrained(tmp_path)
        assert "\n" not in str(error.value)

    def test_pickles_are_not_loaded(self, gan, tmp_path):
        filtered(gan, threshold=0).save_pretrained(tmp_path)
        shutil.rmtree(tmp_path / "pipeline/generator")
        gan.pipeline.generator.save_pretrained(tmp_path / "pipeline/generator", safe_serialization=False)
        with in_place_of_the_checker(), pytest.raises(OSError, match="safetensors"):
            FilteredPipeline.from_pretrained(tmp_path)

    def test_no_module_is_imported_because_a_file_names_it(self, gan, tmp_path):
        filtered(gan, threshold=0).save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        (tmp_path / "model_index.json").write_text(json.dumps(index | {"pipeline": ["this", "GANPipeline"]}))
        with in_place_of_the_checker(), pytest.raises(ValueError, match="is no pipeline of diffusers or hf_unlearn$"):
            FilteredPipeline.from_pretrained(tmp_path)
        assert "this" not in sys.modules

    def test_a_filter_that_cannot_be_loaded(self, gan, tmp_path):
        filtered(gan, threshold=0).save_pretrained(tmp_path)
        (tmp_path / "safety_checker/config.json").unlink()
        with in_place_of_the_checker(), pytest.raises(OSError, match="config.json"):
            FilteredPipeline.from_pretrained(tmp_path)

    @pytest.mark.parametrize("broken", ["safety_checker", "pipeline"])
    def test_half_written_is_not_loaded(self, gan, tmp_path, broken, monkeypatch):
        """Not even over an earlier one, whose index would go with the new files."""
        pipe = filtered(gan, threshold=0)
        pipe.save_pretrained(tmp_path)

        def fail(folder, **kwargs):
            raise OSError("the disk is full")

        monkeypatch.setattr(getattr(pipe, broken), "save_pretrained", fail, raising=False)
        with pytest.raises(OSError, match="the disk is full"):
            pipe.save_pretrained(tmp_path)
        with in_place_of_the_checker(), pytest.raises(ValueError, match="has no model_index.json"):
            FilteredPipeline.from_pretrained(tmp_path)

    def test_refused_before_anything_is_written(self, gan, tmp_path):
        pipe = filtered(gan, threshold=0)
        with pytest.raises(ValueError, match="^push_to_hub=True: save with save_pretrained, publish with push_to_hub"):
            pipe.save_pretrained(tmp_path / "a", push_to_hub=True)
        pipe.action = blur
        with pytest.raises(ValueError, match=r"^action=.*: a function is not saved"):
            pipe.save_pretrained(tmp_path / "a")

        class Mine(GANPipeline):
            pass

        mine = FilteredPipeline(Mine(gan.pipeline.generator), BrightnessChecker(0))
        with pytest.raises(
            ValueError, match=r"^pipeline: .*\.Mine is not of diffusers or hf_unlearn, cannot be loaded"
        ):
            mine.save_pretrained(tmp_path / "a")
        assert not (tmp_path / "a").exists()

    def test_over_a_plain_pipeline(self, gan, tmp_path):
        """Its parts still lie there, but no index names them."""
        gan.pipeline.save_pretrained(tmp_path)
        filtered(gan, threshold=0).save_pretrained(tmp_path)
        with pytest.raises(ValueError):
            GANPipeline.from_pretrained(tmp_path)


class TestFittedFilter:
    """The real thing, from a fit to a folder to another process."""

    def pipe(self, given, flagged=2):
        checker = fitted_filter()
        scores = (
            checker.judge(given.draw(output_type="pt").images * 2 - 1).scores.flatten().sort(descending=True).values
        )
        checker.set_threshold("bright", (scores[flagged - 1] + scores[flagged]).item() / 2)
        return FilteredPipeline(given.pipeline, checker)

    def test_decides(self, each):
        pipe = self.pipe(each)
        out = each.draw(pipe, output_type="pt")
        verdict = pipe.safety_checker.judge(each.draw(output_type="pt").images * 2 - 1)
        assert out.filtered == verdict.flags.tolist()
        assert sum(out.filtered) == 2
        assert out.filter_scores.equal(verdict.scores)

    def test_round_trip(self, gan, tmp_path):
        pipe = self.pipe(gan)
        pipe.save_pretrained(tmp_path / "saved")
        expected = gan.draw(pipe, output_type="np")
        loaded = FilteredPipeline.from_pretrained(tmp_path / "saved")
        out = gan.draw(loaded, output_type="np")
        assert equal(out.images, expected.images)
        assert out.filter_scores.equal(expected.filter_scores)
        pipe.safety_checker.save_pretrained(tmp_path / "filter")
        gan.pipeline.save_pretrained(tmp_path / "plain")
        out = gan.draw(
            FilteredPipeline.from_pretrained(tmp_path / "plain", filter=tmp_path / "filter"), output_type="np"
        )
        assert equal(out.images, expected.images)

    def test_in_another_precision(self, gan):
        pipe = self.pipe(gan).to(torch.bfloat16)
        assert pipe.dtype == torch.bfloat16
        assert {value.dtype for value in pipe.safety_checker.parameters()} == {torch.float32}
        assert gan.draw(pipe).filter_scores.isfinite().all()

    def test_an_encoder_of_the_users_own(self, gan, tmp_path):
        def colours(images):
            return images.mean((2, 3))

        encoder = FilterEncoder.own(colours, name="mean colours", channels=3)
        noise = torch.rand(40, 3, 8, 8, generator=seeded())
        fitter = FASTFitter(encoder, score="mean_difference")
        fitter.update(undesired=noise[:20], clean=noise[20:] - 1)
        pipe = FilteredPipeline(gan.pipeline, fitter.fit(threshold="pooled_mean").checker())
        pipe.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="^encoder: the filter was fitted with the user's own"):
            FilteredPipeline.from_pretrained(tmp_path)
        loaded = FilteredPipeline.from_pretrained(tmp_path, filter_encoder=encoder)
        assert gan.draw(loaded).filter_scores.equal(gan.draw(pipe).filter_scores)

    @pytest.mark.parametrize("damage", ["gone", "cut", "not finite", "another version", "no concepts"])
    def test_a_damaged_filter_is_not_loaded(self, gan, tmp_path, damage):
        self.pipe(gan).save_pretrained(tmp_path)
        weights, config = (tmp_path / "safety_checker" / name for name in ("model.safetensors", "config.json"))
        if damage == "gone":
            weights.unlink()
        elif damage == "cut":
            weights.write_bytes(weights.read_bytes()[:-100])
        elif damage == "not finite":
            tensors = load_file(weights)
            tensors["bank.threshold"].fill_(torch.inf)
            save_file(tensors, weights, {"format": "pt"})
        else:
            content = json.loads(config.read_text())
            content |= {"schema_version": 2} if damage == "another version" else {"concepts": []}
            config.write_text(json.dumps(content))
        with pytest.raises((ValueError, OSError)):
            FilteredPipeline.from_pretrained(tmp_path)

    def test_in_a_new_process(self, stable_diffusion, tmp_path):
        """Nothing but the two names is imported."""
        pipe = self.pipe(stable_diffusion)
        pipe.save_pretrained(tmp_path / "saved")
        code = (
            "import sys, torch; from hf_unlearn import FilteredPipeline\n"
            "pipe = FilteredPipeline.from_pretrained(sys.argv[1])\n"
            "out = pipe(['a photo', 'hot p'], num_images_per_prompt=2, num_inference_steps=2, "
            "generator=torch.Generator().manual_seed(0), output_type='pt')\n"
            "torch.save((out.images, out.filtered), sys.argv[2])"
        )
        in_a_new_process(code, tmp_path / "saved", tmp_path / "drawn.pt")
        images, flags = torch.load(tmp_path / "drawn.pt")
        expected = stable_diffusion.draw(pipe, output_type="pt")
        torch.testing.assert_close(images, expected.images)
        assert flags == expected.filtered


class TestStockLoaders:
    """None makes anything that draws out of a saved filtered pipeline."""

    @pytest.fixture
    def roots(self, request, tmp_path):
        roots = []
        for name in ("ddpm", "gan", "stable-diffusion"):
            roots.append(tmp_path / name)
            FilteredPipeline(case(name, request).pipeline, fitted_filter()).save_pretrained(roots[-1])
        return roots

    def test_with_this_library(self, roots):
        for root in roots:
            assert loaders_without_a_filter(root) == []

    def test_without_this_library(self, roots):
        source = inspect.getsource(loaders_without_a_filter)
        code = f"import sys\n{source}\nprint([loaders_without_a_filter(root) for root in sys.argv[1:]])\nassert 'hf_unlearn' not in sys.modules"
        assert in_a_new_process(code, *roots).splitlines()[-1] == "[[], [], []]"

    def test_these_loaders_do_load(self, roots):
        """So the tests above could fail."""
        made = loaders_without_a_filter(roots[0] / "pipeline", ["DDPM"])
        assert set(made) == {("DDPMPipeline", "DDPMPipeline")}
        assert isinstance(DiffusionPipeline.from_pretrained(roots[0] / "pipeline"), diffusers.DDPMPipeline)


class TestFromTheHub:
    """What is asked of the Hub; a folder stands in for it."""

    @pytest.fixture
    def hub(self, tmp_path, monkeypatch):
        root, cache, asked = tmp_path / "hub", tmp_path / "cache/snapshots/0123abc", []

        def fetch(patterns, kwargs):
            asked.append(kwargs)
            names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
            for name in filter_repo_objects(names, allow_patterns=patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / name, cache / name)
            return str(cache)

        monkeypatch.setattr(saved, "hf_hub_download", lambda repo_id, name, **k: fetch([name], k) + f"/{name}")
        monkeypatch.setattr(saved, "snapshot_download", lambda repo_id, allow_patterns, **k: fetch(allow_patterns, k))
        return SimpleNamespace(root=root, cache=cache, asked=asked)

    def test_one_commit_and_no_pickles(self, stable_diffusion, hub):
        pipe = filtered(stable_diffusion, 2)
        pipe.save_pretrained(hub.root, card="# A card")
        for name in (
            "pipeline/unet/diffusion_pytorch_model.bin",
            "pipeline/pipeline.py",
            "safety_checker/a.ckpt",
            "a.json",
        ):
            (hub.root / name).write_text("bad")
        with in_place_of_the_checker():
            loaded = FilteredPipeline.from_pretrained("me/photos", revision="v1", token="t", dtype=torch.float32)
        loaded.set_progress_bar_config(disable=True)
        assert not (hub.cache / "pipeline/unet/diffusion_pytorch_model.bin").exists()
        assert hub.asked == [{"revision": "v1", "token": "t"}, {"revision": "0123abc", "token": "t"}]
        suffixes = {path.suffix for path in hub.cache.rglob("*") if path.is_file()}
        assert {".json", ".safetensors"} <= suffixes <= {".json", ".safetensors", ".txt"}
        assert not (hub.cache / "a.json").exists()
        assert loaded.name_or_path == "me/photos"
        assert equal(stable_diffusion.draw(loaded).images, stable_diffusion.draw(pipe).images)

    def test_a_plain_pipeline_is_asked_for_a_filter(self, gan, hub):
        gan.pipeline.save_pretrained(hub.root)
        with pytest.raises(
            ValueError, match="^filter=None: 'me/digits' is a pipeline without a filter; pass filter=$"
        ):
            FilteredPipeline.from_pretrained("me/digits")

    def test_each_has_its_own_revision(self, gan, hub, monkeypatch):
        gan.pipeline.save_pretrained(hub.root)
        asked, load = [], GANPipeline.from_pretrained
        monkeypatch.setattr(
            GANPipeline, "from_pretrained", lambda name, **k: asked.append((name, k)) or load(hub.root)
        )

        def load_filter(name, **kwargs):
            asked.append((name, kwargs))
            return BrightnessChecker(0)

        monkeypatch.setattr(FASTSafetyChecker, "from_pretrained", load_filter, raising=False)
        FilteredPipeline.from_pretrained(
            "me/digits", filter="me/filter", revision="v1", filter_revision="v2", token="t"
        )
        FilteredPipeline.from_pretrained("me/digits", filter="me/filter", revision="v1")
        assert sorted(asked[:2]) == [
            ("me/digits", {"revision": "v1", "token": "t"}),
            ("me/filter", {"encoder": None, "revision": "v2", "token": "t"}),
        ]
        assert ("me/filter", {"encoder": None, "revision": None}) in asked[2:]


class TestPublished:
    def test_what_is_uploaded(self, gan, monkeypatch):
        seen = {}

        def publish(folder, repo_id, **kwargs):
            names = sorted(os.listdir(folder))
            seen.update(kwargs, names=names, repo_id=repo_id)
            return "commit"

        monkeypatch.setattr("hf_unlearn.filtering.drawing.pipeline.publish_folder", publish)
        pipe = filtered(gan, threshold=0)
        assert pipe.push_to_hub("me/digits", token="t", private=True, card="# Digits") == "commit"
        assert seen == {
            "names": ["README.md", "model_index.json", "pipeline", "safety_checker"],
            "repo_id": "me/digits",
            "token": "t",
            "private": True,
            "revision": None,
            "commit_message": "Upload filtered pipeline",
        }
