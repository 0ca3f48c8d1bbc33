"""`audit`: every check on every model, one by one, and what follows."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from .. import __version__
from ..files import PRIVATE, first_line, read_json, write_json
from ..hub.provenance import library_versions
from ..training.checks import SEEDS, check_number, shown
from ..training.models import load_model
from .check import AuditData, Check, Reading, Readings, Role, Subject, timed
from .equivalence import compared
from .pipelines import load_pipeline
from .report import AuditReport
from .residual import ResidualMu, residual_mu
from .result import CheckResult, reading_of
from .verdict import FEW, Verdict, decide


logger = logging.getLogger(__name__)
Size = Literal["standard", "quick"]
FAMILIES = ("classifiers", "language", "generators")  # folders beside this file, each with a `family`


class Family(Protocol):
    """What the module `family` of a folder offers.

    Attributes:
        NAME (`str`): of its models, as in `"classifier"`.
        QUICK, STANDARD, EVERY (`tuple[type[Check], ...]`): its checks; what is in `EVERY` alone is asked for by name.
    """

    NAME: str
    QUICK: tuple[type[Check], ...]
    STANDARD: tuple[type[Check], ...]
    EVERY: tuple[type[Check], ...]

    def fits(self, model: Any) -> bool: ...

    def subject(self, model: Any, role: Role, name: str) -> Subject: ...

    def check_alike(self, audited: Any, other: Any, argument: str) -> None: ...

    def data(
        self, audited: Any, forget: Any, retain: Any, test: Any, *, processing_class: Any, size: str, seed: int
    ) -> AuditData: ...  # and, of generators, `original`, `marker` and `drawing`

    def forget_loss(self, one: Any, rows: Any) -> float | None: ...

    def cost(self, one: Any, rows: Any) -> tuple[float, float]: ...


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
            for `"forgotten"`, and with 5 or more the margins are useful.
        forget, retain, test (`Dataset`): rows as the trainers take them: what was to be forgotten, other training rows, and rows that nobody
            trained on, the forgotten classes among them.
        checks (`"standard"` | `"quick"` | list of `str`, defaults to `"standard"`): which.
        seed (`int`, defaults to 0): of all that is drawn.
        output_dir (*optional*): folder that gets `audit.json`, `audit.html` and `audit.png`. What an audit found so far is kept in its `_private/`, so that
            the same call goes on where it was stopped.
        processing_class (*optional*): image processor or tokenizer, where rows are raw and the model is no folder or id.
        marker ([`ClassifierFeatures`] or callable, *optional*): for generators: images `[n, channels, height, width]` in [−1, 1] to `[n]`, class numbers
            (the forgotten ones are the labels of the forget rows) or bools: which show what was to be forgotten.
        drawing (`dict`, *optional*): for generators: keyword arguments of every call of the pipelines, as in `{"num_inference_steps": 25}`.
        progress (`bool`, defaults to `True`): print the estimate and show bars.

    Returns:
        [`AuditReport`]

    Raises:
        ValueError: an argument that does not fit; nothing was run.
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
    if isinstance(retrained, str | Path | nn.Module) or _is_pipeline(retrained):
        retrained = [retrained]
    family, subjects, processing_class = _subjects(model, original, retrained, processing_class, marker is not None)
    audited = subjects[0]
    size, chosen, unchecked = _chosen(family, checks)
    more = {"marker": marker, "drawing": drawing}
    if getattr(family, "MARKED", False):
        more["original"] = next((one for one in subjects if one.role == "original"), None)
    elif given := [name for name, value in more.items() if value is not None]:
        raise ValueError(f"{given[0]}: is for generators of images, and this is a {family.NAME}; leave it out")
    else:
        more = {}
    rows = family.data(audited, forget, retain, test, processing_class=processing_class, size=size, seed=seed, **more)
    roles = [one.role for one in subjects]
    skipped = {one.name: why for one in chosen if (why := one.missing(rows, roles))}
    chosen = [one for one in chosen if one.name not in skipped]
    if not chosen:
        name, why = next(iter(skipped.items()))
        raise ValueError(f"checks: none can be done with these rows and models (of {name}: {why})")
    losses = _losses(family, subjects, rows)
    started = time.perf_counter()
    estimate = _estimate(family, audited, rows, chosen, len(subjects))
    if progress:
        print(
            f"audit of {audited.name}: {len(chosen)} checks of {len(subjects)} models ({', '.join(f'{n:,} {name}' for name, n in rows.sizes.items())} "
            f"rows), about {_in_words(estimate)}"
        )
    found, failed = _run(chosen, subjects, rows, seed, Store(output_dir, rows.digest, seed), progress)
    needed = [one() for one in family.QUICK if one.name in unchecked and one.layer != "beside"]
    left_out = [one.name for one in needed if one.missing(rows, roles) is None]
    results, residual, verdict = judged(chosen, found, losses, rows, failed=failed, left_out=left_out)
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
        models={_key(subjects, one): one.name for one in subjects},
        model_digest=audited.digest,
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


def _subjects(
    model: Any, original: Any, retrained: Sequence[Any], processing_class: Any, marked: bool
) -> tuple[Family, list[Subject], Any]:
    """The family of the audited model, and all models: the audited one, the original, the retrained ones."""
    if original is not None and original is model:
        raise ValueError("original: is the audited model itself; pass the model as it was before unlearning")
    given = [("model", "audited", model), *[("original", "original", original)] * (original is not None)]
    given += [(f"retrained[{number}]", "retrained", one) for number, one in enumerate(retrained)]
    family, subjects = None, []
    for argument, role, one in given:
        loaded, processor, name = _loaded(one, argument, marked)
        processing_class = processing_class or processor
        own = next((known for known in _families() if known.fits(loaded)), None)
        if own is None:
            raise ValueError(
                f"{argument}: audits of {type(loaded).__name__} are not there; of {', '.join(f'{known.NAME}s' for known in _families())} they are"
            )
        if family is not None and own is not family:
            raise ValueError(f"{argument}: is a {own.NAME}, the audited model a {family.NAME}")
        family = own
        subject = family.subject(loaded, role, str(name or role))
        if subjects:
            family.check_alike(subjects[0], subject, argument)
        subjects.append(subject)
    for number, one in enumerate(subjects):
        for other in subjects[:number]:
            if one.role == "retrained" and other.digest == one.digest:
                raise ValueError(
                    f"{given[number][0]}: has the weights of {_key(subjects, other)}; pass models trained with seeds of their own"
                )
    return family, subjects, processing_class


def _families() -> list[Family]:
    return [importlib.import_module(f"{__package__}.{name}.family") for name in FAMILIES]


def _loaded(model: Any, argument: str, marked: bool) -> tuple[Any, Any, str | None]:
    """The model or pipeline, its processor, and its name. `marked`: an id is that of a pipeline."""
    if _is_pipeline(model):
        return model, None, model.config.get("_name_or_path") or None
    if isinstance(model, str | Path) and (
        Path(model, "model_index.json").is_file() or (marked and not Path(model).is_dir())
    ):
        return load_pipeline(model, argument), None, str(model)
    try:
        return load_model(model, None, None)
    except ValueError as error:
        raise ValueError(f"{argument}: {str(error).removeprefix('model: ')}") from error


def _is_pipeline(model: Any) -> bool:
    return hasattr(model, "components") and hasattr(model, "save_pretrained")


def _losses(family: Family, subjects: Sequence[Subject], rows: AuditData) -> dict[Role, list[float | None]]:
    """Of the forget rows, by role: the statistic of residual μ."""
    found: dict[Role, list[float | None]] = {"audited": [], "original": [], "retrained": []}
    for one in subjects:
        try:
            found[one.role].append(family.forget_loss(one, rows))
        except ValueError as error:
            argument = "model" if one.role == "audited" else _key(subjects, one)
            raise ValueError(f"{argument}: gives outputs that are not finite; there is nothing to audit") from error
    return found


def _key(subjects: Sequence[Subject], one: Subject) -> str:
    same = [other for other in subjects if other.role == one.role]
    return one.role if one.role != "retrained" else f"retrained {same.index(one) + 1}"


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
        names, size = list(dict.fromkeys(checks)), "standard"
        if unknown := [name for name in names if name not in every]:
            raise ValueError(f"checks: {shown(unknown[0])} is none of {', '.join(every)}")
        if not names:
            raise ValueError("checks: is empty; leave it out, or name some")
    word = checks if isinstance(checks, str) else "the list"
    return size, [every[name]() for name in names], {name: f"not in {word}" for name in every if name not in names}


def _estimate(family: Family, audited: Subject, rows: AuditData, chosen: Sequence[Check], models: int) -> float:
    """Seconds, from what an example costs forward and in training."""
    forward, training = family.cost(audited, rows)
    costs = [(getattr(rows, "shared_cost", sum(rows.sizes.values())), 0), *(one.cost(rows) for one in chosen)]
    return models * sum(looked * forward + trained * training for looked, trained in costs)


def _run(
    chosen: Sequence[Check], subjects: Sequence[Subject], rows: AuditData, seed: int, store: Store, progress: bool
) -> tuple[dict[str, Readings], dict[str, str]]:
    """What the checks found, and why others did not run."""
    found, failed = {}, {}
    for one in tqdm(chosen, desc="Audit", disable=not progress):
        try:
            readings = _read(one, subjects, rows, seed, store)
            found[one.name] = one.settled(readings, rows).map(lambda reading: reading.checked())
        except Exception as error:  # whatever an attack raises: what did not run is not passed
            failed[one.name] = first_line(error)
            logger.warning("%s did not run: %s", one.name, failed[one.name])
    return found, failed


def _read(check: Check, subjects: Sequence[Subject], rows: AuditData, seed: int, store: Store) -> Readings:
    found: dict[str, list] = {"audited": [], "original": [], "retrained": []}
    for one in subjects:
        reading = store.kept(check, one)
        if reading is None:
            started = time.perf_counter()
            with torch.random.fork_rng(devices=[one.device] if one.device.type == "cuda" else []):
                torch.manual_seed(int(np.random.SeedSequence([seed, 17]).generate_state(1)[0]))
                reading = check.read(one, rows, seed)
            reading = store.keep(check, one, timed(reading, time.perf_counter() - started))
        found[one.role].append(reading)
    return Readings(found["audited"][0], next(iter(found["original"]), None), tuple(found["retrained"]))


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
        failed, left_out: see [`decide`].
    """
    deciding = sum(one.layer != "beside" for one in chosen) + 1
    results = tuple(_result(one, found[one.name], rows, deciding) for one in chosen if one.name in found)
    original = next(iter(losses["original"]), None)
    residual = residual_mu(losses["audited"][0], losses["retrained"], original=original, checks=deciding)
    few = {"references": len(losses["retrained"]), "forget_examples": rows.sizes["forget"]}
    return results, residual, decide(results, residual, **few, failed=failed, left_out=left_out)


