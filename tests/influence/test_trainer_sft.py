"""`FINETrainer`: it trains as `SFTTrainer` does, and knows its examples through TRL's preparation."""

import copy

import numpy as np
import pytest
import torch
from brute_force import Brute, agrees, observations, same, settings, state, stock, watched
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
    def both(self, name, model, tokenizer, folder, observation, peft_config):
        changes = dict(RUNS[name])
        rows = changes.pop("format", lambda rows: rows)(pairs())
        args = configured(folder, observation=observation, target_every=2, max_steps=4, **changes)
        ends = []
        for trainer_class, extra in ((SFTTrainer, {}), (FINETrainer, {"target_dataset": rows.select(range(3))})):
            trainer = trainer_class(
                copy.deepcopy(model),
                args if extra else stock(args, SFTConfig),
                train_dataset=rows,
                processing_class=tokenizer,
                peft_config=peft_config,
                **extra,
            )
            trainer.train()
            ends.append((trainer, state(trainer.model), torch.get_rng_state()))
        (_, expected, random), (trainer, actual, own_random) = ends
        assert torch.equal(random, own_random)
        assert len(observations(trainer).steps.step) == 4
        return expected, actual, trainer

    @pytest.mark.parametrize("observation", ["in_run", "propagated"])
    @pytest.mark.parametrize("name", RUNS)
    def test_adapters_to_the_last_bit(self, name, observation, tiny_llama, tokenizer, tmp_path):
        config = lora(dropout=0.2)
        expected, actual, trainer = self.both(name, tiny_llama, tokenizer, tmp_path, observation, config)
        assert same(expected, actual)
        moved = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
        assert moved
        assert all("lora_" in n for n in moved)

    @pytest.mark.parametrize("name", RUNS)
    def test_all_parameters_where_the_head_is_seen(self, name, tiny_llama, tokenizer, tmp_path):
        """TRL's fused loss goes around the head, so it is taken apart: the same sums in another order."""
        expected, actual, _ = self.both(name, tiny_llama, tokenizer, tmp_path, "in_run", None)
        start = state(tiny_llama)
        for key, value in expected.items():
            assert (actual[key] - value).norm() <= 1e-3 * (value - start[key]).norm() + 1e-7, key

    def test_all_parameters_that_are_propagated_to_the_last_bit(self, tiny_llama, tokenizer, tmp_path):
        expected, actual, _ = self.both("accumulation", tiny_llama, tokenizer, tmp_path, "propagated", None)
        assert same(expected, actual)

    def test_a_frozen_head_to_the_last_bit(self, tiny_llama, tokenizer, tmp_path):
        tiny_llama.lm_head.weight = nn.Parameter(tiny_llama.lm_head.weight.detach().clone(), requires_grad=False)
        expected, actual, _ = self.both("accumulation", tiny_llama, tokenizer, tmp_path, "in_run", None)
        assert same(expected, actual)


