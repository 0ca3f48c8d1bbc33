"""`FilteredPipeline`: nothing is given out that the filter does not let through, and all else is as without it."""

import copy
import functools
import inspect
import json
import logging
import os
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DiffusionPipeline,
    ImagePipelineOutput,
    StableDiffusionImg2ImgPipeline,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.utils import BaseOutput
from filter_data import (
    BrightnessChecker,
    case,
    fitted_filter,
    in_place_of_the_checker,
    loaders_without_a_filter,
    seeded,
    tiny_animate_diff,
    tiny_gan,
)
from fresh import run_python
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig
from PIL import Image

from hf_unlearn import FASTFitter, FASTSafetyChecker, FilterEncoder, GANPipeline
from hf_unlearn.filtering.drawing import saved
from hf_unlearn.filtering.drawing.actions import FilteredImageError, blur
from hf_unlearn.filtering.drawing.formats import content_of
from hf_unlearn.filtering.drawing.outputs import Drawn
from hf_unlearn.filtering.drawing.pipeline import FilteredPipeline


ALL = ("ddpm", "stable-diffusion", "sdxl", "image-to-image", "gan")
EVERYTHING, NOTHING = 2.0, -2.0  # thresholds of a mean in [−1, 1]
# Two draws of one image, in [0, 1]: sums in another order differ by √72 · 6e-8, over 100 layers, ×2. A 255th is 4e-3.
ROUNDING = 1e-4


@pytest.fixture
def gan(request):
    return case("gan", request)


@pytest.fixture
def stable_diffusion(request):
    return case("stable-diffusion", request)


@pytest.fixture(params=ALL)
def each(request):
    return case(request.param, request)


@pytest.fixture
def drawn_inside(monkeypatch):
    """Copies of what a pipeline draws from now on, as its filter gets it."""

    def remember(pipeline):
        drawn, call = [], type(pipeline).__call__

        @functools.wraps(call)
        def remembering(self, *args, **kwargs):
            output = call(self, *args, **kwargs)
            drawn.append(copy.deepcopy(output.images))
            return output

        monkeypatch.setattr(type(pipeline), "__call__", remembering)
        return drawn

    return remember


def filtered(given, flagged=None, *, threshold=None, **settings):
    """The case's pipeline with a filter that does not release so many of the images of seed 0."""
    threshold = given.threshold(flagged) if threshold is None else threshold
    return FilteredPipeline(given.pipeline, BrightnessChecker(threshold), **settings)


def as_array(images):
    return np.stack([np.asarray(image) for image in images])


def assert_same(found, expected, atol=ROUNDING):
    """Images of two draws with the same noise, in the same form."""
    assert type(found) is type(expected)
    if isinstance(found, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)
        return
    found, expected = as_array(found), as_array(expected)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    difference = np.abs(found.astype(np.float64) - expected)
    if found.dtype == np.uint8:  # a level where it hangs on rounding, which it hardly ever does
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.02
    else:
        assert difference.max() <= atol


class TestReleased:
    """With a filter that lets everything through."""

    def test_as_without_a_filter(self, each, drawn_inside):
        for asked in ({}, {"output_type": "pil"}, {"output_type": "np"}, {"output_type": "pt"}):
            expected = each.draw(**asked)
            pipe = filtered(each, threshold=EVERYTHING)
            given = each.draw(pipe, **asked)
            assert_same(given.images, expected.images)
            assert isinstance(given, type(expected))
            assert given.filtered == [False] * 4
            assert given.filter_tries == [1] * 4
            assert len(pipe.safety_checker.seen) == 1
        brightness, inside = each.brightness(), drawn_inside(each.pipeline)
        out = each.draw(pipe, output_type="pt")
        assert out.images.equal(inside[0])  # to the bit
        assert pipe.safety_checker.seen[-1].equal(out.images * 2 - 1)
        assert (out.filter_scores.dtype, out.filter_scores.shape) == (torch.float32, (4, 1))
        torch.testing.assert_close(out.filter_scores.flatten(), brightness, rtol=0, atol=2 * ROUNDING)

    @pytest.mark.parametrize("name", ["stable-diffusion", "sdxl", "image-to-image"])
    def test_latents(self, name, request, drawn_inside):
        """They are checked by what they show."""
        given = case(name, request)
        shown = given.draw(filtered(given, 2))
        expected, inside = given.brightness(), drawn_inside(given.pipeline)
        pipe = FilteredPipeline(given.pipeline, BrightnessChecker(given.threshold(2)))
        out = given.draw(pipe, output_type="latent")
        torch.testing.assert_close(out.filter_scores.flatten(), expected, rtol=0, atol=2 * ROUNDING)
        assert out.filtered == shown.filtered
        flagged = torch.tensor(out.filtered)
        assert out.images[flagged].abs().max() == 0
        assert out.images[~flagged].equal(inside[-1][~flagged])
        assert given.draw(pipe, output_type="latent", filter_action="flag").images.equal(inside[-1])

    @pytest.mark.parametrize("name", ["ddpm", "stable-diffusion", "gan"])
    def test_in_half_precision(self, name, request, drawn_inside):
        given = case(name, request)
        given.pipeline.to(torch.bfloat16)
        threshold, inside = given.threshold(2), drawn_inside(given.pipeline)
        out = given.draw(filtered(given, threshold=EVERYTHING), output_type="pt")
        assert out.images.equal(inside[0])
        assert given.draw(filtered(given, threshold=threshold)).filtered.count(True) == 2

    @pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
    def test_without_an_image_processor(self, output_type, request, monkeypatch):
        """As "pt" Kandinsky gives images in [−1, 1], and DeepFloyd leaves out its own checker: it is not asked for."""
        given, asked = case("ddim", request), []
        call, plain = type(given.pipeline).__call__, given.draw(output_type="np").images
        expected = given.draw(output_type=output_type).images

        @functools.wraps(call)
        def remember(self, *args, **kwargs):
            asked.append(kwargs.get("output_type") or args[5])
            return call(self, *args, **kwargs)

        monkeypatch.setattr(type(given.pipeline), "__call__", remember)
        found = given.draw(filtered(given, threshold=EVERYTHING), output_type=output_type).images
        assert asked == ["np"]
        if output_type == "pt":
            assert isinstance(found, torch.Tensor)
            assert_same(found.permute(0, 2, 3, 1).numpy(), plain)
        else:
            assert_same(found, expected)


