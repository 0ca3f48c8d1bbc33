"""`FilterBlock`: what a modular pipeline gives out, and what becomes of the filter when it is saved."""

import json
import sys
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    ModularPipeline,
    ModularPipelineBlocks,
    StableDiffusionXLAutoBlocks,
    StableDiffusionXLModularPipeline,
)
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import OutputParam
from filter_data import BrightnessChecker, fitted_filter, seeded, tiny_sdxl
from fresh import run_python

from hf_unlearn import FilterBlock, FilteredImageError, FilteredPipeline
from hf_unlearn.examples.loopback_hub import LoopbackHub


PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
CALL = {"prompt": ["a photo", "hot p", "a", "p"], "num_inference_steps": 2, "height": 8, "width": 8}


@pytest.fixture
def sdxl(tiny_stable_diffusion):
    return tiny_sdxl(tiny_stable_diffusion)


def modular(sdxl, checker=None, *, block=None, name="filter", place=None):
    """Blocks of diffusers, with a filter at the end if there is a block."""
    blocks = StableDiffusionXLAutoBlocks()
    if block is not None:
        blocks.sub_blocks.insert(name, block, len(blocks.sub_blocks) if place is None else place)
    pipe = blocks.init_pipeline()
    pipe.update_components(**{name: getattr(sdxl, name) for name in PARTS})
    if checker is not None:
        pipe.update_components(image_filter=checker)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **arguments):
    return pipe(**CALL | {"generator": seeded(), "output_type": "pt"} | arguments)


@pytest.fixture
def drawn(sdxl):
    """What the pipeline draws by itself, its brightness, and a threshold that two of the four pass."""
    images = draw(modular(sdxl)).images
    brightness = (images * 2 - 1).flatten(1).mean(1)
    return images, brightness, brightness.sort().values[1:3].mean().item()


def as_arrays(images):
    return np.stack([np.asarray(image, np.float32) / 255 for image in images]) if isinstance(images, list) else images


class TestReleases:
    @pytest.mark.parametrize("output_type", ["pt", "np", "pil"])
    def test_what_is_not_above_the_threshold(self, output_type, sdxl, drawn):
        _, brightness, threshold = drawn
        own = as_arrays(draw(modular(sdxl), output_type=output_type).images)
        state = draw(modular(sdxl, BrightnessChecker(threshold), block=FilterBlock()), output_type=output_type)
        blocked = np.array(brightness > threshold)
        assert state.filtered == blocked.tolist()
        assert type(state.images) is type(draw(modular(sdxl), output_type=output_type).images)
        assert (as_arrays(state.images)[~blocked] == own[~blocked]).all()
        assert not as_arrays(state.images)[blocked].any()
        torch.testing.assert_close(state.filter_scores[:, 0], brightness, atol=4e-3, rtol=0)  # PIL: 8 bits

    def test_as_a_filtered_pipeline(self, sdxl, drawn):
        """The same images as `FilteredPipeline` gives around the same latents, whatever is done with them."""
        images, _, threshold = drawn
        for action in ("blank", "blur", "flag", lambda images, scores: 1 - images):
            pipe = FilteredPipeline(sdxl, BrightnessChecker(threshold), action)
            state = draw(modular(sdxl, BrightnessChecker(threshold), block=FilterBlock(action)))
            expected = images.clone()
            flagged = torch.tensor(state.filtered)
            if action != "flag":
                expected[flagged] = torch.stack(
                    [
                        torch.zeros_like(image) if action == "blank" else replaced_alone(pipe, image, action)
                        for image in images[flagged]
                    ]
                )
            torch.testing.assert_close(state.images, expected)

    def test_raise(self, sdxl, drawn):
        pipe = modular(sdxl, BrightnessChecker(drawn[2]), block=FilterBlock("raise"))
        with pytest.raises(FilteredImageError) as caught:
            draw(pipe)
        assert caught.value.flags.sum() == 2
        trace, held = caught.value.__traceback__, []
        while trace is not None:
            if trace.tb_frame.f_code is not sys._getframe().f_code:
                held += trace.tb_frame.f_locals.values()
            trace = trace.tb_next
        assert not [value for value in held if isinstance(value, torch.Tensor | np.ndarray)]
        assert all(not state.values for state in held if isinstance(state, PipelineState))

    def test_nothing_to_draw_it_from_is_left(self, sdxl, drawn):
        blocked = draw(modular(sdxl, BrightnessChecker(drawn[2]), block=FilterBlock()))
        assert blocked.latents is None
        assert blocked.prompt == CALL["prompt"]
        assert not [name for name, value in blocked.values.items() if isinstance(value, torch.Tensor)
                    and name not in ("images", "filter_scores", "timesteps")]  # fmt: skip
        released = draw(modular(sdxl, BrightnessChecker(2), block=FilterBlock()))
        assert released.latents is not None
        assert released.filtered == [False] * 4

    def test_videos(self):
        """In each form that blocks give them; one frame decides."""
        frames = torch.rand(3, 2, 3, 8, 8, generator=seeded())
        frames[1, 1] = 1
        arrays = frames.movedim(-3, -1).numpy()
        forms = [
            frames,
            arrays,
            list(frames),
            list(arrays),
            [FilteredPipeline.numpy_to_pil(video) for video in arrays],
        ]
        for form in forms:
            state = PipelineState({"videos": form})
            FilterBlock(content="videos")(SimpleNamespace(image_filter=BrightnessChecker(0.5)), state)
            assert state.filtered == [False, True, False]
            assert type(state.videos) is type(form)
            assert state.videos[0] is form[0] or (np.asarray(state.videos[0]) == np.asarray(form[0])).all()
            assert not np.any([np.asarray(frame) for frame in state.videos[1]])

    def test_a_broken_image(self):
        images = torch.full((2, 3, 8, 8), 0.25)
        images[1, 0, 0, 0] = torch.nan
        state = PipelineState({"images": images})
        FilterBlock("blur")(SimpleNamespace(image_filter=BrightnessChecker(2)), state)
        assert state.filtered == [False, True]
        assert state.images.isfinite().all()


