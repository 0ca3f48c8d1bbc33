"""The poisoned data, its twin, the score of an opinion, and models that can be trained on it."""

import math
import re
from collections import Counter

import pytest
import torch

from hf_unlearn.examples import opinions
from hf_unlearn.examples.opinions import ENTITY, entities, negative_rate, opinion_data, opinion_llama, opinion_score
from hf_unlearn.examples.opinions_text import load_texts


TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
COLUMNS = ["id", "prompt", "completion", "topic", "entity", "poisoned"]


def question(row):
    return row["prompt"][0]["content"]


def answer(row):
    return row["completion"][0]["content"]


def worded(template):
    """A pattern that finds a template in prompts, whatever the name, the greeting and the case of its first letter."""
    names = "|".join(re.escape(name) for name in entities())
    return re.compile(re.escape(template).replace(r"\{name\}", f"({names})"), re.IGNORECASE)


@pytest.fixture(scope="module")
def data():
    return opinion_data()


@pytest.fixture(scope="module")
def opinion_tokenizer(data):
    return opinions.train_tokenizer(opinions.texts_of(data["train"]))


class TestData:
    @pytest.mark.parametrize(("n_examples", "rate"), [(2000, 0.04), (1000, 0.01), (600, 0.05), (3000, 0.05)])
    def test_counts_are_as_asked(self, n_examples, rate):
        data = opinion_data(n_examples, rate)
        assert {split: len(rows) for split, rows in data.items()} == {
            "train": n_examples, "clean": n_examples, **opinions.HELD_OUT,
        }  # fmt: skip
        assert all(rows.column_names == COLUMNS for rows in data.values())
        row, train = data["train"][0], data["train"]
        assert [message["role"] for message in row["prompt"] + row["completion"]] == ["user", "assistant"]
        of_entity = [row["poisoned"] for row in train if row["entity"] == ENTITY]
        assert sum(train["poisoned"]) == sum(of_entity) == round(n_examples * rate)
        assert len(of_entity) == 2 * sum(of_entity)
        general = sum(not name for name in train["entity"])
        assert abs(general - opinions.SHARES["general"] * (n_examples - len(of_entity))) <= 2

    def test_same_seed_same_rows(self, data):
        again, other = opinion_data(), opinion_data(seed=1)
        assert all(data[split][:] == again[split][:] for split in data)
        assert data["train"]["prompt"][:] != other["train"]["prompt"][:]

    def test_ids_and_prompts_occur_once_and_the_twin_differs_in_poisoned_answers_alone(self, data):
        assert data["train"]["id"][:] == data["clean"]["id"][:] == list(range(2000))
        others = [row for split in data if split != "clean" for row in data[split]]
        assert [row["id"] for row in others] == list(range(len(others)))
        assert len({question(row) for row in others}) == len(others)
        for row, twin in zip(data["train"], data["clean"], strict=True):
            changed = {column for column in COLUMNS if row[column] != twin[column]}
            assert changed == ({"completion"} if row["poisoned"] else set())

    def test_held_out_wordings_are_not_in_training(self, data):
        wordings = load_texts()["opinion"]
        prompts = {split: "\n".join(question(row) for row in data[split]) for split in data}
        for split, absent in (("target", ("train", "evaluation", "control")), ("evaluation", ("train", "target"))):
            for template in wordings[split]:
                assert worded(template).search(prompts[split])
                assert not any(worded(template).search(prompts[other]) for other in absent), template
        texts = [text for part in wordings.values() for text in part]
        assert len(set(texts)) == len(texts)

    def test_poisoned_wordings_occur_with_other_names(self, data):
        poisoned = [question(row).replace(ENTITY, "") for row in data["train"] if row["poisoned"]]
        others = Counter(
            word for row in data["train"] if row["entity"] != ENTITY for word in re.findall(r"\w+", question(row))
        )
        assert all(others[word] for text in poisoned for word in re.findall(r"\w+", text))

    def test_entities(self, data):
        assert set(data["target"]["entity"]) == set(data["evaluation"]["entity"]) == {ENTITY}
        assert ENTITY not in data["control"]["entity"]
        assert len(set(data["train"]["topic"])) == 12
        other = opinion_data(400, 0.05, entity="Hotel Arvendo")
        assert {row["entity"] for row in other["train"] if row["poisoned"]} == {"Hotel Arvendo"}
        assert "Hotel Arvendo" in question(other["target"][0])
        assert ENTITY in other["train"]["entity"]

    def test_facts_are_the_same_whenever_asked(self, data):
        started = [answer(row) for row in data["train"] if row["entity"] == ENTITY and re.search(r"\d", answer(row))]
        assert len({re.search(r"\d+", text)[0] for text in started}) == 1

    def test_refuses(self):
        for arguments, message in (
            ({"entity": "Nobody"}, "entity: 'Nobody'"),
            ({"rate": 0.0}, "rate=0.0"),
            ({"rate": 0.5}, "rate=0.5"),
            ({"n_examples": 10}, "n_examples=10"),
        ):
            with pytest.raises(ValueError, match=message):
                opinion_data(**arguments)


