import copy
import gc
import json
import weakref

import pytest
import torch
from datasets import Dataset
from planted_classifiers import FORGOTTEN, head_only, masked

from hf_unlearn.audit.classifiers.answers import ForgetAccuracy
from hf_unlearn.audit.classifiers.disturbed import Pruned, Quantised
from hf_unlearn.audit.digests import digest_of
from hf_unlearn.audit.report import AuditReport
from hf_unlearn.audit.run import audit


def audited(model, models, sets, references=5, **settings):
    """Beside the first original and so many retrained models."""
    return audit(model, models.originals[0], models.retrained[:references], **sets, progress=False, **settings)


@pytest.fixture(scope="module")
def report(models, sets):
    """Of the masked original, with every check."""
    return audited(masked(models.originals[0]), models, sets)


class TestPlantedCases:
    """Five references. Every margin that decides is several of its own away: of 8 networks none is mistaken for one of the others."""

    @pytest.mark.parametrize("which", [0, pytest.param(1, marks=pytest.mark.slow)])
    def test_the_original_is_not_forgotten(self, models, sets, which):
        found = audited(copy.deepcopy(models.originals[which]), models, sets)
        assert found.verdict.word == "not forgotten"
        assert found[found.verdict.decided_by].layer == "output"

    def test_a_mask_is_suppressed(self, report):
        assert report.verdict.word == "suppressed"
        assert report["forget_accuracy"].audited == 0.0
        assert report["refitted_head"].status == "beyond"
        assert report.residual.mu < -100  # no retrained model has such a loss

    def test_what_only_changed_the_head_is_suppressed(self, models, sets, rows):
        found = audited(head_only(models.originals[0], rows), models, sets)
        assert found["forget_accuracy"].audited == 0.0
        assert (found.verdict.word, found["refitted_head"].status) == ("suppressed", "beyond")

    @pytest.mark.parametrize("which", [5, *(pytest.param(which, marks=pytest.mark.slow) for which in (6, 7))])
    def test_one_more_retrained_model_is_forgotten(self, models, sets, which):
        found = audited(copy.deepcopy(models.retrained[which]), models, sets)
        assert found.verdict.word == "forgotten", str(found.verdict)

    def test_without_references_there_are_three_words(self, models, sets):
        same, hidden, gone = (
            audit(copy.deepcopy(one), models.originals[0], **sets, progress=False, checks="quick").verdict
            for one in (models.originals[0], masked(models.originals[0]), models.retrained[0])
        )
        assert same.word == "not forgotten"
        assert (hidden.word, gone.word) == ("undetermined", "undetermined")
        assert "retrained" in gone.needs[0]


class TestInvariances:
    def test_what_lies_below_is_the_same_under_a_mask(self, report):
        for name in ("refitted_head", "relearn_forget", "linear_probe"):
            assert report[name].audited == pytest.approx(report[name].original, abs=1e-9)

    def test_models_and_random_state_stay_as_they_were(self, models, sets):
        model, before = masked(models.originals[0]), torch.get_rng_state()
        model.train()
        digests = [digest_of(one) for one in (model, models.originals[0], *models.retrained)]
        audited(model, models, sets, 3)
        assert [digest_of(one) for one in (model, models.originals[0], *models.retrained)] == digests
        assert model.training
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_second_audit_reads_the_same(self, report, models, sets):
        again = audited(masked(models.originals[0]), models, sets)
        assert [one.readings.audited.value for one in again.results] == [
            one.readings.audited.value for one in report.results
        ]
        assert again.verdict == report.verdict


class TestSingleExamples:
    def test_forget_rows_of_classes_that_are_kept(self, rows, models, sets):
        """Nothing that asks for a class is asked, and the original itself passes for retrained: so nothing is said."""
        retain = sets["retain"]
        forget, retain = retain.select(range(40)), retain.select(range(40, len(retain)))
        found = audit(
            models.retrained[7],
            models.retrained[6],
            models.retrained[:5],
            forget,
            retain,
            sets["test"],
            progress=False,
        )
        assert found.forgotten == "40 examples"
        assert {"unseen_accuracy", "linear_probe", "refitted_head"} <= set(found.skipped)
        assert "not classes" in found.skipped["linear_probe"]
        assert found.verdict.word == "undetermined"
        assert found["quantised"].audited > 0.5
        assert found["quantised"].status == "within"

    def test_rows_learned_by_heart(self, by_heart):
        """Wrong labels, which nobody answers who was not taught them."""
        original, retrained = by_heart.originals[0], by_heart.retrained
        known, gone = (
            audit(copy.deepcopy(one), original, retrained[:8], **by_heart.sets, progress=False)
            for one in (original, retrained[8])
        )
        assert known.verdict.word == "not forgotten"
        assert known["quantised"].status == "beyond"
        assert known["membership_lira"].audited > max(known["membership_lira"].retrained) + 0.1
        assert gone.verdict.word == "forgotten", str(gone.verdict)


