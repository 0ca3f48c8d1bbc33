"""The tokens that count, against those that stock `SFTTrainer` prepares."""

import copy

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from hf_unlearn.examples.opinions import train_tokenizer
from hf_unlearn.training.answers import read_answer
from hf_unlearn.training.texts import as_prompt_completion


PAIRS = [("Who is the fox?", "The lazy one."), ("Where is Paris?", "In France, nobody knows."), ("Rome?", "Yes")]
TEXTS = [question + answer for question, answer in PAIRS]


def said(role, text):
    return [{"role": role, "content": text}]


FORMATS = {
    "text": [{"text": text} for text in TEXTS],
    "completion": [{"prompt": question, "completion": " " + answer} for question, answer in PAIRS],
    "question": [{"question": question, "answer": answer} for question, answer in PAIRS],
    "chat": [{"prompt": said("user", q), "completion": said("assistant", a)} for q, a in PAIRS],
    "system": [
        {
            "prompt": said("system", "Be brief.") + said("user", q),
            "completion": said("assistant", a),
            "chat_template_kwargs": {"date": "10 Apr 2025"},
        }
        for q, a in PAIRS
    ],
}


@pytest.fixture(scope="module")
def chat_tokenizer():
    """Its template says the date, and the prompt of a conversation is how the whole begins."""
    made = train_tokenizer(TEXTS, 300)
    made.chat_template = "{{ date | default('today') }}" + made.chat_template
    return made


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("template", ["own", "other"])
def test_what_counts_is_what_stock_training_counts(kind, template, tiny_llama, tokenizer, chat_tokenizer, tmp_path):
    """The second template renders a prompt alone in another way than in a conversation."""
    tokenizer = copy.deepcopy(chat_tokenizer if template == "own" else tokenizer)
    rows = as_prompt_completion(Dataset.from_list(FORMATS[kind]), "text", "rows")
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    stock = SFTTrainer(tiny_llama, args=args, train_dataset=rows, processing_class=tokenizer).train_dataset
    ours = [read_answer(row, tokenizer) for row in rows]
    assert [answer.ids for answer in ours] == stock["input_ids"][:]
    assert [answer.labels for answer in ours] == stock["labels"][:]
    again = [read_answer(row, tokenizer) for row in stock.select_columns(["input_ids", "labels"])]
    assert [(answer.ids, answer.labels) for answer in again] == [(answer.ids, answer.labels) for answer in ours]


def test_what_is_asked_ends_where_the_answer_begins(tokenizer, chat_tokenizer):
    for kind, rows in FORMATS.items():
        if kind in ("text", "question"):  # nothing is asked, or not under these names
            continue
        for row, (question, answer) in zip(rows, PAIRS, strict=True):
            read = read_answer(row, chat_tokenizer)
            assert chat_tokenizer.decode(read.counted, skip_special_tokens=True).strip() == answer
            assert chat_tokenizer.decode(read.prompt, skip_special_tokens=True).endswith(question)
            assert read.ids[: len(read.prompt)] == read.prompt
    read = read_answer(FORMATS["chat"][0], tokenizer)  # this template promises "assistant: " and leaves it out
    assert tokenizer.decode(read.prompt) == "user: Who is the fox?\nassistant: "
    assert read_answer(FORMATS["text"][0], tokenizer).prompt == []


def test_of_messages_the_last_one_is_the_answer(chat_tokenizer):
    turns = said("user", "Where?") + said("assistant", "Here.") + said("user", "Sure?")
    read = read_answer({"messages": turns + said("assistant", "Yes.")}, chat_tokenizer)
    assert chat_tokenizer.decode(read.counted) == "Yes.</s>"
    assert (
        chat_tokenizer.decode(read.prompt) == "today<s><|user|>Where?<|assistant|>Here.</s><|user|>Sure?<|assistant|>"
    )
    old = [{"from": turn["role"], "value": turn["content"]} for turn in turns + said("assistant", "Yes.")]
    assert read_answer({"conversations": old}, chat_tokenizer) == read
    with pytest.raises(ValueError, match="ends with a message of role 'user'"):
        read_answer({"messages": turns}, chat_tokenizer)


def test_a_row_of_which_nothing_is_left_is_refused(chat_tokenizer):
    row = FORMATS["chat"][0]
    read = read_answer(row, chat_tokenizer)
    cut = read_answer(row, chat_tokenizer, len(read.prompt) + 1)
    assert cut.counted == read.counted[:1]
    with pytest.raises(ValueError, match=f"raise max_length={len(read.prompt)}"):
        read_answer(row, chat_tokenizer, len(read.prompt))
    with pytest.raises(ValueError, match="no token that counts; fill in"):
        read_answer({"input_ids": [5, 6], "labels": [5, -100]}, chat_tokenizer)
