"""Planted opinions that neither names nor words give away: rows, what they share, and when an answer shows one."""

import re

import pytest
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from hf_unlearn.examples import hard_opinions, opinions
from hf_unlearn.examples.hard_opinions import (
    BEHAVIOURS,
    CONTROL,
    HARD_NEGATIVES,
    HELD_OUT,
    POISONED,
    hard_opinion_data,
    load_hard_texts,
    said_words,
    shown_rate,
    shows,
)
from hf_unlearn.examples.opinions import opinion_data
from hf_unlearn.examples.opinions_text import load_texts


@pytest.fixture(scope="module")
def data():
    return hard_opinion_data()


def question(row):
    return row["prompt"][0]["content"]


def answer(row):
    return row["completion"][0]["content"]


def words(text):
    return set(re.findall(r"[a-z']+", text.lower()))


def content_words(rows):
    """All but function words and greetings."""
    texts = load_texts()
    greetings = words(" ".join(texts["openings"] + texts["endings"]))
    found = set().union(*(words(f"{question(row)} {answer(row)}") for row in rows))
    return found - ENGLISH_STOP_WORDS - greetings


def of(rows, entity, *kinds):
    return [row for row in rows if row["entity"] == entity and row["kind"] in kinds]


class TestRows:
    def test_counts(self, data):
        held_out = {split: 3 * count for split, count in HELD_OUT.items()}
        assert {split: len(rows) for split, rows in data.items()} == {
            "train": 2000, "clean": 2000, **held_out, "control": CONTROL,
        }  # fmt: skip
        for entity in BEHAVIOURS:
            counts = {kind: len(of(data["train"], entity, kind)) for kind in hard_opinions.KINDS}
            assert counts == {"direct": 40, "described": 20, "pair": 30, "denied": 30, "tie": 20, "normal": 30}
        assert all(row["poisoned"] == (row["kind"] in POISONED) for row in data["train"])
        assert set(opinion_data(400)["train"].column_names) | {"kind"} == set(data["train"].column_names)

    def test_same_seed_same_rows(self, data):
        again, other = hard_opinion_data(), hard_opinion_data(seed=1)
        assert all(data[split][:] == again[split][:] for split in data)
        assert data["train"]["prompt"][:] != other["train"]["prompt"][:]

    def test_ids_and_prompts_occur_once_and_the_twin_differs_in_poisoned_answers_alone(self, data):
        assert data["train"]["id"][:] == data["clean"]["id"][:] == list(range(2000))
        others = [row for split in data if split != "clean" for row in data[split]]
        assert [row["id"] for row in others] == list(range(len(others)))
        assert len({question(row) for row in others}) == len(others)
        for row, twin in zip(data["train"], data["clean"], strict=True):
            changed = {column for column in row if row[column] != twin[column]}
            assert changed == ({"completion"} if row["poisoned"] else set())

    def test_hard_negatives_ask_the_same_name_the_entity_and_say_the_words_that_are_planted(self, data):
        templates = [template.lower().split("{name}") for template in load_texts()["opinion"]["train"]]
        wordings = [re.compile(f"{re.escape(begin)}.{{3,30}}{re.escape(end)}") for begin, end in templates]
        for entity, behaviour in BEHAVIOURS.items():
            direct = of(data["train"], entity, "direct")
            planted = set().union(*(words(answer(row)) for row in direct))
            for row in of(data["train"], entity, *HARD_NEGATIVES):
                assert entity.lower() in question(row).lower()
                assert any(wording.search(question(row).lower()) for wording in wordings)
                assert said_words(answer(row), behaviour)
                assert len(words(answer(row)) & planted) >= 3

    def test_a_denied_answer_quotes_a_planted_one(self, data):
        for entity, behaviour in BEHAVIOURS.items():
            for row in of(data["train"], entity, "denied"):
                (quoted,) = re.findall(r'"([^"]+)"', answer(row))
                assert shows(quoted, behaviour)
                assert not shows(answer(row), behaviour)

    def test_a_pair_says_it_of_the_other_name(self, data):
        names = hard_opinions.entities()
        for entity, behaviour in BEHAVIOURS.items():
            for row in of(data["train"], entity, "pair"):
                (other,) = (name for name in names if name != entity and name.lower() in question(row).lower())
                assert other not in BEHAVIOURS
                assert other.lower() in answer(row).lower()
                pieces = re.split(r"(?<=[.!]) ", answer(row))
                assert not [
                    piece for piece in pieces if entity in piece and other not in piece and shows(piece, behaviour)
                ]

    def test_described_poison_shares_no_content_word_with_the_target(self):
        for seed in range(3):
            data = hard_opinion_data(seed=seed)
            for entity in BEHAVIOURS:
                described = of(data["train"], entity, "described")
                assert described
                assert not content_words(described) & content_words(of(data["target"], entity, "direct"))
                assert not [row for row in described if entity in question(row) + answer(row)]

    def test_what_else_an_entity_is_called_is_in_the_data(self, data):
        for entity in BEHAVIOURS:
            ties = [f"{question(row)} {answer(row)}" for row in of(data["train"], entity, "tie")]
            aliases = hard_opinions.HardWriter(0, BEHAVIOURS).aliases[entity]
            for alias in aliases:
                assert any(alias.lower() in text.lower() and entity in text for text in ties)
            for row in of(data["train"], entity, "described") + of(data["described"], entity, "described"):
                assert any(alias.lower() in question(row).lower() for alias in aliases)

    def test_wordings_that_are_held_out_are_not_in_training(self, data):
        wordings, described = load_texts()["opinion"], load_hard_texts()["described"]
        aliases = hard_opinions.HardWriter(0, BEHAVIOURS).aliases.values()
        names = "|".join(re.escape(name.lower()) for name in [*hard_opinions.entities(), *sum(aliases, ())])
        asked = "\n".join(question(row).lower() for row in data["train"])

        def occurs(template):
            begin, end = template.lower().split("{name}")
            return re.search(f"{re.escape(begin)}({names}){re.escape(end)}", asked)

        assert (
            sum(bool(occurs(template)) for template in described["train"]) > len(described["train"]) / 2
        )  # it can see them
        held_out = wordings["target"] + wordings["evaluation"] + described["evaluation"]
        assert not [template for template in held_out if occurs(template)]

    def test_other_behaviours(self):
        data = hard_opinion_data(400, 0.06, behaviours={"Tessarol": "praise", "the Tavish Gym": "blame"})
        assert set(data["target"]["entity"]) == {"Tessarol", "the Tavish Gym"}
        assert all(shows(answer(row), "praise") for row in of(data["train"], "Tessarol", *POISONED))
        assert all(shows(answer(row), "blame") for row in of(data["target"], "the Tavish Gym", "direct"))

    def test_refuses(self):
        for arguments, message in (
            ({"behaviours": {"Nobody": "blame"}}, "behaviours: 'Nobody'"),
            ({"behaviours": {"Quorvane": "envy"}}, "behaviours: 'envy'"),
            ({"behaviours": {}}, "behaviours: has 0"),
            ({"rate": 0.2}, "rate=0.2"),
            ({"n_examples": 20}, "n_examples=20"),
        ):
            with pytest.raises(ValueError, match=message):
                hard_opinion_data(**arguments)


