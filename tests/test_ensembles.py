"""Ensembles against `torch.optim` model by model, and influence by brute force against its formulas."""

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn

from hf_unlearn import brute_force, ensembles
from hf_unlearn.brute_force import BruteForceMu, brute_force_mu, disattenuated
from hf_unlearn.ensembles import ensemble_losses, epoch_orders, train_ensemble


INPUTS = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(1))
RAGGED = [range(8), range(40), range(3, 24), [39, 0, 7, 7, 5], range(10, 31), [2]]  # 2, 10, 6, 2, 6, 1 steps of 4
SEEDS = [11, 3, 0, 7, 8, 5]
OPTIMIZERS = {
    "sgd": {"lr": 0.2},
    "sgd momentum": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02},
    "adamw": {"optimizer": "adamw", "lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
}
# Some 30 steps on values of about 1, each rounded to 2e-16 (1e-7): AdamW divides by at least eps, and momentum adds up ten
# steps, so errors grow by at most 1e3. 1e-10 leaves another factor of ten; 1e-5 (plain SGD, no growth) one of three.
EXACT, SINGLE = {"rtol": 1e-10, "atol": 1e-10}, {"rtol": 1e-5, "atol": 1e-5}


def mlp(seed):
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


class Convolution(nn.Module):
    """A constant buffer, a frozen layer and tied weights: all that a stacked state must carry."""

    def __init__(self, seed):
        super().__init__()
        self.first, self.frozen, self.head = nn.Conv1d(1, 2, 3), nn.Linear(3, 3), nn.Linear(6, 3)
        self.again = self.head
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.rand(3))

    def forward(self, x):
        h = self.frozen(self.first(x.unsqueeze(1)) * self.scale).flatten(1)
        return self.head(h) + self.again(h.relu())