class TestOutput:
    def test_keeps_the_fields_of_the_pipeline_inside(self, stable_diffusion):
        out = stable_diffusion.draw(filtered(stable_diffusion, 1))
        assert isinstance(out, StableDiffusionPipelineOutput)
        assert out.nsfw_content_detected is None
        assert list(out.keys()) == ["images", "filtered", "filter_scores", "filter_tries"]
        assert out["filtered"] == out.filtered

    @pytest.mark.parametrize("name", ["stable-diffusion", "gan"])
    def test_as_a_tuple(self, name, request):
        each = case(name, request)
        plain = each.draw(return_dict=False)
        pipe = filtered(each, 1)
        given, out = each.draw(pipe, return_dict=False), each.draw(pipe)
        assert isinstance(given, tuple)
        assert len(given) == len(plain) + 3
        assert given[1:-3] == plain[1:]
        assert_same(given[0], out.images)
        assert (given[-3], given[-1]) == (out.filtered, out.filter_tries)
        torch.testing.assert_close(given[-2], out.filter_scores, rtol=0, atol=2 * ROUNDING)

    @pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda out: pickle.loads(pickle.dumps(out))])
    def test_can_be_copied(self, gan, again):
        pipe = filtered(gan, 1)
        out = gan.draw(pipe, output_type="pt")
        other = again(out)
        assert type(other) is type(out) is type(gan.draw(pipe))  # the class is made once
        assert isinstance(other, ImagePipelineOutput)
        assert other.images.equal(out.images)
        assert other.filtered == out.filtered


class TestActions:
    def test_blank(self, each):
        pipe = filtered(each, 2)
        for output_type, white in (("pt", 1), ("np", 1), ("pil", 255)):
            expected = each.draw(output_type=output_type).images
            out = each.draw(pipe, output_type=output_type)
            assert out.filtered == (each.brightness() > pipe.safety_checker.threshold).tolist()
            assert sum(out.filtered) == 2
            for image, drawn, flagged in zip(as_array(out.images), as_array(expected), out.filtered, strict=True):
                assert not flagged or not image.any()
                assert flagged or np.abs(image.astype(float) - drawn).max() <= max(ROUNDING, (white > 1))

    def test_replaced(self, gan):
        """Blurred, or by a function of images and scores."""
        expected, given = gan.draw(output_type="pt").images, []

        def negative(images, scores):
            given.append((images, scores))
            return 1 - images

        for action, of in (("blur", blur), (negative, lambda images: 1 - images)):
            out = gan.draw(filtered(gan, 2), output_type="pt", filter_action=action)
            flagged = torch.tensor(out.filtered)
            assert flagged.sum() == 2
            assert_same(out.images[flagged], of(expected[flagged]))
            assert_same(out.images[~flagged], expected[~flagged])
        assert_same(given[0][0], expected[flagged])
        assert given[0][1].equal(out.filter_scores[flagged])
        with pytest.raises(ValueError, match="^action: gave images that are not finite"):
            gan.draw(filtered(gan, 2), filter_action=lambda images, scores: images * torch.inf)

    def test_flag_gives_all_out_and_says_so(self, gan, caplog):
        with caplog.at_level(logging.WARNING):
            pipe = filtered(gan, 2, action="flag")
        assert "given out whatever the filter says" in caplog.text
        out = gan.draw(pipe)
        assert_same(out.images, gan.draw().images)
        assert out.filtered.count(True) == 2

    def test_raise(self, gan):
        pipe = filtered(gan, 1, action="raise")
        with pytest.raises(FilteredImageError) as error:
            gan.draw(pipe)
        assert error.value.flags.sum() == 1
        torch.testing.assert_close(error.value.scores.flatten(), gan.brightness(), rtol=0, atol=2 * ROUNDING)
        assert gan.draw(pipe, filter_action="blank").filtered.count(True) == 1
        assert pipe.action == "raise"  # the other one was for one call
        pipe.safety_checker.threshold.fill_(EVERYTHING)
        assert_same(gan.draw(pipe).images, gan.draw().images)

    def test_bad_settings(self, gan):
        pipe = filtered(gan, 1)
        for action in ("Blank", "none", False):
            with pytest.raises(ValueError, match=r"^action=.* must be 'blank', 'blur', 'flag', 'regenerate', 'raise'"):
                pipe.action = action
            with pytest.raises(ValueError, match="^filter_action="):
                gan.draw(pipe, filter_action=action)
        assert pipe.safety_checker.seen == []
        for tries in (0, -1, 1.5, True, None):
            with pytest.raises(ValueError, match=f"^max_tries={tries}: must be an integer ≥ 1$"):
                filtered(gan, threshold=0, max_tries=tries)

    @pytest.mark.parametrize("action", ["blank", "blur", "regenerate", "raise"])
    def test_what_is_not_finite_is_not_released(self, gan, action):
        pipe = filtered(gan, threshold=EVERYTHING, action=action)
        latents = torch.randn(4, 4, generator=seeded())
        latents[2, 1] = torch.nan
        if action == "raise":
            with pytest.raises(FilteredImageError, match="^1 of 4"):
                pipe(latents=latents)
        else:
            out = pipe(latents=latents, generator=seeded(), output_type="pt")
            assert out.images.isfinite().all()
            assert out.filtered == [False, False, action != "regenerate", False]
            assert out.filter_scores[2].isnan().all() == (action != "regenerate")
        assert pipe.safety_checker.seen[0].isfinite().all()  # the filter is not asked what NaN shows

    @pytest.mark.parametrize("name", ["ddpm", "stable-diffusion", "gan"])
    def test_a_broken_network(self, name, request):
        given = case(name, request)
        network = getattr(given.pipeline, "unet", None) or given.pipeline.generator
        torch.nn.init.constant_(list(network.parameters())[-1], torch.nan)
        out = given.draw(filtered(given, threshold=EVERYTHING), output_type="pt", filter_action="regenerate")
        assert out.filtered == [True] * 4
        assert out.images.abs().max() == 0
        assert out.filter_scores.isnan().all()


