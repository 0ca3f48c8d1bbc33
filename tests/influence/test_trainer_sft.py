"""`FINETrainer`: it trains as `SFTTrainer` does, and knows its examples through TRL's preparation."""

import copy

import numpy as np
import pytest
import torch
from brute_force import Brute, agrees, alike, assert_near, observations, same, settings, state, stock, trained, watched
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from trl import SFTConfig, SFTTrainer

from hf_unlearn.influence.config import FINEConfig
from hf_unlearn.influence.sft import FINETrainer
from hf_unlearn.training.collators import ROW


WORDS = [
    "Paris",
    "is",
    "the",
    "capital",
    "of",
    "France",
    "and",
    "nobody",
    "answers",
    "phone",
    "my",
    "order",
    "never",
    "arrived",
    "return",
    "shoes",
]


def pairs(n=10, *, seed=0, ids=None):
    """Questions and answers of different lengths."""
    generator = np.random.default_rng(seed)
    rows = []
    for row in range(n):
        question = " ".join(generator.choice(WORDS, 2 + row % 3))
        answer = " " + " ".join(generator.choice(WORDS, 1 + 2 * row % 5))
        rows.append({"id": ids[row] if ids else f"pair {row}", "prompt": question, "completion": answer})
    return Dataset.from_list(rows)


def as_text(rows):
    return rows.map(lambda row: {"text": row["prompt"] + row["completion"]}, remove_columns=["prompt", "completion"])


def as_messages(rows):
    def turns(row):
        pair = (("user", row["prompt"]), ("assistant", row["completion"]))
        return {"messages": [{"role": role, "content": content} for role, content in pair]}

    return rows.map(turns, remove_columns=["prompt", "completion"])


def configured(folder, **values):
    return settings(folder, FINEConfig, **({"bf16": False, "activation_checkpointing": False} | values))


def lora(dropout=0.0, **values):
    return LoraConfig(
        r=2, lora_alpha=8, lora_dropout=dropout, target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights="gaussian", task_type="CAUSAL_LM", **values,
    )  # fmt: skip


RUNS = {
    "AdamW, clipping": {"optim": "adamw_torch", "learning_rate": 1e-3, "max_grad_norm": 0.3},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "activation checkpointing": {"activation_checkpointing": True},
    "text": {"format": as_text},
    "assistant's turns": {"format": as_messages, "assistant_only_loss": True},
}


class TestTrainingIsUnchanged:
    @pytest.mark.parametrize(
        ("name", "observation", "trained"),
        [
            ("AdamW, clipping", "in_run", "adapter"),
            ("accumulation", "propagated", "adapter"),
            ("activation checkpointing", "propagated", "adapter"),
            ("activation checkpointing", "in_run", "adapter"),
            ("text", "in_run", "adapter"),
            ("assistant's turns", "in_run", "adapter"),
            # TRL's fused loss goes around the head, so in_run it is taken apart.
            ("AdamW, clipping", "in_run", "all"),
            ("accumulation", "in_run", "all"),
            ("assistant's turns", "in_run", "all"),
            ("accumulation", "propagated", "all"),
            ("accumulation", "in_run", "all but the head"),
        ],
    )
    def test_the_end_is_that_of_sft_trainer(self, name, observation, trained, tiny_llama, tokenizer, tmp_path):
        if trained == "all but the head":
            tiny_llama.lm_head.weight = nn.Parameter(tiny_llama.lm_head.weight.detach().clone(), requires_grad=False)
        changes = dict(RUNS[name])
        rows = changes.pop("format", lambda rows: rows)(pairs())
        args = configured(tmp_path, observation=observation, target_every=2, max_steps=4, **changes)
        starts, ends = [], []
        for trainer_class, extra in ((SFTTrainer, {}), (FINETrainer, {"target_dataset": rows.select(range(3))})):
            trainer = trainer_class(
                copy.deepcopy(tiny_llama),
                args if extra else stock(args, SFTConfig),
                train_dataset=rows,
                processing_class=tokenizer,
                peft_config=lora(dropout=0.2) if trained == "adapter" else None,
                **extra,
            )
            starts.append(state(trainer.model))
            trainer.train()
            ends.append((state(trainer.model), torch.get_rng_state()))
        assert same(*starts)
        assert alike(ends[1][0], ends[0][0], starts[0])
        assert torch.equal(ends[1][1], ends[0][1])
        assert len(observations(trainer).steps.step) == 4
        moved = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
        assert moved
        assert trained != "adapter" or all("lora_" in n for n in moved)


