"""Files that are whole or not there, and those that are the owner's alone."""

import os

import pytest
import torch

from hf_unlearn.files import kept_private, loading, save_tensors


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777 & ~0o700])
def test_what_lies_below_the_private_folder_is_the_owner_s_alone(tmp_path, umask):
    (tmp_path / "run/_private/old").mkdir(parents=True, mode=0o755)
    before = os.umask(umask)
    try:
        save_tensors({"a": torch.zeros(1)}, tmp_path / "run/_private/old/deep/a.safetensors")
        with kept_private(tmp_path / "run/_private/report") as folder:
            (folder / "inside").mkdir(parents=True)
            (folder / "inside/rows.arrow").write_text("rows")
        save_tensors({"a": torch.zeros(1)}, tmp_path / "run/a.safetensors")
        with kept_private(tmp_path / "run/card.md") as file:
            file.write_text("card")
    finally:
        os.umask(before)
    paths = [tmp_path / "run/_private", *(tmp_path / "run/_private").rglob("*")]
    assert len(paths) == 7
    for path in paths:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    assert (tmp_path / "run/card.md").stat().st_mode & 0o777 == 0o666 & ~umask


class TestLoading:
    """What is said of a name that is plainly something else."""

    def said(self, name, kind):
        with pytest.raises(ValueError) as caught, loading("model", name, kind):
            raise OSError("gone\nand more")
        return str(caught.value)

    @pytest.mark.parametrize(
        "address", ["https://huggingface.co/me/my-model", "http://hf.co/me/my-model/tree/main?x=1"]
    )
    def test_an_address(self, address):
        assert self.said(address, "a model") == f"model={address!r}: is an address; give the id alone, 'me/my-model'"

    def test_what_else_lies_there(self, tmp_path):
        (tmp_path / "pipeline").mkdir()
        (tmp_path / "model").mkdir()
        for name in ("pipeline/model_index.json", "model/config.json"):
            (tmp_path / name).write_text("{}")
        pipeline, model, file = (str(tmp_path / name) for name in ("pipeline", "model", "model/config.json"))
        assert self.said(pipeline, "a model").startswith(
            f"model={pipeline!r}: holds a pipeline (model_index.json); give "
        )
        assert self.said(model, "a GANPipeline").startswith(
            f"model={model!r}: holds a single model (config.json); give "
        )
        assert (
            self.said(file, "a model") == f"model={file!r}: is a file; give a folder with a model, or an id on the Hub"
        )
        assert self.said(f"{model}/none", "a model").startswith(f"model='{model}/none': there is no such folder; ")
        for name, kind in ((pipeline, "a pipeline"), (model, "a model"), ("me/nothing", "a model"), ("", "a model")):
            assert self.said(name, kind) == f"model={name!r}: neither a folder with {kind} nor an id on the Hub (gone)"
