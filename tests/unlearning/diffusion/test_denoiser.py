"""Which pipelines and denoisers are taken, what they are told, and that what is saved is what was trained."""

import copy
import inspect

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from image_data import weights
from picture_data import COLOUR, GREY, refused
from vdu_data import prompted_arguments, prompted_images, seeded, trained

from hf_unlearn import VDUTrainer
from hf_unlearn.unlearning.diffusion.denoiser import as_pipeline, check_denoiser, is_prompted, resolution
from hf_unlearn.unlearning.diffusion.drawing import generate
from hf_unlearn.unlearning.diffusion.pipelines import PIPELINES


SMALL = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (8, 8), "norm_num_groups": 2}


def tiny(kind, **changes):
    options = SMALL | changes
    if kind is UNet2DModel:
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    else:
        options = {"cross_attention_dim": 8} | options
        blocks = {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": 2,
        }
    return kind(**blocks, **options)


TOLD = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}


class TestDenoisers:
    def test_accepts_what_is_told_an_image_and_a_prompt(self, tiny_ddpm, tiny_stable_diffusion):
        for unet in (tiny_ddpm.unet, tiny_stable_diffusion.unet, tiny(UNet2DModel, in_channels=3, out_channels=3)):
            check_denoiser(unet)

    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (lambda: tiny(UNet2DModel, num_class_embeds=10), "num_class_embeds=10"),
            (lambda: tiny(UNet2DModel, class_embed_type="timestep"), "class_embed_type='timestep'"),
            (lambda: tiny(UNet2DConditionModel, **TOLD), "addition_embed_type='text_time'"),
            (lambda: tiny(UNet2DConditionModel, addition_embed_type="text"), "addition_embed_type='text'"),
            (lambda: tiny(UNet2DConditionModel, class_embed_type="projection", projection_class_embeddings_input_dim=4),
             "class_embed_type='projection'"),
            (lambda: tiny(UNet2DConditionModel, encoder_hid_dim=4, encoder_hid_dim_type="image_proj"),
             "encoder_hid_dim_type='image_proj'"),
            (lambda: tiny(UNet2DConditionModel, attention_type="gated"), "attention_type='gated'"),
            (lambda: tiny(UNet2DModel, time_embedding_type="fourier"), "time_embedding_type='fourier'"),
            (lambda: tiny(UNet2DModel, sample_size=None), "no sample_size"),
            (lambda: tiny(UNet2DConditionModel, in_channels=9), "sees 9 channels and answers 4"),
            (lambda: tiny(UNet2DModel, in_channels=3, out_channels=4), "sees 3 channels and answers 4"),
            (lambda: AutoencoderKL(block_out_channels=(4,), norm_num_groups=2), "AutoencoderKL is not supported"),
        ],
    )  # fmt: skip
    def test_refuses_others(self, make, match):
        refused(f"^model: .*{match}", check_denoiser, make())

    def test_resolution(self, tiny_ddpm, tiny_stable_diffusion):
        assert (is_prompted(tiny_ddpm), is_prompted(tiny_stable_diffusion)) == (False, True)
        assert resolution(tiny_ddpm) == GREY
        assert resolution(tiny_stable_diffusion) == COLOUR
        tiny_stable_diffusion.unet.register_to_config(sample_size=(4, 6))
        assert resolution(tiny_stable_diffusion) == (3, 8, 12)


def as_kind(pipeline, kind, unet=None, scheduler=None):
    """The parts of a tiny Stable Diffusion as another pipeline."""
    parts = pipeline.components | {"unet": unet or pipeline.unet, "scheduler": scheduler or pipeline.scheduler}
    return kind(**parts, requires_safety_checker=False)


