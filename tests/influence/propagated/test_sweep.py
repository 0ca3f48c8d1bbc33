"""The sweep against autograd through the whole unrolled run, and against the real optimisers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_unlearn.influence.propagated.optimizers import FlatOptimizer, StepSettings, clip
from hf_unlearn.influence.propagated.sweep import Sweep
from hf_unlearn.influence.propagated.trajectory import MicroBatch, Trajectory, random_states
from hf_unlearn.influence.targets import OwnTargets, Targets


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.3}),
    "sgd, decay": (torch.optim.SGD, {"lr": 0.3, "weight_decay": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8}),
    "dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"lr": 0.05, "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1, "betas": (0.8, 0.9)}),
}
STEPS, BATCH = 7, 4


class Net(nn.Module):
    def __init__(self, dropout=0.0, groups=0):
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)
        self.norm = nn.GroupNorm(groups, 5) if groups else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.second(self.dropout(torch.tanh(self.norm(self.first(x)))))


def per_example(model, inputs):
    losses = F.cross_entropy(model(inputs["x"]), inputs["labels"], reduction="none")
    return losses, torch.ones_like(losses)


def make(kind, dropout=0.0, two_groups=False, groups=0):
    torch.manual_seed(0)
    model = Net(dropout, groups).double()
    optimizer_class, settings = OPTIMIZERS[kind]
    parameters = list(model.parameters())
    groups = parameters
    if two_groups:
        groups = [
            {"params": [p for p in parameters if p.dim() > 1]},
            {"params": [p for p in parameters if p.dim() == 1], "lr": 0.02, "weight_decay": 0.0},
        ]
    return model, optimizer_class(groups, **settings)


def batches():
    generator = torch.Generator().manual_seed(1)

    def draw():
        x = torch.randn(BATCH, 3, generator=generator, dtype=torch.float64)
        return {"x": x, "labels": torch.randint(2, (BATCH,), generator=generator)}

    return [draw() for _ in range(STEPS)]


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def run(folder, kind, *, max_norm=0.0, segment=1, start=0, parts=1, **options):
    """A real training that is written down, as the trainer writes it."""
    model, optimizer = make(kind, **options)
    flat = FlatOptimizer(optimizer, list(model.parameters()))
    trajectory = Trajectory(folder, start=start, segment=segment)
    for step, batch in enumerate(batches()):
        trajectory.before(step, flat.state)
        settings = flat.settings(max_norm)
        optimizer.zero_grad()
        for part in range(parts):
            rows = slice(part * BATCH // parts, (part + 1) * BATCH // parts)
            inputs = {name: value[rows] for name, value in batch.items()}
            random = random_states(torch.device("cpu"))
            losses, weight = per_example(model, inputs)
            coefficient = torch.full_like(losses, 1 / BATCH).detach()
            (coefficient * losses).sum().backward()
            examples = step * BATCH + torch.arange(BATCH)[rows]
            margin = examples / 100.0
            trajectory.add(step, MicroBatch(inputs, random, examples, weight, coefficient, margin))
        if max_norm:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        trajectory.after(step, settings)
    return model, flat, trajectory


def target_sets():
    generator = torch.Generator().manual_seed(2)
    rows = {
        name: [
            {"x": torch.randn(3, generator=generator, dtype=torch.float64), "labels": torch.tensor(label)}
            for _ in range(5)
        ]
        for name, label in (("zeros", 0), ("ones", 1))
    }
    return Targets(rows, collate, per_example, batch_size=3, seed=0)


def swept(model, flat, trajectory, window=1):
    gains, variances = {}, {}

    def record(step, examples, weight, values, variance, margin):
        assert torch.equal(margin, examples / 100.0)
        gains[step], variances[step] = values, torch.as_tensor(variance)

    Sweep(model, flat, trajectory, target_sets(), per_example, window=window).run(STEPS, record)
    return gains, variances


def unrolled(kind, *, max_norm=0.0, window=1, sets=None, **options):
    """−∂ℓ/∂q of every example by autograd through the run, times the batch size: by definition what the sweep observes."""
    model, optimizer = make(kind, **options)
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    flat = FlatOptimizer(optimizer, list(model.parameters()))

    def losses(theta, inputs):
        parts = theta.split([shape.numel() for shape in shapes])
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        logits = torch.func.functional_call(model, values, (inputs["x"],))
        return F.cross_entropy(logits, inputs["labels"], reduction="none")

    groups = flat.settings(max_norm).groups
    state = tuple(value.requires_grad_() for value in flat.state())
    coefficients = [torch.full((BATCH,), 1 / BATCH, dtype=torch.float64, requires_grad=True) for _ in range(STEPS)]
    thetas = []
    for step, (batch, coefficient) in enumerate(zip(batches(), coefficients, strict=True)):
        loss = (coefficient * losses(state[0], batch)).sum()
        (gradient,) = torch.autograd.grad(loss, state[0], create_graph=True)
        state = flat.step(state, gradient, StepSettings(step, groups, max_norm))
        thetas.append(state[0])
    gains = {step: [] for step in range(STEPS)}
    targets = target_sets()
    for rows in (sets or targets.datasets).values():
        inputs = targets.collate(rows)
        loss = sum(losses(theta, inputs).mean() for theta in thetas[-window:]) / window
        for step, gradient in enumerate(torch.autograd.grad(loss, coefficients, retain_graph=True)):
            gains[step].append(-gradient)
    return thetas[-1], {step: torch.stack(parts, dim=1) for step, parts in gains.items()}


def assert_equal_gains(actual, expected, rtol=1e-7):
    assert actual.keys() == expected.keys()
    for step in actual:
        torch.testing.assert_close(actual[step], expected[step], rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("clipped", [False, True], ids=["", "clipping, groups and window"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_gains_are_those_of_the_unrolled_run(kind, clipped, tmp_path):
    options = {"max_norm": 0.5, "two_groups": True} if clipped else {}  # norms of the gradients are 0.2 to 0.8
    model, flat, trajectory = run(tmp_path, kind, **options)
    theta, expected = unrolled(kind, window=3 if clipped else 1, **options)
    torch.testing.assert_close(flat.state()[0], theta)  # our step is the optimiser's
    assert_equal_gains(swept(model, flat, trajectory, window=3 if clipped else 1)[0], expected)


def test_group_norms(tmp_path):
    """Of which torch cannot take second derivatives together."""
    model, flat, trajectory = run(tmp_path, "adam", groups=1)
    assert_equal_gains(swept(model, flat, trajectory)[0], unrolled("adam", groups=1)[1])


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
class TestTrajectory:
    def test_segments_that_are_computed_again_change_nothing(self, kind, tmp_path):
        expected = swept(*run(tmp_path / "all", kind, dropout=0.3))
        actual = swept(*run(tmp_path / "some", kind, dropout=0.3, segment=3))
        assert len(list((tmp_path / "some").glob("state-*"))) == 3
        for ours, theirs in zip(actual, expected, strict=True):
            assert_equal_gains(ours, theirs, rtol=1e-6)

    def test_micro_batches_add_up_to_the_batch(self, kind, tmp_path):
        expected = swept(*run(tmp_path / "one", kind))
        actual = swept(*run(tmp_path / "two", kind, parts=2))
        for ours, theirs in zip(actual, expected, strict=True):
            assert_equal_gains(ours, theirs)

    def test_last_steps_alone_are_the_end_of_the_whole_sweep(self, kind, tmp_path):
        whole, _ = swept(*run(tmp_path / "whole", kind))
        last, _ = swept(*run(tmp_path / "last", kind, start=4))
        assert_equal_gains(last, {step: whole[step] for step in (4, 5, 6)})

    def test_the_model_is_as_before(self, kind, tmp_path):
        model, flat, trajectory = run(tmp_path, kind, dropout=0.3)
        before = [p.detach().clone() for p in model.parameters()]
        model.eval()
        random = torch.get_rng_state()
        swept(model, flat, trajectory, window=2)
        assert all(torch.equal(p, value) for p, value in zip(model.parameters(), before, strict=True))
        assert torch.equal(torch.get_rng_state(), random)


def test_examples_that_are_their_own_targets(tmp_path):
    """Gains of every example of a batch on every other, from the unrolled run, reduced by loops."""
    model, flat, trajectory = run(tmp_path, "momentum", parts=2)
    rows = [{name: value[i] for name, value in batch.items()} for batch in batches() for i in range(BATCH)]

    found = {}
    own = OwnTargets(rows, collate, per_example, batch_size=5)
    Sweep(model, flat, trajectory, own, per_example, window=1).run(
        STEPS, lambda step, examples, weight, values, variance, _: found.update({step: (examples, values, variance)})
    )
    _, expected = unrolled("momentum", sets={str(i): [row] for i, row in enumerate(rows)})
    for step, (examples, values, variance) in found.items():
        assert variance is None
        for i, example in enumerate(examples.tolist()):
            gains = [expected[step][j, example].item() for j in range(BATCH)]
            mean = sum(gains) / BATCH
            spread = sum((gain - mean) ** 2 for gain in gains) / (BATCH - 1) / BATCH
            torch.testing.assert_close(
                values[i].tolist(), [gains[example % BATCH], mean, spread], rtol=1e-6, atol=1e-12
            )


def test_variance_is_that_of_the_last_steps_loss_whatever_the_window(tmp_path):
    model, flat, trajectory = run(tmp_path, "momentum")
    gains, variances = swept(model, flat, trajectory, window=1)
    _, with_window = swept(model, flat, trajectory, window=4)
    for step, values in gains.items():
        torch.testing.assert_close(variances[step], values.var(0) / BATCH)
        torch.testing.assert_close(with_window[step], variances[step])


def test_an_example_less_moves_the_end_as_the_gain_says(tmp_path):
    """No derivative: train again with one example's coefficient a little lower."""
    model, flat, trajectory = run(tmp_path, "adamw")
    gains, _ = swept(model, flat, trajectory)
    step, example, less = 3, 2, 1e-5
    again, optimizer = make("adamw")
    for index, batch in enumerate(batches()):
        optimizer.zero_grad()
        losses, _ = per_example(again, batch)
        coefficient = torch.full_like(losses, 1 / BATCH).detach()
        if index == step:
            coefficient[example] -= less
        (coefficient * losses).sum().backward()
        optimizer.step()
    targets = target_sets()
    change = (targets.losses(again) - targets.losses(model)) / less
    torch.testing.assert_close(change, gains[step][example], rtol=1e-3, atol=1e-7)


