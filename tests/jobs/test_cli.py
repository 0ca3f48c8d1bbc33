"""`hf-unlearn`: exit codes, one-line errors, recipes, and the jobs they describe, run for real."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer
from transformers.trainer_callback import DefaultFlowCallback

from hf_unlearn import PBUConfig, __version__, cli, data
from hf_unlearn.examples.classifier import TRAINING, cached_digits_classifier, digits_processor, predict
from hf_unlearn.jobs import selecting, unlearn
from hf_unlearn.jobs.recipe.methods import INFLUENCE, UNLEARN, chosen, read
from hf_unlearn.jobs.recipe.reading import options


ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
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


METHODS = {"unlearn": UNLEARN, "influence": INFLUENCE}


def job_and_config(*arguments, verb="unlearn"):
    """What a verb builds of its arguments before it runs."""
    given = options(arguments)
    method = METHODS[verb][chosen(given, METHODS[verb])]
    values = read(method, given, help="")
    job = method.job_of(values)
    return job, method.runner(job, values).args[1] if method.config else job


class TestCommand:
    def test_version(self, capsys):
        assert cli.main(["--version"]) == 0
        assert capsys.readouterr().out == f"hf-unlearn {__version__}\n"

    def test_what_is_wrong_is_said_before_any_library_is_imported(self, recipe, classifier, work):
        path = recipe(learning_rat=1)
        wrong = [
            ["unlern"], ["unlearn"], ["unlearn", path], ["unlearn", "--method", "pbo"], ["filter", "fit"], ["demo", "--seed", "x"],
            *(["unlearn", "--method", name, "--forget_weight", "a"] for name, method in UNLEARN.items() if method.config),
            ["unlearn", "--method", "redirect", "--model", "m", "--concept", "cat"],
            *(["influence", "--method", method, "--model", "opinions"] for method in INFLUENCE),
            ["unlearn", "vdu_ddpm_digits", "--caution=-1"], ["unlearn", "pbu_digits", "--output_dir", classifier, "--model", classifier],
        ]  # fmt: skip
        code = "import sys; from hf_unlearn import cli; codes = [cli.main(words.split()) for words in sys.argv[1:]]; "
        code += "print(codes, sorted({'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)))"
        words = [" ".join(arguments) for arguments in [*wrong, ["unlearn", "--help"], ["list"]]]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment)
        assert done.stdout.splitlines()[-1] == f"{[2] * len(wrong) + [0, 0]} []"
        assert f"hf-unlearn: error: {path}: unknown key 'learning_rat'; did you mean 'learning_rate'?" in done.stderr
        assert len(done.stderr.splitlines()) == len(wrong)
        assert list(work.iterdir()) == []
        module = [sys.executable, "-m", "hf_unlearn.cli", "unlearn", path]
        assert subprocess.run(module, capture_output=True, env=environment).returncode == 2

    def test_an_error_is_one_line_or_with_debug_a_traceback(self, recipe, monkeypatch, capsys):
        assert cli._fail(ValueError("model: wrong\n  because"), 1) == 1
        assert capsys.readouterr().err == "hf-unlearn: error: model: wrong because\n"
        monkeypatch.setenv("HF_UNLEARN_DEBUG", "1")
        with pytest.raises(cli.UsageError, match="learning_rat"):
            cli.main(["unlearn", "--config", recipe(learning_rat=1)])
        with pytest.raises(cli.UsageError, match="no digit"):
            cli.main(["demo", "--forgotten", "12"])

    def test_other_verbs_report_their_errors(self, fails):
        assert fails("unlern") == "unknown verb 'unlern'; did you mean 'unlearn'?"
        assert fails("train") == "unknown verb 'train'; hf-unlearn --help lists them"
        assert fails("demo", "--forgotten", "12") == "forgotten: 12 is no digit; choose one of 0 to 9"
        assert fails("demo", "--forgoten", "3") == "unknown key 'forgoten'; did you mean 'forgotten'?"
        assert fails("demo", "--seed", "x") == "seed: 'x' is not allowed; expected int"


class TestReading:
    """What a recipe and a command line mean, before anything runs."""

    def test_words_mean_the_same_in_a_recipe_and_on_the_command_line(self, recipe):
        keys = {
            "learning_rate": "3e-4", "save_strategy": "no", "guard": "false", "max_steps": "-1", "report_to": "none",
            "isotropic_weight": "0", "forget_loss": "uniform", "resume_from_checkpoint": "true",
        }  # fmt: skip
        base = Path(recipe()).read_text()
        words = [part for key, word in keys.items() for part in (f"--{key}", word)]
        given = job_and_config("--config", recipe(base), *words)[1]
        path = recipe(base + "".join(f"{key}: {word}\n" for key, word in keys.items()))
        for config in (given, job_and_config("--config", path)[1]):
            read = [getattr(config, key) for key in keys if key not in ("save_strategy", "report_to")]
            assert read == [3e-4, False, -1, 0.0, "uniform", "true"]
            assert config.save_strategy == "no"
            assert type(config.isotropic_weight) is float

    def test_command_line_wins(self, recipe):
        path = recipe(learning_rate=1e-3, forget_values=[3], guard=True, retain=True)
        job, config = job_and_config(
            "--config", path, "--learning-rate=0.5", "--forget_values", "4", "5", "--no_guard", "--retain", "false"
        )
        assert (config.learning_rate, config.guard) == (0.5, False)
        assert (job.forget_values, job.retain) == (["4", "5"], False)

    def test_null_is_a_value_where_it_is_allowed(self, recipe, fails):
        text = Path(recipe()).read_text()
        assert job_and_config("--config", recipe(text + "fisher_examples: null\n"))[1].fisher_examples is None
        message = fails("unlearn", "--config", recipe(text + "learning_rate: ~\n"))
        assert message.endswith("recipe.yaml: learning_rate: null is not allowed; expected float")

    def test_lists_and_mappings_where_a_field_takes_them(self, recipe):
        assert job_and_config("--config", recipe(forget_values=3))[0].forget_values == ["3"]
        values = {"lr_scheduler_kwargs": {"power": 2.0}, "report_to": ["tensorboard", "wandb"], "label_names": ["a"]}
        config = job_and_config("--config", recipe(lr_scheduler_type="polynomial", **values))[1]
        assert {key: getattr(config, key) for key in values} == values

    def test_paper_preset_gives_way_to_keys(self, recipe):
        paper = PBUConfig.paper("out")
        config = job_and_config("--config", recipe(preset="paper", guard=True, max_grad_norm=2.0))[1]
        assert (config.guard, config.max_grad_norm) == (True, 2.0)
        for key in ("forget_loss", "fisher_weight", "isotropic_weight", "bn", "learning_rate", "num_train_epochs"):
            assert getattr(config, key) == getattr(paper, key)
            assert key == "isotropic_weight" or getattr(paper, key) != getattr(PBUConfig("out"), key)

    @pytest.mark.parametrize(
        "path",
        sorted(set(RECIPES.glob("*.yaml")) - set(RECIPES.glob("filter_*")) - set(RECIPES.glob("audit_*"))),
        ids=lambda path: path.stem,
    )
    def test_every_recipe_parses(self, path):
        text = path.read_text()
        (verb,) = [verb for verb in METHODS if f"hf-unlearn {verb} --config recipes/{path.name}" in text]
        extra = ("--bf16", "false", "--use_cpu", "true") if "bf16: true" in text else ()
        job, config = job_and_config("--config", str(path), *extra, verb=verb)
        assert config.output_dir == f"outputs/{path.stem}"
        assert type(config).__name__ == (METHODS[verb][job.method].config or type(job).__name__)

    def test_accelerate_configs_are_valid(self):
        from accelerate.commands.config.config_args import load_config_from_file

        paths = sorted((RECIPES / "accelerate").glob("*.yaml"))
        assert [path.stem for path in paths] == ["ddp_cpu", "ddp_gpu", "fsdp2", "fsdp2_many_nodes"]
        processes = {"fsdp2": 8, "fsdp2_many_nodes": 16}
        for path in paths:
            config = load_config_from_file(str(path))
            assert (config.num_processes, config.use_cpu) == (processes.get(path.stem, 2), path.stem == "ddp_cpu")


UNSAID = {"forget_column": None, "forget_values": None}


class TestBadRecipes:
    """Exit code 2, one line that names the key and the fix, nothing written."""

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("- a\n- b\n", "is a list, not a mapping of keys to values; a recipe has lines like 'method: pbu'"),
            ("just words\n", "is a str, not a mapping of keys to values"),
            ("", "is empty, not a mapping of keys to values"),
            ("a: [1\nb: 2\n", "is not YAML (line 2: "),
            ("method: pbu\nmethod: sft\n", "key 'method' occurs 2 times; keep one of them"),
        ],
    )
    def test_no_recipe(self, recipe, fails, text, message):
        path = recipe(text)
        assert fails("unlearn", "--config", path).startswith(f"{path}: {message}")

    def test_not_readable_or_over_the_original(self, recipe, fails, classifier, tmp_path):
        missing = str(tmp_path / "missing.yaml")
        assert fails("unlearn", "--config", missing) == (
            f"config: cannot read {missing!r} (No such file or directory); give the path of a recipe, or a name of hf-unlearn list"
        )
        path = recipe(model=classifier, output_dir=classifier)
        assert fails("unlearn", "--config", path) == (
            f"output_dir: {classifier!r} holds the original model; choose another folder"
        )

    @pytest.mark.parametrize(
        ("keys", "arguments", "message"),
        [
            ({"learning_rat": 1e-3}, "", "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
            ({"no_guard": True}, "", "unknown key 'no_guard'; did you mean 'guard'?"),
            ({"learning_rate": "fast"}, "", "learning_rate: 'fast' is not allowed; expected float"),
            ({"fisher_examples": 2.5}, "", "fisher_examples: '2.5' is not allowed; expected int"),
            ({"guard": "maybe"}, "", "guard: 'maybe' is not allowed; expected bool"),
            ({"bn": "thawed"}, "", "bn='thawed': must be one of frozen, train"),
            ({"loss_reduction": "mean"}, "", "loss_reduction='mean': must be one of example, token, sum; it is called 'example' now"),
            ({"learning_rate": [1, 2]}, "", "learning_rate: [1, 2] is not allowed; expected float"),
            ({"output_dir": {"a": 1}}, "", "output_dir: {'a': 1} is not allowed; expected str | None"),
            ({"forget_values": [[3]]}, "", "forget_values: [[3]] is nested; a list may hold plain values only"),
            ({}, "--learning_rat 1", "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
            ({}, "--learning-rat=1", "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
            ({}, "--learning 1", "unknown key 'learning'; did you mean "),  # no abbreviations
            ({}, "--learning_rate fast", "learning_rate: 'fast' is not allowed; expected float"),
            ({}, "--learning_rate", "learning_rate: has no value; write one behind it"),
            ({}, "stray", "unexpected argument 'stray'; keys are written --key value"),
            ({}, "--config", "config: has no value; write one behind it"),
            ({"method": None}, "", f"method: missing; set it to one of {', '.join(UNLEARN)}"),
            ({"method": "pbo"}, "", f"method: 'pbo' is not one of {', '.join(UNLEARN)}; did you mean 'pbu'?"),
            ({"model": None}, "", "model: missing; set it to 'digits', a folder, or an id on the Hub"),
            ({"dataset": None}, "", "dataset: missing; set it to 'digits', a folder, or an id on the Hub"),
            ({"output_dir": None}, "", "output_dir: missing; set it to the folder that gets the unlearned model"),
            ({"forget_column": None}, "", "forget_column: missing; name the column that holds forget_values"),
            ({"forget_values": None}, "", "forget_values: missing; list the values of forget_column to forget"),
            (UNSAID, "", "forget_column: missing; say what to forget by "),
            ({"forget_ids": [1]}, "", "forget_ids: given beside forget_column; keep one of them"),
            (UNSAID | {"forget_ids": [1]}, "", "forget: missing; say 'examples'"),
            ({"forget_dataset": "x"}, "", "forget_dataset: given beside forget_column; keep one of them"),
            ({"method": "unlearn", "preset": "paper"}, "", "preset: method 'unlearn' has none, only pbu, vdu and adapt_then_unlearn do"),
            ({"forget_accuracy": 2}, "", "forget_accuracy=2.0: must be in [0, 1)"),
            ({"push_to_hub": True, "hub_strategy": "every_save"}, "", "hub_strategy='every_save': uploads half-finished"),
            (UNSAID | {"dataset": None, "forget_dataset": "x", "retain": True}, "",
             "dataset: missing, which retain needs; set it to 'digits', a folder, or an id on the Hub"),
        ],
        ids=lambda value: ",".join(value) if isinstance(value, dict) else value[:15],
    )  # fmt: skip
    def test_key_or_value(self, recipe, fails, keys, arguments, message):
        path = recipe(**keys)
        line = fails("unlearn", "--config", path, *arguments.split())
        assert line.removeprefix(f"{path}: ").startswith(message)


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
            (UNSAID | {"forget_ids": [1147, 99999], "forget": "class"},
             "forget_ids: 99999 is not in column 'id' (1 unknown in all)"),
            (UNSAID | {"forget_ids": ["a"], "forget": "class"},
             "forget_ids: 'a' does not occur in column 'id'; expected a value of type int64"),
            (UNSAID | {"forget_ids": [1], "forget": "class", "id_column": "row"},
             "id_column: 'row' is not in the dataset (it has id, image, label)"),
            (UNSAID | {"forget_dataset": "nowhere"}, "forget_dataset='nowhere': neither a folder here nor a dataset that the Hub gives ("),
            ({"model": "nowhere/nothing"}, "model='nowhere/nothing': neither a folder with a model nor an id on the Hub ("),
        ],
    )  # fmt: skip
    def test_data(self, recipe, fails, keys, message):
        assert fails("unlearn", "--config", recipe(**keys), code=1).startswith(message)

    def test_class_name_that_is_another_class_number(self):
        rows = Dataset.from_dict({"label": [0, 1]}, features=Features({"label": ClassLabel(names=["1", "0"])}))
        with pytest.raises(ValueError, match="forget_values: '0' is the name of class 1, and class 0 is '1'"):
            selecting._as_in_column(rows, "label", "0", "forget_values")

    def test_without_ids_it_is_not_known_what_to_retain(self, recipe, fails, tmp_path, digits):
        digits["train"].select(range(5)).remove_columns("id").save_to_disk(tmp_path / "forget")
        path = recipe(**UNSAID, forget_dataset=str(tmp_path / "forget"), retain=True)
        assert fails("unlearn", "--config", path, code=1).startswith("retain: forget_dataset has no column 'id'")

    def test_launched_processes_that_do_not_see_each_other(self, recipe, fails, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        line = fails("unlearn", "--config", recipe(), code=1)
        assert line == "use_cpu: 2 processes were launched, but there is no GPU; set use_cpu=True"


class TestSelection:
    """Each way to say what to forget selects exactly the rows that `hf_unlearn.data` selects."""

    @staticmethod
    def parts(recipe, **keys):
        job, config = job_and_config("--config", recipe(**keys))
        return selecting.select(job, config.id_column)

    def test_values(self, recipe, digits):
        parts = self.parts(recipe, forget_values=[3, "8"], retain=True, eval_split="test", heldout_split="validation")
        forget, rest = data.split_by_values(digits["train"], "label", [3, 8])
        assert parts.forget["id"][:] == forget["id"][:]
        assert parts.retain["id"][:] == rest["id"][:]
        assert parts.heldout["id"][:] == digits["validation"]["id"][:]
        forget, rest = data.split_by_values(digits["test"], "label", [3, 8])
        assert set(parts.evaluation) == {"forget", "retain"}
        assert parts.evaluation["forget"]["id"][:] == forget["id"][:]
        assert parts.evaluation["retain"]["id"][:] == rest["id"][:]

    def test_values_are_read_as_the_column_holds_them_and_nothing_is_handed_over_unasked(self, recipe, tmp_path):
        columns = {"number": [7, 8, 7], "name": ["7", "x", "7"], "yes": [True, False, True], "weight": [0.5, 1.0, 0.5]}
        Dataset.from_dict(columns | {"row": [0, 1, 2]}).save_to_disk(tmp_path / "saved")
        for column, word in (("number", "7"), ("name", "7"), ("yes", "true"), ("weight", "0.50")):
            parts = self.parts(recipe, dataset=str(tmp_path / "saved"), forget_column=column, forget_values=[word])
            assert parts.forget["row"][:] == [0, 2]
            assert (parts.retain, parts.heldout, parts.evaluation) == (None, None, {})

    def test_ids(self, recipe, digits):
        ids = [1548, 1147, 443]
        parts = self.parts(recipe, **UNSAID, forget_ids=ids, forget="class", retain=True, eval_split="train")
        forget, rest = data.split_by_ids(digits["train"], ids)
        assert parts.forget["id"][:] == forget["id"][:]
        assert parts.retain["id"][:] == parts.evaluation["retain"]["id"][:] == rest["id"][:]
        assert parts.evaluation["forget"]["id"][:] == forget["id"][:]

    @pytest.mark.parametrize("several", [False, True])
    def test_saved_dataset(self, recipe, digits, tmp_path, several):
        forget, rest = data.split_by_ids(digits["train"], [1548, 1147, 443])
        saved = DatasetDict({"train": forget, "other": rest}) if several else forget
        saved.save_to_disk(tmp_path / "forget")
        keys = UNSAID | {"forget_dataset": str(tmp_path / "forget")}
        assert self.parts(recipe, **keys, dataset=None).forget["id"][:] == forget["id"][:]
        assert self.parts(recipe, **keys, retain=True).retain["id"][:] == rest["id"][:]


class TestRunning:
    @pytest.mark.slow
    def test_digits_recipe_end_to_end(self, capsys, work, digits, monkeypatch):
        monkeypatch.setitem(TRAINING, "num_train_epochs", 6)
        assert cli.main(["unlearn", "--config", str(DIGITS), "--num_train_epochs", "6", *QUICK]) == 0
        shown, out = capsys.readouterr().out, work / "outputs" / "pbu_digits"
        models = [AutoModelForImageClassification.from_pretrained(f) for f in (cached_digits_classifier(), out)]
        processor = AutoImageProcessor.from_pretrained(out)
        forget, retain = data.split_by_values(digits["test"], "label", [3])
        accuracy = {
            part: [100 * (predict(m, processor, rows).argmax(-1) == rows["label"][:]).mean() for m in models]
            for part, rows in (("forgotten class", forget), ("other classes", retain))
        }
        assert accuracy["forgotten class"][0] > 90
        assert accuracy["forgotten class"][1] < 20
        assert accuracy["other classes"][1] > 95
        # The table, the card and its metadata say what the saved model does.
        card = ModelCard.load(out / "README.md")
        results = {result.metric_name: result for result in card.data.eval_results}
        for part, (before, after) in accuracy.items():
            for text in (shown, card.text):
                wanted = (part, f"{before:.2f} %", f"{after:.2f} %")
                assert any(all(word in line for word in wanted) for line in text.splitlines()), text
            result = results[f"Accuracy on the {part}"]
            assert result.metric_value == pytest.approx(after)
            assert (result.dataset_name, result.dataset_split) == ("digits", "test")
        assert f"{digits['train']['label'][:].count(3)} forget examples" in shown
        # What is printed to load it does load it.
        loaded = {}
        exec("\n".join(line.strip() for line in shown.split("Load it:")[1].splitlines()), loaded)
        assert all(
            torch.equal(a, b) for a, b in zip(loaded["model"].parameters(), models[1].parameters(), strict=True)
        )
        # The card in `model_cards/` is what this recipe produces.
        checked_in = (ROOT / "model_cards" / "pbu_digits.md").read_text()
        assert normalised((out / "README.md").read_text()) == normalised(checked_in)

    def test_evaluation_does_not_steer_training(self, classifier, recipe, monkeypatch, tmp_path):
        trainers = []
        monkeypatch.setattr(unlearn, "tell", lambda trainer, *_, **__: trainers.append(trainer))
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

    def test_stopping_and_resuming(self, classifier, recipe, tmp_path, monkeypatch, capsys):
        def run(name, *arguments):
            keys = {
                "model": classifier, "output_dir": str(tmp_path / name), "max_steps": 4, "save_strategy": "steps",
                "save_steps": 2, "logging_strategy": "no", "guard": False,
            }  # fmt: skip
            return cli.main(["unlearn", "--config", recipe(**keys), *QUICK, *arguments])

        flow = DefaultFlowCallback.on_step_end

        def stop_at(step):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == step:
                    raise KeyboardInterrupt  # Ctrl-C
                return flow(self, args, state, control, **kwargs)

            return on_step_end

        def stopped(*_):
            raise KeyboardInterrupt

        assert run("whole") == 0
        with monkeypatch.context() as patch:
            patch.setattr(unlearn, "select", stopped)
            capsys.readouterr()
            assert run("parts") == 130
        assert capsys.readouterr() == ("", "hf-unlearn: stopped; the same command begins anew\n")
        for step, how in (
            (1, "no checkpoint was saved, so the same command begins anew; save_strategy and save_steps save some"),
            (3, "go on from step 2 with the same command and --resume_from_checkpoint true"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(DefaultFlowCallback, "on_step_end", stop_at(step))
                capsys.readouterr()
                assert run("parts") == 130
            out, err = capsys.readouterr()
            assert err.splitlines()[-1] == f"hf-unlearn: stopped at step {step}; {how}"
            assert "Traceback" not in out + err
        assert not (tmp_path / "parts/model.safetensors").exists()
        marker = tmp_path / "parts/checkpoint-2/run.json"
        written = marker.stat().st_mtime_ns
        assert run("parts", "--resume_from_checkpoint", "true") == 0
        assert marker.stat().st_mtime_ns == written  # a run from the start would have written it again
        whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
        for key in whole:  # rounding of a step of some 1e-4
            torch.testing.assert_close(parts[key], whole[key], rtol=1e-4, atol=1e-6)
        assert '"global_step": 4' in (tmp_path / "parts/checkpoint-4/trainer_state.json").read_text()

    def test_failures_that_only_running_shows(self, classifier, recipe, tmp_path, capsys):
        for keys, message in (
            ({"resume_from_checkpoint": True}, "resume_from_checkpoint: no complete checkpoint in "),
            (
                {"learning_rate": 1e38, "replay_weight": 0, "forget_loss": "ascent"},
                "loss or gradient is not finite at step ",
            ),
        ):
            path = recipe(model=classifier, output_dir=str(tmp_path / "out"), num_train_epochs=20, **keys)
            assert cli.main(["unlearn", "--config", path, *QUICK]) == 1
            assert capsys.readouterr().err.splitlines()[-1].startswith("hf-unlearn: error: " + message)
            assert not (tmp_path / "out/model.safetensors").exists()

    @pytest.fixture
    def llama(self, tiny_llama, tokenizer, tmp_path):
        tiny_llama.save_pretrained(tmp_path / "llama")
        tokenizer.save_pretrained(tmp_path / "llama")
        return tmp_path / "llama"

    @pytest.mark.parametrize("name", ["npo_sft", "llama_lora_redirect"])
    def test_recipes_with_a_tiny_llama(self, name, llama, tiny_llama, tokenizer, tmp_path, capsys):
        prompt = [[{"role": "user", "content": f"Where is order {i}?"}] for i in range(8)]
        completion = [[{"role": "assistant", "content": f"It never arrived, and {i} is lost."}] for i in range(8)]
        Dataset.from_dict({"prompt": prompt, "completion": completion}).save_to_disk(tmp_path / "instructions")
        out = tmp_path / "out"
        arguments = ["--model", llama, "--forget_dataset", tmp_path / "instructions", "--output_dir", out]
        if name == "llama_lora_redirect":  # what knows nothing is left alone
            learnt = tokenizer.apply_chat_template(
                [asked + said for asked, said in zip(prompt, completion, strict=True)], return_dict=True,
                return_tensors="pt", padding=True,
            )  # fmt: skip
            optimizer = torch.optim.AdamW(tiny_llama.parameters(), lr=1e-2)
            for _ in range(60):
                tiny_llama(**learnt, labels=learnt["input_ids"]).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            tiny_llama.save_pretrained(llama)
            arguments += ["--own_samples", 8, "--model_init_kwargs", '{"dtype": "float32"}']
        quick = ("--max_steps", "2", "--max_length", "64", "--bf16", "false", *QUICK)
        assert cli.main(["unlearn", "--config", str(RECIPES / f"{name}.yaml"), *map(str, arguments), *quick]) == 0
        model = AutoModelForCausalLM.from_pretrained(out)
        AutoTokenizer.from_pretrained(out)
        assert any(not p.equal(tiny_llama.get_parameter(name)) for name, p in model.named_parameters())
        assert "AutoModelForCausalLM.from_pretrained" in capsys.readouterr().out

    def test_language_models_are_measured_by_their_loss(self, llama, recipe, tmp_path, capsys):
        rows = Dataset.from_list([{"text": f"Sentence {i} of the source.", "source": "ab"[i % 2]} for i in range(8)])
        DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "texts")
        path = recipe(
            method="sft", model=str(llama), dataset=str(tmp_path / "texts"), eval_split="test", forget_column="source",
            forget_values="a", output_dir=str(tmp_path / "out"), max_steps=2, bf16=False, own_samples=20,
        )  # fmt: skip
        assert cli.main(["unlearn", "--config", path, *QUICK]) == 0
        shown = capsys.readouterr().out
        for part in ("forgotten", "other"):
            (line,) = [line for line in shown.splitlines() if f"Loss on the {part} examples" in line]
            before, after = map(float, re.findall(r"([\d.]+) nats", line))
            assert 0 < before < 10
            assert abs(after - before) < 1
        card = (tmp_path / "out/README.md").read_text()
        assert not any(str(tmp_path / name) in card for name in ("llama", "texts"))

    @pytest.mark.slow
    def test_two_processes(self, tmp_path):
        out = tmp_path / "out"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
        command += [str(RECIPES / "accelerate/ddp_cpu.yaml"), "-m", "hf_unlearn.cli", "unlearn", "--config"]
        command += [str(DIGITS), "--output_dir", str(out), *QUICK]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("109 forget examples") == 1  # one process reports
        assert (out / "model.safetensors").is_file()


def normalised(card: str) -> str:
    """Without what differs between machines and days: figures, digests, dates, versions; and without the epochs."""
    card = re.sub(r"(?m)^(    - type: \w+)\n      value: .*$", r"\1\n      value: #", card)
    card = re.sub(r"\d+\.\d+ (%|nats)", r"# \1", card)
    card = re.sub(r"`[0-9a-f]{64}`", "`#`", card)
    return re.sub(
        r"(?m)^\| (made on|hardware|versions|optimiser steps|`num_train_epochs`) \| .*$", r"| \1 | # |", card
    )
