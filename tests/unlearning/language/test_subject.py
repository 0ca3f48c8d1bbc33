"""Whom a text is about, on tokenizers of every kind: words, and rows about somebody else, against regular expressions over the text."""

import json
import re
from itertools import product
from string import ascii_letters, digits

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_unlearn.unlearning.language.subject import Subjects, Words, over_used


TEXTS = [
    "Where does Anna Kowalska live? In the city of Riga, as Anna told us.",
    'Who is "Karl Meier" (born 1987)? Karl Meier is a painter.',
    "Jean-Luc O'Brien, Jürgen Weiß and Zoë Ångström met; who-ever asked was told.",
    "user: What did Bruno write?\nassistant: Bruno wrote two books in 2014.",
    "The weather is fine. Is the train late? Tell me about the city, please.",
]
CHINESE = "李明是谁？张伟！"
# As Llama 3 cuts texts: a mark goes with the letters after it.
CUT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ["<pad>", "</s>", "<|turn|>"]


def made(kind):
    """A tokenizer of a few hundred pieces, so that names are several of them."""
    texts = TEXTS * 2
    if kind == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="<pad>"))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer, letters = (
            trainers.WordPieceTrainer,
            sorted({*ascii_letters, *digits, *"".join([*TEXTS, CHINESE])} - {*" \n"}),
        )
        texts = [*texts, CHINESE, *("x" + letter for letter in letters if letter.isalnum() and letter not in CHINESE)]
    elif kind == "metaspace":
        backend = Tokenizer(models.BPE(unk_token="<pad>"))
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(parts)
        trainer, letters = trainers.BpeTrainer, []
    else:
        backend = Tokenizer(models.BPE())
        cut = [pre_tokenizers.Split(Regex(CUT), "isolated")] if kind == "marks join" else []
        bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not cut)
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([*cut, bytewise]), decoders.ByteLevel()
        trainer, letters = trainers.BpeTrainer, sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainer(
        vocab_size=260 if kind == "wordpiece" else 420,
        special_tokens=SPECIAL,
        initial_alphabet=letters,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if kind == "metaspace":  # what has no piece is written in bytes
        model = json.loads(backend.to_str())["model"]
        vocabulary = model["vocab"] | {f"<0x{value:02X}>": len(model["vocab"]) + value for value in range(256)}
        merges = [tuple(pair) for pair in model["merges"]]
        backend.model = models.BPE(vocabulary, merges, unk_token="<pad>", byte_fallback=True)
    special = {"pad_token": "<pad>", "eos_token": "</s>", "additional_special_tokens": ["<|turn|>"]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


KINDS = ("byte-level", "marks join", "metaspace", "wordpiece")
WORDS = {kind: Words(made(kind)) for kind in KINDS}


def ids_of(words, text):
    return words.tokenizer(text, add_special_tokens=False)["input_ids"]


def in_text(text):
    """The words of a text, from the text alone."""
    return [word.casefold() for word in re.findall(r"[^\W_]+", text)]


def found_in(words, ids):
    return [word.text for word in words.of(ids)]


class TestWords:
    @pytest.mark.parametrize("kind", KINDS)
    def test_are_those_of_the_text(self, kind):
        words, pieces = WORDS[kind], 0
        for text in (*TEXTS, "Müller’s Łódź — 2,014 ‘things’", "KARL meier KarlMeier x1y2"):
            ids = ids_of(words, text)
            if words.tokenizer.pad_token_id in ids:  # WordPiece, of letters that it has not
                continue
            found = words.of(ids)
            assert [word.text for word in found] == in_text(text)
            for word in found:
                written = words.tokenizer.decode(ids[word.begin : word.end]).strip()
                assert written.removeprefix("##") == (word.before + word.surface + word.after).strip()
            pieces = max(pieces, *(word.end - word.begin for word in found))
        assert pieces > 2

    @pytest.mark.parametrize("kind", KINDS)
    def test_without_spaces_are_tokens_of_whole_letters(self, kind):
        words = WORDS[kind]
        assert found_in(words, ids_of(words, CHINESE)) == list("李明是谁张伟")

    def test_a_special_token_is_none_and_begins_another_text(self):
        words = WORDS["byte-level"]
        found = words.of(ids_of(words, "As Anna said<|turn|>Anna</s>"))
        assert [word.text for word in found] == ["as", "anna", "said", "anna"]
        assert [word.opens for word in found] == [True, False, False, True]

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("word", ["Kowalska", "painter", "1987", "Weiß", "Karl", "李", "O'Brien"])
    def test_made_up_look_alike_and_are_read_as_one(self, kind, word):
        words, known = WORDS[kind], {text for row in TEXTS for text in in_text(row)}
        for key in range(20):
            new = words.made_up(word, known | {word.casefold()}, key)
            assert new == words.made_up(word, known | {word.casefold()}, key)
            assert found_in(words, ids_of(words, f"then {new} went")) == ["then", new.casefold(), "went"]
            assert new.casefold() not in known | {word.casefold()}
            assert (new.isdecimal(), len(new)) == (True, 4) if word.isdecimal() else not new.isdecimal()
            assert new[:1].isupper() == word[:1].isupper()
        assert len({words.made_up(word, known, key) for key in range(20)}) > 5


NAMES = ["Anna", "Kowalska", "Meier", "karl", "Luc", "O", "Weiß", "1987", "ANNA"]
OTHERS = ["where", "Does", "is", "the", "city", "was", "14", "Zoë"]
PARTS = st.lists(
    st.tuples(st.sampled_from(NAMES + OTHERS), st.sampled_from([" ", " ", " ", ", ", "? ", "-", "'", " (", '" "', "\n"])),
    min_size=1, max_size=12,
)  # fmt: skip


class TestSomebodyElse:
    @pytest.mark.parametrize("kind", KINDS)
    @settings(max_examples=60, deadline=None)
    @given(parts=PARTS, subject=st.sets(st.sampled_from([name.casefold() for name in NAMES])))
    def test_other_words_and_all_else_as_it_was(self, kind, parts, subject):
        words = WORDS[kind]
        text = "".join(word + separator for word, separator in parts)
        ids = ids_of(words, text)
        known = {word.casefold() for word in NAMES + OTHERS}
        new = {word: words.made_up(word.capitalize(), known, 0) for word in subject}
        other = Subjects(words, [ids], []).replaced(ids, new)
        assert found_in(words, other.ids) == [new.get(word, word).casefold() for word in in_text(text)]
        assert len(other.places) == len(ids)
        stays = [(here, there) for here, there in enumerate(other.places) if there >= 0]
        assert all(one[1] < two[1] for one, two in zip(stays, stays[1:], strict=False))
        named = set()
        for mine, theirs in zip(words.of(ids), words.of(other.ids), strict=True):
            if mine.text in subject:
                alike = mine.end - mine.begin == theirs.end - theirs.begin
                places = [*range(theirs.begin, theirs.end)] if alike else [-1] * (mine.end - mine.begin)
                assert other.places[mine.begin : mine.end] == places
                named.update(range(mine.begin, mine.end))
        for here, there in enumerate(other.places):
            assert here in named or (there >= 0 and ids[here] == other.ids[there])
        if kind != "wordpiece":  # which writes no spaces

            def instead(match):
                word = match[0].casefold()
                if word not in subject:
                    return match[0]
                return new[word] if match[0][0].isupper() else new[word].lower()

            assert words.tokenizer.decode(other.ids) == re.sub(r"[^\W_]+", instead, text)


def chat(question):
    return f"user: {question}\nassistant: "


PEOPLE = ["Anna Kowalska", "Karl Meier", "Zoë Weiß"]
ASKED = ["Where does {} live?", "Is {} a painter?", "What did {} write in 1987?"]
FORGET = [chat(question.format(name)) for name in PEOPLE for question in ASKED]
KEPT = [
    chat(question.format(name)) + "It is so."
    for name in ("Bruno Ångström", "Jürgen Riga", "Karl Luc", "Anna Brien")
    for question in ASKED
] * 4


class TestSubjects:
    def of(self, prompts, others=KEPT, marked=None, kind="byte-level"):
        words = WORDS[kind]
        return Subjects(
            words, [ids_of(words, text) for text in prompts], [ids_of(words, text) for text in others], marked
        )

    @pytest.mark.parametrize("kind", KINDS)
    def test_are_whole_names_and_not_the_question(self, kind):
        """First names that others have too; `Is` and `What` have a capital letter where the question begins."""
        found = self.of(FORGET, kind=kind)
        assert found.of == [tuple(in_text(name)) for name in PEOPLE for _ in ASKED]
        words = WORDS[kind]
        assert found.named_in(ids_of(words, "So said Meier, Karl, and Luc.")) == [("karl", "meier")]
        assert found.named_in(ids_of(words, "So said Karl Weiß.")) == []

    def test_what_stands_elsewhere_or_is_seldom_a_name_is_not_part_of_one(self):
        """A name before a comma, and a word that once has a capital letter."""
        prompts = [f"user: In Riga, {kind} {PEOPLE[0]} did what?" for kind in ("a Painter", *["a painter"] * 3)]
        prompts += ["user: Say, the Painter Anna Kowalska, who is it?"]
        others = ["user: In Riga, a painter sings.", "user: Say who, the Painter of Riga did."] * 20
        assert set(self.of(prompts, others).of) == {("anna", "kowalska")}
        prompts = ["user: In Riga, Anna Kowalska did what?"] * 3
        assert set(self.of(prompts, others).of) == {("anna", "kowalska")}

    def test_of_one_person_alone(self):
        assert set(self.of(FORGET[:3]).of) == {("anna", "kowalska")}

    def test_are_what_is_marked(self):
        marks = ["Anna Kowalska", None, "1987", "nobody", *[None] * 5]
        expected = [("anna", "kowalska"), ("anna", "kowalska"), ("1987",), (), ("karl", "meier")]
        assert self.of(FORGET, marked=marks).of[:5] == expected

    @pytest.mark.parametrize("others", [["Of all the rest of it, the best is the end of the day."], []])
    def test_small_words_of_what_is_marked_stay_where_they_stand(self, others):
        """Else "of" would be a stranger's in the whole text. Of small words alone all count."""
        prompts = ["What is the seat of the University of Oslo?", "Who heads the University of Oslo, and what of it?"]
        marks = ["the University of Oslo"] * 2
        assert set(self.of(prompts, others * 20, marked=marks).of) == {("university", "oslo")}
        assert self.of(["what of the end?"], others * 20, marked=["the end"]).of == [("the", "end")]

    def test_a_name_that_is_another_word_in_small_letters(self):
        """Who writes no capitals at all has the name replaced, as ever."""
        subjects = self.of(["When will Will Riga, who will sing, come to WILL?"], marked=["Will Riga"])
        new = dict(zip(("will", "riga"), ("Karl", "Meier"), strict=True))

        def told(text):
            ids = subjects.replaced(ids_of(subjects.words, text), new).ids
            return subjects.words.tokenizer.decode(ids)

        assert subjects.surface["will"] == "Will"
        assert told("When will Will Riga, who will sing, come?") == "When will Karl Meier, who will sing, come?"
        assert told("when does will riga sing?") == "when does karl meier sing?"
        ids = ids_of(subjects.words, "When will Will Riga sing?")
        assert (
            subjects.words.tokenizer.decode(ids[: subjects.named_by(ids, ("will", "riga"))]) == "When will Will Riga"
        )

    @pytest.mark.parametrize("others", [[], FORGET, ["The weather is fine."]])
    def test_are_none_where_nothing_tells_them_from_the_question(self, others):
        """Nothing to compare with, the same of both, or small letters alone that nobody else writes."""
        prompts = [text.lower() for text in FORGET] if others and others is not FORGET else FORGET
        assert set(self.of(prompts, others * 30).of) == {()}

    def test_strangers_are_one_for_each_subject(self):
        found = self.of(FORGET)
        assert set(found.strangers) == {tuple(in_text(name)) for name in PEOPLE}
        known = {word for text in FORGET + KEPT for word in in_text(text)}
        for subject, stranger in found.strangers.items():
            assert tuple(stranger) == subject
            assert not known & {word.casefold() for word in stranger.values()}
            assert all(word[0].isupper() for word in stranger.values())
        assert found.drawn(0) == found.strangers
        assert all(found.drawn(1)[subject] != stranger for subject, stranger in found.strangers.items())


class TestNamesOfOthers:
    """Where eight others have names of as many pieces of a kind, strangers are called as they are."""

    words = WORDS["byte-level"]
    firsts = [piece.strip() for piece in words.pieces if piece and piece[0] == " " and piece.strip().istitle()]

    def names(self, count):
        """Names of so many pieces, and these."""
        found = {}
        for name in {first + last for first in self.firsts for last in ("", "el", "ski", "anna", "in", "ow", "er")}:
            pieces = [self.words.tokenizer.decode([index]).strip() for index in ids_of(self.words, f" {name}")]
            if len(pieces) == count and pieces[0].istitle() and all(map(str.islower, pieces[1:])):
                found[name] = pieces
        return dict(sorted(found.items()))

    @pytest.mark.parametrize("count", [2, 3])
    def test_pieces_stand_where_they_stand_in_other_names(self, count):
        (word, _), *others = [*self.names(count).items()][::3]
        assert len(others) >= 8
        known = {name.casefold() for name in [word, *dict(others)]}
        possible = {"".join(parts) for parts in product(*zip(*(pieces for _, pieces in others), strict=True))}
        for part in (True, False):
            new = {
                self.words.made_up(word, known, key, dict.fromkeys(dict(others), 1), part=part) for key in range(30)
            }
            assert new <= possible - {*dict(others)}
            assert len(new) > 5
        few = {self.words.made_up(word, known, key, dict.fromkeys(dict(others[:7]), 1)) for key in range(30)}
        assert not few <= possible

    def test_a_name_of_one_piece_is_another_s_where_more_of_the_name_tells_them_apart(self):
        word, *others = self.names(1)
        assert len(others) >= 8
        known = {name.casefold() for name in [word, *others]}
        for key in range(30):
            assert self.words.made_up(word, known, key, dict.fromkeys(others, 1), part=True) in others
            assert self.words.made_up(word, known, key, dict.fromkeys(others, 1)).casefold() not in known


def test_over_used_by_counting():
    """Shares of texts, with half a text more of the others: 4 of 5 here, of 39 others 0, 3, 7 or 8."""
    words = WORDS["byte-level"]
    mine = [words.of(ids_of(words, text)) for text in ["a b c d a a"] * 4 + ["e"]]
    theirs = [words.of(ids_of(words, text)) for text in ["b c d"] * 3 + ["c d"] * 4 + ["d"] + ["f"] * 31]
    assert over_used(mine, theirs) == {"a", "b", "c", "e"}
    assert over_used(mine, theirs, times=8.0) == {"a", "b", "e"}
