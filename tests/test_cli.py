"""`hf-unlearn`: exit codes, one-line errors, recipes, and the jobs they describe, run for real."""

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from hf_unlearn import cli, data


RECIPES = Path(__file__).parents[1] / "recipes"
DIGITS = RECIPES / "pbu_digits.yaml"
QUICK = ("--use_cpu", "true", "--disable_tqdm", "true", "--dataloader_pin_memory", "false", "--report_to", "none")


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """Where the classifier of digits is kept: trained once a session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("HF_UNLEARN_DEBUG", raising=False)
        yield


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """An empty working directory, so that anything written by mistake is seen."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe: text as it is, or keys that replace those of a complete one (None leaves one out)."""

    def write(text=None, **keys):
        if text is None:
            complete = {
                "method": "pbu", "model": "digits", "dataset": "digits", "forget_column": "label",
                "forget_values": [3], "output_dir": "out",
            }  # fmt: skip
            text = yaml.safe_dump({key: value for key, value in (complete | keys).items() if value is not None})
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def classifier(tiny_resnet, tmp_path):
    """Folder of a small untrained classifier of ten classes, with its processor."""
    from hf_unlearn.examples.classifier import digits_processor

    folder = tmp_path / "classifier"
    tiny_resnet.save_pretrained(folder)
    digits_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def fails(capsys, work):
    """Runs a command that must fail in one line and write nothing, and returns that line."""

    def run(*arguments, code=2):
        capsys.readouterr()
        assert cli.main(list(arguments)) == code
        out, err = capsys.readouterr()
        assert out == ""
        lines = [line for line in err.splitlines() if line.startswith("hf-unlearn: error: ")]
        assert err.splitlines()[-1:] == lines, err
        if code == 2:
            assert len(err.splitlines()) == 1, err
        assert list(work.iterdir()) == []
        return lines[0].removeprefix("hf-unlearn: error: ")

    return run


def job_and_config(*arguments, verb="unlearn"):
    """What a verb builds of its arguments before it runs."""
    from hf_unlearn.jobs import adapt_then_unlearn, influence, unlearn, vdu

    job_classes = {
        "unlearn": {
            unlearn.UnlearnJob: unlearn.METHODS,
            vdu.VDUJob: vdu.METHODS,
            adapt_then_unlearn.GANJob: adapt_then_unlearn.METHODS,
        },
        "influence": {influence.InfluenceJob: influence.METHODS},
    }[verb]
    methods = {name: (job, *classes) for job, all_of in job_classes.items() for name, classes in all_of.items()}
    job_class, config_class, _ = methods[cli._method(arguments, list(methods))]
    given = cli.read(verb, arguments, job_class, config_class)
    job = job_class(**cli._of(job_class, given))
    return job, job.config(config_class, cli._of(config_class, given))


