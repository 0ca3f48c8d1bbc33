"""The verbs and their methods: where the keys of each are declared, and what runs it. Nothing is imported before it is needed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple, get_type_hints

import hf_unlearn

from ...training.checks import shown
from .checks import check_folders
from .declared import UNKNOWN, Key, docstring_of, helps_of, keys_of
from .reading import UsageError, load_recipe, nearest, of_command_line, of_recipe, one


# Keys that ask for what not every machine has: the libraries' configs look for it when they are made.
OF_THE_MACHINE = ("bf16", "bf16_full_eval", "tf32")


class NotHereError(UsageError):
    """What this machine cannot do, and another one can.

    Args:
        keys (`list[str]`): that ask for it.
        settings: the config without them.
    """

    def __init__(self, keys: Sequence[str], settings: Any):
        asked, without = ", ".join(f"{key}=True" for key in keys), " ".join(f"--{key} false" for key in keys)
        super().__init__(f"{asked}: no GPU of this machine can; run it where one does, or add {without}")
        self.keys, self.settings = keys, settings


class Method(NamedTuple):
    """One way to do what a verb says.

    Attributes:
        job (`str`): module and class below `hf_unlearn.jobs.recipe`: the keys that are not of a config.
        run (`str`): module and function below `hf_unlearn.jobs`.
        config, trainer (`str`, *optional*): names at the package's root: the class with the other keys, and what trains.
        goes_on (`bool`, defaults to `False`): its function is given the words of the command too, to say how to go on.
    """

    job: str
    run: str
    config: str | None = None
    trainer: str | None = None
    goes_on: bool = False

    @property
    def classes(self) -> list[tuple[str, str]]:
        """Module and name of the classes that declare keys."""
        module, _, name = self.job.rpartition(".")
        job = (f"{__package__}.{module}", name)
        return [job] if self.config is None else [job, _exported(self.config)]

    @property
    def keys(self) -> dict[str, Key]:
        """All keys of its recipes."""
        return {name: key for kind in self.classes for name, key in _keys(*kind).items()}

    @property
    def about(self) -> str:
        """What its trainer says of itself, or its job where nothing is trained."""
        text = docstring_of(*(_exported(self.trainer) if self.trainer else self.classes[0]))
        first = " ".join(text.strip().partition("\n\n")[0].split())
        return re.sub(r"\[`~?(?:\w+\.)*(\w+)`\]", r"\1", first)

    def job_of(self, given: Mapping[str, Any]) -> Any:
        """The job's own keys, checked; those of its config too, as far as that takes no import.

        Raises:
            UsageError: naming the key and the fix.
        """
        (module, name), *config = self.classes
        kind = getattr(import_module(module), name)
        own = {key: value for key, value in given.items() if key in {field.name for field in fields(kind)}}
        try:
            check_folders(given)
            job = kind(**own)
            if config:
                job.check_config({key: value for key, value in given.items() if key in _keys(*config[0])})
        except ValueError as error:
            raise UsageError(str(error)) from error
        return job

    def settings(self, job: Any, given: Mapping[str, Any]) -> Any:
        """The config, of the method's own defaults and what is given; None where there is none. Imports the libraries.

        Raises:
            NotHereError: the machine cannot do what one of [`OF_THE_MACHINE`] asks for.
            UsageError: the config refuses a value.
        """
        if self.config is None:
            return None
        kind = getattr(hf_unlearn, self.config)
        kind = kind.paper if getattr(job, "preset", None) else kind
        own = {key: value for key, value in given.items() if key in _keys(*_exported(self.config))}
        own = getattr(job, "defaults", dict)() | own
        try:
            return kind(**own)
        except ValueError as error:
            asked = [key for key in OF_THE_MACHINE if own.get(key)]
            if asked and not own.get("fp16"):  # which nobody takes beside bf16
                with suppress(ValueError):
                    raise NotHereError(asked, kind(**(own | dict.fromkeys(asked, False)))) from error
            raise UsageError(str(error)) from error

    def runner(self, job: Any, given: Mapping[str, Any]) -> Any:
        """What runs a job, as a function of no arguments. From here on, the libraries are imported.

        Raises:
            UsageError: the config refuses a value.
        """
        module, _, name = self.run.rpartition(".")
        run = getattr(import_module(f"hf_unlearn.jobs.{module}"), name)
        if self.config is None:
            return partial(run, job)
        return partial(run, job, self.settings(job, given), getattr(hf_unlearn, self.trainer))


UNLEARN = {
    "pbu": Method("unlearn.UnlearnJob", "unlearn.run_unlearn", "PBUConfig", "PBUTrainer"),
    "unlearn": Method("unlearn.UnlearnJob", "unlearn.run_unlearn", "UnlearnConfig", "UnlearnTrainer"),
    "sft": Method("language.LanguageJob", "language.run_language", "UnlearnSFTConfig", "UnlearnSFTTrainer"),
    "vdu": Method("vdu.VDUJob", "vdu.run_vdu", "VDUConfig", "VDUTrainer"),
    "esd": Method("vdu.VDUJob", "vdu.run_vdu", "ESDConfig", "ESDTrainer"),
    "concept_ablation": Method("vdu.VDUJob", "vdu.run_vdu", "ConceptAblationConfig", "ConceptAblationTrainer"),
    "salun": Method("vdu.VDUJob", "vdu.run_vdu", "SalUnConfig", "SalUnTrainer"),
    "redirect": Method("redirect.RedirectJob", "redirect.run_redirect"),
    "adapt_then_unlearn": Method(
        "adapt_then_unlearn.GANJob",
        "adapt_then_unlearn.run_adapt_then_unlearn",
        "AdaptThenUnlearnConfig",
        "AdaptThenUnlearnTrainer",
    ),
}
INFLUENCE = {
    "classifier": Method("influence.InfluenceJob", "influence.run_influence", "InfluenceConfig", "InfluenceTrainer"),
    "sft": Method("influence.InfluenceJob", "influence.run_influence", "FINEConfig", "FINETrainer"),
    "attribute": Method("attribute.AttributeJob", "attribute.run_attribute"),
}
FILTER = {
    "fit": Method("filter.FilterFitJob", "filter.fit.run_fit", goes_on=True),
    "run": Method("filter.FilterRunJob", "filter.run.run_filtered"),
    "evaluate": Method("filter.FilterEvaluateJob", "filter.evaluate.run_evaluate"),
}
AUDIT = Method("audit.AuditJob", "audit.run_audit")
APP = Method("app.AppJob", "")  # the command line starts it: the app stands above the jobs
DEMO = Method("demo.DemoJob", "demo.run_demo")
PUBLISH = Method("publish.PublishJob", "publish.run_publish")
VERIFY = Method("publish.VerifyJob", "publish.run_verify")


def _exported(name: str) -> tuple[str, str]:
    return f"hf_unlearn.{hf_unlearn._EXPORTS[name]}", name


def _keys(module: str, name: str) -> Mapping[str, Key]:
    try:
        return keys_of(module, name)
    except LookupError:  # a library that declares its classes in another way than those we know
        return imported_keys(module, name)


def imported_keys(module: str, name: str) -> dict[str, Key]:
    """As [`keys_of`], from the class itself; an enumeration takes any word, which the class checks."""
    kind = getattr(import_module(module), name)
    hints = get_type_hints(kind)
    helps = {key: text for above in reversed(kind.__mro__) for key, text in helps_of(above.__doc__ or "").items()}
    return {
        field.name: Key(
            field.name,
            hints[field.name],
            UNKNOWN if field.default is MISSING else getattr(field.default, "value", field.default),
            helps.get(field.name, field.metadata.get("help", "")),
            kind.__module__,
        )
        for field in fields(kind)
        if field.init
    }


def read(
    method: Method, given: Mapping[str, Sequence[str]], others: Sequence[Method] = (), *, help: str
) -> dict[str, Any]:
    """The values that recipe and command line give; the command line wins.

    Args:
        given: what [`options`][hf_unlearn.jobs.recipe.reading.options] found.
        others: whose keys a recipe may have besides, which are left alone.
        help (`str`): what lists the keys, for an error.

    Raises:
        UsageError: naming the recipe, the key and the fix.
    """
    recipe, command = read_apart(method, given, others, help=help)
    return recipe | command


def read_apart(
    method: Method, given: Mapping[str, Sequence[str]], others: Sequence[Method] = (), *, help: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """As [`read`]: the recipe's values, and the command line's."""
    keys, otherwise = method.keys, f"{help} lists the keys"
    path, given = one(given, "config"), {name: words for name, words in given.items() if name != "config"}
    values = of_command_line(given, keys, otherwise)
    if path is not None and "method" not in keys and (verb := _verb_of_method(load_recipe(path)[0].get("method"))):
        raise UsageError(f"{path}: unknown key 'method'; it is a recipe of hf-unlearn {verb}")
    foreign = [name for other in others for name in other.keys]
    return {} if path is None else of_recipe(path, keys, foreign, otherwise), values


def chosen(given: Mapping[str, Sequence[str]], methods: Mapping[str, Method]) -> str:
    """The key `method`, which decides what other keys there are.

    Raises:
        UsageError: missing, or none of them.
    """
    name, path = one(given, "method"), one(given, "config")
    if name is None and path is not None:
        name = load_recipe(path)[0].get("method")
    known = ", ".join(methods)
    if name is None:
        recipe = "" if path else "; or give a recipe, as in --config recipe.yaml"
        if path and (verb := _verb_without_methods(load_recipe(path)[0])):
            recipe = f"; or is it a recipe of hf-unlearn {verb}?"
        raise UsageError(f"method: missing; set it to one of {known}{recipe}")
    if not isinstance(name, str) or name not in methods:
        elsewhere = _verb_of_method(name)
        fix = elsewhere and f"it is one of hf-unlearn {elsewhere}"
        raise UsageError(
            f"method: {shown(name)} is not one of {known}; {fix or nearest(str(name), methods, 'choose one of them')}"
        )
    return name


def _verb_of_method(name: Any) -> str:
    """The verb that has a method of this name; nothing where none has."""
    verbs = {"unlearn": UNLEARN, "influence": INFLUENCE}
    return next((verb for verb, methods in verbs.items() if isinstance(name, str) and name in methods), "")


def _verb_without_methods(recipe: Mapping[str, Any]) -> str:
    """The verb whose keys all of a recipe's keys are; nothing where there is none."""
    verbs = {"audit": [AUDIT], "filter fit": [*FILTER.values()]}
    known = {verb: {key for method in methods for key in method.keys} for verb, methods in verbs.items()}
    return next((verb for verb, keys in known.items() if recipe and recipe.keys() <= keys), "")


