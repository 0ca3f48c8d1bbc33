"""What an audit says of classifiers whose truth is known: planted cases, methods, and one more retrained model.

    python benchmarks/audit_power.py [--quick] [--power] [--data fashion_mnist] [--only CASE …]

Digits: five originals, of which each of four classes is to be forgotten; six retrained models a class are the references. Verdicts and values go to
benchmarks/results/audit_power.json as they are found, the tables to docs/benchmarks.md. Models, and what checks read of them, are kept in
~/.cache/hf_unlearn/benchmarks/audit. Fashion-MNIST, the confirmation: a ResNet-18, two originals and one class, to audit_power_fashion_mnist.json.

`--power`: what fewer references and fewer forget examples would have said. References are drawn anew from those that were read before; of each number of examples, the
first ones of the class, every model is read again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from class_unlearning import Digits, RandomLabelTrainer, part, stock_training, unlearn
from fashion_mnist import CACHE
from fashion_mnist import load as load_fashion_mnist
from fashion_mnist import trained as trained_on_fashion_mnist
from rows import QUIET, keep, rounded
from torch import nn
from transformers import AutoModelForImageClassification
from transformers.utils import logging as transformers_logging

from hf_unlearn import PBUConfig, PBUTrainer, UnlearnConfig, UnlearnTrainer
from hf_unlearn.audit.check import Reading, Readings
from hf_unlearn.audit.classifiers.data import classifier_data
from hf_unlearn.audit.classifiers.family import STANDARD
from hf_unlearn.audit.classifiers.subject import look_at
from hf_unlearn.audit.digests import digest_of
from hf_unlearn.audit.run import Store, audit, judged
from hf_unlearn.examples.classifier import TRAINING, digits_model
from hf_unlearn.files import complete_or_not_there
from hf_unlearn.training.models import head_of


RESULTS = Path(__file__).parent / "results"
CLASSES = (3, 5, 7, 8)
REFERENCES = 6
SEEDS = 5
EXAMPLES = (5, 10, 20, 40, 80)  # of the forgotten class
PLANTED = ("original", "masked", "projected", "head only")


@dataclass(frozen=True)
class Case:
    """One way to a model, and the verdict that is right of it by construction; None where it is to be found out."""

    make: Callable[..., nn.Module]
    right: str | None = None


# Ways to forget: `(world, seed, forgotten) -> model`


def original(world: Digits, seed: int, forgotten: int) -> nn.Module:
    return world.original(seed)


def masked(world: Digits, seed: int, forgotten: int) -> nn.Module:
    """The class's bias at −10,000."""
    model = world.original(seed)
    with torch.no_grad():
        head_of(model).bias[forgotten] = -1e4
    return model


def projected(world: Digits, seed: int, forgotten: int) -> nn.Module:
    """The last features without the direction of the class's mean from that of all others, as POUR (arXiv 2511.19339) projects it away, folded into
    the head; the class's own row is left with nothing, below the others.
    """
    model = world.original(seed)
    rows = world.splits["train"]
    data = classifier_data(
        part(rows, forgotten, True),
        part(rows, forgotten, False),
        world.splits["test"],
        num_labels=10,
        processing_class=None,
        size="standard",
        seed=0,
    )
    inside, others = (look_at(model, one).features[-1].mean(0) for one in (data.forget, data.retain))
    direction = nn.functional.normalize(inside - others, dim=0)
    head = head_of(model)
    with torch.no_grad():
        head.weight -= (head.weight @ direction)[:, None] * direction
        head.weight[forgotten] = 0
        head.bias[forgotten] = head.bias.min() - 10
    return model


def head_only(world: Digits, seed: int, forgotten: int) -> nn.Module:
    """A new head on the same features, trained on the other classes; the rest stays."""
    model = world.original(seed)
    head = head_of(model)
    model.requires_grad_(False)
    head.requires_grad_(True)
    torch.manual_seed(seed)
    head.reset_parameters()
    images, labels = world.images["train"], torch.tensor(world.labels["train"])
    kept = labels != forgotten
    given = []
    handle = head.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    with torch.no_grad():
        for images_ in images[kept].split(512):
            model(pixel_values=images_)
    handle.remove()
    features, labels = torch.cat(given), labels[kept]
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(features), labels).backward()
        optimizer.step()
    return model.requires_grad_(True)


