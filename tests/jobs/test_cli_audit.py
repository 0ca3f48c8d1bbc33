"""`hf-unlearn audit`: what is refused before anything is looked at, and the recipe's job on small models."""

import json

import pytest
from safetensors.torch import load_file, save_file

from hf_unlearn import cli
from hf_unlearn.examples.classifier import digits_model, digits_processor


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


@pytest.mark.slow
def test_the_recipe(work, capsys):
    """On the model of pbu_digits, which is made first; the five that never saw a 3 are trained on first use."""
    assert cli.main(["unlearn", "--config", "pbu_digits"]) == 0
    assert cli.main(["audit", "--config", "audit_digits"]) == 0
    report = json.loads((work / "outputs" / "audit_digits" / "audit.json").read_text())
    assert report["models"]["retrained 5"].endswith("without-3-1004")
    assert not report["failed"]
    assert len(report["results"]) >= 17
