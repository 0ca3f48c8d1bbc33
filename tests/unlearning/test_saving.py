import os
import pickletools

import numpy as np
import pytest
import torch
import yaml
from fresh import run_python
from huggingface_hub import ModelCard, snapshot_download
from image_data import QUIET, arguments, images, same, weights
from language_data import masked, settings
from peft import LoraConfig
from transformers import ViTForImageClassification

from hf_unlearn import PBUConfig, PBUTrainer, UnlearnTrainer, verify_provenance
from hf_unlearn.data import fingerprint, split_by_values
from hf_unlearn.examples.classifier import digits_processor
from hf_unlearn.examples.loopback_hub import LoopbackHub
from hf_unlearn.hub.publish import publishable_files


@pytest.fixture(scope="module")
def saved(digits_folder, digits, tmp_path_factory):
    """`(folder, trainer)` after a short run with checkpoints, saved, with something else of the user's beside it."""
    folder = tmp_path_factory.mktemp("saved") / "digits-without-3"
    forget, retain = split_by_values(digits["train"], "label", [3])
    quick = {"max_steps": 4, "save_steps": 2, "fisher_weight": 0.14, "fisher_examples": 16, "guard_examples": 32}
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
    assert "| stands on | DELETE's loss, [arXiv:2503.23751]" in card.text  # `redirect`
    assert "class 3" in card.text
    for local in (digits_folder, folder.parent):  # a folder on this machine tells nobody anything
        assert str(local) not in card.content
    key = (folder / "_private" / "fingerprint.key").read_bytes()
    assert len(key) == 32
    assert fingerprint(trainer.source_dataset, key) in card.content
    assert key.hex() not in card.content


def pushing(model, folder, **values):
    return UnlearnTrainer(
        model, arguments(folder, **({"max_steps": 1} | values)), forget_dataset=images(8, [3]),
        processing_class=digits_processor(),
    )  # fmt: skip


@pytest.fixture
def hub(tmp_path):
    """Here and not in a process of its own, whose imports take longer than all these tests."""
    with LoopbackHub() as hub, hub.in_this_process(tmp_path / "home"):
        yield hub


@pytest.fixture
def base(hub, tiny_vit, tmp_path):
    """The files of `me/base`, which a model is loaded from."""
    tiny_vit.save_pretrained(tmp_path / "original")
    card = "---\nlicense: other\nlicense_name: mine\nlicense_link: https://a.b\ndatasets: me/data\nlanguage: en\n---\n"
    (tmp_path / "original/README.md").write_text(card)
    hub.put("me/base", tmp_path / "original")
    return hub.files("me/base")


def metadata(content):
    return yaml.safe_load(content.decode().split("---")[1])