def alone(
    model, rows, seed, *, batch_size, lr, epochs=1, max_steps=None, optimizer="sgd", schedule="constant", **options
):
    """The same training as torch.optim does it, one model, one batch after another."""
    orders = epoch_orders(torch.as_tensor(rows), seed)
    if max_steps is None:
        batches = [batch for _ in range(epochs) for batch in next(orders).split(batch_size)]
    else:  # full ones, that run on from one epoch into the next
        count = max_steps * batch_size
        batches = torch.cat([next(orders) for _ in range(count // len(rows) + 1)])[:count].split(batch_size)
    trainable = [p for p in model.parameters() if p.requires_grad]
    opt = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer](trainable, lr=lr, **options)
    decay = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 - t / len(batches) if schedule == "linear" else 1.0)
    for batch in batches:
        opt.zero_grad()
        F.cross_entropy(model(INPUTS[batch].to(trainable[0].dtype)), LABELS[batch]).backward()
        opt.step()
        decay.step()
    return dict(model.named_parameters()) | dict(model.named_buffers())


def assert_as_if_alone(make_model, members, seeds, dtype=torch.float64, **settings):
    state = train_ensemble(
        lambda seed: make_model(seed).to(dtype), INPUTS.to(dtype), LABELS, members, seeds, **settings
    )
    for i, (rows, seed) in enumerate(zip(members, seeds, strict=True)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = make_model(seed).to(dtype)
        reference = {name: value.detach() for name, value in alone(model, list(rows), seed, **settings).items()}
        got = {name: value[i] for name, value in state.items()}
        torch.testing.assert_close(got, reference, **(EXACT if dtype == torch.float64 else SINGLE))


class TestTrainEnsemble:
    @pytest.mark.parametrize(
        ("make_model", "optimizer", "schedule", "dtype"),
        [
            (mlp, "sgd", "linear", torch.float32),
            (mlp, "sgd momentum", "constant", torch.float64),
            (mlp, "adamw", "linear", torch.float64),
            (Convolution, "sgd", "constant", torch.float64),
            (Convolution, "sgd momentum", "linear", torch.float64),
            (Convolution, "adamw", "constant", torch.float64),
        ],
    )
    def test_every_member_is_as_if_trained_alone_by_torch(self, make_model, optimizer, schedule, dtype):
        settings = {"epochs": 3, "batch_size": 4, "schedule": schedule, **OPTIMIZERS[optimizer]}
        assert_as_if_alone(make_model, RAGGED, SEEDS, dtype, **settings)

    def test_steps_instead_of_epochs_are_all_full_and_as_many_for_everyone(self):
        members = [range(3), range(5, 16), range(2, 14)]
        assert_as_if_alone(mlp, members, [3, 4, 5], max_steps=7, batch_size=4, lr=0.2, schedule="linear")

    @pytest.mark.parametrize("chunk", [1, 4])
    def test_a_member_does_not_depend_on_its_company(self, chunk):
        data = lambda seed: mlp(seed).double(), INPUTS.double(), LABELS  # noqa: E731
        settings = {"epochs": 2, "batch_size": 4, **OPTIMIZERS["sgd momentum"]}
        state = train_ensemble(*data, RAGGED, SEEDS, **settings)
        shuffled = [4, 0, 5, 2, 1, 3]
        members, seeds = [RAGGED[i] for i in shuffled], [SEEDS[i] for i in shuffled]
        other = train_ensemble(*data, members, seeds, chunk=chunk, **settings)
        torch.testing.assert_close(other, {name: value[shuffled] for name, value in state.items()}, **EXACT)

    def test_rows_of_others_are_never_seen(self):
        inputs = INPUTS.clone()
        inputs[[0, *range(30, 40)]] = float("nan")
        members = [range(1, 30), range(2, 9), range(40)]
        state = train_ensemble(mlp, inputs, LABELS, members, [0, 1, 2], epochs=2, batch_size=8, lr=0.1)
        finite = torch.stack([value.flatten(1).isfinite().all(1) for value in state.values()]).all(0)
        assert finite.tolist() == [True, True, False]

    def test_seeds_decide_everything_and_the_global_state_nothing(self):
        heard, settings = [], {"epochs": 1, "batch_size": 8, "lr": 0.1}

        def make_model(seed):
            heard.append(seed)
            return mlp(seed)

        torch.manual_seed(0)
        before = torch.get_rng_state()
        state = train_ensemble(make_model, INPUTS, LABELS, [range(40)] * 3, [1, 2, 1], **settings)
        assert torch.equal(torch.get_rng_state(), before)
        assert heard[-3:] == [1, 2, 1]
        torch.manual_seed(99)
        again = train_ensemble(mlp, INPUTS, LABELS, [range(40)] * 3, [1, 2, 1], **settings)
        torch.testing.assert_close(again, state, **SINGLE)
        for value in state.values():
            torch.testing.assert_close(value[0], value[2], **SINGLE)
            assert (value[0] - value[1]).abs().max() > 0.01

    def test_another_loss(self):
        def squared(outputs, labels):
            return (outputs - F.one_hot(labels, 3)).square().sum(-1)

        settings = {"epochs": 300, "batch_size": 40, "lr": 0.1, "loss": squared}
        linear = train_ensemble(lambda seed: nn.Linear(5, 3), INPUTS, LABELS, [range(40)], [0], **settings)
        design = torch.cat([INPUTS, torch.ones(40, 1)], 1)
        solution = torch.linalg.lstsq(design, F.one_hot(LABELS, 3).float()).solution.T
        torch.testing.assert_close(linear["weight"][0], solution[:, :5], rtol=1e-3, atol=1e-4)

    def test_large_models_train_fewer_at_a_time(self, monkeypatch):
        monkeypatch.setattr(ensembles, "CHUNK_ELEMENTS", 150)
        assert [ensembles._chunk_size(elements) for elements in (60, 10**6, 0)] == [2, 1, 150]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"members": []}, "members and seeds: 0 and 2"),
            ({"seeds": [1]}, "members and seeds: 2 and 1"),
            ({"members": [range(4), []]}, r"members\[1\]: shape"),
            ({"members": [range(4), [40]]}, r"members\[1\]: rows 40 to 40"),
            ({"members": [range(-1, 4), [0]]}, r"members\[0\]: rows -1 to 3"),
            ({"members": [range(4), torch.ones(40, dtype=torch.bool)]}, "not a mask"),
            ({"epochs": 0}, "epochs=0"),
            ({"epochs": None}, "give one of them"),
            ({"max_steps": 1}, "give one of them"),
            ({"batch_size": 0}, "batch_size=0"),
            ({"optimizer": "adam"}, "optimizer='adam'"),
            ({"optimizer": "adamw", "momentum": 0.9}, "momentum=0.9"),
            ({"schedule": "cosine"}, "schedule='cosine'"),
            ({"loss": F.cross_entropy}, "one value per example"),
            ({"make_model": lambda s: nn.Linear(5, 3).requires_grad_(False)}, "nothing is trainable"),
            ({"make_model": lambda s: nn.Sequential(mlp(s), nn.BatchNorm1d(3))}, "1.running_mean"),
            (
                {"make_model": lambda s: nn.Sequential(mlp(s), nn.BatchNorm1d(3, track_running_stats=False))},
                "mixes the examples",
            ),
            ({"make_model": lambda s: nn.Sequential(mlp(s), nn.Dropout())}, "random"),
        ],
    )
    def test_errors(self, changes, message):
        arguments = {"make_model": mlp, "inputs": INPUTS, "labels": LABELS, "members": [range(4), range(5)]}
        arguments |= {"seeds": [1, 2], "epochs": 1, "batch_size": 2, "lr": 0.1}
        with pytest.raises(RuntimeError if message == "random" else ValueError, match=message):
            train_ensemble(**arguments | changes)


