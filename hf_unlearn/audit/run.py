"""`audit`: every check on every model, one model after the other, and what follows."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm.auto import tqdm

from ..files import first_line
from ..hub.provenance import library_versions
from ..training.checks import SEEDS, check_number, shown
from .check import AuditData, Check, Reading, Readings, Role, Subject
from .equivalence import compared
from .functions import TRAININGS, UNLEARNINGS, Functions, check_functions
from .given import Family, Handed, Place, check_beside, checked, is_pipeline, key
from .report import AuditReport
from .residual import ResidualMu, residual_mu
from .result import CheckResult
from .seeds import is_of_one_model, over_seeds
from .store import Store, read_by
from .verdict import FEW, Verdict, decide


logger = logging.getLogger(__name__)
Size = Literal["standard", "quick"]
MADE = 5  # retrained models, where a function makes them


def audit(
    model: Any,
    original: Any = None,
    retrained: Sequence[Any] = (),
    forget: Any = None,
    retain: Any = None,
    test: Any = None,
    *,
    checks: Size | Sequence[str] = "standard",
    seed: int = 0,
    output_dir: str | Path | None = None,
    processing_class: Any = None,
    marker: Any = None,
    drawing: Mapping[str, Any] | None = None,
    unlearn_fn: Callable[[nn.Module, Any, Any], nn.Module] | None = None,
    train_fn: Callable[[Any, int], nn.Module] | None = None,
    shadows: int | Sequence[tuple[Any, Sequence[int]]] | None = None,
    training_seeds: int = TRAININGS,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> AuditReport:
    """Attack an unlearned model, and say how far it is from models that never saw the data.

    ```python
    report = audit(
        "digits-without-3", original="digits", retrained=["digits-never-3-a", "digits-never-3-b", "digits-never-3-c"],
        forget=threes, retain=others, test=test,
    )
    print(report.verdict)
    ```

    Args:
        model: the unlearned model, or its folder or id; of a generator of images, its pipeline; or an unlearning trainer, which fills in what it knows of `original`, `forget`, `retain` and
            `processing_class`.
        original (*optional*): the model that unlearning started from. Without it no check can show that it would notice memory.
        retrained (sequence, defaults to `()`): models trained like the original without the forget data, each with a seed of its own; at least 3
            for `"forgotten"`, and with 5 or more the margins are useful. Without any, `train_fn` makes 5. Models given by folder or id are in
            memory one at a time.
        forget, retain, test (`Dataset`): rows as the trainers take them: what was to be forgotten, other training rows, and rows that nobody
            trained on, the forgotten classes among them.
        checks (`"standard"` | `"quick"` | list of `str`, defaults to `"standard"`): which; a list may name one of these sets beside single checks.
        seed (`int`, defaults to 0): of all that is drawn.
        output_dir (*optional*): folder that gets `audit.json`, `audit.html` and `audit.png`. What an audit found so far is kept in its `_private/`, so that
            the same call goes on where it was stopped.
        processing_class (*optional*): image processor or tokenizer, where rows are raw and the model is no folder or id.
        marker ([`ClassifierFeatures`] or callable, *optional*): for generators: images `[n, channels, height, width]` in [−1, 1] to `[n]`, class numbers
            (the forgotten ones are the labels of the forget rows) or bools: which show what was to be forgotten.
        drawing (`dict`, *optional*): for generators: keyword arguments of every call of the pipelines, as in `{"num_inference_steps": 25}`.
        unlearn_fn (callable, *optional*): for classifiers: `(model, forget, retain) -> model`, the way to unlearn, for the checks that try it on shadow
            models. It is given a copy of a model, which it may change and return, some of the rows of `forget`, which that model was trained on,
            and all of `retain`, both as they are here; random states are set for each run and restored.
        train_fn (callable, *optional*): for classifiers: `(rows, seed) -> model`: trained from scratch like the original. It makes retrained models and
            shadows where none are given; with `unlearn_fn` training and unlearning are repeated, and the variance of what checks find is split.
        shadows (`int` or list of `(model, rows)`, *optional*): for `unlearn_fn`: how many shadow models to make (an even number, by default 8), or models that were
            trained on `retain` and on these rows of `forget`, by their numbers: two by two such that each has rows that the other has not. Without
            `train_fn` those of small models without BatchNorm and dropout are trained here, many at once.
        training_seeds (`int`, defaults to 5): trainings that are repeated where both functions are given; 0 for none.
        device (`torch.device` | `str`, *optional*): where models that are given by folder or id are loaded to. Default: a GPU, if there is one. Objects stay where
            they are.
        dtype (`torch.dtype`, defaults to float32): of the weights of such models.
        progress (`bool`, defaults to `True`): print the estimate and show bars.

    Returns:
        [`AuditReport`]

    Raises:
        ValueError: an argument that does not fit: before anything long starts, but for the outputs of references that are not finite, which are seen when
            it is their turn, and functions that give no model.
    """
    check_number("seed", seed, SEEDS)
    if hasattr(model, "source_dataset") and hasattr(
        model, "base_model"
    ):  # an unlearning trainer, which knows some of it
        trainer, model = model, getattr(model, "pipeline", None) or model.model
        original = trainer.base_model if original is None else original
        forget = trainer.source_dataset if forget is None else forget
        retain = trainer.retain_dataset if retain is None else retain
        processing_class = trainer.processing_class if processing_class is None else processing_class
    check_functions(unlearn_fn, train_fn, shadows, training_seeds)
    if isinstance(retrained, str | Path | nn.Module) or is_pipeline(retrained):
        retrained = [retrained]
    if original is not None and original is model:
        raise ValueError("original: is the audited model itself; pass the model as it was before unlearning")
    functions = Functions(unlearn_fn, train_fn, forget, retain, seed)
    place = Place(dtype=dtype) if device is None else Place(device, dtype)
    models = _handed(model, original, retrained, functions, marker is not None, place)
    family, processor = checked(models)
    processing_class = processing_class or processor
    audited = models[0].hold()
    size, chosen, unchecked = _chosen(family, checks)
    more = {"marker": marker, "drawing": drawing}
    if getattr(family, "MARKED", False):
        more["original"] = next((one.hold() for one in models if one.role == "original"), None)
    elif given := [name for name, value in more.items() if value is not None]:
        raise ValueError(f"{given[0]}: is for generators of images, and this is a {family.NAME}; leave it out")
    else:
        more = {}
    tried = getattr(family, "with_trials", None)
    if tried is None and (given := [name for name in ("unlearn_fn", "train_fn") if getattr(functions, name)]):
        raise ValueError(f"{given[0]}: is for classifiers, and this is a {family.NAME}; leave it out")
    rows = family.data(audited, forget, retain, test, processing_class=processing_class, size=size, seed=seed, **more)
    store = Store(output_dir, rows.digest, seed)
    if unlearn_fn is not None and any(not one.is_kept for one in chosen):
        rows = tried(rows, audited, functions, shadows, processing_class=processing_class, size=size, store=store)
    roles = [one.role for one in models]
    skipped = {one.name: why for one in chosen if (why := one.missing(rows, roles))}
    chosen = [one for one in chosen if one.name not in skipped]
    if not chosen:
        name, why = next(iter(skipped.items()))
        raise ValueError(f"checks: none can be done with these rows and models (of {name}: {why})")
    repeated = [one for one in chosen if is_of_one_model(one)] if unlearn_fn and train_fn and training_seeds else []
    started = time.perf_counter()
    looks = len(models) + (training_seeds * UNLEARNINGS if repeated else 0)
    estimate = _estimate(family, audited, rows, chosen, looks)
    if progress:
        print(
            f"audit of {audited.name}: {len(chosen)} checks of {len(models)} models ({', '.join(f'{n:,} {name}' for name, n in rows.sizes.items())} "
            f"rows), about {_in_words(estimate)}{_runs(models, rows, training_seeds if repeated else 0)}"
        )
    del audited, more  # what holds a model holds it in memory
    found, losses, failed = _run(chosen, models, rows, seed, store, progress)
    spread: Mapping[str, Any] = {}
    if repeated:
        spread = over_seeds(
            functions, [one for one in repeated if one.name in found], rows, partial(family.subject, role="audited", name="repeated"),
            lambda digest: Store(output_dir, digest, seed), seed=seed, trainings=training_seeds, progress=progress,
        )  # fmt: skip
    needed = [one() for one in family.QUICK if one.name in unchecked and one.layer != "beside"]
    left_out = [one.name for one in needed if one.missing(rows, roles) is None]
    results, residual, verdict = judged(chosen, found, losses, rows, failed=failed, left_out=left_out)
    results = tuple(replace(one, over_seeds=spread.get(one.name)) for one in results)
    if rows.sizes["forget"] < FEW:
        say = "forget: %d rows; with fewer than %d the power is low, and nothing is called forgotten"
        logger.warning(say, rows.sizes["forget"], FEW)
    report = AuditReport(
        verdict=verdict,
        results=results,
        residual=residual,
        skipped=skipped,
        failed=failed,
        unchecked=unchecked,
        models={key(models, one): one.name for one in models},
        model_digest=models[0].digest,
        forgotten=rows.forgotten,
        sizes=dict(rows.sizes),
        family=family.NAME,
        checks=checks if isinstance(checks, str) else "chosen",
        seed=seed,
        seconds=time.perf_counter() - started,
        estimated_seconds=estimate,
        versions=library_versions(),
        created=datetime.now(UTC).date().isoformat(),
    )
    if output_dir is not None:
        report.save(Path(output_dir, "audit.json"))
        report.to_html(Path(output_dir, "audit.html"), report.plot(Path(output_dir, "audit.png")))
    return report


# Models


def _handed(
    model: Any, original: Any, retrained: Sequence[Any], functions: Functions, marked: bool, place: Place
) -> list[Handed]:
    """All models: the audited one, the original, the retrained ones, which are made where none are given and a function can."""
    made = range(MADE if not len(retrained) and functions.train_fn else 0)
    found = [Handed("model", "audited", model, marked, place)]
    found += [Handed("original", "original", original, marked, place)] * (original is not None)
    found += [Handed(f"retrained[{number}]", "retrained", one, marked, place) for number, one in enumerate(retrained)]
    return found + [Handed("train_fn", "retrained", partial(functions.trained, (), 0, number)) for number in made]


def _check_made(models: Sequence[Handed], one: Handed, subject: Subject) -> None:
    """Refuse what a function made of another kind, or twice.

    Raises:
        ValueError: naming the function.
    """
    with models[0].opened() as audited:
        check_beside(models[0], audited, one, subject)
    if any(other is not one and other.digest == one.digest for other in models):
        raise ValueError(
            f"{one.argument}: gives the same model whatever the seed; let it seed the initialisation and the order"
        )


def _runs(models: Sequence[Handed], rows: Any, repeated: int) -> str:
    """What functions are to run, which nobody can tell the time of."""
    trials = getattr(rows, "trials", None)
    trained = sum(one.is_made for one in models) + repeated + (trials.made if trials else 0)
    unlearned = repeated * UNLEARNINGS + (len(trials) if trials else 0)
    parts = [f"{n} {what}{'s' * (n > 1)}" for n, what in ((trained, "training"), (unlearned, "unlearning")) if n]
    return f", beside {' and '.join(parts)} by the functions given" if parts else ""


# Checks


def _chosen(family: Family, checks: Size | Sequence[str]) -> tuple[str, list[Check], dict[str, str]]:
    """How many rows are looked at, the checks that were asked for, and those that were not."""
    every = {one.name: one for one in family.EVERY}
    if isinstance(checks, str):
        sizes = {"standard": family.STANDARD, "quick": family.QUICK}
        if checks not in sizes:
            raise ValueError(f"checks={shown(checks)}: must be 'standard', 'quick', or a list of {', '.join(every)}")
        names, size = [one.name for one in sizes[checks]], checks
    else:
        sets = {"standard": family.STANDARD, "quick": family.QUICK}
        spread = [[one.name for one in sets[name]] if name in sets else [name] for name in checks]
        names, size = list(dict.fromkeys(name for names in spread for name in names)), "standard"
        if unknown := [name for name in names if name not in every]:
            raise ValueError(f"checks: {shown(unknown[0])} is none of {', '.join(every)}")
        if not names:
            raise ValueError("checks: is empty; leave it out, or name some")
    word = checks if isinstance(checks, str) else "the list"
    return size, [every[name]() for name in names], {name: f"not in {word}" for name in every if name not in names}


def _estimate(family: Family, audited: Subject, rows: AuditData, chosen: Sequence[Check], models: int) -> float:
    """Seconds, from what an example costs forward and in training.

    Raises:
        ValueError: outputs that are not finite.
    """
    with _finite("model"):
        forward, training = family.cost(audited, rows)
    costs = [(getattr(rows, "shared_cost", sum(rows.sizes.values())), 0), *(one.cost(rows) for one in chosen)]
    return models * sum(looked * forward + trained * training for looked, trained in costs)


@contextmanager
def _finite(name: str) -> Iterator[None]:
    """Names a model whose outputs are not finite, or that cannot be looked at for another reason."""
    try:
        yield
    except ValueError as error:
        if "finite" not in str(error):
            raise ValueError(f"{name}: {first_line(error)}") from error
        raise ValueError(f"{name}: gives outputs that are not finite; there is nothing to audit") from error


def _run(
    chosen: Sequence[Check], models: Sequence[Handed], rows: AuditData, seed: int, store: Store, progress: bool
) -> tuple[dict[str, Readings], dict[Role, list[float | None]], dict[str, str]]:
    """What the checks found, the loss of the forget rows, which is the statistic of residual μ, by role, and why checks did not run. One model after the
    other, and none of them longer than that.

    Raises:
        ValueError: a model whose outputs are not finite, or that a function did not make.
    """
    read: dict[str, dict[Role, list[Reading]]] = {one.name: {} for one in chosen}
    losses: dict[Role, list[float | None]] = {"audited": [], "original": [], "retrained": []}
    failed: dict[str, str] = {}

    def fail(check: Check, error: Exception) -> None:
        failed[check.name] = first_line(error)
        logger.warning("%s did not run: %s", check.name, failed[check.name])

    with tqdm(total=len(chosen) * len(models), desc="Audit", disable=not progress) as bar:
        for one in models:
            with one.opened() as subject:
                if one.is_made:
                    _check_made(models, one, subject)
                with _finite(one.argument if one.role == "audited" else key(models, one)):
                    losses[one.role].append(models[0].family.forget_loss(subject, rows))
                for check in chosen:
                    bar.update()
                    if check.name in failed:
                        continue
                    try:
                        reading = read_by(check, subject, rows, seed, store)
                        read[check.name].setdefault(one.role, []).append(reading)
                    except Exception as error:  # whatever an attack raises: what did not run is not passed
                        fail(check, error)
            del subject
            one.release()
    found = {}
    for check in chosen:
        if check.name in failed:
            continue
        roles = read[check.name]
        readings = Readings(
            roles["audited"][0], next(iter(roles.get("original", ())), None), tuple(roles.get("retrained", ()))
        )
        try:
            found[check.name] = check.settled(readings, rows).map(lambda reading: reading.checked())
        except Exception as error:
            fail(check, error)
    return found, losses, failed


def judged(
    chosen: Sequence[Check],
    found: Mapping[str, Readings],
    losses: Mapping[Role, Sequence[float]],
    rows: AuditData,
    *,
    failed: Mapping[str, str],
    left_out: Sequence[str] = (),
) -> tuple[tuple[CheckResult, ...], ResidualMu, Verdict]:
    """What follows from readings: a result for each check that ran, residual μ, and the verdict.

    Args:
        chosen (`Sequence[Check]`): checks that were asked for, K of which take part in the verdict, with residual μ.
        found (`dict[str, Readings]`): what they read, settled.
        losses (`dict[str, Sequence[float]]`): of the forget rows, by role.
        failed (`dict[str, str]`): checks that did not run, and why; those that decide nothing may fail.
        left_out: see [`decide`].
    """
    deciding = sum(one.layer != "beside" for one in chosen) + 1
    results = tuple(_result(one, found[one.name], rows, deciding) for one in chosen if one.name in found)
    original = next(iter(losses["original"]), None)
    chance = getattr(rows, "chance_loss", None)
    residual = residual_mu(
        losses["audited"][0], losses["retrained"], original=original, checks=deciding, chance=chance
    )
    few = {"references": len(losses["retrained"]), "forget_examples": rows.sizes["forget"]}
    beside = {one.name for one in chosen if one.layer == "beside"}
    failed = {name: why for name, why in failed.items() if name not in beside}
    return results, residual, decide(results, residual, **few, failed=failed, left_out=left_out)


def _result(check: Check, readings: Readings, rows: AuditData, deciding: int) -> CheckResult:
    about = {name: getattr(check, name) for name in ("name", "title", "unit", "layer", "paper", "what", "settle")}
    known = {"never_seen": check.never_seen(rows), "by_construction": check.by_construction}
    comparison = compared(readings, check.margin, deciding, **known)
    return CheckResult(**about, stated=check.margin, readings=readings, **asdict(comparison))


def _in_words(seconds: float) -> str:
    return f"{max(1, round(seconds))} seconds" if seconds < 90 else f"{round(seconds / 60)} minutes"
