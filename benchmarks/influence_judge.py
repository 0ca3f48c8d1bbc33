"""What influence is judged on: small data sets with groups, their μ by brute force, single runs, and the peers' scores.

Used by influence_fidelity.py and influence_labels.py. Brute force is cached in ~/.cache/hf_unlearn/benchmarks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import Dataset
from transformers import TrainerCallback, set_seed

from hf_unlearn import InfluenceConfig, InfluenceTrainer
from hf_unlearn.brute_force import BruteForceMu, brute_force_mu
from hf_unlearn.ensembles import ensemble_losses, train_ensemble


CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hf_unlearn", "benchmarks")
CLASSES = 10
WRONG = 0.2


@dataclass(frozen=True)
class Settings:
    """One judge: data, model and how it is trained."""

    data: str
    optimizer: str
    lr: float
    weight_decay: float
    epochs: int
    batch_size: int
    runs: int

    @property
    def steps(self) -> int:
        return self.epochs * DATA[self.data].rows // self.batch_size


class MLP(nn.Module):
    """64 → 64 → 10."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(64, 64), nn.Linear(64, CLASSES)

    def forward(self, x):
        return self.out(F.relu(self.hidden(x)))


class CNN(nn.Module):
    """Two strided convolutions and a linear layer, 28 × 28 in, 9,098 parameters."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 5, stride=3), nn.Conv2d(8, 16, 3, stride=2)
        self.out = nn.Linear(16 * 9, CLASSES)

    def forward(self, x):
        return self.out(F.relu(self.second(F.relu(self.first(x)))).flatten(1))


class Labelled(nn.Module):
    """A network with a loss, as a Trainer wants it."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x, labels=None):
        logits = self.network(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Rows(Dataset):
    """Tensors as rows."""

    def __init__(self, x: Tensor, labels: Tensor):
        self.x, self.labels = x, labels

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"x": self.x[row], "labels": self.labels[row]}


@dataclass(frozen=True)
class Source:
    rows: int
    network: Callable[[], nn.Module]
    group_sizes: tuple[int, int]  # of clean and of random groups
    load: Callable[[int], tuple[Tensor, Tensor, Tensor, Tensor]]


def _digits(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:rows], order[rows:]
    return x[train], y[train], x[test], y[test]


def _fashion(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    import fashion_mnist

    splits = fashion_mnist.load()
    train, test = splits["train"][:rows], splits["test"][:2000]
    return train["pixel_values"], train["label"], test["pixel_values"], test["label"]


DATA = {"digits": Source(1000, MLP, (40, 30), _digits), "fashion": Source(2000, CNN, (100, 200), _fashion)}

JUDGES = {
    "digits, SGD": Settings("digits", "sgd", 0.1, 0.0, 10, 50, 200),
    "digits, AdamW": Settings("digits", "adamw", 3e-3, 0.01, 10, 50, 200),
    "Fashion-MNIST CNN, SGD": Settings("fashion", "sgd", 0.1, 0.0, 5, 50, 120),
}


@dataclass(frozen=True)
class Judge:
    """Data with a share of the labels, by default one in five, made wrong, and groups of its rows."""

    settings: Settings
    x: Tensor
    labels: Tensor
    wrong: Tensor  # [rows] bool
    test_x: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls, settings: Settings, share: float = WRONG) -> Judge:
        source = DATA[settings.data]
        x, labels, test_x, test_labels = source.load(source.rows)
        generator = torch.Generator().manual_seed(1)
        chosen = torch.randperm(source.rows, generator=generator)[: int(share * source.rows)]
        labels = labels.clone()
        classes = int(labels.max()) + 1
        labels[chosen] = (labels[chosen] + torch.randint(1, classes, (len(chosen),), generator=generator)) % classes
        wrong = torch.zeros(source.rows, dtype=torch.bool)
        wrong[chosen] = True
        return cls(settings, x, labels, wrong, test_x, test_labels)

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    def groups(self) -> list[np.ndarray]:
        """Three a class: wrongly labelled as it, clean ones of it, and some at random."""
        random, (clean, anyhow) = np.random.default_rng(2), DATA[self.settings.data].group_sizes
        wrong, labels = self.wrong.numpy(), self.labels.numpy()
        found = [np.flatnonzero(wrong & (labels == c)) for c in range(self.classes)]
        found = [group[:40] for group in found]
        found += [
            random.choice(np.flatnonzero(~wrong & (labels == c)), clean, replace=False) for c in range(self.classes)
        ]
        found += [random.choice(len(labels), anyhow, replace=False) for _ in range(self.classes)]
        return found

    def parts_of_classes(self, count: int, each: int) -> list[np.ndarray]:
        """`each` random groups of `count` clean examples of every class, class by class."""
        random = np.random.default_rng(3)
        clean = [np.flatnonzero(~self.wrong.numpy() & (self.labels.numpy() == c)) for c in range(self.classes)]
        return [random.choice(rows, count, replace=False) for rows in clean for _ in range(each)]

    def brute_force(
        self, groups: list[np.ndarray], runs: int | None = None, *, by_epochs: bool = False
    ) -> BruteForceMu:
        """μ of groups by retraining; the result is cached.

        All trainings take as many full batches, so that with and without a group differ in the data alone. With
        `by_epochs` a smaller training set has fewer or smaller batches instead, as under a Trainer.
        """
        settings, runs = self.settings, runs or self.settings.runs
        key = json.dumps([asdict(settings), runs, by_epochs, [group.tolist() for group in groups]])
        file = CACHE / f"influence-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
        if not file.is_file():
            make = DATA[settings.data].network
            length = {"epochs": settings.epochs} if by_epochs else {"max_steps": settings.steps}

            def train(members: list[Tensor], seeds: list[int]) -> Tensor:
                state = train_ensemble(
                    lambda _: make(), self.x, self.labels, members, seeds, batch_size=settings.batch_size, lr=settings.lr,
                    optimizer=settings.optimizer, weight_decay=settings.weight_decay, **length,
                )  # fmt: skip
                return ensemble_losses(lambda _: make(), state, self.test_x, self.test_labels, self.test_labels)

            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # faster for such small products
            try:
                truth = brute_force_mu(train, len(self.x), groups, runs)
            finally:
                torch.set_num_threads(threads)
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"with": truth.with_losses, "without": truth.without_losses}, file)
        losses = torch.load(file, weights_only=True)
        return BruteForceMu.from_losses(losses["with"], losses["without"])


