"""Folders that diffusers saves: a pipeline with a folder for each component, or a LoRA file."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from hf_unlearn.hub.allowed import left_behind, publishable_files
from hf_unlearn.hub.publish import check_publishable, publish_folder


LORA = "pytorch_lora_weights.safetensors"
SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARDS = ["diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors"]

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1", "requires_safety_checker": True,
    "feature_extractor": ["transformers", "CLIPImageProcessor"], "image_encoder": [None, None],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
}  # fmt: skip
GOOD = {
    "README.md", "model_index.json", "pictures/samples.png", "feature_extractor/preprocessor_config.json",
    "safety_checker/config.json", "safety_checker/model.safetensors", "scheduler/scheduler_config.json",
    "text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json",
    "unet/config.json", f"unet/{SINGLE}",
}  # fmt: skip
HOSTILE = {
    "training_args.bin", "tokenizer_config.json", SINGLE, "samples.png", "unet_ema/config.json", f"unet_ema/{SINGLE}",
    "image_encoder/config.json", "image_encoder/model.safetensors", "_private/config.json", f"_private/{SINGLE}",
    "checkpoint-3/config.json", f"checkpoint-3/unet/{SINGLE}", f"original/{SINGLE}", f"unet/_private/{SINGLE}",
    f"unet/checkpoint-3/{SINGLE}", "unet/optimizer.bin", "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.fp16.json", "unet/diffusion_pytorch_model_original.safetensors",
    f"unet/{SHARDS[0]}", "unet/model.safetensors", "unet/README.md", f"unet/{LORA}", "unet/example.png",
    "text_encoder/pytorch_model.bin", "text_encoder/model.fp16.safetensors", f"text_encoder/{SINGLE}",
    f"scheduler/{SINGLE}", "scheduler/config.pkl", "tokenizer/model.safetensors", "tokenizer/forget.txt",
    "pictures/forgotten/example.png", "pictures/config.json",
}  # fmt: skip


def write(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "model_index.json":
            path.write_text(json.dumps(MODEL_INDEX))
        elif name.endswith("config.json"):
            own = {"_class_name": "UNet"} if path.parent.name.startswith("unet") else {"model_type": "clip"}
            path.write_text(json.dumps(own))
        elif name.endswith(".safetensors"):
            save_file({"weight": torch.zeros(1)}, path)
        else:
            path.write_bytes(b"content of " + name.encode())
    return folder


def shard(folder, names=SHARDS):
    """Replaces the single file of a model by shards."""
    (folder / SINGLE).unlink()
    write(folder, SHARDS)
    index = {"metadata": {}, "weight_map": {f"weight{number}": name for number, name in enumerate(names)}}
    (folder / INDEX).write_text(json.dumps(index))


def change_index(folder, **entries):
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX | entries))


@pytest.fixture
def good(tmp_path):
    return write(tmp_path, GOOD)


class TestPublishableFiles:
    def test_only_what_belongs_to_the_pipeline(self, good):
        write(good, HOSTILE)
        assert publishable_files(good) == check_publishable(good) == sorted(GOOD)
        assert list(left_behind(good)) == sorted(HOSTILE)

    def test_shards(self, good):
        shard(good / "unet")
        write(good, ["unet/diffusion_pytorch_model-00001-of-00003.safetensors"])
        expected = GOOD - {f"unet/{SINGLE}"} | {f"unet/{name}" for name in (INDEX, *SHARDS)}
        assert check_publishable(good) == publishable_files(good) == sorted(expected)

    def test_links_are_left_behind(self, good):
        (good / "unet").rename(good / "_private")
        (good / "unet").symlink_to(good / "_private")
        (good / "text_encoder/model.safetensors").rename(good / "_private/model.safetensors")
        (good / "text_encoder/model.safetensors").symlink_to(good / "_private/model.safetensors")
        left = {"unet/config.json", f"unet/{SINGLE}", "text_encoder/model.safetensors"}
        assert publishable_files(good) == sorted(GOOD - left)
        assert {"unet", "text_encoder/model.safetensors"} <= set(left_behind(good))

    def test_a_link_to_the_index_makes_no_pipeline(self, good):
        (good / "model_index.json").rename(good / "elsewhere.json")
        (good / "model_index.json").symlink_to(good / "elsewhere.json")
        assert publishable_files(good) == ["README.md", "pictures/samples.png"]

    @pytest.mark.parametrize("shard_size", [None, "10KB"])
    def test_what_diffusers_saves(self, tiny_ddpm, tmp_path, shard_size):
        tiny_ddpm.save_pretrained(tmp_path / "saved", max_shard_size=shard_size)
        files = check_publishable(tmp_path / "saved")
        assert left_behind(tmp_path / "saved") == {}
        for name in files:  # what the Hub has after a push
            (tmp_path / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "saved" / name, tmp_path / "hub" / name)
        loaded = type(tiny_ddpm).from_pretrained(tmp_path / "hub")
        for name, weight in tiny_ddpm.unet.state_dict().items():
            assert torch.equal(loaded.unet.state_dict()[name], weight)

    def test_stable_diffusion_as_diffusers_saves_it(self, tiny_stable_diffusion, tmp_path):
        tiny_stable_diffusion.save_pretrained(tmp_path)
        assert {"text_encoder/model.safetensors", f"vae/{SINGLE}"} <= set(check_publishable(tmp_path))
        assert left_behind(tmp_path) == {}

    def test_a_variant_is_no_model(self, tiny_ddpm, tmp_path):
        tiny_ddpm.save_pretrained(tmp_path, variant="fp16")
        assert "unet/diffusion_pytorch_model.fp16.safetensors" in left_behind(tmp_path)
        with pytest.raises(ValueError, match=f"unet': no {SINGLE}"):
            check_publishable(tmp_path)


def renamed(old, new):
    return lambda folder: (folder / old).rename(folder / new)


def with_text(name, text):
    return lambda folder: (folder / name).write_text(text)


def single_file_beside_shards(folder):
    shard(folder / "unet")
    write(folder, [f"unet/{SINGLE}"])


def missing_shard(folder):
    shard(folder / "unet")
    (folder / "unet" / SHARDS[0]).unlink()


def shards_of_a_variant(folder):
    shard(folder / "unet", ["diffusion_pytorch_model.fp16-00001-of-00002.safetensors"])
    write(folder, ["unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors"])


REFUSED = [
    *(
        (lambda folder, name=name: shutil.rmtree(folder / name), f"model_index.json names {name}, which is no folder")
        for name in ("unet", "scheduler", "tokenizer")
    ),
    (renamed(f"unet/{SINGLE}", "unet/diffusion_pytorch_model.bin"), f"unet': no {SINGLE} to publish"),
    (
        renamed("safety_checker/model.safetensors", "safety_checker/model.bin"),
        "checker': no model.safetensors to publ",
    ),
    (renamed(f"unet/{SINGLE}", "unet/model.safetensors"), f"no {SINGLE} to publish"),  # as another library calls it
    (single_file_beside_shards, f"unet': has both {SINGLE} and {INDEX}"),
    (missing_shard, f"names {SHARDS[0]}"),
    (shards_of_a_variant, "fp16-00001-of-00002.safetensors, which is not there"),
    *(
        (lambda folder, name=name: write(folder, [name]), f"has both model_index.json and {name}")
        for name in ("config.json", "model.safetensors", "model.safetensors.index.json", "adapter_config.json", LORA)
    ),
    *(
        (
            lambda folder, name=name: change_index(write(folder, HOSTILE), **{name: ["diffusers", "UNet2DModel"]}),
            f"names {name!r}, which no component is called",
        )
        for name in ("../elsewhere", "_private", "checkpoint-3", "pictures", "unet/deeper", ".", "")
    ),
    *((with_text("model_index.json", text), "model_index.json cannot be read") for text in ("", "[]", "3", "{")),
    (with_text(f"unet/{SINGLE}", "no tensors"), f"{SINGLE} cannot be read"),
    (with_text("unet/config.json", "{"), "unet': config.json cannot be read"),
    (with_text("model_index.json", '{"_class_name": "X", "scheduler": ["diffusers", "X"]}'), "names no model"),
    (lambda folder: write(folder, ["text_encoder/adapter_config.json"]), "text_encoder': holds an adapter"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_refuses(change, words, good):
    """Before anything is sent: it would fail in another way, since there is no network here."""
    change(good)
    for allow_adapter in (False, True):
        with pytest.raises(ValueError) as error:
            publish_folder(good, "me/model", allow_adapter=allow_adapter)
        assert words in str(error.value)
        assert "\n" not in str(error.value)


def test_a_single_file_beside_an_index_of_shards_that_are_gone(good):
    """What a later save of one file leaves of an earlier one in shards."""
    missing_shard(good)
    write(good, [f"unet/{SINGLE}"])
    assert check_publishable(good) == sorted(GOOD)


class TestLora:
    @pytest.fixture
    def adapted(self, tiny_stable_diffusion):
        tiny_stable_diffusion.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        return tiny_stable_diffusion

    def test_the_file_alone(self, adapted, tmp_path):
        adapted.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(adapted.unet))
        write(tmp_path, ["README.md", "pytorch_lora_weights_original.safetensors"])
        with pytest.raises(ValueError, match="allow_adapter=False"):
            check_publishable(tmp_path)
        assert check_publishable(tmp_path, allow_adapter=True) == ["README.md", LORA]

    @pytest.mark.parametrize("name", ["model.safetensors", "adapter_config.json"])
    def test_beside_another(self, tmp_path, name):
        write(tmp_path, [LORA, name])
        with pytest.raises(ValueError, match="has both"):
            check_publishable(tmp_path, allow_adapter=True)

    def test_inside_the_weights(self, adapted, tmp_path):
        """`save_pretrained` writes an active adapter beside the original weights, which it thus gives away."""
        adapted.save_pretrained(tmp_path / "apart")
        with pytest.raises(ValueError, match="unet': holds an adapter"):
            check_publishable(tmp_path / "apart")
        adapted.fuse_lora(components=["unet"])
        adapted.unload_lora_weights()
        adapted.save_pretrained(tmp_path / "fused")
        assert f"unet/{SINGLE}" in check_publishable(tmp_path / "fused")