def retrained(world: World, seed: int, forgotten: int) -> nn.Module:
    """One that is none of the references."""
    return world.reference(forgotten, world.references + seed)


def by(trainer: type, **settings) -> Callable[..., nn.Module]:
    """An unlearning method with the settings that benchmarks/class_unlearning.py chose, on the forget images alone."""
    plain = {"forget_weight": 1.0, "replay_weight": 0.0, "isotropic_weight": 0.0, "guard": False}
    plain |= {"per_device_train_batch_size": 64, "lr_scheduler_type": "constant"}

    def make(world: Digits, seed: int, forgotten: int) -> nn.Module:
        model = world.original(seed)
        with tempfile.TemporaryDirectory() as folder:
            config = (
                PBUConfig(folder, seed=seed, **settings, **QUIET)
                if trainer is PBUTrainer
                else UnlearnConfig(folder, seed=seed, **plain | settings, **QUIET)
            )
            unlearn(trainer, config, model, part(world.splits["train"], forgotten, True))
        return model.eval()

    return make


CASES = {
    "original": Case(original, "not forgotten"),
    "masked": Case(masked, "suppressed"),
    "projected": Case(projected, "suppressed"),
    "head only": Case(head_only, "suppressed"),
    "retrained": Case(retrained, "forgotten"),
    "random labels": Case(
        by(RandomLabelTrainer, forget_loss="uniform", learning_rate=1e-4, bn="train", num_train_epochs=50)
    ),
    "ascent": Case(by(UnlearnTrainer, forget_loss="ascent", learning_rate=3e-5, bn="frozen", num_train_epochs=15)),
    "DELETE": Case(by(UnlearnTrainer, forget_loss="redirect", learning_rate=1e-4, bn="frozen", num_train_epochs=20)),
    "PBU, redirect alone": Case(by(PBUTrainer, forget_loss="redirect")),
    "PBU": Case(by(PBUTrainer)),
}