# Single runs


@dataclass
class Run:
    """One training, its report, and its states at the end of every epoch."""

    report: object
    states: list[dict[str, Tensor]]
    seconds: float


class _States(TrainerCallback):
    """θ and Adam's moments after every epoch."""

    def __init__(self):
        self.states: list[dict[str, Tensor]] = []

    def on_epoch_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        inner = getattr(optimizer, "optimizer", optimizer)
        kept = {"step": state.global_step, "parameters": {}, "second": {}}
        for name, parameter in model.network.named_parameters():
            kept["parameters"][name] = parameter.detach().clone()
            moments = inner.state.get(parameter, {})
            if "exp_avg_sq" in moments:
                correction = 1 - inner.param_groups[0]["betas"][1] ** float(moments["step"])
                kept["second"][name] = (moments["exp_avg_sq"] / correction).sqrt() + inner.param_groups[0]["eps"]
        self.states.append(kept)


def trainer_of(
    judge: Judge,
    seed: int,
    folder: str,
    *,
    targets: dict[str, Dataset] | None = None,
    target: str | None = None,
    save: str = "no",
    kind: type[InfluenceTrainer] = InfluenceTrainer,
    **config,
) -> InfluenceTrainer:
    """With the judge's settings; `save="epoch"` leaves checkpoints in the folder."""
    settings = judge.settings
    set_seed(seed)
    arguments = InfluenceConfig(
        output_dir=folder, use_cpu=True, report_to="none", save_strategy=save, logging_strategy=save, disable_tqdm=True,
        seed=seed, num_train_epochs=settings.epochs, per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=256, learning_rate=settings.lr, weight_decay=settings.weight_decay, max_grad_norm=0,
        lr_scheduler_type="constant", optim={"sgd": "sgd", "adamw": "adamw_torch"}[settings.optimizer], **config,
    )  # fmt: skip
    if targets is None and target is None:
        targets = class_targets(judge)
    return kind(
        model_init=lambda: Labelled(DATA[settings.data].network()), args=arguments, train_dataset=Rows(judge.x, judge.labels),
        target_dataset=targets, target=target,
    )  # fmt: skip


def single_run(judge: Judge, seed: int, folder: str, **options) -> Run:
    """Train once, as [`trainer_of`] has it."""
    trainer, states = trainer_of(judge, seed, folder, **options), _States()
    trainer.add_callback(states)
    trainer.train()
    return Run(trainer.influence, states.states, trainer.state.log_history[-1]["train_runtime"])