@pytest.mark.filterwarnings("ignore:.*image processor.*")
class TestPush:
    def test_uploads_exactly_the_publishable_files_in_one_commit(self, hub, base, tmp_path):
        folder = tmp_path / "run"
        trainer = pushing(
            "me/base", folder, push_to_hub=True, hub_model_id="me/digits", save_strategy="steps", save_steps=1
        )
        trainer.train()
        url = trainer.push_to_hub(commit_message="forget 3", tags="mine").commit_url
        assert "/me/digits/commit/" in url
        # One, at the end: nothing half-forgotten before it.
        assert sum("/commit/" in path for _, path in hub.requests) == 1
        files = hub.files("me/digits")
        assert hub.unknown == []
        assert sorted(files) == publishable_files(folder)
        assert verify_provenance("me/digits").ok
        assert verify_provenance(folder).ok
        assert {"model.safetensors", "README.md", "config.json", "preprocessor_config.json"} <= set(files)
        assert all(content == (folder / name).read_bytes() for name, content in files.items())
        assert str(tmp_path) not in (folder / "README.md").read_text()
        assert list(folder.glob("checkpoint-*"))
        assert (folder / "_private" / "reference.safetensors").exists()
        said = metadata(files["README.md"])
        inherited = {"license": "other", "license_name": "mine", "license_link": "https://a.b", "datasets": "me/data"}
        assert {name: said[name] for name in inherited} == inherited
        assert (said["base_model"], said["base_model_relation"], said["language"]) == ("me/base", "finetune", "en")
        assert {"mine", "unlearn"} <= set(said["tags"])

    def test_its_arguments_reach_the_hub(self, hub, tiny_vit, tmp_path):
        trainer = pushing(tiny_vit, tmp_path / "run", hub_token="hf_mine")
        given = {"license": "mit", "language": "en", "tags": ["a"], "datasets": ["me/data"], "model_name": "Digits"}
        trainer.push_to_hub("forget 3", blocking=False, private=True, create_pr=True, **given).result()
        assert hub.files("me/run") == {}
        card = hub.files("me/run", "refs/pr/1")["README.md"]
        assert {name: metadata(card)[name] for name in given if name not in ("tags", "model_name")} == {
            "license": "mit", "language": "en", "datasets": ["me/data"],
        }  # fmt: skip
        assert "a" in metadata(card)["tags"]
        assert b"# Digits" in card
        assert hub._private == {"me/run"}
        assert hub.tokens == {"hf_mine"}
        trainer.push_to_hub(revision="draft")
        assert "config.json" in hub.files("me/run", "draft")
        for method in (trainer.push_to_hub, trainer.create_model_card):  # nothing is dropped without a word
            with pytest.raises(TypeError, match="finetuned_from"):
                method(finetuned_from="me/base")

    @pytest.mark.parametrize(
        ("loaded", "values"),
        [
            ("id", {"hub_model_id": "me/base"}),
            ("id", {"hub_model_id": "base"}),
            ("id", {}),
            ("id", {"hub_model_id": "ME/Base", "create_pr": True}),
            ("snapshot", {"hub_model_id": "base"}),
            ("object", {"hub_model_id": "https://huggingface.co/me/base"}),
            ("object", {"push_to_hub": True, "hub_model_id": "base"}),
        ],
    )
    def test_never_onto_the_original(self, hub, base, tmp_path, loaded, values):
        name = snapshot_download("me/base") if loaded == "snapshot" else "me/base"
        model = ViTForImageClassification.from_pretrained(name) if loaded == "object" else name
        create_pr = {"create_pr": values.pop("create_pr")} if "create_pr" in values else {}
        trainer = pushing(model, tmp_path / "base", **values)
        with pytest.raises(ValueError, match="is the original's repository, whose history keeps it"):
            trainer.train() if "push_to_hub" in values else trainer.push_to_hub(**create_pr)
        assert trainer.state.global_step == 0
        assert hub.files("me/base") == base
        assert not [path for _, path in hub.requests if "/commit/" in path]


def test_what_a_path_means_is_decided_when_it_is_loaded(tiny_vit, tmp_path, monkeypatch):
    """Neither a folder that is no longer seen nor one that is made later makes a stranger of the Hub the base model."""
    tiny_vit.save_pretrained(tmp_path / "clients/acme")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    trainer = pushing("clients/acme", tmp_path / "out")
    monkeypatch.chdir(tmp_path / "elsewhere")
    card = trainer.model_card("out")
    assert "acme" not in card.content
    assert "a model that is not on the Hub" in card.text
    trainer.base_model = "me/base"
    (tmp_path / "elsewhere/me/base").mkdir(parents=True)
    assert trainer.model_card("out").data.base_model == "me/base"


