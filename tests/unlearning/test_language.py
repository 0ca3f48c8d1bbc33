"""Causal language models and text classifiers under `UnlearnTrainer`, against plain torch on one text at a time."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_unlearn import UnlearnConfig, UnlearnTrainer


TEXTS = ["The quick fox.", "Paris is the capital of France.", "My order never", "Please tell me how I can return it"]
KEPT = ["Rome is the capital.", "the lazy dog jumps over the phone", "and keep the other ones", "shoes"]
RATES = {"npo": 0.05, "ascent": 0.05, "uniform": 0.05, "redirect": 3.0, "match": 0.05}  # of steps that are felt
BETA, HELDOUT = 0.3, 3.0


def settings(folder, **changes):
    """Two plain SGD steps over all rows at once, with nothing but the losses."""
    plain = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "forget": "examples",
        "npo_beta": BETA,
        "isotropic_weight": 0.0,
        "replay_weight": 0.0,
        "guard": False,
    }
    return UnlearnConfig(str(folder), **plain | changes)


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


@pytest.fixture(params=["tiny_llama", "tiny_gpt2", "tied"])
def model(request):
    if request.param != "tied":
        return without_dropout(request.getfixturevalue(request.param))
    config = request.getfixturevalue("tiny_llama").config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


# The same in plain torch: one text at a time, no padding, no mask


def rows_of(batch):
    columns = batch["input_ids"], batch["labels"], batch["attention_mask"].bool()
    return [(ids[real], labels[real]) for ids, labels, real in zip(*columns, strict=True)]


def log_probabilities(model, ids):
    return model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)


def plain_forget(name, model, original, rows):
    values, nlls = [], []
    for ids, labels in rows:
        places = [place for place in range(len(ids) - 1) if labels[place + 1] != -100]
        log_p = log_probabilities(model, ids)[places]
        with torch.no_grad():
            log_q = log_probabilities(original, ids)[places]
        tokens = ids[1:][places]
        here = torch.arange(len(places))
        log_pi, log_ref = log_p[here, tokens].sum(), log_q[here, tokens].sum()
        nlls.append(-log_pi / len(places))
        if name == "npo":
            values.append(2 / BETA * torch.log(1 + (log_pi - log_ref).exp() ** BETA))
        elif name == "ascent":
            values.append(log_pi / len(places))
        elif name == "uniform":
            classes = log_p.shape[-1]
            values.append(sum((math.log(1 / classes) - row).sum() / classes for row in log_p) / len(places))
        elif name == "redirect":
            q = log_q.exp()
            q[here, tokens] = 0
            values.append(-(q / q.sum(-1, keepdim=True) * log_p).sum() / len(places))
    return (sum(nlls) / len(nlls) - HELDOUT).abs() if name == "match" else sum(values) / len(values)


def plain_retain(model, rows):
    losses = [F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], labels[1:]) for ids, labels in rows]
    return sum(losses) / len(losses)


def plain_replay(model, original, rows):
    values = []
    for ids, _ in rows:
        with torch.no_grad():
            q = log_probabilities(original, ids).exp()
        values.append((q * (q.log() - log_probabilities(model, ids))).sum(-1).mean())
    return sum(values) / len(values)


class Recording(UnlearnTrainer):
    """Keeps the replay inputs that the trainer drew."""

    def replay_inputs(self, batch, generator):
        replayed = super().replay_inputs(batch, generator)
        self.replayed = [*getattr(self, "replayed", []), (dict(batch), dict(replayed))]
        return replayed


class TestAgainstPlainTorch:
    @pytest.mark.parametrize("name", RATES)
    @pytest.mark.parametrize("retained", [False, True], ids=["replay", "retain"])
    def test_two_steps(self, name, retained, model, tokenizer, tmp_path):
        forget, retain = masked(TEXTS, tokenizer), masked(KEPT, tokenizer, prompt=0)
        original, student = copy.deepcopy(model), copy.deepcopy(model)
        weights = {"forget_weight": 0.7, "learning_rate": RATES[name]} | (
            {"retain_weight": 0.6} if retained else {"replay_weight": 3.0}
        )
        trainer = Recording(
            model,
            args=settings(tmp_path, forget_loss=name, heldout_loss=HELDOUT if name == "match" else None, **weights),
            data_collator=padding(tokenizer),
            forget_dataset=forget,
            retain_dataset=retain if retained else None,
        )
        trainer.train()

        optimizer = torch.optim.SGD(student.parameters(), lr=RATES[name])
        collate = padding(tokenizer)
        forget, retain = (rows_of(collate([dict(r) for r in rows])) for rows in (forget, retain))
        for step in range(2):
            logged = trainer.state.log_history[step]
            forget_loss = plain_forget(name, student, original, forget)
            loss = 0.7 * forget_loss
            if retained:
                retain_loss = plain_retain(student, retain)
                loss = loss + 0.6 * retain_loss
                assert logged["retain_loss"] == pytest.approx(retain_loss.item(), rel=1e-4)
            else:
                replay_loss = plain_replay(student, original, rows_of(trainer.replayed[step][1]))
                loss = loss + 3 * replay_loss
                assert logged["replay_loss"] == pytest.approx(replay_loss.item(), rel=1e-3, abs=1e-6)
                assert (replay_loss > 1e-5) == (step == 1)
            assert logged["forget_loss"] == pytest.approx(forget_loss.item(), rel=1e-4)
            assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for (key, actual), expected in zip(model.named_parameters(), student.parameters(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5, msg=key)

    def test_the_collator_for_language_modeling(self, tiny_llama, tokenizer, tmp_path):
        """Labels made by the collator, padded on the left, in two accumulated micro-batches of unlike lengths."""
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.padding_side = "left"
        student, original = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
        rows = Dataset.from_list([dict(tokenizer(text)) for text in TEXTS])
        args = settings(
            tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1, learning_rate=0.01
        )
        trainer = UnlearnTrainer(
            tiny_llama,
            args=args,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            forget_dataset=rows,
        )
        trainer.train()
        loss = plain_forget("npo", student, original, [(torch.tensor(row["input_ids"]),) * 2 for row in rows])
        loss.backward()
        for (key, actual), expected in zip(tiny_llama.named_parameters(), student.parameters(), strict=True):
            torch.testing.assert_close(actual, expected - 0.01 * expected.grad, rtol=1e-4, atol=2e-5, msg=key)

    def test_the_original_answers_without_dropout(self, tiny_gpt2, tokenizer, tmp_path):
        original = copy.deepcopy(tiny_gpt2).eval()
        trainer = UnlearnTrainer(
            tiny_gpt2,
            args=settings(tmp_path),
            data_collator=padding(tokenizer),
            forget_dataset=masked(TEXTS, tokenizer),
        )
        trainer.train()
        inputs = tokenizer(TEXTS[0], return_tensors="pt")
        tiny_gpt2.train()
        with torch.no_grad():
            assert not torch.equal(tiny_gpt2(**inputs).logits, tiny_gpt2(**inputs).logits)
        assert torch.equal(trainer.reference_forward(**inputs).logits, original(**inputs).logits)
        assert tiny_gpt2.training

    def test_tied_embeddings_stay_tied_and_load(self, model, tokenizer, tmp_path):
        trainer = UnlearnTrainer(
            model,
            args=settings(tmp_path, isotropic_weight=0.1),
            data_collator=padding(tokenizer),
            forget_dataset=masked(TEXTS, tokenizer),
            processing_class=tokenizer,
        )
        trainer.train()
        trainer.save_model()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
        assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert tied == bool(model.config.tie_word_embeddings)
        names = [name for name, _ in model.named_parameters()]
        assert sorted(trainer.reference.parameters) == sorted(names)


class TestInvariance:
    @pytest.fixture
    def trainer(self, tiny_llama, tokenizer, tmp_path):
        args = settings(tmp_path, max_steps=1, learning_rate=0.2)
        trainer = UnlearnTrainer(
            tiny_llama, args=args, data_collator=padding(tokenizer), forget_dataset=masked(TEXTS, tokenizer)
        )
        trainer.train()  # so that the model is not its own reference
        trainer.model.eval()
        return trainer

    @pytest.mark.parametrize("side", ["right", "left"])
    @pytest.mark.parametrize("name", ["task_loss", "replay_loss", "npo", "uniform", "redirect"])
    def test_of_every_example_to_batch_and_padding(self, name, side, trainer, tokenizer):
        def values(rows, **kwargs):
            batch = padding(tokenizer, side, **kwargs)([dict(row) for row in rows])
            if name in ("task_loss", "replay_loss"):
                return getattr(trainer, name)(trainer.model, batch)
            trainer.forget_loss_name = name
            return trainer.forget_loss(trainer.model, batch)

        rows = list(masked(TEXTS, tokenizer))
        alone = torch.cat([values([row]) for row in rows])
        assert alone.std() > 0.01 * alone.mean().abs()
        torch.testing.assert_close(values(rows), alone, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(values(rows[::-1]), alone.flip(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(values(rows, pad_to_multiple_of=32), alone, rtol=1e-4, atol=1e-6)


class TestReplay:
    @pytest.mark.parametrize("side", ["right", "left"])
    def test_keeps_length_first_token_padding_and_special_tokens(self, side, tiny_llama, tokenizer, tmp_path):
        texts = ["<s>" + text + "</s>" for text in (*TEXTS, *KEPT)]
        trainer = Recording(
            tiny_llama,
            args=settings(tmp_path, replay_weight=1.0, max_steps=6, per_device_train_batch_size=8),
            data_collator=padding(tokenizer, side),
            forget_dataset=masked(texts, tokenizer),
            processing_class=tokenizer,
        )
        assert set(range(len(tokenizer))) - set(trainer._vocabulary.tolist()) == {0, 1, 2}
        trainer.train()
        drawn = []
        for before, after in trainer.replayed:
            ids, new = before["input_ids"], after["input_ids"]
            assert torch.equal(before["attention_mask"], after["attention_mask"])
            special = ids <= 2
            assert torch.equal(special, new <= 2)
            assert torch.equal(ids[special], new[special])
            assert ((ids != new).sum(1) > 1).sum() >= 6
            drawn.append(new)
        assert (before["attention_mask"] == 0).any()
        assert len({tuple(ids.flatten().tolist()) for ids in drawn}) == 6  # other ones at every step

    def test_a_text_that_begins_at_once_keeps_its_first_token(self, tiny_llama, tokenizer, tmp_path):
        trainer = Recording(
            tiny_llama,
            args=settings(tmp_path, replay_weight=1.0),
            data_collator=padding(tokenizer, "left"),
            forget_dataset=masked(TEXTS, tokenizer),
        )
        trainer.train()
        for before, after in trainer.replayed:
            first = before["attention_mask"].argmax(1, keepdim=True)
            assert torch.equal(before["input_ids"].gather(1, first), after["input_ids"].gather(1, first))

    def test_special_tokens_of_the_config_are_not_drawn(self, tiny_llama, tokenizer, tmp_path):
        tiny_llama.config.eos_token_id = [2, 7]
        tiny_llama.config.pad_token_id = 9
        trainer = UnlearnTrainer(tiny_llama, args=settings(tmp_path), forget_dataset=masked(TEXTS, tokenizer))
        assert set(range(300)) - set(trainer._vocabulary.tolist()) == {1, 2, 7, 9}

    def test_is_off_with_retain_data_and_on_without(self, tiny_llama, tokenizer, tmp_path):
        rows = masked(TEXTS, tokenizer)
        for retain, weight in ((None, 1.0), (rows, 0.0)):
            args = settings(tmp_path, replay_weight=None)
            trainer = UnlearnTrainer(tiny_llama, args=args, forget_dataset=rows, retain_dataset=retain)
            assert trainer.replay_weight == weight


class TestFisherAnchor:
    def test_estimates_the_sum_over_all_tokens_and_the_vocabulary(self, tmp_path):
        """Rows of unlike lengths, so that padding and masks are there, on a vocabulary small enough to sum over."""
        config = LlamaConfig(
            vocab_size=7,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
        )
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        texts = [[1, 2, 3, 4, 5], [6, 5, 4], [3, 3, 1, 6]]
        expected = dict.fromkeys(dict(model.named_parameters()), 0.0)
        for ids in texts:
            logits = log_probabilities(model, torch.tensor(ids))
            for token in logits[1:]:  # the first prediction is masked below
                for log_p in token:
                    gradients = torch.autograd.grad(log_p, list(model.parameters()), retain_graph=True)
                    for name, gradient in zip(expected, gradients, strict=True):
                        expected[name] += log_p.exp().item() * gradient.square().sum().item() / len(texts)

        def collate(rows):
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(r["input_ids"])).long() for r in rows], True)
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(r["input_ids"]) for r in rows], True)
            labels = ids.masked_fill(mask == 0, -100)
            labels[:, :2] = -100
            return {"input_ids": ids, "attention_mask": mask, "labels": labels}

        args = settings(
            tmp_path, fisher_weight=0.5, fisher="monte_carlo", fisher_samples=300, max_steps=1, learning_rate=0.0
        )
        rows = Dataset.from_dict({"input_ids": texts})
        trainer = UnlearnTrainer(model, args=args, forget_dataset=rows, data_collator=collate)
        trainer.train()
        moved = {name: p.detach() + 0.1 for name, p in model.named_parameters()}
        total = sum(expected.values()) * 0.5 * 0.1**2
        assert trainer.anchor.value(moved)["fisher"].item() == pytest.approx(total, rel=0.1)
        for parameter in moved.values():
            parameter.grad = torch.zeros_like(parameter)
        trainer.anchor.add_grad_(moved)
        for name, parameter in moved.items():
            torch.testing.assert_close(
                parameter.grad.sum().item(), 2 * 0.5 * 0.1 * expected[name], rtol=0.25, atol=1e-4, msg=name
            )

    def test_exact_is_refused_for_tokens(self, tiny_llama, tokenizer, tmp_path):
        args = settings(tmp_path, fisher_weight=1.0)
        trainer = UnlearnTrainer(
            tiny_llama, args=args, data_collator=padding(tokenizer), forget_dataset=masked(TEXTS, tokenizer)
        )
        with pytest.raises(ValueError, match="^fisher='exact' .*monte_carlo"):
            trainer.train()


class TestPrecisionAndMemory:
    def run(self, model, tokenizer, folder, **changes):
        trainer = UnlearnTrainer(
            copy.deepcopy(model),
            args=settings(folder, replay_weight=2.0, learning_rate=0.02, **changes),
            data_collator=padding(tokenizer),
            forget_dataset=masked(TEXTS, tokenizer),
        )
        trainer.train()
        return trainer

    def test_bf16_autocast_covers_the_reference_too(self, tiny_llama, tokenizer, tmp_path):
        """At θ* the model is its own reference to the last bit, which it would not be in two precisions."""
        trainer = self.run(tiny_llama, tokenizer, tmp_path, bf16=True)
        full = self.run(tiny_llama, tokenizer, tmp_path)
        first, second = trainer.state.log_history[:2]
        assert first["replay_loss"] == 0
        assert first["forget_loss"] == pytest.approx(2 / BETA * math.log(2), rel=1e-6)
        assert second["replay_loss"] > 0
        assert second["forget_loss"] == pytest.approx(full.state.log_history[1]["forget_loss"], rel=0.02)
        assert second["forget_loss"] != full.state.log_history[1]["forget_loss"]
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}

    @pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gpt2"])
    def test_activation_checkpointing_changes_nothing(self, fixture, request, tokenizer, tmp_path):
        model = request.getfixturevalue(fixture)
        plain = self.run(model, tokenizer, tmp_path)
        checkpointed = self.run(model, tokenizer, tmp_path, activation_checkpointing=True)
        assert checkpointed.model.is_gradient_checkpointing
        for key, value in plain.model.state_dict().items():
            torch.testing.assert_close(checkpointed.model.state_dict()[key], value, rtol=1e-5, atol=1e-6, msg=key)
        assert plain.state.log_history[1]["replay_loss"] > 0


class TestTextClassifier:
    SENTENCES = {0: "The quick brown fox number {}", 1: "Paris is a capital {} of", 2: "My order {} never arrived"}

    def rows(self, labels, numbers=range(12)):
        items = [{"text": self.SENTENCES[label].format(n), "label": label} for label in labels for n in numbers]
        return Dataset.from_list(items)

    @pytest.fixture
    def trained(self, tiny_bert, tokenizer):
        rows = self.rows(range(3))
        batch = tokenizer(rows["text"][:], padding=True, return_tensors="pt")
        labels = torch.tensor(rows["label"][:])
        optimizer = torch.optim.Adam(without_dropout(tiny_bert).parameters(), lr=1e-2)
        for _ in range(40):
            loss = tiny_bert(**batch, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 0.05
        return tiny_bert

    def test_forgets_a_class_from_raw_rows(self, trained, tokenizer, tmp_path):
        args = settings(
            tmp_path,
            forget="class",
            replay_weight=None,
            isotropic_weight=0.1,
            optim="adamw_torch",
            learning_rate=1e-3,
            max_steps=60,
        )
        trainer = UnlearnTrainer(
            trained,
            args=args,
            forget_dataset=self.rows([1]),
            eval_dataset={"forget": self.rows([1], range(20, 26)), "retain": self.rows([0, 2], range(20, 26))},
            processing_class=tokenizer,
        )
        assert (trainer.forget_loss_name, trainer.forgotten_classes) == ("redirect", [1])
        before = trainer.evaluate()
        assert before["eval_forget_accuracy"] == before["eval_retain_accuracy"] == 1
        trainer.train()
        after = trainer.evaluate()
        assert after["eval_forget_accuracy"] == 0
        assert after["eval_retain_accuracy"] == 1

    def test_one_step_equals_plain_torch(self, trained, tokenizer, tmp_path):
        original, student = copy.deepcopy(trained).eval(), copy.deepcopy(trained)
        rows = self.rows([1], range(4))
        args = settings(tmp_path, forget="class", max_steps=1, learning_rate=0.1)
        UnlearnTrainer(trained, args=args, forget_dataset=rows, processing_class=tokenizer).train()
        loss = 0
        for text in rows["text"]:
            inputs = tokenizer(text, return_tensors="pt")
            p = original(**inputs).logits[0].softmax(-1).detach()
            q = student(**inputs).logits[0].softmax(-1)
            loss = loss - sum(p[c] / (p[0] + p[2]) * q[c].log() for c in (0, 2)) / len(rows)
        loss.backward()
        for (key, actual), expected in zip(trained.named_parameters(), student.parameters(), strict=True):
            step = 0 if expected.grad is None else 0.1 * expected.grad
            torch.testing.assert_close(actual, expected - step, rtol=1e-4, atol=2e-5, msg=key)


class TestRefusals:
    """Each in one line that names the argument."""

    @pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gpt2"])
    def test_classes_of_a_language_model(self, fixture, request, tokenizer, tmp_path):
        rows, model = masked(TEXTS, tokenizer), request.getfixturevalue(fixture)
        with pytest.raises(ValueError, match=r"^forget='class' needs a classifier[^\n]+$"):
            UnlearnTrainer(model, args=settings(tmp_path, forget="class"), forget_dataset=rows)

    def test_batches_without_labels(self, tiny_llama, tokenizer, tmp_path):
        rows = Dataset.from_list([dict(tokenizer(text)) for text in TEXTS])
        trainer = UnlearnTrainer(
            tiny_llama,
            args=settings(tmp_path),
            data_collator=DataCollatorWithPadding(tokenizer),
            forget_dataset=rows,
        )
        before = copy.deepcopy(tiny_llama.state_dict())
        with pytest.raises(ValueError, match=r"^labels: missing in the batch[^\n]+$"):
            trainer.train()
        assert all(torch.equal(value, before[key]) for key, value in tiny_llama.state_dict().items())

    def test_inputs_without_a_known_replay(self, tiny_llama, tmp_path):
        rows = Dataset.from_list([{"inputs_embeds": [[0.1] * 16] * 4, "labels": [3, 4, 5, 6]}] * 4).with_format(
            "torch"
        )
        args = settings(tmp_path, replay_weight=1.0)
        with pytest.raises(ValueError, match=r"^replay_weight: no data-free replay is known[^\n]+$"):
            UnlearnTrainer(tiny_llama, args=args, forget_dataset=rows).train()
        UnlearnTrainer(tiny_llama, args=settings(tmp_path), forget_dataset=rows).train()

    def test_other_heads(self, tiny_bert, tokenizer, tmp_path):
        with pytest.raises(ValueError, match=r"^model: BertForMaskedLM is not supported[^\n]+$"):
            UnlearnTrainer(
                BertForMaskedLM(tiny_bert.config),
                args=settings(tmp_path),
                forget_dataset=masked(TEXTS, tokenizer),
            )

    def test_nothing_trainable(self, tiny_llama, tokenizer, tmp_path):
        with pytest.raises(ValueError, match=r"^model: none of its parameters is trainable; unfreeze[^\n]+$"):
            UnlearnTrainer(
                tiny_llama.requires_grad_(False), args=settings(tmp_path), forget_dataset=masked(TEXTS, tokenizer)
            )

    def test_match_without_a_target(self, tiny_llama, tokenizer, tmp_path):
        with pytest.raises(ValueError, match="^forget_loss='match' needs a target"):
            UnlearnTrainer(
                tiny_llama,
                args=settings(tmp_path, forget_loss="match"),
                forget_dataset=masked(TEXTS, tokenizer),
            )


class TestHeldOut:
    def test_examples_with_held_out_data_are_matched_to_it(self, tiny_llama, tokenizer, tmp_path):
        heldout = masked(KEPT, tokenizer, prompt=0)
        expected = plain_retain(
            tiny_llama, [(torch.tensor(row["input_ids"]), torch.tensor(row["labels"])) for row in heldout]
        )
        trainer = UnlearnTrainer(
            tiny_llama,
            args=settings(tmp_path, max_steps=1),
            data_collator=padding(tokenizer),
            forget_dataset=masked(TEXTS, tokenizer),
            heldout_dataset=heldout,
        )
        trainer.train()
        assert trainer.forget_loss_name == "match"
        assert trainer.heldout_loss == pytest.approx(expected.item(), rel=1e-5)