def class_targets(judge: Judge) -> dict[str, Dataset]:
    """Test examples of each class."""
    return {
        str(c): Rows(judge.test_x[judge.test_labels == c], judge.test_labels[judge.test_labels == c])
        for c in range(judge.classes)
    }


# Peers, each `[rows, targets]`: how much an example helps a target, up to a scale


def example_gradients(
    network: nn.Module, parameters: dict[str, Tensor], x: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """Gradient of every example's loss, by parameter: `[rows, *shape]`."""

    def loss(values, one, label):
        return F.cross_entropy(functional_call(network, values, (one[None],)), label[None])

    return vmap(grad(loss), (None, 0, 0), chunk_size=250)(parameters, x, labels)


def _flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten(1) for value in gradients.values()], dim=1)


def _by_class(values: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([values[labels == c].mean(0) for c in range(int(labels.max()) + 1)])


def tracin(judge: Judge, run: Run) -> Tensor:
    """Σ over checkpoints of η⟨∇ℓ_target, ∇ℓ_i⟩ (arXiv 2002.08484), a checkpoint an epoch."""
    network, total = DATA[judge.settings.data].network(), 0
    for state in run.states:
        ours = _flat(example_gradients(network, state["parameters"], judge.x, judge.labels))
        theirs = _flat(example_gradients(network, state["parameters"], judge.test_x, judge.test_labels))
        total = total + judge.settings.lr * ours @ _by_class(theirs, judge.test_labels).T
    return total


def less(judge: Judge, run: Run) -> Tensor:
    """Σ over checkpoints of η·cos(∇ℓ_target, P∘∇ℓ_i) in the manner of LESS (arXiv 2402.04333), P Adam's preconditioner.
    The model is small enough to need no projection.
    """
    network, total = DATA[judge.settings.data].network(), 0
    for state in run.states:
        gradients = example_gradients(network, state["parameters"], judge.x, judge.labels)
        if state["second"]:
            gradients = {name: value / state["second"][name] for name, value in gradients.items()}
        theirs = _flat(example_gradients(network, state["parameters"], judge.test_x, judge.test_labels))
        ours, theirs = _flat(gradients), _by_class(theirs, judge.test_labels)
        total = total + judge.settings.lr * F.normalize(ours, dim=1) @ F.normalize(theirs, dim=1).T
    return total


def ekfac(judge: Judge, run: Run, folder: str, *, own: bool = False) -> Tensor:
    """Influence functions with EK-FAC (arXiv 2308.03296) at the end of the run, by kronfluence; `own`: of examples on themselves."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from kronfluence.utils.dataset import DataLoaderKwargs

    class Classification(Task):
        def compute_train_loss(self, batch, model, sample=False):
            logits = model(batch["x"])
            labels = batch["labels"]
            if sample:
                with torch.no_grad():
                    labels = torch.multinomial(logits.softmax(-1), 1).flatten()
            return F.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch, model):
            return F.cross_entropy(model(batch["x"]), batch["labels"], reduction="sum")

    network = DATA[judge.settings.data].network()
    network.load_state_dict(run.states[-1]["parameters"])
    network = prepare_model(network, Classification())
    analyzer = Analyzer("judge", network, Classification(), output_dir=folder, disable_tqdm=True, cpu=True)
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(num_workers=0))
    train, test = Rows(judge.x, judge.labels), Rows(judge.test_x, judge.test_labels)
    analyzer.fit_all_factors(
        "factors",
        train,
        per_device_batch_size=250,
        factor_args=FactorArguments(strategy="ekfac"),
        overwrite_output_dir=True,
    )
    arguments = {"score_args": ScoreArguments(damping_factor=None), "overwrite_output_dir": True}
    if own:
        scores = analyzer.compute_self_scores("own", "factors", train, per_device_train_batch_size=250, **arguments)
        return analyzer.load_self_scores("own")["all_modules"] if scores is None else scores["all_modules"]
    analyzer.compute_pairwise_scores(
        "scores", "factors", test, train, per_device_query_batch_size=250, per_device_train_batch_size=250, **arguments
    )
    return _by_class(analyzer.load_pairwise_scores("scores")["all_modules"], judge.test_labels).T


def group_scores(scores: Tensor, groups: list[np.ndarray]) -> np.ndarray:
    """A group's score is its members' sum: `[groups, targets]`."""
    return np.stack([scores[torch.as_tensor(group)].sum(0).double().numpy() for group in groups])