def of_any_verb(
    given: Mapping[str, Sequence[str]], verbs: Mapping[str, Mapping[str, Method]]
) -> tuple[str, str, Mapping[str, Method]]:
    """The verb that a recipe is for, told by its `method` and its other keys: verb, method, and the verb's methods.

    Args:
        verbs: methods by verb; one of a single method has recipes without the key `method`.

    Raises:
        UsageError: it is for none of them, or a key is wrong.
    """
    words = {name: values for name, values in given.items() if name not in ("config", "method")}
    path, name = one(given, "config"), one(given, "method")
    if path is None and name is None:
        raise UsageError("config: missing; give a recipe, as in hf-unlearn estimate pbu_digits")
    recipe = {} if path is None else load_recipe(path)[0]
    name = name or recipe.get("method")
    found = [(verb, name or next(iter(methods)), methods) for verb, methods in verbs.items()
             if name in methods or (name is None and len(methods) == 1)]  # fmt: skip
    known = ", ".join(verbs)
    if not found:
        what = "method: missing" if name is None else f"method: {shown(name)} takes no steps, or is none"
        raise UsageError(f"{what}; give a recipe of {known}")

    def unknown(candidate: tuple[str, str, Mapping[str, Method]]) -> int:
        _, name, methods = candidate
        every = set(methods[name].keys) | {"method"}
        return len([key for key in (*recipe, *words) if key not in every])

    best = min(found, key=unknown)
    if name is None and recipe.keys() | words.keys() and "pipeline" not in (recipe | words):
        raise UsageError(f"method: missing; give a recipe of {known}")
    return best
