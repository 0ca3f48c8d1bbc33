"""The rows of an audit of language models, the words by which answers are recognised, and what is refused."""

import json
from collections import Counter

import pytest
from datasets import Dataset
from people import people, tokenizer_of

from hf_unlearn.audit.language.answers import TEMPLATES, AskedAgain, part_with
from hf_unlearn.audit.language.attacks import AnswerBegun, AskedAfterExamples, AskedOutOfOrder, after
from hf_unlearn.audit.language.data import before_it_tells, halves, language_data, telling_words, told
from hf_unlearn.examples.facts import facts_data


@pytest.fixture(scope="module")
def sets():
    return people()


@pytest.fixture(scope="module")
def words(sets):
    return tokenizer_of(sets)


@pytest.fixture(scope="module")
def data(sets, words):
    return language_data(**sets, processing_class=words, size="standard", seed=0)


def read(rows, words, **others):
    sets = {"forget": Dataset.from_list(rows), "retain": None, "test": None} | others
    return language_data(**sets, processing_class=words, size="standard", seed=0)


class TestTellingWords:
    def test_are_where_each_lives(self, data):
        towns = [row["completion"][0]["content"].split()[-1].strip(".").lower() for row in data.forget.rows]
        assert data.forget.telling == [(town,) for town in towns]
        assert data.test.telling[0] == (data.test.rows[0]["completion"][0]["content"].split()[-1].strip(".").lower(),)

    def test_are_in_the_value_of_invented_facts(self, words):
        """Whose words are marked by hand; little words of a value that a false answer has too are none."""
        sets = facts_data(40, share=0.5, general=40)
        found = read(sets["forget"], words, retain=sets["retain"])
        for row, telling in zip(sets["forget"], found.forget.telling, strict=True):
            value = row["value"].lower().replace("'", " ").split()
            assert telling
            assert set(telling) <= set(value), (row["answer"], row["value"])

    def test_each_filter_and_what_would_leave_nothing(self):
        row = {"prompt": "Where does Ana live?", "completion": " Ana lives in the old town of Oslo."}
        counts = Counter({"lives": 9, "in": 9, "the": 9, "of": 9, "old": 2, "town": 1, "oslo": 1})
        assert telling_words(row, counts, 2) == ("old", "town", "oslo")
        assert telling_words(row, counts | {"old": 4, "town": 3, "oslo": 3}, 2) == ("town", "oslo")
        assert telling_words(row | {"perturbed_answer": ["In the old town of Rome."]}, Counter(), 2) == (
            "lives",
            "oslo",
        )
        assert telling_words(row | {"paraphrased_answer": "Oslo's town"}, Counter({"town": 3}), 2) == ("oslo",)
        assert telling_words({"prompt": "Say yes.", "completion": "Yes."}, Counter({"yes": 9}), 2) == ("yes",)
        assert telling_words({"prompt": "Say yes.", "completion": "Yes, Ana."}, Counter({"ana": 9}), 2) == ("ana",)

    def test_told_is_a_share(self, data):
        part = data.forget.select([0, 1])
        part.telling[0] = ("oslo", "old")
        part.telling[1] = ("rome",)
        assert told(["In OLD, old Bern.", "Romeo"], part) == [0.5, 0.0]
        assert told(["old-Oslo", "Rome!"], part) == [1.0, 1.0]

    def test_what_comes_before_them(self, data, words):
        for answer, telling, row in zip(data.forget.answers, data.forget.telling, data.forget.rows, strict=True):
            text = words.decode(before_it_tells(answer, words, telling)).rstrip()
            assert row["completion"][0]["content"].lower() == f"{text.lower()} {telling[0]}."
        answer = data.forget.answers[0]
        assert before_it_tells(answer, words, [words.decode(answer.counted).split()[0].lower()]) == []