class TestPipelines:
    def test_every_one_of_diffusers_is_known_or_refused_by_name(self):
        """Before anything of it is looked at."""
        kinds = [getattr(diffusers, name) for name in dir(diffusers) if "Pipeline" in name]
        kinds = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, DiffusionPipeline)]
        others = [kind for kind in kinds if kind.__name__ not in PIPELINES]
        assert len(others) > 200
        assert len(kinds) - len(others) == len(PIPELINES)
        for kind in others:
            refused(
                f"^pipeline: {kind.__name__} is not supported; pass a pipeline of one of DDPM",
                as_pipeline,
                None,
                object.__new__(kind),
                None,
            )

    def test_the_known_ones_draw(self, tiny_ddpm, tiny_stable_diffusion):
        unet, noise = tiny_ddpm.unet, tiny_ddpm.scheduler
        schedule = diffusers.PNDMScheduler(num_train_timesteps=20, skip_prk_steps=True)
        for pipeline in (DDPMPipeline(unet, noise), DDIMPipeline(unet, noise), PNDMPipeline(unet, schedule)):
            assert as_pipeline(None, pipeline, None)[0] is pipeline
            assert generate(pipeline, 2, num_inference_steps=2).isfinite().all()
        own = type("OwnPipeline", (StableDiffusionPipeline,), {})
        assert as_pipeline(as_kind(tiny_stable_diffusion, own), None, None)[0].unet is tiny_stable_diffusion.unet

    def test_prompts_of_another_width(self, tiny_stable_diffusion):
        unet = tiny(UNet2DConditionModel, sample_size=4, cross_attention_dim=12)
        pipeline = as_kind(tiny_stable_diffusion, StableDiffusionPipeline, unet)
        refused(
            "^pipeline: its text_encoder gives vectors of 8 numbers, its unet takes cross_attention_dim=12",
            as_pipeline,
            None,
            pipeline,
            None,
        )

    @pytest.mark.parametrize("kind", [StableDiffusionPipeline, LatentConsistencyModelPipeline])
    def test_a_denoiser_that_is_told_the_guidance(self, kind, tiny_stable_diffusion, tmp_path):
        """As its sampler tells it, caught in the act: when it is trained, when it is redirected, and for each scale."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            unet = UNet2DConditionModel(**{**tiny_stable_diffusion.unet.config, "time_cond_proj_dim": 6})
        pipeline = as_kind(tiny_stable_diffusion, kind, unet, LCMScheduler())
        default = inspect.signature(pipeline.__call__).parameters["guidance_scale"].default
        for scale in (None, 3.0):
            args = prompted_arguments(
                tmp_path / str(scale), guidance_scale=scale, max_steps=1, guard=True, utility_tolerance=1e9
            )
            seen = []
            hook = unet.register_forward_pre_hook(
                lambda _, inputs, told, seen=seen: seen.append(told["timestep_cond"]), with_kwargs=True
            )
            pipeline("a photo", num_inference_steps=1, guidance_scale=scale or default, output_type="latent")
            (drawn,) = seen
            trained(pipeline, args)
            hook.remove()
            assert len(seen) > 5
            for told in seen:
                torch.testing.assert_close(told, drawn.expand_as(told))


SCHEDULERS = [
    "PNDM",
    "UniPCMultistep",
    "EulerDiscrete",
    "DEISMultistep",
    "DPMSolverMultistep",
    "HeunDiscrete",
    "LMSDiscrete",
]


class TestBareDenoisers:
    def test_schedules_that_ddim_does_not_know(self, tiny_ddpm):
        for name, schedule in (("DDPMParallel", "sigmoid"), ("HeunDiscrete", "exp")):
            scheduler = getattr(diffusers, f"{name}Scheduler")(num_train_timesteps=20, beta_schedule=schedule)
            pipeline, _ = as_pipeline(tiny_ddpm.unet, None, scheduler)
            torch.testing.assert_close(pipeline.scheduler.alphas_cumprod, scheduler.alphas_cumprod)

    @pytest.mark.parametrize("name", SCHEDULERS)
    def test_any_schedule_is_drawn_from(self, name, tiny_ddpm):
        """With DDIM, and the noise of training is the scheduler's own."""
        scheduler = getattr(diffusers, f"{name}Scheduler")(num_train_timesteps=20, beta_end=0.1)
        pipeline, _ = as_pipeline(tiny_ddpm.unet, None, scheduler)
        torch.testing.assert_close(pipeline.scheduler.alphas_cumprod, scheduler.alphas_cumprod)
        drawn = generate(pipeline, 2, num_inference_steps=3)
        start = scheduler.config.beta_start
        expected = DDIMPipeline(tiny_ddpm.unet, DDIMScheduler(num_train_timesteps=20, beta_start=start, beta_end=0.1))
        torch.testing.assert_close(drawn, generate(expected, 2, num_inference_steps=3))

    def test_a_pipeline_that_cannot_draw_is_refused(self, tiny_ddpm):
        pipeline = DDPMPipeline(tiny_ddpm.unet, diffusers.UniPCMultistepScheduler())
        refused(
            "^pipeline: DDPMPipeline cannot draw with UniPCMultistepScheduler; give it",
            as_pipeline,
            None,
            pipeline,
            None,
        )