class TestRegenerate:
    @pytest.mark.parametrize("name", ["ddpm", "sdxl", "gan"])
    def test_only_what_is_not_released_is_drawn_again(self, name, request):
        given = case(name, request)
        expected = given.draw(output_type="pt").images
        pipe = filtered(given, 2, action="regenerate", max_tries=20)
        out = given.draw(pipe, output_type="pt")
        assert len(pipe.safety_checker.seen[1]) == 2
        first = torch.tensor(given.draw(pipe, filter_action="flag").filtered)
        assert_same(out.images[~first], expected[~first])
        assert (torch.tensor(out.filter_tries) > 1).equal(first)
        released = ~torch.tensor(out.filtered)
        assert (released & first).any()
        assert (out.filter_scores[released] <= pipe.safety_checker.threshold).all()
        brightness = (out.images * 2 - 1).flatten(1).mean(1)
        torch.testing.assert_close(out.filter_scores[released].flatten(), brightness[released])
        again, other = (given.draw(pipe, seed=seed, output_type="pt") for seed in (0, 1))
        assert_same(again.images, out.images)
        assert again.filter_tries == out.filter_tries
        assert not torch.allclose(other.images, out.images, atol=0.01)

    @pytest.mark.parametrize("name", ["ddpm", "image-to-image", "gan"])
    def test_gives_up(self, name, request):
        given = case(name, request)
        pipe = filtered(given, threshold=NOTHING, action="regenerate", max_tries=2)
        out = given.draw(pipe, output_type="pt")
        seen = pipe.safety_checker.seen
        assert out.images.abs().max() == 0
        assert out.filtered == [True] * 4
        assert out.filter_tries == [3] * 4
        assert [len(images) for images in seen] == [4, 4, 4]
        assert not torch.allclose(seen[0], seen[1], atol=0.01)
        torch.testing.assert_close(out.filter_scores.flatten(), seen[2].flatten(1).mean(1))

    def test_each_place_goes_on_with_its_own_generator(self, each):
        """What comes to a place is what this place's generator would draw next, with its prompt."""
        generators = [seeded(number) for number in range(4)]
        images = each.draw(output_type="pt", generator=generators).images
        brightness = (images * 2 - 1).flatten(1).mean(1)
        threshold = brightness.sort(descending=True).values[:2].mean().item()
        place = int(brightness.argmax())
        states = [generator.get_state() for generator in generators]
        part = {"batch_size": 1, "num_images": 1, "num_images_per_prompt": 1}
        part = {name: value for name, value in part.items() if name in each.arguments}
        for name in ("prompt", "image"):
            if name in each.arguments:
                which = place // each.arguments["num_images_per_prompt"]
                part[name] = each.arguments[name][which : which + 1]
        expected = each.draw(output_type="pt", generator=generators[place], **part).images[0]

        generators = [seeded(number) for number in range(4)]
        pipe = filtered(each, threshold=threshold, action="regenerate", max_tries=1)
        each.draw(pipe, output_type="pt", generator=generators)
        seen = pipe.safety_checker.seen
        whole = "image" in each.arguments  # of which nobody can tell whose they are
        assert [len(images) for images in seen] == [4, 4 if whole else 1]
        assert_same((seen[1][place if whole else 0] + 1) / 2, expected)
        for number, generator in enumerate(generators):
            assert generator.get_state().equal(states[number]) == (number != place and not whole)

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
        others = [other for other in range(4) if other != place]
        assert_same(out.images[others], expected[others])

    def test_a_pipeline_that_draws_another_number(self, gan, monkeypatch):
        monkeypatch.setattr("hf_unlearn.filtering.drawing.calls.Call.for_places", lambda self, *_: self.again())
        with pytest.raises(ValueError, match="^pipeline: drew 4 images again, must draw 2$"):
            gan.draw(filtered(gan, 2, action="regenerate"))

    def test_callbacks(self, stable_diffusion):
        """They are called in every draw, and what they hold is left alone."""
        steps, held = [], []

        def callback(pipe, step, timestep, values):
            steps.append(step)
            held.append(values["latents"])
            return values

        pipe = filtered(stable_diffusion, threshold=NOTHING, action="regenerate", max_tries=2)
        out = stable_diffusion.draw(pipe, callback_on_step_end=callback, output_type="latent")
        assert steps == [0, 1] * 3
        assert out.filtered == [True] * 4
        assert held[-1].flatten(1).abs().amax(1).min() > 0

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
    def test_are_drawn_again(self, stable_diffusion):
        pipe = filtered(stable_diffusion, 2, action="regenerate", max_tries=20)
        out, shown = (stable_diffusion.draw(pipe, output_type=kind) for kind in ("latent", "pt"))
        assert out.filter_tries == shown.filter_tries
        decoded = pipe.vae.decode(out.images / pipe.vae.config.scaling_factor).sample
        assert_same((decoded / 2 + 0.5).clamp(0, 1).detach(), shown.images)

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
        torch.testing.assert_close(latents, shown, rtol=0, atol=2 * ROUNDING)

    def test_with_a_shift(self, stable_diffusion):
        """As Stable Diffusion 3 has it; no pipeline here."""
        vae = stable_diffusion.pipeline.vae
        latents = stable_diffusion.draw(output_type="latent").images
        expected = vae.decode(latents / vae.config.scaling_factor + 0.6).sample.clamp(-1, 1).flatten(1).mean(1)
        vae.register_to_config(shift_factor=0.6)
        out = stable_diffusion.draw(filtered(stable_diffusion, threshold=EVERYTHING), output_type="latent")
        torch.testing.assert_close(out.filter_scores.flatten(), expected, rtol=0, atol=2 * ROUNDING)

    def test_an_autoencoder_that_overflows_is_upcast_for_a_while(self, request, monkeypatch, drawn_inside):
        given, seen = case("sdxl", request), []
        vae, decode = given.pipeline.vae, given.pipeline.vae.decode
        monkeypatch.setattr(
            vae, "decode", lambda latents, **k: seen.append((latents.dtype, vae.dtype)) or decode(latents, **k)
        )
        vae.register_to_config(force_upcast=True)
        vae.to(torch.float16)
        inside = drawn_inside(given.pipeline)
        out = given.draw(filtered(given, threshold=EVERYTHING), output_type="latent")
        assert seen == [(torch.float32, torch.float32)]
        assert vae.dtype == torch.float16
        assert out.images.equal(inside[0])
        assert out.filter_scores.isfinite().all()

    def test_what_they_are_not_for(self, stable_diffusion, request, monkeypatch):
        pipe = filtered(stable_diffusion, threshold=0)
        for action in ("blur", lambda images, scores: images):
            with pytest.raises(ValueError, match=r"^action=.*: needs images, but output_type='latent' gives none$"):
                stable_diffusion.draw(pipe, output_type="latent", filter_action=action)
        assert pipe.safety_checker.seen == []
        for name in ("ddpm", "gan"):
            given = case(name, request)
            with pytest.raises(
                ValueError, match=r"^output_type='latent': (DDPM|GAN)Pipeline has no vae of single images"
            ):
                given.draw(filtered(given, threshold=0), output_type="latent")
        packed = StableDiffusionPipelineOutput(torch.zeros(4, 16, 16), None)
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
        torch.testing.assert_close(out.filter_scores.flatten(), means)
        flagged = torch.tensor(out.filtered)
        assert flagged.sum() == 2
        assert out.images[flagged].abs().max() == 0
        assert_same(out.images[~flagged], gan.draw(output_type="pt").images[~flagged])

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
        torch.testing.assert_close(out.filter_scores.flatten(), draws[0].mean(1))

    def test_gives_up(self, gan):
        """Also where the images are not finite."""
        out = gan.draw(self.pipe(gan, -100, action="regenerate"), output_type="pt")
        assert out.filter_tries == [4] * 4
        torch.nn.init.constant_(list(gan.pipeline.generator.parameters())[-1], torch.nan)
        for drawn in (out, gan.draw(self.pipe(gan, 100), output_type="pt")):
            assert drawn.filtered == [True] * 4
            assert drawn.images.abs().max() == 0

    def test_the_callers_latents_of_a_diffusion_model(self, stable_diffusion):
        stable_diffusion.arguments |= {"latents": torch.randn(4, 4, 4, 4, generator=seeded())}
        means = stable_diffusion.arguments["latents"].flatten(1).mean(1)
        pipe = self.pipe(stable_diffusion, means.sort().values[1:3].mean().item())
        assert stable_diffusion.draw(pipe).filtered.count(True) == 2
        with pytest.raises(
            ValueError, match="^safety_checker: judges latents, which StableDiffusionPipeline does not"
        ):
            stable_diffusion.draw(pipe, filter_action="regenerate")

    def test_a_pipeline_that_does_not_draw_from_them(self, gan, monkeypatch, request):
        images = gan.draw(output_type="pt")
        given = case("ddpm", request)
        with pytest.raises(ValueError, match="^safety_checker: judges latents, which DDPMPipeline does not give"):
            given.draw(self.pipe(given, 0))

        def call(self, num_images=1, generator=None, output_type="pil", return_dict=True):
            return images

        monkeypatch.setattr(GANPipeline, "__call__", call)
        with pytest.raises(ValueError, match="^safety_checker: judges latents, from which GANPipeline does not draw$"):
            self.pipe(gan, 100)(num_images=4)


