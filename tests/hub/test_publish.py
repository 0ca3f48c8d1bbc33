import json
import os

import pytest
from huggingface_hub.utils import filter_repo_objects

from hf_unlearn.hub.allowed import left_behind, publishable_files
from hf_unlearn.hub.publish import as_patterns, check_publishable, publish_folder


GOOD = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "pictures/classes.png",
}
HOSTILE = {
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "provenance.json",
    "model.bin",
    "pytorch_model.bin",
    "model.pkl",
    "README.md.pkl",
    "model_original.safetensors",
    "model.reference.safetensors",
    "model-00001-of-00002.safetensors",
    "anchor.safetensors",
    ".env",
    "modeling_mine.py",
    "_private/reference.safetensors",
    "_private/model.safetensors",
    "_private/config.json",
    "checkpoint-3/model.safetensors",
    "checkpoint-3/config.json",
    "forget/data-00000-of-00001.arrow",
    "original/model.safetensors",
    "pictures/model.safetensors",
    "pictures/forgotten/example.png",
    "pictures/notes.txt",
    "classes.png",
}


def write(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"content of " + name.encode())
    return folder


def sharded(folder, shards):
    write(folder, ["config.json", *shards])
    names = {f"weight{number}": name for number, name in enumerate(shards)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


class TestPublishableFiles:
    def test_only_what_belongs_to_the_model(self, tmp_path):
        write(tmp_path, GOOD | HOSTILE)
        assert publishable_files(tmp_path) == sorted(GOOD)
        assert left_behind(tmp_path) == sorted(HOSTILE)

    def test_links_are_left_behind(self, tmp_path):
        write(tmp_path, ["config.json", "_private/reference.safetensors", "_private/example.png", "elsewhere/x.png"])
        (tmp_path / "model.safetensors").symlink_to(tmp_path / "_private/reference.safetensors")
        (tmp_path / "README.md").symlink_to(tmp_path / "gone")
        (tmp_path / "pictures").symlink_to(tmp_path / "elsewhere")
        assert publishable_files(tmp_path) == ["config.json"]
        assert {"model.safetensors", "README.md", "pictures"} <= set(left_behind(tmp_path))
        with pytest.raises(ValueError, match="no model.safetensors"):
            check_publishable(tmp_path)

    def test_a_link_among_the_pictures(self, tmp_path):
        write(tmp_path, ["pictures/a.png", "_private/example.png"])
        (tmp_path / "pictures/b.png").symlink_to(tmp_path / "_private/example.png")
        assert publishable_files(tmp_path) == ["pictures/a.png"]

    def test_folders_with_names_of_files(self, tmp_path):
        write(tmp_path, ["model.safetensors/model.safetensors", "config.json/x", "pictures/a.png/b.png"])
        assert publishable_files(tmp_path) == []

    def test_only_shards_in_the_index(self, tmp_path):
        shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        sharded(tmp_path, shards)
        write(tmp_path, ["model-00001-of-00003.safetensors"])
        assert publishable_files(tmp_path) == sorted(["config.json", "model.safetensors.index.json", *shards])
        assert check_publishable(tmp_path) == publishable_files(tmp_path)

    def test_no_folder(self, tmp_path):
        with pytest.raises(ValueError, match="no such folder"):
            publishable_files(tmp_path / "missing")


class TestUploadSeesTheSameFiles:
    """`upload_folder` filters names with patterns of its own; the list must mean the same there."""

    def test_patterns_match_these_files_only(self, tmp_path):
        odd = {"pictures/*.png", "pictures/a[1].png", "pictures/?.png"}
        write(tmp_path, GOOD | HOSTILE | odd)
        everything = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()]
        passed = filter_repo_objects(everything, allow_patterns=as_patterns(publishable_files(tmp_path)))
        assert set(passed) == GOOD | odd


class TestRefusals:
    """Each before anything is sent: these would fail in another way, since there is no network here."""

    def refused(self, folder, **kwargs):
        with pytest.raises(ValueError) as error:
            publish_folder(folder, "me/model", **kwargs)
        assert "\n" not in str(error.value)
        return str(error.value)

    def test_no_weights(self, tmp_path):
        assert "no model.safetensors" in self.refused(write(tmp_path, ["config.json", "model.bin"]))

    def test_adapter(self, tmp_path):
        files = write(tmp_path, ["adapter_config.json", "adapter_model.safetensors", "README.md"])
        assert "allow_adapter=False" in self.refused(files)
        assert check_publishable(tmp_path, allow_adapter=True) == sorted(os.listdir(tmp_path))

    def test_adapter_config_without_its_weights(self, tmp_path):
        write(tmp_path, ["adapter_config.json", "adapter_model.bin"])
        assert "no model.safetensors" in self.refused(tmp_path, allow_adapter=True)

    @pytest.mark.parametrize("allow_adapter", [True, False])
    def test_adapter_beside_weights(self, tmp_path, allow_adapter):
        write(tmp_path, ["adapter_config.json", "adapter_model.safetensors", "model.safetensors"])
        assert "has both weights and adapter_config.json" in self.refused(tmp_path, allow_adapter=allow_adapter)

    def test_single_file_beside_shards(self, tmp_path):
        shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        write(sharded(tmp_path, shards), ["model.safetensors"])
        assert "has both model.safetensors and" in self.refused(tmp_path)
        (tmp_path / shards[0]).unlink()  # what a later save of one file leaves of an earlier one in shards
        assert check_publishable(tmp_path) == ["config.json", "model.safetensors"]
        (tmp_path / "model.safetensors").unlink()
        assert f"names {shards[0]}" in self.refused(tmp_path)

    @pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}'])
    def test_broken_index(self, tmp_path, index):
        write(tmp_path, ["config.json"])
        (tmp_path / "model.safetensors.index.json").write_text(index)
        assert "cannot be read" in self.refused(tmp_path)

    def test_an_index_cannot_name_other_files(self, tmp_path):
        sharded(tmp_path, ["_private/reference.safetensors"])
        assert publishable_files(tmp_path) == ["config.json", "model.safetensors.index.json"]
        assert "which is not there" in self.refused(tmp_path)
