"""The worked example of CONTRIBUTING.md runs."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch


PAGE = Path(__file__).parent.parent / "CONTRIBUTING.md"


@pytest.fixture
def method(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (tmp_path / "second_best.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "second_best", raising=False)
    return importlib.import_module("second_best")


def test_loss_is_the_cross_entropy_to_the_second_best(method):
    logits, reference = torch.randn(5, 4), torch.randn(5, 4)
    targets = reference.argmax(-1)
    second = reference.argsort(-1, descending=True)[:, 1]
    expected = -logits.log_softmax(-1)[torch.arange(5), second]
    torch.testing.assert_close(method.second_best(logits, reference, targets), expected)


def test_forgets_a_class(method, tiny_resnet, digits, tmp_path):
    from hf_unlearn.data import split_by_values
    from hf_unlearn.examples.classifier import digits_processor

    threes, _ = split_by_values(digits["train"], "label", [3])
    args = method.SecondBestConfig(
        str(tmp_path / "out"), max_steps=8, guard=False, replay_weight=0.0, report_to="none", use_cpu=True
    )
    trainer = method.SecondBestTrainer(
        tiny_resnet, args, forget_dataset=threes.select(range(32)), processing_class=digits_processor()
    )
    batch = trainer.data_collator([threes[row] for row in range(32)])
    before = tiny_resnet(batch["pixel_values"]).logits.detach()
    trainer.train()
    after = tiny_resnet(batch["pixel_values"]).logits.detach()
    chosen = before.scatter(1, batch["labels"][:, None], -torch.inf).argmax(1, keepdim=True)
    assert (after.log_softmax(1).gather(1, chosen) > before.log_softmax(1).gather(1, chosen)).float().mean() > 0.9
    trainer.save_model()
    assert "Second best label" in (tmp_path / "out" / "README.md").read_text()