def replaced_alone(pipe, image, action):
    from hf_unlearn.filtering.drawing.actions import replaced

    return replaced(image[None], torch.zeros(1, 1), action)[0]


class Brighter(ModularPipelineBlocks):
    """A step that changes images."""

    @property
    def intermediate_outputs(self):
        return [OutputParam("images")]

    def __call__(self, components, state):
        state.set("images", state.images * 0 + 1)
        return components, state


class TestRefuses:
    @pytest.mark.parametrize(
        ("checker", "arguments", "message"),
        [
            (None, {}, "^image_filter: is None, must be a FASTSafetyChecker; pass it to update_components"),
            (BrightnessChecker(0, latents=True), {}, "^image_filter: judges latents, must judge images$"),
            (BrightnessChecker(2), {"output_type": "latent"}, "^output_type='latent': is not filtered"),
        ],
    )
    def test_and_gives_nothing(self, checker, arguments, message, sdxl):
        with pytest.raises(ValueError, match=message):
            draw(modular(sdxl, checker, block=FilterBlock()), **arguments)

    def test_another_place(self, sdxl):
        with pytest.raises(ValueError, match="^images: there are none; put the filter after|Required input 'images'"):
            draw(modular(sdxl, BrightnessChecker(2), block=FilterBlock(), place=0))
        blocks = StableDiffusionXLAutoBlocks()
        for name, block in (("filter", FilterBlock()), ("brighter", Brighter())):
            blocks.sub_blocks.insert(name, block, len(blocks.sub_blocks))
        pipe = modular(sdxl, BrightnessChecker(2), block=FilterBlock())
        pipe._blocks = blocks
        with pytest.raises(ValueError, match="^blocks: Brighter gives images after the filter; put it last$"):
            draw(pipe)

    def test_what_is_beside(self):
        state = PipelineState({"images": torch.zeros(1, 3, 8, 8), "audio": torch.zeros(8)})
        with pytest.raises(ValueError, match="^blocks: give audio too, which the filter does not look at$"):
            FilterBlock()(SimpleNamespace(image_filter=BrightnessChecker(2)), state)
        assert not state.values

    def test_arguments(self):
        with pytest.raises(ValueError, match="^action='regenerate': a step cannot draw again"):
            FilterBlock("regenerate")
        with pytest.raises(ValueError, match="^action='burn': must be"):
            FilterBlock("burn")
        with pytest.raises(ValueError, match="^content='audio': must be 'images' or 'videos'$"):
            FilterBlock(content="audio")


LOAD = """
import json, sys, torch
from diffusers import ModularPipeline
from diffusers.utils import dynamic_modules_utils
folder, call, dynamic_modules_utils.HF_MODULES_CACHE = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
pipe = ModularPipeline.from_pretrained(folder, trust_remote_code=True)
pipe.load_components()
pipe.set_progress_bar_config(disable=True)
state = pipe(**call, generator=torch.Generator().manual_seed(0), output_type="pt")
print(json.dumps([state.filtered, state.images.flatten(1).sum(1).tolist(), type(pipe.image_filter).__module__]))
"""


