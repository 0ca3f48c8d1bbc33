"""`hf-unlearn VERB --config recipe.yaml [--key value …]`.

A recipe is flat YAML; its keys are dataclass fields. Every value is read as the same words on the command line would be,
by one `HfArgumentParser`, so that `3e-4`, `no` and `null` mean what they say. The command line wins.

Exit codes: 0 done, 1 the job failed, 2 the command line or the recipe is wrong (nothing was started or written).
`HF_UNLEARN_DEBUG=1` shows tracebacks.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from . import __version__


# Keys that recipes had before, and what they are called now.
RENAMED = {
    "replay_samples": "own_samples",
    "replay_filter": "marker",
    "guard_samples": "guard_examples",
    "sample_batch_size": "batch_size",
    "forget_classes": "classes",
    "undesired_classes": "classes",
    "negatives": "undesired_folder",
    "positives": "clean_folder",
    "fisher_weight": "stability_weight",  # of vdu, with stability: fisher
}
# Keys that recipes of generators had before, and that mean nothing there.
OF_LABELS = {"forget", "forget_accuracy", "bn", "fisher", "fisher_samples"}


class UsageError(Exception):
    """The command line or the recipe is wrong."""


# Verbs: a function of the remaining arguments, and a line in VERBS


def unlearn(arguments: Sequence[str]) -> None:
    """make a model forget a class or single examples, and save it with its card"""
    # Before the imports, which take seconds.
    method = _method(arguments, ("pbu", "unlearn", "sft", "vdu", "adapt_then_unlearn"))
    if method == "vdu":
        from .jobs.vdu import METHODS, VDUJob, run_vdu

        _run("unlearn", arguments, VDUJob, METHODS[method], run_vdu)
    elif method == "adapt_then_unlearn":
        from .jobs.adapt_then_unlearn import METHODS, GANJob, run_adapt_then_unlearn

        _run("unlearn", arguments, GANJob, METHODS[method], run_adapt_then_unlearn)
    else:
        from .jobs.unlearn import METHODS, UnlearnJob, run_unlearn

        _run("unlearn", arguments, UnlearnJob, METHODS[method], run_unlearn)


def influence(arguments: Sequence[str]) -> None:
    """train a model once and tell which training examples taught it a behaviour"""
    method = _method(arguments, ("classifier", "sft"))
    from .jobs.influence import METHODS, InfluenceJob, run_influence

    _run("influence", arguments, InfluenceJob, METHODS[method], run_influence)


def _run(verb: str, arguments: Sequence[str], job_class: type, method: tuple[type, type], run: Callable) -> None:
    config_class, trainer_class = method
    given = read(verb, arguments, job_class, config_class)
    try:
        job = job_class(**_of(job_class, given))
        config = job.config(config_class, _of(config_class, given))
    except ValueError as error:
        raise UsageError(str(error)) from error
    from .jobs.alone import leaving_together

    with leaving_together():
        run(job, config, trainer_class)


def filter(arguments: Sequence[str]) -> None:
    """learn a filter from a few marked samples, draw through it, and measure it: fit, run, evaluate"""
    if not arguments or arguments[0] in ("-h", "--help"):
        if not arguments:
            raise UsageError(
                f"filter: say what to do: {', '.join(FILTER_VERBS)}; as in hf-unlearn filter fit --config recipe.yaml"
            )
        _list("filter VERB", FILTER_VERBS)
    elif arguments[0] not in FILTER_VERBS:
        raise UsageError(f"unknown verb {f'filter {arguments[0]}'!r}; {_nearest(arguments[0], FILTER_VERBS)}")
    else:
        FILTER_VERBS[arguments[0]](arguments[1:])


def filter_fit(arguments: Sequence[str]) -> None:
    """learn a filter from marked samples, and save it with its card"""
    job = _filter_job("fit", arguments)
    from .jobs.filter.fit import run_fit

    run_fit(job, arguments)


def filter_run(arguments: Sequence[str]) -> None:
    """draw images through a filter"""
    job = _filter_job("run", arguments)
    from .jobs.filter.run import run_filtered

    run_filtered(job)


def filter_evaluate(arguments: Sequence[str]) -> None:
    """measure what a filter does to fresh samples"""
    job = _filter_job("evaluate", arguments)
    from .jobs.filter.evaluate import run_evaluate

    run_evaluate(job)


FILTER_VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "fit": filter_fit,
    "run": filter_run,
    "evaluate": filter_evaluate,
}


def _filter_job(verb: str, arguments: Sequence[str]) -> Any:
    """One recipe serves all three verbs: each leaves the keys of the others alone."""
    from .jobs.filter.evaluate import FilterEvaluateJob
    from .jobs.filter.fit import FilterFitJob
    from .jobs.filter.run import FilterRunJob

    jobs = {"fit": FilterFitJob, "run": FilterRunJob, "evaluate": FilterEvaluateJob}
    others = {name for other in jobs.values() for name in _names(other)}
    given = read(f"filter {verb}", arguments, jobs[verb], others=others)
    try:
        return jobs[verb](**given)
    except ValueError as error:
        raise UsageError(str(error)) from error


@dataclass
class DemoJob:
    """Settings of `hf-unlearn demo`.

    Args:
        output_dir (`str`, defaults to `"demo"`): folder for the three models; new or empty.
        forgotten (`int`, defaults to 3): the digit to forget, 0 to 9.
        seed (`int`, defaults to 0): of all three trainings.
    """

    output_dir: str = "demo"
    forgotten: int = 3
    seed: int = 0


def demo(arguments: Sequence[str]) -> None:
    """train a classifier on real digits, make it forget one, check, save and load it again"""
    job = DemoJob(**read("demo", arguments, DemoJob))
    from .jobs.demo import run

    run(job.output_dir, job.forgotten, job.seed)


VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "influence": influence,
    "unlearn": unlearn,
    "filter": filter,
    "demo": demo,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv (`Sequence[str]`, *optional*): the arguments; defaults to the command line's.

    Returns:
        `int`: exit code.
    """
    verb, *arguments = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    debug = os.environ.get("HF_UNLEARN_DEBUG", "") not in ("", "0")
    try:
        if verb in ("-h", "--help"):
            _list("VERB", VERBS)
        elif verb == "--version":
            print(f"hf-unlearn {__version__}")
        elif verb not in VERBS:
            raise UsageError(f"unknown verb {verb!r}; {_nearest(verb, VERBS)}")
        else:
            VERBS[verb](arguments)
    except UsageError as error:
        if debug:
            raise
        return _fail(error, 2)
    except (ValueError, FloatingPointError, OSError) as error:
        if debug:
            raise
        return _fail(error, 1)
    except SystemExit as stop:  # argparse, after it has printed its help
        return stop.code or 0
    return 0


