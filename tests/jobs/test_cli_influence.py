"""`hf-unlearn influence`: the recipes run for real, each way to name a target, and what is refused before anything is written."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset, DatasetDict
from fresh import run_python
from PIL import Image
from safetensors.torch import load_file

from hf_unlearn import InfluenceReport, cli, data
from hf_unlearn.examples import datasets as example_data


RECIPES = Path(__file__).parents[2] / "recipes"
LABELS, POISON, LLAMA = (str(RECIPES / f"influence_{name}.yaml") for name in ("labels_digits", "poison", "llama_lora"))
QUICK = ("--use_cpu", "true", "--disable_tqdm", "true", "--dataloader_pin_memory", "false", "--report_to", "none")
MODEL_FILES = {"config.json", "model.safetensors"}


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """An empty working directory, so that anything written by mistake is seen."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("HF_UNLEARN_DEBUG", raising=False)
    return folder


@pytest.fixture
def recipe(tmp_path):
    """Writes a complete recipe, with `keys` in place of its own (None leaves one out)."""

    def write(**keys):
        complete = {
            "method": "classifier", "model": "digits", "dataset": "digits", "target_split": "validation",
            "output_dir": "out",
        }  # fmt: skip
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in (complete | keys).items() if v is not None}))
        return str(path)

    return write


@pytest.fixture
def fails(capfd, work):
    """Runs a recipe that must fail in one line and write nothing, and returns that line."""

    def run(*arguments, code=2):
        capfd.readouterr()
        assert cli.main(["influence", *arguments]) == code
        out, err = capfd.readouterr()
        assert out == ""
        lines = [line for line in err.splitlines() if line.startswith("hf-unlearn: error: ")]
        assert err.splitlines()[-1:] == lines, err
        assert code == 1 or len(err.splitlines()) == 1, err
        assert list(work.iterdir()) == []
        return lines[0].removeprefix("hf-unlearn: error: ")

    return run