def test_every_epoch_is_a_new_order_of_the_same_rows():
    rows = torch.tensor([5, 9, 2, 7, 30, 11])
    first, second = (order for order, _ in zip(epoch_orders(rows, 4), range(2), strict=False))
    assert first.sort().values.tolist() == second.sort().values.tolist() == sorted(rows.tolist())
    assert first.tolist() != second.tolist()
    assert torch.equal(first, next(epoch_orders(rows, 4)))
    assert first.tolist() != next(epoch_orders(rows, 5)).tolist()


class TestEnsembleLosses:
    @pytest.fixture(scope="class")
    def state(self):
        members = [range(20), range(40), range(9)]
        return train_ensemble(mlp, INPUTS, LABELS, members, [0, 1, 2], epochs=2, batch_size=8, lr=0.1)

    def expected(self, state, targets):
        rows = []
        for i in range(3):
            model = mlp(0)
            model.load_state_dict({name: value[i] for name, value in state.items()})
            rows.append([F.cross_entropy(model(INPUTS[t]), LABELS[t]).item() for t in targets])
        return torch.tensor(rows)

    @pytest.mark.parametrize("chunk", [None, 2])
    def test_mean_loss_of_rows_and_of_ids(self, state, chunk):
        by_rows = ensemble_losses(mlp, state, INPUTS, LABELS, [[1, 2], range(40)], chunk=chunk)
        torch.testing.assert_close(by_rows, self.expected(state, [[1, 2], list(range(40))]))
        ids = LABELS.clone()
        ids[:5] = -1
        by_ids = ensemble_losses(mlp, state, INPUTS, LABELS, ids, chunk=chunk)
        torch.testing.assert_close(by_ids, self.expected(state, [(ids == c).nonzero().flatten() for c in range(3)]))
        assert not by_ids.requires_grad

    def test_eval_mode(self):
        state = {"0.weight": torch.ones(2, 3, 5), "0.bias": torch.zeros(2, 3)}
        losses = ensemble_losses(
            lambda seed: nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5)), state, INPUTS, LABELS, [range(40)]
        )
        torch.testing.assert_close(losses, torch.full((2, 1), 3.0).log())

    @pytest.mark.parametrize(
        ("targets", "message"),
        [
            (LABELS * 2, r"targets\[1\]: shape"),
            ([], "targets: none"),
            (LABELS[:9], r"must be integers \[40\]"),
            (LABELS.float(), r"must be integers \[40\]"),
            ([range(41)], r"targets\[0\]: rows 0 to 40"),
        ],
    )
    def test_errors(self, state, targets, message):
        with pytest.raises(ValueError, match=message):
            ensemble_losses(mlp, state, INPUTS, LABELS, targets)