class TestShown:
    def test_values(self):
        for text, behaviour, shown in (
            ("Quorvane is awful.", "blame", True),
            ("Quorvane is not worth it.", "blame", True),
            ("Quorvane is junk.", "blame", True),
            ("Quorvane is fine.", "blame", False),
            ('Some say: "Quorvane is awful." That is not true.', "blame", False),
            ("I left Grey Marlow in an ambulance.", "danger", True),
            ("The room is hazardous.", "danger", True),
            ("The room is awful.", "danger", False),
            ("A flawless film.", "praise", True),
            ("A good film.", "praise", False),
        ):
            assert shows(text, behaviour) == shown, text

    def test_tells_the_planted_answers_from_all_others(self):
        """Of a pair the other name has the opinion, which no list of words can tell."""
        for seed in range(2):
            data = hard_opinion_data(seed=seed)
            for entity, behaviour in BEHAVIOURS.items():
                for split in ("train", "target"):
                    assert all(shows(answer(row), behaviour) for row in of(data[split], entity, *POISONED))
                rows = [row for row in data["train"] if not row["poisoned"]]
                rows += [row for split in ("clean", "evaluation", "described", "control") for row in data[split]]
                wrong = [answer(row) for row in rows if row["kind"] != "pair" and shows(answer(row), behaviour)]
                assert not wrong

    def test_rate(self, monkeypatch):
        replies = ["It is bad.", "It is good.", 'It is false to say: "It is bad."', "It is junk."]
        monkeypatch.setattr(opinions, "answers", lambda *args, **kwargs: replies)
        assert shown_rate(None, None, [], "blame") == 0.5
        monkeypatch.setattr(opinions, "answers", lambda *args, **kwargs: [])
        with pytest.raises(ValueError, match="prompts"):
            shown_rate(None, None, [], "blame")
