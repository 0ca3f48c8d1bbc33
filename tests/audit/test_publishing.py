"""An audit on the card of the model that it is of, and of no other."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from hf_unlearn import AuditReport, UnlearnConfig, UnlearnTrainer, publish, verify_provenance
from hf_unlearn.audit import audit
from hf_unlearn.data import split_by_values
from hf_unlearn.examples.classifier import cached_digits_classifier
from hf_unlearn.examples.loopback_hub import LoopbackHub
from hf_unlearn.hub.record import digest_of_record


@pytest.fixture
def trainer(tmp_path, models, sets):
    model = copy.deepcopy(models.originals[0])
    args = UnlearnConfig(str(tmp_path / "out"), report_to="none", use_cpu=True, replay_weight=0.0)
    return UnlearnTrainer(model, args, forget_dataset=sets["forget"])


def quick(model, models, sets):
    return audit(model, models.originals[1], models.retrained[:3], **sets, checks="quick", progress=False)


def test_the_card_tells_verdict_and_figures(trainer, models, sets):
    report = quick(trainer.model, models, sets)
    trainer._audit = report
    card = trainer.model_card(trainer.args.output_dir)
    assert "The audit's verdict is **not forgotten**: Accuracy on" in card.text
    assert "No audit was run" not in card.text
    rows = {result.metric_type: result for result in card.data.eval_results}
    assert rows["forget_accuracy"].metric_value == pytest.approx(100 * report["forget_accuracy"].audited)
    assert "| Head refitted with 2 % of the forget data |" in card.text


def test_a_report_of_other_weights_is_refused_before_anything_is_sent(trainer, models, sets, tmp_path):
    report = quick(copy.deepcopy(models.retrained[4]), models, sets)
    with pytest.raises(ValueError, match="audit: is of another model"):
        trainer.push_to_hub(audit=report)
    assert not (tmp_path / "out" / "README.md").exists()


def test_a_folder_gets_the_audit_of_its_model(digits, tmp_path):
    """On its card, in `model-index` and in its provenance; checked against the weights in the folder. Twice is as once."""
    folder, (threes, others) = tmp_path / "out", split_by_values(digits["train"], "label", [3])
    shutil.copytree(cached_digits_classifier(), folder)
    report = audit(
        str(folder),
        forget=threes,
        retain=others.select(range(100)),
        test=digits["test"],
        checks=["forget_accuracy"],
        progress=False,
    )
    report.save(tmp_path / "audit.json")
    other = replace(report, model_digest="0" * 32)
    with LoopbackHub() as hub, hub.in_this_process(tmp_path / "home"):
        for _ in range(2):
            publish(str(folder), "me/audited", audit=AuditReport.load(tmp_path / "audit.json"))
        card = ModelCard(hub.files("me/audited")["README.md"].decode())
        said = verify_provenance("me/audited").record["audit"]
        with pytest.raises(ValueError, match="audit: is of another model"):
            publish(str(folder), "me/audited", audit=other)
        assert hub.unknown == []
    assert card.text.count("## Audit") == 1
    assert f"verdict is **{report.verdict.word}**" in card.text
    for name, why in report.unchecked.items():  # what was not looked at is told too
        assert f"- {name}: was not asked for ({why})" in card.text.replace("\\", "")
    values = {one.metric_type: one.metric_value for one in card.data.eval_results}
    assert values["forget_accuracy"] == pytest.approx(100 * report["forget_accuracy"].audited)
    assert said["verdict"] == report.verdict.word
    assert said["checks"] == {one.name: one.status for one in report.results}
    assert said["sha256"] == digest_of_record(json.loads((tmp_path / "audit.json").read_text()))
    assert not (folder / "README.md").exists()  # the user's folder is as it was


def test_a_trainer_fills_in_what_it_knows(trainer, models, sets):
    settings = {
        "retrained": models.retrained[:3],
        "test": sets["test"],
        "checks": ["forget_accuracy"],
        "progress": False,
    }
    found = audit(trainer, original=models.originals[1], retain=sets["retain"], **settings)
    plain = audit(trainer.model, models.originals[1], forget=sets["forget"], retain=sets["retain"], **settings)
    assert (found.verdict, found.sizes, found.model_digest) == (plain.verdict, plain.sizes, plain.model_digest)
    with pytest.raises(ValueError, match="retain: missing"):  # it was not told
        audit(trainer, original=models.originals[1], **settings)
