"""Causal language models and text classifiers under `UnlearnTrainer`, against plain torch on one text at a time."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from language_data import (
    ALTERNATES,
    KEPT,
    TEXTS,
    assert_same_parameters,
    masked,
    nll,
    padding,
    settings,
    without_dropout,
)
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_unlearn import UnlearnTrainer
from hf_unlearn.unlearning.losses import divergence
from hf_unlearn.unlearning.objective import FORGET_LOSSES


RATES = {"npo": 0.05, "ascent": 0.05, "uniform": 0.05, "redirect": 3.0, "match": 0.05,
         "simnpo": 3.0, "undial": 3.0, "wga": 3.0, "satimp": 3.0, "ceu": 3.0, "dpo": 0.05, "pdu": 0.2, "rmu": 0.1}  # of steps that are felt  # fmt: skip
BETA, HELDOUT, SEED, COEFFICIENT, PDU_RATE = 0.3, 3.0, 5, 2.0, 4.0


@pytest.fixture
def model(request):
    if request.param != "tied":
        return without_dropout(request.getfixturevalue(f"tiny_{request.param}"))
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


def reduced(values, rows, reduction):
    """Means of texts, as one number."""
    counts = [sum(label != -100 for label in labels[1:]) for _, labels in rows]
    weighed = [value * count for value, count in zip(values, counts, strict=True)]
    total = {"example": values, "token": weighed, "sum": weighed}[reduction]
    return sum(total) / (sum(counts) if reduction == "token" else len(rows))


def plain_forget(name, model, original, rows, reduction="example", alternates=None, layer=0):
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
            values.append(2 / BETA * torch.log(1 + (log_pi - log_ref).exp() ** BETA) / len(places))
        elif name == "dpo":
            ids, labels = alternates[len(values)]
            with torch.no_grad():
                alternate_ref = -nll(original, ids, labels, "sum")
            gained = -nll(model, ids, labels, "sum") - alternate_ref - (log_pi - log_ref)
            values.append(-2 / BETA * torch.log(torch.sigmoid(BETA * gained)) / len(places))
        elif name == "ascent":
            values.append(log_pi / len(places))
        elif name == "uniform":
            classes = log_p.shape[-1]
            values.append(sum((math.log(1 / classes) - row).sum() / classes for row in log_p) / len(places))
        elif name == "redirect":
            q = log_q.exp()
            q[here, tokens] = 0
            values.append(-(q / q.sum(-1, keepdim=True) * log_p).sum() / len(places))
        elif name == "simnpo":
            values.append(-2 / 4.5 * torch.log(torch.sigmoid(-4.5 * log_pi / len(places))))
        elif name == "undial":
            lowered = log_q.clone()
            lowered[here, tokens] -= 10
            values.append(-(lowered.softmax(-1) * log_p).sum() / len(places))
        elif name == "wga":
            values.append((log_p[here, tokens].exp().detach() * log_p[here, tokens]).sum() / len(places))
        elif name == "satimp":
            p = log_p[here, tokens].exp().detach()
            values.append((p**5 * (1 - p) * log_p[here, tokens]).sum() / len(places))
        elif name == "ceu":
            p = log_p.exp().detach().clone()
            p[here, tokens] = 0
            values.append(-(p / p.sum(-1, keepdim=True) * log_p).sum() / len(places))
        elif name == "pdu":
            z = model(input_ids=ids[None]).logits[0, places]
            values.append(sum((row.max() - row.mean()) ** 2 for row in z) / len(places))
        elif name == "rmu":
            u = torch.rand(16, generator=torch.Generator().manual_seed(SEED))
            away = states(model, ids, layer) - COEFFICIENT * u / u.square().sum().sqrt()
            values.append(away[labels != -100].square().sum() / (labels != -100).sum() / 16)
    return (sum(nlls) / len(nlls) - HELDOUT).abs() if name == "match" else reduced(values, rows, reduction)


def states(model, ids, layer=0):
    """What a layer of a Llama puts out."""
    seen = []
    hook = model.model.layers[layer].register_forward_hook(lambda _, __, out: seen.append(out))
    model(input_ids=ids[None])
    hook.remove()
    return (seen[0][0] if isinstance(seen[0], tuple) else seen[0]).squeeze(0)


def plain_retain(kind, model, original, rows, reduction="example"):
    if kind == "states":
        values = []
        for ids, labels in rows:
            with torch.no_grad():
                kept = states(original, ids)
            values.append((states(model, ids) - kept)[labels != -100].square().mean())
    elif kind == "nll":
        values = [nll(model, *row) for row in rows]
    else:  # KL from the original, where an answer is predicted
        values = [
            token_divergences(model, original, ids)[[place for place in range(len(ids) - 1) if labels[place + 1] != -100]].mean()
            for ids, labels in rows
        ]  # fmt: skip
    return reduced(values, rows, "example" if reduction == "sum" else reduction)


def token_divergences(model, original, ids):
    with torch.no_grad():
        q = log_probabilities(original, ids).exp()
    return (q * (q.log() - log_probabilities(model, ids))).sum(-1)


def plain_replay(model, original, rows):
    return sum(token_divergences(model, original, ids).mean() for ids, _ in rows) / len(rows)


def teach(model, rows):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        sum(nll(model, *row) for row in rows).backward()
        optimizer.step()
    optimizer.zero_grad()


class Recording(UnlearnTrainer):
    """Keeps the replay inputs that the trainer drew."""

    def replay_inputs(self, batch, generator):
        replayed = super().replay_inputs(batch, generator)
        if self.model.training:  # not where the run is judged
            self.replayed = [*getattr(self, "replayed", []), (dict(batch), dict(replayed))]
        return replayed


@pytest.fixture
def trained(tokenizer, tmp_path):
    """Trains a model on `TEXTS`, or other rows, and returns the trainer."""

    def train(model, rows=None, side="right", processing_class=None, heldout_dataset=None, **changes):
        trainer = Recording(
            model, args=settings(tmp_path, preference_beta=BETA, **changes), data_collator=padding(tokenizer, side),
            forget_dataset=masked(TEXTS, tokenizer) if rows is None else rows, heldout_dataset=heldout_dataset,
            processing_class=processing_class,
        )  # fmt: skip
        trainer.train()
        return trainer

    return train


class TestAgainstPlainTorch:
    @pytest.mark.parametrize(
        ("name", "reduction", "retained", "model"),
        [("npo", "example", None, "llama"), ("npo", "sum", "nll", "gpt2"), ("ascent", "sum", "nll", "llama"),
         ("ascent", "token", "kl", "gpt2"), ("uniform", "example", None, "gpt2"), ("redirect", "example", None, "tied"),
         ("match", "example", "nll", "tied"), ("simnpo", "example", "kl", "llama"), ("undial", "token", None, "llama"),
         ("wga", "sum", "kl", "tied"), ("satimp", "token", "nll", "gpt2"), ("ceu", "example", "nll", "llama"),
         ("dpo", "example", None, "gpt2"), ("dpo", "sum", "kl", "llama"),
         ("rmu", "example", "states", "llama"), ("rmu", "example", None, "tied"), ("pdu", "example", "nll", "gpt2"),
         ("pdu", "token", "kl", "tied")],
        indirect=["model"],
    )  # fmt: skip
    def test_two_steps(self, name, reduction, retained, model, tokenizer, tmp_path):
        forget, retain = masked(TEXTS, tokenizer), masked(KEPT, tokenizer, prompt=1)
        alternates = masked(ALTERNATES, tokenizer, prompt=1) if name == "dpo" else []
        if name == "dpo":
            forget = forget.add_column("alternate", list(alternates))
        if name == "simnpo":  # which asks nothing of a model that does not know the texts
            teach(model, rows_of(padding(tokenizer)([dict(row) for row in forget])))
        original, student = copy.deepcopy(model), copy.deepcopy(model)
        others = {"retain_weight": 0.6} if retained else {"replay_weight": 3.0}
        others |= {"retain_loss": retained} if retained in ("nll", "kl") else {}
        args = settings(
            tmp_path, preference_beta=BETA, forget_loss=name, heldout_loss=HELDOUT if name == "match" else None,
            forget_weight=0.7, learning_rate=RATES[name], loss_reduction=reduction, seed=SEED, rmu_coefficient=COEFFICIENT,
            pdu_rate=PDU_RATE, **others,
        )  # fmt: skip
        trainer = Recording(
            model, args=args, data_collator=padding(tokenizer), forget_dataset=forget,
            retain_dataset=retain if retained else None,
        )  # fmt: skip
        trainer.train()

        trained = [p for key, p in student.named_parameters() if name != "rmu" or ".layers.0." in key]
        optimizer = torch.optim.SGD(trained, lr=RATES[name])
        collate = padding(tokenizer)
        forget = forget.select_columns(["input_ids", "attention_mask", "labels"])
        forget, retain, *alternates = (
            rows_of(collate([dict(row) for row in rows])) for rows in (forget, retain, alternates) if rows
        )
        weight = 0.6
        limit = plain_retain(retained, original, original, retain, reduction).item() + 0.1 if name == "pdu" else 0
        for step in range(2):
            logged = trainer.state.log_history[step]
            forget_loss = plain_forget(name, student, original, forget, reduction, *alternates)
            loss = 0.7 * forget_loss
            if retained:
                retain_loss = plain_retain(retained, student, original, retain, reduction)
                loss = loss + weight * retain_loss
                assert logged["retain_loss"] == pytest.approx(retain_loss.item(), rel=1e-3, abs=1e-6)
                assert (retain_loss > 1e-5) == (step == 1 or retained == "nll")
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
            if name == "pdu":
                weight = max(0, weight + PDU_RATE * (retain_loss.item() - limit))
                assert logged["retain_weight"] == pytest.approx(weight, rel=1e-3)
        assert_same_parameters(model, student)

    @pytest.mark.parametrize(("layer", "trained"), [(None, {0, 1}), (3, {1, 2, 3}), (4, {2, 3, 4})])
    def test_rmu_trains_a_layer_and_the_two_below_it(self, layer, trained, tiny_llama, tokenizer, tmp_path):
        config = tiny_llama.config
        config.num_hidden_layers = 5
        model = LlamaForCausalLM(config)
        before, looked_at = copy.deepcopy(model), max(trained)
        changes = {
            "forget_loss": "rmu",
            "rmu_layer": layer,
            "rmu_coefficient": COEFFICIENT,
            "max_steps": 1,
            "seed": SEED,
        }
        rows = masked(TEXTS, tokenizer)
        trainer = UnlearnTrainer(
            model, args=settings(tmp_path, **changes), data_collator=padding(tokenizer), forget_dataset=rows
        )
        trainer.train()
        moved = {
            int(name.split(".")[2]) if ".layers." in name else name
            for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True)
            if not torch.equal(p, q)
        }
        assert moved == trained
        assert set(trainer.reference.parameters) == {n for n, p in model.named_parameters() if p.requires_grad}
        texts = rows_of(padding(tokenizer)([dict(row) for row in rows]))
        expected = plain_forget("rmu", before, before, texts, layer=looked_at)
        assert trainer.state.log_history[0]["forget_loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert f"| `rmu_layer` | {looked_at} |" in trainer.model_card(tmp_path).content

    def test_rmu_of_an_adapter_that_is_elsewhere(self, tiny_llama, tokenizer, tmp_path):
        adapter = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1])
        args = settings(tmp_path, forget_loss="rmu", isotropic_weight=0.1)
        given = {
            "data_collator": padding(tokenizer),
            "forget_dataset": masked(TEXTS, tokenizer),
            "peft_config": adapter,
        }
        with pytest.raises(ValueError, match=r"^rmu_layer=0: nothing in layers 0 to 0 is trainable; choose another$"):
            UnlearnTrainer(copy.deepcopy(tiny_llama), args=args, **given)
        args.rmu_layer = 1
        trainer = UnlearnTrainer(tiny_llama, args=args, **given)
        trainer.train()
        assert trainer.state.log_history[1]["forget_loss"] < trainer.state.log_history[0]["forget_loss"]

    def test_the_collator_for_language_modeling(self, tiny_llama, tokenizer, tmp_path):
        """Labels made by the collator, padded on the left, in two accumulated micro-batches of unlike lengths."""
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.padding_side = "left"
        student, original = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
        rows = Dataset.from_list([dict(tokenizer(text)) for text in TEXTS])
        args = settings(
            tmp_path, preference_beta=BETA, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1,
            learning_rate=0.01,
        )  # fmt: skip
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        UnlearnTrainer(tiny_llama, args=args, data_collator=collator, forget_dataset=rows).train()
        plain_forget("npo", student, original, [(torch.tensor(row["input_ids"]),) * 2 for row in rows]).backward()
        torch.optim.SGD(student.parameters(), lr=0.01).step()
        assert_same_parameters(tiny_llama, student)

    def test_the_original_answers_without_dropout(self, tiny_gpt2, tokenizer, trained):
        original = copy.deepcopy(tiny_gpt2).eval()
        trainer = trained(tiny_gpt2)
        inputs = tokenizer(TEXTS[0], return_tensors="pt")
        tiny_gpt2.train()
        with torch.no_grad():
            assert (tiny_gpt2(**inputs).logits - tiny_gpt2(**inputs).logits).abs().max() > 0.01
        torch.testing.assert_close(trainer.reference_forward(**inputs).logits, original(**inputs).logits)
        assert tiny_gpt2.training

    @pytest.mark.parametrize("model", ["llama", "gpt2", "tied"], indirect=True)
    def test_tied_embeddings_stay_tied_and_load(self, model, tokenizer, trained):
        trainer = trained(model, processing_class=tokenizer, isotropic_weight=0.1)
        trainer.save_model()
        loaded = AutoModelForCausalLM.from_pretrained(trainer.args.output_dir)
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
        for each in (model, loaded):
            tied = each.get_output_embeddings().weight is each.get_input_embeddings().weight
            assert tied == bool(model.config.tie_word_embeddings)
        assert sorted(trainer.reference.parameters) == sorted(name for name, _ in model.named_parameters())


def test_no_example_depends_on_batch_or_padding(tiny_llama, tokenizer, trained):
    trainer = trained(tiny_llama, max_steps=1, learning_rate=0.2)  # so that the model is not its own reference
    trainer.model.eval()
    rows = list(masked(TEXTS, tokenizer, prompt=0))
    for name in ("task_loss", "replay_loss", "npo", "uniform", "redirect"):

        def values(rows, side="right", name=name, **kwargs):
            batch = padding(tokenizer, side, **kwargs)([dict(row) for row in rows])
            if name in ("task_loss", "replay_loss"):
                return getattr(trainer, name)(trainer.model, batch)
            trainer.forgetting = FORGET_LOSSES[name](trainer)
            return trainer.forget_loss(trainer.model, batch)

        alone = torch.cat([values([row]) for row in rows])
        assert alone.std() > 0.01 * alone.mean().abs()
        for side in ("right", "left"):
            torch.testing.assert_close(values(rows, side), alone, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(values(rows[::-1], side), alone.flip(0), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(values(rows, side, pad_to_multiple_of=32), alone, rtol=1e-4, atol=1e-6)


class TestReplay:
    @pytest.mark.parametrize("side", ["right", "left"])
    def test_keeps_length_first_token_padding_and_special_tokens(self, side, tiny_llama, tokenizer, trained):
        rows = masked(["<s>" + text + "</s>" for text in TEXTS] + KEPT, tokenizer)
        trainer = trained(
            tiny_llama, rows, side, tokenizer, replay_weight=1.0, max_steps=6, per_device_train_batch_size=8
        )
        assert set(range(len(tokenizer))) - set(trainer._vocabulary.tolist()) == {0, 1, 2}
        drawn = set()
        for before, after in trainer.replayed:
            ids, new = before["input_ids"], after["input_ids"]
            assert torch.equal(before["attention_mask"], after["attention_mask"])
            assert torch.equal(ids <= 2, new <= 2)
            assert torch.equal(ids[ids <= 2], new[ids <= 2])
            first = before["attention_mask"].argmax(1, keepdim=True)
            assert torch.equal(ids.gather(1, first), new.gather(1, first))
            assert ((ids != new).sum(1) > 1).sum() >= 6
            drawn.add(tuple(new.flatten().tolist()))
        assert (before["attention_mask"] == 0).any()
        assert len(drawn) == 6  # other ones at every step

    def test_is_on_without_retain_data_and_draws_no_special_tokens(self, tiny_llama, tokenizer, tmp_path):
        tiny_llama.config.eos_token_id = [2, 7]
        tiny_llama.config.pad_token_id = 9
        rows = masked(TEXTS, tokenizer)
        for retain, weight in ((None, 1.0), (masked(KEPT, tokenizer), 0.0)):
            args = settings(tmp_path, replay_weight=None)
            trainer = UnlearnTrainer(tiny_llama, args=args, forget_dataset=rows, retain_dataset=retain)
            assert trainer.replay_weight == weight
        assert set(range(300)) - set(trainer._vocabulary.tolist()) == {1, 2, 7, 9}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch, of the Fisher of attention
def test_the_fisher_anchor_is_a_sum_over_all_tokens_and_the_vocabulary(tmp_path):
    """Rows of unlike lengths, so that padding and masks are there, on a vocabulary small enough to sum over."""
    config = LlamaConfig(
        vocab_size=7, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3,
    )  # fmt: skip
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
        ids, mask = (
            torch.nn.utils.rnn.pad_sequence([make(torch.tensor(r["input_ids"])) for r in rows], True)
            for make in (torch.clone, torch.ones_like)
        )
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
        slope = 2 * 0.5 * 0.1 * expected[name]
        torch.testing.assert_close(parameter.grad.sum().item(), slope, rtol=0.25, atol=1e-4, msg=name)


class TestPrecisionAndMemory:
    def test_bf16_autocast_covers_the_reference_too(self, tiny_llama, tokenizer, trained):
        """At θ* the model is its own reference, which it would not be in two precisions."""
        batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            rounded = tiny_llama(**batch).logits
        apart = divergence(rounded, tiny_llama(**batch).logits)[batch["attention_mask"] == 1].mean().item()
        full, trainer = (
            trained(copy.deepcopy(tiny_llama), replay_weight=2.0, learning_rate=0.02, bf16=bf16)
            for bf16 in (False, True)
        )
        first, second = trainer.state.log_history[:2]
        assert abs(first["replay_loss"]) < 0.1 * apart
        tokens = [len(row["input_ids"]) - 2 for row in masked(TEXTS, tokenizer)]
        each = sum(1 / count for count in tokens) / len(tokens)
        assert first["forget_loss"] == pytest.approx(2 / BETA * math.log(2) * each, rel=1e-3)
        assert second["replay_loss"] > apart
        assert second["forget_loss"] == pytest.approx(full.state.log_history[1]["forget_loss"], rel=0.02)
        assert second["forget_loss"] != full.state.log_history[1]["forget_loss"]
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}

    def test_activation_checkpointing_changes_nothing(self, tiny_gpt2, trained):
        """Dropout neither: it is on here."""
        plain, checkpointed = (
            trained(copy.deepcopy(tiny_gpt2), replay_weight=2.0, learning_rate=0.02, activation_checkpointing=on)
            for on in (False, True)
        )
        assert checkpointed.model.is_gradient_checkpointing
        assert_same_parameters(checkpointed.model, plain.model)
        assert plain.state.log_history[1]["replay_loss"] > 0


class TestTextClassifier:
    SENTENCES = {0: "The quick brown fox number {}", 1: "Paris is a capital {} of", 2: "My order {} never arrived"}

    def rows(self, labels, numbers=range(12)):
        items = [{"text": self.SENTENCES[label].format(n), "label": label} for label in labels for n in numbers]
        return Dataset.from_list(items)

    @pytest.fixture
    def taught(self, tiny_bert, tokenizer):
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

    def test_forgets_a_class_from_raw_rows(self, taught, tokenizer, tmp_path):
        args = settings(
            tmp_path, forget="class", replay_weight=None, isotropic_weight=0.1, optim="adamw_torch",
            learning_rate=1e-3, max_steps=60,
        )  # fmt: skip
        trainer = UnlearnTrainer(
            taught, args=args, forget_dataset=self.rows([1]), processing_class=tokenizer,
            eval_dataset={"forget": self.rows([1], range(20, 26)), "retain": self.rows([0, 2], range(20, 26))},
        )  # fmt: skip
        assert (trainer.forget_loss_name, trainer.forgotten_classes) == ("sever", [1])
        before = trainer.evaluate()
        assert before["eval_forget_accuracy"] == before["eval_retain_accuracy"] == 1
        trainer.train()
        after = trainer.evaluate()
        assert after["eval_forget_accuracy"] == 0
        assert after["eval_retain_accuracy"] == 1


class TestRefusals:
    """Each in one line that names the argument."""

    def test_of_models(self, tiny_gpt2, tiny_bert, tokenizer, tmp_path):
        for model, forget, message in (
            (tiny_gpt2, "class", "forget='class' needs a classifier"),
            (BertForMaskedLM(tiny_bert.config), "examples", "model: BertForMaskedLM is not supported"),
        ):
            with pytest.raises(ValueError, match=rf"^{message}[^\n]+$"):
                UnlearnTrainer(model, args=settings(tmp_path, forget=forget), forget_dataset=masked(TEXTS, tokenizer))

    def test_batches_without_labels(self, tiny_llama, tokenizer, tmp_path):
        rows = Dataset.from_list([dict(tokenizer(text)) for text in TEXTS])
        collator = DataCollatorWithPadding(tokenizer)
        with pytest.raises(
            ValueError, match=r"^forget_dataset: gives batches without 'labels'[^\n]+UnlearnSFTTrainer"
        ):
            UnlearnTrainer(tiny_llama, args=settings(tmp_path), data_collator=collator, forget_dataset=rows)
        assert not list(tmp_path.iterdir())

    def test_raw_texts(self, tiny_llama, tokenizer, tmp_path):
        tokens = masked(TEXTS, tokenizer)
        for argument, rows, column in (
            ("forget_dataset", Dataset.from_dict({"text": TEXTS}), "text"),
            ("forget_dataset", Dataset.from_dict({"question": TEXTS, "answer": TEXTS}), "question"),
            ("retain_dataset", Dataset.from_dict({"prompt": KEPT, "completion": KEPT}), "prompt"),
        ):
            data = {"forget_dataset": tokens} | {argument: rows}
            with pytest.raises(
                ValueError, match=rf"^{argument}: column '{column}' holds raw texts; UnlearnSFTTrainer [^\n]+$"
            ):
                UnlearnTrainer(tiny_llama, args=settings(tmp_path), processing_class=tokenizer, **data)

    def test_inputs_without_a_known_replay(self, tiny_llama, tmp_path):
        rows = Dataset.from_list([{"inputs_embeds": [[0.1] * 16] * 4, "labels": [3, 4, 5, 6]}] * 4)
        rows = rows.with_format("torch")
        args = settings(tmp_path, replay_weight=1.0)
        with pytest.raises(ValueError, match=r"^replay_weight: no data-free replay is known[^\n]+$"):
            UnlearnTrainer(tiny_llama, args=args, forget_dataset=rows).train()
        UnlearnTrainer(tiny_llama, args=settings(tmp_path), forget_dataset=rows).train()

    def test_an_exact_fisher_of_tokens(self, tiny_llama, trained):
        with pytest.raises(ValueError, match="^fisher='exact' .*monte_carlo"):
            trained(tiny_llama, fisher_weight=1.0)