def _list(command: str, verbs: dict[str, Callable]) -> None:
    width = max(map(len, verbs))
    listing = "\n".join(f"  {name:{width}}  {function.__doc__}" for name, function in verbs.items())
    print(f"usage: hf-unlearn {command} --config recipe.yaml [--key value ...]\n\n{listing}\n")
    print(f"`hf-unlearn {command} --help` lists the keys of a verb's recipe.")


def _fail(error: Exception, code: int) -> int:
    print("hf-unlearn: error:", *str(error).split(), file=sys.stderr)
    return code


# Recipes


def read(verb: str, arguments: Sequence[str], *classes: type, others: Collection[str] = ()) -> dict[str, Any]:
    """The keys that recipe and command line give explicitly, with the types that the dataclasses `classes` ask for.

    Args:
        others: keys that a recipe may have besides, which are left alone.

    Raises:
        UsageError: naming the recipe, the key and the fix.
    """
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        classes,
        prog="hf-unlearn",
        usage=f"hf-unlearn {verb} --config recipe.yaml [--key value ...]",
        description=f"{(_function(verb).__doc__ or '').capitalize()}. The keys of a recipe are the long options below.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    helps = _helps(classes)
    for action in parser._actions:
        action.help = helps.get(action.dest, action.help)
    parser.add_argument("--config", metavar="RECIPE", help="flat YAML; the command line overrides it")
    hints = {name: hint for c in classes for name, hint in get_type_hints(c).items() if name in _names(c)}
    given = _parse(parser, arguments, hints)
    path = given.pop("config", None)
    return given if path is None else _parse_recipe(parser, path, hints, others) | given


def _helps(classes: Iterable[type]) -> dict[str, str]:
    """`{field: what its class's docstring says of it}`; a docstring lists fields as "name, other (`type`, …): text."."""
    helps: dict[str, str] = {}
    for kind in (kind for c in reversed(classes) for kind in reversed(c.__mro__) if kind is not object):
        entry = r"^( +)([a-z]\w*(?:, [a-z]\w*)*) ?\((?:`[^\n]*?|\*optional[^\n]*?)\):((?:[^\n]*\n)(?:\1 +\S[^\n]*\n)*)"
        for _, names, text in re.findall(entry, f"{kind.__doc__ or ''}\n", flags=re.MULTILINE):
            # argparse reads % as its own.
            helps |= dict.fromkeys(names.split(", "), " ".join(text.split()).replace("%", "%%"))
    return helps


