"""Docstrings as they are written here (Hugging Face's way) to what mkdocstrings reads (Google's)."""

import inspect
import re
import textwrap

import griffe

import hf_unlearn


# As in "    forget_weight (`float`, defaults to 1.0): weight of the forget loss."
ARGUMENT = re.compile(r"^(?P<indent> +)(?P<names>[\w*]+(?:, [\w*]+)*) \((?P<kind>[^\n]*?)\): ", flags=re.MULTILINE)


def as_google(text: str) -> str:
    """Groups of settings (`> What to forget`) become sections of that title, types plain words (defaults are read from the signature), and public
    names in brackets links to where they are told.
    """

    def argument(found: re.Match) -> str:
        kind = re.sub(r",? *(?:\*optional\*|defaults to .*)", "", found["kind"]).strip(" ,")
        kind = re.sub(r"\[`~?([\w.]+)`\]", r"\1", kind).replace("`", "")
        return f"{found['indent']}{found['names']} ({kind}): " if kind else f"{found['indent']}{found['names']}: "

    def name(found: re.Match) -> str:
        last = found[1].rpartition(".")[2]
        shown = last if found[1].startswith("~") else found[1]
        module = hf_unlearn._EXPORTS.get(last)
        return f"[`{shown}`][hf_unlearn.{module}.{last}]" if module else f"`{shown}`"

    # Of a docstring that was put together the groups stand as deep as they did in the class that they come from.
    blocks = text.split("\n\n")
    text = "\n\n".join(textwrap.dedent(block) if block.lstrip().startswith((">", "`")) else block for block in blocks)
    text = re.sub(r"^> (.+)$", r"Args: \1", text, flags=re.MULTILINE)
    text = ARGUMENT.sub(argument, text)
    return re.sub(r"\[`([^`\]]+)`\](?![\[(])", name, text)


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj, **kwargs):
        is_public = obj.path == f"hf_unlearn.{hf_unlearn._EXPORTS.get(obj.name)}.{obj.name}"
        if is_public and obj.is_class:  # configs are told what their bases' docstrings say when they are made
            text = inspect.getdoc(getattr(hf_unlearn, obj.name))
            if obj.docstring is None:
                obj.docstring = griffe.Docstring(text, parent=obj)
            obj.docstring.value = text
        if obj.docstring:
            obj.docstring.value = as_google(obj.docstring.value)
