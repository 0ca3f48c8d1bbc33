"""`hf-unlearn unlearn --method adapt_then_unlearn`: tiny twins of the recipes, run for real, and what may be wrong in one."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import yaml
from datasets import DatasetDict
from fresh import run_python
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForImageClassification

from hf_unlearn import DCGANDiscriminator, DCGANGenerator, GANPipeline, cli
from hf_unlearn.data import fingerprint, split_by_values
from hf_unlearn.examples import gan as small_gan
from hf_unlearn.examples.classifier import digits_processor
from hf_unlearn.jobs import adapt_then_unlearn, marking
from hf_unlearn.jobs import judging as generators
from hf_unlearn.metrics.features import ClassifierFeatures, features_of
from hf_unlearn.metrics.generation import percentage_unlearned
from hf_unlearn.modes import seeded_generator


RECIPES = Path(__file__).parents[2] / "recipes"
QUICK = ("--use_cpu", "true", "--disable_tqdm", "true", "--dataloader_pin_memory", "false", "--report_to", "none")
SHORT = (
    "--max_steps", "2", "--adapt_steps", "2", "--fisher_samples", "8", "--mark_samples", "40", "--own_samples", "40",
    "--guard_examples", "16", "--per_device_train_batch_size", "4", "--batch_size", "16", "--grid_images", "4",
    "--logging_steps", "1",
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


def tiny_gan():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {"sample_size": 8, "base_channels": 4}
        return GANPipeline(DCGANGenerator(latent_dim=4, **shape), DCGANDiscriminator(**shape))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of models, each saved once."""
    folder = tmp_path_factory.mktemp("models")
    tiny_gan().save_pretrained(folder / "gan")
    return folder


@pytest.fixture
def gan(models):
    return str(models / "gan")


@pytest.fixture
def save_classifier(tiny_resnet, models):
    """Saves a classifier of ten classes that sees several of them in what the untrained GAN draws, with its processor."""

    def save(name, seed):
        if (models / name).exists():
            return str(models / name)
        random = torch.Generator().manual_seed(seed)
        images = tiny_gan().draw(torch.randn(100, 4, generator=random))
        features = features_of(images, ClassifierFeatures(tiny_resnet, digits_processor()), name="any").values.float()
        weight = torch.randn(10, features.shape[1], generator=random) / features.std(0).clamp(min=1e-6)
        head = tiny_resnet.classifier[-1]
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(-weight @ features.mean(0))
        for part in (tiny_resnet, digits_processor()):
            part.save_pretrained(models / name)
        return str(models / name)

    return save


@pytest.fixture
def classifier(save_classifier):
    return save_classifier("judge", 1)


@pytest.fixture
def marker(save_classifier):
    """Another folder of the same: without training, two would see nothing in common."""
    return save_classifier("marker", 1)


@pytest.fixture
def recipe(tmp_path, gan):
    """Writes a recipe: keys that replace those of a complete one without feedback (None leaves one out, but `marks`)."""

    def write(**keys):
        complete = {"method": "adapt_then_unlearn", "model": gan, "output_dir": "out", "seed": 0}
        path = tmp_path / "recipe.yaml"
        keys = {key: value for key, value in (complete | keys).items() if value is not None or key == "marks"}
        path.write_text(yaml.safe_dump(keys))
        return str(path)

    return write


@pytest.fixture
def fails(capsys, work):
    """Runs a command that must fail in one line without a file, and returns that line."""

    def run(*arguments, code=2):
        capsys.readouterr()
        assert cli.main(["unlearn", *arguments]) == code
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("hf-unlearn: error: ")]
        assert err.splitlines()[-1:] == lines, err
        assert out == ""
        if code == 2:
            assert err.count("\n") == 1
        assert list(work.iterdir()) == []
        return lines[0].removeprefix("hf-unlearn: error: ")

    return run


def loaded(folder):
    return ClassifierFeatures(AutoModelForImageClassification.from_pretrained(folder).eval(), digits_processor())


def marked_samples(count):
    """The samples that are looked at, one after another."""
    latents = [torch.randn(4, generator=seeded_generator("cpu", 0, 12, number)) for number in range(count)]
    return tiny_gan().draw(torch.stack(latents), batch_size=16)


def measured_samples(pipeline, count):
    return pipeline.draw(torch.randn(count, 4, generator=seeded_generator("cpu", 0, 5)))


