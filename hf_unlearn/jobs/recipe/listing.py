"""What `--help` and `hf-unlearn list` print."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from .declared import UNKNOWN, Key
from .methods import Method
from .reading import RECIPES, described, load_recipe, shipped_recipes


WIDTH = 119
# Of the settings that the libraries' configs have, those that most recipes set.
USUAL = (
    "output_dir",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "save_strategy",
    "save_steps",
    "resume_from_checkpoint",
    "report_to",
    "seed",
    "use_cpu",
    "bf16",
    "push_to_hub",
    "hub_model_id",
)


def most_keys(method: Method) -> str:
    """The keys of this package, a line each, and the names of those of its libraries that are usual."""
    keys = method.keys.values()
    lines = [f"  {_name(key):40} {key.help}" for key in keys if key.owner.startswith("hf_unlearn.")]
    usual = ", ".join(key.name for key in keys if key.name in USUAL and not key.owner.startswith("hf_unlearn."))
    if usual:
        lines.append("\n" + textwrap.fill(f"And of the trainer's own config, among others: {usual}.", WIDTH))
    return "\n".join(line if len(line) <= WIDTH or line[0] == "\n" else f"{line[: WIDTH - 1]}…" for line in lines)


def all_keys(method: Method) -> str:
    """Every key, with its default and all that is said of it."""
    parts = []
    for key in method.keys.values():
        default = "" if key.default in (UNKNOWN, None, "") else f" Default: {_word(key.default)}."
        text = textwrap.fill(key.help + default, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
        parts.append(f"  {_name(key)}\n{text}")
    return "\n".join(parts)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _name(key: Key) -> str:
    return f"--{key.name} {_value(key)}"


def _value(key: Key) -> str:
    words = [str(word) for kind in key.kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if words:
        return "|".join(words) if len(words) <= 6 else "|".join([*words[:3], "…"])
    if key.element is not None:
        return f"{described([key.element])} …"
    return described(key.kinds[:1])


def methods_of(methods: Mapping[str, Method]) -> str:
    """A line for each method of a verb."""
    width = max(map(len, methods))
    lines = (f"  {name:{width}}  {method.about.rstrip('.')}" for name, method in methods.items())
    return "\n".join(line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…" for line in lines)


def listed() -> list[dict[str, Any]]:
    """The recipes that come with the package, for machines: `name`, `verb`, what it does (`about`), what it `needs` and `takes`, its `keys`."""
    found = []
    for name in shipped_recipes():
        text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
        verb = re.search(rf"^#   hf-unlearn ((?:filter )?\w+) --config recipes/{name}\.yaml", text, re.MULTILINE)
        said: dict[str, str] = {}
        field = None
        for line in text.splitlines()[1:]:
            begins = re.match(r"# (Needs|Takes): (.*)", line)
            if begins:
                field = begins[1].lower()
                said[field] = begins[2]
            elif field == "takes" and re.match(r"# [a-z]", line):  # goes on
                said[field] += f" {line.removeprefix('# ')}"
            else:
                field = None
        about = text.partition("\n")[0].removeprefix("# ")
        keys = load_recipe(name)[1]
        found.append({"name": name, "verb": verb[1], "about": about, **said, "keys": keys})
    return found


def recipes() -> str:
    """The recipes that come with the package: the verb, what they need, how long they take, and what they do."""
    parts = []
    for recipe in listed():
        parts.append(f"  {recipe['name']} ({recipe['verb']})")
        for line in (
            recipe["about"],
            *(f"{field} {recipe[field]}" for field in ("needs", "takes") if field in recipe),
        ):
            parts += textwrap.wrap(line, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(parts)