class TestObservations:
    @pytest.mark.parametrize(
        "changes",
        [
            {"completion_only_loss": True},
            {"completion_only_loss": False, "max_grad_norm": 0.5},
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
            {"target_every": 3, "max_steps": 5, "pad_to_multiple_of": 16},
        ],
        ids=["completions", "everything", "accumulated", "reused"],
    )
    @pytest.mark.parametrize("adapted", [False, True], ids=["full", "LoRA"])
    def test_equals_a_loop_over_examples(self, adapted, changes, tiny_llama, tokenizer, tmp_path):
        targets = {"one": pairs(3, seed=1), "two": pairs(2, seed=2)}
        trainer = watched(FINETrainer)(
            tiny_llama,
            configured(tmp_path, **changes),
            train_dataset=pairs(),
            target_dataset=targets,
            processing_class=tokenizer,
            peft_config=lora() if adapted else None,
        )
        trainer.train()
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
        trainer = watched(FINETrainer)(
            tiny_llama,
            configured(tmp_path),
            train_dataset=pairs(),
            target_dataset=as_messages(pairs(3, seed=1)),
            processing_class=tokenizer,
        )
        trainer.train()
        assert agrees(observations(trainer), Brute(trainer).observed(list(trainer.target_sets.values())))

    def test_self(self, tiny_llama, tokenizer, tmp_path):
        trainer = watched(FINETrainer)(
            tiny_llama,
            configured(tmp_path),
            train_dataset=pairs(),
            target="self",
            processing_class=tokenizer,
            peft_config=lora(),
        )
        trainer.train()
        brute, seen = Brute(trainer), observations(trainer)
        for number, step in enumerate(trainer.steps):
            rows, _, gradients, factor = brute.step(step)
            own = factor * gradients.square().sum(1)
            assert seen.example[seen.step == number].tolist() == rows
            np.testing.assert_allclose(seen.value[seen.step == number, 0], own.numpy(), rtol=2e-3)

    def test_propagated_is_nearly_in_run_in_the_last_step(self, tiny_llama, tokenizer, tmp_path):
        """Nothing is left to wash out what the last step did: −⟨λ, ∇ℓ_i⟩ at the end, η⟨∇ℓ_c, ∇ℓ_i⟩ in the step."""
        trainers = {}
        for observation in ("in_run", "propagated"):
            trainers[observation] = FINETrainer(
                copy.deepcopy(tiny_llama),
                configured(tmp_path / observation, observation=observation, target_window=0.0, learning_rate=1e-6),
                train_dataset=pairs(),
                target_dataset=pairs(3, seed=1),
                processing_class=tokenizer,
                peft_config=lora(),
            )
            trainers[observation].train()
        first, second = (observations(trainer) for trainer in trainers.values())
        assert first.example.tolist() == second.example.tolist()
        np.testing.assert_allclose(first.value, second.value, rtol=0.02, atol=0.002 * np.abs(first.value).max())


class TestSampleIds:
    def run(self, model, tokenizer, folder, rows, *, target=None, **changes):
        trainer = watched(FINETrainer)(
            model,
            configured(folder, **changes),
            train_dataset=rows,
            target_dataset=pairs(3, seed=1) if target is None else target,
            processing_class=tokenizer,
        )
        trainer.train()
        return trainer

    def ids_of(self, trainer, rows, tokenizer):
        """By what the rows became: ids of the rows of the prepared training set, found by their tokens."""
        by_tokens = {
            tuple(tokenizer(row["prompt"] + row["completion"] + "</s>")["input_ids"]): row["id"] for row in rows
        }
        assert len(by_tokens) == len(rows)
        return [by_tokens[tuple(ids)] for ids in trainer.train_dataset["input_ids"]]

    def test_rows_that_are_dropped(self, tiny_llama, tokenizer, tmp_path):
        """TRL drops rows of which truncation leaves nothing that counts."""
        rows = pairs()
        long = {"id": "long", "prompt": "Paris is the capital " * 30, "completion": " yes"}
        rows = Dataset.from_list([*list(rows)[:4], long, *list(rows)[4:]])
        trainer = self.run(tiny_llama, tokenizer, tmp_path, rows, max_length=50, max_steps=6)
        assert len(trainer.train_dataset) == 10
        assert trainer.sample_ids == [f"pair {row}" for row in range(10)]
        assert trainer.sample_ids == self.ids_of(trainer, [row for row in rows if row["id"] != "long"], tokenizer)
        assert set(trainer.influence.dataset["sample_id"]) == set(trainer.sample_ids)

    def test_rows_that_are_shuffled(self, tiny_llama, tokenizer, tmp_path):
        trainer = self.run(tiny_llama, tokenizer, tmp_path, pairs(), shuffle_dataset=True)
        assert trainer.sample_ids != [f"pair {row}" for row in range(10)]
        assert trainer.sample_ids == self.ids_of(trainer, pairs(), tokenizer)
        assert agrees(observations(trainer), Brute(trainer).observed(list(trainer.target_sets.values())))

    @pytest.mark.parametrize("column", ["id", "name"])
    def test_columns(self, column, tiny_llama, tokenizer, tmp_path):
        rows = pairs(ids=[50 - 3 * row for row in range(10)]).add_column("name", [f"n{row}" for row in range(10)])
        trainer = self.run(tiny_llama, tokenizer, tmp_path, rows, id_column=column)
        assert trainer.influence.dataset["sample_id"][:] == rows[column][:]

    def test_a_column_that_is_not_there(self, tiny_llama, tokenizer, tmp_path):
        with pytest.raises(ValueError, match="^id_column: 'none' is not in the training set"):
            self.run(tiny_llama, tokenizer, tmp_path, pairs(), id_column="none")

    def test_tokens_that_were_made_before(self, tiny_llama, tokenizer, tmp_path):
        rows = Dataset.from_list([
            {"id": row["id"], "input_ids": tokenizer(row["prompt"] + row["completion"])["input_ids"]} for row in pairs()
        ])  # fmt: skip
        trainer = self.run(tiny_llama, tokenizer, tmp_path, rows, target=rows.select(range(2)))
        assert trainer.sample_ids == [f"pair {row}" for row in range(10)]

    @pytest.mark.parametrize("observation", ["in_run", "propagated"])
    def test_the_top_example_is_the_one_that_is_the_target(self, observation, tiny_llama, tokenizer, tmp_path):
        """It is named by its id, though rows before it are dropped and the rest is shuffled."""
        rows = list(pairs(16))
        rows.insert(2, {"id": "long", "prompt": "Paris is the capital " * 30, "completion": " yes"})
        planted = {"id": "planted", "prompt": "Where?", "completion": " zzz qqq xxx"}
        rows.insert(6, planted)
        trainer = self.run(
            tiny_llama, tokenizer, tmp_path, Dataset.from_list(rows), target=Dataset.from_list([planted]), max_length=50,
            shuffle_dataset=True, max_steps=17, observation=observation,
        )  # fmt: skip
        top = trainer.influence.top(3)
        assert top["sample_id"][0] == "planted"
        assert top["mu"][0] > 0
        assert "long" not in trainer.influence.dataset["sample_id"]


