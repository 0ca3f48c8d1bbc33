"""`hf-unlearn VERB --config recipe.yaml [--key value …]`.

What is wrong with the words and the keys is said before any library is imported; see [`hf_unlearn.jobs.recipe`].

Every verb takes two more words: `--dry_run` says what would be done, and does nothing; `--json` writes one line of JSON to the output
stream (what was measured, where things are, the exit code), and all else to the error stream.

Exit codes: 0 done, 1 the job failed, 2 the command line or the recipe is wrong (nothing was started or written), 130 stopped
by Ctrl-C. `HF_UNLEARN_DEBUG=1` shows tracebacks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence

from . import __version__
from .jobs.recipe.document import current, document, say
from .jobs.recipe.listing import all_keys, listed, methods_of, most_keys, recipes
from .jobs.recipe.methods import (
    APP,
    AUDIT,
    DEMO,
    FILTER,
    INFLUENCE,
    PUBLISH,
    UNLEARN,
    VERIFY,
    Method,
    chosen,
    of_any_verb,
    read_apart,
)
from .jobs.recipe.reading import FLAGS, UsageError, nearest, one, options, recipe_file


HELP = {"-h", "--help", "--help-all"}
LONGEST = 1000  # characters of an error


# Verbs: a function of the remaining arguments, and a line in VERBS


def unlearn(arguments: Sequence[str]) -> None:
    """make a model forget a class, a concept or single examples, and save it with its card"""
    _of_a_method("unlearn", arguments, UNLEARN)


def influence(arguments: Sequence[str]) -> None:
    """tell which training examples taught a model a behaviour, while it is trained or afterwards"""
    _of_a_method("influence", arguments, INFLUENCE)


def _of_a_method(verb: str, arguments: Sequence[str], methods: Mapping[str, Method]) -> None:
    given = options([word for word in arguments if word not in HELP])
    if asked := HELP & set(arguments):
        named = chosen(given, methods) if {"method", "config"} & set(given) else None
        name = named or next(iter(methods))
        _usage(f"{verb} recipe.yaml [--key value ...]", VERBS[verb].__doc__)
        print(methods_of(methods))
        print(
            f"\nKeys of a recipe with method: {name}"
            + ("" if named else " (--method NAME --help for another)")
            + ":\n"
        )
        _print_keys(methods[name], f"{verb} --method {name}", asked)
        return
    name = chosen(given, methods)
    say(method=name)
    _run(methods[name], given, f"hf-unlearn {verb} --method {name} --help")


def audit(arguments: Sequence[str]) -> None:
    """attack an unlearned model, and say how far it is from models that never saw the data"""
    _plain("audit", arguments, AUDIT, audit.__doc__)


def filter(arguments: Sequence[str]) -> None:
    """learn a filter from a few marked samples, draw through it, and measure it: fit, run, evaluate"""
    if not arguments:
        raise UsageError(
            f"filter: say what to do: {', '.join(FILTER)}; as in hf-unlearn filter fit --config recipe.yaml"
        )
    verb, *rest = arguments
    if verb in HELP:
        _list("filter VERB", FILTER_VERBS)
        return
    if verb not in FILTER:
        is_recipe = recipe_file(verb).is_file()
        otherwise = (
            f"say what to do with it, as in hf-unlearn filter fit {verb}"
            if is_recipe
            else "hf-unlearn filter --help lists them"
        )
        raise UsageError(f"unknown verb {f'filter {verb[:50]}'!r}; {nearest(verb, FILTER, otherwise)}")
    # One recipe serves all three verbs: each leaves the keys of the others alone.
    _plain(f"filter {verb}", rest, FILTER[verb], FILTER_VERBS[verb], [*FILTER.values()])


FILTER_VERBS = {
    "fit": "learn a filter from marked samples, and save it with its card",
    "run": "draw images through a filter",
    "evaluate": "measure what a filter does to fresh samples",
}


def app(arguments: Sequence[str]) -> None:
    """open filters and pipelines in the browser: see before and after, mark samples, fit a filter"""
    if asked := HELP & set(arguments):
        _usage("app [FOLDER_OR_ID ...] [--key value ...]", app.__doc__)
        _print_keys(APP, "app", asked)
        return
    recipe, command = read_apart(APP, options(arguments, named="open"), help="hf-unlearn app --help")
    job = APP.job_of(recipe | command)
    if current().dry_run:
        _tell_resolved(APP, recipe, command)
        return
    from .app.launch import launch

    launch(job)


def demo(arguments: Sequence[str]) -> None:
    """the whole loop on real digits: find, forget, verify, filter, publish, load again, and a page that shows it"""
    _plain("demo", arguments, DEMO, demo.__doc__)


def publish(arguments: Sequence[str]) -> None:
    """publish what a run saved in one commit, with its card and the digest of every file"""
    _plain("publish", _named(arguments, "folder", "repo_id"), PUBLISH, publish.__doc__, words="FOLDER REPO_ID")


def verify(arguments: Sequence[str]) -> None:
    """compute the digests of what was published anew, and say what is not as it was"""
    _plain("verify", _named(arguments, "source"), VERIFY, verify.__doc__, words="REPO_ID")


def _named(arguments: Sequence[str], *names: str) -> list[str]:
    """The first words, which have these names."""
    first = next((place for place, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    if first > len(names):
        raise UsageError(f"unexpected argument {arguments[len(names)][:50]!r}; keys are written --key value")
    keys = [word for name, value in zip(names, arguments[:first], strict=False) for word in (f"--{name}", value)]
    return [*keys, *arguments[first:]]


def _plain(
    verb: str,
    arguments: Sequence[str],
    method: Method,
    about: str,
    others: Sequence[Method] = (),
    words: str = "recipe.yaml",
) -> None:
    """A verb that has no methods."""
    if asked := HELP & set(arguments):
        _usage(f"{verb} {words} [--key value ...]", about)
        _print_keys(method, verb, asked)
        return
    say(verb=verb)
    _run(method, options(arguments), f"hf-unlearn {verb} --help", others)


def estimate(arguments: Sequence[str]) -> None:
    """say what a run would take, memory, disk and time, from a few steps of it in a folder that is removed"""
    if HELP & set(arguments):
        _usage(
            "estimate recipe.yaml [--key value ...]", f"{estimate.__doc__}; keys are those of the recipe's own verb"
        )
        return
    given = options(arguments)
    verb, name, methods = of_any_verb(given, ESTIMATED)
    say(of=verb, method=name)
    _run(
        methods[name], given, f"hf-unlearn {verb} --help", [*FILTER.values()] * (verb == "filter fit"), estimated=True
    )


ESTIMATED = {
    "unlearn": {name: method for name, method in UNLEARN.items() if method.config},  # what has steps
    "influence": {name: method for name, method in INFLUENCE.items() if method.config},
    "filter fit": {"fit": FILTER["fit"]},
}


def list_(arguments: Sequence[str]) -> None:
    """show the recipes that come with the package, what they need and how long they take, and the methods"""
    if arguments and arguments[0] not in HELP:
        raise UsageError(f"unexpected argument {arguments[0]!r}; hf-unlearn list takes none")
    methods = {"unlearn": UNLEARN, "influence": INFLUENCE}
    if current().json:
        abouts = {verb: {name: method.about for name, method in found.items()} for verb, found in methods.items()}
        say(recipes=listed(), methods=abouts)
        return
    print(f"Recipes, for --config NAME:\n\n{recipes()}\n")
    for verb, found in methods.items():
        print(f"Methods of {verb}:\n\n{methods_of(found)}\n")


VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "influence": influence,
    "unlearn": unlearn,
    "audit": audit,
    "filter": filter,
    "publish": publish,
    "verify": verify,
    "app": app,
    "estimate": estimate,
    "list": list_,
    "demo": demo,
}


def _run(
    method: Method,
    given: Mapping[str, Sequence[str]],
    help: str,
    others: Sequence[Method] = (),
    *,
    estimated: bool = False,
) -> None:
    recipe, command = read_apart(method, given, others, help=help)
    runs_dry = current().dry_run and "dry_run" in method.keys  # by itself: it looks, and sends nothing
    command |= {"dry_run": True} if runs_dry else {}
    values = recipe | command
    job = method.job_of(values)
    say(
        recipe=one(given, "config"),
        keys=values,
        output_dir=values.get("output_dir") or getattr(job, "output_dir", None),
    )
    if current().dry_run and not runs_dry:
        _tell_resolved(method, recipe, command)
        return
    if estimated:
        from .jobs.estimate import run_estimate

        say(**run_estimate(method, values, current().begun))
        return
    run = method.runner(job, values)
    from .jobs.alone import leaving_together

    words = [word for key, values in given.items() for word in (f"--{key}", *values)]
    with leaving_together():
        outcome = run(words) if method.goes_on else run()
    say(**(outcome if isinstance(outcome, Mapping) else {}))


def _tell_resolved(method: Method, recipe: Mapping, command: Mapping) -> None:
    from .jobs.recipe.resolved import resolved

    found = resolved(method, recipe, command)
    say(keys=found.keys, reads=found.reads, writes=found.writes, not_here=found.not_here)
    print("\n".join(found.lines()))
    if missing := [f"{place.key}={place.value!r}: {place.where}" for place in found.reads if place.found is False]:
        raise ValueError("; ".join(missing))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv (`Sequence[str]`, *optional*): the arguments; defaults to the command line's.

    Returns:
        `int`: exit code.
    """
    words = [*(sys.argv[1:] if argv is None else argv)]
    asked = {flag: any(_flag(word) == flag for word in words) for flag in FLAGS}
    verb, *arguments = [word for word in words if _flag(word) not in FLAGS] or ["--help"]
    if HELP & set(words):
        asked["json"] = False
    with document(**asked) as told:
        told.said.update(hf_unlearn=__version__, verb=verb, dry_run=told.dry_run)
        code = _code_of(verb, arguments)
        told.said.update(exit_code=code)
    return code


