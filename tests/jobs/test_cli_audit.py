"""`hf-unlearn audit`: what is refused before anything is looked at, and the recipe's job on small models."""

import json

import pytest
import torch
from datasets import DatasetDict
from gan_data import pipeline as gan
from safetensors.torch import load_file, save_file
from text_to_image_data import tiny
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessorPil,
)

from hf_unlearn import cli
from hf_unlearn.examples.classifier import digits_model, digits_processor, train_classifier
from hf_unlearn.examples.datasets import digits
from hf_unlearn.examples.facts import facts_data
from hf_unlearn.examples.opinions import texts_of, train_tokenizer


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_UNLEARN_DEBUG", raising=False)
    return tmp_path


@pytest.fixture
def untrained(tmp_path):
    """Folders of digits classifiers that never saw anything, by seed."""

    def folder(seed, bias=None):
        path = tmp_path / f"model-{seed}"
        digits_model(seed).save_pretrained(path)
        digits_processor().save_pretrained(path)
        if bias is not None:  # always says class 3
            tensors = load_file(path / "model.safetensors")
            tensors["classifier.1.bias"][3] = bias
            save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return str(path)

    return folder


WORDS = ("--dataset", "digits", "--forget_column", "label", "--forget_values", "3", "--output_dir", "out")


def test_a_report_is_written_and_what_came_out_is_said(untrained, work, capsys):
    references = [untrained(seed) for seed in (2, 3, 4)]
    words = (
        "--model",
        untrained(0, bias=1e4),
        "--original",
        untrained(1),
        "--retrained",
        *references,
        "--checks",
        "forget_accuracy",
        "quantised",
    )
    assert cli.main(["audit", *words, *WORDS]) == 0
    said = capsys.readouterr().out
    assert "109 forget" in said
    assert "not forgotten: Accuracy on the forget data: 100.0 %" in said
    assert "out/audit.html" in said
    report = json.loads((work / "out" / "audit.json").read_text())
    assert report["verdict"]["word"] == "not forgotten"
    assert [one["name"] for one in report["results"]] == ["forget_accuracy", "quantised"]
    page = (work / "out" / "audit.html").read_text()
    assert "not forgotten" in page
    assert 'src="data:image/png;base64,' in page
    assert "http" not in page.replace("https://arxiv.org/abs/", "")  # needs no other file


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "model: missing"),
        (("--model", "a", *WORDS[2:]), "dataset: missing"),
        (("--model", "a", *WORDS[:-2]), "output_dir: missing"),
        (("--model", "a", "--dataset", "digits", "--output_dir", "out"), "forget_column: missing"),
        (("--model", "a", *WORDS[:4], *WORDS[6:]), "forget_values: missing"),
        (("--model", "a", "--original", "a", *WORDS), "original: is the audited model itself"),
        (("--model", "a", "--retrain", "3", *WORDS), "retrain: only small models are trained here"),
        (("--model", "a", "--seed", "-1", *WORDS), "seed=-1"),
        (("--model", "a", "--check", "quick", *WORDS), "unknown key 'check'"),
        (("--model", "a", *WORDS, "--forget_prompts", "a three"), "forget_prompts: given beside forget_column"),
        (
            ("--model", "a", "--forget_prompts", "a three", "--output_dir", "out"),
            "marker: missing, which forget_prompts needs",
        ),
        (("--model", "a", "--forget_prompts", "three", "--marker", "b", "--output_dir", "out"), "classes: missing"),
        (
            ("--model", "a", "--forget_prompts", "", "--marker", "b", "--output_dir", "out"),
            "forget_prompts: has nothing",
        ),
        (("--model", "a", "--classes", "3", *WORDS), "marker: missing, which classes needs"),
        (
            ("--model", "a", "--num_inference_steps", "0", "--marker", "b", *WORDS),
            "num_inference_steps=0: must be ≥ 1",
        ),
        (
            ("--model", "a", "--original", "digits-ddpm", *WORDS),
            "marker: missing, which sees what 'digits-ddpm' draws",
        ),
        (("--model", "a", "--marker", "b", "--chat", *WORDS), "chat: given beside marker"),
        (("--model", "a", "--system_prompt", "Be kind.", *WORDS), "chat: missing, which system_prompt needs"),
        (
            (
                "--model",
                "a",
                "--forget_dataset",
                "b",
                "--retain_dataset",
                "c",
                "--retain_prompts",
                "d",
                "--marker",
                "e",
                *WORDS[-2:],
            ),
            "retain_prompts: given beside retain_dataset",
        ),
        (
            ("--model", "a", "--original", "facts", "--retrain", "3", "--forget_dataset", "b", *WORDS[-2:]),
            "retrain: models of 'facts'",
        ),
        (
            ("--model", "a", "--original", "coloured-digits", "--marker", "coloured-digits", "--retrain", "1", *WORDS),
            "(dataset: coloured-digits, forget_column: digit or colour or background)",
        ),
        (
            (
                "--model",
                "a",
                "--original",
                "digits-gan",
                "--marker",
                "b",
                "--retrain",
                "2",
                *WORDS[:-3],
                "3",
                "4",
                *WORDS[-2:],
            ),
            "trained without one class",
        ),
    ],
)
def test_keys_that_are_refused(words, message, capsys, work):
    assert cli.main(["audit", *words]) == 2
    assert message in capsys.readouterr().err
    assert list(work.iterdir()) == []


def test_what_only_the_models_show_is_one_line(work, capsys):
    assert cli.main(["audit", "--model", "nothing", *WORDS]) == 1
    error = capsys.readouterr().err
    assert "nothing" in error
    assert error.count("\n") == 1
    assert not (work / "out").exists()


# The recipes of the other families, on small models