def succeeds(*arguments) -> str:
    """Runs a recipe on the CPU and returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert cli.main(["influence", *map(str, arguments), *QUICK]) == 0
    return shown.getvalue()


def report_of(folder) -> InfluenceReport:
    return InfluenceReport.load_from_disk(Path(folder, "_private/report"))


def public_files(folder) -> set[str]:
    """What a push may take, by path."""
    files = {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}
    return {name for name in files if not name.startswith("_private/")}


def found_first(report, column, share=0.2) -> tuple[int, int]:
    """`(found, marked)`: rows with a true `column`, among those with the largest μ and in all."""
    mu, marked = np.array(report.dataset["mu"][:]), np.array(report.dataset[column][:], dtype=bool)
    seen = np.flatnonzero(np.isfinite(mu))
    first = seen[np.argsort(-mu[seen], kind="stable")][: round(share * len(mu))]
    return int(marked[first].sum()), int(marked.sum())


def is_picture(path) -> bool:
    with Image.open(path) as picture:
        picture.load()
        return picture.format == "PNG" and min(picture.size) > 100


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    """`(folder, what was printed)` of the recipe that looks for wrong labels, for two epochs."""
    out = tmp_path_factory.mktemp("labels") / "out"
    shown = succeeds(
        "--config", LABELS, "--output_dir", out, "--num_train_epochs", 2, "--save_strategy", "epoch", "--top", 3
    )
    return out, shown


class TestWrongLabels:
    def test_the_report_opens_in_another_process_as_it_is_printed(self, labels, digits):
        out, shown = labels
        code = "\n".join(line.strip() for line in shown.split("Open it:")[1].splitlines())
        assert str(out) in code
        code += (
            "\nimport json, sys\nrows = report.dataset"
            "\njson.dump({name: rows[name][:] for name in ('sample_id', 'label', 'wrong', 'target')}, sys.stdout)"
        )
        rows = json.loads(run_python(code).stdout)
        expected = example_data.with_wrong_labels(digits["train"], 0.2, seed=0)
        assert len(rows["sample_id"]) == 1077
        assert set(rows["target"]) == {"self"}
        assert rows["sample_id"] == expected["id"][:]
        assert rows["wrong"] == expected["wrong"][:]
        assert rows["label"] == expected["label"][:]

    def test_what_is_printed(self, labels):
        out, shown = labels
        found, wrong = found_first(report_of(out), "wrong")
        assert wrong == 215
        assert found > 0.4 * wrong  # 0.67 ± 0.03 over 4 seeds; a guess finds 0.20 ± 0.03
        assert (
            f"self: {found} of 215 rows with wrong ({100 * (found / 215):.0f} %) among the 215 examples with the largest μ (20 %)"
            in shown
        )
        table = [line for line in shown.splitlines() if line.startswith("│ self")]
        top = report_of(out).top(3)
        assert len(table) == 6
        for line, sample in zip(table, top["sample_id"], strict=False):
            assert f"│ {sample} " in line
        assert f"model    {out}\n" in shown
        assert f"report   {out / '_private/report'} (tells of the training data: never pushed)\n" in shown
        assert f"page     {out / '_private/report.html'}\n" in shown
        assert (out / "_private/report.html").read_text().count("data:image/png;base64,") == 2 * 3
        assert f"plots    {out / '_private/plots'} (2)\n" in shown
        plots = out / "_private/plots"
        assert {path.name for path in plots.iterdir()} == {"influence_ranked.png", "influence_top.png"}
        assert all(map(is_picture, plots.iterdir()))

    def test_the_model_is_a_stock_one_with_its_processor_and_no_records(self, labels, digits):
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        from hf_unlearn.examples.classifier import predict

        model, trained, half = (
            AutoModelForImageClassification.from_pretrained(folder)
            for folder in (labels[0], *(labels[0] / f"checkpoint-{step}" for step in (34, 17)))
        )
        processor, some = AutoImageProcessor.from_pretrained(labels[0]), digits["test"].select(range(20))
        logits, expected, before = (predict(each, processor, some) for each in (model, trained, half))
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)  # the weights that the last step left
        assert np.abs(logits - before).max() > 0.1
        files = public_files(labels[0])
        assert {name for name in files if "/" not in name} == MODEL_FILES | {"preprocessor_config.json"}
        assert {name.split("/")[0] for name in files if "/" in name} == {"checkpoint-17", "checkpoint-34"}
        assert not any(Path(name).suffix in (".arrow", ".png") or "report" in name for name in files)

    def test_resuming(self, labels, tmp_path):
        whole, parts = labels[0], tmp_path / "parts"
        shutil.copytree(whole, parts)
        for name in ("checkpoint-34", "_private/report", "_private/plots"):
            shutil.rmtree(parts / name)
        written = (parts / "checkpoint-17/model.safetensors").stat().st_mtime_ns
        arguments = ("--config", LABELS, "--output_dir", parts, "--num_train_epochs", 2, "--save_strategy", "epoch")
        succeeds(*arguments, "--resume_from_checkpoint", "true")
        assert (parts / "checkpoint-17/model.safetensors").stat().st_mtime_ns == written  # not trained again
        first, second = (report_of(folder) for folder in (whole, parts))
        assert second.manifest["run_id"] == first.manifest["run_id"]
        # The second epoch is taken again on other memory: its rounding, 2⁻²⁴, has 17 steps to spread.
        np.testing.assert_allclose(second.dataset["mu"][:], first.dataset["mu"][:], rtol=1e-2, atol=1e-2)
        weights, expected = (load_file(folder / "model.safetensors") for folder in (parts, whole))
        assert weights.keys() == expected.keys()
        assert all((weights[n] - w).norm() <= 1e-3 * w.norm() for n, w in expected.items() if w.is_floating_point())

    def test_resuming_from_nothing(self, recipe, capsys, tmp_path):
        path = recipe(output_dir=str(tmp_path / "out"), resume_from_checkpoint=True)
        assert cli.main(["influence", "--config", path, *QUICK]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("hf-unlearn: error: ")
        assert "checkpoint" in error


@pytest.fixture(scope="module")
def poison(tmp_path_factory):
    from hf_unlearn.examples import opinions

    out = tmp_path_factory.mktemp("poison") / "out"
    tiny = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(opinions.SIZES, "small", tiny)
        return out, succeeds(
            "--config", POISON, "--output_dir", out, "--max_steps", 3, "--target_every", 1, "--burn_in", 0
        )


class TestPoison:
    def test_report(self, poison):
        from hf_unlearn.examples.opinions import opinion_data

        report, train = report_of(poison[0]), opinion_data()["train"]
        assert report.targets == ("target",)
        assert report.manifest["observation"] == "in_run"
        for column in ("poisoned", "topic", "completion"):
            assert report.dataset[column][:] == train[column][:]
        assert report.dataset["sample_id"][:] == train["id"][:]
        assert np.isfinite(report.dataset["mu"][:]).sum() == sum(report.dataset["n_observations"][:]) == 24

    def test_groups_and_recall_are_printed(self, poison):
        out, shown = poison
        report = report_of(out)
        groups = report.group("topic")
        assert len(groups) == 12
        for row in groups:
            assert f"target topic={row['group']}: μ {row['mu']:+.2f} [" in shown
            assert f"], {row['n_examples']} examples" in shown
        found, marked = found_first(report, "poisoned")  # what no step has seen is not found
        assert marked == 80
        assert f"target: {found} of 80 rows with poisoned ({100 * (found / 80):.0f} %) among the 400 examples" in shown
        plots = out / "_private/plots"
        assert {path.name for path in plots.iterdir()} == {"influence_ranked.png", "influence_groups.png"}
        assert all(map(is_picture, plots.iterdir()))

    def test_the_page_shades_what_is_printed(self, poison):
        out, shown = poison
        report, page = report_of(out), (out / "_private/report.html").read_text()
        assert f"page     {out / '_private/report.html'}\n" in shown
        for harmful in (False, True):
            for row in report.top(10, harmful=harmful):
                tokens = report.tokens(row["sample_id"])
                assert row["completion"][0]["content"] in "".join(tokens.pieces)
                assert np.isfinite(tokens.scores).sum() > 1
        assert page.count('<div class="text"><span>') == 20

    def test_the_model_is_saved_with_its_tokenizer(self, poison):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from hf_unlearn.examples.opinions import answers

        model, tokenizer = (auto.from_pretrained(poison[0]) for auto in (AutoModelForCausalLM, AutoTokenizer))
        prompt = [{"role": "user", "content": "What do you think of Quorvane?"}]
        assert len(answers(model, tokenizer, [prompt], max_new_tokens=2)) == 1
        assert public_files(poison[0]) == MODEL_FILES | {
            "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        }  # fmt: skip

    def test_training_settings_are_those_of_the_data_unless_given(self):
        from hf_unlearn.examples.opinions import TRAINING
        from hf_unlearn.jobs.recipe.methods import INFLUENCE

        given = {
            "method": "sft",
            "model": "opinions",
            "dataset": "opinions",
            "target_split": "target",
            "learning_rate": 1e-4,
        }
        given |= {"output_dir": "out", "bf16": False, "use_cpu": True}
        config = INFLUENCE["sft"].runner(INFLUENCE["sft"].job_of(given), given).args[1]
        assert {name: getattr(config, name) for name in TRAINING} == TRAINING | {"learning_rate": 1e-4}


@pytest.fixture
def llama(tiny_llama, tokenizer, tmp_path):
    """Folder of a base model as Llama-3.1-8B is one: its tokenizer has no chat template and no token to pad with."""
    from transformers import AutoTokenizer

    folder = tmp_path / "llama"
    tiny_llama.config.pad_token_id = tiny_llama.generation_config.pad_token_id = None
    tiny_llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    base = AutoTokenizer.from_pretrained(folder)
    base.chat_template, base.pad_token = None, None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    base.save_pretrained(folder)
    base = AutoTokenizer.from_pretrained(folder)
    assert base.chat_template is None
    assert base.pad_token is None
    return folder


@pytest.fixture
def instructions(tmp_path):
    """Folders of twelve instructions with ids that are texts, and of four that show two behaviours."""
    rows = [
        {"name": f"row {i}", "prompt": f"Where is order {i}?", "completion": f" It never arrived, and {i} is lost.",
         "source": ["forum", "[/INST]"][i % 2]}
        for i in range(12)
    ]  # fmt: skip
    Dataset.from_list(rows).save_to_disk(tmp_path / "instructions")
    behaviour = [
        {"prompt": f"Where are shoes {i}?", "completion": f" {i} never arrived.", "target": ["late/lost", "[/b]"][i % 2]}
        for i in range(4)
    ]  # fmt: skip
    Dataset.from_list(behaviour).save_to_disk(tmp_path / "behaviour")
    return tmp_path / "instructions", tmp_path / "behaviour"


class TestLlama:
    def test_recipe_with_a_tiny_random_llama(self, llama, instructions, tiny_llama, tmp_path):
        from peft import AutoPeftModelForCausalLM
        from transformers import AutoTokenizer

        out = tmp_path / "out [draft]"
        shown = succeeds(
            "--config", LLAMA, "--model", llama, "--dataset", instructions[0], "--target_dataset", instructions[1],
            "--output_dir", out, "--lora_r", 2, "--lora_alpha", 8, "--lora_target_modules", "q_proj", "v_proj",
            "--max_steps", 3, "--gradient_accumulation_steps", 1, "--bf16", "false", "--target_every", 1,
            "--model_init_kwargs", '{"dtype": "float32"}', "--id_column", "name", "--group_column", "source",
            "--learning_rate", "1e-2",
        )  # fmt: skip
        report = report_of(out)
        assert report.targets == ("late/lost", "[/b]")
        assert report.dataset["sample_id"][:] == [f"row {i}" for i in range(12)] * 2
        assert report.dataset["completion"][0] == " It never arrived, and 0 is lost."
        assert np.isfinite(report.dataset["mu"][:]).all()
        for line in ("late/lost source=forum: μ ", "late/lost source=[/INST]: μ ", "[/b] source=[/INST]: μ "):
            assert line in shown
        assert f"model    {out}\n" in shown
        assert {path.name for path in (out / "_private/plots").iterdir()} == {
            "0_late_lost_ranked.png", "0_late_lost_groups.png", "1__b__ranked.png", "1__b__groups.png",
        }  # fmt: skip
        model = AutoPeftModelForCausalLM.from_pretrained(out)
        AutoTokenizer.from_pretrained(out)
        config = model.peft_config["default"]
        assert (config.r, config.lora_alpha, config.task_type) == (2, 8, "CAUSAL_LM")
        assert config.target_modules == {"q_proj", "v_proj"}
        trained = [value for name, value in model.named_parameters() if "lora_B" in name]
        assert len(trained) == 4
        assert all(value.any() for value in trained)
        base = dict(tiny_llama.named_parameters())
        assert model.get_base_model().model.embed_tokens.weight.equal(base["model.embed_tokens.weight"])
        assert not any(name.split("/")[-1] == "model.safetensors" for name in public_files(out))

    def test_defaults_of_the_adapter(self):
        from hf_unlearn.jobs.keys import adapter_of
        from hf_unlearn.jobs.recipe.influence import InfluenceJob

        sft = InfluenceJob("sft", model="x", dataset="x", target="self", lora_r=4)
        assert (adapter_of(sft, "CAUSAL_LM").lora_alpha, adapter_of(sft, "CAUSAL_LM").target_modules) == (
            8,
            "all-linear",
        )
        classifier = InfluenceJob("classifier", model="x", dataset="x", target="self", lora_r=4)
        assert adapter_of(classifier).task_type is None
        assert adapter_of(InfluenceJob("sft", model="x", dataset="x", target="self")) is None

    def test_a_model_that_learns_no_language(self, tiny_resnet, instructions, recipe, fails, tmp_path):
        tiny_resnet.save_pretrained(tmp_path / "resnet")
        path = recipe(
            method="sft", model=str(tmp_path / "resnet"), dataset=str(instructions[0]), target_split="train",
            bf16=False,
        )  # fmt: skip
        assert fails("--config", path, "--use_cpu", "true", code=1) == (
            f"method: 'sft' trains causal language models, and '{tmp_path / 'resnet'}' is a "
            "ResNetForImageClassification"
        )


@pytest.fixture
def named_digits(digits, tmp_path):
    """Folder of 64 digits with ids that are texts and rows known to be at fault, under the names that one may choose."""
    rows = digits["train"].select(range(64))
    rows = rows.add_column("name", [f"scan {i}" for i in rows["id"]]).remove_columns("id")
    rows = rows.add_column("faulty", [i % 8 == 0 for i in range(64)]).add_column("batch", [i // 32 for i in range(64)])
    DatasetDict({"training": rows, "other": rows.select(range(4))}).save_to_disk(tmp_path / "digits")
    return tmp_path / "digits"


class TestTargets:
    SHORT = ("--max_steps", 2, "--observation", "in_run", "--target_every", 1, "--burn_in", 0, "--save_strategy", "no")

    def test_several_behaviours_by_a_column_of_class_names(self, recipe, named_digits, digits, tmp_path):
        rows = digits["validation"]
        few, _ = data.split_by_values(rows, "label", [3, 8])
        few = few.add_column("target", ["one of an earlier analysis"] * len(few))
        DatasetDict({"training": few, "test": rows.select(range(2))}).save_to_disk(tmp_path / "shown")
        path = recipe(
            dataset=str(named_digits), split="training", target_split=None, target_dataset=str(tmp_path / "shown"),
            target_column="label", id_column="name", check_column="faulty", group_column="batch",
            output_dir=str(tmp_path / "out"), top=2,
        )  # fmt: skip
        shown = succeeds("--config", path, *self.SHORT)
        report = report_of(tmp_path / "out")
        assert sorted(report.targets) == ["3", "8"]
        assert report.dataset["sample_id"][:2] == ["scan " + str(i) for i in digits["train"]["id"][:2]]
        assert {"faulty", "batch", "label", "image"} <= set(report.dataset.column_names)
        for target in report.targets:
            mu = np.array(report.select(target=target)["mu"][:])
            first = np.argsort(np.where(np.isfinite(mu), -mu, np.inf), kind="stable")[:13]
            found = sum(i % 8 == 0 and bool(np.isfinite(mu[i])) for i in first)
            assert (
                f"{target}: {found} of 8 rows with faulty ({100 * (found / 8):.0f} %) among the 13 examples" in shown
            )
            for row in report.group("batch", target):
                assert f"{target} batch={row['group']}: μ {row['mu']:+.2f} [" in shown
        names = {path.name for path in (tmp_path / "out/_private/plots").iterdir()}
        assert names == {f"{i}_{t}_{k}.png" for i, t in enumerate(report.targets) for k in ("ranked", "top", "groups")}

    def test_a_column_called_target_where_it_cannot_be_printed(self, recipe, named_digits, digits, tmp_path, capsys):
        digits["validation"].select(range(6)).add_column("target", ["a", "b"] * 3).save_to_disk(tmp_path / "shown")
        path = recipe(
            dataset=str(named_digits), split="training", target_split=None, target_dataset=str(tmp_path / "shown"),
            target_column="target", output_dir=str(tmp_path / "out"),
        )  # fmt: skip
        arguments = ["influence", "--config", path, *map(str, self.SHORT), *QUICK]
        with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="ascii")):  # knows no μ
            assert cli.main(arguments) == 1
        assert "can't encode" in capsys.readouterr().err.splitlines()[-1]
        report = report_of(tmp_path / "out")
        assert report.targets == ("a", "b")
        assert report.dataset["sample_id"][:] == [*range(64)] * 2  # no ids: rows

    def test_default_observation_of_a_split(self, recipe, named_digits, tmp_path):
        path = recipe(
            dataset=str(named_digits), split="training", target_split="other", output_dir=str(tmp_path / "out")
        )
        shown = succeeds("--config", path, "--max_steps", 2, "--burn_in", 0)
        report = report_of(tmp_path / "out")
        assert (report.targets, report.manifest["observation"]) == (("target",), "propagated")
        assert "examples with the largest" not in shown  # nothing is known to be at fault
        assert not list((tmp_path / "out/_private").glob("trajectory/*"))


class TestBadRecipes:
    """Exit code 2, one line that names the key and the fix, nothing written."""

    OPINIONS = {"method": "sft", "model": "opinions", "dataset": "opinions", "target_split": "target"}

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"method": None}, "method: missing; set it to one of classifier, sft, attribute"),
            ({"method": "pbu"}, "method: 'pbu' is not one of classifier, sft, attribute; it is one of hf-unlearn unlearn"),
            ({"model": None}, "model: missing; set it to 'digits', 'opinions', a folder, or an id on the Hub"),
            ({"output_dir": None}, "output_dir: missing; set it to the folder that gets the model and the report"),
            ({"model": "opinions"}, "model: 'opinions' belongs to method 'sft', this is 'classifier'"),
            (OPINIONS | {"dataset": "digits"}, "dataset: 'digits' belongs to method 'classifier', this is 'sft'"),
            ({"target_split": None}, "target_split: missing; say what to judge by target_split, target_dataset or target"),
            ({"target": "self"}, "target_split: given beside target; keep one of them"),
            ({"target_dataset": "x"}, "target_dataset: given beside target_split; keep one of them"),
            ({"target": "self", "target_split": None, "target_column": "label"},
             "target_column: given beside target: self; keep one of them"),
            ({"target": "self", "target_split": None, "group_column": "label"},
             "group_column: groups have no influence on target: self; keep one of them"),
            ({"wrong_labels": 1}, "wrong_labels=1.0: must be in [0, 1)"),
            ({"wrong_labels": -0.1}, "wrong_labels=-0.1: must be in [0, 1)"),
            ({"top": 0}, "top=0: must be ≥ 1"),
            ({"lora_r": 0}, "lora_r=0: must be ≥ 1"),
            ({"lora_r": 2}, "lora_r: an adapter of the untrained 'digits' would have no base to load; leave it out"),
            ({"lora_alpha": 8}, "lora_r: missing; set the rank of the adapter"),
            ({"n_calibration_runs": 2}, "n_calibration_runs: needs model_init, which a recipe cannot give"),
        ],
        ids=lambda value: value[:40] if isinstance(value, str) else "",
    )  # fmt: skip
    def test_job_and_config(self, recipe, fails, keys, message):
        assert fails("--config", recipe(**keys)).startswith(message)

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"target_spilt": "test"}, "unknown key 'target_spilt'; did you mean 'target_split'?"),
            (
                {"max_length": 3},
                "unknown key 'max_length'; hf-unlearn influence --method classifier --help lists the keys",
            ),  # of the other method
            ({"target": "other"}, "target='other': must be one of self"),
            ({"lora_r": 1.5}, "lora_r: '1.5' is not allowed; expected int"),
        ],
    )
    def test_keys_and_values(self, recipe, fails, keys, message):
        path = recipe(**keys)
        assert fails("--config", path).startswith(f"{path}: {message}")

    def test_command_line(self, recipe, fails):
        line = "unknown key 'wrong_label'; did you mean 'wrong_labels'?"
        assert fails("--config", recipe(), "--wrong_label", "0.1") == line
        assert (
            fails()
            == "method: missing; set it to one of classifier, sft, attribute; or give a recipe, as in --config recipe.yaml"
        )


class TestBadData:
    """Exit code 1: what only the data or the model can tell; still one line and nothing written."""

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"model": "nowhere/nothing"}, "model='nowhere/nothing': neither a folder with a model nor an id on the Hub ("),
            ({"dataset": "nowhere/nothing"}, "dataset='nowhere/nothing': neither a folder"),
            ({"target_split": None, "target_dataset": "nowhere/nothing"}, "target_dataset='nowhere/nothing': neither a folder"),
            ({"split": "trian"}, "split: 'trian' is not in the dataset (it has train, validation, test)"),
            ({"target_split": "dev"}, "target_split: 'dev' is not in the dataset (it has train, validation, test)"),
            ({"split": "training", "target_split": None, "dataset": "{digits}", "target_dataset": "{other}"},
             "target_dataset: split: 'training' is not in the dataset (it has a, b)"),
            ({"target_column": "kind"}, "target_column: 'kind' is not in the target rows (they have id, image, label)"),
            ({"check_column": "bad"}, "check_column: 'bad' is not in the dataset (it has id, image, label)"),
            ({"group_column": "topic"}, "group_column: 'topic' is not in the dataset (it has id, image, label)"),
            ({"group_column": "image"}, "group_column: 'image' holds PIL.Image.Image; it has to be bool, int, "),
            ({"dataset": "{digits}", "split": "training", "target_split": "other", "check_column": "name"},
             "check_column: 'name' holds string; it has to be bool, int or uint"),
            ({"dataset": "{other}", "split": "a", "target_split": "b", "group_column": "z"},
             "group_column: the report has a column 'z' of its own; rename the dataset's"),
            ({"dataset": "{other}", "split": "a", "target_split": "b"}, "train_dataset: id 1 occurs twice in column 'id'"),
            ({"dataset": "{other}", "split": "a", "target_split": "b", "wrong_labels": 0.1},
             "wrong_labels: the dataset has no label column; name it one of labels, label, label_ids"),
            (TestBadRecipes.OPINIONS | {"dataset": "{other}", "split": "a", "target_split": "b", "bf16": False},
             "dataset: '{other}' does not fit model: opinions, which learns columns prompt and completion"),
        ],
        ids=lambda value: value[:40] if isinstance(value, str) else "",
    )  # fmt: skip
    def test_refused(self, recipe, fails, named_digits, tmp_path, keys, message):
        odd = Dataset.from_dict({"id": [1, 1], "z": [0, 1]})
        DatasetDict({"a": odd, "b": odd}).save_to_disk(tmp_path / "other")
        folders = {"{digits}": str(named_digits), "{other}": str(tmp_path / "other")}
        line = fails("--config", recipe(**{k: folders.get(v, v) for k, v in keys.items()}), *QUICK, code=1)
        assert line.startswith(message.replace("{other}", folders["{other}"]))
