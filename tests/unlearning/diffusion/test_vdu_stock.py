"""Features of the stock trainer, with a denoiser of diffusers."""

import copy

import pytest
import torch
from vdu_data import arguments, images, trained

from hf_unlearn import VDUTrainer


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_checkpointing_is_that_of_diffusers_and_changes_nothing(name, tiny_ddpm, tmp_path):
    plain, checkpointed, calls = copy.deepcopy(tiny_ddpm), tiny_ddpm, []
    trained(plain, arguments(tmp_path / "plain"))
    make = checkpointed.unet.enable_gradient_checkpointing

    def enable():
        make(
            lambda module, *args: (
                calls.append(module) or torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=False)
            )
        )

    checkpointed.unet.enable_gradient_checkpointing = enable
    trainer = trained(checkpointed, arguments(tmp_path / "checkpointed", **{name: True}))
    assert calls
    assert trainer.args.activation_checkpointing
    assert not checkpointed.unet.is_gradient_checkpointing
    for first, second in zip(plain.unet.parameters(), checkpointed.unet.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_evaluates_without_anything_to_forget(tiny_ddpm, tmp_path):
    trainer = VDUTrainer(tiny_ddpm, arguments(tmp_path), eval_dataset={"test": images()})
    loss = trainer.evaluate()["eval_test_loss"]
    assert loss > 0
    assert trainer.evaluate(images())["eval_loss"] == trainer.evaluate({"a": images()})["eval_a_loss"] == loss
    with pytest.raises(ValueError, match="^forget_dataset: missing"):
        trainer.train()
    assert not list(tmp_path.iterdir())
