"""The main job as a user runs it: real digits, the command, and what it leaves on disk."""

import json
import re
import struct

import numpy as np
import pytest
from fresh import run_python
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_unlearn.audit.membership import membership_by_entropy
from hf_unlearn.examples.classifier import predict
from hf_unlearn.examples.datasets import digits
from hf_unlearn.jobs.demo import check, run


pytestmark = pytest.mark.slow  # three trainings


NAMES = ("original", "unlearned", "retrained")
# With fewer pictures and epochs, and a fork for the new process at its end: that is only the time its imports would take.
COMMAND = """
import functools, os, runpy, sys, types
import hf_unlearn
from hf_unlearn import cli
from hf_unlearn.examples import classifier
from hf_unlearn.jobs import demo

splits = demo.digits()
splits["train"] = splits["train"].select(range(600))
demo.digits = lambda: splits
classifier.TRAINING["num_train_epochs"] = 8
hf_unlearn.PBUConfig = functools.partial(hf_unlearn.PBUConfig, num_train_epochs=8)

def run(command, check):
    assert command[:3] == [sys.executable, "-m", "hf_unlearn.jobs.demo"] and check
    sys.stdout.flush()
    if not (child := os.fork()):
        sys.argv = command[2:]
        runpy.run_module(command[2], run_name="__main__")
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

demo.subprocess = types.SimpleNamespace(run=run)
sys.exit(cli.main(["demo", "--output_dir", "out", "--forgotten", "5", "--seed", "1"]))
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """`(folder, what the command printed, figures of the three models)`."""
    folder = tmp_path_factory.mktemp("demo")
    result = run_python(COMMAND, cwd=folder, env={"COLUMNS": "120", "OMP_NUM_THREADS": "1"}, timeout=600)
    return folder / "out", result, {name: check(folder / "out" / name, 5) for name in NAMES}


def test_forgets_the_digit_and_keeps_the_others(demo):
    original, unlearned, retrained = (demo[2][name] for name in NAMES)
    assert original["forget_accuracy"] > 0.9  # 1.0 over 6 seeds
    assert retrained["forget_accuracy"] == 0
    assert unlearned["forget_accuracy"] <= 0.25  # 0.0 to 0.065, of 46 pictures
    assert unlearned["retain_accuracy"] >= original["retain_accuracy"] - 0.03  # 0 to 0.008 below


def test_prints_the_table_from_what_a_new_process_loads(demo):
    _, result, checked = demo
    for name in NAMES:
        (row,) = re.findall(rf"│ {name}.*│", result.stdout)
        figures = checked[name]
        others = [value for index, value in enumerate(figures["per_class"]) if index != 5]
        expected = (figures["forget_accuracy"], figures["retain_accuracy"], min(others), figures["membership"])
        assert re.findall(r"[\d.]+(?= %)", row) == [f"{100 * value:.1f}" for value in expected]
    for line in ("unlearned", "README.md", "per_class.png"):
        assert line in result.stdout
    assert "Traceback" not in result.stderr


def test_the_figures_are_of_the_pictures_that_they_name(demo):
    folder, figures, splits = demo[0] / "unlearned", demo[2]["unlearned"], digits()
    model, processor = (c.from_pretrained(folder) for c in (AutoModelForImageClassification, AutoImageProcessor))
    logits = {name: predict(model, processor, splits[name]) for name in ("train", "test")}
    train, test = (np.array(splits[name]["label"]) for name in logits)
    parts = logits["train"][train != 5], logits["test"][test != 5], logits["train"][train == 5]
    assert figures["membership"] == pytest.approx(membership_by_entropy(*parts), abs=0.02)  # of 109 pictures two
    right = logits["test"].argmax(-1) == test
    for name, rows in (("forget_accuracy", test == 5), ("retain_accuracy", test != 5)):
        assert figures[name] == pytest.approx(right[rows].mean(), abs=0.03)  # of 45 pictures one


def test_leaves_a_model_a_card_and_a_picture(demo):
    folder = demo[0] / "unlearned"
    names = {path.name for path in folder.iterdir()}
    model = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert names == model | {"README.md", "_private", "pictures", "provenance.json"}
    assert "pictures/per_class.png" in (folder / "README.md").read_text()
    png = (folder / "pictures" / "per_class.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    assert width > 800
    assert height > 300


def test_the_snippet_on_the_card_runs_as_it_stands(demo):
    folder, picture, row = demo[0], demo[0] / "three.png", digits()["test"][0]
    card = (folder / "unlearned" / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    row["image"].save(picture)
    code = snippet + (
        "\nimport json, sys; from PIL import Image\n"
        f"image = Image.open({str(picture)!r})\n"
        "print(json.dumps(model(**processor(images=image, return_tensors='pt')).logits.tolist()))\n"
        "assert 'hf_unlearn' not in sys.modules"
    )
    logits = np.array(json.loads(run_python(code, cwd=folder).stdout.splitlines()[-1]))
    assert logits.shape == (1, 10)
    assert logits.argmax() == row["label"] != 5


def test_an_earlier_demo_is_not_overwritten(demo):
    folder = demo[0]
    with pytest.raises(ValueError, match="is not empty; empty it"):
        run(folder)