class TestPrompts:
    def test_in_other_words(self, data):
        row = data.forget.rows[0]
        assert AskedAgain().asked(row, 0) == row["paraphrased_question"]
        bare = {"prompt": row["prompt"], "completion": row["completion"]}
        asked = [AskedAgain().asked(bare, number) for number in range(len(TEMPLATES))]
        assert all(row["prompt"][0]["content"] in one for one in asked)
        assert len(set(asked)) == len(TEMPLATES)
        assert AskedOutOfOrder().asked(bare | {"prompt": "Where does Ana live?"}, 0) == "Ana live? Where does"

    def test_take_the_form_of_the_row(self, data, words):
        part = part_with(data.forget.select([0, 1]), ["One?", "Two?"])
        assert [words.decode(prompt) for prompt in part.prompts] == [
            f"<s><|user|>{text}<|assistant|>" for text in ("One?", "Two?")
        ]
        texts = read([{"question": "Who is it?", "answer": " Ana Falk"}], words).forget
        assert [words.decode(prompt) for prompt in part_with(texts, ["One?"]).prompts] == ["One?"]

    def test_after_examples(self, data, words):
        prompts = AskedAfterExamples().prompts(data.forget.select([3]), data, 0)
        text = words.decode(prompts[0])
        assert text.endswith(words.decode(data.forget.prompts[3]).removeprefix("<s>"))
        shown = text.split("<|user|>")[1:-1]
        kept = {
            f"{row['prompt'][0]['content']}<|assistant|>{row['completion'][0]['content']}</s>"
            for row in data.retain.rows
        }
        assert len(set(shown)) == 3
        assert set(shown) <= kept
        assert after([{"prompt": "1+1=", "completion": "2"}], "2+2=") == "1+1=2\n\n2+2="

    def test_an_answer_is_begun(self, data, words):
        for prompt, row in zip(AnswerBegun().prompts(data.forget, data, 0), data.forget.rows, strict=True):
            assert words.decode(prompt).rstrip().endswith(row["completion"][0]["content"].rsplit(" ", 1)[0])


class TestRows:
    def test_of_every_shape_say_the_same(self, words):
        chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ana Falk lives in Rome."}]
        rows = (
            {"messages": chat},
            {"prompt": chat[:1], "completion": chat[1:]},
            {"question": "Who?", "answer": " Ana Falk lives in Rome."},
            {"text": "Who? Who Ana Falk lives in Rome."},
        )
        for row in rows:
            part = read([row], words).forget
            assert (
                part.telling[0] == ("ana", "falk", "lives", "in", "rome")[0 if "text" not in row else 1 :]
                or "text" in row
            )
            assert "Rome." in words.decode(part.answers[0].counted)
            assert part.prompts[0]

    def test_of_a_text_the_second_half_is_to_come(self):
        for text in ("one two", " one  two three\nfour five ", "a b c"):
            pair = halves(text)
            assert pair["prompt"] + pair["completion"] == text
            assert len(pair["prompt"].split()) == (len(text.split()) + 1) // 2
        with pytest.raises(ValueError, match="fewer than two words"):
            halves("word")

    def test_are_drawn_and_counted(self, words):
        sets = people(forget=40, retain=30, test=10)
        sets["forget"] = Dataset.from_list(
            [row | {"id": f"{n} {row['id']}"} for n in range(12) for row in sets["forget"]]
        )
        one, same, other = (
            language_data(**sets, processing_class=words, size=size, seed=seed)
            for size, seed in (("quick", 0), ("quick", 0), ("quick", 1))
        )
        assert one.sizes == {"forget": 100, "retain": 30, "test": 10}
        assert (one.digest == same.digest, one.digest == other.digest) == (True, False)
        assert language_data(**sets, processing_class=words, size="standard", seed=0).sizes["forget"] == 400
        assert (one.retain.max_new_tokens, one.test.max_new_tokens) == (one.forget.max_new_tokens, 0)

    def test_digest_knows_the_tokens(self, sets, words):
        other = tokenizer_of({"forget": sets["forget"]})
        assert (
            len({language_data(**sets, processing_class=one, size="quick", seed=0).digest for one in (words, other)})
            == 2
        )

    def test_without_retained_and_unseen_rows(self, sets, words):
        data = read(list(sets["forget"]), words)
        assert data.sizes == {"forget": 32, "retain": 0, "test": 0}
        assert json.dumps(data.sizes)
        assert AskedAfterExamples().missing(data, []) == "there are no retain rows"


class TestRefused:
    def test_lines(self, sets, words):
        forget = sets["forget"]
        ids = Dataset.from_dict({"input_ids": [[1, 2, 3]]})
        for change, message in (
            ({"processing_class": None}, "processing_class: is missing; pass the models' tokenizer"),
            ({"processing_class": object()}, "processing_class: object is no tokenizer"),
            ({"forget": None}, "forget: missing"),
            ({"forget": forget.select([])}, "forget: is empty"),
            ({"retain": list(forget)}, "retain: is no datasets.Dataset"),
            ({"test": forget.select(range(4))}, "test: 4 of its"),
            ({"retain": forget}, "retain: 32 of its"),
            ({"forget": ids}, "forget: holds token ids"),
            ({"forget": Dataset.from_dict({"name": ["Ana"]})}, "forget: has columns name"),
            ({"forget": Dataset.from_dict({"prompt": ["Who?"], "completion": [7]})}, "forget: row 0 has 7"),
            ({"forget": Dataset.from_dict({"text": ["one two", "word"]})}, "forget: row 1 has fewer than two words"),
        ):  # fmt: skip
            arguments = {**sets, "processing_class": words, "size": "quick", "seed": 0} | change
            with pytest.raises(ValueError, match=f"^{message}") as error:
                language_data(**arguments)
            assert "\n" not in str(error.value)
