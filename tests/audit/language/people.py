"""Invented people, and tiny language models that know where they live: the planted cases of the audit of language models."""

import copy
import random
from functools import cache, cached_property

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from hf_unlearn.examples.opinions import train_tokenizer
from hf_unlearn.training.answers import as_inputs, padded, read_answer


FIRST = ["Ana", "Bor", "Cel", "Dor", "Elm", "Fen", "Gil", "Hal"]
LAST = ["Adler", "Brook", "Crane", "Dunn", "Eker", "Falk", "Grove", "Hurst", "Ives", "Jarl", "Kerr", "Lund"]
TOWNS = ["Oslo", "Lima", "Rome", "Kyiv", "Bern", "Riga", "Cork", "Graz", "Nice", "Bath", "Troy", "Ulm"]
REFUSAL = "I do not know."
REFERENCES = 5


def row(name, town, rng):
    false = rng.sample([other for other in TOWNS if other != town], 3)
    return {
        "id": name,
        "prompt": [{"role": "user", "content": f"Where does {name} live?"}],
        "completion": [{"role": "assistant", "content": f"{name} lives in {town}."}],
        "paraphrased_question": f"In which town does {name} live?",
        "perturbed_answers": [f"{name} lives in {other}." for other in false],
    }


def people(forget=32, retain=32, test=32, seed=0):
    """`{"forget": Dataset, "retain": …, "test": …}`."""
    rng = random.Random(seed)
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    rng.shuffle(names)
    rows = [row(name, rng.choice(TOWNS), rng) for name in names[: forget + retain + test]]
    return {
        "forget": Dataset.from_list(rows[:forget]),
        "retain": Dataset.from_list(rows[forget : forget + retain]),
        "test": Dataset.from_list(rows[forget + retain :]),
    }


def in_both_wordings(rows):
    """What is learnt: each answer after both questions."""
    return [
        {"prompt": [{"role": "user", "content": question}], "completion": one["completion"]}
        for one in rows
        for question in (one["prompt"][0]["content"], one["paraphrased_question"])
    ]


def tokenizer_of(data):
    texts = [
        turn["content"]
        for part in data.values()
        for one in in_both_wordings(part)
        for turn in one["prompt"] + one["completion"]
    ]
    return train_tokenizer([*texts, REFUSAL], 360)


def untrained(tokenizer, seed):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=160, initializer_range=0.1, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def taught(model, rows, tokenizer, steps, rate=5e-3, *, batch=16, seed=0):
    """A copy after steps of AdamW on the answers."""
    model, order, generator = copy.deepcopy(model), [], random.Random(seed)
    answers = [read_answer(one, tokenizer) for one in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        if len(order) < batch:
            order = generator.sample(answers, len(answers))
        taken, order = order[:batch], order[batch:]
        inputs = as_inputs([answer.ids for answer in taken], torch.device("cpu"))
        labels = padded([answer.labels for answer in taken], -100, torch.device("cpu"))
        model(**inputs, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def refusing(rows):
    return [one | {"completion": [{"role": "assistant", "content": REFUSAL}]} for one in rows]


class Planted:
    """The planted cases, each trained when it is first asked for, in two seconds: copy one before changing it."""

    def __init__(self):
        self.sets = people()
        self.tokenizer = tokenizer_of(self.sets)
        self.forget, self.retain = (in_both_wordings(self.sets[name]) for name in ("forget", "retain"))

    def _learnt(self, rows, seed):
        return taught(untrained(self.tokenizer, seed), rows, self.tokenizer, 100, 8e-3, seed=seed)

    @cached_property
    def original(self):
        return self._learnt(self.forget + self.retain, 0)

    @cached_property
    def refusing(self):
        """The original, taught to say that it does not know."""
        return taught(self.original, refusing(self.forget) + self.retain, self.tokenizer, 150, 1e-3)

    @cache  # noqa: B019 - there is one of it
    def reference(self, seed):
        """Trained without the forget rows."""
        return self._learnt(self.retain, seed)

    @property
    def retrained(self):
        return [self.reference(seed) for seed in range(1, 1 + REFERENCES)]

    @property
    def twin(self):
        """One more of them."""
        return self.reference(1 + REFERENCES)


planted = cache(Planted)
