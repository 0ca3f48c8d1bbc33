"""What redirecting 1 and 100 concepts costs in the shapes of Stable Diffusion 1.5 and SDXL: seconds on this CPU, and memory beside the weights.

    python benchmarks/text_to_image_cost.py [--shape sd15 sdxl] [--concepts 1 100] [--quick]

Weights are random, the vocabulary is the small one of the digits (a token's number changes nothing of what is computed), the VAE, which is
not used, is small. Text encoders are in float32; SDXL's U-Net in bfloat16. Of what is kept a part is encoded, and the time for all of it
is that many times longer; the redirection itself is measured whole, without looking how far it went (`measure=False`). Each row in its own process.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from rows import high_water
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from hf_unlearn import ConceptRedirection, TextMoments
from hf_unlearn.examples.text_to_image_parts import tokenizer
from hf_unlearn.unlearning.diffusion.wordings import THINGS, kept_prompts


RESULTS = Path(__file__).parent / "results" / "text_to_image_cost.json"
LENGTH, ENCODED = 77, 32  # tokens of a prompt; kept prompts that are encoded
CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
LARGE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
HUGE = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
UNETS = {
    "sd15": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (CROSS, CROSS, CROSS, PLAIN),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": (PLAIN, CROSS, CROSS),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
DTYPES = {"sd15": torch.float32, "sdxl": torch.bfloat16}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def unet_of(shape: str, quick: bool) -> UNet2DConditionModel:
    """With random weights, written once where they stay."""
    config = dict(UNETS[shape])
    if quick:
        width = len(config["block_out_channels"])
        config |= {"block_out_channels": (32,) * width, "attention_head_dim": 2, "transformer_layers_per_block": 1}
        config |= {"cross_attention_dim": 32 if shape == "sd15" else 64, "sample_size": 8}
        if shape == "sdxl":
            config |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 32}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    unet = torch.nn.Module.to(unet, DTYPES[shape]).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.normal_(std=0.02)
    return unet.eval()


def encoder(kind: type, words: CLIPTokenizer, size: dict, act: str) -> CLIPTextModel | CLIPTextModelWithProjection:
    ids = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPTextConfig(
        vocab_size=49408,
        max_position_embeddings=LENGTH,
        projection_dim=size["hidden_size"],
        hidden_act=act,
        **size,
        **ids,
    )
    return kind(config).eval()


def pipeline_of(shape: str, quick: bool = False) -> DiffusionPipeline:
    """A whole pipeline, but that its VAE is small."""
    words = tokenizer()
    words.model_max_length = LENGTH
    large, huge = (SMALL, SMALL) if quick else (LARGE, HUGE)
    parts = {
        "vae": AutoencoderKL(
            block_out_channels=(4,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=2,
        ),
        "unet": unet_of(shape, quick),
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
        "tokenizer": words,
    }
    parts["text_encoder"] = encoder(CLIPTextModel, words, large, "quick_gelu")
    if shape == "sd15":
        unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return StableDiffusionPipeline(**parts, **unused)
    second = encoder(CLIPTextModelWithProjection, words, huge, "gelu")
    return StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=words)


def timed(pipeline: DiffusionPipeline) -> list[float]:
    """Seconds of every call that encodes prompts from now on."""
    seconds: list[float] = []
    encode = pipeline.encode_prompt

    @functools.wraps(encode)
    def encode_prompt(*args, **kwargs):
        begin = time.perf_counter()
        found = encode(*args, **kwargs)
        seconds.append(time.perf_counter() - begin)
        return found

    pipeline.encode_prompt = encode_prompt
    return seconds


def measured(shape: str, concepts: int, quick: bool) -> dict:
    """One row."""
    pipeline = pipeline_of(shape, quick)
    parts = [pipeline.unet, *(part for name, part in pipeline.components.items() if name.startswith("text_encoder"))]
    sizes = [sum(parameter.numel() for parameter in part.parameters()) for part in parts]
    weights = sum(parameter.nbytes for part in parts for parameter in part.parameters()) / 2**20
    words = [word for kind in THINGS.values() for word in kind.split()][:concepts]
    kept = kept_prompts()
    some = kept[:: max(1, len(kept) // ENCODED)][:ENCODED]
    begin = time.perf_counter()
    moments = TextMoments.of(pipeline, some)
    each = (time.perf_counter() - begin) / len(some)
    encoding, before, begin = timed(pipeline), high_water(begin=True), time.perf_counter()
    redirection = ConceptRedirection.of(pipeline, words, anchor="thing", keep=moments)
    found = time.perf_counter()
    redirection.apply(pipeline)
    end = time.perf_counter()
    return {
        "shape": shape,
        "dtype": str(DTYPES[shape]).removeprefix("torch."),
        "unet": sizes[0],
        "text": sum(sizes[1:]),
        "concepts": len(words),
        "known": end - begin,
        "encoding": sum(encoding),
        "solving": found - begin - sum(encoding),
        "applying": end - found,
        "scratch": end - begin + each * len(kept),
        "kept": len(kept),
        "memory": 1 + (high_water() - before) / weights,
        "weights_mb": weights,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(UNETS), default=list(UNETS))
    parser.add_argument("--concepts", nargs="+", type=int, default=(1, 100))
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one process; writes nothing")
    given = parser.parse_args()
    known = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() and not given.quick else []
    rows = {(row["shape"], row["concepts"]): row for row in known}
    for shape in given.shape:
        for concepts in given.concepts:
            if given.quick:
                row = measured(shape, min(concepts, 3), True)
            else:
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    row = pool.submit(measured, shape, concepts, False).result()
            row = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}
            rows[row["shape"], row["concepts"]] = row
            print(json.dumps(row), flush=True)
            if not given.quick:
                told = {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "rows": list(rows.values())}
                RESULTS.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
