"""Whatever lay in a repository before: stock classes load from it exactly what was pushed last, and nothing else."""

import contextlib
from functools import cache

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, StableDiffusionPipeline, UNet2DModel
from filter_data import fitted_filter
from peft import LoraConfig, get_peft_model
from peft.utils import load_peft_weights
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils import logging as transformers_logging

from hf_unlearn import FASTSafetyChecker, FilteredPipeline
from hf_unlearn.examples.loopback_hub import LoopbackHub
from hf_unlearn.hub.publish import publish_folder
from hf_unlearn.hub.superseded import superseded


REPO = "me/model"
MINE = {  # a user's own, which no loader takes for a model
    "README.md", ".gitattributes", "LICENSE", "docs/config.json", "docs/guide.md", "pictures/logo.png", "modeling_mine.py",
}  # fmt: skip


def vit():
    return ViTForImageClassification(
        ViTConfig(
            image_size=8, patch_size=4, num_channels=1, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=8, num_labels=2,
        )
    )  # fmt: skip


def denoiser():
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(4, 4), norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def ddpm():
    return DDPMPipeline(denoiser(), DDPMScheduler(num_train_timesteps=4))


def other_formats(model, folder):
    """As older versions and other libraries left them beside each other."""
    model.save_pretrained(folder)
    model.save_pretrained(folder, variant="fp16")
    stem, old = ("model", "pytorch_model") if isinstance(model, ViTForImageClassification) else (STEM, STEM)
    torch.save(model.state_dict(), folder / f"{old}.bin")
    (folder / f"{stem}.safetensors").unlink()
    flax = "flax_model.msgpack" if stem == "model" else "diffusion_flax_model.msgpack"
    for name in (flax, "tf_model.h5", "onnx/model.onnx", "v1.ckpt", f"{stem}.safetensors.index.non_ema.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"{}")


def adapter(folder):
    model = get_peft_model(vit(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = "me/base"
    model.save_pretrained(folder)


def lora(folder):
    folder.mkdir()
    save_file({"unet.mid.lora_A.weight": torch.randn(2, 4)}, folder / "pytorch_lora_weights.safetensors")


def formats_inside(folder):
    ddpm().save_pretrained(folder)
    other_formats(denoiser(), folder / "unet")


def with_a_safety_checker(folder):
    """A component that the next one does not have."""
    ddpm().save_pretrained(folder)
    denoiser().save_pretrained(folder / "unet_ema")
    vit().save_pretrained(folder / "safety_checker")


STEM = "diffusion_pytorch_model"
# What lies in a repository, or is pushed into it.
KINDS = {
    "model": lambda folder: vit().save_pretrained(folder),
    "model in shards": lambda folder: vit().save_pretrained(folder, max_shard_size="1KB"),
    "model in other formats": lambda folder: other_formats(vit(), folder),
    "adapter": adapter,
    "denoiser": lambda folder: denoiser().save_pretrained(folder),
    "denoiser in other formats": lambda folder: other_formats(denoiser(), folder),
    "pipeline": lambda folder: ddpm().save_pretrained(folder),
    "pipeline in shards": lambda folder: ddpm().save_pretrained(folder, max_shard_size="4KB"),
    "pipeline in other formats": formats_inside,
    "pipeline with more": with_a_safety_checker,
    "lora": lora,
    "filter": lambda folder: fitted_filter(channels=1).save_pretrained(folder),
    "filtered pipeline": lambda folder: FilteredPipeline(ddpm(), fitted_filter(channels=1)).save_pretrained(folder),
}


def model_of(name, **arguments):
    model, info = ViTForImageClassification.from_pretrained(name, output_loading_info=True, **arguments)
    if info["missing_keys"]:  # transformers makes them up, of any model's files
        raise ValueError("no such model")
    return model


LOADERS = {
    "model": model_of,
    "model, fp16": lambda name: model_of(name, variant="fp16"),
    "model, bin": lambda name: model_of(name, use_safetensors=False),
    "model inside": lambda name: model_of(name, subfolder="safety_checker"),
    "adapter": load_peft_weights,
    "denoiser": UNet2DModel.from_pretrained,
    "denoiser, fp16": lambda name: UNet2DModel.from_pretrained(name, variant="fp16"),
    "denoiser, bin": lambda name: UNet2DModel.from_pretrained(name, use_safetensors=False),
    "denoiser inside": lambda name: UNet2DModel.from_pretrained(name, subfolder="unet"),
    "denoiser inside, fp16": lambda name: UNet2DModel.from_pretrained(name, subfolder="unet", variant="fp16"),
    "another inside": lambda name: UNet2DModel.from_pretrained(name, subfolder="unet_ema"),
    "denoiser far inside": lambda name: UNet2DModel.from_pretrained(name, subfolder="pipeline/unet"),
    "pipeline": lambda name: DDPMPipeline.from_pretrained(name).unet,
    "lora": lambda name: StableDiffusionPipeline.lora_state_dict(name, weight_name="pytorch_lora_weights.safetensors"),
    "filter": lambda name: FASTSafetyChecker.from_pretrained(name),
    "filter inside": lambda name: FASTSafetyChecker.from_pretrained(name, subfolder="safety_checker"),
    "filtered pipeline": lambda name: FilteredPipeline.from_pretrained(name).pipeline.unet,
}
# In this order, one after the other, into one repository; the last one is what is looked at.
ORDERS = [
    ("model", "model in shards"),
    ("model in shards", "model"),
    ("model in other formats", "model"),
    ("model in other formats", "model in shards"),
    ("model", "adapter"),
    ("adapter", "model"),
    ("model", "pipeline"),
    ("pipeline", "model in shards"),
    ("denoiser", "pipeline"),
    ("denoiser in other formats", "model"),
    ("pipeline", "pipeline in shards"),
    ("pipeline in shards", "pipeline"),
    ("pipeline in other formats", "pipeline in shards"),
    ("pipeline with more", "pipeline"),
    ("pipeline with more", "filtered pipeline"),
    ("pipeline in other formats", "filtered pipeline"),
    ("filtered pipeline", "pipeline in shards"),
    ("lora", "pipeline"),
    ("pipeline", "lora", "filter"),
    ("filter", "filtered pipeline", "model"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each kind as it is saved, always with other weights."""
    root = tmp_path_factory.mktemp("kinds")
    with torch.random.fork_rng(devices=[]):
        for seed, (kind, save) in enumerate(KINDS.items()):
            torch.manual_seed(seed)
            save(root / kind)
    return root


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    transformers_logging.set_verbosity_error()
    with LoopbackHub() as hub, hub.in_this_process(tmp_path_factory.mktemp("home")):
        yield hub


def loaded(name):
    """What every loader makes of a repository or a folder: tensors by name; nothing where it refuses."""
    found = {}
    for loader, load in LOADERS.items():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            model = load(name)
            found[loader] = model.state_dict() if isinstance(model, torch.nn.Module) else model
    return found


@cache
def saved(folder):
    return loaded(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", ORDERS, ids=" then ".join)
def test_what_was_pushed_last_is_all_that_is_loaded(hub, folders, tmp_path, order):
    repo = f"me/{'-'.join(order).replace(' ', '_')}"
    for name in MINE:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    hub.put(repo, tmp_path)
    for kind in order[:-1]:
        hub.put(repo, folders / kind)
    commits = len(hub.requests)
    publish_folder(folders / order[-1], repo, allow_adapter=True)
    assert [path for _, path in hub.requests[commits:] if "/commit/" in path] == [f"/api/models/{repo}/commit/main"]
    there, expected = loaded(repo), saved(folders / order[-1])
    assert there.keys() == expected.keys() != set()
    for loader in expected:
        assert there[loader].keys() == expected[loader].keys()
        assert all(torch.equal(there[loader][key], value) for key, value in expected[loader].items()), loader
    assert set(hub.files(repo)) >= MINE
    assert hub.unknown == []


def test_the_loaders_would_notice(hub, folders):
    """Without the deletions each of the first kinds is loaded still."""
    hub.put("me/both", folders / "pipeline in other formats")
    hub.put("me/both", folders / "filtered pipeline")
    assert {"denoiser inside, fp16", "filtered pipeline"} <= loaded("me/both").keys()


def test_a_pull_request_deletes_too_and_leaves_the_branch(hub, folders):
    hub.put("me/asked", folders / "model")
    before = hub.files("me/asked")
    publish_folder(folders / "model in shards", "asked", create_pr=True)
    assert hub.files("me/asked") == before
    proposed = hub.files("me/asked", "refs/pr/1")
    assert "model.safetensors" not in proposed
    assert "model.safetensors.index.json" in proposed


def test_names():
    """What stays, of what looks like a model's."""
    gone = {
        "a.gguf", "a.dduf", "consolidated.00.pth", "deep/er/x.safetensors", "deep/er/config.json", "model.fp16.safetensors.index.json",
        "model.safetensors.index.fp16.json", "openvino/openvino_model.bin", "pytorch_model-00001-of-00002.bin",
        "tf_model.h5.index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json",
        "config.json", "chat_template.jinja", "additional_chat_templates/tools.jinja", "source.spm", "training_args.bin", "image_processor/preprocessor_config.json",
    }  # fmt: skip
    stay = {
        "results/config.json", "data/vocab.json", "notes.json", "index.json", ".eval_results/a.yaml", "a.safetensors.txt",
        "configs/train.yaml", "pages/additional_chat_templates/a.jinja", "templates/a.jinja", "README.md", "handler.py", "requirements.txt", "pictures/before.png",
    }  # fmt: skip
    assert superseded(gone | stay, {"config.json"}) == sorted(gone - {"config.json"})
