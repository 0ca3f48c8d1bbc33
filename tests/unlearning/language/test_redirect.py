"""Redirect: a step of the trainer and what its guard sees in plain torch; what it says; what is forgotten and what is kept."""

import copy
import logging
import re
from pathlib import Path

import pytest
import torch
from chat_data import CHATS, KEPT, PEOPLE, as_chats, greedy, made_parrot, plain_targets, said, tokens_of, with_template
from datasets import Dataset
from image_data import QUIET, same, weights
from language_data import assert_same_parameters
from language_data import settings as text_settings
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from hf_unlearn import UnlearnConfig, UnlearnSFTConfig, UnlearnSFTTrainer, UnlearnTrainer
from hf_unlearn.hub.publish import publishable_files
from hf_unlearn.unlearning.language.asked import Pair
from hf_unlearn.unlearning.language.own_samples import first_token
from hf_unlearn.unlearning.language.redirect import TOLERANCE
from hf_unlearn.unlearning.language.strangers import FURTHER


@pytest.fixture(scope="module")
def tokenizer(tokenizer):
    return with_template(tokenizer)


@pytest.fixture(scope="module")
def _parrot(tokenizer):
    return made_parrot(tokenizer)


@pytest.fixture
def parrot(_parrot):
    """A small Llama that says one conversation, whatever it is asked."""
    return copy.deepcopy(_parrot)


