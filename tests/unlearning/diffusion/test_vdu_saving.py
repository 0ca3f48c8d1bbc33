"""What VDU writes: a pipeline, or a LoRA file, that stock diffusers draws the same images with."""

import copy
import json

import numpy as np
import pytest
import torch
from fresh import run_python
from huggingface_hub import ModelCard
from image_data import distance, same, weights
from safetensors import safe_open
from safetensors.torch import load_file
from vdu_data import arguments, images, prompted_arguments, prompted_images, trained

from hf_unlearn import VDUTrainer
from hf_unlearn.hub.publish import check_publishable


LOADER = """
import json
import sys
import numpy as np
import torch
import diffusers

for job in json.loads(sys.argv[1]):
    pipeline = getattr(diffusers, job["class"]).from_pretrained(job["folder"])
    pipeline.set_progress_bar_config(disable=True)
    if job["lora"]:
        name = {"weight_name": "pytorch_lora_weights.safetensors", "adapter_name": "unlearned"}
        pipeline.load_lora_weights(job["lora"], **name)
        pipeline.set_adapters("unlearned", job["strength"])
    images = pipeline(**job["inputs"], generator=torch.Generator().manual_seed(7), output_type="np").images
    np.save(job["result"], images)
assert not any(name.split(".")[0] == "hf_unlearn" for name in sys.modules)
"""
PROMPTED, UNPROMPTED = {"prompt": "a photo", "num_inference_steps": 3}, {"batch_size": 2, "num_inference_steps": 3}


def drawn(pipeline):
    inputs = PROMPTED if hasattr(pipeline, "vae") else UNPROMPTED
    pipeline.unet.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**inputs, generator=torch.Generator().manual_seed(7), output_type="np").images


def drawn_in_a_new_process(tmp_path, jobs):
    """What stock diffusers draws: `{name: images}` of `{name: (folder, lora, strength)}`."""
    described = [
        {
            "class": json.loads((folder / "model_index.json").read_text())["_class_name"],
            "folder": str(folder),
            "lora": lora and str(lora),
            "strength": strength,
            "inputs": PROMPTED if (folder / "vae").is_dir() else UNPROMPTED,
            "result": str(tmp_path / f"{name}.npy"),
        }
        for name, (folder, lora, strength) in jobs.items()
    ]
    run_python(LOADER, json.dumps(described))
    return {name: np.load(tmp_path / f"{name}.npy") for name in jobs}


def test_stock_diffusers_draws_the_same_in_a_new_process(tiny_ddpm, tiny_stable_diffusion, tmp_path):
    """Also with a LoRA file, whose strength goes from the original's picture to the unlearned one's."""
    original = tmp_path / "original"
    tiny_stable_diffusion.save_pretrained(original)
    before = {"ddpm": drawn(tiny_ddpm), "prompted": drawn(tiny_stable_diffusion)}
    merged, apart = copy.deepcopy(tiny_stable_diffusion), copy.deepcopy(tiny_stable_diffusion)
    runs = {
        "ddpm": trained(tiny_ddpm, arguments(tmp_path / "ddpm")),
        "prompted": trained(tiny_stable_diffusion, prompted_arguments(tmp_path / "prompted")),
        "merged": trained(merged, prompted_arguments(tmp_path / "merged", trainable=["lora"])),
        "apart": trained(
            apart, prompted_arguments(tmp_path / "apart", trainable=["lora"], lora_alpha=16, merge_adapter=False)
        ),
    }
    for trainer in runs.values():
        trainer.save_model()
    live = {name: drawn(trainer.pipeline) for name, trainer in runs.items()}

    jobs = {name: (tmp_path / name, None, None) for name in ("ddpm", "prompted", "merged")}
    jobs |= {f"apart {strength}": (original, tmp_path / "apart", strength) for strength in (0.0, 0.5, 1.0)}
    loaded = drawn_in_a_new_process(tmp_path, jobs)

    assert not np.allclose(live["ddpm"], before["ddpm"], atol=1e-3)
    for name in ("prompted", "merged", "apart"):
        assert not np.allclose(live[name], before["prompted"], atol=1e-3), name
    expected = live | {"apart 1.0": live["apart"], "apart 0.0": before["prompted"]}
    for name in ("ddpm", "prompted", "merged", "apart 1.0", "apart 0.0"):
        # Pixels in [0, 1] after three passes of some ten layers in fp32, 1e-7 each; in a merged one W + BA is rounded too.
        np.testing.assert_allclose(loaded[name], expected[name], rtol=0, atol=1e-5, err_msg=name)
    for end in ("apart 0.0", "apart 1.0"):
        assert np.abs(loaded["apart 0.5"] - loaded[end]).max() > 1e-3


