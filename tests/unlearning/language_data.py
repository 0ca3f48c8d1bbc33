"""What the tests of language models share: plain SGD steps over texts, and the losses one text at a time in plain torch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from image_data import arguments, close, distance, weights
from transformers import DataCollatorForSeq2Seq, TrainerCallback

from hf_unlearn import UnlearnConfig, UnlearnSFTConfig


TEXTS = ["The quick fox.", "Paris is the capital of France.", "My order never", "Please tell me how I can return it"]
KEPT = ["Rome is the capital.", "the lazy dog jumps over the phone", "and keep the other ones", "shoes"]
ALTERNATES = ["I do not know that at all", "Paris", "nobody answers it", "The shoes"]
LOGGED = {"logging_strategy": "steps", "logging_steps": 1, "max_steps": 2, "bf16": False}


def settings(folder, config=UnlearnConfig, **changes):
    """Two plain SGD steps over all rows at once, with nothing but the losses: of texts NPO and, with weight 1, a row to keep for each."""
    forget = {} if config is UnlearnSFTConfig else {"forget": "examples"}  # its default
    forget |= {} if changes.get("forget") == "class" else {"forget_loss": "npo"}
    plain = {"learning_rate": 0.05, "retain_weight": 1.0, "retain_per_forget": 1}
    return arguments(folder, config, **LOGGED | forget | plain | changes)


def masked(texts, tokenizer, prompt=2):
    """Rows with labels; the first `prompt` tokens do not count."""
    rows = [dict(tokenizer(text)) for text in texts]
    return Dataset.from_list([{**row, "labels": [-100] * prompt + row["input_ids"][prompt:]} for row in rows])


def padding(tokenizer, side="right", **kwargs):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = side
    return DataCollatorForSeq2Seq(tokenizer, **kwargs)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def nll(model, ids, labels, reduction="mean"):
    """Of one text."""
    return F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], labels[1:], reduction=reduction)


def assert_same_parameters(model, student):
    for (name, actual), expected in zip(model.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5, msg=name)


class StopAfterFive(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 5


def check_resuming(folder, make):
    """A run that stops after five steps of eight and goes on from its checkpoint ends where an undisturbed one does.

    Args:
        make: builds a trainer of its arguments `(folder, callbacks=…, **settings)`, every time from the same model.

    Returns:
        The three trainers.
    """
    steps = {
        "max_steps": 8, "save_strategy": "steps", "save_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-3,
        "utility_tolerance": 9.0,
    }  # fmt: skip
    runs = []
    for name, callbacks, resume in (("whole", [], None), ("killed", [StopAfterFive()], None), ("killed", [], True)):
        runs.append(make(folder / name, callbacks=callbacks, **steps))
        if resume:  # half forgotten: what the original was, the run has kept
            runs[-1].model.load_state_dict(runs[1].model.state_dict())
        runs[-1].train(resume_from_checkpoint=resume)
    whole, killed, resumed = (weights(run.model) for run in runs)
    assert [run.state.global_step for run in runs] == [8, 5, 8]
    first, last = runs[0].reference.parameters, runs[2].reference.parameters
    assert all(torch.equal(last[name], value) for name, value in first.items())
    assert close(whole, resumed, whole | first)
    for key, value in runs[0].outcome.original.items():  # what it was resumed with is half forgotten already
        assert runs[2].outcome.original[key] == pytest.approx(value, rel=1e-5)
        assert runs[2].outcome.now[key] == pytest.approx(runs[0].outcome.now[key], rel=1e-3)
    assert distance(whole, killed) > 0.1 * distance(whole, whole | first)
    if runs[0].guard:
        assert [look.step for look in runs[2].guard.looks] == [look.step for look in runs[0].guard.looks]
        assert runs[2].guard.best.step == 8
    return runs