def frequent(classes):
    """The second most frequent class: neither everything nor nothing."""
    counts = classes.bincount()
    assert (counts > 0).sum() > 2, "the classifier of this test sees too few classes"
    return int(counts.argsort(descending=True)[1])


def forgot(images):
    """Whether the run in `out` says that it forgot exactly these."""
    key = Path("out/_private/fingerprint.key").read_bytes()
    return fingerprint([{"image": image} for image in images], key) in Path("out/README.md").read_text()


class TestRuns:
    def test_digits_recipe_with_figures(self, gan, marker, classifier, work, tmp_path, capsys):
        judge = loaded(classifier)
        before = judge.classify(measured_samples(tiny_gan(), 32))
        forgotten = frequent(before)
        looked_at = marked_samples(200)
        shows = loaded(marker).classify(looked_at) == forgotten
        last = int(shows.nonzero()[4])
        arguments = (
            "--config", str(RECIPES / "adapt_then_unlearn_digits.yaml"), "--model", gan, "--marker", marker,
            "--classifier", classifier, "--classes", str(forgotten), "--marks", "5", "--measure_samples", "32",
            "--output_dir", "out",
        )  # fmt: skip
        assert cli.main(["unlearn", *arguments, *SHORT, "--mark_samples", "200", *QUICK]) == 0
        shown = capsys.readouterr().out

        assert f"marks    5 undesired, {last + 1 - 5} clean" in shown
        assert forgot(looked_at[: last + 1][shows[: last + 1]])
        after = judge.classify(measured_samples(GANPipeline.from_pretrained("out"), 32))
        unlearned = percentage_unlearned(before, after, forgotten)
        assert "32 samples from the same noise, as judge sees them" in shown
        assert f"{forgotten} (forgotten)" in shown.replace("LABEL_", "")
        assert f"{unlearned.pul:.2f} % ({unlearned.low:.2f} to {unlearned.high:.2f})" in shown
        assert "other real images" in shown
        assert "never publish it" in shown
        code = "\n".join(line.removeprefix("    ") for line in shown.split("Load it:\n")[1].splitlines())
        assert 'GANPipeline.from_pretrained("out")' in code
        assert run_python(f"{code}\nprint(image.size)", cwd=work).stdout.splitlines()[-1] == "(8, 8)"

        card = ModelCard.load(work / "out/README.md")
        figures = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert set(figures) == {"share", "pul", "total_variation", "fid", "coverage", "undesired"}
        assert figures["pul"] == pytest.approx(unlearned.pul)
        assert figures["share"] == pytest.approx(100 * float((after == forgotten).float().mean()))
        assert torch.isfinite(torch.tensor(list(figures.values()))).all()
        assert {result.dataset_split for result in card.data.eval_results} == {"samples", "test"}
        assert card.data.eval_results[0].dataset_type == "digits"
        assert "![Samples](<pictures/after.png>)" in card.text
        assert "was asked to forget **class " in card.text
        assert str(tmp_path) not in card.content

        names = sorted(path.name for path in (work / "out").iterdir())
        assert names == ["README.md", "_private", "generator", "model_index.json", "pictures", "provenance.json"]
        assert json.loads((work / "out/model_index.json").read_text())["discriminator"] == [None, None]
        assert [path.name for path in (work / "out/pictures").iterdir()] == ["after.png"]
        assert sorted(path.name for path in (work / "out/_private/samples").iterdir()) == ["after.png", "before.png"]

    def test_the_marker_may_look_at_all(self, recipe, marker, capsys, caplog):
        """`marks: null`. And one classifier that marks and counts is warned of."""
        forgotten = frequent(loaded(marker).classify(marked_samples(200)))
        keys = {"marker": marker, "classifier": marker, "classes": [f"LABEL_{forgotten}"], "measure_samples": 4}
        path = recipe(**keys, marks=None)
        assert cli.main(["unlearn", "--config", path, *SHORT, "--mark_samples", "80", *QUICK]) == 0
        marks = capsys.readouterr().out.split("marks    ")[1].splitlines()[0].split()
        assert int(marks[0]) + int(marks[2]) == 80
        assert "classifier: is the one that marks too" in caplog.text

    def test_two_folders_of_images(self, recipe, tmp_path, digits, classifier):
        for name, part in zip(
            ("undesired_folder", "clean_folder"), split_by_values(digits["test"], "label", [3]), strict=True
        ):
            part.select(range(12)).save_to_disk(tmp_path / name)
        folders = {name: str(tmp_path / name) for name in ("undesired_folder", "clean_folder")}
        path = recipe(**folders, classifier=classifier, classes=["LABEL_3"], measure_samples=8)
        assert cli.main(["unlearn", "--config", path, *SHORT, *QUICK]) == 0
        card = Path("out/README.md").read_text()
        assert "what 12 marked samples show" in card
        assert "| `clean` | 12 |" in card

    def test_a_sheet_and_then_its_numbers(self, recipe, work, capsys, monkeypatch):
        sheet = Mock(wraps=marking.image_grid)
        monkeypatch.setattr(marking, "image_grid", sheet)
        path = recipe(looked_at=20)
        assert cli.main(["unlearn", "--config", path, *SHORT, *QUICK]) == 0
        out = capsys.readouterr().out
        assert len(out.splitlines()) == 1
        assert out.startswith("20 samples are in out/_private/samples_to_mark.png: set undesired to the numbers ")
        assert [str(file) for file in sorted(work.rglob("*")) if file.is_file()] == [
            str(work / "out/_private/samples_to_mark.png")
        ]
        assert Image.open(work / "out/_private/samples_to_mark.png").height > 100

        numbers = [7, 0, 12, 13, 18]
        assert cli.main(["unlearn", "--config", path, "--undesired", *map(str, numbers), *SHORT, *QUICK]) == 0
        assert "marks    5 undesired, 15 clean" in capsys.readouterr().out
        sheet.assert_called_once()
        (images, captions, _), expected = sheet.call_args.args, marked_samples(20)
        assert list(captions) == [str(number) for number in range(20)]
        torch.testing.assert_close(torch.as_tensor(images)[..., 0], (expected[:, 0] + 1) / 2, rtol=0, atol=1e-6)
        assert forgot(expected[sorted(numbers)])

    def test_paper_preset(self, recipe):
        path = recipe(preset="paper", undesired=[1, 2], looked_at=20)
        quick = [w for pair in zip(SHORT[::2], SHORT[1::2], strict=True) if pair[0] != "--own_samples" for w in pair]
        assert cli.main(["unlearn", "--config", path, *quick, *QUICK]) == 0
        card = Path("out/README.md").read_text()
        assert '"mean_mse"' in card
        assert "| `negative_share` | 0.0 |" in card
        assert "| `own_samples` | 0 |" in card

    def test_a_model_of_ours_is_trained_on_first_use(self, recipe, tmp_path, monkeypatch):
        tiny = small_gan.Recipe("digits", size=8, base_channels=4, steps=2, latent_dim=4)
        monkeypatch.setitem(small_gan.NAMES, "digits-gan", tiny)
        path = recipe(model="digits-gan", undesired=[1, 2], looked_at=12)
        assert cli.main(["unlearn", "--config", path, *SHORT, *QUICK]) == 0
        assert (tmp_path / "cache/hf_unlearn/digits-gan-0/model_index.json").is_file()
        assert Path("out/model_index.json").is_file()

    def test_fashion_recipe_writes_its_sheet(self, gan, work):
        config = ("--config", str(RECIPES / "adapt_then_unlearn_fashion_mnist.yaml"), "--model", gan)
        assert cli.main(["unlearn", *config, "--looked_at", "4", *QUICK]) == 0
        sheet = "outputs/adapt_then_unlearn_fashion_mnist/_private/samples_to_mark.png"
        assert [path for path in work.rglob("*") if path.is_file()] == [work / sheet]

    def test_goes_on_from_a_checkpoint(self, recipe):
        keys = {"undesired": [1, 2], "looked_at": 12, "save_strategy": "steps", "save_steps": 1, "guard": False}
        assert cli.main(["unlearn", "--config", recipe(**keys), *SHORT, *QUICK]) == 0
        again = ("--resume_from_checkpoint", "true", "--max_steps", "3")
        assert cli.main(["unlearn", "--config", recipe(**keys), *SHORT, *again, *QUICK]) == 0
        assert Path("out/checkpoint-3/gan.safetensors").is_file()
        assert "| optimiser steps | 3 |" in Path("out/README.md").read_text()


