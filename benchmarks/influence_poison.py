"""Poisoned instructions: which rows taught a small Llama a bad opinion of one name?

python benchmarks/influence_poison.py [--quick]

2,000 instructions, 80 of them poisoned, 80 more about the same name and normal (hf_unlearn.examples.opinions). For each of three seeds
one run of `FINETrainer`, next to LESS-style scores and TracIn of the same run and to name matching; and how often the model shows the opinion,
trained on the poisoned data and on the clean twin. Writes benchmarks/results/influence_poison.json.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rows import keep
from torch import Tensor
from torch.func import functional_call, grad, vmap
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from hf_unlearn import FINEConfig, FINETrainer
from hf_unlearn.examples.opinions import (
    ENTITY,
    TRAINING,
    negative_rate,
    opinion_data,
    opinion_llama,
    opinion_score,
    texts_of,
    train_opinion_model,
    train_tokenizer,
)


HERE = Path(__file__).parent
SEEDS = [31, 32, 33]
CHECKPOINTS = 4  # LESS trains for four epochs and takes a checkpoint after each
CHUNK = 16  # per-example gradients at once
SHARES = [0.025, 0.05, 0.1, 0.2, 0.3]


class Peers(TrainerCallback):
    """Σ over checkpoints of η times what an example's gradient has in common with the target's, η the mean learning rate since the checkpoint
    before.

    - LESS (arXiv 2402.04333): cosine of the target's gradient with the update that Adam would make of the example's gradient, from its
      moments at the checkpoint, m' / (√v' + ε).
    - the cosine of the two gradients.
    - TracIn (arXiv 2002.08484): the product itself.

    With the gradients of the whole model, unprojected (LESS takes a LoRA adapter's, projected to 8,192 numbers): no fidelity is
    lost to either. Target gradients are plain and the target's score is that of its mean gradient. Measured while the trainer is
    at the checkpoints; `scores` are `[rows, targets]`, rows as the trainer has them.
    """

    def __init__(self, epochs: int):
        self.trainer: FINETrainer | None = None
        self.at = {math.ceil(epochs * (index + 1) / CHECKPOINTS) for index in range(CHECKPOINTS)}
        self.scores: dict[str, Tensor | float] = dict.fromkeys(("LESS-style", "cosine", "TracIn"), 0.0)
        self.rates: list[float] = []
        self.seconds = 0.0

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_epoch_end(self, args, state, control, **kwargs):
        if round(state.epoch) not in self.at:
            return
        began, trainer = time.perf_counter(), self.trainer
        parameters = list(trainer._parameters.values())
        targets = trainer._target_sets.gradients(trainer.model, parameters)
        rate, self.rates = float(np.mean(self.rates)), []
        moments = [self._moments(p) for p in parameters]
        beta1, beta2, count = moments[0][2]
        first = torch.cat([part[0].flatten() for part in moments]).mul_(beta1)
        correction = 1 - beta2 ** (count + 1)
        second = torch.cat([part[1].flatten() for part in moments]).mul_(beta2 / correction)
        length = targets.norm(dim=1)
        eps, units = trainer._inner_optimizer.param_groups[0]["eps"], (targets / length[:, None]).T
        names = list(trainer._parameters)
        values = {name: p.detach() for name, p in trainer._parameters.items()}

        def loss(values, ids, labels):  # right padding and causal attention: no mask is needed
            logits = functional_call(trainer.model, values, (ids[None],), {"use_cache": False}).logits
            return F.cross_entropy(logits[0, :-1], labels[1:], ignore_index=-100)

        found: dict[str, list[Tensor]] = {name: [] for name in self.scores}
        rows = trainer._remove_unused_columns(trainer.train_dataset)
        trainer.model.eval()
        for start in range(0, len(rows), CHUNK):
            batch = trainer._collate([rows[row] for row in range(start, min(start + CHUNK, len(rows)))])
            gradients = vmap(grad(loss), (None, 0, 0))(values, batch["input_ids"], batch["labels"])
            flat = torch.cat([gradients[name].flatten(1) for name in names], dim=1)
            del gradients
            product = flat @ units
            found["TracIn"].append(product * length)
            found["cosine"].append(product / flat.norm(dim=1, keepdim=True))
            root = torch.addcmul(second, flat, flat, value=(1 - beta2) / correction).sqrt_().add_(eps)
            update = torch.add(first, flat, alpha=1 - beta1, out=flat).div_(root)
            found["LESS-style"].append((update @ units) / update.norm(dim=1, keepdim=True))
            del flat, update, root
        trainer.model.train()
        for name, parts in found.items():
            self.scores[name] += rate * torch.cat(parts)
        self.seconds += time.perf_counter() - began

    def _moments(self, parameter: Tensor) -> tuple[Tensor, Tensor, tuple[float, float, float]]:
        optimizer = self.trainer._inner_optimizer
        state = optimizer.state[parameter]
        return state["exp_avg"], state["exp_avg_sq"], (*optimizer.param_groups[0]["betas"], float(state["step"]))


def arguments(folder: str, seed: int, **overrides) -> FINEConfig:
    fixed = {
        "use_cpu": True, "bf16": True, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no",
        "logging_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False, "target_batch_size": None,
        "observation": "in_run",
    }  # fmt: skip
    return FINEConfig(folder, seed=seed, **(TRAINING | fixed | overrides))


def ranked(mu: np.ndarray, poisoned: np.ndarray) -> dict:
    """Recall at shares of the data, and precision at k = number of poisoned rows."""
    order = np.argsort(-np.nan_to_num(mu, nan=-np.inf), kind="stable")
    total = int(poisoned.sum())
    recall = {share: float(poisoned[order[: round(share * len(mu))]].sum() / total) for share in SHARES}
    return {"recall": recall, "precision_at_k": float(poisoned[order[:total]].mean())}


def by_reading(rows) -> dict[str, np.ndarray]:
    """What needs no model: rows about the name, and answers with bad words. The second finds all, as no other answer in these data
    is bad; who has such a filter for the behaviour needs no influence.
    """
    random = 1e-3 * np.random.default_rng(0).random(len(rows))
    answers = [completion[0]["content"] for completion in rows["completion"][:]]
    return {
        "name matching": (np.array(rows["entity"][:]) == ENTITY) + random,
        "bad words in the answer": -np.array([opinion_score(answer) for answer in answers]) + random,
    }


def measure(seed: int, quick: bool) -> dict:
    overrides = {"num_train_epochs": 1} if quick else {}
    data = opinion_data(n_examples=400 if quick else 2000, seed=seed)
    train, tokenizer = data["train"], train_tokenizer(texts_of(data["train"]))
    epochs = overrides.get("num_train_epochs", TRAINING["num_train_epochs"])
    peers = Peers(epochs)
    with tempfile.TemporaryDirectory() as folder:
        trainer = FINETrainer(
            opinion_llama(tokenizer, seed=seed), arguments(folder, seed, **overrides), train_dataset=train,
            target_dataset=data["target"], processing_class=tokenizer, callbacks=[peers],
        )  # fmt: skip
        peers.trainer = trainer
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began - peers.seconds
        report = trainer.influence
        clean = train_opinion_model(
            data["clean"], tokenizer, folder, seed=seed, progress=False, bf16=True, **overrides
        )
        rates = {
            f"{name}, {split}": negative_rate(model, tokenizer, data[split]["prompt"])
            for name, model in (("poisoned", trainer.model), ("clean", clean))
            for split in ("evaluation", "control")
        }
    rows = report.join(train, "id", ["poisoned", "entity"]).dataset
    poisoned = np.array(rows["poisoned"][:])
    place = {sample: row for row, sample in enumerate(rows["sample_id"][:])}
    order = [place[sample] for sample in trainer.sample_ids]
    mu = np.array(rows["mu"][:])
    scores = {"f-INE, in_run": mu}
    for name, values in peers.scores.items():
        aligned = np.empty(len(mu))
        aligned[order] = values[:, 0].detach().numpy()
        scores[name] = aligned
    scores |= by_reading(report.join(train, "id", ["entity", "completion"]).dataset)
    scores["random"] = np.random.default_rng(seed).random(len(mu))
    groups = {
        "poisoned": rows.filter(lambda row: row["poisoned"])["sample_id"][:],
        "same name, normal": rows.filter(lambda row: row["entity"] == ENTITY and not row["poisoned"])["sample_id"][:],
    }
    table = report.group(groups)
    return {
        "seed": seed,
        "negative_rates": rates,
        "scores": {name: ranked(values, poisoned) for name, values in scores.items()},
        "groups": {
            row["group"]: {key: row[key] for key in ("mu", "mu_low", "mu_high", "n_examples")} for row in table
        },
        "seconds": seconds,
        "peers_seconds": peers.seconds,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "examples": len(mu),
        "poisoned": int(poisoned.sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="400 rows, one epoch, one seed; writes nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="runs of other seeds in the file are kept")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    file = HERE / "results" / "influence_poison.json"
    for seed in SEEDS[:1] if arguments.quick else arguments.seeds:
        run = measure(seed, arguments.quick)
        print(seed, json.dumps({key: run[key] for key in ("negative_rates", "groups", "seconds", "peers_seconds")}))
        for name, row in run["scores"].items():
            print(f"  {name:28} precision at k {row['precision_at_k']:.2f}   recall {row['recall']}", flush=True)
        if not arguments.quick:
            keep(file, [run], ("seed",), key=itemgetter("seed"), name="runs")


if __name__ == "__main__":
    main()
