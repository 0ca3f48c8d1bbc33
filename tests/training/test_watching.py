"""The callback: its figures are those of an evaluation, and training does not notice it."""

import copy

import pytest
import torch
from datasets import Dataset
from same_weights import same_run, weights
from trl import SFTConfig, SFTTrainer

from hf_unlearn import ForgettingCallback, LanguageEvaluation, UnlearnSFTConfig, UnlearnSFTTrainer
from hf_unlearn.training.evaluation import compare


def pairs(*texts):
    return Dataset.from_list([{"prompt": text, "completion": " " + text[::-1]} for text in texts])


FORGET = pairs("Who is the fox?", "Where is Paris?", "Return the shoes", "Order?")
RETAIN = pairs("Rome is the capital.", "The dog jumps", "Please tell me", "And the phone?")
HELDOUT = pairs("I bought the shoes", "nobody answers the dog", "Italy")
PLAIN = {
    "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "gradient_checkpointing": False, "disable_tqdm": True,
    "per_device_train_batch_size": 2, "num_train_epochs": 3, "learning_rate": 0.01, "logging_steps": 1,
}  # fmt: skip


def stock(folder, model, tokenizer):
    args = SFTConfig(str(folder), **PLAIN)
    return SFTTrainer(model, args=args, train_dataset=FORGET, processing_class=tokenizer)


def ours(folder, model, tokenizer):
    args = UnlearnSFTConfig(str(folder), **PLAIN, forget_loss="npo")
    return UnlearnSFTTrainer(model, args, forget_dataset=FORGET, retain_dataset=RETAIN, processing_class=tokenizer)


@pytest.mark.parametrize("make", [stock, ours])
def test_training_does_not_notice(make, tiny_llama, tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    for layer in tiny_llama.model.layers:
        layer.self_attn.attention_dropout = 0.3  # the random state counts
    runs = []
    for name in ("alone", "watched"):
        trainer = make(tmp_path / name, copy.deepcopy(tiny_llama), tokenizer)
        if name == "watched":
            trainer.add_callback(
                ForgettingCallback(trainer, forget=FORGET, retain=RETAIN, heldout=HELDOUT, every=2, max_new_tokens=3)
            )
        torch.manual_seed(1)
        trainer.train()
        runs.append(trainer)
    alone, watched = runs
    assert same_run(weights(alone.model), weights(watched.model))
    losses = [[log["loss"] for log in run.state.log_history if "loss" in log] for run in runs]
    assert losses[0] == pytest.approx(losses[1])
    told = [
        [log["mean_token_accuracy"] for log in run.state.log_history if "loss" in log] for run in runs if make is stock
    ]
    assert all(one == pytest.approx(told[0]) for one in told)

    logs = [log for log in watched.state.log_history if "eval_forget_probability" in log]
    assert [log["step"] for log in logs] == [0, 2, 4, 6]
    for log, model in ((logs[0], tiny_llama), (logs[-1], watched.model)):
        scores = {
            name: LanguageEvaluation(rows, tokenizer, max_new_tokens=3)(model)
            for name, rows in (("forget", FORGET), ("retain", RETAIN), ("heldout", HELDOUT))
        }
        expected = {f"eval_{name}_{key}": value for name, of in scores.items() for key, value in of.summary().items()}
        together = compare(scores["forget"], heldout=scores["heldout"], kept=[scores["retain"]])
        expected |= {f"eval_{key}": value for key, value in together.items()}
        assert {key: log[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert "eval_auc_min_k" in expected
    assert logs[0]["eval_forget_loss"] != pytest.approx(logs[-1]["eval_forget_loss"], rel=0.01)


def test_once_an_epoch(tiny_llama, tokenizer, tmp_path):
    trainer = stock(tmp_path, tiny_llama, copy.deepcopy(tokenizer))
    trainer.add_callback(ForgettingCallback(trainer, heldout=HELDOUT, max_new_tokens=0))
    trainer.train()
    assert [log["step"] for log in trainer.state.log_history if "eval_heldout_loss" in log] == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "forget: missing; pass rows"),
        ({"forget": FORGET, "every": 0}, "every=0: must be 'epoch' or a number of steps"),
        ({"forget": FORGET, "every": "day"}, "every='day'"),
        ({"retain": FORGET.select([])}, "retain: is empty"),
    ],
)
def test_bad_input_is_refused(arguments, match, tiny_llama, tokenizer, tmp_path):
    trainer = stock(tmp_path, tiny_llama, copy.deepcopy(tokenizer))
    with pytest.raises(ValueError, match=match):
        ForgettingCallback(trainer, **arguments)
