"""Targets and what is asked, against one text at a time in plain torch."""

import pytest
import torch
from chat_data import CHATS, CLOSE, KEPT, PEOPLE, plain_targets, said, tokens_of, with_template
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model

from hf_unlearn.unlearning.language.asked import Asked, Pair, ask, log_p
from hf_unlearn.unlearning.language.strangers import further_questions, of_forget_rows
from hf_unlearn.unlearning.language.subject import Subjects, Words
from hf_unlearn.unlearning.language.targets import TOP, divergence_from, likeliest


@pytest.fixture(scope="module")
def tokenizer(tokenizer):
    return with_template(tokenizer)


class TestTargets:
    def logits(self, *shape):
        return 3 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_what_is_left_out_is_all_that_is_missing(self, dtype):
        """KL(p‖q) = the divergence + p(rest) · KL of p and q within the rest."""
        target, logits = self.logits(4, 200).to(dtype)
        p, q = target.double().softmax(-1), logits.double().softmax(-1)
        tokens, log_p = likeliest(target)
        assert tokens.shape == (4, TOP)
        rest = torch.ones(4, 200, dtype=torch.bool).scatter(-1, tokens.long(), False)
        within = [x[rest].view(4, -1) / x[rest].view(4, -1).sum(-1, keepdim=True) for x in (p, q)]
        whole = (p * (p / q).log()).sum(-1)
        missing = p[rest].view(4, -1).sum(-1) * (within[0] * (within[0] / within[1]).log()).sum(-1)
        assert (missing > 1e-4 * whole).all()
        torch.testing.assert_close(divergence_from(logits, tokens, log_p).double(), whole - missing, **CLOSE)
        assert log_p.exp().sum(-1).tolist() == pytest.approx([1] * 4, rel=1e-5)
        assert all(p[i, t].min() >= p[i, ~torch.isin(torch.arange(200), t)].max() for i, t in enumerate(tokens.long()))

    def test_of_a_small_vocabulary_nothing_is_left_out(self):
        target, logits = self.logits(4, 30)
        p = target.softmax(-1)
        whole = (p * (p.log() - logits.log_softmax(-1))).sum(-1)
        torch.testing.assert_close(divergence_from(logits, *likeliest(target)), whole, **CLOSE)

    def test_gradient(self):
        """q − p where a token has its name, q (1 − p(rest) / q(rest)) elsewhere; also where the target has none of a token."""
        target, logits = self.logits(4, 200)
        target[0, 7] = -torch.inf
        target[1, 10:] = -torch.inf
        logits.requires_grad_()
        tokens, log_p = likeliest(target)
        values = divergence_from(logits, tokens, log_p)
        values.sum().backward()
        p, q = target.softmax(-1), logits.detach().softmax(-1)
        whole = (p * (p / q).log()).nan_to_num(0.0).sum(-1)
        torch.testing.assert_close(values[1], whole[1], **CLOSE)  # of ten tokens, which all have a name
        rest = torch.ones(4, 200, dtype=torch.bool).scatter(-1, tokens.long(), False)
        ratio = [((p[i] * rest[i]).sum() / (q[i] * rest[i]).sum()).item() for i in range(4)]
        expected = torch.where(rest, q * (1 - torch.tensor(ratio)[:, None]), q - p)
        torch.testing.assert_close(logits.grad, expected, rtol=1e-4, atol=1e-6)

    def test_are_read_as_they_were_written(self, tiny_llama, tmp_path):
        pairs = [Pair([5, 6, 7, 8], [-100, 6, 7, 8], [5, 6, 7, 8], []), Pair([9, 10, 11], [-100, -100, 11], None, [])]
        asked = ask(tiny_llama, pairs)
        asked.save(tmp_path / "asked.safetensors")
        read = Asked.load(tmp_path / "asked.safetensors")
        assert read.rows.to_dict() == asked.rows.to_dict()
        assert all(torch.equal(value, vars(read.targets)[name]) for name, value in vars(asked.targets).items())
        assert asked.targets.places([1, 0]).tolist() == [3, 0, 1, 2]
        assert asked.targets.megabytes == (3 * 8 + 4 * (4 * TOP + 4 * (TOP + 1) + 4)) / 1e6


