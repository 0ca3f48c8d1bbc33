"""`hf-unlearn unlearn --method vdu`: tiny twins of the recipes, run for real, and what may be wrong in one."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDPMPipeline, StableDiffusionPipeline
from huggingface_hub import ModelCard
from transformers import ResNetForImageClassification

from hf_unlearn import cli
from hf_unlearn.examples import ddpm as small_ddpm
from hf_unlearn.examples.classifier import digits_processor
from hf_unlearn.metrics.features import ClassifierFeatures
from hf_unlearn.metrics.generation import percentage_unlearned
from hf_unlearn.unlearning.diffusion.drawing import generate


RECIPES = Path(__file__).parents[2] / "recipes"
QUICK = ("--use_cpu", "true", "--disable_tqdm", "true", "--dataloader_pin_memory", "false", "--report_to", "none")
SHORT = (
    "--max_steps", "2", "--own_samples", "12", "--num_inference_steps", "2", "--grid_images", "1",
    "--per_device_train_batch_size", "4", "--guard_steps", "1", "--logging_steps", "1",
)  # fmt: skip


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """An empty working directory, so that anything written by mistake is seen."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_UNLEARN_DEBUG", raising=False)
    return folder


@pytest.fixture
def ddpm(tiny_ddpm, tmp_path):
    tiny_ddpm.save_pretrained(tmp_path / "ddpm")
    return str(tmp_path / "ddpm")


@pytest.fixture
def classifier(tiny_resnet, tmp_path):
    """Folder of a small untrained classifier of ten classes, with its processor."""
    tiny_resnet.save_pretrained(tmp_path / "classifier")
    digits_processor().save_pretrained(tmp_path / "classifier")
    return str(tmp_path / "classifier")


@pytest.fixture
def recipe(tmp_path, ddpm):
    """Writes a recipe: keys that replace those of a complete one (None leaves one out)."""

    def write(**keys):
        complete = {
            "method": "vdu", "model": ddpm, "dataset": "digits", "forget_column": "label", "forget_values": [3],
            "output_dir": "out",
        }  # fmt: skip
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in (complete | keys).items() if value is not None}))
        return str(path)

    return write


@pytest.fixture
def fails(capsys, work):
    """Runs a command that must fail in one line without a model, and returns that line."""

    def run(*arguments, code=2):
        capsys.readouterr()
        assert cli.main(["unlearn", *arguments]) == code
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("hf-unlearn: error: ")]
        assert err.splitlines()[-1:] == lines, err
        if code == 2:
            assert (out, err.count("\n")) == ("", 1)
            assert list(work.iterdir()) == []
        assert not list(work.rglob("model_index.json"))
        return lines[0].removeprefix("hf-unlearn: error: ")

    return run


