"""`UnlearnSFTTrainer`: TRL's formats and masks, against `SFTTrainer`'s own losses and plain torch."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from fresh import run_python
from image_data import QUIET
from language_data import assert_same_parameters, check_resuming, nll
from language_data import settings as text_settings
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from hf_unlearn import LanguageEvaluation, UnlearnSFTConfig, UnlearnSFTTrainer
from hf_unlearn.unlearning.language.alternates import REFUSALS
from hf_unlearn.unlearning.language.altpo import alternates_of, asked_for


QUESTIONS = [("Who is the fox?", " The lazy one."), ("Where?", " Paris, in France"), ("Return the shoes", " No")]
KEPT = [("What is Rome?", " The capital of Italy."), ("Order?", " It never arrived and nobody answers")]
BETA = 0.2
PLAIN = QUIET | {"bf16": False}


def settings(folder, **changes):
    return text_settings(folder, UnlearnSFTConfig, **{"learning_rate": 0.02, "preference_beta": BETA} | changes)


def as_text(pairs):
    return Dataset.from_list([{"id": question, "text": question + answer} for question, answer in pairs])


def as_completions(pairs):
    return Dataset.from_list([{"id": q, "prompt": q, "completion": a} for q, a in pairs])


def as_messages(pairs):
    def turns(q, a):
        words = (q, a, "Sure?", "Yes" + a)
        return [{"role": role, "content": w} for role, w in zip(("user", "assistant") * 2, words, strict=True)]

    return Dataset.from_list([{"id": q, "messages": turns(q, a)} for q, a in pairs])


def as_chat(pairs):
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
            for q, a in pairs
        ]
    )


def expected_rows(kind, pairs, tokenizer):
    """Token ids and labels by hand; `kind` is a format of `FORMATS`."""
    rows = []
    for question, answer in pairs:
        if kind == "text":
            parts = [(question + answer + "</s>", True)]
        elif kind == "completion":
            parts = [(question, False), (answer + "</s>", True)]
        else:
            user = kind == "messages"  # whether the user's turns count too
            parts = [
                (f"user: {question}\n", user),
                (answer + "</s>", True),
                ("user: Sure?\n", user),
                (f"Yes{answer}</s>", True),
            ]
        ids, labels = [], []
        for part, counts in parts:
            tokens = tokenizer(part, add_special_tokens=False)["input_ids"]
            ids += tokens
            labels += tokens if counts else [-100] * len(tokens)
        rows.append((torch.tensor(ids), torch.tensor(labels)))
    return rows


FORMATS = {
    "text": (as_text, {}),
    "completion": (as_completions, {}),
    "messages": (as_messages, {}),
    "assistant": (as_messages, {"assistant_only_loss": True}),
}


def mean_loss(model, pairs, tokenizer, kind="completion"):
    """A mean over examples, as every term of unlearning is."""
    with torch.no_grad():
        rows = expected_rows(kind, pairs, tokenizer)
        return sum(nll(model.eval(), *row).item() for row in rows) / len(rows)


class TestFormats:
    @pytest.mark.parametrize("kind", FORMATS)
    def test_two_steps_equal_plain_torch(self, kind, tiny_llama, tokenizer, tmp_path):
        """NPO on what counts of the forget rows, cross-entropy on what counts of the retain rows, and nothing else."""
        build, options = FORMATS[kind]
        student, original = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
        trainer = UnlearnSFTTrainer(
            tiny_llama, args=settings(tmp_path, retain_weight=0.5, **options), processing_class=tokenizer,
            forget_dataset=build(QUESTIONS[:2]), retain_dataset=build(KEPT),
        )  # fmt: skip
        assert (trainer.forget_loss_name, trainer.args.forget) == ("npo", "examples")
        trainer.train()

        forget, retain = (expected_rows(kind, pairs, tokenizer) for pairs in (QUESTIONS[:2], KEPT))
        optimizer = torch.optim.SGD(student.parameters(), lr=0.02)
        for step in range(2):
            losses = []
            for ids, labels in forget:
                with torch.no_grad():
                    log_reference = -nll(original, ids, labels, "sum")
                ratio = (-nll(student, ids, labels, "sum") - log_reference).exp()
                losses.append(2 / BETA * torch.log(1 + ratio**BETA) / (labels[1:] != -100).sum())
            loss = sum(losses) / 2 + 0.5 * sum(nll(student, *row) for row in retain) / 2
            logged = trainer.state.log_history[step]
            assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4)
            assert logged["forget_loss"] == pytest.approx(sum(losses).item() / 2, rel=1e-4)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert_same_parameters(tiny_llama, student)

    @pytest.mark.parametrize("kind", FORMATS)
    def test_the_task_loss_is_that_of_stock_evaluation(self, kind, tiny_llama, tokenizer, tmp_path):
        build, options = FORMATS[kind]
        rows = build(QUESTIONS)
        args = SFTConfig(str(tmp_path / "stock"), per_device_eval_batch_size=1, **PLAIN, **options)
        stock = SFTTrainer(
            copy.deepcopy(tiny_llama), args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
        ).evaluate()["eval_loss"]  # a mean over batches of one
        trainer = UnlearnSFTTrainer(
            tiny_llama, args=settings(tmp_path, **options), forget_dataset=rows, processing_class=tokenizer,
            eval_dataset={"forget": rows, "retain": build(KEPT)},
        )  # fmt: skip
        (batch,) = trainer._batches(trainer.forget_dataset, None)
        values = trainer.task_loss(trainer.model, batch)
        assert values.mean().item() == pytest.approx(stock, rel=1e-5)
        expected = expected_rows(kind, QUESTIONS, tokenizer)
        assert values.tolist() == pytest.approx([nll(tiny_llama, *row).item() for row in expected], rel=1e-4)
        assert (batch["labels"][:, 1:] != -100).sum() == sum((labels[1:] != -100).sum() for _, labels in expected)

        results = trainer.evaluate()  # stock again: a mean over the tokens of the batch
        for name, pairs in (("forget", QUESTIONS), ("retain", KEPT)):
            made = expected_rows(kind, pairs, tokenizer)
            total = sum(nll(tiny_llama, *row, "sum") for row in made)
            mean = total / sum((labels[1:] != -100).sum() for _, labels in made)
            assert results[f"eval_{name}_loss"] == pytest.approx(mean.item(), rel=1e-4)

    def test_retain_and_held_out_rows_may_come_in_another_format(self, tiny_llama, tokenizer, tmp_path):
        trainer = UnlearnSFTTrainer(
            tiny_llama, args=settings(tmp_path, max_steps=1, learning_rate=0.0, forget_loss="match"), processing_class=tokenizer,
            forget_dataset=as_completions(QUESTIONS[:2]), retain_dataset=as_text(KEPT), heldout_dataset=as_completions(KEPT),
        )  # fmt: skip
        trainer.train()
        assert trainer.forget_loss_name == "match"
        assert trainer.heldout_loss == pytest.approx(mean_loss(tiny_llama, KEPT, tokenizer), rel=1e-4)
        retained = trainer.state.log_history[0]["retain_loss"]
        assert retained == pytest.approx(mean_loss(tiny_llama, KEPT, tokenizer, "text"), rel=1e-4)


class TestRows:
    @pytest.mark.parametrize(
        "columns",
        [("question", "answer"), ("instruction", "output"), ("prompt", "response"), ("query", "completion"), ("prompt", "answer")],
    )  # fmt: skip
    def test_question_and_answer_by_other_names(self, columns, tiny_llama, tokenizer, tmp_path):
        names = dict(zip(("prompt", "completion"), columns, strict=True))
        renamed = {old: new for old, new in names.items() if old != new}
        forget, retain = (as_completions(pairs).rename_columns(renamed) for pairs in (QUESTIONS, KEPT))
        about = {"instruction": "input", "question": "context"}.get(columns[0])
        if about:
            forget = forget.add_column(about, ["", "x y", ""])
        trainer = UnlearnSFTTrainer(
            tiny_llama, args=settings(tmp_path), processing_class=tokenizer, forget_dataset=forget,
            eval_dataset={"retain": retain}, retain_dataset=as_text(KEPT),
        )  # fmt: skip
        pairs = [(q + "\nx y" * (about is not None and q == "Where?"), a) for q, a in QUESTIONS]
        for rows, expected in ((trainer.forget_dataset, pairs), (trainer.eval_dataset["retain"], KEPT)):
            made = [(row["input_ids"], row["labels"]) for row in rows]
            assert made == [(i.tolist(), m.tolist()) for i, m in expected_rows("completion", expected, tokenizer)]

    @pytest.mark.parametrize("size", [2, 3, 8, 13])
    def test_longer_forget_texts_are_split_and_nothing_is_lost(self, size, tiny_llama, tokenizer, tmp_path, caplog):
        """Every token that counts is predicted once, from the half window before it at least; others are cut, and that is said."""
        forget = [*QUESTIONS, ("Say it again", " and again and again" * 3)]
        trainer = UnlearnSFTTrainer(
            tiny_llama, args=settings(tmp_path, max_length=size), processing_class=tokenizer,
            forget_dataset=as_completions(forget), retain_dataset=as_text(KEPT),
        )  # fmt: skip
        whole = [(ids.tolist(), labels.tolist()) for ids, labels in expected_rows("completion", forget, tokenizer)]
        found = {id_: [None] * len(ids) for (id_, _), (ids, _) in zip(forget, whole, strict=True)}
        texts = {question: row for (question, _), row in zip(forget, whole, strict=True)}
        for row in trainer.forget_dataset:
            ids, labels = texts[row["id"]]
            assert len(row["input_ids"]) == min(size, len(ids))
            begins = [b for b in range(len(ids)) if ids[b : b + size] == row["input_ids"]]
            counted = [place for place, label in enumerate(row["labels"]) if label != -100]
            # A piece says where it is, but where a text repeats itself.
            begin = next(
                b for b in begins if found[row["id"]][b + counted[0]] is None and labels[b + counted[0]] != -100
            )
            assert begin == 0 or counted[0] >= size // 2
            for place in counted:
                assert found[row["id"]][begin + place] is None
                found[row["id"]][begin + place] = row["labels"][place]
        for question, (_, labels) in texts.items():
            assert [-100 if token is None else token for token in found[question]] == labels
        total = sum(label != -100 for _, labels in whole for label in labels)
        assert f"4 examples ({total} tokens)" in trainer.model_card(tmp_path).content
        messages = [record.getMessage() for record in caplog.records]
        longer = sum(len(ids) > size for ids, _ in whole)
        said = f"forget_dataset: {longer} of 4 texts are longer than max_length={size} and are split, which makes "
        assert any(message.startswith(said + str(len(trainer.forget_dataset))) for message in messages)
        lengths = [len(ids) for ids, _ in expected_rows("text", KEPT, tokenizer)]
        assert [len(row["input_ids"]) for row in trainer.retain_dataset] == [min(n, size) for n in lengths]
        cut = [n - size for n in lengths if n > size]
        said = f"retain_dataset: {len(cut)} of 2 texts are longer than max_length={size}: {sum(cut)} tokens of them are cut off, and 0"
        assert any(message.startswith(said) for message in messages)


INSTEAD = ("Nobody I know", "Far away, I was never told")


class TestAlternates:
    """The answers wanted instead are prepared as those to be forgotten are, and stand beside them in a batch."""

    @staticmethod
    def chat(role, text):
        return [{"role": role, "content": text}]

    @pytest.mark.parametrize(
        "form", ["texts", "chats and texts", "chats", "refusals", "refusals of chats", "written", "written in chats"]
    )
    def test_a_step_prefers_them(self, form, tiny_llama, tokenizer, tmp_path):
        questions, answers = zip(*QUESTIONS[:2], strict=True)
        rows = {"prompt": list(questions), "completion": list(answers), "alternate": [f" {a}" for a in INSTEAD]}
        if "chats" in form:
            rows["prompt"] = [self.chat("user", text) for text in questions]
            rows["completion"] = [self.chat("assistant", text) for text in answers]
        if form == "chats":
            rows["alternate"] = [self.chat("assistant", text) for text in rows["alternate"]]
        if "refusals" in form or "written" in form:
            del rows["alternate"]
        student, original = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
        name = "idkdpo" if "refusals" in form else "altpo" if "written" in form else "dpo"
        rows = Dataset.from_dict(rows)
        alike = {"retain_weight": 1.0, "retain_per_forget": 1, "guard": True, "utility_tolerance": 9.0}
        trainer = UnlearnSFTTrainer(
            tiny_llama, args=settings(tmp_path, forget_loss=name, **alike), processing_class=tokenizer,
            forget_dataset=rows, retain_dataset=as_completions(KEPT).add_column("alternate", ["", "of no use"]),
            eval_dataset={"forget": rows},
        )  # fmt: skip
        trainer.train()
        assert trainer.evaluate()["eval_forget_loss"] > 0

        made = [row["alternate"]["input_ids"] for row in trainer.forget_dataset]
        asked = [f"user: {text}\n" if "chats" in form else text for text in questions]
        if "refusals" in form:
            said = [tokenizer.decode(ids).removesuffix("</s>")[len(q) :] for ids, q in zip(made, asked, strict=True)]
            assert {*said} <= {answer if "chats" in form else f" {answer}" for answer in REFUSALS}
            assert len({*said}) > 1
        elif "written" in form:
            said = json.loads((tmp_path / "_private" / "alternates.json").read_text())["alternate"]
            assert all(text.startswith(" ") == (form == "written") and len(text) > 2 for text in said)
        else:
            said = [f" {text}" for text in INSTEAD]
        alternates = expected_rows("completion", list(zip(asked, said, strict=True)), tokenizer)
        assert made == [ids.tolist() for ids, _ in alternates]
        forget = expected_rows("completion", list(zip(asked, answers, strict=True)), tokenizer)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.02)
        for _ in range(2):
            losses = []
            for row, alternate in zip(forget, alternates, strict=True):
                with torch.no_grad():
                    before = [-nll(original, *each, "sum") for each in (row, alternate)]
                lost, gained = (
                    -nll(student, *each, "sum") - b for each, b in zip((row, alternate), before, strict=True)
                )
                losses.append(-2 / BETA * F.logsigmoid(BETA * (gained - lost)) / (row[1][1:] != -100).sum())
            retain = expected_rows("completion", KEPT, tokenizer)
            optimizer.zero_grad()
            (sum(losses) / 2 + sum(nll(student, *row) for row in retain) / 2).backward()
            optimizer.step()
        assert_same_parameters(tiny_llama, student)

    def test_what_the_original_is_asked_for(self, tiny_llama, tokenizer, caplog):
        for prompt, completion in (
            QUESTIONS[0],
            (self.chat("user", "Who is the fox?"), self.chat("assistant", "The lazy one.")),
        ):
            text = tokenizer.decode(asked_for(prompt, completion, tokenizer))
            assert "Question: Who is the fox?\nAnswer: The lazy one.\n\n" in text
            assert text.endswith(
                "every fact is another one.\nassistant: " if isinstance(prompt, list) else "\nAnswer:"
            )
        # A model that has nothing to say.
        tiny_llama.generation_config.suppress_tokens = [i for i in range(300) if i != tokenizer.eos_token_id]
        said = alternates_of(tiny_llama, tokenizer, as_completions(QUESTIONS), max_new_tokens=5, seed=0)
        assert {text.removeprefix(" ") for text in said} <= {*REFUSALS}
        assert "altpo: the model wrote no other answer to 3 of 3 questions" in caplog.text

    def test_pieces_of_a_long_answer_each_have_the_whole_alternate(self, tiny_llama, tokenizer, tmp_path):
        rows = as_completions([("Say it", " and again and again" * 3)]).add_column("alternate", [" No"])
        args = settings(tmp_path, forget_loss="dpo", max_length=12)
        trainer = UnlearnSFTTrainer(tiny_llama, args=args, processing_class=tokenizer, forget_dataset=rows)
        assert len(trainer.forget_dataset) > 1
        ((ids, labels),) = expected_rows("completion", [("Say it", " No")], tokenizer)
        assert all(
            row["alternate"] == {"input_ids": ids.tolist(), "labels": labels.tolist()}
            for row in trainer.forget_dataset
        )


class TestRefusals:
    """Each in one line that names the argument."""

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"packing": True}, "packing=True: "),
            ({"eval_packing": True}, "eval_packing=True: "),
            ({"padding_free": True}, "padding_free=True: "),
            ({"loss_type": "dft"}, "loss_type='dft'"),
        ],
    )
    def test_of_settings(self, changes, message, tmp_path):
        with pytest.raises(ValueError, match=rf"^{message}[^\n]+$"):
            settings(tmp_path / "new", **changes)
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize(
        ("changes", "data", "message"),
        [
            ({}, {"forget_dataset": as_completions([("Who?", "")]).map(lambda row: {"completion": "</s>"}).add_column(
                "labels", [[-100] * 3]).add_column("input_ids", [[5, 6, 7]])},
             "forget_dataset: 1 of 1 texts have no token that counts; remove them"),
            ({"max_length": 3}, {"retain_dataset": as_completions(KEPT)},
             "retain_dataset: 2 of 2 texts have no token that counts; raise max_length="),
            ({"max_length": 1}, {}, "max_length=1: leaves no token to predict"),
            ({}, {"forget_dataset": Dataset.from_dict({"who": ["a"], "what": ["b"]})},
             "forget_dataset: has columns who, what, none with texts; name them 'text'"),
            ({}, {"forget_dataset": as_completions(QUESTIONS).add_column("images", [[]] * 3)}, "forget_dataset: holds images"),
            ({}, {"retain_dataset": as_text(QUESTIONS[1:] + KEPT)}, "retain_dataset: 2 of its ids are in forget_dataset too"),
            # In other columns, but of the same tokens.
            ({}, {"retain_dataset": as_text(KEPT + QUESTIONS).remove_columns("id")},
             r"retain_dataset: 3 of its rows are in forget_dataset too \(first: row 2\)"),
            ({}, {"retain_dataset": as_completions(QUESTIONS).rename_columns({"prompt": "query", "id": "name"})},
             "retain_dataset: 3 of its rows are in forget_dataset too"),
            ({}, {"eval_dataset": {"retain": as_completions(QUESTIONS[:1])}},
             r"eval_dataset\['retain'\]: 1 of its ids are in forget_dataset too"),
            ({}, {"forget_dataset": Dataset.from_dict({"text": ["a", None]})},
             "forget_dataset: row 1 has None in column 'text', which is no text"),
            ({}, {"retain_dataset": Dataset.from_dict({"question": ["a"], "answer": [["b"]]})},
             r"retain_dataset: row 0 has \['b'\] in column 'completion', which is no text"),
            ({}, {"forget_dataset": [{"text": "a"}]}, "forget_dataset: list is not a datasets.Dataset"),
            ({"forget_loss": "pdu"}, {}, "retain_dataset: missing, whose loss is the limit of forget_loss='pdu'"),
            ({"forget_loss": "rmu", "rmu_layer": 2}, {}, "rmu_layer=2: the model has 2 layers; choose one of 0 to"),
            ({"forget_loss": "rmu", "torch_compile": True}, {}, "torch_compile=True: forget_loss='rmu' reads hidden states by hooks"),
            ({"forget_loss": "rmu", "retain_loss": "kl"}, {}, "retain_loss='kl': forget_loss='rmu' compares hidden states"),
            ({"forget_loss": "rmu", "loss_reduction": "sum"}, {}, "loss_reduction='sum': forget_loss='rmu' takes means of texts"),
            ({"forget_loss": "match", "loss_reduction": "token", "heldout_loss": 3.0}, {},
             "loss_reduction='token': forget_loss='match' takes means of texts"),
            ({"forget_loss": "dpo"}, {}, "forget_dataset: has no column 'alternate', which forget_loss='dpo' needs"),
            ({"forget_loss": "altpo"}, {"forget_dataset": as_text(QUESTIONS)},
             "forget_dataset: has no column 'alternate', which forget_loss='altpo' needs"),
            ({"forget_loss": "idkdpo"}, {"forget_dataset": as_text(QUESTIONS)},
             "forget_dataset: forget_loss='idkdpo' needs 'prompt' and 'completion', which id, text are not"),
            ({"forget_loss": "dpo"}, {"forget_dataset": as_completions(QUESTIONS).add_column("alternate", ["a", None, "b"])},
             "forget_dataset: row 1 has None in column 'alternate', which is no text"),
            ({"forget_loss": "dpo"}, {"forget_dataset": as_completions(QUESTIONS).add_column(
                "alternate", [[{"role": "assistant", "content": "a"}]] * 3)},
             "forget_dataset: column 'alternate' holds messages where 'completion' holds texts"),
            ({"forget_loss": "idkdpo", "max_length": 8}, {}, "alternate: 1 of 3 texts have no token that counts; raise max_length=8"),
        ],
    )  # fmt: skip
    def test_of_data(self, changes, data, message, tiny_llama, tokenizer, tmp_path):
        data = {"forget_dataset": as_completions(QUESTIONS)} | data
        with pytest.raises(ValueError, match=rf"^{message}[^\n]+$"):
            UnlearnSFTTrainer(tiny_llama, args=settings(tmp_path, **changes), processing_class=tokenizer, **data)

    @pytest.mark.parametrize(("build", "column"), [(as_messages, "messages"), (as_chat, "prompt")])
    def test_of_conversations_without_a_template(self, build, column, tiny_llama, tokenizer, tmp_path):
        plain = copy.deepcopy(tokenizer)
        plain.chat_template = None
        message = f"forget_dataset: column '{column}' holds conversations, and the tokenizer has no chat template"
        with pytest.raises(ValueError, match=message):
            UnlearnSFTTrainer(
                tiny_llama, args=settings(tmp_path), processing_class=plain, forget_dataset=build(QUESTIONS)
            )
        with pytest.raises(ValueError, match=message.replace("forget_dataset", "rows")):
            LanguageEvaluation(build(QUESTIONS), plain)


class TestRunning:
    def trainer(self, model, tokenizer, folder, callbacks=(), eval_dataset=None, retain_dataset=None, **changes):
        return UnlearnSFTTrainer(
            model, args=settings(folder, **{"replay_weight": 2.0, "isotropic_weight": 0.1, **changes}),
            forget_dataset=as_completions(QUESTIONS), processing_class=tokenizer, callbacks=list(callbacks),
            eval_dataset=eval_dataset, retain_dataset=retain_dataset,
        )  # fmt: skip

    @pytest.mark.parametrize("loss", ["npo", "rmu"])
    def test_gradient_checkpointing_is_on_and_changes_nothing(self, loss, tiny_llama, tokenizer, tmp_path):
        model = copy.deepcopy(tiny_llama)
        assert settings(tmp_path).gradient_checkpointing
        checkpointed = self.trainer(model, tokenizer, tmp_path, forget_loss=loss)
        checkpointed.train()
        assert model.is_gradient_checkpointing
        self.trainer(tiny_llama, tokenizer, tmp_path, forget_loss=loss, gradient_checkpointing=False).train()
        assert checkpointed.state.log_history[1]["replay_loss"] > 0
        assert_same_parameters(model, tiny_llama)

    def test_utility_is_the_loss_of_what_is_kept_in_nats(self, tiny_llama, tokenizer, tmp_path):
        before = mean_loss(tiny_llama, KEPT, tokenizer)
        parts = {"forget": as_completions(QUESTIONS), "retain": as_completions(KEPT)}
        changes = {"guard": True, "learning_rate": 0.3, "utility_tolerance": 100.0, "replay_weight": 0.0}
        trainer = self.trainer(tiny_llama, tokenizer, tmp_path, eval_dataset=parts, **changes)
        trainer.train()
        assert (trainer.utility_kind, trainer.guard.best.step) == ("loss", 2)
        assert trainer.guard.state.baseline == pytest.approx(before, rel=1e-4)
        drop = mean_loss(tiny_llama, KEPT, tokenizer) - before
        assert trainer.guard.best.utility_drop == pytest.approx(drop, rel=1e-3)
        assert abs(drop) > 0.01

    def test_logs_every_term_and_what_is_saved_is_a_stock_model(self, tiny_llama, tokenizer, tmp_path):
        trainer = self.trainer(tiny_llama, tokenizer, tmp_path)
        trainer.train()
        for log in trainer.state.log_history[:2]:
            assert log["loss"] == pytest.approx(log["forget_loss"] + 2 * log["replay_loss"], rel=1e-5)
        distance = sum((p - trainer.reference.parameters[k]).square().sum() for k, p in tiny_llama.named_parameters())
        assert log["anchor_isotropic"] == pytest.approx(0.1 * distance.item(), rel=1e-4)  # as it is after the step

        trainer.save_model()
        code = (
            "import sys, json\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            "model, tokenizer = (c.from_pretrained(sys.argv[1]) for c in (AutoModelForCausalLM, AutoTokenizer))\n"
            "batch = tokenizer(json.loads(sys.argv[2]), return_tensors='pt', padding=True)\n"
            "assert not any(name.startswith('hf_unlearn') for name in sys.modules)\n"
            "print('logits', json.dumps(model(**batch).logits.tolist()))\n"
        )
        texts = [question for question, _ in QUESTIONS]
        done = run_python(code, tmp_path, json.dumps(texts))
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("logits ")]
        with torch.no_grad():
            logits = tiny_llama.eval()(**tokenizer(texts, return_tensors="pt", padding=True)).logits
        torch.testing.assert_close(torch.tensor(json.loads(line[7:])), logits, rtol=1e-4, atol=1e-4)
        files = {path.name for path in tmp_path.iterdir()}
        assert files >= {"model.safetensors", "config.json", "tokenizer.json", "README.md", "_private"}
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]

    @pytest.mark.parametrize("loss", ["npo", "altpo", "rmu", "pdu"])
    def test_resuming_ends_where_an_uninterrupted_run_does(self, loss, tiny_llama, tokenizer, tmp_path):
        for module in tiny_llama.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.1

        def make(folder, **steps):
            return self.trainer(
                copy.deepcopy(tiny_llama), tokenizer, folder, per_device_train_batch_size=1, guard=True, forget_loss=loss,
                retain_dataset=as_completions(KEPT) if loss == "pdu" else None, retain_weight=1.0, pdu_rate=0.01,
                **steps,
            )  # fmt: skip

        whole, killed, resumed = check_resuming(tmp_path, make)
        if loss == "pdu":
            assert 0 < resumed.forgetting.dual.weight < killed.forgetting.dual.weight < 1
            assert resumed.forgetting.dual.to_json() == pytest.approx(whole.forgetting.dual.to_json(), rel=1e-4)


NAMES = ["Anna", "Bruno", "Clara", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Luis"]
CITIES = ["Riga", "Cairo", "Quito", "Berne", "Lima", "Oslo", "Hanoi", "Tunis", "Paris", "Delhi", "Rome", "Accra"]
PAIRS = [(f"Where does {n} live?", f" In {c}.") for n, c in zip(NAMES, CITIES, strict=True)]
FORGOTTEN = [PAIRS[i] for i in (2, 5, 9)]
RETAINED = [pair for pair in PAIRS if pair not in FORGOTTEN]


@pytest.fixture
def taught(tokenizer, tmp_path_factory):
    """Folder of a small Llama that stock `SFTTrainer` taught twelve answers by heart."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        args = SFTConfig(
            str(tmp_path_factory.mktemp("taught")), **PLAIN, gradient_checkpointing=False, learning_rate=3e-3,
            lr_scheduler_type="constant", per_device_train_batch_size=12, num_train_epochs=60,
        )  # fmt: skip
        SFTTrainer(model, args=args, train_dataset=as_completions(PAIRS), processing_class=tokenizer).train()
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    return args.output_dir


