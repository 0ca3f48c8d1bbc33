"""Multiple-choice questions against lm-evaluation-harness's wording and rule, written out."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_unlearn.training.choices import ChoiceEvaluation


ROWS = [
    {"question": " Who jumps over the dog? ", "choices": ["fox", "Paris", "shoes", "phone"], "answer": 0},
    {"question": "Capital of Italy?", "choices": ["Rome", "France", "order", "fox"], "answer": 2},
    {"question": "Lazy?", "choices": ["the dog", "the fox", "nobody", "the order"], "answer": 3},
]
ABOUT = "The following are multiple choice questions (with answers)"


def log_likelihoods(model, tokenizer, text):
    """Of " A" to " D" after the text, token by token."""
    start, found = len(tokenizer(text)["input_ids"]), []
    for letter in "ABCD":
        ids = tokenizer(f"{text} {letter}")["input_ids"]
        log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append(sum(float(log_p[place - 1, ids[place]]) for place in range(start, len(ids))))
    return found


@pytest.mark.parametrize("batch_size", [3, 16])
def test_the_likeliest_letter(batch_size, tiny_llama, tokenizer):
    rows = Dataset.from_list(ROWS)
    scores = ChoiceEvaluation(rows, tokenizer, subject="biology", batch_size=batch_size)(tiny_llama)
    questions = [
        f"{ABOUT} about biology.\n\nWho jumps over the dog?\nA. fox\nB. Paris\nC. shoes\nD. phone\nAnswer:",
        f"{ABOUT} about biology.\n\nCapital of Italy?\nA. Rome\nB. France\nC. order\nD. fox\nAnswer:",
        f"{ABOUT} about biology.\n\nLazy?\nA. the dog\nB. the fox\nC. nobody\nD. the order\nAnswer:",
    ]
    expected = [log_likelihoods(tiny_llama, tokenizer, text) for text in questions]
    np.testing.assert_allclose(scores.log_likelihoods, expected, rtol=1e-4)
    chosen = np.argmax(expected, 1)
    for right in (chosen, (chosen + 1) % 4):
        answered = rows.remove_columns("answer").add_column("answer", right.tolist())
        accuracy = ChoiceEvaluation(answered, tokenizer, subject="biology")(tiny_llama).summary()
        assert accuracy == {"accuracy": float(right is chosen)}


def test_subjects_and_fewer_choices(tiny_llama, tokenizer):
    """As MMLU has them; without any subject none is named."""
    rows = Dataset.from_list(
        [ROWS[0] | {"choices": ["fox", "dog"], "subject": "high_school_biology"}, ROWS[1] | {"subject": ""}]
    )
    scores = ChoiceEvaluation(rows, tokenizer)(tiny_llama).log_likelihoods
    text = f"{ABOUT} about high school biology.\n\nWho jumps over the dog?\nA. fox\nB. dog\nAnswer:"
    np.testing.assert_allclose(scores[0, :2], log_likelihoods(tiny_llama, tokenizer, text)[:2], rtol=1e-4)
    assert (scores[0, 2:] == -np.inf).all()
    text = f"{ABOUT}.\n\nCapital of Italy?\nA. Rome\nB. France\nC. order\nD. fox\nAnswer:"
    np.testing.assert_allclose(scores[1], log_likelihoods(tiny_llama, tokenizer, text), rtol=1e-4)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (Dataset.from_list([{"question": "?", "answer": 1}]), "rows: column 'choices' is missing"),
        (Dataset.from_list(ROWS).select([]), "rows: is empty"),
        (Dataset.from_list([ROWS[0] | {"answer": 4}]), "row 0 has answer 4, which is no number from 0 to 3"),
        (Dataset.from_list([ROWS[0] | {"answer": "A"}]), "row 0 has answer 'A'"),
    ],
)
def test_bad_input_is_refused(rows, match, tokenizer):
    with pytest.raises(ValueError, match=match):
        ChoiceEvaluation(rows, tokenizer)
