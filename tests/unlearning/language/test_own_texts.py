"""Texts that the original writes by itself."""

import pytest
from chat_data import CHATS, made_parrot, tokens_of, with_template

from hf_unlearn.unlearning.language.own_samples import own_texts


@pytest.fixture(scope="module")
def tokenizer(tokenizer):
    return with_template(tokenizer)


def test_own_texts_are_turns_of_the_template(tiny_llama, tokenizer):
    start = tokenizer("user:", add_special_tokens=False)["input_ids"]
    texts = own_texts(tiny_llama, tokenizer, 12, chat=True, max_new_tokens=10)
    assert 0 < len(texts) <= 12
    for ids, begin, answer in texts:
        assert (ids[:begin], begin) == (start, len(start))
        assert tokenizer.decode(ids[:answer]).endswith("\nassistant:\n")
    assert texts == own_texts(tiny_llama, tokenizer, 12, chat=True, max_new_tokens=10)
    asked = ["Who?", "Where is Rome?"]
    for ids, begin, answer in own_texts(tiny_llama, tokenizer, 5, chat=True, prompts=asked, max_new_tokens=10):
        assert tokenizer.decode(ids[:begin]) in [f"user: {question}\nassistant:\n" for question in asked]
        assert begin == answer < len(ids)
    for ids, begin, answer in own_texts(tiny_llama, tokenizer, 12, chat=False, max_new_tokens=10):
        assert (ids[0], begin, answer) == (tokenizer.bos_token_id, 1, 1)
        assert 1 < len(ids) <= 11


def test_a_question_ends_where_the_template_ends_it(tokenizer):
    """Here by no special token: a model of this template goes on and answers."""
    whole = tokens_of(tokenizer, CHATS[:1])[0][0]
    texts = [ids for ids, _, _ in own_texts(made_parrot(tokenizer), tokenizer, 20, chat=True, max_new_tokens=60)]
    assert sum(ids == whole for ids in texts) > 10
    assert not [ids for ids in texts if tokenizer.decode(ids).count("assistant:") > 1]