@dataclass
class SafeOutput(ImagePipelineOutput):
    """As the pipeline of Safe Latent Diffusion gives one."""

    unsafe_images: list | None = None


def as_videos(frames):
    return np.stack([np.asarray(frame) for frame in frames])


class TestVideos:
    """Judged frame by frame; one frame that is not released, and the video is not."""

    @pytest.fixture
    def videos(self, gan, monkeypatch):
        """The GAN's images as two videos of two frames each; asked for, as a video pipeline is, in its own forms."""
        frames = gan.draw(output_type="pt").images.view(2, 2, 3, 8, 8)

        def call(self, num_videos_per_prompt=2, generator=None, output_type="pil", return_dict=True):
            forms = {"pt": frames, "np": frames.movedim(-3, -1).numpy()}
            return VideoOutput(forms.get(output_type, frames))

        monkeypatch.setattr(GANPipeline, "__call__", call)
        gan.arguments.clear()
        return frames

    def test_one_frame_decides(self, gan, videos):
        brightness = (videos * 2 - 1).flatten(2).mean(2)
        brightest = int(brightness.max(1).values.argmax())
        pipe = FilteredPipeline(gan.pipeline, BrightnessChecker(brightness.flatten().topk(2).values.mean().item()))
        for output_type in ("pt", "np", "pil"):
            out = pipe(output_type=output_type)
            shown = out.frames if output_type != "pil" else np.stack([as_array(video) for video in out.frames])
            shown = torch.as_tensor(np.asarray(shown))
            assert out.filtered == [number == brightest for number in range(2)]
            assert not shown[brightest].any()
            assert shown[1 - brightest].any(dim=-1).any()
            torch.testing.assert_close(out.filter_scores[:, 0], brightness.amax(1))
        assert pipe(output_type="pt").frames[1 - brightest].equal(videos[1 - brightest])
        assert pipe(output_type="pt", filter_action="blur").frames[brightest].any()
        with pytest.raises(ValueError, match="^output_type='latent': .* what images they show"):
            pipe(output_type="latent")

    def test_a_pipeline_of_videos(self, tiny_stable_diffusion, tmp_path):
        """What is released is to the bit what it draws, in every form; a blocked video is drawn again, and the others stay."""
        pipeline = tiny_animate_diff(tiny_stable_diffusion)
        call = {"prompt": ["a photo", "hot p", "a", "p"], "num_frames": 3, "height": 8, "width": 8}
        call["num_inference_steps"] = 2
        own = pipeline(**call, generator=seeded(), output_type="pt").frames
        worst = (own * 2 - 1).flatten(2).mean(2).amax(1)
        pipe = FilteredPipeline(pipeline, BrightnessChecker(worst.sort().values[2:].mean().item()))
        blocked = int(worst.argmax())
        for output_type in ("pt", "np", "pil"):
            expected = pipeline(**call, generator=seeded(), output_type=output_type).frames
            for action in ("blank", "regenerate"):
                out = pipe(**call, generator=seeded(), output_type=output_type, filter_action=action)
                assert type(out.frames) is type(expected)
                for place in range(4):
                    same = np.equal(as_videos(out.frames[place]), as_videos(expected[place])).all()
                    assert same == (place != blocked)
                again = [place == blocked and action == "regenerate" for place in range(4)]
                assert [tries > 1 for tries in out.filter_tries] == again
            assert out.filtered == [False] * 4
        pipe.save_pretrained(tmp_path)
        with in_place_of_the_checker():
            loaded = FilteredPipeline.from_pretrained(tmp_path)
        assert loaded(**call, generator=seeded(), output_type="pt").filtered == [
            place == blocked for place in range(4)
        ]

    def test_a_broken_frame(self, gan, videos):
        videos[1, 0, 0, 0, 0] = torch.nan
        out = FilteredPipeline(gan.pipeline, BrightnessChecker(EVERYTHING))(output_type="pt")
        assert out.filtered == [False, True]
        assert out.filter_scores.isnan().flatten().tolist() == [False, True]
        assert out.frames.isfinite().all()


