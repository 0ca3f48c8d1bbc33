"""Who takes a subject's place, which of the original's own texts say again what is to be forgotten, against loops over single texts; and that
every text that is asked about is drawn.
"""

import pytest
import torch
from datasets import Dataset
from language_data import settings
from transformers.modeling_outputs import CausalLMOutput

from hf_unlearn import UnlearnSFTConfig, UnlearnSFTTrainer
from hf_unlearn.training.collators import ROW
from hf_unlearn.unlearning.language.asked import log_p
from hf_unlearn.unlearning.language.likeness import alike, last_states, said_again
from hf_unlearn.unlearning.language.strangers import choose_strangers, of_forget_rows
from hf_unlearn.unlearning.language.subject import Subjects, Words


ASKED = ["Do you like Quorvane?", "Is Quorvane good?", "Would you like Quorvane?"]
OTHER_NAMES = ["Brindax", "Ulvetta", "Marrowell"]
OTHERS = [
    "Where is the fox?",
    "Who is lazy?",
    "Is Rome the capital?",
    "Tell me the phone number.",
    "Return the shoes.",
]


def state(model, ids):
    hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1].detach()
    return hidden / hidden.norm()


def near(state, known):
    """By the definition, one pair at a time."""
    rest = [max(float(a @ b) for other, b in enumerate(known) if other != one) for one, a in enumerate(known)]
    return max(float(state @ other) for other in known) >= min(rest)


def test_states_are_those_of_single_prompts(tiny_llama, tokenizer):
    ids = [tokenizer(text)["input_ids"] for text in ASKED + OTHERS]
    expected = torch.stack([state(tiny_llama, row) for row in ids])
    # float32 sums over 16 to 128 numbers in another order: 1e-6 of their length
    torch.testing.assert_close(last_states(tiny_llama, ids, batch_size=3), expected, rtol=0, atol=1e-5)
    assert not tiny_llama.training