class TestResume:
    def test_a_stopped_audit_goes_on_where_it_was(self, tmp_path, models, sets, monkeypatch):
        read, calls = Quantised.read, []

        def stopped(self, *arguments):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return read(self, *arguments)

        model = masked(models.originals[0])
        whole = audited(model, models, sets, 3, checks="quick")
        monkeypatch.setattr(Quantised, "read", stopped)
        with pytest.raises(KeyboardInterrupt):
            audited(model, models, sets, 3, checks="quick", output_dir=tmp_path)
        assert not (tmp_path / "audit.json").exists()

        again = ForgetAccuracy.read

        def never(self, subject, *arguments):
            assert subject.role == "retrained", "was read before"
            return again(self, subject, *arguments)

        monkeypatch.setattr(ForgetAccuracy, "read", never)
        found = audited(model, models, sets, 3, checks="quick", output_dir=tmp_path)
        assert len(calls) == 2 + 4  # the first model was kept, four are left
        assert [one.readings.audited.value for one in found.results] == [
            one.readings.audited.value for one in whole.results
        ]
        assert found.verdict == whole.verdict

    def test_other_weights_rows_and_seeds_are_read_anew(self, tmp_path, models, sets, monkeypatch):
        read, calls = ForgetAccuracy.read, []
        monkeypatch.setattr(
            ForgetAccuracy,
            "read",
            lambda self, subject, *rest: calls.append(subject.name) or read(self, subject, *rest),
        )
        settings = {"checks": ["forget_accuracy"], "output_dir": tmp_path}
        audited(masked(models.originals[0]), models, sets, 3, **settings)
        assert len(calls) == 5
        audited(models.retrained[4], models, sets, 3, **settings)  # references are known
        assert len(calls) == 6
        audited(models.retrained[4], models, sets, 3, **settings, seed=1)
        assert len(calls) == 11
        audited(models.retrained[4], models, sets | {"forget": sets["forget"].select(range(50))}, 3, **settings)
        assert len(calls) == 16

    def test_what_is_kept_is_private(self, tmp_path, models, sets):
        audited(masked(models.originals[0]), models, sets, 3, checks=["forget_accuracy"], output_dir=tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"_private", "audit.json", "audit.html", "audit.png"}
        assert (tmp_path / "_private").stat().st_mode & 0o077 == 0


class TestMemory:
    def test_models_by_name_are_in_memory_one_at_a_time(self, tmp_path, sets, monkeypatch, capsys):
        """With the audited one, for the look that compares them; what is printed comes before anything is read."""
        from transformers import ResNetConfig, ResNetForImageClassification

        from hf_unlearn.audit import given

        folders = []
        for seed in range(5):
            torch.manual_seed(seed)
            config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=10)
            folders.append(str(tmp_path / str(seed)))
            ResNetForImageClassification(config).save_pretrained(folders[-1])
        load, alive, most, printed = given.load_model, [], [], []

        def watched(model, *rest):
            loaded = load(model, *rest)
            alive.append(weakref.ref(loaded[0]))
            gc.collect()
            most.append(sum(one() is not None for one in alive))
            return loaded

        read = ForgetAccuracy.read
        monkeypatch.setattr(given, "load_model", watched)
        monkeypatch.setattr(
            ForgetAccuracy, "read", lambda *arguments: printed.append(capsys.readouterr().out) or read(*arguments)
        )
        found = audit(folders[0], folders[1], folders[2:], **sets, checks=["forget_accuracy", "answer_distance"])
        assert most == [1, 2, 2, 2, 2, 1, 1, 1, 1]
        assert "2 checks of 5 models" in printed[0]
        assert found.models["retrained 3"] == folders[4]
        gc.collect()
        assert not any(one() is not None for one in alive)


class TestWhatDoesNotRun:
    def test_an_attack_that_raises_is_not_passed(self, models, sets, monkeypatch, caplog):
        def broken(*arguments):
            raise IndexError("list index out of range")

        monkeypatch.setattr(Pruned, "disturb", broken)
        found = audited(copy.deepcopy(models.retrained[6]), models, sets)
        assert found.failed == {"pruned": "list index out of range"}
        assert (found.verdict.word, found.verdict.decided_by) == ("undetermined", "pruned")
        assert "pruned did not run" in caplog.text

    def test_outputs_that_are_not_finite(self, models, sets):
        model = copy.deepcopy(models.originals[0])
        with torch.no_grad():
            model.head.weight[0, 0] = torch.nan
        with pytest.raises(ValueError, match="^model: gives outputs that are not finite"):
            audited(model, models, sets, 3)

    def test_fewer_than_20_examples_run_and_say_so(self, models, sets, caplog):
        found = audited(
            copy.deepcopy(models.retrained[6]), models, sets | {"forget": sets["forget"].select(range(12))}
        )
        assert found.verdict.word == "undetermined"
        assert "12 forget examples" in " ".join(found.verdict.needs)
        assert "12 rows" in caplog.text