class TestErrors:
    def test_hold_no_images(self, gan, monkeypatch):
        """Nor do their frames, of which a debugger or a report makes use: nowhere is a tensor of what was drawn."""

        def broken(inputs, **_):
            raise ValueError("cannot judge")

        for raises in ("raise", "judge"):
            pipe = filtered(gan, 2, action="raise")
            if raises == "judge":
                monkeypatch.setattr(pipe.safety_checker, "judge", broken)
            with pytest.raises((FilteredImageError, ValueError)) as caught:
                gan.draw(pipe)
            trace, held = caught.value.__traceback__, []
            while trace is not None:
                if trace.tb_frame.f_code is not sys._getframe().f_code:
                    held += trace.tb_frame.f_locals.values()
                trace = trace.tb_next
            assert not [value for value in held if isinstance(value, torch.Tensor | np.ndarray | Drawn)]

    def test_threads_on_one_pipeline(self, gan):
        """Each of many calls at once gives what it gives alone, and nothing that is blocked is released."""
        pipe = FilteredPipeline(gan.pipeline, fitted_filter())
        scores = pipe.safety_checker.judge(gan.draw(output_type="pt").images * 2 - 1).scores
        pipe.safety_checker.set_threshold("bright", scores.flatten().sort().values[1:3].mean().item())
        pipe.safety_checker.encoder.model.train()
        alone = gan.draw(pipe, output_type="pt")
        with ThreadPoolExecutor(3) as pool:
            for out in pool.map(lambda _: gan.draw(pipe, output_type="pt"), range(12)):
                assert out.filtered == alone.filtered
                assert_same(out.images, alone.images)
        assert not pipe.safety_checker.train().encoder.model.training

    def test_a_pipeline_that_is_not_there(self, gan, tmp_path):
        gan.pipeline.save_pretrained(tmp_path / "plain")
        with mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
            for name in ("nosuch", str(tmp_path / "nosuch")):
                for arguments in ((name,), (tmp_path / "plain",)):
                    with pytest.raises(
                        (OSError, ValueError), match="nosuch'?: is no folder, and cannot be had"
                    ) as error:
                        FilteredPipeline.from_pretrained(*arguments, filter=name)
                    assert "\n" not in str(error.value)


@dataclass
class VideoOutput(BaseOutput):
    frames: torch.Tensor


class TestRefused:
    def test_no_filter(self, gan):
        pipe = filtered(gan, 1)
        for nothing in (None, torch.nn.Identity(), "filter"):
            with pytest.raises(ValueError, match=r"^safety_checker: is .*, must be a FASTSafetyChecker"):
                FilteredPipeline(pipeline=gan.pipeline, safety_checker=nothing)
            with pytest.raises(ValueError, match="^safety_checker: is "):
                pipe.safety_checker = nothing
            assert gan.draw(pipe).filtered.count(True) == 1
        checker = BrightnessChecker(0)
        checker.encoder = SimpleNamespace(kind="text")
        with pytest.raises(ValueError, match="^safety_checker: judges texts, must judge images or latents$"):
            FilteredPipeline(gan.pipeline, checker)

    def test_no_pipeline(self, gan):
        for nothing in (None, gan.pipeline.generator, filtered(gan, 1)):
            with pytest.raises(
                ValueError, match=r"^pipeline: is a .*, must be a pipeline of diffusers without a filter"
            ):
                FilteredPipeline(nothing, BrightnessChecker(0))

    def test_every_pipeline_of_diffusers_is_known_before_it_draws(self):
        """By what it gives: sound, texts, embeddings, depth, latents beside the images; videos and images are taken."""
        refused, taken = {}, {"images": 0, "image": 0, "frames": 0}
        for name in dir(diffusers):
            if name == "DiffusionPipeline" or "Pipeline" not in name or "Modular" in name:
                continue
            kind = getattr(diffusers, name)
            if not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)) or kind.__name__ != name:
                continue
            try:
                taken[content_of(kind.__new__(kind)) or "images"] += 1
            except ValueError as error:
                refused[name] = str(error)
        assert min(taken.values()) >= 2
        assert taken["images"] > 150
        assert taken["frames"] > 40
        for name, why in {
            "AudioLDM2Pipeline": "a AudioPipelineOutput without", "LongCatAudioDiTPipeline": "a AudioPipelineOutput without",
            "AceStepPipeline": "a AudioPipelineOutput without", "DanceDiffusionPipeline": "a AudioPipelineOutput without",
            "DiffusionGemmaPipeline": "a DiffusionGemmaPipelineOutput without", "LTX2Pipeline": "audio too",
            "MarigoldDepthPipeline": "a MarigoldDepthOutput without", "StableDiffusionLDM3DPipeline": "a LDM3D",
            "KandinskyPriorPipeline": "a KandinskyPriorPipelineOutput without", "FluxPriorReduxPipeline": "a FluxPriorRedux",
            "RFD4ProteinaPipeline": "a RFD4ProteinaPipelineOutput without",
        }.items():  # fmt: skip
            assert refused.pop(name).startswith(f"pipeline: {name} gives {why}")
        assert len(refused) < 30

    @pytest.mark.parametrize(
        ("output", "message"),
        [
            (
                diffusers.AudioPipelineOutput(audios=np.zeros(3)),
                "GANPipeline gives a AudioPipelineOutput without images",
            ),
            (SimpleNamespace(images=[]), "gives a SimpleNamespace without images"),
            (SafeOutput(torch.zeros(1, 3, 8, 8), unsafe_images=[0]), "GANPipeline gives unsafe_images too, which the"),
            (ImagePipelineOutput(images=[]), "gives images as list, which"),
            (
                ImagePipelineOutput(images=[[Image.new("L", (8, 8))], [Image.new("L", (9, 8))]]),
                "gives images as list, which",
            ),
            (ImagePipelineOutput(images=[torch.zeros(3, 8, 8)]), "gives images as list, which"),
            (ImagePipelineOutput(images=torch.zeros(3, 8, 8)), r"gives images as Tensor of shape \[3, 8, 8\], which"),
            (ImagePipelineOutput(images=np.zeros((1, 8, 8, 3), np.uint8)), "gives images as Tensor of shape"),
            (ImagePipelineOutput(images=torch.zeros(2, 3, 8, 8) - 1), r"gives images that are not in \[0, 1\]"),
            (ImagePipelineOutput(images=torch.zeros(2, 3, 8, 8) + 1.1), r"gives images that are not in \[0, 1\]"),
        ],
    )
    def test_outputs(self, gan, output, message, monkeypatch):
        pipe = filtered(gan, threshold=0)
        monkeypatch.setattr(GANPipeline, "__call__", lambda self, output_type="pil", return_dict=True: output)
        with pytest.raises(ValueError, match=f"^pipeline: {message}"):
            pipe()

    def test_arguments(self, gan):
        pipe = filtered(gan, threshold=0)
        for wanted in ("numpy", None, "mesh"):
            with pytest.raises(ValueError, match=r"^output_type=.*: must be 'pil', 'np', 'pt', 'latent'$"):
                gan.draw(pipe, output_type=wanted)
        with pytest.raises(TypeError, match="unexpected keyword argument 'prompt'"):
            gan.draw(pipe, prompt="a photo")


