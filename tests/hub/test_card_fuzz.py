"""Labels, names and concepts of any kind: a card says them, and parses back to the same metadata."""

import re
from dataclasses import replace

import pytest
from filter_data import fitted_filter
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_unlearn.filtering.card import filter_card
from hf_unlearn.hub.card import Figure, plain_card, unlearning_card
from hf_unlearn.hub.provenance import Provenance
from hf_unlearn.hub.text import line
from hf_unlearn.hub.valid import check_card


PROVENANCE = Provenance(
    method="m", method_title="t", forgotten="x", forget_examples=1, seed=0, steps=0, paper="2403.00001"
)
CONFIG = fitted_filter(channels=1).config
HOSTILE = (
    'a "quoted" label', "it's", "two\nlines", "---\nlicense: mit\n---", "# heading", "## Audit\n", "🦊 é ü 中", "a: b", "- item", "{x: [1, 2}",
    "| cell |", "[b]bold[/b] [/]", "[link](javascript:alert(1))", "<script>alert(1)</script>", "```\ncode\n```", "`a`", "{{ 7 * 7 }}", "{% raw %}",
    "!!python/object:os.system", "&anchor *alias", "%TAG", "null", "~", "yes", "1e3", "@at", "\\", "\\n", "a\u2028b\u2029c\x85d", "\ufeff", "'", "  x  ",
)  # fmt: skip
TEXT = st.text(min_size=1, max_size=40).filter(str.strip) | st.sampled_from(HOSTILE)


def hostile(test):
    for text in HOSTILE:
        test = example(text, text)(test)
    return test


def check(card, headings):
    """Read back it says the same, the Hub would take it, and its sections are its own."""
    read = ModelCard(card.content)
    assert ModelCard(str(read)).data.to_dict() == read.data.to_dict()
    check_card(card.content)
    assert re.findall(r"^#+ .*", read.text, re.MULTILINE)[1:] == headings
    assert not re.search(r"(?<!\\)<script|(?<!\\)\]\(javascript", read.text)
    return read


@hostile
@settings(max_examples=40, deadline=None)
@given(TEXT, TEXT)
def test_of_an_unlearned_model(one, two):
    provenance = replace(PROVENANCE, forgotten=one, method_title=two, hyperparameters={"note": one}, hardware=two)
    figure = Figure(metric="accuracy", name=two, before=1, after=2, target=1)
    given = {"failed_checks": [one], "limitations": [two], "tags": [one], "dataset_name": two}
    card = unlearning_card(provenance, model_name=one, results=[figure], **given)
    names = ("Figures", "How it was made", "What was checked", "Audit", "Limitations", "Citation")
    read = check(card, [f"## {name}" for name in names])
    assert f"**{line(one)}**" in read.text
    said = read.data.eval_results[0]
    assert said.metric_name == said.dataset_name == " ".join(two.split())
    assert read.data.model_name == read.data.tags[-1] == " ".join(one.split())
    assert "@misc{arXiv:2403.00001, eprint={2403.00001}, archivePrefix={arXiv}, note={" in read.text


@hostile
@settings(max_examples=20, deadline=None)
@given(TEXT, TEXT)
def test_of_a_model_that_is_not_known(one, two):
    card = plain_card(one, "transformers", "pass", tags=[two])
    read = check(card, ["## How to use it", "## Audit", "## Limitations"])
    assert read.data.tags[-1] == " ".join(two.split())


@hostile
@settings(max_examples=20, deadline=None)
@given(TEXT, TEXT)
def test_of_a_filter(one, two):
    config = type(CONFIG)(**CONFIG.to_dict() | {"concepts": [CONFIG.concepts[0] | {"name": one, "description": two}]})
    text = filter_card(config, "me/filter", tags=[two])
    read = ModelCard(text)
    check_card(text)
    assert read.data.tags[-1] == " ".join(two.split())
    headings = re.findall(r"^## .*", read.text, re.MULTILINE)
    assert headings[0] == "## What it blocks"
    assert len(headings) == 6
    assert f"| {line(one)} | {line(two)} |" in read.text


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("license: MIT", "license: 'MIT' is not the Hub's id of a license"),
        ("license: [mit, a b]", "license: 'a b' is not"),
        ("license: other\nlicense_link: x", "license_name: missing"),
        ("language: English (US)", "language: 'English (US)' is not a code"),
        ("base_model: /home/me/model", "base_model: '/home/me/model' is not the id"),
        ("base_model_relation: child", "base_model_relation: 'child' is none of adapter"),
        ("datasets: 3", "datasets: 3 is not the id"),
        ("pipeline_tag: [a]", "pipeline_tag: ['a'] is not a task"),
        ("tags: [1]", "tags: 1 is not a text"),
        ("model-index: {}", "model-index: must be a list"),
        ("model-index: [{name: m, results: [{task: {type: a}, dataset: {name: b}}]}]", "has no dataset.type"),
        ("model-index: [{name: m, results: [{task: {type: a}, dataset: {name: b, type: c}, metrics: [{type: d}]}]}]", "no type or no value"),
        ("model-index: [{results: []}]", "a model has no name"),
        ("a: [", "its metadata are no YAML"),
        ("- a", "its metadata are a list"),
    ],
)  # fmt: skip
def test_what_the_hub_would_refuse(metadata, message):
    with pytest.raises(ValueError, match="^README.md: ") as error:
        check_card(f"---\n{metadata}\n---\n# Title\n")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    for fine in (
        "# Title",
        "---\n---\n",
        "---\nlicense: [mit, apache-2.0]\nlanguage: [en, zh-Hant]\n---\n",
        f"---\nx: {message!r}\n---\n",
    ):
        check_card(fine)