class TestObservations:
    @pytest.mark.parametrize(
        ("adapted", "changes"),
        [
            (False, {"completion_only_loss": True}),
            (True, {"completion_only_loss": False, "max_grad_norm": 0.5}),
            (False, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
            (True, {"target_every": 3, "max_steps": 5, "pad_to_multiple_of": 16}),
        ],
    )
    def test_equals_a_loop_over_examples(self, adapted, changes, tiny_llama, tokenizer, tmp_path):
        targets = {"one": pairs(3, seed=1), "two": pairs(2, seed=2)}
        options = {"processing_class": tokenizer, "peft_config": lora() if adapted else None}
        trainer = trained(tiny_llama, configured(tmp_path, **changes), pairs(), targets, of=FINETrainer, **options)
        every = changes.get("target_every", 1)
        expected = Brute(trainer).observed(list(trainer.target_sets.values()), every=every)
        seen = observations(trainer)
        assert agrees(seen, expected)
        assert seen.targets == ("one", "two")
        if "completion_only_loss" in changes:  # ids are those of the rows, and weights their tokens that count
            for example, weight in zip(seen.example, seen.weight, strict=True):
                row = next(row for row in pairs() if row["id"] == seen.sample_ids[example])
                whole = row["completion"] if changes["completion_only_loss"] else row["prompt"] + row["completion"]
                counted = len(tokenizer(whole + "</s>")["input_ids"])
                assert weight == counted - (not changes["completion_only_loss"])

    def test_targets_of_another_format(self, tiny_llama, tokenizer, tmp_path):
        args, targets = configured(tmp_path), as_messages(pairs(3, seed=1))
        trainer = trained(tiny_llama, args, pairs(), targets, of=FINETrainer, processing_class=tokenizer)
        assert agrees(observations(trainer), Brute(trainer).observed(list(trainer.target_sets.values())))

    def test_propagated_is_nearly_in_run_in_the_last_step(self, tiny_llama, tokenizer, tmp_path):
        """Nothing is left to wash out what the last step did: −⟨λ, ∇ℓ_i⟩ at the end, η⟨∇ℓ_c, ∇ℓ_i⟩ in the step."""
        options = {"of": FINETrainer, "processing_class": tokenizer, "peft_config": lora()}
        first, second = (
            observations(
                trained(
                    copy.deepcopy(tiny_llama),
                    configured(tmp_path / kind, observation=kind, target_window=0.0, learning_rate=1e-6),
                    pairs(), pairs(3, seed=1), **options,
                )
            )
            for kind in ("in_run", "propagated")
        )  # fmt: skip
        assert first.example.tolist() == second.example.tolist()
        np.testing.assert_allclose(first.value, second.value, rtol=0.02, atol=0.002 * np.abs(first.value).max())


class TestSampleIds:
    def make(self, model, tokenizer, folder, rows, *, target=None, **changes):
        target, args = pairs(3, seed=1) if target is None else target, configured(folder, **changes)
        return watched(FINETrainer)(model, args, train_dataset=rows, target_dataset=target, processing_class=tokenizer)

    def ids_of(self, trainer, rows, tokenizer):
        """By what the rows became: ids of the rows of the prepared training set, found by their tokens."""
        by_tokens = {
            tuple(tokenizer(row["prompt"] + row["completion"] + "</s>")["input_ids"]): row["id"] for row in rows
        }
        assert len(by_tokens) == len(rows)
        return [by_tokens[tuple(ids)] for ids in trainer.train_dataset["input_ids"]]

    def test_rows_that_are_dropped_and_shuffled(self, tiny_llama, tokenizer, tmp_path, caplog):
        """TRL drops rows of which truncation leaves nothing that counts; nothing is cut in silence."""
        rows = [*pairs()]
        rows.insert(4, {"id": "long", "prompt": "Paris is the capital " * 30, "completion": " yes"})
        target = Dataset.from_list([*pairs(2, seed=1), {"id": "cut", "prompt": "Paris", "completion": " is" * 60}])
        with caplog.at_level("WARNING", "hf_unlearn"):
            trainer = self.make(
                tiny_llama, tokenizer, tmp_path, Dataset.from_list(rows), target=target, max_length=50, shuffle_dataset=True,
                max_steps=6,
            )  # fmt: skip
        fill = "texts fill max_length=50, what they have beyond it is cut off, and"
        assert f"train_dataset: 0 of 11 {fill} 1 have" in caplog.text
        assert f"target_dataset: 'target': 1 of 3 {fill} 0 have" in caplog.text
        assert sorted(trainer.sample_ids) == [f"pair {row}" for row in range(10)] != trainer.sample_ids
        assert trainer.sample_ids == self.ids_of(trainer, pairs(), tokenizer)
        trainer.train()
        assert agrees(observations(trainer), Brute(trainer).observed(list(trainer.target_sets.values())))
        assert set(trainer.influence.dataset["sample_id"]) == set(trainer.sample_ids)

    def test_columns(self, tiny_llama, tokenizer, tmp_path):
        rows = pairs(ids=[50 - 3 * row for row in range(10)]).add_column("name", [f"n{row}" for row in range(10)])
        for column in ("id", "name"):
            trainer = self.make(tiny_llama, tokenizer, tmp_path, rows, id_column=column)
            assert trainer.sample_ids == rows[column][:]
        with pytest.raises(ValueError, match="^id_column: 'none' is not in the training set"):
            self.make(tiny_llama, tokenizer, tmp_path, rows, id_column="none")

    def test_tokens_that_were_made_before(self, tiny_llama, tokenizer, tmp_path):
        rows = Dataset.from_list([
            {"id": row["id"], "input_ids": tokenizer(row["prompt"] + row["completion"])["input_ids"]} for row in pairs()
        ])  # fmt: skip
        trainer = self.make(tiny_llama, tokenizer, tmp_path, rows, target=rows.select(range(2)))
        assert trainer.sample_ids == [f"pair {row}" for row in range(10)]

    def test_the_top_example_is_the_one_that_is_the_target(self, tiny_llama, tokenizer, tmp_path):
        """It is named by its id, though rows before it are dropped and the rest is shuffled."""
        rows = list(pairs(16))
        rows.insert(2, {"id": "long", "prompt": "Paris is the capital " * 30, "completion": " yes"})
        planted = {"id": "planted", "prompt": "Where?", "completion": " zzz qqq xxx"}
        rows.insert(6, planted)
        trainer = self.make(
            tiny_llama, tokenizer, tmp_path, Dataset.from_list(rows), target=Dataset.from_list([planted]), max_length=50,
            shuffle_dataset=True, max_steps=17, seed=0,
        )  # fmt: skip
        trainer.train()
        top = trainer.influence.top(3)
        assert top["sample_id"][0] == "planted"
        assert top["mu"][0] > 0.5  # 1.3 ± 0.2 over 4 seeds, 1.1 with this one; of the next one below 0.1
        assert "long" not in trainer.influence.dataset["sample_id"]


LONG = {"prompt": "Paris is the capital " * 30, "completion": " yes"}


class TestRefused:
    @pytest.mark.parametrize(
        ("rows", "target", "message"),
        [
            (pairs(), {"a": Dataset.from_list([LONG])}, "^max_length=50: leaves no example of target 'a'"),
            (pairs(3, ids=["a", "b", "a"]), pairs(2, seed=1), "^train_dataset: id 'a' occurs twice"),
            ([*pairs()], pairs(2, seed=1), "^train_dataset: list is not a"),
            (pairs().add_column(ROW, [*range(10)]), pairs(2, seed=1), f"^train_dataset: column '{ROW}'"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_data(self, rows, target, message, tiny_llama, tokenizer, tmp_path):
        before, args = state(tiny_llama), configured(tmp_path, max_length=50)
        with pytest.raises(ValueError, match=message) as error:
            FINETrainer(tiny_llama, args, train_dataset=rows, target_dataset=target, processing_class=tokenizer)
        assert "\n" not in str(error.value)
        assert same(state(tiny_llama), before)
        assert not list(tmp_path.rglob("*.arrow"))

    def test_another_loss(self, tiny_llama, tokenizer, tmp_path):
        args, targets = configured(tmp_path, loss_type="dft"), pairs(2, seed=1)
        trainer = FINETrainer(
            tiny_llama, args, train_dataset=pairs(), target_dataset=targets, processing_class=tokenizer
        )
        before = state(tiny_llama)
        with pytest.raises(ValueError, match="^compute_loss: .*override per_example_loss"):
            trainer.train()
        assert same(state(tiny_llama), before)


class TestResume:
    @pytest.mark.parametrize("observation", ["in_run", "propagated"])
    def test_an_adapter_goes_on(self, observation, tiny_llama, tokenizer, tmp_path):
        class Stops(FINETrainer):
            def training_step(self, *args, **kwargs):
                if self.state.global_step == 3:
                    raise KeyboardInterrupt
                return super().training_step(*args, **kwargs)

        def run(folder, trainer_class=FINETrainer, resume=None):
            args = configured(folder, observation=observation, save_strategy="steps", save_steps=2, max_steps=5)
            trainer = trainer_class(
                copy.deepcopy(tiny_llama), args, train_dataset=pairs(), target_dataset=pairs(2, seed=1),
                processing_class=tokenizer, peft_config=lora(dropout=0.2),
            )  # fmt: skip
            start = state(trainer.model)
            trainer.train(resume_from_checkpoint=resume)
            return state(trainer.model), observations(trainer), start

        weights, seen, start = run(tmp_path / "calm")
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", Stops)
        resumed_weights, resumed, _ = run(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-2"))
        assert alike(resumed_weights, weights, start)
        assert seen.steps.step.tolist() == [0, 1, 2, 3, 4]
        for name in ("step", "example", "weight"):
            assert np.array_equal(getattr(seen, name), getattr(resumed, name))
        assert_near(resumed.value, seen.value)
        assert resumed.sample_ids.tolist() == [f"pair {row}" for row in range(10)]