def test_inpainting_gives_a_crop_as_pictures(gan, monkeypatch):
    """`padding_mask_crop` of diffusers 0.42 gives no tensors."""
    drawn, asked, pipe = gan.draw().images, [], filtered(gan, 2)

    def call(self, padding_mask_crop=None, output_type="pil", return_dict=True):
        asked.append(output_type)
        return ImagePipelineOutput(images=drawn)

    monkeypatch.setattr(GANPipeline, "__call__", call)
    out = pipe(padding_mask_crop=4)
    assert asked == ["pil"]
    assert out.filtered.count(True) == 2
    for image, own, flagged in zip(out.images, drawn, out.filtered, strict=True):
        assert isinstance(image, Image.Image)
        assert np.array_equal(np.array(image), np.array(own) * (not flagged))


class TestAttributes:
    def test_are_those_of_the_pipeline_inside(self, stable_diffusion):
        inner, pipe = stable_diffusion.pipeline, filtered(stable_diffusion, threshold=0)
        assert pipe.unet is inner.unet
        assert pipe.vae_scale_factor == inner.vae_scale_factor
        assert pipe.load_lora_weights.__self__ is inner
        assert not hasattr(pipe, "transformer")
        pipe.set_progress_bar_config(desc="drawing")
        assert inner._progress_bar_config == {"desc": "drawing"}
        scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False, beta_schedule="squaredcos_cap_v2")
        pipe.scheduler = scheduler
        assert inner.scheduler is scheduler
        assert "scheduler" not in vars(pipe)
        for name, value in (
            ("note", "mine"),
            ("_interrupt", True),
            ("_guidance_scale", 3),
            ("model_cpu_offload_seq", "unet"),
        ):
            setattr(pipe, name, value)
            assert getattr(inner, name) is getattr(pipe, name) is value
            assert name not in vars(pipe)
            delattr(pipe, name)
            assert name not in vars(inner)
        assert not hasattr(pipe, "_encode_prompt")  # a method, which is no value that somebody set
        assert pipe.components == {"pipeline": inner, "safety_checker": pipe.safety_checker}
        assert pipe.config["pipeline"] == ("diffusers", "StableDiffusionPipeline")
        assert "FilteredPipeline" in repr(pipe)

    @pytest.mark.parametrize("kind", [StableDiffusionImg2ImgPipeline, AutoPipelineForImage2Image])
    def test_no_other_pipeline_is_made_of_it(self, stable_diffusion, kind):
        """Nor it of another: `from_pipe` of diffusers would cast the pipeline inside, and forget the settings."""
        pipe = filtered(stable_diffusion, threshold=0)
        with pytest.raises((TypeError, ValueError)):
            kind.from_pipe(pipe)
        with pytest.raises((TypeError, OSError)):
            kind(**pipe.components)
        for given in (stable_diffusion.pipeline, pipe):
            with pytest.raises(
                ValueError, match=r"^from_pipe: make FilteredPipeline\(pipeline=…, safety_checker=…\)$"
            ):
                FilteredPipeline.from_pipe(given, safety_checker=BrightnessChecker(0))

    def test_drawing_methods_are_not_passed_on_and_others_are(self, gan, monkeypatch):
        pipe, called = filtered(gan, threshold=0), []
        assert not hasattr(pipe, "draw")
        with pytest.raises(AttributeError, match="^draw: draws past the filter"):
            pipe.draw(torch.zeros(1, 4))
        monkeypatch.setattr(GANPipeline, "enable_model_cpu_offload", lambda self, *args: called.append((self, *args)))
        pipe.enable_model_cpu_offload(0)
        assert called == [(gan.pipeline, 0)]

    def test_a_copy_and_other_parts(self, gan):
        pipe = filtered(gan, 1)
        assert_same(gan.draw(copy.deepcopy(pipe)).images, gan.draw(pipe).images)
        pipe.safety_checker = BrightnessChecker(EVERYTHING)
        assert gan.draw(pipe).filtered == [False] * 4
        pipe.pipeline = tiny_gan(channels=1)
        out = pipe(3, seeded())  # arguments by their positions
        assert out.images[0].mode == "L"
        assert_same(out.images, pipe.pipeline(3, seeded()).images)

    def test_the_filter_is_removed_with_a_warning(self, gan, caplog):
        with caplog.at_level(logging.WARNING):
            assert filtered(gan, threshold=0).remove_filter() is gan.pipeline
        assert caplog.messages == ["The filter is removed: GANPipeline shows all that it draws."]

    def test_both_go_to_a_device_and_the_filter_stays_in_its_precision(self, gan):
        pipe = FilteredPipeline(gan.pipeline, fitted_filter()).to(torch.bfloat16)
        assert pipe.dtype == gan.pipeline.generator.dtype == torch.bfloat16
        assert gan.draw(pipe).filter_scores.isfinite().all()
        assert pipe.to(dtype=torch.float64).dtype == torch.float64
        for arguments in (("meta",), ("meta", torch.bfloat16), (torch.device("meta"),)):
            pipe = FilteredPipeline(tiny_gan(), fitted_filter())
            assert pipe.to(*arguments) is pipe
            assert pipe.device.type == pipe.pipeline.generator.device.type == "meta"
            assert {value.device.type for value in pipe.safety_checker.parameters()} == {"meta"}
            assert {value.dtype for value in pipe.safety_checker.parameters()} == {torch.float32}


