"""What of a model's folder is published, and what is refused; of pipelines: the tests beside this one."""

import json

import pytest

from hf_unlearn.hub.allowed import left_behind, publishable_files
from hf_unlearn.hub.publish import check_publishable, publish_folder


GOOD = {
    *("README.md", "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "pictures/classes.png"),
}
HOSTILE = {
    *("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"),
    *("model.bin", "pytorch_model.bin", "model.pkl", "README.md.pkl", ".env", "modeling_mine.py", "classes.png"),
    *("model_original.safetensors", "model.reference.safetensors", "anchor.safetensors"),
    *("model-00001-of-00002.safetensors", "original/model.safetensors", "pictures/model.safetensors"),
    *("_private/reference.safetensors", "_private/model.safetensors", "_private/config.json"),
    *("checkpoint-3/model.safetensors", "checkpoint-3/config.json", "forget/data-00000-of-00001.arrow"),
    *("pictures/forgotten/example.png", "pictures/notes.txt"),
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


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"


class TestPublishableFiles:
    def test_only_what_belongs_to_the_model(self, tmp_path):
        write(tmp_path, GOOD | HOSTILE)
        assert publishable_files(tmp_path) == sorted(GOOD)
        assert list(left_behind(tmp_path)) == sorted(HOSTILE)
        odd = {"pictures/*.png", "pictures/a[1].png", "pictures/?.png"}  # names are no patterns
        assert set(publishable_files(write(tmp_path, odd))) == GOOD | odd

    def test_all_templates_of_a_chat(self, tmp_path):
        """Beside a tokenizer, which would lack them; a folder of that name alone, or a link, is anybody's."""
        template = "additional_chat_templates/tools.jinja"
        write(tmp_path, ["config.json", template])
        assert publishable_files(tmp_path) == ["config.json"]
        write(tmp_path, ["tokenizer_config.json", "additional_chat_templates/secret.txt"])
        assert publishable_files(tmp_path) == [template, "config.json", "tokenizer_config.json"]

    def test_links_are_left_behind(self, tmp_path):
        write(tmp_path, ["config.json", "_private/reference.safetensors", "elsewhere/x.png", "pictures/a.png"])
        (tmp_path / "model.safetensors").symlink_to(tmp_path / "_private/reference.safetensors")
        (tmp_path / "README.md").symlink_to(tmp_path / "gone")
        (tmp_path / "pictures/b.png").symlink_to(tmp_path / "elsewhere/x.png")
        assert publishable_files(tmp_path) == ["config.json", "pictures/a.png"]
        assert {"model.safetensors", "README.md", "pictures/b.png"} <= set(left_behind(tmp_path))
        with pytest.raises(ValueError, match="no model.safetensors"):
            check_publishable(tmp_path)
        (tmp_path / "pictures").rename(tmp_path / "others")
        (tmp_path / "pictures").symlink_to(tmp_path / "elsewhere")
        assert publishable_files(tmp_path) == ["config.json"]

    def test_folders_with_names_of_files_and_no_folder(self, tmp_path):
        write(tmp_path, ["model.safetensors/model.safetensors", "config.json/x", "pictures/a.png/b.png"])
        assert publishable_files(tmp_path) == []
        with pytest.raises(ValueError, match="no such folder"):
            publishable_files(tmp_path / "missing")

    def test_only_shards_in_the_index(self, tmp_path):
        write(sharded(tmp_path, SHARDS), ["model-00001-of-00003.safetensors"])
        assert publishable_files(tmp_path) == sorted(["config.json", INDEX, *SHARDS])
        assert check_publishable(tmp_path) == publishable_files(tmp_path)


class TestRefusals:
    """Each before anything is sent: these would fail in another way, since there is no network here."""

    def refused(self, folder, **kwargs):
        with pytest.raises(ValueError) as error:
            publish_folder(folder, "me/model", **kwargs)
        assert "\n" not in str(error.value)
        return str(error.value)

    @pytest.mark.parametrize(
        ("files", "allow_adapter", "message"),
        [
            (["config.json", "model.bin"], False, "no model.safetensors"),
            (["adapter_config.json", "adapter_model.safetensors", "README.md"], False, "allow_adapter=False"),
            (["adapter_config.json", "adapter_model.bin"], True, "no model.safetensors"),
            (["adapter_model.safetensors"], True, "no model.safetensors"),
            *(
                (["adapter_config.json", *adapter, "model.safetensors"], allow, "both weights and adapter_config.json")
                for adapter, allow in (
                    (["adapter_model.safetensors"], True),
                    (["adapter_model.safetensors"], False),
                    ([], True),
                )
            ),
        ],
    )
    def test_of_what_is_not_one_whole_model(self, tmp_path, files, allow_adapter, message):
        assert message in self.refused(write(tmp_path, files), allow_adapter=allow_adapter)

    def test_an_adapter_passes_where_it_is_allowed(self, tmp_path):
        files = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
        assert check_publishable(write(tmp_path, files), allow_adapter=True) == files

    def test_single_file_beside_shards(self, tmp_path):
        write(sharded(tmp_path, SHARDS), ["model.safetensors"])
        assert "has both model.safetensors and" in self.refused(tmp_path)
        (tmp_path / SHARDS[0]).unlink()  # what a later save of one file leaves of an earlier one in shards
        assert check_publishable(tmp_path) == ["config.json", "model.safetensors"]
        (tmp_path / "model.safetensors").unlink()
        assert f"names {SHARDS[0]}" in self.refused(tmp_path)

    @pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}'])
    def test_broken_index(self, tmp_path, index):
        (write(tmp_path, ["config.json"]) / INDEX).write_text(index)
        assert "cannot be read" in self.refused(tmp_path)

    def test_an_index_cannot_name_other_files(self, tmp_path):
        sharded(tmp_path, ["_private/reference.safetensors"])
        assert publishable_files(tmp_path) == ["config.json", INDEX]
        assert "which is not there" in self.refused(tmp_path)
