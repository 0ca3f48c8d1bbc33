import json
import os
import pickletools
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from image_data import QUIET, arguments, images, same, weights

from hf_unlearn import PBUConfig, PBUTrainer, UnlearnTrainer
from hf_unlearn.examples.classifier import digits_processor
from hf_unlearn.hub.publish import publishable_files


@pytest.fixture(scope="module")
def saved(digits_folder, digits, tmp_path_factory):
    """`(folder, trainer)` after a short run with checkpoints, saved, with something else of the user's beside it."""
    from hf_unlearn.data import split_by_values

    folder = tmp_path_factory.mktemp("saved") / "digits-without-3"
    forget, retain = split_by_values(digits["train"], "label", [3])
    trainer = PBUTrainer(
        str(digits_folder),
        PBUConfig(str(folder), **(QUIET | {"save_strategy": "steps"}), max_steps=4, save_steps=2),
        forget_dataset=forget,
        eval_dataset={"retain": retain.select(range(50))},
    )
    trainer.train()
    trainer.save_model()
    return folder, trainer


def is_pickle(content):
    """Whether these bytes are, or contain as a zip archive of torch.save does, a pickle."""
    if content[:4] == b"PK\x03\x04":
        return True
    try:
        return any(opcode.name == "STOP" for opcode, _, _ in pickletools.genops(content))
    except Exception:
        return False


def published(folder):
    return [path for path in folder.rglob("*") if path.is_file() and not is_private(path.relative_to(folder))]


def is_private(path):
    return path.parts[0] == "_private" or path.parts[0].startswith("checkpoint-")