def test_the_classifier_of_digits_that_marks_is_not_the_one_that_counts(monkeypatch, save_classifier):
    folders = {seed: Path(save_classifier(f"seed-{seed}", seed)) for seed in (0, 1)}
    monkeypatch.setattr(generators, "made_once", lambda config, name, seed=0: folders[seed])
    alone = SimpleNamespace(world_size=1)
    marker = generators.classifier_of("digits", alone, argument="marker", seed=adapt_then_unlearn.MARKER_SEED)
    assert (marker.name, generators.classifier_of("digits", alone).name) == ("seed-1", "seed-0")


FEEDBACK = {"undesired": [1, 2]}


class TestBadRecipes:
    """Exit code 2, one line, nothing written."""

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"marke": "digits"}, "{path}: unknown key 'marke'; did you mean 'marker'?"),
            ({"forget_column": "label"}, "{path}: unknown key 'forget_column'; hf-unlearn unlearn --method adapt_then_unlearn --help"),
            ({"preset": "papers"}, "{path}: preset='papers': must be one of "),
            ({"repulsion": "l2"}, "{path}: repulsion='l2': must be one of "),
            ({"undesired": ["a"]}, "{path}: undesired: 'a' is not allowed; expected int"),
            ({"model": None}, "model: missing; set it to 'digits-gan', 'fashion-mnist-gan', a folder, or an id on the Hub"),
            ({"output_dir": None}, "output_dir: missing; set it to the folder that gets the unlearned model"),
            ({"marker": "digits"}, "classes: missing; list the classes that marker is to mark, as in [3]"),
            ({"marker": "digits", "classes": [3], "undesired": [1]}, "undesired: given beside marker; keep one of them"),
            ({"marker": "digits", "classes": [3], "undesired_folder": "x", "clean_folder": "y"},
             "clean_folder: given beside marker; keep one of them"),
            ({"undesired_folder": "x", "clean_folder": "y", "undesired": [1]}, "undesired: given beside undesired_folder; keep one of them"),
            ({"undesired_folder": "x"}, "clean_folder: missing, which undesired_folder needs; set it to a folder written by save_to_disk"),
            ({"clean_folder": "x"}, "undesired_folder: missing, which clean_folder needs"),
            ({"marker": "digits", "classes": [3], "marks": 0}, "marks=0: must be ≥ 1"),
            ({"looked_at": 1}, "looked_at=1: must be ≥ 2"),
            ({"undesired": [200]}, "undesired: 200 is not on the sheet, whose samples are 0 to 199; correct it"),
            ({"undesired": [-1]}, "undesired: -1 is not on the sheet"),
            ({"undesired": [0, 1], "looked_at": 2}, "undesired: names all 2 samples, none is left as clean"),
            (FEEDBACK | {"measure_samples": 1}, "measure_samples=1: must be ≥ 2"),
            (FEEDBACK | {"classes": [3]}, "classifier: missing, which classes needs"),
            (FEEDBACK | {"eval_split": "test"}, "dataset: missing, which eval_split needs"),
            (FEEDBACK | {"dataset": "digits"}, "eval_split: missing, which dataset needs"),
            (FEEDBACK | {"dataset_revision": "main"}, "dataset: missing, which dataset_revision needs"),
            (FEEDBACK | {"dataset": "digits", "eval_split": "test"}, "classifier: missing, which eval_split needs"),
            (FEEDBACK | {"dataset": "digits", "eval_split": "test", "classifier": "digits"},
             "classes: missing, which eval_split needs"),
            ({"negative_share": 1}, "{path}: negative_share=1.0: must be in [0, 1)"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
    )  # fmt: skip
    def test_keys(self, recipe, fails, keys, message):
        path = recipe(**keys)
        assert fails("--config", path, "--use_cpu", "true").startswith(message.format(path=path))

    def test_the_original_is_not_overwritten(self, recipe, fails, gan):
        line = fails("--config", recipe(output_dir=gan))
        assert line == f"output_dir: {gan!r} holds the original model; choose another folder"

    def test_the_method(self, fails):
        line = fails("--method", "adapt_then_unlern")
        assert line.endswith(", adapt_then_unlearn; did you mean 'adapt_then_unlearn'?")