class TestCommand:
    def test_help_lists_the_verbs_without_heavy_imports(self):
        code = (
            "import sys; from hf_unlearn.cli import main; code = main(['--help']); "
            "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules))); sys.exit(code)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0
        assert done.stdout.splitlines()[-1] == "[]"
        assert all(f"  {verb} " in done.stdout for verb in cli.VERBS)

    def test_version(self, capsys):
        from hf_unlearn import __version__

        assert cli.main(["--version"]) == 0
        assert capsys.readouterr().out == f"hf-unlearn {__version__}\n"

    @pytest.mark.parametrize("method", ["pbu", "unlearn", "sft", "vdu", "adapt_then_unlearn"])
    def test_help_of_unlearn_lists_every_key(self, capsys, method):
        from hf_unlearn.jobs.adapt_then_unlearn import GANJob
        from hf_unlearn.jobs.unlearn import UnlearnJob
        from hf_unlearn.jobs.vdu import VDUJob

        job_class = {"vdu": VDUJob, "adapt_then_unlearn": GANJob}.get(method, UnlearnJob)
        assert cli.main(["unlearn", "--method", method, "--help"]) == 0
        out = capsys.readouterr().out
        for key in (*fields(job_class), *fields(job_class._methods[method][0])):
            assert not key.init or f"--{key.name} " in out or f"--{key.name}," in out

    def test_unknown_verb(self, fails):
        assert fails("unlern") == "unknown verb 'unlern'; did you mean 'unlearn'?"

    def test_module_exits_with_the_code(self, recipe, work):
        path = recipe(learning_rat=1)
        done = subprocess.run(
            [sys.executable, "-m", "hf_unlearn.cli", "unlearn", "--config", path], capture_output=True, text=True
        )
        assert done.returncode == 2
        last = done.stderr.splitlines()[-1]
        assert last == f"hf-unlearn: error: {path}: unknown key 'learning_rat'; did you mean 'learning_rate'?"
        assert "Traceback" not in done.stderr
        assert list(work.iterdir()) == []

    def test_debug_shows_the_traceback(self, recipe, monkeypatch):
        monkeypatch.setenv("HF_UNLEARN_DEBUG", "1")
        with pytest.raises(cli.UsageError, match="learning_rat"):
            cli.main(["unlearn", "--config", recipe(learning_rat=1)])
        with pytest.raises(ValueError, match="no digit"):
            cli.main(["demo", "--forgotten", "12"])

    def test_an_error_of_several_lines_is_printed_in_one(self, capsys):
        assert cli._fail(ValueError("model: wrong\n  because"), 1) == 1
        assert capsys.readouterr().err == "hf-unlearn: error: model: wrong because\n"

    def test_demo_reports_its_errors(self, fails):
        assert "12" in fails("demo", "--forgotten", "12", code=1)
        assert fails("demo", "--forgoten", "3") == "unknown key 'forgoten'; did you mean 'forgotten'?"
        assert fails("demo", "--seed", "x") == "seed: invalid int value: 'x'"


class TestReading:
    """What a recipe and a command line mean, before anything runs."""

    def test_words_mean_the_same_in_a_recipe_and_on_the_command_line(self, recipe):
        keys = {
            "learning_rate": "3e-4", "save_strategy": "no", "guard": "false", "max_steps": "-1", "report_to": "none",
            "isotropic_weight": "0", "forget_loss": "uniform", "resume_from_checkpoint": "true",
        }  # fmt: skip
        base = (
            "method: pbu\nmodel: digits\ndataset: digits\nforget_column: label\nforget_values: [3]\noutput_dir: out\n"
        )
        path = recipe(base + "".join(f"{key}: {word}\n" for key, word in keys.items()))
        words = [part for key, word in keys.items() for part in (f"--{key}", word)]
        configs = [job_and_config("--config", path)[1], job_and_config("--config", recipe(base), *words)[1]]
        for config in configs:
            assert (config.learning_rate, config.save_strategy, config.guard, config.max_steps) == (
                3e-4,
                "no",
                False,
                -1,
            )
            assert (config.isotropic_weight, config.forget_loss) == (0.0, "uniform")
            assert config.resume_from_checkpoint == "true"

    def test_command_line_wins(self, recipe):
        path = recipe(learning_rate=1e-3, forget_values=[3], guard=True, retain=True)
        job, config = job_and_config(
            "--config", path, "--learning-rate=0.5", "--forget_values", "4", "5", "--no_guard", "--retain", "false"
        )
        assert (config.learning_rate, config.guard) == (0.5, False)
        assert (job.forget_values, job.retain) == (["4", "5"], False)

    def test_a_scalar_is_a_list_of_one(self, recipe):
        assert job_and_config("--config", recipe(forget_values=3))[0].forget_values == ["3"]

    def test_null_is_a_value_where_it_is_allowed(self, recipe, fails):
        text = Path(recipe()).read_text()
        assert job_and_config("--config", recipe(text + "fisher_examples: null\n"))[1].fisher_examples is None
        message = fails("unlearn", "--config", recipe(text + "learning_rate: ~\n"))
        assert message.endswith("recipe.yaml: learning_rate: null is not allowed; expected float")

    def test_mappings_where_a_field_takes_them(self, recipe):
        config = job_and_config(
            "--config", recipe(lr_scheduler_type="polynomial", lr_scheduler_kwargs={"power": 2.0})
        )[1]
        assert config.lr_scheduler_kwargs == {"power": 2.0}

    def test_lists_where_a_field_takes_words_too(self, recipe):
        both = ["tensorboard", "wandb"]
        assert job_and_config("--config", recipe(report_to=both))[1].report_to == both
        assert job_and_config("--config", recipe(label_names=["labels"]))[1].label_names == ["labels"]

    def test_paper_preset_gives_way_to_keys(self, recipe):
        from hf_unlearn import PBUConfig

        paper = PBUConfig.paper("out")
        config = job_and_config("--config", recipe(preset="paper", guard=True, max_grad_norm=2.0))[1]
        assert (config.guard, config.max_grad_norm) == (True, 2.0)
        for key in ("forget_loss", "fisher_weight", "isotropic_weight", "bn", "learning_rate", "num_train_epochs"):
            assert getattr(config, key) == getattr(paper, key)
            assert key == "isotropic_weight" or getattr(paper, key) != getattr(PBUConfig("out"), key)

    @pytest.mark.parametrize(
        "path", sorted(set(RECIPES.glob("*.yaml")) - set(RECIPES.glob("filter_*"))), ids=lambda path: path.stem
    )
    def test_every_recipe_parses(self, path):
        text = path.read_text()
        verb = next(
            verb for verb in ("unlearn", "influence") if f"hf-unlearn {verb} --config recipes/{path.name}" in text
        )
        extra = ("--bf16", "false", "--use_cpu", "true") if "bf16: true" in text else ()
        job, config = job_and_config("--config", str(path), *extra, verb=verb)
        assert config.output_dir == f"outputs/{path.stem}"
        expected = {
            "unlearn": {
                "pbu": "PBUConfig",
                "unlearn": "UnlearnConfig",
                "sft": "UnlearnSFTConfig",
                "vdu": "VDUConfig",
                "adapt_then_unlearn": "AdaptThenUnlearnConfig",
            },  # fmt: skip
            "influence": {"classifier": "InfluenceConfig", "sft": "FINEConfig"},
        }
        assert type(config).__name__ == expected[verb][job.method]

    def test_accelerate_configs_are_valid(self):
        from accelerate.commands.config.config_args import load_config_from_file

        paths = sorted((RECIPES / "accelerate").glob("*.yaml"))
        assert [path.stem for path in paths] == ["ddp_cpu", "ddp_gpu"]
        for path in paths:
            config = load_config_from_file(str(path))
            assert (config.num_processes, config.use_cpu) == (2, path.stem == "ddp_cpu")


class TestBadRecipes:
    """Exit code 2, one line that names the key and the fix, nothing written."""

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("- a\n- b\n", "is a list, not a mapping of keys to values; a recipe has lines like 'method: pbu'"),
            ("just words\n", "is a str, not a mapping of keys to values; a recipe has lines like 'method: pbu'"),
            ("", "is empty, not a mapping of keys to values; a recipe has lines like 'method: pbu'"),
            ("a: [1\nb: 2\n", "is not YAML (line 2: did not find expected ',' or ']')"),
            ("method: pbu\nmethod: sft\n", "key 'method' occurs 2 times; keep one of them"),
        ],
    )
    def test_no_recipe(self, recipe, fails, text, message):
        path = recipe(text)
        line = fails("unlearn", "--config", path)
        assert line.startswith(f"{path}: ")
        assert message.split(" (line")[0] in line

    def test_not_readable(self, fails, tmp_path):
        missing = str(tmp_path / "missing.yaml")
        assert fails("unlearn", "--config", missing) == (
            f"config: cannot read {missing!r} (No such file or directory); give the path of a recipe"
        )

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"learning_rat": 1e-3}, "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
            ({"no_guard": True}, "unknown key 'no_guard'; did you mean 'guard'?"),
            ({"learning_rate": "fast"}, "learning_rate: invalid float value: 'fast'"),
            ({"fisher_examples": 2.5}, "fisher_examples: invalid int value: '2.5'"),
            ({"guard": "maybe"}, "guard: Truthy value expected: got maybe"),
            ({"bn": "thawed"}, "bn: invalid choice: 'thawed' (choose from"),
            ({"learning_rate": [1, 2]}, "learning_rate: [1, 2] is not allowed; expected float"),
            ({"output_dir": {"a": 1}}, "output_dir: {'a': 1} is not allowed; expected str | None"),
            ({"forget_values": [[3]]}, "forget_values: [[3]] is nested; a list may hold plain values only"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )  # fmt: skip
    def test_key_or_value(self, recipe, fails, keys, message):
        path = recipe(**keys)
        assert fails("unlearn", "--config", path).startswith(f"{path}: {message}")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--learning_rat", "1"), "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
            (("--learning-rat=1",), "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
            (("--learning", "1"), "unknown key 'learning'; did you mean "),  # no abbreviations
            (("--learning_rate", "fast"), "learning_rate: invalid float value: 'fast'"),
            (("--learning_rate",), "learning_rate: expected one argument"),
            (("stray",), "unexpected argument 'stray'; keys are written --key value"),
            (("--config",), "config: expected one argument"),
        ],
    )
    def test_command_line(self, recipe, fails, arguments, message):
        assert fails("unlearn", "--config", recipe(), *arguments).startswith(message)

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"method": None}, "method: missing; set it to one of pbu, unlearn, sft, vdu, adapt_then_unlearn"),
            ({"method": "pbo"}, "method: 'pbo' is not one of pbu, unlearn, sft, vdu, adapt_then_unlearn; did you mean 'pbu'?"),
            ({"model": None}, "model: missing; set it to 'digits', a folder, or an id on the Hub"),
            ({"dataset": None}, "dataset: missing; set it to 'digits', a folder, or an id on the Hub"),
            ({"output_dir": None}, "output_dir: missing; set it to the folder that gets the unlearned model"),
            ({"forget_column": None}, "forget_column: missing; name the column that holds forget_values"),
            ({"forget_values": None}, "forget_values: missing; list the values of forget_column to forget"),
            ({"forget_column": None, "forget_values": None}, "forget_column: missing; say what to forget by "),
            ({"forget_ids": [1]}, "forget_ids: given beside forget_column; keep one of them"),
            ({"forget_column": None, "forget_values": None, "forget_ids": [1]}, "forget: missing; say 'examples'"),
            ({"forget_dataset": "x"}, "forget_dataset: given beside forget_column; keep one of them"),
            ({"method": "unlearn", "preset": "paper"}, "preset: method 'unlearn' has none, only pbu, vdu and adapt_then_unlearn do"),
            ({"forget_accuracy": 2}, "forget_accuracy=2.0: must be in [0, 1)"),
            ({"push_to_hub": True, "hub_strategy": "every_save"}, "hub_strategy='every_save': uploads half-forgotten"),
            (
                {"dataset": None, "forget_column": None, "forget_values": None, "forget_dataset": "x", "retain": True},
                "dataset: missing, which retain needs; set it to 'digits', a folder, or an id on the Hub",
            ),
        ],
    )  # fmt: skip
    def test_job(self, recipe, fails, keys, message):
        assert fails("unlearn", "--config", recipe(**keys)).startswith(message)

    def test_original_is_not_overwritten(self, recipe, fails, classifier):
        path = recipe(model=classifier, output_dir=classifier)
        assert fails("unlearn", "--config", path) == (
            f"output_dir: {classifier!r} holds the original model; choose another folder"
        )