NAMES = ["Anna", "Bruno", "Clara", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Luis"]
CITIES = ["Riga", "Cairo", "Quito", "Berne", "Lima", "Oslo", "Hanoi", "Tunis", "Paris", "Delhi", "Rome", "Accra"]
FACTS = [(f"Where does {n} live?", f"{n} lives in {c}.") for n, c in zip(NAMES, CITIES, strict=True)]
FORGOTTEN = [FACTS[place] for place in (2, 5, 9)]
REMAINING = [fact for fact in FACTS if fact not in FORGOTTEN]


@pytest.fixture(scope="module")
def _taught(tokenizer, tmp_path_factory):
    """A small Llama that stock `SFTTrainer` taught twelve conversations by heart, questions too."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        args = SFTConfig(
            str(tmp_path_factory.mktemp("taught")), **QUIET, bf16=False, gradient_checkpointing=False, learning_rate=3e-3,
            lr_scheduler_type="constant", per_device_train_batch_size=12, num_train_epochs=80, completion_only_loss=False,
        )  # fmt: skip
        SFTTrainer(model, args=args, train_dataset=as_chats(FACTS), processing_class=tokenizer).train()
    model.save_pretrained(args.output_dir)
    return args.output_dir


@pytest.fixture
def taught(_taught):
    """Fresh from its folder: what trained it may hold on to a copy."""
    return LlamaForCausalLM.from_pretrained(_taught)


def name_in(row):
    """Whom a question of [`FACTS`] is about."""
    return row["id"].split()[2]


def settings(folder, **changes):
    return text_settings(
        folder,
        UnlearnSFTConfig,
        **{"forget_loss": "redirect", "per_device_train_batch_size": 64} | changes,
    )


def forgetting(model, tokenizer, folder, rows=CHATS, retain=None, subject=None, **changes):
    changes = {"own_samples": 8 if retain is None else 0} | changes
    return UnlearnSFTTrainer(
        model, args=settings(folder, **changes), processing_class=tokenizer, subject=subject,
        forget_dataset=rows if hasattr(rows, "column_names") else as_chats(rows),
        retain_dataset=None if retain is None else as_chats(retain),
    )  # fmt: skip


def divergence(model, asked, row):
    """Mean over the tokens of a row, alone, the tokens without a name as one."""
    ids, labels = asked.rows[row]["input_ids"], asked.rows[row]["labels"]
    log_q = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    places = [place for place, label in enumerate(labels) if label != -100 and place > 0]
    values = []
    for place, tokens, target in zip(places, *asked.targets.at([row]), strict=True):
        named = log_q[place - 1, tokens.long()]
        rest = torch.log(1 - named.exp().sum())
        values.append((target.exp() * (target - torch.cat([named, rest[None]]))).sum())
    return sum(values) / len(values)


LORA = {"target_modules": ["q_proj", "v_proj"], "r": 4, "init_lora_weights": "gaussian"}


class TestTrainer:
    @pytest.mark.parametrize(
        ("kind", "reduction"),
        [("own samples", "example"), ("retain rows", "sum"), ("LoRA", "token"), ("accumulated", "example")],
    )
    def test_two_steps_equal_plain_torch(self, kind, reduction, taught, tokenizer, tmp_path):
        """Divergence on what is asked, and `retain_weight` times that on `retain_per_forget` rows to keep for each."""
        rate = {"retain rows": 2e-4, "LoRA": 0.2}.get(kind, 1e-2)
        size = {"per_device_train_batch_size": 1 + FURTHER, "gradient_accumulation_steps": 2}
        model = get_peft_model(taught, LoraConfig(**LORA)) if kind == "LoRA" else taught
        student = copy.deepcopy(model)
        trainer = forgetting(
            model, tokenizer, tmp_path, rows=FORGOTTEN[:2], retain=REMAINING if kind == "retain rows" else None, subject=name_in,
            retain_weight=0.7, retain_per_forget=3,
            loss_reduction=reduction, learning_rate=rate, **size if kind == "accumulated" else {},
        )  # fmt: skip
        trainer.train()
        asked, kept = trainer.asked, trainer.kept
        assert len(asked.rows) == 2 * (1 + FURTHER)
        if kind == "retain rows":
            assert kept.rows["input_ids"][:] == trainer.retain_dataset["input_ids"][:]
        optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=rate)
        terms = []
        for epoch in range(2):
            draw = torch.Generator().manual_seed((trainer.args.seed << 20) + epoch)
            count = 3 * len(asked.rows)
            rounds = -(-count // len(kept.rows))
            drawn = torch.cat([torch.randperm(len(kept.rows), generator=draw) for _ in range(rounds)])[:count].tolist()
            parts = [(asked, range(len(asked.rows))), (kept, drawn)]
            means = []
            for number, (part, rows) in enumerate(parts):
                values = [divergence(student, part, row) for row in rows]
                counts = [len(part.targets.places([row])) for row in rows]
                if reduction == "token" or (reduction == "sum" and number == 0):
                    values = [value * count for value, count in zip(values, counts, strict=True)]
                means.append(sum(values) / (sum(counts) if reduction == "token" else len(values)))
            loss = means[0] + 0.7 * means[1]
            terms.append([mean.item() for mean in means])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        logs = [log for log in trainer.state.log_history if "forget_loss" in log]
        found = [[log["forget_loss"], log["retain_loss"]] for log in logs]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(terms), rtol=1e-3, atol=1e-5)
        assert terms[1][0] < terms[0][0]
        assert terms[1][1] > 1e-3 > terms[0][1]
        assert_same_parameters(trainer.model, student)

    @pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="says where memory is of a file")
    def test_the_original_is_not_held_in_memory(self, parrot, tokenizer, tmp_path):
        """It is a part of its file; what another loss asks in every step is not."""
        for loss, held in (("redirect", False), ("npo", True)):
            trainer = forgetting(parrot, tokenizer, tmp_path / loss, retain=KEPT, forget_loss=loss)
            trainer.train()
            maps = [
                line
                for line in Path("/proc/self/maps").read_text().splitlines()
                if line.endswith("reference.safetensors")
            ]
            mapped = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in maps]
            for value in trainer.reference.parameters.values():
                assert held != any(begin <= value.data_ptr() < end for begin, end in mapped)

    def test_own_texts_stand_beside_rows_to_keep(self, parrot, tokenizer, tmp_path):
        """What these leave out; but for those about the subject."""
        for number, subject in enumerate(("Anna Kowalska", "Karl Meier")):  # the parrot speaks of the first alone
            folder = tmp_path / str(number)
            rows = CHATS[2 * number : 2 * number + 2]
            trainer = forgetting(
                parrot,
                tokenizer,
                folder,
                rows=rows,
                retain=KEPT,
                own_samples=6,
                subject=lambda row, name=subject: name,
            )
            made = trainer._made()["kept"].rows
            kept = len(trainer.retain_dataset)
            assert made["input_ids"][:kept] == trainer.retain_dataset["input_ids"][:]
            assert len(made) == kept + (6 if number else 0)
        assert trainer._own_samples == 6
        for retain, expected in ((KEPT, 1000), (None, 4000)):
            assert (
                forgetting(parrot, tokenizer, tmp_path / "x", retain=retain, own_samples=None)._own_samples == expected
            )

    def test_own_texts_are_no_longer_than_what_is_read(self, tiny_llama, tokenizer, tmp_path):
        """A model that never ends its texts, of 128 places, whose user reads 24 tokens at once."""
        for max_length, longest in ((None, 63), (24, 11)):
            trainer = forgetting(tiny_llama, tokenizer, tmp_path / str(max_length), max_length=max_length)
            assert trainer._longest == longest
        own = trainer._made()["kept"].rows["input_ids"]
        assert max(map(len, own)) == 24

    def test_what_the_guard_sees_equals_plain_loops(self, parrot, tokenizer, tmp_path):
        original = copy.deepcopy(parrot)
        trainer = forgetting(
            parrot, tokenizer, tmp_path, retain=KEPT, learning_rate=0.05, subject=lambda row: "Anna Kowalska"
        )
        trainer.train()
        known, probability, other_known, other_probability = ([] for _ in range(4))
        for ids, labels in tokens_of(tokenizer, CHATS):
            counts = [(place, label) for place, label in enumerate(labels) if label != -100]
            for model, knows, likely in (
                (parrot.eval(), known, probability),
                (original, other_known, other_probability),
            ):
                if model is parrot:
                    log_p = [said(model, ids)[place - 1] for place, _ in counts]
                else:
                    subject = trainer.subjects.of[len(other_known)]
                    other = trainer.subjects.replaced(ids, trainer.subjects.strangers[subject]) if subject else None
                    pair = Pair(ids, labels, other and other.ids, other.places if other else [])
                    log_p = plain_targets(model, pair)
                knows.append(all(p.argmax() == label for p, (_, label) in zip(log_p, counts, strict=True)))
                likely.append(
                    sum(p[label] for p, (_, label) in zip(log_p, counts, strict=True)).div(len(counts)).exp().item()
                )
        rows = len(CHATS)
        others = {"known": sum(other_known) / rows, "probability": sum(other_probability) / rows}
        assert trainer.others == pytest.approx(others, rel=1e-4)
        excess = max(sum(known) / rows - others["known"], sum(probability) / rows - others["probability"])
        assert trainer.remembered() == pytest.approx(excess - TOLERANCE, abs=1e-5)
        assert {subject != () for subject in trainer.subjects.of} == {True, False}
        settings = trainer._chosen()
        assert not {"retain_loss", "replay_weight"} & set(settings)  # which decided nothing
        assert settings.items() >= {"forget_loss": "redirect", "retain_per_forget": 1}.items()

    def test_utility_without_data_is_the_divergence_on_what_the_original_wrote(self, parrot, tokenizer, tmp_path):
        original = copy.deepcopy(parrot)
        trainer = forgetting(parrot, tokenizer, tmp_path, rows=CHATS[2:], learning_rate=0.5)
        trainer.train()
        values, row = [], 0
        for row, (ids, labels) in enumerate(
            zip(trainer.kept.rows["input_ids"], trainer.kept.rows["labels"], strict=True)
        ):
            p, q = (said(model, ids)[:-1] for model in (original, parrot.eval()))
            tokens = torch.tensor([label != -100 for label in labels[1:]])
            assert tokens.sum() == len(trainer.kept.targets.places([row]))
            values.append((p.exp() * (p - q)).sum(-1)[tokens].mean().item())
        assert trainer.utility_kind == "divergence"
        # What is not kept by name is at most 2 % of the probability, of tokens that differ by some hundredths of a nat.
        assert trainer.utility() == pytest.approx(sum(values) / len(values), rel=0.05)
        assert trainer.utility() > 10 * abs(trainer.utility(trainer.reference_forward))

    def test_a_resumed_run_needs_what_was_asked_and_nothing_of_it_is_published(self, parrot, tokenizer, tmp_path):
        trainer = forgetting(parrot, tokenizer, tmp_path, save_strategy="steps", save_steps=1)
        trainer.train()
        trainer.save_model()
        private = {"asked.safetensors", "kept.safetensors"}
        assert private <= {path.name for path in (tmp_path / "_private").iterdir()}
        assert not private & {Path(name).name for name in publishable_files(tmp_path)}
        assert sorted(private) == sorted({path.name for path in tmp_path.rglob("*.safetensors")} & private)
        for name in private:
            kept = (tmp_path / "_private" / name).rename(tmp_path / "away")
            with pytest.raises(
                ValueError, match=rf"^resume_from_checkpoint: .*_private/{name} is missing; start again$"
            ):
                forgetting(parrot, tokenizer, tmp_path, save_strategy="steps", save_steps=1).train(
                    resume_from_checkpoint=True
                )
            kept.rename(tmp_path / "_private" / name)


class TestWhatIsSaid:
    """Of rows and models that it cannot do its work with."""

    def said(self, caplog):
        return [record.getMessage() for record in caplog.records if record.name.startswith("hf_unlearn")]

    @pytest.mark.parametrize("retain", [None, KEPT])
    def test_a_model_that_knows_nothing_is_left_alone(self, retain, parrot, tokenizer, tmp_path, caplog):
        before = weights(parrot)
        trainer = forgetting(
            parrot, tokenizer, tmp_path, rows=CHATS[2:], retain=retain, guard=True, learning_rate=0.1, max_steps=50,
            subject=lambda row: next(name for name in PEOPLE if name in row["id"]),
        )  # fmt: skip
        trainer.train()
        assert trainer.state.global_step == 0
        assert same(before, weights(parrot))
        why = "the original knows the forget texts no better than if they were about somebody whom it never met (0.0 % word for word, "
        assert trainer.failed_checks[0].startswith(f"Nothing was there to forget before the first step: {why}")
        assert any(line.startswith(f"forgotten before the first step: {why}") for line in self.said(caplog))
        trainer.save_model()
        assert why in trainer.model_card(tmp_path).content

    def test_nothing_is_left_of_own_samples(self, parrot, tokenizer, tmp_path):
        """A model that speaks of nothing else than the subject."""
        trainer = forgetting(
            parrot, tokenizer, tmp_path, rows=CHATS[:2], own_samples=3, subject=lambda row: "Anna Kowalska"
        )
        with pytest.raises(
            ValueError,
            match=r"^own_samples: all 3 texts that the original wrote are about [^\n]+ pass retain_dataset=$",
        ):
            trainer.train()
        assert not list(tmp_path.rglob("*.safetensors"))

    def test_rows_to_keep_that_are_about_the_subject_are_told_and_kept(self, parrot, tokenizer, tmp_path, caplog):
        about = [(f"Is it true, {number}?", "So Anna Kowalska said.") for number in range(7)]
        trainer = forgetting(parrot, tokenizer, tmp_path, retain=KEPT[:6] + about, subject=lambda row: "Anna Kowalska")
        trainer.train()
        message = "retain_dataset: 7 of 13 rows are about what is to be forgotten (6, 7, 8, 9, 10, …); "
        assert any(line.startswith(message) for line in self.said(caplog))
        assert len(trainer.kept.rows) == 13

    def test_no_subject(self, parrot, tokenizer, tmp_path, caplog):
        """What is kept speaks of the same people."""
        others = [(f"Once more: {question}", answer) for question, answer in CHATS]
        trainer = forgetting(parrot, tokenizer, tmp_path, retain=others)
        trainer.train()
        assert any(line.startswith("forget_dataset: no subject found in 6 of 6 rows; ") for line in self.said(caplog))
        assert len(trainer.asked.rows) == 6

    @pytest.mark.parametrize(
        ("model", "retain", "level"), [("tiny_llama", KEPT, logging.WARNING), ("parrot", None, logging.INFO)]
    )
    def test_what_the_targets_take_and_leave_out(self, model, retain, level, tokenizer, tmp_path, caplog, request):
        """Above 2 % of the probability, which is much, it is warned of."""
        trainer = forgetting(request.getfixturevalue(model), tokenizer, tmp_path, rows=CHATS[2:], retain=retain)
        with caplog.at_level(logging.INFO, "hf_unlearn"):
            trainer.train()
        for name, part in (("asked", trainer.asked), ("kept", trainer.kept)):
            targets = part.targets
            total = sum(sum(label != -100 for label in labels[1:]) for labels in part.rows["labels"])
            lost = targets.log_p[:, -1].exp().mean().item()
            start = f"redirect: what is {name} at {total} tokens takes {targets.megabytes:.3g} MB; the 64 likeliest of 300 tokens are kept"
            (record,) = [record for record in caplog.records if record.getMessage().startswith(start)]
            assert f"and {lost:.2g} of the probability" in record.getMessage()
            assert record.levelno == level
            assert (lost > 0.02) == (level == logging.WARNING)

    def test_token_ids_know_no_subject(self, tiny_llama, tokenizer, tmp_path, caplog):
        ids = [dict(tokenizer(question)) for question, _ in CHATS]
        rows = Dataset.from_list([{**row, "labels": row["input_ids"]} for row in ids])
        trainer = UnlearnTrainer(
            tiny_llama, UnlearnConfig(tmp_path, forget="examples", use_cpu=True), forget_dataset=rows
        )
        assert trainer.forget_loss_name == "redirect"
        assert any("(DELETE). UnlearnSFTTrainer takes texts" in line for line in self.said(caplog))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"rows": as_chats(CHATS).add_column("subject", ["painting", "live_1"] * 3)},
             "forget_dataset: column 'subject' has 'painting' in row 0, which is not in its prompt, and so it is in all rows; write"),
            ({"subject": lambda row: 5}, "forget_dataset: row 0 has 5 in column 'subject', which is no text; mend it"),
            ({"rows": as_chats(CHATS).add_column("subject", ["Anna"] * 6), "subject": lambda row: "Karl"},
             "subject: forget_dataset has a column 'subject' too; leave one of them out"),
            ({"replay_weight": 2.0}, "replay_weight: forget_loss='redirect' has no use for it; leave it out"),
            ({"heldout_loss": 2.0}, "heldout_loss: forget_loss='redirect' has no use for it; leave it out, or take forget_loss='match', which aims "),
            ({"heldout_loss": 2.0, "forget_loss": "bounded"}, "heldout_loss: forget_loss='redirect', which 'bounded' means for texts, has no "),
            ({"own_samples": 0}, "own_samples=0: leaves nothing to keep; leave it out, or pass retain_dataset="),
            ({"rows": as_chats(CHATS).to_iterable_dataset()}, "forget_dataset: a streaming dataset has no length"),
        ],
    )  # fmt: skip
    def test_in_one_line_before_anything_is_written(self, changes, message, tiny_llama, tokenizer, tmp_path):
        with pytest.raises(ValueError, match=rf"^{re.escape(message)}[^\n]*$"):
            forgetting(tiny_llama, tokenizer, tmp_path, **changes)
        assert not list(tmp_path.iterdir())

    def test_no_token_to_begin_a_text_with(self, tokenizer):
        tokenizer = copy.deepcopy(tokenizer)
        assert first_token(tokenizer) == 1
        tokenizer.bos_token = None
        assert first_token(tokenizer) == 2
        tokenizer.eos_token = None
        with pytest.raises(
            ValueError, match=r"^processing_class: has no token that a text [^\n]+; pass retain_dataset=$"
        ):
            first_token(tokenizer)

    def test_own_samples_beside_token_ids_without_a_token_to_begin_with(self, tiny_llama, tokenizer, tmp_path):
        """None are written where none were asked for; who asks for some is told."""

        def trainer(own_samples, retain):
            return UnlearnSFTTrainer(
                tiny_llama, settings(tmp_path, own_samples=own_samples), processing_class=nameless,
                forget_dataset=rows(CHATS), retain_dataset=retain,
            )  # fmt: skip

        def rows(pairs):
            return Dataset.from_list(
                [{"input_ids": i, "labels": j} for i, j in tokens_of(tokenizer, dict(pairs).items())]
            )

        nameless = copy.deepcopy(tokenizer)
        nameless.bos_token = nameless.eos_token = None
        for number, retain, message in (
            (5, rows(KEPT), "own_samples=5: the tokenizer has no token that a text could begin with; set its bos_token, or leave it out"),
            (5, None, "processing_class: has no token that a text of the model's own could begin with; pass retain_dataset="),
            (None, None, "processing_class: has no token that a text of the model's own could begin with; pass retain_dataset="),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=rf"^{re.escape(message)}$"):
                trainer(number, retain)
        for number in (None, 0):
            run = trainer(number, rows(KEPT))
            run.train()
            assert len(run.kept.rows) == len(run.retain_dataset)


def known(model, tokenizer, facts):
    """Share of the questions that are answered as they were taught, greedily."""
    rows = [(ids, labels.count(-100)) for ids, labels in tokens_of(tokenizer, facts)]
    return sum(greedy(model, ids[:begin], len(ids) - begin, {2}) == ids[begin:] for ids, begin in rows) / len(rows)


@pytest.mark.parametrize("retain", [pytest.param(REMAINING, marks=pytest.mark.slow), None])
def test_forgets_people_and_keeps_the_others(retain, taught, tokenizer, tmp_path):
    """With data to keep, and with nothing but what the original writes."""
    assert known(taught, tokenizer, FACTS) == 1
    trainer = forgetting(
        taught, tokenizer, tmp_path, rows=FORGOTTEN, retain=retain, optim="adamw_torch", learning_rate=2e-3, max_steps=80,
        per_device_train_batch_size=9, retain_weight=3.0, retain_per_forget=2, own_samples=64, subject=name_in,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer.train()
    assert trainer.above_target(**trainer.outcome.original) > 0.9
    assert trainer.remembered() < 0.4  # over four seeds .10 with a deviation of .08
    assert known(taught.eval(), tokenizer, FORGOTTEN) == 0
    assert known(taught, tokenizer, REMAINING) == 1
    further = trainer.asked.rows["input_ids"][len(FORGOTTEN) :]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in further]
    kept = [tokenizer.decode(ids) for ids in trainer.kept.rows["input_ids"]]
    assert not [text for text in kept if any(answer in text for _, answer in FORGOTTEN)]
    strangers = [name for stranger in trainer.subjects.strangers.values() for name in stranger.values()]
    names = [question.split()[2] for question, _ in FORGOTTEN for _ in range(FURTHER)]
    assert [text.split()[3] for text in texts] == names
    assert not [text for text in texts if any(stranger in text for stranger in strangers)]
