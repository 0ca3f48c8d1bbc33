"""Tiny random text-to-image pipelines of the real classes, one of each architecture, with a tokenizer that knows whole words."""

import copy
from functools import cache

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_unlearn.unlearning.diffusion.wordings import KINDS, kept_prompts


KIND_NAMES = ("sd", "sdxl", "pixart", "sd3", "flux")
LENGTH = 12
MORE = "sea that of is it old new blue on in and the left right , ; wug blick"


@cache
def tokenizer(pad="</s>", length=LENGTH):
    """Words and commas; pads on the right. CLIP pads with the end, T5 with a token of its own."""
    words = {word for prompt in (*kept_prompts(), *sum(KINDS.values(), []), MORE) for word in _split(prompt)}
    vocabulary = {word: place for place, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *sorted(words)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    )
    special = {"pad_token": pad, "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=length, padding_side="right", **special)


def _split(prompt):
    return prompt.lower().replace(",", " , ").split()


def clip(width=32, projected=None, length=LENGTH):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=width, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=length, bos_token_id=2, eos_token_id=3, pad_token_id=3, projection_dim=projected or width,
        initializer_factor=4.0,
    )  # fmt: skip
    return (CLIPTextModel if projected is None else CLIPTextModelWithProjection)(config).eval()


def t5(width=64):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer()), d_model=width, d_kv=width // 2, d_ff=width, num_layers=2, num_heads=2, initializer_factor=1.0
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def unet(**changes):
    from diffusers import UNet2DConditionModel

    plain = {
        "sample_size": 4, "layers_per_block": 1, "block_out_channels": (8, 8), "norm_num_groups": 2, "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return UNet2DConditionModel(**(plain | changes)).eval()


def vae(**changes):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=8, block_out_channels=(4, 4), norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **changes,
    ).eval()  # fmt: skip


def _sd():
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=vae(), text_encoder=clip(64), tokenizer=tokenizer(), unet=unet(cross_attention_dim=64),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sdxl():
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    denoiser = unet(
        cross_attention_dim=64, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=48 + 6 * 4,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=vae(), text_encoder=clip(24), text_encoder_2=clip(40, projected=48), tokenizer=tokenizer(),
        tokenizer_2=tokenizer("<pad>"), unet=denoiser, scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        add_watermarker=False,
    )  # fmt: skip


def _pixart():
    from diffusers import DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    denoiser = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=64, sample_size=4,
        patch_size=2, caption_channels=48, use_additional_conditions=False, norm_type="ada_norm_single",
    ).eval()  # fmt: skip
    return PixArtSigmaPipeline(
        tokenizer=tokenizer("<pad>"), text_encoder=t5(48), vae=vae(), transformer=denoiser,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
    )  # fmt: skip


def _sd3():
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    denoiser = SD3Transformer2DModel(
        sample_size=4, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=96,
        caption_projection_dim=16, pooled_projection_dim=80, out_channels=4, pos_embed_max_size=8,
    ).eval()  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=denoiser, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(shift_factor=0.1), text_encoder=clip(40, projected=40),
        text_encoder_2=clip(40, projected=40), tokenizer=tokenizer(), tokenizer_2=tokenizer("<pad>"), text_encoder_3=t5(96),
        tokenizer_3=tokenizer("<pad>", 256),
    )  # fmt: skip


def _flux():
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    denoiser = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    ).eval()  # fmt: skip
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(shift_factor=0.1), text_encoder=clip(64), tokenizer=tokenizer(), text_encoder_2=t5(64),
        tokenizer_2=tokenizer("<pad>", 512), transformer=denoiser,
    )  # fmt: skip
    pipe.default_sample_size = 4
    return pipe


def _dit():
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    denoiser = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=2, sample_size=4, patch_size=2,
        num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    names = {"3": "cat, tabby", "5": "horse"}
    return DiTPipeline(denoiser, vae(), DDIMScheduler(clip_sample=False), id2label=names)


def _sd_controlnet():
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    pipe = _sd()
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16,)).eval()
    return StableDiffusionControlNetPipeline(**pipe.components, controlnet=net, requires_safety_checker=False)


@cache
def _made(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = {
            "sd": _sd, "sdxl": _sdxl, "pixart": _pixart, "sd3": _sd3, "flux": _flux, "dit": _dit, "controlnet": _sd_controlnet,
        }[kind]()  # fmt: skip
        for name, parameter in denoiser_of(pipe).named_parameters():
            if "norm" not in name:  # adaptive norms of transformers begin at zero, by which text would have no effect
                torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny(kind):
    """A pipeline of one's own, always with the same weights."""
    made = _made(kind)
    parts = {name: copy.deepcopy(part) for name, part in made.components.items()}
    more = {"sd": {"requires_safety_checker": False}, "dit": {"id2label": {"3": "cat, tabby", "5": "horse"}}}
    more["controlnet"] = more["sd"]
    pipe = type(made)(**parts, **more.get(kind, {}))
    pipe.set_progress_bar_config(disable=True)
    if kind == "flux":
        pipe.default_sample_size = 4
    return pipe


def denoiser_of(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


@torch.no_grad()
def latents(pipe, prompts, *, steps=2, guidance=3.0, seed=0):
    """What a pipeline draws, before its VAE."""
    generators = [torch.Generator().manual_seed(seed) for _ in prompts]
    size = {"height": 8, "width": 8} | (
        {"use_resolution_binning": False, "clean_caption": False} if "PixArt" in type(pipe).__name__ else {}
    )
    return pipe(
        prompt=list(prompts), num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="latent", **size
    ).images  # fmt: skip
