"""Folders that diffusers saves: a pipeline with a folder for each component, or a LoRA file."""

import json
import shutil

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from hf_unlearn.hub.allowed import left_behind, publishable_files
from hf_unlearn.hub.publish import as_patterns, check_publishable, publish_folder


LORA = "pytorch_lora_weights.safetensors"
SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARDS = ["diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors"]

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": [None, None],
    "requires_safety_checker": True,
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
}
GOOD = {
    "README.md",
    "model_index.json",
    "pictures/samples.png",
    "feature_extractor/preprocessor_config.json",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    f"unet/{SINGLE}",
}
HOSTILE = {
    "training_args.bin",
    "tokenizer_config.json",
    SINGLE,
    "samples.png",
    "unet_ema/config.json",
    f"unet_ema/{SINGLE}",
    "image_encoder/config.json",
    "image_encoder/model.safetensors",
    "_private/config.json",
    f"_private/{SINGLE}",
    "checkpoint-3/config.json",
    f"checkpoint-3/unet/{SINGLE}",
    f"original/{SINGLE}",
    f"unet/_private/{SINGLE}",
    f"unet/checkpoint-3/{SINGLE}",
    "unet/optimizer.bin",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
    "unet/diffusion_pytorch_model_original.safetensors",
    f"unet/{SHARDS[0]}",
    "unet/model.safetensors",
    "unet/README.md",
    f"unet/{LORA}",
    "unet/example.png",
    "text_encoder/pytorch_model.bin",
    "text_encoder/model.fp16.safetensors",
    f"text_encoder/{SINGLE}",
    f"scheduler/{SINGLE}",
    "scheduler/config.pkl",
    "tokenizer/model.safetensors",
    "tokenizer/forget.txt",
    "pictures/forgotten/example.png",
    "pictures/config.json",
}


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
        assert publishable_files(good) == sorted(GOOD)
        assert check_publishable(good) == sorted(GOOD)
        assert left_behind(good) == sorted(HOSTILE)

    def test_upload_sees_the_same_files(self, good):
        write(good, HOSTILE)
        everything = [path.relative_to(good).as_posix() for path in good.rglob("*") if path.is_file()]
        assert set(filter_repo_objects(everything, allow_patterns=as_patterns(check_publishable(good)))) == GOOD

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
        assert left_behind(tmp_path / "saved") == []
        for name in files:  # what the Hub has after a push
            (tmp_path / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "saved" / name, tmp_path / "hub" / name)
        loaded = type(tiny_ddpm).from_pretrained(tmp_path / "hub")
        for name, weight in tiny_ddpm.unet.state_dict().items():
            torch.testing.assert_close(loaded.unet.state_dict()[name], weight, rtol=0, atol=0)

    def test_stable_diffusion_as_diffusers_saves_it(self, tiny_stable_diffusion, tmp_path):
        tiny_stable_diffusion.save_pretrained(tmp_path)
        assert {"text_encoder/model.safetensors", f"vae/{SINGLE}"} <= set(check_publishable(tmp_path))
        assert left_behind(tmp_path) == []

    def test_a_variant_is_no_model(self, tiny_ddpm, tmp_path):
        tiny_ddpm.save_pretrained(tmp_path, variant="fp16")
        assert "unet/diffusion_pytorch_model.fp16.safetensors" in left_behind(tmp_path)
        with pytest.raises(ValueError, match=f"unet': no {SINGLE}"):
            check_publishable(tmp_path)


class TestRefusals:
    """Each before anything is sent: these would fail in another way, since there is no network here."""

    def refused(self, folder, **kwargs):
        with pytest.raises(ValueError) as error:
            publish_folder(folder, "me/model", **kwargs)
        assert "\n" not in str(error.value)
        return str(error.value)

    @pytest.mark.parametrize("component", ["unet", "scheduler", "tokenizer"])
    def test_a_component_is_missing(self, good, component):
        shutil.rmtree(good / component)
        assert f"model_index.json names {component}, which is no folder" in self.refused(good)

    @pytest.mark.parametrize(("component", "name"), [("unet", SINGLE), ("safety_checker", "model.safetensors")])
    def test_a_model_without_weights(self, good, component, name):
        (good / component / name).rename(good / component / name.replace(".safetensors", ".bin"))
        assert f"{component}': no {name} to publish" in self.refused(good)

    def test_weights_under_the_name_of_another_library(self, good):
        (good / "unet" / SINGLE).rename(good / "unet/model.safetensors")
        assert f"no {SINGLE} to publish" in self.refused(good)

    def test_single_file_beside_shards(self, good):
        shard(good / "unet")
        write(good, [f"unet/{SINGLE}"])
        assert f"unet': has both {SINGLE} and {INDEX}" in self.refused(good)
        (good / "unet" / SHARDS[0]).unlink()  # what a later save of one file leaves of an earlier one in shards
        assert check_publishable(good) == sorted(GOOD)
        (good / "unet" / SINGLE).unlink()
        assert f"names {SHARDS[0]}" in self.refused(good)

    def test_shards_that_are_a_variant(self, good):
        shard(good / "unet", ["diffusion_pytorch_model.fp16-00001-of-00002.safetensors"])
        write(good, ["unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors"])
        assert "fp16-00001-of-00002.safetensors, which is not there" in self.refused(good)

    @pytest.mark.parametrize(
        "name", ["config.json", "model.safetensors", "model.safetensors.index.json", "adapter_config.json", LORA]
    )
    @pytest.mark.parametrize("allow_adapter", [True, False])
    def test_a_pipeline_beside_another_model(self, good, name, allow_adapter):
        write(good, [name])
        assert f"has both model_index.json and {name}" in self.refused(good, allow_adapter=allow_adapter)

    @pytest.mark.parametrize("name", ["../elsewhere", "_private", "checkpoint-3", "pictures", "unet/deeper", ".", ""])
    def test_an_index_cannot_name_other_folders(self, good, name):
        write(good, HOSTILE)
        change_index(good, **{name: ["diffusers", "UNet2DConditionModel"]})
        assert f"names {name!r}, which no component is called" in self.refused(good)

    @pytest.mark.parametrize("index", ["", "[]", "3", "{"])
    def test_broken_index(self, good, index):
        (good / "model_index.json").write_text(index)
        assert "model_index.json cannot be read" in self.refused(good)

    def test_broken_component(self, good):
        (good / "unet" / SINGLE).write_bytes(b"no tensors")
        assert f"{SINGLE} cannot be read" in self.refused(good)
        (good / "unet/config.json").write_text("{")
        assert "unet': config.json cannot be read" in self.refused(good)

    def test_no_model_in_the_index(self, good):
        (good / "model_index.json").write_text('{"_class_name": "X", "scheduler": ["diffusers", "DDIMScheduler"]}')
        assert "names no model" in self.refused(good)

    @pytest.mark.parametrize("allow_adapter", [True, False])
    def test_an_adapter_beside_the_weights_of_a_component(self, good, allow_adapter):
        write(good, ["text_encoder/adapter_config.json"])
        assert "text_encoder': holds an adapter" in self.refused(good, allow_adapter=allow_adapter)


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
