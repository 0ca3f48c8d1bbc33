"""The main job, run as a user runs it: real digits, the command, and what it leaves on disk."""

import json
import os
import re
import struct
import subprocess
import sys

import numpy as np
import pytest


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    # One thread: where two workers run this at once, two threads each would wait for each other.
    environment = os.environ | {"COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "hf_unlearn.cli", "demo", "--output_dir", "out", "--forgotten", "5", "--seed", "1"],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return folder / "out", result


def test_forgets_the_digit_and_keeps_the_others(demo):
    from hf_unlearn.jobs.demo import check

    folder, _ = demo
    original, unlearned, retrained = (check(folder / name, 5) for name in ("original", "unlearned", "retrained"))
    assert original["forget_accuracy"] > 0.9
    assert retrained["forget_accuracy"] == 0
    assert unlearned["forget_accuracy"] <= 0.1
    assert unlearned["retain_accuracy"] >= original["retain_accuracy"] - 0.02


def test_prints_the_table_from_what_a_new_process_loads(demo):
    from hf_unlearn.jobs.demo import check

    folder, result = demo
    for name in ("original", "unlearned", "retrained"):
        (row,) = re.findall(rf"│ {name}.*│", result.stdout)
        figures = check(folder / name, 5)
        others = [value for index, value in enumerate(figures["per_class"]) if index != 5]
        expected = (figures["forget_accuracy"], figures["retain_accuracy"], min(others), figures["membership"])
        assert re.findall(r"[\d.]+(?= %)", row) == [f"{100 * value:.1f}" for value in expected]


def test_shows_progress_and_where_things_are(demo):
    folder, result = demo
    assert result.stderr.count("100%") >= 2  # training and retraining to the end; the guard may stop the middle one
    for line in ("unlearned", "README.md", "per_class.png"):
        assert line in result.stdout
    assert "Traceback" not in result.stderr


def test_leaves_a_model_a_card_and_a_picture(demo):
    folder, _ = demo
    names = {path.name for path in (folder / "unlearned").iterdir()}
    assert names == {
        "README.md",
        "_private",
        "config.json",
        "model.safetensors",
        "pictures",
        "preprocessor_config.json",
    }
    png = (folder / "unlearned" / "pictures" / "per_class.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    assert width > 800
    assert height > 300


def test_the_snippet_on_the_card_runs_as_it_stands(demo):
    from hf_unlearn.examples.datasets import digits

    folder, _ = demo
    card = (folder / "unlearned" / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    picture = folder / "three.png"
    row = digits()["test"][0]
    row["image"].save(picture)
    code = snippet + (
        "\nimport json, sys; from PIL import Image\n"
        f"image = Image.open({str(picture)!r})\n"
        "print(json.dumps(model(**processor(images=image, return_tensors='pt')).logits.tolist()))\n"
        "assert 'hf_unlearn' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    logits = np.array(json.loads(done.stdout.splitlines()[-1]))
    assert logits.shape == (1, 10)
    assert logits.argmax() == row["label"] != 5


def test_an_earlier_demo_is_not_overwritten(demo):
    from hf_unlearn.jobs.demo import run

    folder, _ = demo
    with pytest.raises(ValueError, match="holds an earlier demo"):
        run(folder)
    with pytest.raises(ValueError, match="is no digit"):
        run(folder.parent / "other", forgotten=12)
    assert not (folder.parent / "other").exists()
