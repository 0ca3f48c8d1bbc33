"""The one table of what is refused."""

import math

import pytest
import torch

from hf_unlearn import GANConfig, InfluenceConfig, UnlearnConfig, UnlearnSFTConfig, UnlearnTrainer
from hf_unlearn.training.checks import check_is_not_original, within


@pytest.mark.parametrize(
    ("rule", "kept", "broken"),
    [
        ("> 0", [1e-9, 5], [0, -1, math.nan]),
        ("≥ 2", [2, 3.5], [1, math.nan]),
        ("in [0, 1)", [0, 0.999], [1, -1e-9, math.nan]),
        ("in (0, 1]", [1, 1e-9], [0, 1.001]),
    ],
)
def test_rules(rule, kept, broken):
    assert all(within(value, rule) for value in kept)
    assert not any(within(value, rule) for value in broken)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("guard_patience", "3", "guard_patience='3': must be a number"),
        ("guard_patience", True, "guard_patience=True: must be a number"),
        ("guard_patience", 2.5, "guard_patience=2.5: must be a whole number"),
        ("merge_adapter", "no", "merge_adapter='no': must be True or False"),
        ("utility_tolerance", math.inf, "utility_tolerance=inf: must be finite"),
        ("bn", "thawed", "bn='thawed': must be one of frozen, train"),
        ("forget_weight", None, "forget_weight=None: must be a number"),
    ],
)
def test_types_and_words(field, value, said, tmp_path):
    with pytest.raises(ValueError) as error:
        UnlearnConfig(str(tmp_path), use_cpu=True, **{field: value})
    assert str(error.value) == said


def test_the_folder_of_the_original_is_not_written_over(tiny_resnet, tmp_path):
    tiny_resnet.save_pretrained(tmp_path / "model")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    args = UnlearnConfig(str(tmp_path / "model"), use_cpu=True, report_to="none", forget="examples", heldout_loss=1.0)
    with pytest.raises(ValueError, match="^output_dir: .* holds the original model"):
        UnlearnTrainer(str(tmp_path / "model"), args, forget_dataset=[{"pixel_values": None, "labels": 0}])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_denoiser_lies_in_the_folder_of_its_pipeline(tmp_path):
    for name in ("unet", "mine", "checkpoint-3"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for output, original in (
        ("", "unet"),  # where a pipeline would be saved, this is its denoiser
        ("", "checkpoint-3"),  # and where a run would save its third step, or rotate its checkpoints
        ("mine", "link"),
        ("link", "mine"),
        ("mine/below", "mine"),
        ("unet/../mine/below/more", "link"),
    ):
        with pytest.raises(ValueError, match="^output_dir: .* holds the original model; choose another folder$"):
            check_is_not_original(tmp_path / output, tmp_path / original)
    for output in ("", "unet", "mine2", "other/mine"):
        check_is_not_original(tmp_path / output, tmp_path / "mine")
    (tmp_path / "model_index.json").touch()
    for output in ("", "unet", "vae", "unlearned"):
        with pytest.raises(ValueError, match="holds the original model"):
            check_is_not_original(tmp_path / output, tmp_path / "unet")
    check_is_not_original(tmp_path, "me/on-the-hub")
    check_is_not_original(tmp_path, None)


@pytest.mark.parametrize("kind", [UnlearnConfig, UnlearnSFTConfig, InfluenceConfig, GANConfig])
class TestSettled:
    def test_memory_is_pinned_for_an_accelerator_alone(self, kind, tmp_path):
        assert kind(str(tmp_path), report_to="none").dataloader_pin_memory == torch.accelerator.is_available()

    @pytest.mark.parametrize("trackers", ["wand", ["tensorboard", "wand"]])
    def test_a_tracker_that_there_is_none_of(self, kind, trackers, tmp_path):
        with pytest.raises(ValueError, match="^report_to='wand': must be all, none, or some of .*wandb"):
            kind(str(tmp_path), report_to=trackers)
