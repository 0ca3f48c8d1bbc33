"""Features of the stock trainers, in trainers whose batches have two parts and whose losses are their own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from image_data import arguments, distance, images, same, weights
from language_data import KEPT, TEXTS, masked, nll, padding, settings
from transformers import GPT2Config, GPT2ForSequenceClassification, MixtralConfig, MixtralForCausalLM
from transformers.trainer_utils import HPSearchBackend

from hf_unlearn import UnlearnSFTConfig, UnlearnSFTTrainer, UnlearnTrainer
from hf_unlearn.metrics.classification import Accuracy


def as_text(texts):
    return Dataset.from_list([{"id": text, "text": text} for text in texts])


class Keeper(UnlearnTrainer):
    """Keeps every batch that a step is made of."""

    kept = ()

    def compute_loss(self, model, inputs, **kwargs):
        self.kept = [*self.kept, inputs]
        return super().compute_loss(model, inputs, **kwargs)


class TestBatchesOfTwoParts:
    @pytest.mark.parametrize("kind", ["tokens", "raw"])
    def test_grouped_by_the_length_of_the_forget_rows_and_every_token_counted(
        self, kind, request, tokenizer, tmp_path
    ):
        """Of a set of 32, stock Trainer sorts every eight rows by length, but for the first, and cuts batches of two."""
        lengths = torch.randperm(32, generator=torch.Generator().manual_seed(0)).tolist()
        texts = ["a" + "z" * length for length in lengths]
        how = {"train_sampling_strategy": "group_by_length", "include_num_input_tokens_seen": "non_padding"}
        how |= {"per_device_train_batch_size": 2, "max_steps": 16, "learning_rate": 1e-4}
        if kind == "tokens":
            rows = {"forget_dataset": masked(texts, tokenizer, 0), "retain_dataset": masked(KEPT, tokenizer, 1)}
            model, args, collator = (
                request.getfixturevalue("tiny_llama"),
                settings(tmp_path, **how),
                padding(tokenizer),
            )
        else:
            rows = {"forget_dataset": as_text(texts).add_column("label", [1] * 32)}
            model, args, collator = request.getfixturevalue("tiny_bert"), arguments(tmp_path, **how), None
        trainer = Keeper(model, args, collator, processing_class=tokenizer, **rows)
        trainer.train()
        seen = torch.cat([batch["forget"]["attention_mask"].sum(1) for batch in trainer.kept]).view(4, 8)
        assert sorted(seen.flatten().tolist()) == list(range(1, 33))
        assert torch.equal(seen[:, 1:], seen[:, 1:].sort(1, descending=True).values)
        parts = [part for batch in trainer.kept for part in batch.values()]
        assert trainer.state.num_input_tokens_seen == sum(part["attention_mask"].sum().item() for part in parts)

    def test_tokens_of_training_are_logged_as_by_sft_trainer(self, tiny_llama, tokenizer, tmp_path):
        trainer = UnlearnSFTTrainer(
            tiny_llama, settings(tmp_path, UnlearnSFTConfig), processing_class=tokenizer, forget_dataset=as_text(TEXTS)
        )
        trainer.train()
        tokens = sum(len(tokenizer(text + "</s>")["input_ids"]) for text in TEXTS)
        assert [log["num_tokens"] for log in trainer.state.log_history[:2]] == [tokens, 2 * tokens]


def mixtral(tokenizer, **values):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=4, initializer_range=0.2, pad_token_id=0, **values,
        )  # fmt: skip
        return MixtralForCausalLM(config)


def balance(model, tokenizer, texts):
    """The load-balancing loss of a batch, as the model itself computes it."""
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        return copy.deepcopy(model).eval()(**batch, output_router_logits=True).aux_loss.item()


class TestMixtureOfExperts:
    @pytest.mark.parametrize("kind", ["sft", "stock"])
    def test_balance_counts_in_training_as_in_evaluation(self, kind, tokenizer, tmp_path):
        """`forget + retain + coefficient · mean of both passes' balance`, and evaluation adds it to the task's loss."""
        given, ends = {"logging_steps": 1, "max_steps": 1, "learning_rate": 0.05}, {}
        for coefficient in (0.0, 5.0):
            if kind == "sft":
                model = mixtral(tokenizer)
                args = settings(tmp_path, UnlearnSFTConfig, router_aux_loss_coef=coefficient, **given)
                rows = [as_text(texts) for texts in (TEXTS, KEPT)]
                texts, trainer_class, more = (
                    [[t + "</s>" for t in part] for part in (TEXTS, KEPT)],
                    UnlearnSFTTrainer,
                    {},
                )
            else:
                model = mixtral(tokenizer, output_router_logits=coefficient > 0, router_aux_loss_coef=coefficient)
                args, rows = settings(tmp_path, **given), [masked(texts, tokenizer, 0) for texts in (TEXTS, KEPT)]
                texts, trainer_class, more = (TEXTS, KEPT), UnlearnTrainer, {"data_collator": padding(tokenizer)}
            expected = sum(balance(model, tokenizer, part) for part in texts) / 2
            trainer = trainer_class(
                model, args, forget_dataset=rows[0], retain_dataset=rows[1], processing_class=tokenizer, **more
            )
            trainer.train()
            log = trainer.state.log_history[0]
            assert log["loss"] == pytest.approx(
                log["forget_loss"] + log["retain_loss"] + coefficient * expected, rel=1e-4
            )
            assert ("router_loss" in log) == (coefficient > 0)
            ends[coefficient] = weights(model)
            loss = trainer.evaluate(rows[1])["eval_loss"]
            parts = [tokenizer(text, return_tensors="pt")["input_ids"][0] for text in texts[1]]
            with torch.no_grad():
                total = sum(nll(model.eval(), ids, ids, "sum").item() for ids in parts) / sum(
                    len(ids) - 1 for ids in parts
                )
            assert loss == pytest.approx(total + coefficient * balance(model, tokenizer, texts[1]), rel=1e-3)
        assert distance(ends[0.0], ends[5.0]) > 1e-3