def _flag(word: str) -> str:
    return word.removeprefix("--").replace("-", "_") if word.startswith("--") else ""


def _code_of(verb: str, arguments: Sequence[str]) -> int:
    debug = os.environ.get("HF_UNLEARN_DEBUG", "") not in ("", "0")
    try:
        if verb in HELP:
            _list("VERB", {name: function.__doc__ for name, function in VERBS.items()})
        elif verb == "--version":
            print(f"hf-unlearn {__version__}")
        elif verb not in VERBS:
            raise UsageError(f"unknown verb {verb[:50]!r}; {nearest(verb, VERBS, 'hf-unlearn --help lists them')}")
        else:
            VERBS[verb](arguments)
    except KeyboardInterrupt as stop:
        if debug:
            raise
        line = "\n" if sys.stderr.isatty() else ""  # below a progress bar
        why = str(stop) or "stopped; the same command begins anew"
        say(error=why)
        print(f"{line}hf-unlearn: {why}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as of `hf-unlearn list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UsageError as error:
        if debug:
            raise
        return _fail(error, 2)
    except (ValueError, FloatingPointError, OSError) as error:
        if debug:
            raise
        return _fail(error, 1)
    return 0


def _usage(command: str, about: str) -> None:
    print(f"usage: hf-unlearn {command}\n\n{about[0].upper()}{about[1:]}.\n")


def _print_keys(method: Method, command: str, asked: set[str]) -> None:
    if "--help-all" in asked:
        print(all_keys(method))
    else:
        print(f"{most_keys(method)}\n\nhf-unlearn {command} --help-all: every key, with all that is to be said of it.")
    print("Of every verb: --dry_run says what would be done, and does nothing; --json writes one line for machines.")


def _list(command: str, verbs: Mapping[str, str]) -> None:
    width = max(map(len, verbs))
    listing = "\n".join(f"  {name:{width}}  {about}" for name, about in verbs.items())
    print(f"usage: hf-unlearn {command} recipe.yaml [--key value ...]\n\n{listing}\n")
    print(f"`hf-unlearn {command} --help` lists the keys of a verb's recipe.")


def _fail(error: Exception, code: int) -> int:
    text = " ".join(str(error).split())
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
    say(error=text)
    print("hf-unlearn: error:", text, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
