"""SalUn: which weights move, and that no other one does, whatever the optimiser."""

import copy

import pytest
import torch
from image_data import QUIET, same, weights
from text_to_image_data import tiny
from vdu_data import seeded

from hf_unlearn import SalUnConfig, SalUnTrainer
from hf_unlearn.unlearning.diffusion.salun import largest


CONCEPT, OTHER = "a photo of a cat", "a photo of a horse"


def trainer_of(folder, pipe=None, **values):
    plain = {
        "forget_prompts": [CONCEPT], "redirect_prompt": OTHER, "num_inference_steps": 2, "max_steps": 3, "forget_samples": 4,
        "own_samples": 4, "learning_rate": 0.01, "grid_images": 0,
    }  # fmt: skip
    args = SalUnConfig(output_dir=str(folder), **(QUIET | plain | values))
    return SalUnTrainer(pipeline=tiny("sd") if pipe is None else pipe, args=args)


class TestLargest:
    @pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 1.0])
    def test_is_what_sorting_finds(self, share):
        scales = {"a": 1e-30, "b": 1.0, "c": 1e20, "d": 1e-3}
        gradients = {name: scale * torch.randn(7, 11, generator=seeded(ord(name))) for name, scale in scales.items()}
        gradients["d"] = gradients["d"][0]
        whole = torch.cat([value.abs().flatten() for value in gradients.values()])
        wanted = torch.zeros_like(whole, dtype=torch.bool)
        wanted[whole.argsort(descending=True)[: int(share * len(whole))]] = True
        found = largest(gradients, share)
        assert {name: mask.shape for name, mask in found.items()} == {n: g.shape for n, g in gradients.items()}
        assert torch.equal(torch.cat([mask.flatten() for mask in found.values()]), wanted)

    def test_zeros_are_never_among_them_and_ties_are(self):
        gradients = {"a": torch.tensor([0.0, 0.0, -0.0, 0.0]), "b": torch.tensor([0.0, 2.0, -2.0, 1.0])}
        for share, expected in ((0.125, [0, 1, 1, 0]), (0.25, [0, 1, 1, 0]), (0.5, [0, 1, 1, 1]), (1.0, [0, 1, 1, 1])):
            found = largest(gradients, share)
            assert not found["a"].any()
            assert found["b"].int().tolist() == expected
        with pytest.raises(ValueError, match="not finite"):
            largest({"a": torch.tensor([1.0, torch.inf])}, 0.5)


def test_mask_is_of_the_gradient_of_the_guided_error(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=1)
    unet = copy.deepcopy(trainer.model).eval()
    trainer.train()
    for parameter in unet.parameters():
        parameter.grad = None
    (batch,) = trainer._batches(trainer.forget_dataset, None)
    states = batch["conditioning"]["encoder_hidden_states"]
    with torch.no_grad():
        empty = trainer.pipeline.encode_prompt([""], "cpu", 1, False)[0].expand_as(states)
    prompted, unprompted = (
        unet(batch["noisy"], batch["timesteps"], encoder_hidden_states=some).sample for some in (states, empty)
    )
    (unprompted + 7.5 * (prompted - unprompted) - batch["noise"]).square().mean().neg().backward()
    gradients = {name: parameter.grad.abs().double() for name, parameter in unet.named_parameters()}
    median = torch.cat([value.flatten() for value in gradients.values()]).median()
    masks = trainer.mask
    wrong = sum(int(((gradients[name] > median) != mask).sum()) for name, mask in masks.items())
    total = sum(mask.numel() for mask in masks.values())
    assert wrong <= 1e-3 * total  # rounding at the threshold
    assert abs(sum(int(mask.sum()) for mask in masks.values()) - total / 2) <= 1


@pytest.mark.parametrize(
    "optimiser",
    [
        {"optim": "sgd", "weight_decay": 0.5, "optim_args": "momentum=0.9"},
        {"weight_decay": 0.5, "ema_decay": 0.5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ],
)
def test_no_other_weight_moves(optimiser, tmp_path):
    trainer = trainer_of(tmp_path, saliency=0.3, **optimiser)
    before = weights(trainer.model)
    trainer.train()
    after, moved = weights(trainer.model), 0
    for name, mask in trainer.mask.items():
        assert torch.equal(after[name][~mask], before[name][~mask])
        moved += int((after[name] != before[name]).sum())
    assert moved > 0.9 * sum(int(mask.sum()) for mask in trainer.mask.values())
    assert same({n: v for n, v in after.items() if n not in trainer.mask}, {n: v for n, v in before.items() if n not in trainer.mask})  # fmt: skip


def test_forget_images_get_the_other_prompts_answer(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    batch = trainer.prepared(trainer.forget_dataset[torch.arange(4)], seeded(0))
    with torch.no_grad():
        now, other = (
            trainer.model(batch["noisy"], batch["timesteps"], encoder_hidden_states=states).sample
            for states in (
                trainer.pipeline.encode_prompt([prompt] * 4, "cpu", 1, False)[0] for prompt in (CONCEPT, OTHER)
            )
        )
    torch.testing.assert_close(trainer.forget_loss(trainer.model, batch), (now - other).square().mean((1, 2, 3)))
    assert trainer.replay_prompts == [OTHER]
    assert trainer.replay_weight == 0.1


def test_resumed_is_as_never_stopped(tmp_path):
    """The mask is that of the original, not of where it was stopped."""
    saved = {"save_strategy": "steps", "save_steps": 1}
    whole = trainer_of(tmp_path / "whole", max_steps=2)
    whole.train()
    trainer_of(tmp_path / "parts", max_steps=1, **saved).train()
    resumed = trainer_of(tmp_path / "parts", max_steps=2, **saved)
    resumed.train(resume_from_checkpoint=True)
    assert same(resumed.mask, whole.mask)
    for name, value in weights(whole.model).items():
        torch.testing.assert_close(weights(resumed.model)[name], value, rtol=1e-4, atol=1e-5)


def test_refuses(tmp_path, tiny_ddpm):
    for values, match in (
        ({"saliency": 0.0}, r"^saliency=0.0: must be in \(0, 1\]"),
        ({"trainable": ["lora"]}, "^trainable='lora': SalUn"),
        ({"pipe": tiny_ddpm}, "^forget_prompts: this model takes no prompts"),
    ):
        with pytest.raises(ValueError, match=match):
            trainer_of(tmp_path, **values)