class TestRuns:
    def test_digits_recipe_with_figures(self, ddpm, classifier, work, capsys):
        # The class that the untrained classifier sees most often in what the untrained model draws, but not always.
        kind, draw = ClassifierFeatures.from_pretrained(classifier), {"seed": 5, "num_inference_steps": 2}
        before = kind.classify(generate(DDPMPipeline.from_pretrained(ddpm), 16, **draw))
        forgotten = int(before.mode().values)
        assert len(before.unique()) > 1
        arguments = (
            "--config", str(RECIPES / "vdu_ddpm_digits.yaml"), "--model", ddpm, "--classifier", classifier,
            "--forget_values", str(forgotten), "--measure_samples", "16", "--output_dir", "out", "--forget_limit", "20",
            "--utility_tolerance", "1e9",
        )  # fmt: skip
        assert cli.main(["unlearn", *arguments, *SHORT, *QUICK]) == 0
        shown = capsys.readouterr().out
        after = kind.classify(generate(DDPMPipeline.from_pretrained("out"), 16, **draw))
        pul = percentage_unlearned(before, after, forgotten).pul
        assert "16 samples from the same noise, as classifier sees them" in shown
        assert f"{forgotten} (forgotten)" in shown.replace("LABEL_", "")
        assert f"{pul:.2f} %" in shown
        assert "other real images" in shown
        assert 'DDPMPipeline.from_pretrained("out")' in shown
        assert "never publish it" in shown
        card = ModelCard.load(work / "out" / "README.md")
        figures = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert set(figures) == {"share", "pul", "total_variation", "fid", "denoising_error", "divergence"}
        assert figures["pul"] == pytest.approx(pul)
        assert figures["share"] == pytest.approx(100 * float((after == forgotten).float().mean()))
        assert card.data.eval_results[0].dataset_type == "digits"
        assert f"was asked to forget **class {forgotten}: the kind of images in 20 examples**" in card.text
        assert "![Samples](<pictures/after.png>)" in card.text
        assert (work / "out/pictures/after.png").is_file()
        assert torch.isfinite(torch.tensor(list(figures.values()))).all()

    def test_stable_diffusion_recipe(self, tiny_stable_diffusion, tmp_path, capsys):
        folder = tmp_path / "sd"
        tiny_stable_diffusion.save_pretrained(folder)
        arguments = ("--model", str(folder), "--forget_samples", "3", "--output_dir", "out", "--bf16", "false")
        arguments += ("--learning_rate", "0.01", "--batch_size", "8")
        config = str(RECIPES / "vdu_stable_diffusion.yaml")
        assert cli.main(["unlearn", "--config", config, *arguments, *SHORT, *QUICK]) == 0
        assert 'StableDiffusionPipeline.from_pretrained("out")' in capsys.readouterr().out
        loaded, original = StableDiffusionPipeline.from_pretrained("out"), tiny_stable_diffusion.unet
        changed = {name for name, p in loaded.unet.named_parameters() if not p.equal(original.get_parameter(name))}
        assert changed
        assert all(".attn2." in name for name in changed)
        card = Path("out/README.md").read_text()
        assert "Gogh" not in card
        assert "Monet" not in card
        assert str(tmp_path) not in card

    def test_paper_preset(self, ddpm, recipe, tiny_ddpm, tmp_path, work):
        for step in (1, 2):
            with torch.no_grad():
                tiny_ddpm.unet.conv_in.weight.add_(0.01)
            tiny_ddpm.unet.save_pretrained(tmp_path / "run" / f"checkpoint-{step}" / "unet")
        path = recipe(preset="paper", checkpoints=[str(tmp_path / "run")], learning_rate=1e-5, forget_limit=8)
        without_replay = SHORT[:2] + SHORT[4:]
        assert cli.main(["unlearn", "--config", path, *without_replay, *QUICK]) == 0
        card = (work / "out/README.md").read_text()
        assert "inverse variance over 2 checkpoints" in card
        assert '"ascent"' in card
        assert not (work / "out/_private/replay.safetensors").exists()

    def test_a_model_of_ours_is_trained_on_first_use_and_goes_on_from_a_checkpoint(
        self, recipe, tmp_path, monkeypatch
    ):
        tiny = small_ddpm.Recipe("digits", size=8, channels=(16, 16), steps=2, checkpoints=1)
        monkeypatch.setitem(small_ddpm.NAMES, "digits-ddpm", tiny)
        keys = {"forget_limit": 8, "save_strategy": "steps", "save_steps": 1, "utility_tolerance": 1e9}
        path = recipe(model="digits-ddpm", **keys)
        assert cli.main(["unlearn", "--config", path, *SHORT, *QUICK]) == 0
        assert (tmp_path / "cache/hf_unlearn/digits-ddpm-0/model_index.json").is_file()
        assert json.loads(Path("out/model_index.json").read_text())["_class_name"] == "DDPMPipeline"
        again = ("--resume_from_checkpoint", "true", "--max_steps", "3")
        assert cli.main(["unlearn", "--config", path, *SHORT, *again, *QUICK]) == 0
        assert Path("out/checkpoint-3/run.json").is_file()