def _result(check: Check, readings: Readings, rows: AuditData, deciding: int) -> CheckResult:
    about = {name: getattr(check, name) for name in ("name", "title", "unit", "layer", "paper", "what")}
    comparison = compared(readings, check.margin, deciding, never_seen=check.never_seen(rows))
    return CheckResult(**about, stated=check.margin, readings=readings, **asdict(comparison))


class Store:
    """What checks read, model by model, below `output_dir/_private/`: an audit that was stopped goes on, and one of another model with the same
    references does not look at these again.
    """

    def __init__(self, output_dir: str | Path | None, rows: str, seed: int):
        self.folder = None if output_dir is None else Path(output_dir, PRIVATE, "audit", f"{rows}-{seed}")

    def _file(self, check: Check, subject: Subject) -> Path | None:
        return None if self.folder is None else self.folder / check.name / f"{subject.digest}.json"

    def kept(self, check: Check, subject: Subject) -> Reading | None:
        file = self._file(check, subject)
        if file is None or not file.is_file():
            return None
        values = read_json(file)
        return reading_of(values["reading"]) if values["version"] == __version__ else None

    def keep(self, check: Check, subject: Subject, reading: Reading) -> Reading:
        if file := self._file(check, subject):
            write_json({"version": __version__, "reading": asdict(reading)}, file)
        return reading


def _in_words(seconds: float) -> str:
    return f"{max(1, round(seconds))} seconds" if seconds < 90 else f"{round(seconds / 60)} minutes"