class TestBadData:
    """Exit code 1: what only the data or the model can tell; one line, nothing trained or written."""

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            (FEEDBACK | {"model": "nobody/nothing"}, "model='nobody/nothing': neither a folder with a GANPipeline nor an id on the Hub ("),
            ({"marker": "nobody/nothing", "classes": [3]}, "marker='nobody/nothing': neither a folder with a classifier"),
            (FEEDBACK | {"classifier": "nobody/nothing"}, "classifier='nobody/nothing': neither a folder with a classifier"),
            ({"undesired_folder": "here", "clean_folder": "there"}, "undesired_folder: 'here' is no dataset saved with save_to_disk"),
            # Said at the first call, not when everything is marked.
            ({"classifier": "nobody/nothing"}, "classifier='nobody/nothing': "),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
    )  # fmt: skip
    def test_said_before_training(self, recipe, fails, keys, message):
        assert fails("--config", recipe(**keys), *SHORT, *QUICK, code=1).startswith(message)

    def test_classes_of_another_classifier(self, recipe, fails, marker, tmp_path):
        path = recipe(marker=marker, classes=["three"])
        line = fails("--config", path, *SHORT, *QUICK, code=1)
        assert line.startswith(f"classes: 'three' is no class of marker={marker!r}; choose among 0: LABEL_0, 1: ")
        shutil.copytree(marker, marker := str(tmp_path / "marker"))
        config = json.loads((tmp_path / "marker/config.json").read_text())
        names = ["1", "0", *map(str, range(2, 10))]  # a name that is another class's number
        config["id2label"] = {str(index): name for index, name in enumerate(names)}
        config["label2id"] = {name: index for index, name in enumerate(names)}
        (tmp_path / "marker/config.json").write_text(json.dumps(config))
        line = fails("--config", recipe(marker=marker, classes=[0]), *SHORT, *QUICK, code=1)
        assert line.startswith("classes: '0' may be two classes of marker=")

    def test_too_few_samples_or_all_show_it(self, recipe, fails, marker):
        forgotten = frequent(loaded(marker).classify(marked_samples(40)))
        line = fails("--config", recipe(marker=marker, classes=[forgotten], marks=39), *SHORT, *QUICK, code=1)
        assert line.startswith(f"marks: 39 are wanted, and marker={marker!r} sees classes in ")
        assert line.endswith(" of 40 samples; set a smaller number, or raise mark_samples")
        line = fails("--config", recipe(marker=marker, classes=[*range(10)], marks=5), *SHORT, *QUICK, code=1)
        assert line.startswith(f"classes: marker={marker!r} sees them in all of 5 samples")

    def test_reference_images(self, recipe, fails, classifier, digits, tmp_path):
        """What the judge cannot compare with."""
        few = digits["test"].select(range(60))
        wrong = {
            "large": few.map(lambda row: {"image": row["image"].resize((9, 9))}),
            "no_labels": few.remove_columns("label"),
            "no_images": few.remove_columns("image"),
            "words": few.remove_columns("label").add_column("label", ["nine"] * 60),
        }
        DatasetDict(wrong).save_to_disk(tmp_path / "data")
        keys = FEEDBACK | {"dataset": str(tmp_path / "data"), "classifier": classifier, "classes": [3]}
        for split, message in {
            "large": "eval_split: an image is 9 × 9, the model draws 8 × 8",
            "no_labels": "eval_split: has no labels, so which images are of other classes is not known",
            "no_images": "eval_split: has no images; name the column one of ",
            "words": "eval_split: has the label 'nine'; make it the number that the classifier gives the class",
            "dev": "eval_split: 'dev' is not in the dataset",
        }.items():
            line = fails("--config", recipe(**keys, eval_split=split), *SHORT, *QUICK, code=1)
            assert line.startswith(message)

    def test_images_that_do_not_fit(self, recipe, fails, digits, tmp_path):
        few = digits["test"].select(range(12))
        few.save_to_disk(tmp_path / "undesired_folder")
        for name, clean_folder, message in (
            ("large", few.map(lambda row: {"image": row["image"].resize((9, 9))}), "clean: an image is 9 × 9"),
            ("no_images", few.remove_columns("image"), "clean: has no images; name the column one of "),
            ("splits", DatasetDict({"a": few, "b": few}), f"clean_folder: '{tmp_path}/splits' has the splits a, b; save one"),
        ):  # fmt: skip
            clean_folder.save_to_disk(tmp_path / name)
            path = recipe(undesired_folder=str(tmp_path / "undesired_folder"), clean_folder=str(tmp_path / name))
            assert fails("--config", path, *SHORT, *QUICK, code=1).startswith(message)