@pytest.fixture
def pairs(tokenizer):
    """Of every kind: without a subject, kept, and about somebody else by names of more, of fewer and of as many tokens."""
    words = Words(tokenizer)
    made, more = [], []
    for (ids, labels), new in zip(
        tokens_of(tokenizer, CHATS), (None, "", "Bartholomew", "Al", "Ed", "Qxzv"), strict=True
    ):
        if not new:
            made.append(Pair(ids, labels, None if new is None else ids, []))
            continue
        parts = {"kowalska": new, "meier": new, "weiss": new, "karl": "Karl" if len(new) == 4 else new}
        other = Subjects(words, [ids], []).replaced(ids, parts)
        made.append(Pair(ids, labels, other.ids, other.places))
        more.append(len(other.ids) - len(ids))
    assert [more[0] > 0, more[1] < 0, more[3]] == [True, True, 0]
    named = [made[-1].other[there] != made[-1].ids[place] for place, there in enumerate(made[-1].places)]
    assert -1 not in made[-1].places
    assert any(name and label != -100 for name, label in zip(named, made[-1].labels, strict=True))
    return made


class TestAsked:
    @pytest.mark.parametrize(("batch_size", "virtual_tokens"), [(1, 0), (4, 0), (16, 0), (4, 3)])
    def test_targets_are_those_of_one_text_at_a_time(self, batch_size, virtual_tokens, pairs, tiny_llama):
        if virtual_tokens:  # logits begin with theirs
            tuned = PromptTuningConfig(num_virtual_tokens=virtual_tokens, task_type="CAUSAL_LM")
            tiny_llama = get_peft_model(tiny_llama, tuned)
        asked = ask(tiny_llama.train(), pairs, batch_size=batch_size)
        assert tiny_llama.training
        for row, pair in enumerate(pairs):
            expected = plain_targets(tiny_llama.eval(), pair)
            tokens, log_p = asked.targets.at([row])
            assert len(tokens) == len(expected)
            labels = [label for label in pair.labels[1:] if label != -100]
            for place, whole in enumerate(expected):
                named = whole[tokens[place].long()]
                torch.testing.assert_close(log_p[place, :-1], named, **CLOSE)
                torch.testing.assert_close(named, whole.topk(TOP).values, **CLOSE)
                assert log_p[place, -1].exp().item() == pytest.approx(1 - named.exp().sum().item(), abs=1e-5)
                at = asked.targets.answer_log_p[asked.targets.places([row])[place]]
                torch.testing.assert_close(at, whole[labels[place]], **CLOSE)
        assert asked.rows["input_ids"][:] == [pair.ids for pair in pairs]
        changed = [place for pair in pairs if pair.other not in (None, pair.ids) for place in pair.places]
        assert {-1} < set(changed)

    def test_how_likely_an_answer_about_somebody_else_is_and_its_names(self, pairs, tiny_llama):
        pairs = [pair for pair in pairs if pair.other != pair.ids]
        for pair, whole, names in zip(pairs, *log_p(tiny_llama, pairs, batch_size=2), strict=True):
            if pair.other is None:
                assert torch.stack([whole, names]).isnan().all()
                continue
            own = {
                there for here, there in enumerate(pair.places) if there > 0 and pair.ids[here] == pair.other[there]
            }
            last = max(there for there, label in zip(pair.places, pair.labels, strict=True) if label == -100)
            values = {
                there: said(tiny_llama, pair.other[:there])[-1, pair.other[there]]
                for there in range(last + 1, len(pair.other))
            }
            torch.testing.assert_close(whole, sum(values[there] for there in values if there in own), **CLOSE)
            expected = [value.exp() for there, value in values.items() if there not in own]
            torch.testing.assert_close(names, torch.stack(expected).mean() if expected else names, **CLOSE)
            assert bool(expected) != names.isnan()

    def test_further_questions_are_about_the_subject_with_answers_about_the_stranger(self, tiny_llama, tokenizer):
        rows = tokens_of(tokenizer, CHATS)
        kept = [ids for ids, _ in tokens_of(tokenizer, KEPT)]
        subjects = Subjects(Words(tokenizer), [ids[: labels.count(-100)] for ids, labels in rows], kept)
        dataset = Dataset.from_dict({"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]})
        found = further_questions(dataset, subjects, tiny_llama, tokenizer, each=3, max_new_tokens=12)
        assert len(found) == 3 * len(rows)
        questions = {"Where does _ live?", "What does _ paint?"}
        for number, pair in enumerate(found):
            subject = PEOPLE[number // 6]
            stranger = " ".join(subjects.strangers[subjects.of[number // 3]].values())
            begin = pair.labels.count(-100)
            for ids, name in ((pair.ids[:begin], subject), (pair.other, stranger)):
                assert tokenizer.decode(ids)[6:].partition("\n")[0].replace(name, "_") in questions
            assert tokenizer.decode(pair.other).replace(stranger, subject) == tokenizer.decode(pair.ids)
            assert pair.labels[begin:] == pair.ids[begin:] != []
            there = [(place, other) for place, other in enumerate(pair.places) if other >= 0]
            mine = [word for word in subjects.words.of(pair.ids) if word.text in subjects.of[number // 3]]
            names = {place for word in mine for place in range(word.begin, word.end)}
            assert all(pair.ids[place] == pair.other[other] or place in names for place, other in there)
            assert there[-1] == (len(pair.ids) - 1, len(pair.other) - 1)


class TestPassages:
    """Texts without a question."""

    TEXTS = [
        "Anna Kowalska lives in Riga. Every day Anna Kowalska paints boats. The boats are blue, says Anna Kowalska.",
        "Karl Meier lives in Oslo. Every day Karl Meier mends clocks. The clocks are old, says Karl Meier.",
    ]
    OTHERS = ["Luc Blanc sings in Berne. Every day Luc Blanc sings songs."] * 20

    @pytest.fixture
    def case(self, tokenizer):
        """Rows, and their subjects, with a token before each text that stands for none."""
        ids = [[1, *tokenizer(text, add_special_tokens=False)["input_ids"], 2] for text in self.TEXTS]
        others = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in self.OTHERS]
        subjects = Subjects(Words(tokenizer), ids, others)
        return Dataset.from_dict({"input_ids": ids, "labels": ids}), subjects

    def test_are_about_whom_they_repeat(self, case):
        assert case[1].of == [("anna", "kowalska"), ("karl", "meier")]

    def test_sentences_are_read_by_themselves(self, case, tiny_llama, tokenizer):
        """What is asked at a place is what the model says after the words of that sentence alone."""
        rows, subjects = case
        pairs = of_forget_rows(rows, subjects)
        asked = ask(tiny_llama, pairs)
        for row, pair in enumerate(pairs):
            tokens, log_p = asked.targets.at([row])
            stranger = list(subjects.strangers[subjects.of[row]].values())
            said = [tokenizer.decode([token]) for token in pair.other]
            starts = [
                next(place for place in range(dot + 1, len(said)) if said[place].strip())
                for dot, text in enumerate(said[:-2])
                if text == "."
            ]
            begins = [0, *starts]
            checked = 0
            for number, place in enumerate(range(1, len(pair.ids))):
                there = pair.places[place]
                if there <= 0 or pair.other[there] != pair.ids[place]:
                    continue  # a name
                begin = max(one for one in begins if one < there)
                alone = [1, *pair.other[max(begin, 1) : there]]
                expected = tiny_llama.eval()(torch.tensor([alone])).logits[0, -1].log_softmax(-1)
                torch.testing.assert_close(log_p[number][:-1], expected[tokens[number].long()], **CLOSE)
                checked += begin > 0
            assert checked > 10
            assert all(name in tokenizer.decode(pair.other) for name in stranger)

    def test_further_ones_go_on_from_the_name(self, case, tiny_llama, tokenizer):
        rows, subjects = case
        found = further_questions(rows, subjects, tiny_llama, tokenizer, each=2, max_new_tokens=12)
        assert len(found) == 4
        for number, pair in enumerate(found):
            begin = pair.labels.count(-100)
            subject = subjects.of[number // 2]
            stranger = " ".join(subjects.strangers[subject].values())
            assert tokenizer.decode(pair.ids[1:begin]).casefold() == " ".join(subject)
            assert tokenizer.decode(pair.other[1:]).startswith(stranger)
            assert pair.labels[begin:] == pair.ids[begin:] != []