def files_below(folder):
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def assert_tells_nothing(folder, words, **options):
    """No published file has any of these words in it. Gives the names of the files."""
    published = check_publishable(folder, **options)
    for name in published:
        content = (folder / name).read_bytes()
        assert not [word for word in words if word.encode() in content], name
    return published


class TestPrompted:
    """A pipeline that was loaded from a folder on this machine."""

    @pytest.fixture
    def original(self, tiny_stable_diffusion, tmp_path):
        folder = tmp_path / "secret" / "original"
        tiny_stable_diffusion.save_pretrained(folder)
        return folder

    def test_nothing_but_the_denoiser_changes(self, original, tmp_path):
        out = tmp_path / "out"
        trained(str(original), prompted_arguments(out), forget_dataset=prompted_images()).save_model()
        before, after = files_below(original), files_below(out)
        for name in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
            assert before[name].read_bytes() == after[name].read_bytes()
        name = "unet/diffusion_pytorch_model.safetensors"
        assert before[name].read_bytes() != after[name].read_bytes()
        assert set(before) <= set(after)

    def test_a_merged_lora_leaves_no_trace(self, original, tiny_stable_diffusion, tmp_path):
        out = tmp_path / "out"
        args = prompted_arguments(out, trainable=["lora"])
        trainer = trained(str(original), args, forget_dataset=prompted_images())
        live = weights(trainer.model)
        trainer.save_model()
        saved = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
        assert set(saved) == set(tiny_stable_diffusion.unet.state_dict())
        assert same(weights(trainer.model), live)  # it can be trained on
        assert trainer.pipeline.unet is trainer.model
        assert not list(out.glob("*lora*"))
        assert "README.md" in assert_tells_nothing(out, ["secret", str(tmp_path)])

    def test_a_lora_file_is_published_only_if_asked_for(self, original, tmp_path):
        out = tmp_path / "out"
        args = prompted_arguments(out, trainable=["lora"], merge_adapter=False)
        trainer = trained(str(original), args, forget_dataset=prompted_images())
        trainer.save_model()
        with safe_open(out / "pytorch_lora_weights.safetensors", "pt") as file:
            assert all(name.startswith("unet.") and "lora" in name for name in file.keys())  # noqa: SIM118
        assert not (out / "model_index.json").exists()
        with pytest.raises(ValueError, match="^allow_adapter=False: an adapter can be taken off"):
            check_publishable(out)
        published = assert_tells_nothing(out, ["secret", str(tmp_path)], allow_adapter=True)
        assert published == ["README.md", "provenance.json", "pytorch_lora_weights.safetensors"]
        # Its card loads it onto the original.
        trainer.base_model = "someone/original"
        text = trainer.model_card("me/without").text
        for code in (
            'StableDiffusionPipeline.from_pretrained("someone/original")',
            "load_lora_weights(",
            "set_adapters(",
        ):
            assert code in text

    def test_the_card_does_not_say_what_was_forgotten(self, tiny_stable_diffusion, tmp_path):
        args = prompted_arguments(
            tmp_path, forget_prompts=["tattoo", "path to"], forget_samples=3, replay_prompts=["top hat"], max_steps=1
        )
        trained(tiny_stable_diffusion, args).save_model()
        assert "README.md" in assert_tells_nothing(tmp_path, ["tattoo", "path to", "top hat"])
        card = ModelCard.load(tmp_path / "README.md")
        assert "what 2 prompts ask for" in card.text
        assert "The forget set had 3 examples" in card.text
        assert card.data.pipeline_tag == "text-to-image"


