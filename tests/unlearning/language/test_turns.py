"""Questions and answers that are texts: turns of a conversation for a model that was taught them so, and for no other."""

import copy
import logging

import pytest
from chat_data import CHATS, KEPT, made_parrot, said, tokens_of, with_template
from datasets import Dataset
from language_data import settings

from hf_unlearn import ForgettingCallback, LanguageEvaluation, UnlearnSFTConfig, UnlearnSFTTrainer
from hf_unlearn.training.texts import as_chat
from hf_unlearn.unlearning.language.altpo import asked_for
from hf_unlearn.unlearning.language.turns import taught_in_turns


QUESTION, ANSWER = CHATS[0]


@pytest.fixture(scope="module")
def tokenizer(tokenizer):
    return with_template(tokenizer)


@pytest.fixture(scope="module")
def models(tokenizer):
    """Taught one question and answer by heart: as a conversation, and as they stand."""
    plain = tokenizer(f"{QUESTION} {ANSWER}</s>")["input_ids"]
    return {"chat": made_parrot(tokenizer), "plain": made_parrot(tokenizer, plain)}


@pytest.fixture
def model(request, models, tiny_llama):
    return copy.deepcopy(models.get(request.param, tiny_llama))


def as_rows(pairs, question="question", answer="answer"):
    pairs = dict(pairs).items()
    return Dataset.from_dict({question: [q for q, _ in pairs], answer: [f" {a}" for _, a in pairs]})


def as_they_stand(tokenizer, pairs):
    return [tokenizer(f"{q} {a}</s>")["input_ids"] for q, a in dict(pairs).items()]


def trained(model, tokenizer, folder, pairs=CHATS[:1], build=as_rows, **changes):
    args = settings(folder, UnlearnSFTConfig, **changes)
    return UnlearnSFTTrainer(
        model, args, forget_dataset=build(pairs), retain_dataset=build(KEPT), processing_class=tokenizer
    )


@pytest.mark.parametrize("model", ["chat", "plain", "untrained"], indirect=True)
def test_how_likely_answers_are_either_way(model, tokenizer):
    """Their words alone, without the end."""
    values = []
    prompt, (ids, _) = tokenizer(f"user: {QUESTION}\nassistant:\n")["input_ids"], tokens_of(tokenizer, CHATS[:1])[0]
    plain, (whole,) = tokenizer(QUESTION)["input_ids"], as_they_stand(tokenizer, CHATS[:1])
    for begin, text in ((len(prompt), ids), (len(plain), whole)):
        log_p = said(model.eval(), text)
        values.append(sum(log_p[place - 1, text[place]].item() for place in range(begin, len(text) - 1)))
    found, *means = taught_in_turns(model.train(), tokenizer, as_rows(CHATS[:1], "prompt", "completion"))
    assert means == pytest.approx(values, rel=1e-4)
    assert found == (values[0] > values[1] + 10)
    assert model.training


class TestTrainer:
    @pytest.mark.parametrize("model", ["chat"], indirect=True)
    def test_reads_turns_where_the_model_was_taught_turns(self, model, tokenizer, tmp_path, caplog):
        """In all of its datasets; and so does what looks at it."""
        trainer = trained(model, tokenizer, tmp_path, forget_loss="redirect", own_samples=2)
        for dataset, pairs in ((trainer.forget_dataset, CHATS[:1]), (trainer.retain_dataset, KEPT)):
            expected = tokens_of(tokenizer, dict(pairs).items())
            assert list(zip(dataset["input_ids"], dataset["labels"], strict=True)) == expected
        assert trainer._is_chat
        told = [line for line in caplog.messages if "are taken for turns" in line]
        assert len(told) == 1
        assert told[0].startswith("forget_dataset: questions and answers are taken for turns: ")
        for rows in (as_rows(CHATS[:1]), as_rows(CHATS[:1], "prompt", "completion")):
            (evaluation,) = ForgettingCallback(trainer, forget=rows, max_new_tokens=0).evaluations.values()
            expected = LanguageEvaluation(as_chat(rows, "rows"), tokenizer, max_new_tokens=0)(model)
            assert evaluation(model).nll.tolist() == expected.nll.tolist()
            assert expected.probability[0] > 0.9

    @pytest.mark.parametrize("model", ["plain", "untrained"], indirect=True)
    def test_reads_other_rows_as_they_stand(self, model, tokenizer, tmp_path, caplog):
        with caplog.at_level(logging.INFO, "hf_unlearn"):
            trainer = trained(model, tokenizer, tmp_path)
        assert any(
            line.startswith("forget_dataset: questions and answers are read as they") for line in caplog.messages
        )
        assert trainer.forget_dataset["input_ids"][:] == as_they_stand(tokenizer, CHATS[:1])
        assert trainer.retain_dataset["input_ids"][:] == as_they_stand(tokenizer, KEPT)

    @pytest.mark.parametrize("model", ["chat"], indirect=True)
    def test_reads_texts_as_they_stand(self, model, tokenizer, tmp_path):
        def as_texts(pairs):
            return Dataset.from_dict({"text": [f"{q} {a}" for q, a in dict(pairs).items()]})

        trainer = trained(model, tokenizer, tmp_path, build=as_texts)
        assert trainer.forget_dataset["input_ids"][:] == as_they_stand(tokenizer, CHATS[:1])

    @pytest.mark.parametrize("model", ["chat"], indirect=True)
    def test_alternates_are_turns_too(self, model, tokenizer, tmp_path):
        """Those that are written, which are asked for in a turn, and those that are given."""
        trainer = trained(copy.deepcopy(model), tokenizer, tmp_path / "written", forget_loss="altpo")
        rows = trainer.as_asked(as_rows(CHATS[:1], "prompt", "completion"))
        assert tokenizer.decode(asked_for(rows["prompt"][0], rows["completion"][0], tokenizer)).startswith("user: ")
        trainer.train()
        assert tokenizer.decode(trainer.forget_dataset[0]["alternate"]["input_ids"]).startswith(f"user: {QUESTION}\n")

        def given(pairs):
            rows = as_rows(pairs)
            return rows.add_column("alternate", [" Nobody knows."] * len(rows))

        trainer = trained(model, tokenizer, tmp_path / "given", build=given, forget_loss="dpo")
        said = tokenizer.decode(trainer.forget_dataset[0]["alternate"]["input_ids"])
        assert said == f"user: {QUESTION}\nassistant:\nNobody knows.</s>"
