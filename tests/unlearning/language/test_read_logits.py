"""No part of the language family has more logits than it reads: a long prompt before a short answer, and short texts beside a long one."""

import pytest
import torch
from datasets import Dataset
from language_data import settings
from vocabulary_rows import Rows

from hf_unlearn import UnlearnSFTConfig, UnlearnSFTTrainer
from hf_unlearn.audit.language.depth import lens
from hf_unlearn.audit.language.subject import losses
from hf_unlearn.training.answers import Answer
from hf_unlearn.training.collators import WithRow
from hf_unlearn.training.evaluation import score
from hf_unlearn.training.losses import IGNORED
from hf_unlearn.unlearning.language import turns
from hf_unlearn.unlearning.language.asked import Pair, ask, log_p
from hf_unlearn.unlearning.language.likeness import last_states


PROMPT, ANSWER = 40, 3
IDS = [list(range(5, 5 + PROMPT + ANSWER)), list(range(9, 9 + 6 + ANSWER))]
LABELS = [[IGNORED] * (len(ids) - ANSWER) + ids[-ANSWER:] for ids in IDS]
COUNTED = len(IDS) * ANSWER  # of 86


class Part:
    answers = [Answer(ids, labels, ids[:-ANSWER]) for ids, labels in zip(IDS, LABELS, strict=True)]

    def __len__(self):
        return len(self.answers)


def pairs():
    kept = [Pair(ids, labels, ids, []) for ids, labels in zip(IDS, LABELS, strict=True)]
    about = [
        Pair(ids, labels, [*ids[:3], 4, *ids[4:]], list(range(len(ids))))
        for ids, labels in zip(IDS, LABELS, strict=True)
    ]
    return [*kept, *about]


@pytest.mark.parametrize(
    ("look", "most"),
    [
        (lambda model: ask(model, pairs()), 2 * COUNTED),
        (lambda model: log_p(model, pairs()[2:]), COUNTED),
        (lambda model: turns._log_p(model, Part.answers[0], ()), ANSWER),
        (lambda model: last_states(model, IDS), 0),
        (lambda model: torch.no_grad()(score)(model, Part.answers, batch_size=2, device=torch.device("cpu")), COUNTED),
        (lambda model: losses(model, Part()).mean().backward(), COUNTED),
        (lambda model: lens(model, Part()), COUNTED),
    ],
    ids=["ask", "log_p", "turns", "last states", "evaluation", "audit", "lens"],
)
def test_of_looks(look, most, tiny_llama):
    with Rows(tiny_llama.config.vocab_size) as rows:
        look(tiny_llama)
    assert rows.most <= most < sum(map(len, IDS))


def trainer_of(kind, model, tokenizer, folder):
    columns = {"input_ids": IDS, "labels": LABELS}
    forget, retain = dict(columns), {name: [row[1:] for row in rows] for name, rows in columns.items()}
    if kind == "dpo":
        others = zip(IDS[::-1], LABELS[::-1], strict=True)
        forget["alternate"] = [{"input_ids": ids, "labels": labels} for ids, labels in others]
    more = {"heldout_loss": 3.0} if kind == "match" else {}
    more |= {} if kind == "rmu" else {"retain_loss": "kl"}
    args = settings(folder, UnlearnSFTConfig, forget_loss=kind, max_steps=1, learning_rate=0.0, **more)
    rows = {"forget_dataset": Dataset.from_dict(forget), "retain_dataset": Dataset.from_dict(retain)}
    return UnlearnSFTTrainer(model, args=args, processing_class=tokenizer, **rows)


@pytest.mark.parametrize(
    "kind", ["ascent", "npo", "match", "uniform", "simnpo", "undial", "wga", "satimp", "ceu", "pdu", "dpo", "rmu"]
)
def test_of_steps(kind, tiny_llama, tokenizer, tmp_path):
    """Forward and backward, of rows to forget and to keep."""
    trainer = trainer_of(kind, tiny_llama, tokenizer, tmp_path)
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    terms = {"forget": trainer.forget_loss, "retain": trainer.retain_loss}
    with Rows(tiny_llama.config.vocab_size) as rows:
        loss = sum(of(trainer.model, batch[part]).mean() for part, of in terms.items())
        loss.backward()
    assert rows.most <= (0 if kind == "rmu" else COUNTED)
    assert loss.isfinite()


def test_of_redirect(tiny_llama, tokenizer, tmp_path):
    asked = ask(tiny_llama, pairs()[:2])
    trainer = trainer_of("npo", tiny_llama, tokenizer, tmp_path)
    trainer.train()
    (batch,) = trainer._batches(WithRow(asked.rows), None)
    with Rows(tiny_llama.config.vocab_size) as rows:
        trainer._kl(trainer.model, batch, asked).mean().backward()
    assert rows.most <= COUNTED


def test_replay_reads_no_padding(tiny_llama, tokenizer, tmp_path):
    trainer = trainer_of("npo", tiny_llama, tokenizer, tmp_path)
    trainer.train()
    (batch,) = trainer._batches(trainer.forget_dataset, None)
    batch = trainer.replay_inputs(batch, torch.Generator().manual_seed(0))
    with Rows(tiny_llama.config.vocab_size) as rows:
        values = trainer.replay_loss(trainer.model, batch)
    assert rows.most <= sum(len(ids) - 1 for ids in IDS) < batch["input_ids"].numel() - 2
    with torch.no_grad():
        for value, ids, mask in zip(values, batch["input_ids"], batch["attention_mask"], strict=True):
            own, reference = (
                forward(input_ids=ids[None, mask.bool()]).logits[0, :-1].log_softmax(-1)
                for forward in (trainer.model.eval(), trainer.reference_forward)
            )
            expected = (reference.exp() * (reference - own)).sum(-1).mean()
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
