"""Words as values, and recipes that are not what they seem."""

import pytest

from hf_unlearn.jobs.recipe.methods import DEMO, FILTER, UNLEARN, read
from hf_unlearn.jobs.recipe.reading import UsageError, load_recipe, options, recipe_file, shipped_recipes


def values(*words, method=UNLEARN["pbu"]):
    return read(method, options(words), help="this")


def refusal(*words, method=UNLEARN["pbu"]):
    with pytest.raises(UsageError) as refused:
        values(*words, method=method)
    return str(refused.value)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        ("--guard", "guard", True),
        ("--guard no", "guard", False),
        ("--no_guard", "guard", False),
        ("--no-guard", "guard", False),
        ("--learning-rate=3e-4", "learning_rate", 3e-4),
        ("--max_steps -1", "max_steps", -1),
        ("--fisher_examples null", "fisher_examples", None),
        ("--forget_values 3 null 8", "forget_values", ["3", "null", "8"]),
        ("--save_strategy no", "save_strategy", "no"),
        ("--report_to none", "report_to", "none"),
        ("--report_to a b", "report_to", ["a", "b"]),
        ('--lr_scheduler_kwargs {"power":2}', "lr_scheduler_kwargs", {"power": 2}),
        ("--seed 1 --seed 2", "seed", 2),
    ],
)
def test_words(words, key, value):
    assert values(*words.split()) == {key: value}


def test_kinds_in_a_list():
    assert values("--undesired", "3", "17", method=UNLEARN["adapt_then_unlearn"]) == {"undesired": [3, 17]}
    assert refusal("--undesired", "3", "x", method=UNLEARN["adapt_then_unlearn"]) == (
        "undesired: 'x' is not allowed; expected int"
    )


def test_a_list_as_recipes_have_it():
    for words in (("3", "8"), ("[3, 8]",), ("[3,", "8]")):
        assert values("--undesired", *words, method=UNLEARN["adapt_then_unlearn"]) == {"undesired": [3, 8]}
    assert values("--forget_values", "[3]") == {"forget_values": ["3"]}
    assert values("--forget_values", "[]") == {"forget_values": []}
    for broken in ("[3", "[[3]]", "[a: 1]", "[3]]"):  # are words
        assert values("--forget_values", broken) == {"forget_values": [broken]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dry_run", "unknown key 'dry_run'; this lists the keys"),
        ("--verbose", "unknown key 'verbose'; this lists the keys"),
        ("--no_learning_rate", "unknown key 'no_learning_rate'; did you mean 'learning_rate'?"),
        ("--replay_filter x", "unknown key 'replay_filter'; did you mean"),
        ("--guard yes no", "unexpected argument 'no'; keys are written --key value"),
        ("--forget_values", "forget_values: has no value; write one behind it"),
        ("--save_strategy nonsense", "save_strategy='nonsense': must be one of "),
        ("--lr_scheduler_type cosin", "lr_scheduler_type='cosin': must be one of "),
        ("--forget_accuracy nan", "forget_accuracy=nan: must be in [0, 1)"),
        ("--utility_tolerance inf", "utility_tolerance=inf: must be finite"),
    ],
)
def test_refusals(words, message):
    assert refusal(*words.split()).startswith(message)


def test_whatever_is_in_a_value_the_message_is_short(tmp_path):
    laughs = "a: &a [x, x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    path = tmp_path / "recipe.yaml"
    for text in (
        laughs,
        laughs + "lr_scheduler_kwargs: {a: *i}\n",
        "x" * 5000 + ": 1\n",
        "learning_rate: " + "9" * 5000 + "x\n",
        "bn: " + "y" * 5000,
        "forget_values: " + "[" * 50 + "]" * 50,
        "forget_values: " + "[" * 1000,
        "learning_rate: [" + "1, " * 300 + "]",
        "learning_rate: {" + "".join(f"k{i}: {i}, " for i in range(200)) + "}",
    ):
        path.write_text(text)
        assert len(refusal("--config", str(path)).removeprefix(f"{path}: ")) < 300
    assert len(refusal("--" + "k" * 5000)) < 200
    assert len(refusal("--config", "n" * 5000)) < 300
    path.write_text("a: &a [1]\nb: *a\n")
    with pytest.raises(UsageError, match=r"line 2: \*a stands for another value; write it out"):
        load_recipe(str(path))


def test_a_recipe_of_the_package_by_name_or_first_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_name = values("pbu_digits")
    assert (
        by_name == values("--config", "recipes/pbu_digits.yaml") == values("--config", str(recipe_file("pbu_digits")))
    )
    assert by_name["forget_values"] == ["3"]
    assert "pbu_digits" in shipped_recipes()
    assert refusal("pbu_digit").endswith("did you mean 'pbu_digits'?")
    (tmp_path / "pbu_digits").write_text("method: pbu\n")  # what is there wins over what came with the package
    assert values("pbu_digits") == {"method": "pbu"}
    assert refusal("stray", "--config", "x.yaml", "more") == "unexpected argument 'more'; keys are written --key value"


def test_keys_of_other_verbs_are_left_alone_in_a_recipe_only():
    others = list(FILTER.values())
    taken = read(FILTER["run"], options(["filter_digits_gan"]), others, help="this")
    assert "pipeline" in taken
    assert "marker" not in taken
    with pytest.raises(UsageError, match="unknown key 'marker'"):
        read(FILTER["run"], options(["--marker", "digits"]), others, help="this")
    with pytest.raises(UsageError, match="unknown key 'pipeline'"):
        read(DEMO, options(["filter_digits_gan"]), help="this")