class TestRefused:
    def refused(self, match, model, tokenizer, folder, *, rows=None, target=None, **changes):
        before = state(model)
        args = configured(folder, **changes)
        with pytest.raises(ValueError, match=match) as error:
            FINETrainer(
                model,
                args,
                train_dataset=pairs() if rows is None else rows,
                target_dataset=pairs(2, seed=1) if target is None else target,
                processing_class=tokenizer,
            )
        assert "\n" not in str(error.value)
        assert same(state(model), before)
        assert not list(folder.rglob("*.arrow"))

    def test_targets_of_which_nothing_is_left(self, tiny_llama, tokenizer, tmp_path):
        long = Dataset.from_list([{"prompt": "Paris is the capital " * 30, "completion": " yes"}])
        self.refused(
            "^max_length=50: leaves no example of target 'a'", tiny_llama, tokenizer, tmp_path, target={"a": long},
            max_length=50,
        )  # fmt: skip

    def test_ids_that_occur_twice(self, tiny_llama, tokenizer, tmp_path):
        rows = pairs(3, ids=["a", "b", "a"])
        self.refused("^train_dataset: id 'a' occurs twice", tiny_llama, tokenizer, tmp_path, rows=rows)

    def test_a_list_of_rows(self, tiny_llama, tokenizer, tmp_path):
        self.refused("^train_dataset: list is not a", tiny_llama, tokenizer, tmp_path, rows=list(pairs()))

    def test_a_column_of_the_trainers_name(self, tiny_llama, tokenizer, tmp_path):
        rows = pairs().add_column(ROW, list(range(10)))
        self.refused(f"^train_dataset: column '{ROW}'", tiny_llama, tokenizer, tmp_path, rows=rows)

    def test_another_loss(self, tiny_llama, tokenizer, tmp_path):
        trainer = FINETrainer(
            tiny_llama,
            configured(tmp_path, loss_type="dft"),
            train_dataset=pairs(),
            target_dataset=pairs(2, seed=1),
            processing_class=tokenizer,
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
            trainer = trainer_class(
                copy.deepcopy(tiny_llama),
                configured(folder, observation=observation, save_strategy="steps", save_steps=2, max_steps=5),
                train_dataset=pairs(),
                target_dataset=pairs(2, seed=1),
                processing_class=tokenizer,
                peft_config=lora(dropout=0.2),
            )
            trainer.train(resume_from_checkpoint=resume)
            return state(trainer.model), observations(trainer)

        weights, seen = run(tmp_path / "calm")
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", Stops)
        resumed_weights, resumed = run(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-2"))
        assert same(weights, resumed_weights)
        assert seen.steps.step.tolist() == [0, 1, 2, 3, 4]
        for name in ("step", "example", "weight", "value"):
            assert np.array_equal(getattr(seen, name), getattr(resumed, name))
        assert resumed.sample_ids.tolist() == [f"pair {row}" for row in range(10)]
