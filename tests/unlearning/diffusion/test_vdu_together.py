"""Forget images and own samples in one pass, against the two passes that say the same."""

from contextlib import nullcontext

import pytest
import torch
from vdu_data import arguments, images, prompted_arguments, prompted_images, trained

from hf_unlearn.unlearning.diffusion.together import Together


def watched(module):
    """Rows of every pass, and whether it has gradients."""
    seen = []
    module.register_forward_pre_hook(lambda _, args: seen.append((len(args[0]), torch.is_grad_enabled())))
    return seen


def step(trainer, together):
    """Loss, terms and gradients of one step, and the passes that it took."""
    model, trainer._terms, trainer._terms_count = trainer.model, {}, 0
    model.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        if not together:
            patch.setattr(trainer, "seen_together", lambda *_: nullcontext())
        seen = watched(model)
        (batch,) = [next(iter(trainer.get_train_dataloader()))]
        loss = trainer.compute_loss(model, trainer._prepare_inputs(batch))
    loss.backward()
    model._forward_pre_hooks.popitem()
    return loss.detach(), dict(trainer._terms), [p.grad.clone() for p in model.parameters() if p.requires_grad], seen


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("redirect", [(8, False), (8, True)]),
        ("uniform", [(4, False), (8, True)]),  # the original is not asked about what is forgotten
        ("ascent", [(4, False), (8, True)]),
        ("npo", [(4, False), (4, False), (8, True)]),
    ],
)
def test_is_the_same_in_one_pass(name, passes, tiny_ddpm, tmp_path):
    args = arguments(tmp_path, forget_loss=name, max_steps=1, replay_weight=2.0)
    trainer = trained(tiny_ddpm, args, forget_dataset=images(4))
    trainer.state.global_step = 0
    one, two = (step(trainer, together) for together in (True, False))
    torch.testing.assert_close(one[:2], two[:2], rtol=1e-5, atol=1e-6)
    largest = max(float(gradient.abs().max()) for gradient in two[2])
    for ours, theirs in zip(one[2], two[2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * largest)  # sums of fp32 in another order
    assert sorted(one[3]) == passes
    assert len(two[3]) > len(one[3])
    assert sum(rows for rows, _ in two[3]) == sum(rows for rows, _ in one[3])
    assert trainer._together is None


def test_of_prompted_models_each_batch_with_and_without_its_words(tiny_stable_diffusion, tmp_path):
    """Of four rows: the student with and without words, the original also with neutral ones; and both of own samples. One by one it
    would be nine passes."""
    args = prompted_arguments(tmp_path, max_steps=1)
    trainer = trained(tiny_stable_diffusion, args, forget_dataset=prompted_images())
    together, *_, passes = step(trainer, True)
    assert sorted(passes) == [(8, False), (8, True), (8, True), (12, False)]

    def one_by_one(forward, *batches):
        return tuple(trainer.predictions(forward, batch)[0] for batch in batches)

    trainer.answers = one_by_one
    apart, *_, passes = step(trainer, True)
    assert passes == [(4, enabled) for enabled in [False] * 3 + [True] * 2 + [False] * 2 + [True] * 2]
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)


def test_answers_are_given_out_once_and_to_nobody_else():
    batches = [
        {
            "noisy": torch.full((rows, 1), float(rows)),
            "timesteps": torch.arange(rows),
            "conditioning": {"c": torch.ones(rows, 1)},
        }
        for rows in (2, 3)
    ]
    calls = []

    def ask(forward, batch):
        calls.append(len(batch["noisy"]))
        return forward(batch["noisy"] * batch["conditioning"]["c"] + batch["timesteps"][:, None])

    double, other = (lambda x: 2 * x), (lambda x: 3 * x)
    together = Together(batches, [double])
    expected = [2 * (batch["noisy"] + batch["timesteps"][:, None]) for batch in batches]
    assert torch.equal(together.answer(ask, double, dict(batches[1])), expected[1])
    assert torch.equal(together.answer(ask, double, batches[0]), expected[0])
    assert together.answer(ask, double, batches[0]) is None
    assert together.answer(ask, other, batches[0]) is None
    assert Together(batches, [double]).answer(ask, double, {**batches[0], "conditioning": {}}) is None
    assert calls == [5]