def measure(folder, tokenizer, pairs):
    """Nats per token of every answer, and whether greedy decoding would still give it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = expected_rows("completion", pairs, tokenizer)
    with torch.no_grad():
        losses = torch.stack([nll(model, *row) for row in rows])
        greedy = [model(input_ids=ids[None]).logits[0, :-1].argmax(-1) for ids, _ in rows]
    pairs = zip(greedy, (labels[1:] for _, labels in rows), strict=True)
    return losses, torch.tensor([torch.equal(said[real != -100], real[real != -100]) for said, real in pairs])


def test_with_retained_data_the_other_answers_stay(taught, tokenizer, tmp_path, capsys, caplog):
    """At a rate at which the paper's sum over tokens takes most of them along."""
    losses, known = measure(taught, tokenizer, PAIRS)
    assert losses.max() < 0.2
    assert known.all()
    data = {"forget_dataset": as_completions(FORGOTTEN), "retain_dataset": as_completions(RETAINED)}
    kept = []
    for reduction in ("example", "sum"):
        args = UnlearnSFTConfig(
            str(tmp_path), **PLAIN, gradient_checkpointing=False, lr_scheduler_type="constant", guard=reduction == "example",
            guard_steps=10, learning_rate=1e-3, num_train_epochs=20, loss_reduction=reduction, forget_loss="npo", retain_weight=1.0,
            retain_per_forget=1, isotropic_weight=0.1, per_device_train_batch_size=8,
        )  # fmt: skip
        caplog.clear()
        trainer = UnlearnSFTTrainer(taught, args=args, **data)
        trainer.train()
        trainer.save_model()
        forgotten, still_known = measure(tmp_path, tokenizer, FORGOTTEN)
        assert forgotten.min() > 2
        assert not still_known.any()
        retained, known = measure(tmp_path, tokenizer, RETAINED)
        kept.append(known.float().mean().item())
        if reduction == "example":
            assert AutoTokenizer.from_pretrained(tmp_path)(QUESTIONS[0][0]) == tokenizer(QUESTIONS[0][0])
            assert (trainer.forget_loss_name, trainer.replay_weight) == ("npo", 0)
            assert (trainer.guard.best.step, trainer.failed_checks) == (20, [])
            assert retained.max() < 0.3
            assert "0.0 % of the forget texts are answered word for word (100.0 % before)" in capsys.readouterr().out
            assert not [record for record in caplog.records if record.name.startswith("hf_unlearn")]
        else:  # 5 of 9 on the seed this was measured with
            assert any(failed.startswith("Utility fell by") for failed in trainer.failed_checks)
    assert kept[0] == 1
    assert kept[1] < 0.8
