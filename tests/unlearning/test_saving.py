import os
import pickletools
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from fresh import run_python
from hub_server import LoopbackHub
from huggingface_hub import ModelCard
from image_data import QUIET, arguments, images, same, weights
from peft import LoraConfig

from hf_unlearn import PBUConfig, PBUTrainer, UnlearnTrainer
from hf_unlearn.data import fingerprint, split_by_values
from hf_unlearn.examples.classifier import digits_processor
from hf_unlearn.hub.publish import publishable_files


@pytest.fixture(scope="module")
def saved(digits_folder, digits, tmp_path_factory):
    """`(folder, trainer)` after a short run with checkpoints, saved, with something else of the user's beside it."""
    folder = tmp_path_factory.mktemp("saved") / "digits-without-3"
    forget, retain = split_by_values(digits["train"], "label", [3])
    quick = {"max_steps": 4, "save_steps": 2, "fisher_examples": 16, "guard_examples": 32}
    args = PBUConfig(str(folder), **(QUIET | {"save_strategy": "steps"} | quick))
    parts = {"retain": retain.select(range(50))}
    trainer = PBUTrainer(str(digits_folder), args, forget_dataset=forget, eval_dataset=parts)
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
    """What is neither in `_private` nor in a checkpoint."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return [folder / p for p in files if p.parts[0] != "_private" and not p.parts[0].startswith("checkpoint-")]


class TestFiles:
    def test_everything_outside_the_private_folder_is_publishable_and_no_pickle(self, saved, tmp_path):
        for zipped in (False, True):
            torch.save({"a": torch.ones(2)}, tmp_path / "a.bin", _use_new_zipfile_serialization=zipped)
            assert is_pickle((tmp_path / "a.bin").read_bytes())  # the detector detects
        folder, _ = saved
        for file in published(folder):
            assert file.suffix not in (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
            assert not is_pickle(file.read_bytes()), file
        files = sorted(path.relative_to(folder).as_posix() for path in published(folder))
        assert files == publishable_files(folder)
        assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} <= set(files)

    def test_what_could_undo_it_is_private_and_complete_and_checkpoints_hold_no_pickled_arguments(self, saved):
        folder, _ = saved
        private = {path.name for path in (folder / "_private").iterdir()}
        assert {"reference.safetensors", "fisher.safetensors", "guard", "fingerprint.key"} <= private
        assert (folder / "_private" / "fingerprint.key").stat().st_mode & 0o077 == 0
        assert not list(folder.rglob("*.partial"))
        checkpoints = list(folder.glob("checkpoint-*"))
        assert len(checkpoints) == 2
        assert not list(folder.rglob("training_args.bin"))
        assert all((checkpoint / "run.json").exists() for checkpoint in checkpoints)
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
    def test_stock_classes_in_a_new_process_give_the_same_logits(self, saved, digits, tmp_path):
        folder, trainer = saved
        pictures = list(digits["test"].select(range(20))["image"])
        np.save(f"{tmp_path}/result.images.npy", np.stack([np.asarray(picture) for picture in pictures]))
        run_python(LOADER, folder, f"{tmp_path}/result")
        inputs = digits_processor()(images=pictures, return_tensors="pt")
        with torch.no_grad():
            expected = trainer.model.eval()(**inputs).logits.numpy()
        # Logits up to 10, of convolutions that sum at most 576 terms in any order: some 10 · √576 · 1e-7.
        np.testing.assert_allclose(np.load(f"{tmp_path}/result.logits.npy"), expected, rtol=1e-4, atol=1e-4)

    def test_renamed_weights_survive(self, tiny_vit, tmp_path):
        """Transformers writes a ViT's weights under older names than its own."""
        trainer = UnlearnTrainer(tiny_vit, arguments(tmp_path), forget_dataset=images(4, [3]))
        trainer.train()
        trainer.save_model()
        assert same(weights(type(tiny_vit).from_pretrained(tmp_path)), weights(tiny_vit))


def test_the_card_parses_and_says_how_it_was_made(saved, digits_folder):
    folder, trainer = saved
    card = ModelCard.load(folder / "README.md")
    tags = card.data.to_dict()
    assert {"hf_unlearn", "machine-unlearning", "pbu"} <= set(tags["tags"])
    assert tags["pipeline_tag"] == "image-classification"
    assert yaml.safe_load(card.content.split("---")[1]) is not None
    assert "2403.16246" in card.text
    assert "class 3" in card.text
    for local in (digits_folder, folder.parent):  # a folder on this machine tells nobody anything
        assert str(local) not in card.content
    key = (folder / "_private" / "fingerprint.key").read_bytes()
    assert len(key) == 32
    assert fingerprint(trainer.source_dataset, key) in card.content
    assert key.hex() not in card.content


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


class TestPush:
    def test_uploads_exactly_the_publishable_files(self, tmp_path):
        folder = tmp_path / "run"
        with LoopbackHub() as hub:
            path = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-c", PUSHER, str(folder)]
            environment = hub.environment(tmp_path / "home") | path
            run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
            assert run.returncode == 0, run.stderr[-3000:]
            assert "/me/digits/commit/" in run.stdout
            files = hub.files("me/digits")
            # One, at the end: nothing half-forgotten before it.
            assert sum("/commit/" in path for _, path in hub.requests) == 1
            assert hub.unknown == []
        assert sorted(files) == publishable_files(folder)
        assert {"model.safetensors", "README.md", "config.json", "preprocessor_config.json"} <= set(files)
        assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
        assert str(tmp_path) not in (folder / "README.md").read_text()
        assert list(folder.glob("checkpoint-*"))
        assert (folder / "_private" / "reference.safetensors").exists()

    def test_hands_its_arguments_over_and_refuses_the_original_s_repository(self, tiny_vit, tmp_path, monkeypatch):
        calls = []
        monkeypatch.setattr(
            "hf_unlearn.training.publishing.publish_folder", lambda *args, **kwargs: calls.append((args, kwargs))
        )
        trainer = UnlearnTrainer(tiny_vit, arguments(tmp_path, hub_token="mine"), forget_dataset=images(4, [3]))
        trainer.hub_model_id = "me/digits"
        trainer.push_to_hub("forget 3", blocking=False, revision="draft", private=True)
        common = {"commit_message": "forget 3", "run_as_future": True, "allow_adapter": False}
        assert calls == [
            ((str(tmp_path), "me/digits"), common | {"token": "mine", "revision": "draft", "private": True})
        ]
        trainer.base_model = "me/digits"
        with pytest.raises(ValueError, match="^hub_model_id: 'me/digits' is the original's repository"):
            trainer.push_to_hub()
        assert len(calls) == 1


def test_an_adapter_saved_apart_tells_no_local_path(tiny_vit, tmp_path):
    tiny_vit.save_pretrained(tmp_path / "secret" / "original")
    trainer = UnlearnTrainer(
        str(tmp_path / "secret" / "original"), arguments(tmp_path / "out", merge_adapter=False, max_steps=1),
        forget_dataset=images(4, [3]), processing_class=digits_processor(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    for name in publishable_files(tmp_path / "out"):
        assert b"secret" not in (tmp_path / "out" / name).read_bytes(), name