class TestBadRecipes:
    """Exit code 2, one line, nothing written."""

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"cautoin": 2}, "{path}: unknown key 'cautoin'; did you mean 'caution'?"),
            ({"preset": "papers"}, "{path}: preset='papers': must be one of paper"),
            ({"t_range": "all"}, "{path}: t_range: 'all' is not allowed; expected float"),
            ({"forget_column": None, "forget_values": None}, "forget_column: missing; say what to forget by "),
            ({"forget_prompts": ["a photo"]}, "forget_prompts: given beside rows to forget; keep one of them"),
            ({"forget_ids": [1]}, "forget_ids: given beside forget_column; keep one of them"),
            ({"forget_values": None}, "forget_values: missing"),
            ({"model": None}, "model: missing"),
            ({"dataset": None}, "dataset: missing"),
            ({"dataset": None, "forget_column": None, "forget_values": None, "forget_prompts": ["a"], "retain": True},
             "dataset: missing, which retain needs"),
            ({"measure_samples": 1}, "measure_samples=1: must be ≥ 2"),
            ({"forget_limit": 0}, "forget_limit=0: must be ≥ 1"),
            ({"gamma": 2}, "{path}: gamma=2.0: must be in (0, 1)"),
            ({"forget": "class"}, "{path}: unknown key 'forget'; only models with labels or tokens have it; leave it out"),
            ({"retain_loss": "kl"}, "{path}: unknown key 'retain_loss'; only models with labels or tokens have it; leave it out"),
            ({"fisher_weight": 1}, "{path}: unknown key 'fisher_weight'; it is called 'stability_weight' now"),
            ({"output_dir": None}, "output_dir: missing"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
    )  # fmt: skip
    def test_keys(self, recipe, fails, keys, message):
        path = recipe(**keys)
        assert fails("--config", path).startswith(message.format(path=path))

    def test_the_original_is_not_overwritten(self, recipe, fails, ddpm):
        line = fails("--config", recipe(output_dir=ddpm))
        assert line == f"output_dir: {ddpm!r} holds the original model; choose another folder"


class TestBadData:
    """Exit code 1: what only the data or the model can tell; one line and no model."""

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"model": "nobody/nothing"}, "pipeline='nobody/nothing': neither a folder with a pipeline nor an id"),
            ({"classifier": "nobody/nothing"}, "classifier='nobody/nothing': neither a folder with a classifier and its image processor"),
            ({"dataset": "nobody/nothing"}, "dataset='nobody/nothing': "),
            ({"eval_split": "dev"}, "eval_split: 'dev' is not in the dataset"),
            ({"trainable": ["lora"]}, "trainable: UNet2DModel takes no LoRA in diffusers"),
            ({"forget_column": None, "forget_values": None, "dataset": None, "forget_prompts": ["a"]},
             "forget_prompts: this model takes no prompts"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
    )  # fmt: skip
    def test_said_before_training(self, recipe, fails, keys, message):
        assert fails("--config", recipe(**keys), *SHORT, *QUICK, code=1).startswith(message)

    def test_reference_images_that_do_not_fit(self, recipe, fails, classifier, digits, tmp_path, work):
        """Said before training and not after it."""
        from datasets import DatasetDict

        large = digits["test"].select(range(60)).map(lambda row: {"image": row["image"].resize((9, 9))})
        DatasetDict({"train": digits["train"].select(range(60)), "test": large}).save_to_disk(tmp_path / "data")
        assert 3 in large["label"]
        path = recipe(dataset=str(tmp_path / "data"), classifier=classifier, eval_split="test", measure_samples=4)
        line = fails("--config", path, *SHORT, *QUICK, code=1)
        assert line.startswith("eval_split: an image is 9 × 9, the model draws 8 × 8")
        assert not (work / "out/_private/reference.safetensors").exists()

    def test_a_classifier_of_other_classes(self, recipe, fails, tiny_resnet, tmp_path, work):
        tiny_resnet.config.num_labels = 3
        ResNetForImageClassification(tiny_resnet.config).save_pretrained(tmp_path / "three")
        digits_processor().save_pretrained(tmp_path / "three")
        path = recipe(classifier=str(tmp_path / "three"), measure_samples=4)
        line = fails("--config", path, *SHORT, *QUICK, code=1)
        assert line.endswith("has 3 classes, so none is the dataset's 3")
        assert not (work / "out/_private/reference.safetensors").exists()