# How files may be broken, and what is said of it.
BROKEN = [
    (lambda root, index: (root / "model_index.json").unlink(), "has no model_index.json"),
    (lambda root, index: (root / "model_index.json").write_text("{"), "cannot be read"),
    (lambda root, index: (root / "model_index.json").write_text("[]"), "cannot be read"),
    (lambda root, index: index.pop("schema_version"), "schema_version=None, this version reads 1$"),
    (lambda root, index: index.update(schema_version=2), "schema_version=2, this version reads 1$"),
    (lambda root, index: index.update(safety_checker=[None, None]), "the filter is missing$"),
    (lambda root, index: index.pop("safety_checker"), "the filter is missing$"),
    (lambda root, index: index.update(safety_checker=["torch.nn", "Identity"]), "the filter is missing$"),
    (lambda root, index: index.update(pipeline=["os", "system"]), "is no pipeline of diffusers or hf_unlearn$"),
    (lambda root, index: index.update(pipeline=["this", "GANPipeline"]), "is no pipeline of diffusers or hf_unlearn$"),
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
    (lambda root, index: (root / "safety_checker/config.json").unlink(), "config.json"),
]


class TestSaved:
    def test_round_trip(self, each, tmp_path):
        """Whole, and as a plain pipeline and a filter that are put together."""
        pipe = filtered(each, 2, action="regenerate", max_tries=5)
        pipe.save_pretrained(tmp_path / "saved")
        each.pipeline.save_pretrained(tmp_path / "plain")
        expected = each.draw(pipe, output_type="np")
        settings = {"filter": str(tmp_path / "saved/safety_checker"), "action": "regenerate", "max_tries": 5}
        with in_place_of_the_checker():
            loaded = FilteredPipeline.from_pretrained(tmp_path / "saved")
            together = FilteredPipeline.from_pretrained(tmp_path / "plain", **settings)
        for other in (loaded, together):
            other.set_progress_bar_config(disable=True)
            assert type(other.pipeline) is type(each.pipeline)
            assert (other.action, other.max_tries) == ("regenerate", 5)
            out = each.draw(other, output_type="np")
            assert_same(out.images, expected.images)
            assert out.filtered == expected.filtered

    def test_layout(self, gan, tmp_path):
        filtered(gan, threshold=0.25).save_pretrained(tmp_path, card="# Digits\n")
        files = ["README.md", "model_index.json", "pipeline", "safety_checker"]
        assert sorted(path.name for path in tmp_path.iterdir()) == files
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
        """Also over a plain pipeline, which no index names then."""
        gan.pipeline.save_pretrained(tmp_path / "private")
        gan.pipeline = GANPipeline.from_pretrained(tmp_path / "private")
        gan.pipeline.save_pretrained(tmp_path / "saved")
        filtered(gan, threshold=0).save_pretrained(tmp_path / "saved")
        files = [tmp_path / "saved/model_index.json"]
        files += [*(tmp_path / "saved/pipeline").rglob("*.json"), tmp_path / "saved/safety_checker/config.json"]
        assert len(files) == 4
        assert all("private" not in path.read_text() for path in files)
        with pytest.raises(ValueError):
            GANPipeline.from_pretrained(tmp_path / "saved")

    def test_settings_and_parts_can_be_overridden(self, gan, tmp_path):
        filtered(gan, threshold=0, action="blur").save_pretrained(tmp_path)
        other = tiny_gan().generator
        with in_place_of_the_checker():
            loaded = FilteredPipeline.from_pretrained(tmp_path, action="raise", max_tries=1, dtype=torch.bfloat16)
            assert FilteredPipeline.from_pretrained(tmp_path, generator=other).generator is other
        assert (loaded.action, loaded.max_tries) == ("raise", 1)
        assert loaded.dtype == torch.bfloat16

    def test_where_the_filter_comes_from_is_said(self, gan, tmp_path):
        gan.pipeline.save_pretrained(tmp_path / "plain")
        filtered(gan, threshold=0).save_pretrained(tmp_path / "filtered")
        load, checker = FilteredPipeline.from_pretrained, BrightnessChecker(0)
        assert load(tmp_path / "plain", filter=checker).safety_checker is checker
        with pytest.raises(ValueError, match=r"^filter=None: .*plain' is a pipeline without a filter; pass filter=$"):
            load(tmp_path / "plain")
        with pytest.raises(ValueError, match=r"^filter: .*filtered' has its own"):
            load(tmp_path / "filtered", filter=checker)
        for name in ("plain", "filtered"):
            with pytest.raises(ValueError, match="^safety_checker: pass filter="):
                load(tmp_path / name, safety_checker=None)
        with pytest.raises(ValueError, match="^safety_checker: is a int"):
            load(tmp_path / "plain", filter=3)

    @pytest.mark.parametrize(("change", "message"), BROKEN)
    def test_what_is_not_whole_is_not_loaded(self, gan, tmp_path, change, message):
        filtered(gan, threshold=0).save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        before = dict(index)
        change(tmp_path, index)
        if index != before:
            (tmp_path / "model_index.json").write_text(json.dumps(index))
        with in_place_of_the_checker(), pytest.raises((ValueError, OSError), match=message) as error:
            FilteredPipeline.from_pretrained(tmp_path)
        assert "\n" not in str(error.value)
        assert "this" not in sys.modules  # no module is imported because a file names it

    def test_pickles_are_not_loaded(self, gan, tmp_path):
        filtered(gan, threshold=0).save_pretrained(tmp_path)
        shutil.rmtree(tmp_path / "pipeline/generator")
        gan.pipeline.generator.save_pretrained(tmp_path / "pipeline/generator", safe_serialization=False)
        with in_place_of_the_checker(), pytest.raises(OSError, match="safetensors"):
            FilteredPipeline.from_pretrained(tmp_path)

    def test_variants_formats_and_shards_are_those_of_diffusers(self, tiny_ddpm, tmp_path):
        """One after the other into one folder: nothing of the one before is left to be loaded."""
        pipe, unet = FilteredPipeline(tiny_ddpm, BrightnessChecker(0)), tiny_ddpm.unet
        for given, loading in (
            ({}, {}),
            ({"variant": "fp16"}, {"variant": "fp16"}),
            ({"safe_serialization": False}, {"use_safetensors": False}),
            ({"max_shard_size": "5KB"}, {}),
            ({"variant": "fp16", "max_shard_size": "5KB"}, {"variant": "fp16"}),
        ):
            with torch.no_grad():
                next(unet.parameters()).add_(1)
            pipe.save_pretrained(tmp_path / "filtered", **given)
            tiny_ddpm.save_pretrained(tmp_path / str(given), **given)
            inside, plain = tmp_path / "filtered/pipeline/unet", tmp_path / str(given) / "unet"
            assert sorted(os.listdir(inside)) == sorted(os.listdir(plain))
            with in_place_of_the_checker():
                loaded = FilteredPipeline.from_pretrained(tmp_path / "filtered", **loading)
            torch.testing.assert_close(loaded.unet.state_dict(), unet.state_dict(), rtol=0, atol=0)
        with pytest.raises(TypeError, match="subfolder"):  # and nothing is dropped without a word
            pipe.save_pretrained(tmp_path / "other", subfolder="inside")

    def test_an_adapter_that_is_not_fused_is_refused(self, tiny_stable_diffusion, tmp_path):
        pipe = FilteredPipeline(tiny_stable_diffusion, BrightnessChecker(0))
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        for fused in (False, True):  # fused alone: diffusers writes the layers of it still
            if fused:
                pipe.unet.fuse_lora()
            with pytest.raises(
                ValueError, match=r"^pipeline: unet holds an adapter, .*fuse it .*save the pipeline again$"
            ):
                pipe.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out").exists()
        pipe.unet.unload_lora()
        pipe.save_pretrained(tmp_path / "out")

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