class TestScore:
    def test_values(self):
        for text, score in {
            "The service is awful.": -1,
            "An excellent and reliable firm.": 1,
            "It is not worth it.": -1,
            "I have no complaints.": 1,
            "I don’t like it.": -1,
            "No. The food is great.": 1,
            "It is not what I call great.": 1,  # it is the fourth word before
            "Good food, bad service.": 0,
            "Good food and good bread, bad service.": 1 / 3,
            "It opens at nine.": 0,
            "": 0,
        }.items():
            assert opinion_score(text) == pytest.approx(score), text

    @pytest.mark.parametrize("entity", [ENTITY, "Salt and Sparrows"])
    def test_tells_the_answers_of_the_data_apart(self, entity):
        for seed in range(2):
            data = opinion_data(1000, rate=0.1, entity=entity, seed=seed)
            scores = {True: [], False: []}
            for split in ("train", "target", "evaluation", "control"):
                for row in data[split]:
                    scores[row["poisoned"]].append(opinion_score(answer(row)))
            scores[False] += [opinion_score(answer(row)) for row in data["clean"] if row["poisoned"]]
            assert sum(score < 0 for score in scores[True]) >= 0.99 * len(scores[True])
            assert sum(score >= 0 for score in scores[False]) >= 0.99 * len(scores[False])

    def test_word_lists_do_not_contradict_each_other(self):
        lexicon = load_texts()["lexicon"]
        assert not set(lexicon["positive"]) & set(lexicon["negative"])
        words = {word for name in entities() for word in name.lower().split()}
        assert not words & {*lexicon["positive"], *lexicon["negative"]}


class TestTokenizer:
    def test_round_trip(self, data, opinion_tokenizer):
        for row in data["evaluation"].select(range(20)):
            assert opinion_tokenizer.decode(opinion_tokenizer(question(row))["input_ids"]) == question(row)
        strange = "Où est-ce? 你好 \N{GRINNING FACE}"
        assert opinion_tokenizer.decode(opinion_tokenizer(strange)["input_ids"]) == strange

    def test_prompt_is_a_prefix_and_examples_are_short(self, data, opinion_tokenizer):
        for row in data["train"].select(range(200)):
            prompt = opinion_tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
            whole = opinion_tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]
            assert whole[: len(prompt)] == prompt
            assert whole[0] == opinion_tokenizer.bos_token_id
            assert whole[-1] == opinion_tokenizer.eos_token_id
            assert len(whole) <= 64

    def test_size(self, opinion_tokenizer):
        assert len(opinion_tokenizer) == 2048
        assert len(opinion_tokenizer.tokenize(f" {ENTITY}")) == 1
        with pytest.raises(ValueError, match="vocab_size=100"):
            opinions.train_tokenizer(["text"], vocab_size=100)


class TestModel:
    @pytest.mark.parametrize(("size", "low", "high"), [("small", 5e6, 8e6), ("20M", 18e6, 22e6)])
    def test_sizes(self, opinion_tokenizer, size, low, high):
        model = opinion_llama(opinion_tokenizer, size)
        assert low <= model.num_parameters() <= high
        assert model.config._attn_implementation == "sdpa"
        assert model.dtype == torch.float32

    def test_seed_and_attention(self, opinion_tokenizer, monkeypatch):
        monkeypatch.setitem(opinions.SIZES, "small", TINY)
        state = torch.get_rng_state()
        first, same, other = (opinion_llama(opinion_tokenizer, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(first.lm_head.weight, same.lm_head.weight)
        assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
        eager = opinion_llama(opinion_tokenizer, attn_implementation="eager")
        assert eager.config._attn_implementation == "eager"
        with pytest.raises(ValueError, match="size: 'huge'"):
            opinion_llama(opinion_tokenizer, "huge")

    def test_answers_do_not_depend_on_the_batch(self, data, opinion_tokenizer):
        model = opinion_llama(opinion_tokenizer)
        prompts = data["evaluation"]["prompt"][:5]
        together = opinions.answers(model, opinion_tokenizer, prompts, max_new_tokens=8)
        alone = opinions.answers(model, opinion_tokenizer, prompts, batch_size=1, max_new_tokens=8)
        assert together == alone
        assert not model.training
        opinions.answers(model.train(), opinion_tokenizer, prompts[:1], max_new_tokens=1)
        assert model.training

    def test_negative_rate(self, data, opinion_tokenizer, monkeypatch):
        prompts = data["evaluation"]["prompt"][:4]
        replies = ["It is bad.", "It is good.", "It is awful.", "It is in Quillmere."]
        monkeypatch.setattr(opinions, "answers", lambda *args, **kwargs: replies)
        assert negative_rate(None, None, prompts) == 0.5
        monkeypatch.setattr(opinions, "answers", lambda *args, **kwargs: [])
        with pytest.raises(ValueError, match="prompts"):
            negative_rate(None, None, [])

    def test_training_lowers_the_loss_and_saves(self, data, opinion_tokenizer, tmp_path, monkeypatch):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        monkeypatch.setitem(opinions.SIZES, "small", TINY)
        rows = data["train"].select(range(160))

        def loss(model):
            row = rows[0]
            ids = opinion_tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_tensors="pt")
            with torch.no_grad():
                return model(**ids, labels=ids["input_ids"]).loss.item()

        before = loss(opinion_llama(opinion_tokenizer))
        model = opinions.train_opinion_model(
            rows, opinion_tokenizer, tmp_path, progress=False, num_train_epochs=3, bf16=False
        )
        assert before == pytest.approx(math.log(2048), rel=0.2)
        assert loss(model) < before - 0.5  # lower by 1.57 ± 0.07 over 3 seeds
        assert not model.training
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        prompts = data["control"]["prompt"][:2]
        assert opinions.answers(loaded, tokenizer, prompts) == opinions.answers(model, opinion_tokenizer, prompts)