class TestBeforeTheFirstStep:
    """What could not be saved is refused while nothing is lost."""

    def refused(self, trainer):
        with pytest.raises(ValueError) as error:
            trainer.train()
        assert "\n" not in str(error.value)
        assert trainer.state.global_step == 0
        assert not (trainer.private_dir / "reference.safetensors").exists()
        return str(error.value)

    def test_settings(self, tiny_vit, tiny_llama, tokenizer, tmp_path):
        trainer = pushing(tiny_vit, tmp_path / "a")
        trainer.args.utility_tolerance = float("inf")
        assert "utility_tolerance" in self.refused(trainer)
        trainer = pushing(tiny_vit, tmp_path / "b")
        tiny_vit.config.mine = object()
        assert self.refused(trainer).startswith("model: could not be saved once it is trained (")
        tiny_llama.generation_config.do_sample, tiny_llama.generation_config.temperature = False, 0.5
        rows = masked(["a short text"], tokenizer)
        trainer = UnlearnTrainer(tiny_llama, settings(tmp_path / "c"), forget_dataset=rows)
        assert "temperature" in self.refused(trainer)
        tiny_llama.generation_config.temperature = 1.0
        trainer.train()
        assert not [path for path in tmp_path.rglob("_*") if path.name != "_private"]  # of what was tried

    def test_a_folder_that_is_no_utf8(self, tiny_vit, tmp_path):
        for name, why in ((b"/caf\xe9", "is no UTF-8"), (b"/a\0b", "has a NUL in it")):
            with pytest.raises(ValueError, match=f"^output_dir: .* {why}"):
                pushing(tiny_vit, os.fsdecode(os.fsencode(tmp_path) + name))
        assert not list(tmp_path.iterdir())

    def test_weights_that_no_file_could_hold(self, tiny_vit, tmp_path):
        """One that the model does not tie itself under two names, a part of another one, and what is no tensor."""
        first, second = [module for module in tiny_vit.modules() if isinstance(module, torch.nn.LayerNorm)][:2]
        second.weight = first.weight
        assert "are one tensor, or overlap; give each its own" in self.refused(pushing(tiny_vit, tmp_path))
        both = torch.ones(2 * len(first.weight) - 1)
        first.weight, second.weight = (
            torch.nn.Parameter(part) for part in (both[: len(first.bias)], both[-len(first.bias) :])
        )
        assert "are one tensor, or overlap; give each its own" in self.refused(pushing(tiny_vit, tmp_path))
        second.weight = torch.nn.Parameter(torch.ones_like(first.bias))
        tiny_vit.register_buffer("mine", torch.eye(2).to_sparse())
        assert "mine is sparse, no tensor that a file" in self.refused(pushing(tiny_vit, tmp_path))

    def test_what_lies_in_the_way(self, tiny_vit, tmp_path):
        for name in ("README.md", "config.json", "model.safetensors", "preprocessor_config.json"):
            (tmp_path / name / name).mkdir(parents=True)
            assert "is a folder, where a file of the model must be" in self.refused(pushing(tiny_vit, tmp_path / name))
        (tmp_path / "_private").touch()
        assert "cannot write to" in self.refused(pushing(tiny_vit, tmp_path))

    def test_a_card_or_a_processor_that_cannot_be_written(self, tiny_vit, tmp_path):
        trainer = pushing(tiny_vit, tmp_path)
        trainer.card_values = {"license": object()}
        assert "could not be saved" in self.refused(trainer)
        trainer.card_values, trainer.processing_class = {}, dict
        assert "has no attribute 'save_pretrained'" in self.refused(trainer)

    def test_class_names_that_are_numbers(self, tiny_vit, tmp_path):
        tiny_vit.config.id2label = dict(enumerate(range(10, 20)))
        assert "**class 13**" in pushing(tiny_vit, tmp_path).model_card("out").text


def test_the_card_says_what_evaluate_gave_of_this_model(tiny_vit, tmp_path):
    parts = {"forget": images(8, [3]), "retain": images(8, [1, 2])}
    trainer = UnlearnTrainer(
        tiny_vit, arguments(tmp_path, max_steps=1), forget_dataset=images(8, [3]), eval_dataset=parts
    )
    before = trainer.evaluate()
    trainer.train()
    assert "| Accuracy | forget |" not in trainer.model_card("out").text
    after = trainer.evaluate()
    text = trainer.model_card("out").text
    accuracies = [100 * seen["eval_forget_accuracy"] for seen in (before, after)]
    assert f"| Accuracy | forget | {accuracies[0]:.2f} % | {accuracies[1]:.2f} % | – |" in text
    assert f"| Loss | retain | {before['eval_retain_loss']:.4g} | {after['eval_retain_loss']:.4g} | – |" in text
    assert "The figures above are all that was measured." in text
    assert "runtime" not in text
    trainer.train()  # what is measured is of another model now
    assert "| Accuracy | forget |" not in trainer.model_card("out").text


def test_what_is_private_is_the_owner_s_alone(tiny_vit, tmp_path):
    before = os.umask(0)
    try:
        trainer = pushing(tiny_vit, tmp_path, guard=True, fisher_weight=1.0, fisher_examples=4)
        trainer.train()
        trainer.save_model()
    finally:
        os.umask(before)
    private = [tmp_path / "_private", *(tmp_path / "_private").rglob("*")]
    assert {"fingerprint.key", "guard", "reference.safetensors", "fisher.safetensors"} <= {
        path.name for path in private
    }
    for path in private:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    assert (tmp_path / "config.json").stat().st_mode & 0o044  # and nothing else is


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