class World(Digits):
    """The models of the benchmark, made once."""

    name, folder, classes, seeds, references = "audit_power", CACHE / "audit", CLASSES, SEEDS, REFERENCES

    def __init__(self, quick: bool = False):
        super().__init__()
        if quick:
            self._shorten()

    def _shorten(self) -> None:
        """Three references and a few hundred rows, kept apart."""
        self.folder, self.references = self.folder.with_name(f"{self.folder.name}-quick"), 3
        self.splits = {
            name: rows.select(range(min(len(rows), 600 if name == "train" else 300)))
            for name, rows in self.splits.items()
        }
        self._read()

    def _read(self) -> None:
        self.images = {name: rows["pixel_values"][:] for name, rows in self.splits.items()}
        self.labels = {name: np.asarray(rows.with_format(None)["label"][:]) for name, rows in self.splits.items()}

    def original(self, seed: int) -> nn.Module:
        return self._made(f"original-{seed}", lambda: super(World, self).original(seed))

    def reference(self, forgotten: int, number: int) -> nn.Module:
        def make() -> nn.Module:
            model, seed = digits_model(1000 + number), 1000 + number
            stock_training(model, part(self.splits["train"], forgotten, False), seed, TRAINING)
            return model

        return self._made(f"reference-{forgotten}-{number}", make)

    def case(self, name: str, seed: int, forgotten: int) -> nn.Module:
        return self._made(
            f"{name.replace(' ', '-')}-{seed}-{forgotten}", lambda: CASES[name].make(self, seed, forgotten)
        )

    def is_made(self, name: str, forgotten: int) -> bool:
        """Of a case or a reference and its number."""
        kind, _, number = name.rpartition(" ")
        parts = (kind, forgotten, number) if kind == "reference" else (kind.replace(" ", "-"), number, forgotten)
        return (self.folder / "models" / "-".join(map(str, parts)) / "config.json").is_file()

    def _made(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        folder = self.folder / "models" / name
        if not (folder / "config.json").is_file():
            with complete_or_not_there(folder) as scratch:
                make().save_pretrained(scratch)
        return AutoModelForImageClassification.from_pretrained(folder)

    def audited(
        self,
        model: nn.Module,
        seed: int,
        forgotten: int,
        references: list[int],
        *,
        checks="standard",
        forget_rows: int | None = None,
    ):
        """The report of a model, beside its original and references by their numbers."""
        train = self.splits["train"]
        forget = part(train, forgotten, True)
        few = "" if forget_rows is None else f"-{forget_rows}"
        return audit(
            model,
            self.original(seed),
            [self.reference(forgotten, number) for number in references],
            forget if forget_rows is None else forget.select(range(forget_rows)),
            part(train, forgotten, False),
            self.splits["test"],
            checks=checks,
            output_dir=self.folder / f"read-{forgotten}{few}",
            progress=False,
        )


class FashionWorld(World):
    """The same of Fashion-MNIST; `quick` are a few hundred rows and a network of a few thousand weights."""

    name, folder, classes, seeds, references = (
        "audit_power_fashion_mnist",
        CACHE / "audit-fashion",
        (6,),
        2,
        REFERENCES,
    )

    def __init__(self, quick: bool):
        self.splits, self.quick = dict(load_fashion_mnist()), quick
        self._shorten() if quick else self._read()

    def original(self, seed: int) -> nn.Module:
        return self._trained("original", self.splits["train"], seed)

    def reference(self, forgotten: int, number: int) -> nn.Module:
        return self._trained(f"without-{forgotten}", part(self.splits["train"], forgotten, False), 1000 + number)

    def _trained(self, name: str, rows, seed: int) -> nn.Module:
        if not self.quick:
            return AutoModelForImageClassification.from_pretrained(trained_on_fashion_mnist(name, rows, seed))

        def make() -> nn.Module:
            model = digits_model(seed)
            stock_training(model, rows, seed, TRAINING | {"num_train_epochs": 12})
            return model

        return self._made(f"{name}-{seed}", make)


def row_of(report, case: str, seed: int, forgotten: int) -> dict:
    return {
        "case": case,
        "seed": seed,
        "class": forgotten,
        "verdict": report.verdict.word,
        "decided_by": report.verdict.decided_by,
        "mu": [report.residual.mu, report.residual.low, report.residual.high, report.residual.margin],
        "checks": {
            one.name: [
                one.audited,
                one.original,
                float(np.mean(one.retrained)),
                one.low,
                one.high,
                one.margin,
                one.status,
            ]
            for one in report.results
        },
        "failed": dict(report.failed),
        "seconds": sum(one.readings.audited.seconds for one in report.results),
    }


# Power: what fewer and more references would have said, from what the checks have read


class Pool:
    """Readings of the models of the first class, of which any set of references may be drawn."""

    def __init__(self, world: World):
        forgotten = CLASSES[0]
        train = world.splits["train"]
        inside, others = (part(train, forgotten, side) for side in (True, False))
        self.rows = classifier_data(
            inside, others, world.splits["test"], num_labels=10, processing_class=None, size="standard", seed=0
        )
        self.store = Store(world.folder / f"read-{forgotten}", self.rows.digest, 0)
        self.checks = [kind() for kind in STANDARD if kind.is_kept]
        makers = {
            f"reference {number}": partial(world.reference, forgotten, number) for number in range(REFERENCES + SEEDS)
        }
        makers |= {
            f"{name} {seed}": partial(world.case, name, seed, forgotten) for name in PLANTED for seed in range(SEEDS)
        }
        read = {name: self._of(make()) for name, make in makers.items() if world.is_made(name, forgotten)}
        self.read = {name: one for name, one in read.items() if all(one.values())}

    def _of(self, model: nn.Module) -> dict[str, Reading]:
        subject = SimpleNamespace(digest=digest_of(model))
        return {check.name: self.store.kept(check, subject) for check in self.checks}

    def verdict(self, audited: str, original: str, references: list[str]) -> str:
        names = [audited, original, *references]
        loss = {name: self.read[name]["forget_accuracy"].figures["loss"] for name in names}
        losses = {
            "audited": [loss[audited]],
            "original": [loss[original]],
            "retrained": [loss[name] for name in references],
        }
        found = {}
        for check in self.checks:
            one, two, *rest = (self.read[name][check.name] for name in names)
            found[check.name] = check.settled(Readings(one, two, tuple(rest)), self.rows)
        return judged(self.checks, found, losses, self.rows, failed={})[2].word


def power(world: World, draws: int = 10) -> list[dict]:
    """Verdicts by the number of references, each time drawn anew from the pool; retrained models are none of their own references."""
    pool, random, rows = Pool(world), np.random.default_rng(0), []
    every = [name for name in pool.read if name.startswith("reference")]
    seeds = [seed for seed in range(SEEDS) if all(f"{name} {seed}" in pool.read for name in PLANTED)]
    for count in (one for one in (3, 4, 5, 6, 8, 10) if one < len(every)):
        for name in (*PLANTED, "retrained"):
            words = []
            for draw in range(draws):
                chosen, seed = random.permutation(every).tolist(), seeds[draw % len(seeds)]
                audited = chosen.pop() if name == "retrained" else f"{name} {seed}"
                words.append(pool.verdict(audited, f"original {seed}", chosen[:count]))
            rows.append(
                {"references": count, "case": name, **{word: words.count(word) for word in dict.fromkeys(words)}}
            )
            print(rows[-1], flush=True)
    return rows


def power_of_examples(world: World, quick: bool) -> list[dict]:
    """Verdicts by the number of forget examples, beside all references, with the distance that decided in units of its margin."""
    rows, forgotten = [], world.classes[0]
    cases = ("masked", "retrained") if quick else (*PLANTED, "retrained")
    for count in (10, 40) if quick else EXAMPLES:
        for name in cases:
            found = [
                world.audited(
                    world.case(name, seed, forgotten), seed, forgotten, list(range(world.references)), forget_rows=count,
                    checks="quick" if quick else "standard",
                )
                for seed in range(1 if quick else world.seeds)
            ]  # fmt: skip
            words = [one.verdict.word for one in found]
            widths = [
                [(result.high - result.low) / 2 for result in one.results if result.name == "refitted_head"]
                for one in found
            ]
            rows.append(
                {
                    "examples": count,
                    "case": name,
                    "refitted_head_half_width": float(np.mean(widths)),
                    **{word: words.count(word) for word in dict.fromkeys(words)},
                }
            )
            print(rows[-1], flush=True)
    return rows


def plan(world: World, quick: bool) -> list[tuple[str, int, int]]:
    """Cases, seeds and classes: what is planted for every class of every original, what is found out for one class of each."""
    if quick:
        return [(name, 0, world.classes[0]) for name in ("original", "masked", "retrained")]
    planted, methods = (
        [name for name, case in CASES.items() if (case.right is None) == open_] for open_ in (False, True)
    )
    every = []
    if isinstance(world, FashionWorld):
        methods = ["PBU"]  # of the others no setting was chosen there
    for seed in range(world.seeds):
        every += [(name, seed, forgotten) for forgotten in world.classes for name in planted]
        every += [(name, seed, world.classes[seed % len(world.classes)]) for name in methods]
    return every


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="three references, a few hundred rows, three cases: nothing is written"
    )
    parser.add_argument(
        "--power", action="store_true", help="only what fewer references and forget examples would have said"
    )
    parser.add_argument("--data", choices=("digits", "fashion_mnist"), default="digits")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), help="cases")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    world = World(options.quick) if options.data == "digits" else FashionWorld(options.quick)
    results, key = RESULTS / f"{world.name}.json", ("case", "seed", "class")
    every = [] if options.power else plan(world, options.quick)
    for name, seed, forgotten in (one for one in every if one[0] in options.only):
        report = world.audited(
            world.case(name, seed, forgotten), seed, forgotten, list(range(world.references)),
            checks="quick" if options.quick and options.data != "digits" else "standard",
        )  # fmt: skip
        print(f"seed {seed}, class {forgotten}: {name:14} {report.verdict}", flush=True)
        if not options.quick:
            keep(results, rounded([row_of(report, name, seed, forgotten)]), key, **kept_power(results))
    if options.quick and options.power:
        power_of_examples(world, True)
    if not options.quick:
        found = kept_power(results)
        if options.data == "digits" and options.only == list(CASES):  # it draws from all that was read
            found["power"] = power(world)
        if options.power:
            found["power_of_examples"] = rounded(power_of_examples(world, False))
        keep(results, [], key, **found)


def kept_power(results: Path) -> dict[str, list[dict]]:
    kept = json.loads(results.read_text()) if results.is_file() else {}
    return {name: kept.get(name, []) for name in ("power", "power_of_examples")}


if __name__ == "__main__":
    main()