class TestFiles:
    def test_the_detector_detects(self, tmp_path):
        torch.save({"a": torch.ones(2)}, tmp_path / "a.bin")
        assert is_pickle((tmp_path / "a.bin").read_bytes())
        torch.save({"a": torch.ones(2)}, tmp_path / "b.bin", _use_new_zipfile_serialization=False)
        assert is_pickle((tmp_path / "b.bin").read_bytes())

    def test_nothing_is_a_pickle(self, saved):
        folder, _ = saved
        files = published(folder)
        assert len(files) >= 4
        for file in files:
            assert file.suffix not in (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
            assert not is_pickle(file.read_bytes()), file

    def test_everything_outside_the_private_folder_is_publishable(self, saved):
        folder, _ = saved
        files = sorted(path.relative_to(folder).as_posix() for path in published(folder))
        assert files == publishable_files(folder)
        assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} <= set(files)

    def test_what_could_undo_it_is_private_and_complete(self, saved):
        folder, trainer = saved
        private = {path.name for path in (folder / "_private").iterdir()}
        assert {"reference.safetensors", "fisher.safetensors", "guard", "fingerprint.key"} <= private
        assert (folder / "_private" / "fingerprint.key").stat().st_mode & 0o077 == 0
        assert not list(folder.rglob("*.partial"))

    def test_checkpoints_hold_no_pickled_arguments(self, saved):
        folder, _ = saved
        checkpoints = list(folder.glob("checkpoint-*"))
        assert len(checkpoints) == 2
        assert not list(folder.rglob("training_args.bin"))
        assert all((checkpoint / "unlearning.json").exists() for checkpoint in checkpoints)
        assert not any((checkpoint / "README.md").exists() for checkpoint in checkpoints)

    def test_saving_elsewhere_leaves_nothing_private_there(self, saved, tmp_path):
        _, trainer = saved
        trainer.save_model(tmp_path / "copy")
        files = {path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*")}
        assert files == set(publishable_files(tmp_path / "copy"))


LOADER = """
import sys
import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

torch.set_num_threads(1)
folder, result = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained(folder).eval()
processor = AutoImageProcessor.from_pretrained(folder)
images = [Image.fromarray(image) for image in np.load(result + ".images.npy")]
inputs = processor(images=images, return_tensors="pt")
with torch.no_grad():
    np.save(result + ".logits.npy", model(**inputs).logits.numpy())
assert not any(name.split(".")[0] == "hf_unlearn" for name in sys.modules)
"""


class TestLoading:
    def test_stock_classes_in_a_new_process_give_identical_logits(self, saved, digits, tmp_path):
        folder, trainer = saved
        pictures = list(digits["test"].select(range(20))["image"])
        np.save(f"{tmp_path}/result.images.npy", np.stack([np.asarray(picture) for picture in pictures]))
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", LOADER, str(folder), f"{tmp_path}/result"]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr[-2000:]
        inputs = digits_processor()(images=pictures, return_tensors="pt")
        with torch.no_grad():
            expected = trainer.model.eval()(**inputs).logits.numpy()
        np.testing.assert_array_equal(np.load(f"{tmp_path}/result.logits.npy"), expected)

    def test_renamed_weights_survive(self, tiny_vit, tmp_path):
        """Transformers writes a ViT's weights under older names than its own."""
        trainer = UnlearnTrainer(tiny_vit, arguments(tmp_path), forget_dataset=images(4, [3]))
        trainer.train()
        trainer.save_model()
        assert same(weights(type(tiny_vit).from_pretrained(tmp_path)), weights(tiny_vit))


class TestCard:
    def test_parses_and_says_how_it_was_made(self, saved, digits_folder):
        folder, trainer = saved
        card = ModelCard.load(folder / "README.md")
        data = card.data.to_dict()
        assert {"hf_unlearn", "machine-unlearning", "pbu"} <= set(data["tags"])
        assert data["pipeline_tag"] == "image-classification"
        assert "2403.16246" in card.text
        assert yaml.safe_load(card.content.split("---")[1]) is not None
        assert str(digits_folder) not in card.content  # a folder on this machine tells nobody what the base model was
        assert "class 3" in card.text

    def test_fingerprint_is_of_the_forget_set_and_keyed(self, saved, digits):
        folder, trainer = saved
        from hf_unlearn.data import fingerprint

        key = (folder / "_private" / "fingerprint.key").read_bytes()
        assert len(key) == 32
        expected = fingerprint(trainer.source_dataset, key)
        assert expected in (folder / "README.md").read_text()
        assert key.hex() not in (folder / "README.md").read_text()


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload needs; keeps the names that are committed."""

    committed: list

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size) if size else self.chunks()
        if self.path == "/api/repos/create":
            self.answer({"url": f"{self.server.address}/me/digits"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            self.server.committed += [line["value"]["path"] for line in lines if line["key"] != "header"]
            self.server.summaries += [line["value"]["summary"] for line in lines if line["key"] == "header"]
            sha = "0" * 40
            self.answer({"commitOid": sha, "commitUrl": f"{self.server.address}/me/digits/commit/{sha}"})
        else:
            self.answer({"error": self.path}, 404)

    def chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_GET(self):
        self.answer({"id": "me/digits", "sha": "0" * 40, "siblings": [], "name": "me", "type": "user"})

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.committed, server.summaries = [], []
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


PUSHER = """
import sys
import torch
from image_data import arguments, images
from transformers import ViTConfig, ViTForImageClassification
from hf_unlearn import UnlearnTrainer
from hf_unlearn.examples.classifier import digits_processor

torch.manual_seed(0)
model = ViTForImageClassification(ViTConfig(
    image_size=16, patch_size=8, num_channels=1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=32, num_labels=10,
))
trainer = UnlearnTrainer(
    model, arguments(sys.argv[1], push_to_hub=True, hub_model_id="me/digits", save_strategy="steps", save_steps=1),
    forget_dataset=images(8, [3]), processing_class=digits_processor(),
)
trainer.train()
print(trainer.push_to_hub(commit_message="forget 3").commit_url)
"""


def test_push_uploads_exactly_the_publishable_files(hub, tmp_path):
    environment = os.environ | {
        "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }  # fmt: skip
    folder = tmp_path / "run"
    command = [sys.executable, "-c", PUSHER, str(folder)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "/me/digits/commit/" in run.stdout
    assert sorted(hub.committed) == publishable_files(folder)
    assert {"model.safetensors", "README.md", "config.json", "preprocessor_config.json"} <= set(hub.committed)
    assert str(tmp_path) not in (folder / "README.md").read_text()
    assert hub.summaries == ["forget 3"]  # one commit, nothing half-forgotten before it
    assert list(folder.glob("checkpoint-*"))
    assert Path(folder, "_private", "reference.safetensors").exists()


def test_an_adapter_saved_apart_tells_no_local_path(tiny_vit, tmp_path):
    from peft import LoraConfig

    tiny_vit.save_pretrained(tmp_path / "secret" / "original")
    trainer = UnlearnTrainer(
        str(tmp_path / "secret" / "original"),
        arguments(tmp_path / "out", merge_adapter=False, max_steps=1),
        forget_dataset=images(4, [3]),
        processing_class=digits_processor(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    for name in publishable_files(tmp_path / "out"):
        assert b"secret" not in (tmp_path / "out" / name).read_bytes(), name


def test_the_original_s_own_repository_is_refused(tiny_vit, tmp_path):
    args = arguments(tmp_path, hub_model_id="me/original")
    trainer = UnlearnTrainer(tiny_vit, args, forget_dataset=images(4, [3]))
    trainer.base_model = "me/original"
    with pytest.raises(ValueError, match="^hub_model_id: 'me/original' is the original's repository"):
        trainer.push_to_hub()
