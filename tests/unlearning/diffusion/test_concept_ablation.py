"""Concept ablation: whose images, whose answers and which weights, against the formulas by hand."""

import pytest
import torch
from image_data import QUIET, weights
from text_to_image_data import tiny
from vdu_data import seeded

from hf_unlearn import ConceptAblationConfig, ConceptAblationTrainer
from hf_unlearn.unlearning.diffusion.drawing import generate


CONCEPTS, ANCHORS = ["a photo of a cat", "a red cat"], ["a photo of a horse", "a red horse"]


def trainer_of(folder, **values):
    plain = {
        "forget_prompts": CONCEPTS, "redirect_prompt": ANCHORS, "num_inference_steps": 2, "max_steps": 2, "forget_samples": 4,
        "learning_rate": 0.01, "grid_images": 0,
    }  # fmt: skip
    args = ConceptAblationConfig(output_dir=str(folder), **(QUIET | plain | values))
    return ConceptAblationTrainer(pipeline=tiny("sd"), args=args)


def test_images_are_the_anchors_and_prompts_the_concepts(tmp_path):
    trainer = trainer_of(tmp_path)
    drawn = generate(tiny("sd"), ANCHORS * 2, seed=1000 * trainer.args.seed + 1, num_inference_steps=2, latents=True)
    torch.testing.assert_close(trainer.forget_dataset.latents, drawn, rtol=1e-4, atol=1e-4)
    batch = trainer.forget_dataset[torch.arange(4)]
    for key, prompts in (("conditioning", CONCEPTS), ("neutral", ANCHORS)):
        with torch.no_grad():
            states = trainer.pipeline.encode_prompt(prompts * 2, "cpu", 1, False)[0]
        torch.testing.assert_close(batch[key]["encoder_hidden_states"], states, rtol=1e-4, atol=1e-5)


def test_gradient_is_that_of_the_students_own_answer_held_still(tmp_path):
    trainer = trainer_of(tmp_path)
    unet = trainer.model.eval()
    batch = trainer.prepared(trainer.forget_dataset[torch.arange(4)], seeded(0))
    concept, anchor = (batch[key]["encoder_hidden_states"] for key in ("conditioning", "neutral"))
    seen = batch["noisy"], batch["timesteps"]
    target = unet(*seen, encoder_hidden_states=anchor).sample.detach()
    expected = (unet(*seen, encoder_hidden_states=concept).sample - target).square().mean()
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    by_hand = torch.autograd.grad(expected, trained)
    loss = trainer.forget_loss(unet, batch).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    for mine, its in zip(torch.autograd.grad(loss, trained), by_hand, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-7)


def test_trains_keys_and_values_of_cross_attention(tmp_path):
    trainer = trainer_of(tmp_path, own_samples=4)
    before = weights(trainer.model)
    trainer.train()
    changed = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".attn2.to_k." in name or ".attn2.to_v." in name}
    assert trainer.replay_prompts == ANCHORS
    batch = trainer.prepared(trainer.own.kept[torch.arange(4)], seeded(0))
    error = trainer.model(batch["noisy"], batch["timesteps"], **batch["conditioning"]).sample - batch["noise"]
    torch.testing.assert_close(trainer.replay_loss(trainer.model, batch), error.square().mean((1, 2, 3)))


def test_goes_the_way_that_is_asked_for(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=20)
    trainer.train()
    assert trainer.outcome.now["away"] < 0.5 * trainer.outcome.original["away"]


def test_refuses(tmp_path):
    for values, match in (
        ({"forget_prompts": None, "redirect_prompt": ""}, "^forget_prompts: missing"),
        ({"redirect_prompt": ["a", "b", "c"]}, "^redirect_prompt: has 3 prompts for 2"),
        ({"redirect_prompt": CONCEPTS[0]}, "^redirect_prompt: .* is among forget_prompts"),
    ):
        with pytest.raises(ValueError, match=match):
            trainer_of(tmp_path, **values)