def audited(*words):
    assert cli.main(["audit", *words, "--retrain", "0", "--output_dir", "out"]) == 0
    with open("out/audit.json") as file:
        return json.load(file)


def five(save):
    """Five folders of models by seed, the keys that name them, and who is who."""
    folders = [f"model-{seed}" for seed in range(5)]
    for seed, folder in enumerate(folders):
        save(seed, folder)
    return ("--model", folders[0], "--original", folders[1], "--retrained", *folders[2:])


def test_the_recipe_of_a_language_model(work, capsys):
    data = facts_data(20, held_out=4, general=4)
    DatasetDict({name: data[name].select(range(8)) for name in ("forget", "retain", "held_out")}).save_to_disk("data")
    tokenizer = train_tokenizer(texts_of(data["train"]), 400)

    def save(seed, folder):
        torch.manual_seed(seed)
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        LlamaForCausalLM(
            LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=192, **shape, **special)
        ).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    rows = ("--forget_dataset", "data::forget", "--retain_dataset", "data::retain", "--test_dataset", "data::held_out")
    report = audited(
        "audit_facts", *five(save), *rows, "--checks", "answer", "probability", "membership_min_k", "utility_lost"
    )
    assert report["family"] == "language model"
    assert report["sizes"] == {"forget": 8, "retain": 8, "test": 8}
    assert list(report["models"].values()) == [f"model-{seed}" for seed in range(5)]
    assert [one["name"] for one in report["results"]] == ["answer", "probability", "membership_min_k", "utility_lost"]
    assert report["residual"]["references"] == 3
    assert report["failed"] == report["skipped"] == {}
    assert "more than 8 forget examples" in capsys.readouterr().out


@pytest.fixture(scope="module")
def digits_marker(tmp_path_factory):
    """Folder of a classifier that knows digits well enough."""
    folder = tmp_path_factory.mktemp("marker") / "digits"
    train_classifier(digits()["train"], folder, num_train_epochs=3, progress=False)
    return str(folder)


@pytest.mark.parametrize("kind", [pytest.param("ddpm", marks=pytest.mark.slow), "gan"])
def test_the_recipe_of_a_generator(kind, digits_marker, tiny_ddpm, work, capsys):
    def save(seed, folder):
        pipe = gan(seed=seed) if kind == "gan" else tiny_ddpm
        if kind == "ddpm":
            with torch.no_grad():
                pipe.unet.conv_out.bias.fill_(0.1 * seed)
        pipe.save_pretrained(folder)

    steps = ("--num_inference_steps", "2" if kind == "ddpm" else "null")
    models = five(save)
    report = audited(
        "audit_ddpm_digits", *models, *steps, "--marker", digits_marker, "--checks", "drawn", "others_distance"
    )
    assert report["family"] == "generator"
    assert report["sizes"]["forget"] == 109
    assert [one["name"] for one in report["results"]] == ["drawn", "others_distance"]
    assert (report["residual"]["loss"], report["residual"]["references"]) != (None, 0)
    if kind == "gan":
        words = ("audit_ddpm_digits", *models, "--marker", digits_marker, "--retrain", "0", "--output_dir", "new")
        assert cli.main(["audit", *words]) == 1
        assert "drawing: GANPipeline takes no 'num_inference_steps'; leave it out" in capsys.readouterr().err
        assert not (work / "new").exists()


def test_the_recipe_of_a_text_to_image_pipeline_with_prompts_alone(work, capsys):
    torch.manual_seed(0)
    shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 4}
    ResNetForImageClassification(ResNetConfig(**shape)).save_pretrained("marker")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained("marker")

    def save(seed, folder):
        pipe = tiny("sd")
        with torch.no_grad():
            pipe.unet.conv_out.bias.add_(0.1 * seed)
        pipe.save_pretrained(folder)

    nothing = [word for key in ("dataset", "forget_column", "forget_values") for word in (f"--{key}", "null")]
    prompts = ("--forget_prompts", "a cat", "a red cat on the left", "--retrain", "0", "--retain_prompts", "a dog")
    words = ("--num_inference_steps", "2", "--marker", "marker", "--classes", "2", "--checks", "asked", "guidance")
    report = audited("audit_digits_t2i", *five(save)[:4], *nothing, *prompts, *words)
    assert report["forgotten"] == "what 'a cat' asks for"
    assert [one["name"] for one in report["results"]] == ["asked", "guidance"]
    assert report["residual"]["loss"] is None  # prompts have none
    for missing, message in (("--classes", "LABEL_9"), ("--marker", "nowhere")):
        place = words.index(missing) + 1
        changed = (*words[:place], message, *words[place + 1 :])
        given = ("audit_digits_t2i", *five(save)[:4], *nothing, *prompts, *changed, "--output_dir", "new")
        assert cli.main(["audit", *given]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"hf-unlearn: error: {missing.removeprefix('--')}")
        assert message in error
        assert not (work / "new").exists()


def test_a_pipeline_without_a_marker_is_told_before_anything_is_loaded(work, capsys):
    gan().save_pretrained("pipe")
    assert cli.main(["audit", "--model", "pipe", *WORDS]) == 1
    assert "marker: missing, which sees what the pipeline 'pipe' draws" in capsys.readouterr().err


@pytest.mark.slow
def test_the_recipe(work, capsys):
    """On the model of pbu_digits, which is made first; the five that never saw a 3 are trained on first use."""
    assert cli.main(["unlearn", "--config", "pbu_digits"]) == 0
    assert cli.main(["audit", "--config", "audit_digits"]) == 0
    report = json.loads((work / "outputs" / "audit_digits" / "audit.json").read_text())
    assert report["models"]["retrained 5"].endswith("without-3-1004")
    assert not report["failed"]
    assert len(report["results"]) >= 17