class TestUnprompted:
    @pytest.fixture
    def saved(self, tiny_ddpm, tmp_path):
        """`(folder, trainer)` after a run with grids and checkpoints."""
        args = arguments(
            tmp_path / "out", grid_images=4, save_strategy="steps", save_steps=2, ema_decay=0.5, stability_weight=1e-4,
            isotropic_weight=1e-4, guard=True, caution=7.0, t_range=[0.0, 0.8],
        )  # fmt: skip
        trainer = trained(tiny_ddpm, args)
        trainer.save_model()
        return tmp_path / "out", trainer

    def test_what_is_where(self, saved, tmp_path):
        """Only the pipeline is published; beside it lies what is private, which no copy gets; checkpoints are the denoiser."""
        folder, trainer = saved
        published = [
            "README.md", "model_index.json", "pictures/after.png", "provenance.json", "scheduler/scheduler_config.json",
            "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        ]  # fmt: skip
        assert check_publishable(folder) == published
        private = {
            "reference.safetensors", "fisher.safetensors", "replay.safetensors", "fingerprint.key",
            "samples/before.png", "samples/after.png",
        }  # fmt: skip
        assert private <= set(files_below(folder / "_private"))
        assert not list(folder.rglob("*.partial"))
        assert not list(folder.rglob("training_args.bin"))
        checkpoint = set(files_below(folder / "checkpoint-2"))
        assert {"unet/diffusion_pytorch_model.safetensors", "ema.safetensors", "run.json"} <= checkpoint
        assert not {"README.md", "model_index.json"} & checkpoint
        trainer.save_model(str(tmp_path / "copy"))
        assert sorted(files_below(tmp_path / "copy")) == check_publishable(tmp_path / "copy")

    def test_the_original_s_pictures_are_published_if_asked_for(self, tiny_ddpm, tmp_path):
        trained(tiny_ddpm, arguments(tmp_path, grid_images=4, publish_before=True, max_steps=1)).save_model()
        assert {"pictures/before.png", "pictures/after.png"} <= set(check_publishable(tmp_path))

    def test_card(self, saved):
        folder, trainer = saved
        card = ModelCard.load(folder / "README.md")
        assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "unconditional-image-generation")
        assert {"hf_unlearn", "machine-unlearning", "vdu"} <= set(card.data.tags)
        assert "2510.04058" in card.text
        assert "the kind of images in 8 examples" in card.text
        lines = [line for line in card.text.splitlines() if line.startswith("| `") and " | " in line]
        settings = dict(line.strip("| ").split(" | ") for line in lines)
        assert settings["`forget_loss`"] == '"redirect"'
        assert settings["`anchor_precision`"] == '"fisher, scaled to a mean of one"'
        expected = {
            "caution": 7.0, "ema_decay": 0.5, "loss_weighting": "min_snr", "snr_gamma": 1.0, "stability_weight": 1e-4,
            "t_range": [0.0, 0.8], "trainable": ["all"], "own_samples": 16, "learning_rate": 0.01,
        }  # fmt: skip
        for name, value in expected.items():
            assert json.loads(settings[f"`{name}`"].replace("\\", "")) == value
        for name in ("bn", "fisher", "fisher_samples", "forget_accuracy", "forget_prompts", "replay_prompts"):
            assert f"`{name}`" not in settings
        assert str(folder.parent) not in card.content
        assert 'DDPMPipeline.from_pretrained("out")' in card.text
        assert "num_inference_steps=2" in card.text


class TestWhatIsTaken:
    """The same training, however the model is passed."""

    def test_every_form_of_the_same_model(self, tiny_ddpm, tmp_path):
        whole, alone = tmp_path / "whole", tmp_path / "alone"
        tiny_ddpm.save_pretrained(whole)
        tiny_ddpm.unet.save_pretrained(alone)
        scheduler = tiny_ddpm.scheduler
        forms = {
            "pipeline": {"pipeline": copy.deepcopy(tiny_ddpm)},
            "pipeline as model": {"model": copy.deepcopy(tiny_ddpm)},
            "folder": {"pipeline": str(whole)},
            "folder as model": {"model": str(whole)},
            "denoiser": {"model": copy.deepcopy(tiny_ddpm.unet), "noise_scheduler": scheduler},
            "denoiser's folder": {"model": str(alone), "noise_scheduler": scheduler},
        }
        # Plain steps of a size that is clipped: rounding errors stay what they are, while Adam would make steps of them.
        ends, plain = {}, {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 1.0, "max_steps": 2}
        for name, form in forms.items():
            trainer = VDUTrainer(**form, args=arguments(tmp_path / "out" / name, **plain), forget_dataset=images())
            trainer.train()
            assert trainer.pipeline.unet is trainer.model
            ends[name] = weights(trainer.model)
        assert distance(ends["pipeline"], weights(tiny_ddpm.unet)) > 0.1
        for name, end in ends.items():
            assert distance(end, ends["pipeline"]) < 1e-4, name

    @pytest.mark.parametrize(
        ("trainable", "parts"),
        [(["cross_attention"], [".attn2."]), (["mid_block.*", "conv_?n.bias"], ["mid_block.", "conv_in.bias"])],
        ids=["cross_attention", "patterns"],
    )
    def test_only_what_is_asked_for_changes(self, tiny_stable_diffusion, tmp_path, trainable, parts):
        before = {name: weights(getattr(tiny_stable_diffusion, name)) for name in ("unet", "vae", "text_encoder")}
        trained(tiny_stable_diffusion, prompted_arguments(tmp_path, trainable=trainable))
        after = {name: weights(getattr(tiny_stable_diffusion, name)) for name in before}
        assert same(before["vae"], after["vae"])
        assert same(before["text_encoder"], after["text_encoder"])
        changed = {name for name, value in after["unet"].items() if not value.equal(before["unet"][name])}
        asked_for = {name for name in before["unet"] if any(part in name for part in parts)}
        assert changed <= asked_for
        assert len(changed) > 0.5 * len(asked_for)  # a softmax over few tokens leaves some without gradient