def _function(verb: str) -> Callable:
    first, *rest = verb.split()
    return FILTER_VERBS[rest[0]] if rest else VERBS[first]


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str], hints: Iterable[str]) -> dict[str, Any]:
    """What is given in `arguments`, without the parser's defaults."""
    unset = object()
    namespace = argparse.Namespace(**dict.fromkeys([*hints, "config"], unset))
    try:
        _, unknown = parser.parse_known_args(list(arguments), namespace)
    except argparse.ArgumentError as error:
        key = (error.argument_name or "").split("/")[0].lstrip("-")
        raise UsageError(f"{key}: {error.message}") from error
    if unknown:
        key = unknown[0].split("=")[0]
        if not key.startswith("--"):
            raise UsageError(f"unexpected argument {key!r}; keys are written --key value")
        key = key.removeprefix("--").replace("-", "_")
        raise UsageError(f"unknown key {key!r}; {_nearest(key, hints)}")
    return {name: value for name, value in vars(namespace).items() if value is not unset}


def _parse_recipe(
    parser: argparse.ArgumentParser, path: str, hints: dict[str, Any], others: Collection[str]
) -> dict[str, Any]:
    words, values = load_recipe(path)
    arguments, given = [], {}
    try:
        for key, text in words.items():
            if key not in hints and key in others:
                continue
            if key not in hints:
                raise UsageError(f"unknown key {key!r}; {_nearest(key, [*hints, *others])}")
            value, accepted = values[key], _alternatives(hints[key])
            if value is None or isinstance(value, dict):
                given[key] = value
            elif isinstance(value, list):
                if any(isinstance(element, list | dict) for element in value):
                    raise UsageError(f"{key}: {value!r} is nested; a list may hold plain values only")
                if str in accepted:  # as in `report_to`: on the command line it is one word
                    given[key] = text
                else:
                    arguments += [f"--{key}", *text]
            else:
                arguments.append(f"--{key}={text}")
            if isinstance(value, None | dict | list) and type(value) not in accepted:
                shown = "null" if value is None else repr(value)
                raise UsageError(f"{key}: {shown} is not allowed; expected {_described(hints[key])}")
        return given | _parse(parser, arguments, hints)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error.__cause__


def recipe_file(path: str) -> Path:
    """The file, or the recipe of that name that came with the package (`recipes/pbu_digits.yaml`, or `pbu_digits`)."""
    file = Path(path)
    shipped = Path(__file__).parent / "recipes" / file.with_suffix(".yaml").name
    return shipped if not file.exists() and shipped.is_file() else file


def load_recipe(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A recipe twice: with every scalar as it is written, and as YAML understands it.

    Raises:
        UsageError: not readable, not YAML, no mapping, or a key twice.
    """
    import yaml

    try:
        text = recipe_file(path).read_text(encoding="utf-8")
        words, values = yaml.load(text, Loader=yaml.BaseLoader), yaml.safe_load(text)
    except OSError as error:
        raise UsageError(f"config: cannot read {path!r} ({error.strerror}); give the path of a recipe") from error
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1}: {error.problem})" if mark else ""
        raise UsageError(f"{path}: is not YAML{place}; a recipe has lines like 'method: pbu'") from error
    if not isinstance(values, dict):
        kind = "empty" if values is None else f"a {type(values).__name__}"
        raise UsageError(f"{path}: is {kind}, not a mapping of keys to values; a recipe has lines like 'method: pbu'")
    keys = [str(key.value) for key, _ in yaml.compose(text).value]
    if twice := [key for key in words if keys.count(key) > 1]:
        raise UsageError(f"{path}: key {twice[0]!r} occurs {keys.count(twice[0])} times; keep one of them")
    return words, values


def _method(arguments: Sequence[str], methods: Sequence[str]) -> str:
    """The key that decides which other keys there are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in ("--config", "--method"):
        parser.add_argument(option)
    try:
        given, rest = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise UsageError(f"{error.argument_name.lstrip('-')}: {error.message}") from error
    method = given.method
    if {"-h", "--help"} & set(rest):
        method = method or methods[0]
    elif method is None and given.config is not None:
        method = load_recipe(given.config)[0].get("method")
    if method is None:
        raise UsageError(f"method: missing; set it to one of {', '.join(methods)}")
    if method not in methods:
        raise UsageError(f"method: {method!r} is not one of {', '.join(methods)}; {_nearest(str(method), methods)}")
    return method


def _names(dataclass_type: type) -> list[str]:
    return [f.name for f in fields(dataclass_type) if f.init]


def _of(dataclass_type: type, given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in _names(dataclass_type) if name in given}


def _nearest(word: str, known: Iterable[str]) -> str:
    if RENAMED.get(word) in (known := list(known)):
        return f"it is called {RENAMED[word]!r} now"
    if word in OF_LABELS:
        return "only models with labels or tokens have it; leave it out"
    return f"did you mean {difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]!r}?"


def _alternatives(hint: Any) -> set[Any]:
    """`{list, NoneType}` for `list[str] | None`."""
    kinds = get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)
    return {get_origin(kind) or kind for kind in kinds}


def _described(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


if __name__ == "__main__":
    sys.exit(main())