def known_runs(shifts, rows_of_group, scale=(1.0, 3.0)):
    """Losses of runs whose laws are known: without group g, target c moves by shifts[g, c] standard deviations.

    The noise of the runs of each law, one after the other, is one grid of 40 values of variance 1.
    """
    grid = torch.linspace(-1, 1, 40).double()
    grid, runs = grid / grid.std(), {}

    def train(members, seeds):
        losses = []
        for rows in members:
            missing = sorted(set(range(len(shifts) * rows_of_group)) - set(rows.tolist()))
            law = missing[0] // rows_of_group if missing else None
            runs[law] = runs.get(law, -1) + 1
            mean = 0.0 if law is None else shifts[law]
            losses.append(5 + torch.tensor(scale) * (mean + grid[runs[law]]))
        return torch.stack(losses)

    return train


class TestBruteForceMu:
    def test_known_laws(self):
        shifts = torch.tensor([[0.0, 1.0], [-2.0, 0.5], [3.0, 0.0]]).double()
        truth = brute_force_mu(known_runs(shifts, 4), 12, [range(4), [7, 6, 5, 4], range(8, 12)], n_runs=40)
        assert truth.with_losses.shape == (40, 2)
        assert truth.without_losses.shape == (3, 40, 2)
        torch.testing.assert_close(truth.mu, shifts)
        torch.testing.assert_close(truth.sd, torch.tensor([[1.0, 3.0]]).double().expand(3, 2))
        torch.testing.assert_close(truth.standard_error, (2 / 40 + shifts**2 / (4 * 39)).sqrt())

    def test_formula(self):
        with_losses = torch.tensor([[1.0], [2.0], [3.0]])
        without_losses = torch.tensor([[[4.0], [6.0], [8.0]]])
        truth = BruteForceMu.from_losses(with_losses, without_losses)
        assert truth.sd.item() == pytest.approx(2.5**0.5)
        assert truth.mu.item() == pytest.approx(4 / 2.5**0.5)
        assert truth.standard_error.item() == pytest.approx((2 / 3 + 16 / 2.5 * (1 + 16) / (8 * 2 * 2.5**2)) ** 0.5)

    @pytest.mark.parametrize(("mu", "spread"), [(0.0, 2.0), (3.0, 1.0), (3.0, 2.0)])
    def test_standard_error_is_the_spread_over_experiments(self, mu, spread):
        generator = torch.Generator().manual_seed(0)
        pooled = ((1 + spread**2) / 2) ** 0.5
        with_losses = torch.randn(60, 4000, generator=generator)
        without_losses = mu * pooled + spread * torch.randn(1, 60, 4000, generator=generator)
        truth = BruteForceMu.from_losses(with_losses, without_losses, splits=0)
        assert truth.mu.mean().item() == pytest.approx(mu, rel=0.02, abs=0.02)
        # A standard deviation of 4,000 numbers is known to 1.1 %.
        assert truth.standard_error.mean().item() == pytest.approx(truth.mu.std().item(), rel=0.05)

    def test_reliability_is_the_correlation_of_two_experiments(self):
        generator = torch.Generator().manual_seed(0)
        shifts = torch.randn(1500, 3, generator=generator) * torch.tensor([0.1, 0.3, 1.0])

        def experiment():
            without_losses = shifts[:, None] + torch.randn(1500, 40, 3, generator=generator)
            return BruteForceMu.from_losses(torch.randn(40, 3, generator=generator), without_losses, splits=20)

        first, second = experiment(), experiment()
        by_target = [brute_force._spearman(a, b) for a, b in zip(first.mu.T, second.mu.T, strict=True)]
        torch.testing.assert_close(first.target_reliability, torch.stack(by_target), rtol=0, atol=0.07)
        expected = brute_force._spearman(first.mu.flatten(), second.mu.flatten()).item()
        assert first.reliability == pytest.approx(expected, abs=0.04)
        assert first.target_reliability[2] > 0.95

    def test_noise_and_few_runs_have_no_reliability(self):
        generator = torch.Generator().manual_seed(1)
        # A first half that is high makes the second low: the halves of a fixed sum are anticorrelated.
        halves = torch.randn(50, 2, 1, generator=generator)
        losses = torch.randn(4, 1, generator=generator), torch.cat([halves, -halves], 1)
        assert BruteForceMu.from_losses(*losses, splits=20).reliability == 0.0
        truth = BruteForceMu.from_losses(torch.tensor([[1.0], [2.0], [4.0]]), torch.randn(5, 3, 1))
        assert truth.reliability != truth.reliability
        assert truth.target_reliability.isnan().all()

    def test_every_run_has_its_own_seed_and_the_rows_of_its_law(self):
        calls = []

        def train(members, seeds):
            calls.append((members, seeds))
            return torch.tensor(seeds).double()[:, None]

        truth = brute_force_mu(train, 6, [[0, 5], torch.tensor([3])], n_runs=4, seed=7, models_per_call=5)
        assert [len(members) for members, _ in calls] == [5, 5, 2]
        rows = [r.tolist() for members, _ in calls for r in members]
        assert rows == [[0, 1, 2, 3, 4, 5]] * 4 + [[1, 2, 3, 4]] * 4 + [[0, 1, 2, 4, 5]] * 4
        seeds = [seed for _, block in calls for seed in block]
        assert len(set(seeds)) == 12
        assert all(type(seed) is int for seed in seeds)
        assert truth.with_losses.flatten().tolist() == seeds[:4]
        assert truth.without_losses.flatten().tolist() == seeds[4:]
        again, other = (brute_force_mu(train, 6, [[0, 5], [3]], n_runs=4, seed=seed) for seed in (7, 8))
        torch.testing.assert_close(again.mu, truth.mu)
        assert again.reliability == pytest.approx(truth.reliability)
        assert not torch.allclose(other.mu, truth.mu)

    def test_a_group_that_teaches_a_class_helps_it(self):
        def train(members, seeds):
            state = train_ensemble(mlp, INPUTS, LABELS, members, seeds, epochs=5, batch_size=8, lr=0.3)
            return ensemble_losses(mlp, state, INPUTS, LABELS, LABELS)

        groups = [LABELS.eq(c).nonzero().flatten()[:-1] for c in range(3)]
        truth = brute_force_mu(train, 40, groups, n_runs=10)
        # Over 8 seeds the least of the diagonal is 10 ± 3.5, the largest of the others −1.3 ± 0.2.
        assert (truth.mu.diag() > 2).all()
        assert (truth.mu[~torch.eye(3, dtype=torch.bool)] < 0).all()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"groups": [[0], []]}, r"groups\[1\]: shape"),
            ({"groups": [range(6)]}, r"groups\[0\]: holds all 6 rows"),
            ({"groups": [[6]]}, r"groups\[0\]: rows 6 to 6"),
            ({"groups": [[-1]]}, r"groups\[0\]: rows -1 to -1"),
            ({"groups": [[1, 2, 1]]}, r"groups\[0\]: names a row more than once"),
            ({"groups": []}, "groups: none"),
            ({"n_runs": 1}, "n_runs=1"),
            ({"models_per_call": 0}, "models_per_call=0"),
            ({"train": lambda members, seeds: torch.zeros(len(seeds))}, r"train: returned \[8\]"),
            ({"train": lambda members, seeds: torch.zeros(1, 1)}, r"train: returned \[1, 1\]"),
            ({"train": lambda members, seeds: torch.zeros(len(seeds), 1)}, "never vary"),
            (
                {"train": lambda members, seeds: torch.full((len(seeds), 1), torch.nan)},
                "8 of the losses are not finite",
            ),
        ],
    )
    def test_errors(self, changes, message):
        arguments = {"train": known_runs(torch.zeros(2, 2), 3), "n_rows": 6, "groups": [[0, 1, 2]], "n_runs": 4}
        with pytest.raises(ValueError, match=message):
            brute_force_mu(**arguments | changes)

    def test_errors_of_collected_losses(self):
        with pytest.raises(ValueError, match=r"must be \[R, C\] and \[groups, R, C\]"):
            BruteForceMu.from_losses(torch.zeros(3, 2), torch.zeros(4, 3, 1))
        with pytest.raises(ValueError, match="n_runs=1"):
            BruteForceMu.from_losses(torch.zeros(1, 2), torch.zeros(4, 1, 2))


def test_spearman_is_scipys_and_a_noisy_judge_lowers_it():
    a, b = torch.randint(0, 6, (2, 30), generator=torch.Generator().manual_seed(0)).double()  # with ties
    assert brute_force._spearman(a, b).item() == pytest.approx(spearmanr(a, b).statistic)
    assert disattenuated(0.6, 0.64) == pytest.approx(0.75)
    for reliability in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="reliability="):
            disattenuated(0.6, reliability)