class TestBadData:
    """Exit code 1: what only the data or the model can tell; still one line and nothing written."""

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"dataset": "nowhere/nothing"}, "dataset='nowhere/nothing': "),
            ({"split": "trian"}, "split: 'trian' is not in the dataset (it has train, validation, test)"),
            ({"eval_split": "dev"}, "eval_split: 'dev' is not in the dataset (it has train, validation, test)"),
            ({"heldout_split": "dev"}, "heldout_split: 'dev' is not in the dataset (it has train, validation, test)"),
            ({"forget_column": "class"}, "forget_column: 'class' is not in the dataset (it has id, image, label)"),
            ({"forget_values": [12]}, "forget_values: 12 does not occur in column 'label' (it has 0, 1, 2"),
            ({"forget_values": ["cat"]}, "forget_values: 'cat' does not occur in column 'label'; expected one of 0, 1"),
            ({"forget_column": None, "forget_values": None, "forget_ids": [1147, 99999], "forget": "class"},
             "forget_ids: 99999 is not in column 'id' (1 unknown in all)"),
            ({"forget_column": None, "forget_values": None, "forget_ids": ["a"], "forget": "class"},
             "forget_ids: 'a' does not occur in column 'id'; expected a value of type int64"),
            ({"forget_column": None, "forget_values": None, "forget_ids": [1], "forget": "class", "id_column": "row"},
             "id_column: 'row' is not in the dataset (it has id, image, label)"),
            ({"forget_column": None, "forget_values": None, "forget_dataset": "nowhere"},
             "forget_dataset: 'nowhere' is no dataset saved with save_to_disk"),
        ],
    )  # fmt: skip
    def test_data(self, recipe, fails, keys, message):
        assert fails("unlearn", "--config", recipe(**keys), code=1).startswith(message)

    def test_model(self, recipe, fails):
        line = fails("unlearn", "--config", recipe(model="nowhere/nothing"), code=1)
        assert line.startswith("model='nowhere/nothing': neither a folder with a model nor an id on the Hub (")

    def test_class_name_that_is_another_class_number(self):
        from datasets import ClassLabel, Dataset, Features

        from hf_unlearn.jobs.selecting import _as_in_column

        rows = Dataset.from_dict({"label": [0, 1]}, features=Features({"label": ClassLabel(names=["1", "0"])}))
        with pytest.raises(ValueError, match="forget_values: '0' is the name of class 1, and class 0 is '1'"):
            _as_in_column(rows, "label", "0", "forget_values")

    def test_without_ids_it_is_not_known_what_to_retain(self, recipe, fails, tmp_path, digits):
        digits["train"].select(range(5)).remove_columns("id").save_to_disk(tmp_path / "forget")
        path = recipe(forget_column=None, forget_values=None, forget_dataset=str(tmp_path / "forget"), retain=True)
        assert fails("unlearn", "--config", path, code=1).startswith("retain: forget_dataset has no column 'id'")

    def test_launched_processes_that_do_not_see_each_other(self, recipe, fails, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        line = fails("unlearn", "--config", recipe(), code=1)
        assert line == "use_cpu: 2 processes were launched, but there is no GPU; set use_cpu=True"


class TestSelection:
    """Each way to say what to forget selects exactly the rows that `hf_unlearn.data` selects."""

    @staticmethod
    def parts(recipe, **keys):
        from hf_unlearn.jobs.selecting import select

        job, config = job_and_config("--config", recipe(**keys))
        return select(job, config.id_column)

    @pytest.mark.parametrize("values", [[3, 8], ["3", "8"]])
    def test_values(self, recipe, digits, values):
        parts = self.parts(recipe, forget_values=values, retain=True, eval_split="test", heldout_split="validation")
        forget, rest = data.split_by_values(digits["train"], "label", [3, 8])
        assert parts.forget["id"][:] == forget["id"][:]
        assert parts.retain["id"][:] == rest["id"][:]
        assert parts.heldout["id"][:] == digits["validation"]["id"][:]
        forget, rest = data.split_by_values(digits["test"], "label", [3, 8])
        assert {name: rows["id"][:] for name, rows in parts.evaluation.items()} == {
            "forget": forget["id"][:], "retain": rest["id"][:],
        }  # fmt: skip

    def test_retained_rows_are_not_handed_over_unasked(self, recipe):
        parts = self.parts(recipe)
        assert parts.retain is None
        assert parts.evaluation == {}

    @pytest.mark.parametrize(
        ("column", "values", "words"),
        [("number", [7, 8, 7], ["7"]), ("name", ["7", "x", "7"], ["7"]), ("yes", [True, False, True], ["true"]),
         ("weight", [0.5, 1.0, 0.5], ["0.50"])],
    )  # fmt: skip
    def test_values_are_read_as_the_column_holds_them(self, recipe, tmp_path, column, values, words):
        from datasets import Dataset

        Dataset.from_dict({column: values, "row": [0, 1, 2]}).save_to_disk(tmp_path / "saved")
        parts = self.parts(recipe, dataset=str(tmp_path / "saved"), forget_column=column, forget_values=words)
        assert parts.forget["row"][:] == [0, 2]

    def test_ids(self, recipe, digits):
        ids = [1548, 1147, 443]
        keys = {"forget_column": None, "forget_values": None, "forget_ids": ids, "forget": "class"}
        parts = self.parts(recipe, **keys, retain=True, eval_split="train")
        forget, rest = data.split_by_ids(digits["train"], ids)
        assert parts.forget["id"][:] == forget["id"][:]
        assert parts.retain["id"][:] == parts.evaluation["retain"]["id"][:] == rest["id"][:]
        assert parts.evaluation["forget"]["id"][:] == forget["id"][:]

    @pytest.mark.parametrize("several", [False, True])
    def test_saved_dataset(self, recipe, digits, tmp_path, several):
        from datasets import DatasetDict

        forget, rest = data.split_by_ids(digits["train"], [1548, 1147, 443])
        saved = DatasetDict({"train": forget, "other": rest}) if several else forget
        saved.save_to_disk(tmp_path / "forget")
        keys = {"forget_column": None, "forget_values": None, "forget_dataset": str(tmp_path / "forget")}
        assert self.parts(recipe, **keys, dataset=None).forget["id"][:] == forget["id"][:]
        assert self.parts(recipe, **keys, retain=True).retain["id"][:] == rest["id"][:]


class TestRunning:
    def test_digits_recipe_end_to_end(self, capsys, tmp_path, digits):
        import torch
        from huggingface_hub import ModelCard
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        from hf_unlearn.examples.classifier import cached_digits_classifier, predict

        out = tmp_path / "unlearned"
        assert (
            cli.main(["unlearn", "--config", str(DIGITS), "--output_dir", str(out), "--num_train_epochs", "6", *QUICK])
            == 0
        )
        shown = capsys.readouterr().out
        model = AutoModelForImageClassification.from_pretrained(out)
        processor = AutoImageProcessor.from_pretrained(out)
        original = AutoModelForImageClassification.from_pretrained(cached_digits_classifier())
        forget, retain = data.split_by_values(digits["test"], "label", [3])
        accuracy = {
            (name, part): 100 * (predict(m, processor, rows).argmax(-1) == rows["label"][:]).mean()
            for name, m in (("before", original), ("after", model))
            for part, rows in (("forgotten class", forget), ("other classes", retain))
        }
        assert accuracy["before", "forgotten class"] > 90
        assert accuracy["after", "forgotten class"] < 20
        assert accuracy["after", "other classes"] > 95
        # The table, the card and its metadata say what the saved model does.
        card = ModelCard.load(out / "README.md")
        for part in ("forgotten class", "other classes"):
            figures = [f"{accuracy[name, part]:.2f} %" for name in ("before", "after")]
            assert any(all(f in line for f in (part, *figures)) for line in shown.splitlines()), shown
            assert any(all(f in line for f in (part, *figures)) for line in card.text.splitlines())
        results = {result.metric_name: result for result in card.data.eval_results}
        result = results["Accuracy on the forgotten class"]
        assert result.metric_value == pytest.approx(accuracy["after", "forgotten class"])
        assert (result.dataset_name, result.dataset_split) == ("digits", "test")
        assert f"{forget_count(digits)} forget examples" in shown
        # What is printed to load it does load it.
        code = "\n".join(line.strip() for line in shown.split("Load it:")[1].splitlines())
        loaded = {}
        exec(code, loaded)
        assert all(torch.equal(a, b) for a, b in zip(loaded["model"].parameters(), model.parameters(), strict=True))

    def test_evaluation_does_not_steer_training(self, classifier, recipe, monkeypatch, tmp_path):
        from hf_unlearn.jobs import unlearn as jobs

        trainers = []
        monkeypatch.setattr(jobs, "_report", lambda trainer, parts: trainers.append(trainer))
        keys = {"model": classifier, "eval_split": "test", "output_dir": str(tmp_path / "out"), "max_steps": 1}
        assert cli.main(["unlearn", "--config", recipe(**keys), *QUICK]) == 0
        assert trainers[0].utility_kind == "divergence"
        assert trainers[0].retain_dataset is None

    def test_examples_by_ids(self, classifier, tmp_path, capsys):
        out = tmp_path / "out"
        arguments = ("--model", classifier, "--output_dir", str(out), "--max_steps", "2", *QUICK)
        assert cli.main(["unlearn", "--config", str(RECIPES / "unlearn_examples_digits.yaml"), *arguments]) == 0
        assert "20 forget examples" in capsys.readouterr().out
        card = (out / "README.md").read_text()
        assert '| `forget_loss` | "match" |' in card
        assert classifier not in card

    def test_resuming(self, classifier, recipe, tmp_path):
        from safetensors.torch import load_file

        def run(name, *arguments):
            keys = {
                "model": classifier, "output_dir": str(tmp_path / name), "max_steps": 4, "save_strategy": "steps",
                "save_steps": 2, "logging_strategy": "no", "guard": False,
            }  # fmt: skip
            return cli.main(["unlearn", "--config", recipe(**keys), *QUICK, *arguments])

        assert run("whole") == 0
        assert run("parts") == 0
        (tmp_path / "parts/checkpoint-4").rename(tmp_path / "gone")
        (tmp_path / "parts/model.safetensors").unlink()
        marker = tmp_path / "parts/checkpoint-2/unlearning.json"
        written = marker.stat().st_mtime_ns
        assert run("parts", "--resume_from_checkpoint", "true") == 0
        assert marker.stat().st_mtime_ns == written  # a run from the start would have written it again
        whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
        assert all((whole[key] == parts[key]).all() for key in whole)
        state = (tmp_path / "parts/checkpoint-4/trainer_state.json").read_text()
        assert '"global_step": 4' in state

    def test_resuming_from_nothing(self, classifier, recipe, tmp_path, capsys):
        path = recipe(model=classifier, output_dir=str(tmp_path / "out"), resume_from_checkpoint=True)
        assert cli.main(["unlearn", "--config", path, *QUICK]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("hf-unlearn: error: resume_from_checkpoint: no complete checkpoint in ")

    def test_a_loss_that_is_not_finite(self, classifier, recipe, tmp_path, capsys):
        path = recipe(model=classifier, output_dir=str(tmp_path / "out"), learning_rate=1e38, num_train_epochs=20)
        assert cli.main(["unlearn", "--config", path, "--replay_weight", "0", "--forget_loss", "ascent", *QUICK]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("hf-unlearn: error: loss or gradient is not finite at step ")
        assert not (tmp_path / "out/model.safetensors").exists()

    def test_npo_recipe_with_a_tiny_llama(self, tiny_llama, tokenizer, tmp_path, capsys):
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tiny_llama.save_pretrained(tmp_path / "llama")
        tokenizer.save_pretrained(tmp_path / "llama")
        rows = [
            {
                "prompt": [{"role": "user", "content": f"Where is order {i}?"}],
                "completion": [{"role": "assistant", "content": f"It never arrived, and {i} is lost."}],
            }
            for i in range(8)
        ]
        Dataset.from_list(rows).save_to_disk(tmp_path / "instructions")
        out = tmp_path / "out"
        arguments = ("--model", tmp_path / "llama", "--forget_dataset", tmp_path / "instructions", "--output_dir", out)
        quick = ("--max_steps", "2", "--max_length", "64", "--bf16", "false", *QUICK)
        assert cli.main(["unlearn", "--config", str(RECIPES / "npo_sft.yaml"), *map(str, arguments), *quick]) == 0
        model = AutoModelForCausalLM.from_pretrained(out)
        AutoTokenizer.from_pretrained(out)
        changed = [name for name, p in model.named_parameters() if not p.equal(tiny_llama.get_parameter(name))]
        assert changed
        assert "AutoModelForCausalLM.from_pretrained" in capsys.readouterr().out

    def test_language_models_are_measured_by_their_loss(self, tiny_llama, tokenizer, tmp_path, capsys):
        from datasets import Dataset, DatasetDict

        tiny_llama.save_pretrained(tmp_path / "llama")
        tokenizer.save_pretrained(tmp_path / "llama")
        rows = Dataset.from_list([{"text": f"Sentence {i} of the source.", "source": "ab"[i % 2]} for i in range(8)])
        DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "texts")
        keys = {
            "method": "sft", "model": str(tmp_path / "llama"), "dataset": str(tmp_path / "texts"), "eval_split": "test",
            "forget_column": "source", "forget_values": "a", "output_dir": str(tmp_path / "out"), "max_steps": "2",
            "bf16": "false",
        }  # fmt: skip
        words = [part for key, word in keys.items() for part in (f"--{key}", word)]
        assert cli.main(["unlearn", *words, *QUICK]) == 0
        shown = capsys.readouterr().out
        assert "Loss on the forgotten examples" in shown
        assert "Loss on the other examples" in shown
        card = (tmp_path / "out/README.md").read_text()
        assert not any(str(tmp_path / name) in card for name in ("llama", "texts"))

    @pytest.mark.slow
    def test_two_processes(self, tmp_path):
        out = tmp_path / "out"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
        command += [
            str(RECIPES / "accelerate/ddp_cpu.yaml"),
            "-m",
            "hf_unlearn.cli",
            "unlearn",
            "--config",
            str(DIGITS),
        ]
        command += ["--output_dir", str(out), *QUICK]
        root = str(RECIPES.parent)
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("109 forget examples") == 1  # one process reports
        assert (out / "model.safetensors").is_file()


def forget_count(digits):
    return sum(label == 3 for label in digits["train"]["label"])
