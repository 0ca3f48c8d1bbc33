"""`DiffusionInfluenceTrainer`: what is recorded is what single images say, and what is saved is a stock pipeline."""

import re

import numpy as np
import pytest
import torch
from brute_force import agrees, observations, parameters, settings, watched
from building import build
from datasets import Dataset
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from hf_unlearn import DiffusionInfluenceConfig, DiffusionInfluenceTrainer, InfluenceReport, attribute


def pipeline(prediction_type="epsilon", **values):
    config = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": (8, 8), "norm_num_groups": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 4,
    } | values  # fmt: skip
    unet = build(lambda given: UNet2DModel(**given), config)
    return DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=20, prediction_type=prediction_type))


def images(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pictures = (torch.rand(n, 1, 8, 8, generator=generator) * 2 - 1).numpy()
    return Dataset.from_dict(
        {"id": [f"i{row}" for row in range(n)], "image": pictures, "label": [row % 3 for row in range(n)]}
    )


class Known(DiffusionInfluenceTrainer):
    """The noise of an image follows from its first pixel."""

    def noise_of(self, clean):
        seeds = [int(1e4 * (1 + image[0, 0, 0].item())) for image in clean]
        noise = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        return noise, torch.tensor([seed % 20 for seed in seeds])


def configured(folder, **values):
    return settings(folder, DiffusionInfluenceConfig, **({"noise_draws": 5, "learning_rate": 0.02} | values))


def loss_of(trainer, theta, image, noise, timestep, label):
    """By hand, from the forward process as DDPM's paper has it."""
    alphas = trainer.pipeline.scheduler.alphas_cumprod[timestep]
    a, s = alphas.sqrt(), (1 - alphas).sqrt()
    kind = trainer.pipeline.scheduler.config.prediction_type
    wanted = {"epsilon": noise, "sample": image, "v_prediction": a * noise - s * image}[kind]
    told = {"class_labels": torch.tensor([label])} if trainer.model.class_embedding is not None else {}
    call = ((a * image + s * noise)[None], torch.tensor([timestep]))
    answer = torch.func.functional_call(trainer.model, theta, call, told).sample[0]
    return ((answer - wanted) ** 2).mean()


@pytest.mark.parametrize(
    ("kind", "options"),
    [("epsilon", {}), ("sample", {}), ("v_prediction", {"num_class_embeds": 3})],
)
def test_records_are_of_single_images(kind, options, tmp_path):
    train, target = images(9), images(3, seed=1)
    trainer = watched(Known)(
        pipeline(kind, **options), configured(tmp_path, max_steps=2), train_dataset=train, target_dataset=target
    )
    trainer.train()
    seen, names = observations(trainer), list(trainer._ghost.covered)
    assert set(names) == set(parameters(trainer.model))
    trainer.model.eval()
    draws, times = trainer.evaluation_noise(torch.zeros(1, 1, 8, 8))
    assert sorted(times.tolist()) == times.tolist()
    assert times[-1] >= 16  # spread over all

    def gradient(theta, loss):
        parts = torch.autograd.grad(loss, [theta[name] for name in names], materialize_grads=True)
        return torch.cat([part.flatten() for part in parts]).double()

    expected = {}
    for number, step in enumerate(trainer.steps):
        theta = {name: value.clone().requires_grad_() for name, value in step["theta"].items()}
        of_target, each, members = 0, [], sum(step["rows"], [])
        for row in target:
            clean = torch.tensor(row["image"])
            losses = [
                loss_of(trainer, theta, clean, noise, t, row["label"])
                for noise, t in zip(draws, times.tolist(), strict=True)
            ]
            of_target = of_target + gradient(theta, sum(losses) / 5) / 3
        for member in members:
            clean = torch.tensor(train[member]["image"])
            noise, t = trainer.noise_of(clean[None])
            each.append(gradient(theta, loss_of(trainer, theta, clean, noise[0], t.item(), train[member]["label"])))
        ones = torch.ones(len(members), dtype=torch.float64)
        expected[number] = (members, ones, step["lr"] * torch.stack(each) @ of_target[:, None])
    assert agrees(seen, expected, rtol=1e-3)


def test_the_sweep_sees_the_noise_that_the_run_had(tmp_path):
    """In the last step there is nothing between an example and the target but that step."""
    args = {"max_steps": 3, "learning_rate": 1e-3}
    last = {}
    for observation in ("in_run", "propagated"):
        one = {"target_window": 0.0} if observation == "propagated" else {}
        trainer = DiffusionInfluenceTrainer(
            pipeline(), configured(tmp_path / observation, observation=observation, **args, **one),
            train_dataset=images(12), target_dataset=images(3, seed=1),
        )  # fmt: skip
        trainer.train()
        seen = observations(trainer)
        last[observation] = seen.value[seen.step == 2][:, 0]
    # The target's gradient is that before the step and that after it: apart by what the step moved.
    np.testing.assert_allclose(last["in_run"], last["propagated"], atol=0.05 * np.abs(last["in_run"]).max())


def test_what_is_saved_is_a_stock_pipeline_and_runs_go_on(tmp_path):
    values = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    given = {"train_dataset": images(9), "target_dataset": images(3, seed=1)}
    trainer = DiffusionInfluenceTrainer(pipeline(), configured(tmp_path / "run", **values), **given)
    trainer.train()
    trainer.save_model()
    whole = trainer.influence.dataset["mu"][:]
    stock = DDPMPipeline.from_pretrained(tmp_path / "run")
    for name, value in stock.unet.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name])
    assert InfluenceReport.from_run(tmp_path / "run").dataset["mu"][:] == whole

    again = DiffusionInfluenceTrainer(str(tmp_path / "run"), configured(tmp_path / "other", **values), **given)
    assert isinstance(again.pipeline.scheduler, DDPMScheduler)
    resumed = DiffusionInfluenceTrainer(pipeline(), configured(tmp_path / "run", **values), **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    np.testing.assert_allclose(
        resumed.influence.dataset["mu"][:], whole, rtol=1e-3, atol=1e-3 * np.nanmax(np.abs(whole))
    )


def test_losses_of_targets_do_not_depend_on_their_batch(tmp_path):
    trainer = DiffusionInfluenceTrainer(
        pipeline(), configured(tmp_path), train_dataset=images(9), target_dataset=images(6, seed=1)
    )
    trainer.model.eval()
    batch = trainer._collate([images(6, seed=1)[row] for row in range(6)])
    with torch.no_grad():
        together = trainer.per_example_loss(trainer.model, batch)[0]
        alone = [
            trainer.per_example_loss(trainer.model, {"pixel_values": batch["pixel_values"][row : row + 1]})[0]
            for row in range(6)
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_a_finished_pipeline(tmp_path):
    """Its images' gradients against the target's, by backward passes of single losses; with δ far above the curvature of a layer the rest is a factor."""
    one, train, target = pipeline(), images(9), images(3, seed=1)
    args = configured(tmp_path / "a", noise_draws=3, per_device_eval_batch_size=4, layers=["conv_out"])
    report = attribute(one, train, target, args=args, damping=1e6)
    trainer = DiffusionInfluenceTrainer(one, args, train_dataset=train, target_dataset=target)
    weights = list(one.unet.conv_out.parameters())
    one.unet.eval()

    def gradients(rows):
        batch = trainer._collate([rows[row] for row in range(len(rows))])
        losses = trainer.per_example_loss(one.unet, batch)[0]
        return torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, retain_graph=True)])
                for loss in losses
            ]
        )

    plain = (gradients(train) @ gradients(target).mean(0)).numpy()
    found = np.array(report.dataset["mu"][:])
    slope = plain @ found / (plain @ plain)
    assert slope > 0
    np.testing.assert_allclose(found, slope * plain, rtol=1e-3, atol=1e-3 * np.abs(found).max())
    assert report.order_only
    one.save_pretrained(tmp_path / "saved")
    again = attribute(str(tmp_path / "saved"), train, target, args=args, damping=1e6)
    np.testing.assert_allclose(again.dataset["mu"][:], report.dataset["mu"][:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "rows", "values", "message"),
    [
        (lambda: torch.nn.Linear(1, 1), images(4), {}, "model: Linear is no pipeline; pass one"),
        (lambda: "nowhere/to be found", images(4), {}, "model='nowhere/to be found': neither a folder with a pipeline nor an id"),
        (lambda: pipeline(sample_size=None), images(4), {}, "model: its config has no sample_size"),
        (lambda: pipeline(num_class_embeds=3), images(4).remove_columns("label"), {}, "no column label; add it"),
        (pipeline, images(4).remove_columns("image"), {}, "train_dataset: has no images"),
        (pipeline, images(4), {"noise_draws": 0}, "noise_draws=0: must be ≥ 1"),
        (pipeline, images(4), {"label_names": ["x"]}, "remove_unused_columns, label_names: images are what"),
    ],
)  # fmt: skip
def test_refused(model, rows, values, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        DiffusionInfluenceTrainer(model(), configured(tmp_path, **values), train_dataset=rows, target_dataset=rows)


def test_other_samplers_have_the_same_forward_process(tmp_path):
    one = pipeline()
    one.scheduler = DDIMScheduler.from_config(one.scheduler.config)
    trainer = DiffusionInfluenceTrainer(one, configured(tmp_path), train_dataset=images(4), target_dataset=images(2))
    assert torch.equal(trainer.schedule.alphas_cumprod, pipeline().scheduler.alphas_cumprod.float())
