"""`hf-unlearn estimate`: what it adds up, of a real short run with a tiny model; and nothing is left of that."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from hf_unlearn import cli
from hf_unlearn.examples.classifier import digits_processor
from hf_unlearn.jobs import watching
from hf_unlearn.jobs.estimate import _disk, _time
from hf_unlearn.jobs.watching import Clock, Watch, held_by


QUICK = ("--use_cpu", "true", "--dataloader_pin_memory", "false", "--report_to", "none", "--disable_tqdm", "true")


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(watching, "MIN_SECONDS", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def classifier(tiny_resnet, tmp_path):
    for part in (tiny_resnet, digits_processor()):
        part.save_pretrained(tmp_path / "classifier")
    return str(tmp_path / "classifier")


def estimated(capfd, *words):
    capfd.readouterr()
    assert cli.main(["estimate", *words, *QUICK, "--json"]) == 0, capfd.readouterr().err
    out, err = capfd.readouterr()
    return json.loads(out)["estimate"], err


def test_of_a_run(classifier, tiny_resnet, work, tmp_path, capfd):
    found, shown = estimated(
        capfd, "pbu_digits", "--model", classifier, "--num_train_epochs", "500", "--save_strategy", "steps", "--save_steps", "4",
        "--save_total_limit", "2", "--per_device_train_batch_size", "50", "--guard", "false", "--fisher_weight", "0.14",
    )  # fmt: skip
    assert list(work.iterdir()) == []
    assert (found["steps"], found["measured_steps"]) == (
        1500,
        watching.MIN_STEPS,
    )  # 109 images, three batches an epoch
    size = 4 * sum(p.numel() for p in tiny_resnet.parameters())
    buffers = sum(b.nbytes for b in tiny_resnet.buffers())
    parts = found["memory_parts"]
    assert (parts["weights"], parts["gradients"]) == (size + buffers, size)
    assert 2 * size <= parts["optimiser"] <= 2 * size + 4 * 100  # Adam's moments, and a step a tensor
    assert parts["reference"] == size + buffers
    assert parts["anchors"] == size  # the Fisher diagonal; what it is drawn to is the reference
    assert parts["activations"] > 50 * 8 * 8 * 8 * 4  # of the first convolution alone
    assert found["memory"] > sum(parts.values())
    time = found["time"]
    assert found["seconds"] == pytest.approx(time["before"] + time["steps"] + time["after"])
    assert 1499 * time["step"] <= time["steps"]
    checkpoint = found["disk_parts"]["checkpoints"] / 2  # so many stay
    assert checkpoint >= 4 * size  # weights, two moments, the state of the guard or the reference beside
    assert size <= found["disk_parts"]["published"] < 2 * size + 10**6
    assert found["disk"] == sum(found["disk_parts"][name] for name in ("published", "private", "checkpoints"))
    assert "1,500 steps of" in shown
    assert str(tmp_path) not in shown


def test_what_is_drawn_for_a_filter_is_cut_short(classifier, work, capfd, tmp_path):
    from test_cli_gan import tiny_gan

    tiny_gan().save_pretrained(tmp_path / "gan")
    words = ("--pipeline", str(tmp_path / "gan"), "--encoder", classifier, "--batch_size", "10", "--unmarked", "1000")
    marks = (
        "--marker",
        "null",
        "--undesired",
        "1",
        "2",
        "3",
        "--looked_at",
        "80",
        "--rate",
        "0.2",
        "--score",
        "mean_difference",
    )
    capfd.readouterr()
    assert cli.main(["estimate", "filter_digits_gan", *words, *marks, "--json"]) == 0, capfd.readouterr().err
    found = json.loads(capfd.readouterr().out)["estimate"]
    assert list(work.iterdir()) == []
    assert found["time"]["drawing"] > 0
    assert found["seconds"] == pytest.approx(found["time"]["before"] + found["time"]["drawing"])
    assert found["disk"] > 0
    # The sheet, where nothing is marked, is cut too.
    assert cli.main(["estimate", "filter_digits_gan", *words, "--marker", "null", "--looked_at", "400"]) == 0
    assert "of drawing that was cut short" in capfd.readouterr().out


def test_times_add_up(monkeypatch):
    """Of a run of known pace: 3 s before, 5 s the first step, 1 s each other one, 4 s after."""
    looks = Watch()
    looks.planned = 100
    now = 3.0
    for step in range(8):
        looks.begins.append(Clock(now, now / 2))
        now += 5.0 if not step else 1.0
        looks.ends.append(Clock(now, now / 2))
    parts, total = _time(looks, Clock(0.0, 0.0), Clock(now + 4, (now + 4) / 2))
    assert parts == {"before": 3.0, "step": 1.0, "cpu_step": 0.5, "steps": 104.0, "drawing": 0.0, "after": 4.0}
    assert (total.wall, total.cpu) == (111.0, 55.5)
    looks.grows, looks.trained = True, looks.ends[-1]  # a sweep takes every step once more
    assert _time(looks, Clock(0.0, 0.0), Clock(now + 4, 0.0))[0]["after"] == 4.0 * 100 / 8


def test_batches_that_are_left_out(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(watching, "Clock", lambda *given: Clock(*given) if given else Clock(float(next(ticks)), 0.0))
    looks = Watch()
    assert list(looks.batches("drawing", 50, True)) == list(range(watching.MIN_BATCHES))
    ((title, count, each),) = looks.left_out
    assert (title, count, each.wall) == ("drawing", 50 - watching.MIN_BATCHES, 1.0)
    for whole in (Watch(), Watch(cut=False)):
        assert list(whole.batches("drawing", 50, whole.cut is False)) == list(range(50))
        assert whole.left_out == []


def test_bytes_are_counted_once():
    class Held:
        def __init__(self):
            self.model = torch.nn.Linear(10, 10)
            self.optimizer = torch.optim.AdamW(self.model.parameters())
            self.reference = {
                "weight": self.model.weight.detach(),
                "other": torch.zeros(7),
            }  # the first is the model's own
            self.anchor = None

    held = Held()
    held.model(torch.ones(1, 10)).sum().backward()
    held.optimizer.step()
    sizes = held_by(held)
    assert (sizes["weights"], sizes["gradients"], sizes["reference"], sizes["anchors"]) == (440, 440, 28, 0)
    assert sizes["optimiser"] == 2 * 440 + 2 * 4


def test_disk_of_a_run_without_checkpoints(tmp_path):
    (tmp_path / "out/_private/deep").mkdir(parents=True)
    (tmp_path / "out/model").write_bytes(b"x" * 100)
    (tmp_path / "out/_private/deep/file").write_bytes(b"x" * 10)
    looks = Watch()
    looks.while_running, looks.planned, looks.ends = 5, 20, [Clock()] * 4
    assert _disk(looks, tmp_path, {}) == (
        110, {"published": 100, "private": 10, "checkpoints": 0, "while_running": 25}
    )  # fmt: skip


def test_what_the_run_refuses_is_refused(classifier, capsys, work):
    words = ["pbu_digits", "--model", classifier, "--forget_values", "12", *QUICK]
    assert cli.main(["estimate", *words]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("hf-unlearn: error: forget_values: 12 does not occur")
    assert list(work.iterdir()) == []


def test_texts(tiny_llama, tokenizer, tmp_path, capfd, work):
    """A language model, whose recipe names a verb by its keys alone: `sft` is a method of two."""
    for part in (tiny_llama, tokenizer):
        part.save_pretrained(tmp_path / "llama")
    rows = [{"prompt": f"Order {i}", "completion": " is lost."} for i in range(8)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    words = (
        "--model",
        str(tmp_path / "llama"),
        "--dataset",
        str(tmp_path / "rows"),
        "--target_dataset",
        str(tmp_path / "rows"),
    )
    small = (
        "--lora_r",
        "2",
        "--bf16",
        "false",
        "--max_steps",
        "20",
        "--save_strategy",
        "no",
        "--model_init_kwargs",
        '{"dtype": "float32"}',
    )
    found, _ = estimated(capfd, "influence_llama_lora", *words, *small, "--gradient_accumulation_steps", "1")
    assert found["steps"] == 20
    assert found["memory_parts"]["gradients"] < found["memory_parts"]["weights"]
    assert list(Path().iterdir()) == []