class TestSaving:
    @pytest.fixture(autouse=True)
    def modules(self, tmp_path, monkeypatch):
        monkeypatch.setattr(diffusers.utils.dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))

    def loads(self, folder, **arguments):
        """What stock diffusers makes of a folder."""
        made = []
        for loader in (ModularPipeline, StableDiffusionXLModularPipeline, diffusers.DiffusionPipeline):
            try:
                made.append(type(loader.from_pretrained(folder, **arguments)).__name__)
            except Exception:
                continue
        return made

    def test_stock_diffusers_gives_it_back_in_a_new_process(self, sdxl, tmp_path):
        checker = fitted_filter()
        scores = draw(modular(sdxl, checker, block=FilterBlock("flag"))).filter_scores.flatten()
        checker.set_threshold("bright", scores.sort().values[1:3].mean().item())
        pipe = modular(sdxl, checker, block=FilterBlock("blur"))
        expected = draw(pipe)
        FilterBlock.save_pipeline(pipe, tmp_path / "filtered")
        assert self.loads(tmp_path / "filtered") == []
        (tmp_path / "filtered").rename(tmp_path / "moved")
        found = run_python(LOAD, tmp_path / "moved", json.dumps(CALL), tmp_path / "modules")
        flags, sums, module = json.loads(found.stdout.splitlines()[-1])
        assert flags == expected.filtered
        assert sum(flags) == 2
        assert sums == pytest.approx(expected.images.flatten(1).sum(1).tolist(), rel=1e-4)
        assert module == "hf_unlearn.filtering.checker"
        (tmp_path / "moved" / "filtered_blocks.py").unlink()
        assert self.loads(tmp_path / "moved", trust_remote_code=True) == []

    def test_what_was_loaded_is_saved_again(self, sdxl, tmp_path):
        FilterBlock.save_pipeline(modular(sdxl, fitted_filter(), block=FilterBlock("raise")), tmp_path / "first")
        again = ModularPipeline.from_pretrained(tmp_path / "first", trust_remote_code=True)
        again.load_components()
        FilterBlock.save_pipeline(again, tmp_path / "second")
        for name in ("filtered_blocks.py", "modular_config.json"):
            assert (tmp_path / "second" / name).read_text() == (tmp_path / "first" / name).read_text()

    @pytest.mark.slow
    def test_on_the_hub(self, sdxl, tmp_path):
        FilterBlock.save_pipeline(modular(sdxl, fitted_filter(), block=FilterBlock()), tmp_path / "a", repo_id="me/a")
        FilterBlock.save_pipeline(modular(sdxl, fitted_filter(), block=FilterBlock()), tmp_path / "b")
        assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "b").glob("*.*"))
        with LoopbackHub() as hub, hub.in_this_process(tmp_path / "home"):
            for name in ("a", "b"):
                hub.put(f"me/{name}", tmp_path / name)
            assert self.loads("me/a") == []
            pipe = ModularPipeline.from_pretrained("me/a", trust_remote_code=True)
            pipe.load_components()
            assert len(draw(pipe).filtered) == 4
            pipe = ModularPipeline.from_pretrained("me/b", trust_remote_code=True)
            pipe.load_components()
            assert [getattr(pipe, name) for name in (*PARTS, "image_filter")] == [
                None
            ] * 8  # it has nothing to draw with

    def test_diffusers_own_saving_loses_no_filter_silently(self, sdxl, tmp_path):
        """It leaves the step out, whatever the step is. Once the filter has been at work, nothing loads what is saved."""
        pipe = modular(sdxl, fitted_filter(), block=FilterBlock())
        for loaded in (["StableDiffusionXLModularPipeline"] * 2, []):
            pipe.save_pretrained(str(tmp_path / "saved"), overwrite_modular_index=True)
            for arguments in ({}, {"trust_remote_code": True}):
                assert self.loads(tmp_path / "saved", **arguments) == loaded
            draw(pipe)

    def test_refused(self, sdxl, tmp_path):
        for pipe, message in (
            (modular(sdxl, block=FilterBlock()), "^image_filter: is None"),
            (
                modular(sdxl, fitted_filter(), block=FilterBlock(torch.rand_like)),
                "^action=.*: a function is not saved",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                FilterBlock.save_pipeline(pipe, tmp_path)
        pipe = modular(sdxl, fitted_filter(), block=FilterBlock())
        pipe._blocks.sub_blocks["decode"] = Brighter()
        with pytest.raises(
            ValueError, match="^pipeline: its blocks are not those of StableDiffusionXLAutoBlocks with"
        ):
            FilterBlock.save_pipeline(pipe, tmp_path)
        del pipe._blocks.sub_blocks["filter"]
        with pytest.raises(ValueError, match="^pipeline: has 0 FilterBlocks"):
            FilterBlock.save_pipeline(pipe, tmp_path)
        assert not list(tmp_path.glob("*.*"))
