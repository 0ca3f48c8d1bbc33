"""Files that are whole or not there, and those that are the owner's alone."""

import os

import pytest
import torch

from hf_unlearn.files import kept_private, save_tensors


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