def test_noise_on_embeddings_reaches_the_student_alone(tiny_llama, tokenizer, tmp_path):
    """NEFTune: the original answers as it would without."""
    original, losses = copy.deepcopy(tiny_llama), {}

    class Watched(UnlearnTrainer):
        def reference_forward(self, **inputs):
            outputs = super().reference_forward(**inputs)
            with torch.no_grad():
                found, whole = (logits.flatten(0, 1) for logits in (outputs.logits, original(**inputs).logits))
                assert len(found) <= len(whole)  # where they are read
                assert torch.cdist(found, whole, compute_mode="donot_use_mm_for_euclid_dist").amin(1).max() < 1e-4
            losses["asked"] = True
            return outputs

    for alpha in (None, 5.0):
        args = settings(tmp_path, neftune_noise_alpha=alpha, learning_rate=0.0, max_steps=1)
        trainer = Watched(
            copy.deepcopy(tiny_llama), args, padding(tokenizer), forget_dataset=masked(TEXTS, tokenizer),
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        losses[alpha] = trainer.state.log_history[0]["loss"]
    assert losses["asked"]
    assert losses[5.0] != pytest.approx(losses[None], rel=1e-3)
    assert trainer.evaluate(masked(TEXTS, tokenizer))["eval_loss"] == pytest.approx(
        Watched(original, args, padding(tokenizer), eval_dataset=masked(TEXTS, tokenizer)).evaluate()["eval_loss"]
    )


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_answer_to_nothing(kind, tiny_llama, tokenizer, tmp_path):
    """Prompt and prefix tuning: the loss of the words, with what comes before them."""
    from peft import PrefixTuningConfig, PromptTuningConfig

    made = (PromptTuningConfig if kind == "prompt" else PrefixTuningConfig)(
        num_virtual_tokens=3, task_type="CAUSAL_LM"
    )
    args = settings(
        tmp_path, UnlearnSFTConfig, merge_adapter=False, gradient_checkpointing=False, replay_weight=1.0, guard=True,
        utility_tolerance=9.0,
    )  # fmt: skip
    trainer = UnlearnSFTTrainer(
        tiny_llama, args, processing_class=tokenizer, forget_dataset=as_text(TEXTS), peft_config=made
    )
    (batch,) = trainer._batches(trainer.forget_dataset, None)
    losses = trainer.task_loss(trainer.model.eval(), batch)
    for text, loss in zip(TEXTS, losses, strict=True):
        ids = tokenizer(text + "</s>", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = trainer.model(input_ids=ids).logits[0, -ids.shape[1] :]
        assert loss.item() == pytest.approx(F.cross_entropy(logits[:-1], ids[0, 1:]).item(), rel=1e-4)
    before = weights(trainer.model)
    trainer.train()
    assert distance(before, weights(trainer.model)) > 0


class TestEvaluateOnly:
    def test_classifier(self, tiny_resnet, tmp_path):
        parts = {"forget": images(4, [3]), "retain": images(6, [0, 1], seed=1)}
        trainer = UnlearnTrainer(tiny_resnet, arguments(tmp_path), None, None, parts)
        assert set(trainer.evaluate()) >= {"eval_forget_accuracy", "eval_retain_accuracy"}
        predicted = UnlearnTrainer(tiny_resnet, arguments(tmp_path)).predict(parts["retain"]).predictions
        torch.testing.assert_close(
            torch.tensor(predicted), tiny_resnet(pixel_values=parts["retain"]["pixel_values"][:]).logits.detach()
        )
        for call in (trainer.train, trainer.save_model):
            with pytest.raises(ValueError, match="^forget_dataset: missing"):
                call()
        assert not list(tmp_path.iterdir())

    def test_language_model(self, tiny_llama, tokenizer, tmp_path):
        rows = Dataset.from_list([{"prompt": "Who is Rome?", "completion": " The capital"}])
        losses = []
        for forget in (None, rows):
            trainer = UnlearnSFTTrainer(
                tiny_llama, settings(tmp_path, UnlearnSFTConfig), eval_dataset={"test": rows}, processing_class=tokenizer,
                forget_dataset=forget,
            )  # fmt: skip
            losses += [trainer.evaluate()["eval_test_loss"], trainer.evaluate(rows)["eval_loss"]]
        assert losses == pytest.approx(losses[:1] * 4)


def test_a_pad_token_that_only_the_tokenizer_knows(tokenizer, tmp_path):
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1, num_labels=3)
    rows = as_text(TEXTS).add_column("label", [1] * 4)
    heldout = as_text(KEPT).add_column("label", [1] * 4)
    args = arguments(tmp_path, forget="examples", max_steps=1)
    model = GPT2ForSequenceClassification(config)
    trainer = UnlearnTrainer(
        model, args, forget_dataset=rows, heldout_dataset=heldout, processing_class=tokenizer, eval_dataset=rows
    )
    trainer.evaluate()
    trainer.train()
    assert model.config.pad_token_id == tokenizer.pad_token_id


class TestModelInit:
    def test_every_run_begins_with_a_new_model_and_its_own_reference(self, tiny_vit, tmp_path):
        args = arguments(tmp_path, isotropic_weight=0.5, guard=True, utility_tolerance=1e9)
        plain = UnlearnTrainer(copy.deepcopy(tiny_vit), args, forget_dataset=images(8, [3]))
        plain.train()
        trainer = UnlearnTrainer(None, args, model_init=lambda: copy.deepcopy(tiny_vit), forget_dataset=images(8, [3]))
        for _ in range(2):
            trainer.train()
            assert same(weights(trainer.model), weights(plain.model))
            assert all(torch.equal(v, tiny_vit.state_dict()[k]) for k, v in trainer.reference.parameters.items())
            assert len(trainer.guard.looks) == len(plain.guard.looks)

    def test_a_search_makes_a_model_for_each_trial(self, tiny_vit, tmp_path):
        class Trial:  # of a search library
            def __init__(self, number, value):
                self.number, self.params = number, value

        def made(trial):
            model = copy.deepcopy(tiny_vit)
            if trial is not None:
                model.classifier.bias.data.fill_(float(trial.number))
            return model

        trainer = UnlearnTrainer(model_init=made, args=arguments(tmp_path), forget_dataset=images(8, [3]))
        trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: trial.params
        trainer.train()
        for number in (1, 2):
            trainer._new_model(Trial(number, {"isotropic_weight": 0.25 * number}))
            assert trainer.model.classifier.bias.eq(number).all()
            assert (trainer.args.isotropic_weight, trainer.reference, trainer.anchor) == (0.25 * number, None, None)


class OutOfMemory(UnlearnTrainer):
    """At the third step with more than five rows."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step == 2 and len(inputs["forget"]["labels"]) > 5:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return super().training_step(model, inputs, num_items_in_batch)


def test_a_smaller_batch_begins_again_from_the_original(tiny_vit, tmp_path):
    ends = []
    for size, trainer_class in ((6, OutOfMemory), (5, UnlearnTrainer)):
        model = copy.deepcopy(tiny_vit)
        args = arguments(
            tmp_path / str(size), per_device_train_batch_size=size, auto_find_batch_size=True, max_steps=4, guard=True,
            guard_steps=1, utility_tolerance=1e9, optim="adamw_torch", learning_rate=1e-3, forget_loss="redirect",
        )  # fmt: skip
        trainer = trainer_class(model, args, forget_dataset=images(30, [3]))
        torch.manual_seed(0)
        trainer.train()
        ends.append(trainer)
    assert [look.step for look in ends[0].guard.looks] == [look.step for look in ends[1].guard.looks]
    assert ends[0].guard.looks[0] == ends[1].guard.looks[0]
    assert {int(state["step"]) for state in ends[0].optimizer.optimizer.state.values()} == {4}
    way = distance(weights(tiny_vit), weights(ends[1].model))
    assert distance(weights(ends[0].model), weights(ends[1].model)) < 0.5 * way  # other batches, the same beginning


def test_the_best_checkpoint_without_a_guard(tiny_vit, tmp_path):
    args = arguments(
        tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        metric_for_best_model="eval_loss", greater_is_better=False, learning_rate=0.05, forget_loss="redirect",
    )  # fmt: skip
    seen = {}

    class Watched(UnlearnTrainer):
        def _save_checkpoint(self, model, trial):
            seen[self.state.global_step] = weights(self.model)
            super()._save_checkpoint(model, trial)

    trainer = Watched(tiny_vit, args, forget_dataset=images(8, [3]), eval_dataset=images(8, [3]))
    trainer.train()
    best = trainer.state.best_global_step
    assert best == 1  # what is being forgotten gets worse
    assert same(weights(trainer.model), seen[best])
    assert trainer.provenance().steps == best


class TestNothingToLearn:
    def test_no_parameter_takes_part(self, tiny_bert, tokenizer, tmp_path):
        tiny_bert.requires_grad_(False)
        tiny_bert.unused = torch.nn.Linear(2, 2)
        rows = as_text(TEXTS).add_column("label", [1] * 4)
        for guard in (False, True):
            trainer = UnlearnTrainer(
                tiny_bert, arguments(tmp_path, guard=guard), forget_dataset=rows, processing_class=tokenizer
            )
            with pytest.raises(ValueError, match="^model: none of its trainable parameters takes part in the loss"):
                trainer.train()

    def test_a_loss_that_reaches_none_of_them(self, tiny_vit, tmp_path):
        class Elsewhere(UnlearnTrainer):
            def forget_loss(self, model, batch):
                return torch.ones((), requires_grad=True)

        trainer = Elsewhere(tiny_vit, arguments(tmp_path, guard=True), forget_dataset=images(4, [3]))
        with pytest.raises(ValueError, match="^model: none of its trainable parameters takes part in the loss"):
            trainer.train()


def test_accuracy_of_a_whole_and_of_batches():
    logits, labels = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 4
    expected = (logits.argmax(-1) == labels).float().mean().item()

    class Evaluation:
        def __init__(self, predictions, label_ids):
            self.predictions, self.label_ids = predictions, label_ids

    metric, pieces = Accuracy(), [slice(0, 4), slice(4, 8), slice(8, 10)]
    for _ in range(2):  # nothing is left of an earlier evaluation
        assert metric(Evaluation(logits.numpy(), labels.numpy()))["accuracy"] == pytest.approx(expected)
        lists = [[part[piece].numpy() for piece in pieces] for part in (logits, labels)]
        assert metric(Evaluation(*lists))["accuracy"] == pytest.approx(expected)
        for piece in pieces:
            result = metric(Evaluation((logits[piece],), labels[piece]), compute_result=piece is pieces[-1])
        assert result["accuracy"] == pytest.approx(expected)
