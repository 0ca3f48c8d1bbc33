"""A filtered pipeline as it lies in a folder: a pipeline in a pipeline, and its filter beside it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from hf_unlearn.hub.allowed import left_behind, publishable_files
from hf_unlearn.hub.publish import check_publishable


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
OUTER = {"_class_name": "FilteredPipeline", "pipeline": ["diffusers", "DDPMPipeline"], "schema_version": 1}
OUTER["safety_checker"] = ["hf_unlearn", "FASTSafetyChecker"]
INNER = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
INNER["scheduler"] = ["diffusers", "DDPMScheduler"]
GOOD = {
    "README.md",
    "model_index.json",
    "pictures/released.png",
    "pipeline/model_index.json",
    "pipeline/scheduler/scheduler_config.json",
    "pipeline/unet/config.json",
    f"pipeline/{WEIGHTS}",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "safety_checker/tokenizer.json",
    "safety_checker/tokenizer_config.json",
}
HOSTILE = {
    "unet/config.json",
    WEIGHTS,
    "marks.json",
    "_private/marked.png",
    "pipeline/README.md",
    "pipeline/pictures/sample.png",
    "pipeline/_private/config.json",
    "pipeline/unet/diffusion_pytorch_model.fp16.safetensors",
    "pipeline/unet/optimizer.bin",
    "pipeline/unet_ema/config.json",
    "pipeline/pipeline/model_index.json",
    "safety_checker/marks.npy",
    "safety_checker/pytorch_model.bin",
}


def write(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("model_index.json"):
            path.write_text(json.dumps(INNER if path.parent.name == "pipeline" else OUTER))
        elif name.endswith("config.json"):
            content = {"_class_name": "UNet"} if "unet" in name else {"model_type": "fast_safety_checker"}
            path.write_text(json.dumps(content))
        elif name.endswith(".safetensors"):
            save_file({"weight": torch.zeros(1)}, path)
        else:
            path.write_bytes(b"content of " + name.encode())
    return folder


@pytest.fixture
def good(tmp_path):
    return write(tmp_path, GOOD)


def change(folder, **entries):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_only_what_belongs_to_it(good):
    write(good, HOSTILE)
    assert publishable_files(good) == check_publishable(good) == sorted(GOOD)
    assert list(left_behind(good)) == sorted(HOSTILE)


def test_a_pipeline_of_another_class_has_none_inside(good):
    """There a component called pipeline is a component like others, and this one is no model."""
    change(good, _class_name="OtherPipeline")
    assert not [name for name in publishable_files(good) if name.startswith("pipeline/unet")]
    with pytest.raises(ValueError, match="names pipeline, which is no folder with a config"):
        check_publishable(good)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("safety_checker", "names safety_checker, which is no folder with a config"),
        ("safety_checker/model.safetensors", "no model.safetensors to publish"),
        ("pipeline", "holds no pipeline"),
        ("pipeline/model_index.json", "holds no pipeline"),
        ("pipeline/unet", "names unet, which is no folder with a config"),
        (f"pipeline/{WEIGHTS}", "no diffusion_pytorch_model.safetensors to publish"),
    ],
)
def test_what_is_not_whole_is_refused(good, gone, message):
    path = good / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=message):
        check_publishable(good)


def test_without_a_filter_it_is_refused(good):
    for entry in ([None, None], None):
        change(good, safety_checker=entry)
        with pytest.raises(ValueError, match="names no model"):
            check_publishable(good)


def test_an_adapter_inside_is_refused(good):
    save_file({"unet.base_layer.weight": torch.zeros(1)}, good / "pipeline" / WEIGHTS)
    with pytest.raises(ValueError, match="holds an adapter"):
        check_publishable(good)


def test_a_link_is_not_followed(good, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "pipeline"
    shutil.move(good / "pipeline", elsewhere)
    (good / "pipeline").symlink_to(elsewhere)
    assert not [name for name in publishable_files(good) if name.startswith("pipeline/")]
    with pytest.raises(ValueError, match="not as a link"):
        check_publishable(good)