class TestReport:
    def test_table(self, report):
        table = report.to_pandas().set_index("name")
        assert list(table.index) == [one.name for one in report.results]
        assert table.loc["forget_accuracy", "retrained_5"] == 0.0
        assert table.loc["refitted_head", "distance"] == pytest.approx(
            table.loc["refitted_head", "audited"]
            - table.loc["refitted_head", [f"retrained_{k}" for k in range(1, 6)]].mean()
        )

    def test_saved_and_loaded(self, report, tmp_path):
        file = report.save(tmp_path / "report.json")
        assert AuditReport.load(file) == AuditReport.from_dict(json.loads(json.dumps(report.to_dict())))
        with pytest.raises(ValueError, match="must end in .json"):
            report.save(tmp_path / "report.txt")

    def test_files_that_are_no_report(self, tmp_path):
        (tmp_path / "a.json").write_text('{"format": 99}')
        (tmp_path / "b.json").write_text('{"format": 1}')
        for name, message in (("a", "format=99"), ("b", "no audit report"), ("c", "is missing")):
            with pytest.raises(ValueError, match=message):
                AuditReport.load(tmp_path / f"{name}.json")

    def test_for_the_hub(self, report):
        from huggingface_hub import eval_result_entries_to_yaml

        results = {one.metric_type: one for one in report.to_eval_results(dataset_name="digits")}
        assert results["unseen_error"].metric_value == pytest.approx(100 * report["unseen_error"].audited)
        assert results["residual_mu"].metric_value == report.residual.mu
        entries = eval_result_entries_to_yaml(report.to_eval_entries("me/digits"))
        assert len(entries) == len(report.results)
        assert "suppressed" in entries[0]["notes"]

    def test_it_is_of_one_model(self, report, models):
        report.check_is_of(masked(models.originals[0]))
        with pytest.raises(ValueError, match="is of another model"):
            report.check_is_of(models.originals[0])


class TestRefused:
    def test_lines(self, models, sets, tiny_llama, tiny_ddpm, tmp_path):
        model, original = masked(models.originals[0]), models.originals[0]
        other = copy.deepcopy(original)
        other.config.id2label = {c: f"class {c}" for c in range(10)}
        fewer = copy.deepcopy(original)
        fewer.config.num_labels = 9
        overlapping = Dataset.from_dict(sets["test"].with_format(None).select(range(20)).to_dict()).with_format(
            "torch"
        )
        for change, message in (
            ({"original": model}, "original: is the audited model itself"),
            ({"original": other}, "original: calls class 0"),
            ({"retrained": [fewer]}, r"retrained\[0\]: has 9 classes"),
            (
                {"retrained": [models.retrained[0], copy.deepcopy(models.retrained[0])]},
                r"retrained\[1\]: has the weights of retrained 1",
            ),
            ({"original": tiny_llama}, "original: "),
            ({"model": tiny_ddpm}, "original: is a classifier, the audited model a generator"),
            ({"model": str(tmp_path / "none")}, "model"),
            ({"forget": None}, "forget: missing"),
            ({"test": sets["test"].select([])}, "test: is empty"),
            ({"test": sets["test"].remove_columns("label")}, "test: its rows have no label"),
            ({"forget": overlapping, "test": overlapping}, "test: 20 of its"),
            ({"checks": "all"}, "checks='all': must be 'standard', 'quick'"),
            ({"checks": ["accuracy"]}, "checks: 'accuracy' is none of forget_accuracy"),
            ({"checks": []}, "checks: is empty"),
            ({"checks": ["answer_distance"]}, "checks: none can be done"),
            ({"seed": -1}, "seed=-1"),
        ):
            arguments = {
                "model": model,
                "original": original,
                "retrained": models.retrained[:2],
                **sets,
                "progress": False,
            } | change
            with pytest.raises(ValueError, match=f"^{message}") as error:
                audit(**arguments)
            assert "\n" not in str(error.value)


def test_forgotten_class_is_found(report):
    assert report.forgotten == f"class {FORGOTTEN}"
    assert 80 < report.sizes["forget"] < 160
    assert report.models["audited"] == "audited"