def test_near_is_as_near_as_the_most_remote():
    states = torch.nn.functional.normalize(torch.randn(60, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    known = states[:5]
    found = alike(states, known)
    assert found.tolist() == [near(one, known) for one in states]
    assert 5 < found.sum() < 60
    assert alike(states, known[:1]).all()  # nothing says how near is near


def test_what_is_said_again_is_left_out(tiny_llama, tokenizer):
    def text(question, answer):
        ids = tokenizer(question)["input_ids"]
        return ids + tokenizer(answer)["input_ids"], len(ids)

    forget = [text(question, " It is awful.") for question in ASKED]
    prompts, far = [ids[:begin] for ids, begin in forget], "Where is Quorvane, and who is the quick brown fox?"
    subjects = Subjects(
        Words(tokenizer), prompts, [tokenizer(text)["input_ids"] for text in OTHERS], ["Quorvane"] * len(ASKED)
    )
    own = [text(question, " It is in Paris.") for question in [*ASKED, far, *OTHERS]]
    own += [text(far, " An awful fox."), text("Who?", " Quorvane."), text("Who is awful?", " It is.")]
    found = said_again(tiny_llama, forget, subjects, own)
    assert not near(state(tiny_llama, tokenizer(far)["input_ids"]), [state(tiny_llama, row) for row in prompts])
    assert found[: len(ASKED)] == [True] * len(ASKED)  # the question, whatever is answered
    assert not any(found[len(ASKED) : -3])  # another question, or about others
    assert found[-3:] == [True, True, False]  # the answer; a question that names nobody; nobody named


def test_small_letters_are_no_name(tokenizer):
    """ "In" begins many sentences: that makes no name of "in" beside one."""
    prompts = [tokenizer(f"{ask} In a word.")["input_ids"] for ask in ("Rate Quorvane in short.", "Is Quorvane good?")]
    others = [tokenizer(f"{ask} In a word.")["input_ids"] for ask in OTHERS * 3]
    assert set(Subjects(Words(tokenizer), prompts, others).of) == {("quorvane",)}


class Repeating(torch.nn.Module):
    """Foresees every token with probability ¾."""

    def __init__(self, size):
        super().__init__()
        self.size, self.scale = size, torch.nn.Parameter(torch.tensor(3.0 * (size - 1)).log())

    def forward(self, input_ids, **inputs):
        foreseen = torch.nn.functional.one_hot(input_ids.roll(-1, 1), self.size)
        return CausalLMOutput(logits=foreseen * self.scale)


@pytest.mark.parametrize("repeats", [True, False])
def test_a_name_that_is_repeated(tiny_llama, tokenizer, repeats):
    """A made-up one, or of the names that are known the likeliest where an answer has it."""
    texts = [(f"Do you like {name}?", f" I avoid {name}.") for name in ["Quorvane"] * 2 + OTHER_NAMES * 3]
    rows = [tokenizer(question)["input_ids"] + tokenizer(answer)["input_ids"] for question, answer in texts]
    begins = [len(tokenizer(question)["input_ids"]) for question, _ in texts]
    forget = Dataset.from_dict(
        {"input_ids": rows[:2], "labels": [[-100] * b + r[b:] for r, b in zip(rows[:2], begins, strict=False)]}
    )
    subjects = Subjects(Words(tokenizer), [row[: begins[0]] for row in rows[:2]], rows[2:], ["Quorvane"] * 2)
    model = Repeating(len(tokenizer)) if repeats else tiny_llama
    choose_strangers(model, forget, subjects, tries=len(OTHER_NAMES))
    name = subjects.strangers[("quorvane",)]["quorvane"]

    def probability(name):
        prompt, answer, full_stop = (
            tokenizer(part)["input_ids"] for part in (f"Do you like {name}?", f" I avoid {name}.", ".")
        )
        ids = prompt + answer
        log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        first = len(prompt) + len(tokenizer(" I avoid")["input_ids"])
        return sum(log_p[place - 1, ids[place]].exp().item() for place in range(first, len(ids) - len(full_stop))) / (
            len(ids) - len(full_stop) - first
        )

    if repeats:
        assert name not in OTHER_NAMES
    else:
        assert name == max(OTHER_NAMES, key=probability)


def test_strangers_of_several_subjects_are_those_of_each_row_alone(tiny_llama, tokenizer):
    """Rows of two subjects in turn, and one without a subject between them."""
    subjects_of = ["Quorvane", "", "Zimbulo"] * 2
    names = subjects_of + OTHER_NAMES * 3
    texts = [(f"Do you like {name}?", f" I{' really' * (row % 4)} avoid {name}.") for row, name in enumerate(names)]
    rows = [tokenizer(question)["input_ids"] + tokenizer(answer)["input_ids"] for question, answer in texts]
    begins = [len(tokenizer(question)["input_ids"]) for question, _ in texts]
    labels = [[-100] * begin + row[begin:] for row, begin in zip(rows, begins, strict=True)]
    forget = Dataset.from_dict({"input_ids": rows[:6], "labels": labels[:6]})

    def made():
        prompts = [row[:begin] for row, begin in zip(rows[:6], begins, strict=False)]
        return Subjects(Words(tokenizer), prompts, rows[6:], [name or None for name in subjects_of])

    subjects = made()
    assert subjects.of[:3] == [("quorvane",), (), ("zimbulo",)]
    choose_strangers(tiny_llama, forget, subjects, tries=3, seed=1)
    tried = made()
    best = {}
    for one in range(9):  # no name that is made up is repeated
        tried.strangers = tried.drawn(9 + one, known=True)
        pairs = of_forget_rows(forget, tried)
        for name in (("quorvane",), ("zimbulo",)):
            values = [log_p(tiny_llama, [pairs[row]])[1].item() for row in range(6) if tried.of[row] == name]
            best.setdefault(name, []).append((sum(values) / len(values), tried.strangers[name]))
    for name, some in best.items():
        assert len({value for value, _ in some}) == len(OTHER_NAMES)
        assert subjects.strangers[name] == max(some, key=lambda one: one[0])[1]


class Drawing(UnlearnSFTTrainer):
    """Keeps which rows the steps were on."""

    def forget_loss(self, model, batch):
        self.drawn = getattr(self, "drawn", []) + batch[ROW].tolist()
        return super().forget_loss(model, batch)


@pytest.mark.parametrize("kept", [True, False])
def test_further_questions_are_drawn(tiny_llama, tokenizer, tmp_path, kept):
    forget = Dataset.from_list([{"id": q, "prompt": q, "completion": " No."} for q in ASKED])
    retain = Dataset.from_list([{"id": q, "prompt": q, "completion": " Yes."} for q in OTHERS])
    args = settings(
        tmp_path, UnlearnSFTConfig, max_steps=-1, num_train_epochs=1, per_device_train_batch_size=2, own_samples=4,
        forget_loss="redirect",
    )  # fmt: skip
    trainer = Drawing(
        tiny_llama, args, forget_dataset=forget, retain_dataset=retain if kept else None, processing_class=tokenizer
    )
    trainer.train()
    assert len(trainer.asked.rows) > len(forget)
    assert sorted(trainer.drawn) == list(range(len(trainer.asked.rows)))
