"""ESD: what the student is shown, what is asked of it and what is trained, against the formulas by hand."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler
from image_data import QUIET, same, weights
from text_to_image_data import tiny
from vdu_data import seeded

from hf_unlearn import ESDConfig, ESDTrainer
from hf_unlearn.parameters.reference import ReferencePoint


PROMPTS = ["a photo of a cat", "a red cat"]
STEPS = 5


def trainer_of(folder, pipe=None, **values):
    plain = {
        "forget_prompts": PROMPTS, "num_inference_steps": STEPS, "max_steps": 2, "learning_rate": 0.01, "forget_samples": 6,
        "per_device_train_batch_size": 4, "grid_images": 0,
    }  # fmt: skip
    args = ESDConfig(output_dir=str(folder), **(QUIET | plain | values))
    return ESDTrainer(pipeline=tiny("sd") if pipe is None else pipe, args=args)


def answer(unet, noisy, timestep, states):
    return unet(noisy, timestep, encoder_hidden_states=states).sample


@pytest.fixture
def moved(tmp_path):
    """A trainer whose student has left the original, that original, and a batch of all rows."""
    trainer = trainer_of(tmp_path, variant="u")
    original = copy.deepcopy(trainer.model).eval()
    trainer.reference = ReferencePoint.capture(trainer.model)
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, trainer.model.parameters()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=seeded(parameter.numel()))
    batch = trainer.prepared(trainer.forget_dataset[torch.arange(6)], seeded(3))
    return trainer, original, batch


@torch.no_grad()
def test_is_shown_what_the_student_draws_halfway(moved):
    """Row by row with the DDIM of diffusers, guided by 3, left after as many steps as it happened."""
    trainer, _, batch = moved
    generator = seeded(3)
    noise = torch.randn(batch["noisy"].shape, generator=generator)
    taken = torch.randint(STEPS, (6,), generator=generator)
    assert len(set(taken.tolist())) > 2
    scheduler = DDIMScheduler.from_config(trainer.pipeline.scheduler.config, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    told, empty = (trainer.pipeline.encode_prompt(prompts, "cpu", 1, False)[0] for prompts in (PROMPTS, [""]))
    student = trainer.model.eval()
    for row in range(6):
        x, states = noise[[row]], told[[row % 2]]
        for timestep in scheduler.timesteps[: taken[row]]:
            unprompted, prompted = (answer(student, x, timestep, some) for some in (empty, states))
            x = scheduler.step(unprompted + 3 * (prompted - unprompted), timestep, x).prev_sample
        torch.testing.assert_close(batch["noisy"][[row]], x, rtol=1e-4, atol=1e-4)
        assert batch["timesteps"][row] == scheduler.timesteps[taken[row]]
    known = trainer.schedule.add_noise(batch["clean"], batch["noise"], batch["timesteps"])
    late = taken > 0
    torch.testing.assert_close(known[late], batch["noisy"][late], rtol=1e-4, atol=1e-4)


def test_is_asked_for_the_other_side_of_the_empty_prompt(moved):
    trainer, original, batch = moved
    trainer.args.negative_guidance = 1.5
    with torch.no_grad():
        states = batch["conditioning"]["encoder_hidden_states"]
        empty = trainer.pipeline.encode_prompt([""], "cpu", 1, False)[0].expand_as(states)
        unprompted, prompted = (answer(original, batch["noisy"], batch["timesteps"], some) for some in (empty, states))
        wanted = unprompted - 1.5 * (prompted - unprompted)
        now = answer(trainer.model, batch["noisy"], batch["timesteps"], states)
    expected = (now - wanted).square().mean((1, 2, 3))
    torch.testing.assert_close(trainer.forget_loss(trainer.model, batch), expected, rtol=1e-4, atol=1e-6)
    assert (prompted - unprompted).norm() > 0.1 * unprompted.norm()


@pytest.mark.parametrize("variant", ["x", "u"])
def test_trains_the_layers_of_its_variant_without_an_image(variant, tmp_path):
    pipe = tiny("sd")
    before = weights(pipe.unet)
    trainer = trainer_of(tmp_path, pipe, variant=variant)
    trainer.train()
    now = weights(pipe.unet)
    assert trainer.forget_figures(trainer.model) == trainer.forget_figures(trainer.model)
    assert same(weights(pipe.unet), now)  # a look leaves no trace
    changed = {name for name, value in now.items() if not torch.equal(value, before[name])}
    crossing = {name for name in before if ".attn2." in name}
    assert changed
    assert changed <= (crossing if variant == "x" else before.keys() - crossing)
    assert {name for name, value in pipe.unet.named_parameters() if value.requires_grad} >= changed
    assert not list(tmp_path.rglob("forget.safetensors"))
    assert "of the way" in trainer.outcome_line


def test_goes_the_way_that_is_asked_for(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=20, learning_rate=3e-3, num_inference_steps=2)
    trainer.train()
    assert trainer.outcome.now["away"] < 0.5 * trainer.outcome.original["away"]
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "2303.07345" in card
    assert not any(prompt in card for prompt in PROMPTS)


def test_keeps_what_it_is_given_to_keep(tmp_path):
    """Own samples are noised images as in every other method."""
    trainer = trainer_of(tmp_path, own_samples=4, replay_prompts=["a dog"], guard=True, guard_steps=1)
    trainer.train()
    batch = trainer.prepared(trainer.own.kept[torch.arange(4)], seeded(0))
    torch.testing.assert_close(batch["clean"], trainer.own.kept.latents)
    assert trainer.outcome.utility_drop is not None


@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_other_pipelines_are_shown_finite_images_and_trained(kind, tmp_path):
    trainer = trainer_of(
        tmp_path, tiny(kind), num_inference_steps=2, max_steps=1, learning_rate=1e-3, forget_samples=2
    )
    before = weights(trainer.model)
    trainer.train()
    assert not same(weights(trainer.model), before)
    batch = trainer.prepared(trainer.forget_dataset[torch.arange(2)], seeded(3))
    assert batch["noisy"].shape == (2, *trainer.architecture.latent_shape)
    assert batch["noisy"].isfinite().all()


def test_refuses(tmp_path):
    for values, match in (
        ({"forget_prompts": None}, "^forget_prompts: missing"),
        ({"variant": "y"}, "^variant='y': must be one of x, u"),
        ({"negative_guidance": -1}, "^negative_guidance=-1: must be ≥ 0"),
        ({"trainable": ["!*"]}, "leaves every parameter out"),
        ({"trainable": ["!nothing"]}, "no parameter's name fits '!nothing'"),
    ):
        with pytest.raises(ValueError, match=match):
            trainer_of(tmp_path, **values)
    assert not list(tmp_path.iterdir())
