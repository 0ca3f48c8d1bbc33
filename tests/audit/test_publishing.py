"""An audit on the card of the model that it is of, and of no other."""

import copy

import pytest

from hf_unlearn import UnlearnConfig, UnlearnTrainer
from hf_unlearn.audit import audit


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