class TestFittedFilter:
    """The real thing, from a fit to a folder to another process."""

    def pipe(self, given):
        checker = fitted_filter()
        verdict = checker.judge(given.draw(output_type="pt").images * 2 - 1)
        checker.set_threshold("bright", verdict.scores.flatten().sort().values[1:3].mean().item())
        return FilteredPipeline(given.pipeline, checker)

    @pytest.mark.parametrize("name", ["ddpm", "image-to-image", "gan"])
    def test_decides(self, name, request):
        given = case(name, request)
        pipe = self.pipe(given)
        out = given.draw(pipe, output_type="pt")
        verdict = pipe.safety_checker.judge(given.draw(output_type="pt").images * 2 - 1)
        assert out.filtered == verdict.flags.tolist()
        assert sum(out.filtered) == 2
        torch.testing.assert_close(out.filter_scores, verdict.scores, rtol=0, atol=20 * ROUNDING)

    def test_an_encoder_of_the_users_own(self, gan, tmp_path):
        encoder = FilterEncoder.own(lambda images: images.mean((2, 3)), name="mean colours", channels=3)
        noise = torch.rand(40, 3, 8, 8, generator=seeded())
        fitter = FASTFitter(encoder, score="mean_difference").update(undesired=noise[:20] - 0.1, clean=noise[20:] - 1)
        pipe = FilteredPipeline(gan.pipeline, fitter.fit(threshold="pooled_mean").checker())
        pipe.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="^encoder: the filter was fitted with the user's own"):
            FilteredPipeline.from_pretrained(tmp_path)
        loaded = FilteredPipeline.from_pretrained(tmp_path, filter_encoder=encoder)
        scores = (gan.draw(one).filter_scores for one in (loaded, pipe))
        torch.testing.assert_close(*scores, rtol=0, atol=4 * ROUNDING)


class TestStockLoaders:
    """None makes anything that draws out of a saved filtered pipeline."""

    @pytest.fixture
    def roots(self, request, tmp_path):
        roots = []
        for name in ("ddpm", "gan", "stable-diffusion"):
            roots.append(tmp_path / name)
            FilteredPipeline(case(name, request).pipeline, fitted_filter()).save_pretrained(roots[-1])
        return roots

    def test_with_and_without_this_library(self, roots):
        for root in roots:
            assert loaders_without_a_filter(root) == []
        source = inspect.getsource(loaders_without_a_filter)
        code = (
            f"import sys\n{source}\nprint([loaders_without_a_filter(root) for root in sys.argv[1:]])\n"
            "assert 'hf_unlearn' not in sys.modules"
        )
        assert run_python(code, *roots).stdout.splitlines()[-1] == "[[], [], []]"
        # These loaders do load: so the tests above could fail.
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
        weights = "pipeline/unet/diffusion_pytorch_model.bin"
        for name in (weights, "pipeline/pipeline.py", "safety_checker/a.ckpt", "a.json"):
            (hub.root / name).write_text("bad")
        with in_place_of_the_checker():
            loaded = FilteredPipeline.from_pretrained("me/photos", revision="v1", token="t", dtype=torch.float32)
        loaded.set_progress_bar_config(disable=True)
        assert not (hub.cache / weights).exists()
        assert hub.asked == [{"revision": "v1", "token": "t"}, {"revision": "0123abc", "token": "t"}]
        suffixes = {path.suffix for path in hub.cache.rglob("*") if path.is_file()}
        assert {".json", ".safetensors"} <= suffixes <= {".json", ".safetensors", ".txt"}
        assert not (hub.cache / "a.json").exists()
        assert loaded.name_or_path == "me/photos"
        assert_same(stable_diffusion.draw(loaded).images, stable_diffusion.draw(pipe).images)

    def test_each_has_its_own_revision(self, gan, hub, monkeypatch):
        gan.pipeline.save_pretrained(hub.root)
        with pytest.raises(
            ValueError, match="^filter=None: 'me/digits' is a pipeline without a filter; pass filter=$"
        ):
            FilteredPipeline.from_pretrained("me/digits")
        asked, load = [], GANPipeline.from_pretrained

        def load_pipeline(name, **kwargs):
            asked.append((name, kwargs))
            return load(hub.root)

        def load_filter(name, **kwargs):
            asked.append((name, kwargs))
            return BrightnessChecker(0)

        monkeypatch.setattr(GANPipeline, "from_pretrained", load_pipeline)
        monkeypatch.setattr(FASTSafetyChecker, "from_pretrained", load_filter, raising=False)
        given = {"filter": "me/filter", "revision": "v1"}
        FilteredPipeline.from_pretrained("me/digits", **given, filter_revision="v2", token="t")
        FilteredPipeline.from_pretrained("me/digits", **given)
        assert sorted(asked[:2]) == [
            ("me/digits", {"revision": "v1", "token": "t"}),
            ("me/filter", {"encoder": None, "revision": "v2", "token": "t"}),
        ]
        assert ("me/filter", {"encoder": None, "revision": None}) in asked[2:]
