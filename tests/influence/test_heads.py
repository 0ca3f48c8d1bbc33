"""Heads other than of one class an example: numbers, several labels at once, a label a token, labels that are read. What is recorded is what the
model's own loss says of one example alone.
"""

import numpy as np
import pytest
import torch
from brute_force import QUIET, agrees, observations, settings, trained
from building import build
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_unlearn import InfluenceConfig, InfluenceTrainer, attribute


SMALL = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3, "vocab_size": 30, "max_position_embeddings": 16,
}  # fmt: skip


def texts(n, labels, seed=0):
    """Rows of token ids of different lengths; `labels` of generator and length."""
    generator = np.random.default_rng(seed)
    rows = []
    for row in range(n):
        ids = generator.integers(3, 30, 3 + row % 3).tolist()
        rows.append({"id": row, "input_ids": ids, "labels": labels(generator, len(ids))})
    return Dataset.from_list(rows)


def bert(kind=BertForSequenceClassification, **values):
    return build(kind, BertConfig(**SMALL, **values))


def t5():
    return build(
        T5ForConditionalGeneration,
        T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0),
    )  # fmt: skip


HEADS = {
    "a number": (lambda: bert(num_labels=1), lambda g, n: float(g.normal()), DataCollatorWithPadding),
    "numbers": (lambda: bert(num_labels=3, problem_type="regression"), lambda g, n: g.normal(size=3).tolist(), DataCollatorWithPadding),
    "several labels": (lambda: bert(num_labels=4), lambda g, n: g.integers(0, 2, 4).astype(float).tolist(), DataCollatorWithPadding),
    "a label a token": (
        lambda: bert(BertForTokenClassification, num_labels=3),
        lambda g, n: [-100, *g.integers(0, 3, n - 1).tolist()],
        DataCollatorForTokenClassification,
    ),
    "labels that are read": (t5, lambda g, n: g.integers(3, 30, 1 + n % 3).tolist(), DataCollatorForSeq2Seq),
}  # fmt: skip
MEANS_OVER_TOKENS = ("a label a token", "labels that are read")


def own_gradient(model, theta, names, batch):
    """Of the loss that the model says itself."""
    values = {name: value.clone().requires_grad_() for name, value in theta.items()}
    loss = torch.func.functional_call(model, values, (), dict(batch)).loss
    parts = torch.autograd.grad(loss, [values[name] for name in names])
    return torch.cat([part.flatten() for part in parts]).double()


def made(head, tokenizer):
    make, labels, collator = HEADS[head]
    return make(), texts(9, labels), texts(4, labels, seed=1), collator(tokenizer)


@pytest.mark.parametrize("observation", ["in_run", "propagated"])
@pytest.mark.parametrize("head", HEADS)
def test_records_are_of_the_models_own_loss(head, observation, tokenizer, tmp_path):
    model, rows, targets, collate = made(head, tokenizer)
    args = settings(tmp_path, observation=observation, max_steps=2, learning_rate=0.05)
    trainer = trained(model, args, rows, targets, collate)
    seen = observations(trainer)
    if observation == "propagated":
        assert np.isfinite(seen.value).all()
        assert np.abs(seen.value).max() > 0
        return
    columns = ["input_ids", "labels"]
    names, expected = list(trainer._ghost.covered), {}
    assert len(names) > 4
    model.eval()

    def gradient(step, dataset, row):
        batch = collate([{name: dataset[row][name] for name in columns}])
        return own_gradient(model, step["theta"], names, batch)

    for number, step in enumerate(trainer.steps):
        members = sum(step["rows"], [])
        target = sum(gradient(step, targets, row) for row in range(len(targets))) / len(targets)
        each = torch.stack([gradient(step, rows, row) for row in members])
        counts = [
            sum(label != -100 for label in rows[row]["labels"]) if head in MEANS_OVER_TOKENS else 1 for row in members
        ]
        expected[number] = (members, torch.tensor(counts, dtype=torch.float64), step["lr"] * each @ target[:, None])
    assert agrees(seen, expected)


@pytest.mark.parametrize("head", HEADS)
def test_a_finished_model_with_such_a_head(head, tokenizer, tmp_path):
    model, rows, targets, collate = made(head, tokenizer)
    args = InfluenceConfig(output_dir=str(tmp_path / "a"), per_device_eval_batch_size=4, **QUIET)
    given = {"args": args, "data_collator": collate, "trainer_class": InfluenceTrainer}
    report = attribute(model, rows, targets, **given)
    assert np.isfinite(report.observations.value).all()
    assert "own losses" in report.manifest["curvature"] or head in MEANS_OVER_TOKENS


def test_labels_that_the_head_does_not_take(tokenizer, tmp_path):
    rows = texts(8, lambda g, n: g.normal(size=2).tolist())
    with pytest.raises(
        ValueError, match=r"^train_dataset: has labels that are no classes, and BertForSequenceClassification takes"
    ):
        InfluenceTrainer(
            bert(num_labels=3, problem_type="single_label_classification"), settings(tmp_path), DataCollatorWithPadding(tokenizer),
            rows, target_dataset=rows,
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"^train_dataset: has 2 numbers in 'labels', and the model answers with 3;"):
        InfluenceTrainer(
            bert(num_labels=3), settings(tmp_path), DataCollatorWithPadding(tokenizer), rows, target_dataset=rows
        )