def test_the_cotangent_that_is_kept_is_the_derivative_by_the_state_of_that_step(tmp_path):
    """With a window, of the last step's loss all the same. No derivative: train again from θ a little further on."""
    model, flat, trajectory = run(tmp_path, "momentum")
    sweep = Sweep(model, flat, trajectory, target_sets(), per_example, window=4, keep=3)
    sweep.run(STEPS, lambda *_: None)
    direction = torch.randn(sweep.kept.shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    again, optimizer = make("momentum")
    for index, batch in enumerate(batches()):
        if index == 3:
            start = 0
            with torch.no_grad():
                for p in again.parameters():
                    p += 1e-6 * direction[start : start + p.numel()].view_as(p)
                    start += p.numel()
        optimizer.zero_grad()
        per_example(again, batch)[0].mean().backward()
        optimizer.step()
    targets = target_sets()
    change = (targets.losses(again) - targets.losses(model)) / 1e-6
    torch.testing.assert_close(change, sweep.kept @ direction, rtol=1e-3, atol=1e-6)


def test_what_no_batch_has_moved_yet_is_not_divided_by_nothing():
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, betas=(0.9, 0.99))
    flat, states = FlatOptimizer(optimizer, [parameter]), []
    for gradient in ([1.0, 0.0, 0.0], [1.0, 2.0, 0.0]):
        states.append((flat.state(), flat.settings(0.0)))
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    now, later = 1.0, 4 * 0.01 / (1 - 0.99**2)
    reach = flat.reach(states[0][0], torch.tensor([1.0, 0.01, 0.0]), states[0][1])
    torch.testing.assert_close(reach, torch.tensor([now, 0.01 / later**0.5, 1.0]), rtol=1e-4, atol=1e-6)
    sgd = FlatOptimizer(torch.optim.SGD([parameter]), [parameter])
    assert sgd.reach(sgd.state(), parameter, sgd.settings(0.0)) == 1.0


def test_clip_is_torchs():
    parameter = nn.Parameter(torch.zeros(6))
    for norm in (0.5, 100.0):
        parameter.grad = torch.arange(6.0)
        nn.utils.clip_grad_norm_([parameter], norm)
        torch.testing.assert_close(clip(torch.arange(6.0), norm), parameter.grad)


def test_refusals(tmp_path):
    model = Net()
    parameters, own = list(model.parameters()), list(model.first.parameters())
    for optimizer, message in (
        (torch.optim.RMSprop(parameters), "^optim: RMSprop cannot be carried influence through"),
        (torch.optim.AdamW(parameters, amsgrad=True), "^optim: amsgrad=True is not supported"),
        (torch.optim.SGD(parameters, maximize=True), "^optim: maximize=True is not supported"),
        (torch.optim.SGD(own, lr=0.1), "^optim: holds not all trainable parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            FlatOptimizer(optimizer, parameters)
    with pytest.raises(ValueError, match="step-00000003.safetensors is missing; restore it"):
        Trajectory(tmp_path, start=0, segment=1).step(3, torch.device("cpu"))
