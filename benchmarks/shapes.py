"""Models of the shapes that people use, with random weights, and what is counted of them without any memory: parameters, operations, and what backward keeps.

    python benchmarks/shapes.py [--quick]

Nothing is downloaded: weights are random, tokenizers are made here. Counted on fake tensors (`FakeTensorMode`), of which PyTorch knows all but the
numbers: floating-point operations of a forward and a backward pass of one example, and the bytes that autograd keeps from one to the other,
with activation checkpointing and without. `results/shapes.json`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import text_to_image_cost
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model
from rows import by_line, save
from text_to_image_cost import UNETS
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_unlearn.examples.text_to_image_parts import tokenizer
from hf_unlearn.unlearning.diffusion.unets import StableDiffusion, StableDiffusionXL


RESULTS = Path(__file__).parent / "results" / "shapes.json"
LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 131072, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
TINY = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}  # fmt: skip
SPECIAL = ("<pad>", "<s>", "</s>")
TOKENS, SHORT, RANK, PROMPT = 2048, 64, 128, 77
VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
TINY_UNET = {
    "sample_size": 8, "layers_per_block": 1, "block_out_channels": (8, 8), "norm_num_groups": 2, "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
TINY_TOLD: dict[str, dict[str, Any]] = {
    "sd15": {},
    "sdxl": {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
    },
}
TINY_VAE = VAE | {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}


def llama(
    sizes: dict[str, Any], dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> LlamaForCausalLM:
    """Made where it stays, always with the same weights there."""
    torch.manual_seed(0)
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.device(device):
        return LlamaForCausalLM._from_config(LlamaConfig(**sizes, **ends), dtype=dtype)


def words(number: int) -> PreTrainedTokenizerFast:
    """A tokenizer of so many words, three of them special: `w3 w4 …`."""
    vocabulary = {word: place for place, word in enumerate(SPECIAL)} | {
        f"w{place}": place for place in range(3, number)
    }
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=10**6, **names)


def adapter(rank: int) -> LoraConfig:
    """On all linear layers."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def text_to_image(shape: str, tiny: bool = False, device: str | torch.device = "cpu") -> DiffusionPipeline:
    """A whole pipeline in float32, made where it stays."""
    known = text_to_image_cost
    reader = tokenizer()
    reader.model_max_length = PROMPT
    large, huge = (known.SMALL, known.SMALL) if tiny else (known.LARGE, known.HUGE)
    width = large["hidden_size"] + (huge["hidden_size"] if shape == "sdxl" else 0)
    with torch.device(device):
        parts: dict[str, Any] = {
            "vae": AutoencoderKL(**(TINY_VAE if tiny else VAE)).eval(),
            "text_encoder": known.encoder(CLIPTextModel, reader, large, "quick_gelu"),
            "unet": UNet2DConditionModel(
                **(TINY_UNET | TINY_TOLD[shape] | {"cross_attention_dim": width} if tiny else UNETS[shape])
            ).eval(),
        }
        if shape == "sdxl":
            parts["text_encoder_2"] = known.encoder(CLIPTextModelWithProjection, reader, huge, "gelu")
            parts["tokenizer_2"] = reader
    parts |= {"tokenizer": reader, "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False)}
    if shape == "sdxl":
        return StableDiffusionXLPipeline(**parts)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def sizes(times: int) -> dict[str, int]:
    """Of a Llama of 1 M parameters, or of so many times as many."""
    wider = math.isqrt(times)
    return {
        "vocab_size": 1024 * wider, "hidden_size": 128 * wider, "intermediate_size": 352 * wider, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": SHORT,
    }  # fmt: skip


# Counting


@dataclass(frozen=True)
class Counted:
    """Of one example, of so many tokens or latents.

    Attributes:
        parameters, trained (`int`): numbers of them.
        examples (`str`): what one is.
        weight_bytes (`int`): of a parameter that stays.
        layers (`int`): blocks that are computed again under activation checkpointing.
        forward, backward, again (`float`): floating-point operations; `again` is the backward pass that computes activations again.
        kept, kept_again (`int`): bytes that autograd keeps for the backward pass.
    """

    parameters: int
    trained: int
    examples: str
    weight_bytes: int
    layers: int
    forward: float
    backward: float
    again: float
    kept: int
    kept_again: int


def _passed(model: nn.Module, call: Callable[[int], torch.Tensor]) -> tuple[float, float, int]:
    """Operations of the two passes and bytes between them, of one example: half of what two take."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # alive, or its address is given again
        return tensor

    with FlopCounterMode(display=False) as forward, torch.autograd.graph.saved_tensors_hooks(pack, lambda it: it):
        answer = call(2)
    with FlopCounterMode(display=False) as backward:
        answer.float().mean().backward()
    size = sum(storage.nbytes() for storage in kept.values())
    return forward.get_total_flops() / 2, backward.get_total_flops() / 2, size // 2


def counted(model: nn.Module, call: Callable[[int], torch.Tensor], layers: int, examples: str) -> Counted:
    """Count a model.

    Args:
        model (`nn.Module`): in training mode, on the device `meta`.
        call: makes it answer as many examples as it is told.
        layers (`int`): its blocks.
        examples (`str`): what an example is.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        forward, backward, kept = _passed(model, call)
        for name in ("activation_checkpointing_enable", "enable_gradient_checkpointing"):
            if hasattr(model, name):
                getattr(model, name)()
                break
        _, again, kept_again = _passed(model, call)
        sizes = [(p.numel(), p.element_size(), p.requires_grad) for p in model.parameters()]
    frozen = [element for _, element, trained in sizes if not trained]
    return Counted(
        parameters=sum(number for number, _, _ in sizes),
        trained=sum(number for number, _, trained in sizes if trained),
        examples=examples,
        weight_bytes=frozen[0] if frozen else sizes[0][1],
        layers=layers,
        forward=forward,
        backward=backward,
        again=again,
        kept=kept,
        kept_again=kept_again,
    )


def language(sizes: dict[str, Any], tokens: int, rank: int | None, dtype: torch.dtype):
    """What [`counted`] makes of a Llama, as a whole or with a LoRA."""
    model = llama(sizes, dtype, "meta").train()
    if rank:
        model = get_peft_model(model, adapter(rank))
    model.enable_input_require_grads()
    ids = partial(torch.zeros, dtype=torch.long)
    return model, lambda n: model(input_ids=ids(n, tokens), use_cache=False).logits, sizes["num_hidden_layers"]


def denoiser(config: dict[str, Any], trained: str, dtype: torch.dtype):
    """What [`counted`] makes of a U-Net, as a whole or its cross-attention."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config).to(dtype).train()
    if trained == "cross_attention":
        kind = StableDiffusionXL if unet.config.addition_embed_type else StableDiffusion
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in kind.reads_prompts))
    side, width = unet.config.sample_size, unet.config.cross_attention_dim

    def call(n: int) -> torch.Tensor:
        told: dict[str, Any] = {"encoder_hidden_states": torch.zeros(n, PROMPT, width, dtype=dtype)}
        if unet.config.addition_embed_type:
            pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
            told["added_cond_kwargs"] = {
                "text_embeds": torch.zeros(n, pooled, dtype=dtype),
                "time_ids": torch.zeros(n, 6, dtype=dtype),
            }
        return unet(torch.zeros(n, 4, side, side, dtype=dtype), torch.zeros(n, dtype=torch.long), **told).sample

    return unet, call, len(unet.down_blocks) + len(unet.up_blocks) + 1


def _of_small(times: int) -> Counted:
    return counted(*language(sizes(times), SHORT, None, torch.float32), f"{SHORT} tokens")


def _of_unet(config: dict[str, Any], trained: str, examples: str) -> Counted:
    return counted(*denoiser(config, trained, torch.bfloat16), examples)


def shapes() -> dict[str, Callable[[], Counted]]:
    bf16, latents = torch.bfloat16, {"sd15": "64 × 64 latents", "sdxl": "128 × 128 latents"}
    found = {
        "Llama 8B, full": lambda: counted(*language(LLAMA_8B, TOKENS, None, bf16), f"{TOKENS:,} tokens"),
        "Llama 8B, LoRA": lambda: counted(*language(LLAMA_8B, TOKENS, RANK, bf16), f"{TOKENS:,} tokens"),
    }
    for times in (1, 4, 16):  # what growth.py measures
        found[f"Llama × {times}"] = partial(_of_small, times)
    for shape, config in UNETS.items():
        for trained in ("all", "cross_attention"):
            found[f"{shape}, {trained}"] = partial(_of_unet, config, trained, latents[shape])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny Llama; writes nothing")
    parser.add_argument("--only", nargs="+", default=[], help="shapes whose names begin so; the others stay")
    given = parser.parse_args()
    if given.quick:
        print(json.dumps(vars(counted(*language(TINY, 64, 4, torch.float32), "64 tokens"))))
        return
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name, count in shapes().items():
        if given.only and not name.startswith(tuple(given.only)):
            continue
        found[name] = vars(count())
        print(name, json.dumps(found[name]), flush=True)
        save(RESULTS, by_line(found))


if __name__ == "__main__":
    main()