class TestFusedProjections:
    def test_what_is_trained_is_what_is_saved(self, tiny_stable_diffusion, tmp_path):
        plain = weights(tiny_stable_diffusion.unet)
        tiny_stable_diffusion.fuse_qkv_projections()
        with torch.no_grad():  # as after a training in this form
            for parameter in tiny_stable_diffusion.unet.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=seeded(parameter.numel()))
        draw = {"what": ["a photo"], "num_inference_steps": 2, "latents": True}
        before = generate(tiny_stable_diffusion, **draw)
        trainer = VDUTrainer(
            pipeline=tiny_stable_diffusion,
            args=prompted_arguments(tmp_path, max_steps=1),
            forget_dataset=prompted_images(),
        )
        assert set(weights(trainer.model)) == set(plain)
        torch.testing.assert_close(generate(tiny_stable_diffusion, **draw), before, rtol=1e-4, atol=1e-5)
        trainer.train()
        trainer.save_model()
        loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
        torch.testing.assert_close(weights(loaded.unet), weights(trainer.model), rtol=0, atol=0)
        assert "to_qkv.weight" not in " ".join(loaded.vae.state_dict())
        assert (generate(loaded, **draw) - before).abs().max() > 1e-3

    def test_a_plain_unet_with_attention(self):
        blocks = {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        }
        unet = UNet2DModel(**SMALL, **blocks, in_channels=1, out_channels=1, attention_head_dim=4)
        plain = weights(unet)
        for layer in unet.modules():
            if hasattr(layer, "fuse_projections"):
                with torch.no_grad():
                    layer.fuse_projections()
                layer.set_processor(FusedAttnProcessor2_0())
        assert set(weights(unet)) > set(plain)
        as_pipeline(unet, None, DDPMScheduler())
        torch.testing.assert_close(weights(unet), plain, rtol=0, atol=0)


@pytest.mark.parametrize(("part", "layer"), [("unet", "to_q"), ("text_encoder", "q_proj")])
def test_an_adapter_is_not_trained_beside_the_rest(part, layer, tiny_stable_diffusion, tmp_path):
    """Nor saved apart: stock diffusers would not load the pipeline."""
    from peft import LoraConfig

    pipeline = copy.deepcopy(tiny_stable_diffusion)
    getattr(pipeline, part).add_adapter(LoraConfig(r=2, target_modules=[layer]))
    args = prompted_arguments(tmp_path, trainable=["cross_attention"])
    refused(
        f"^pipeline: {part} holds an adapter, which can be taken off; fuse it",
        VDUTrainer,
        pipeline=pipeline,
        args=args,
        forget_dataset=prompted_images(),
    )


def test_what_changes_the_answers_and_is_not_saved(tiny_stable_diffusion):
    tiny_stable_diffusion.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    refused(r"^pipeline: FreeU is on, .*; call disable_freeu\(\)$", as_pipeline, None, tiny_stable_diffusion, None)
    tiny_stable_diffusion.disable_freeu()
    as_pipeline(None, tiny_stable_diffusion, None)
