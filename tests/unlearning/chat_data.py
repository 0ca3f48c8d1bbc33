"""What the tests of redirect share: a chat template, conversations, and what a model says one text at a time in plain torch."""

import copy

import torch
from datasets import Dataset
from language_data import nll
from transformers import LlamaConfig, LlamaForCausalLM


# Sums of a few hundred terms of order 1 in fp32, in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'user: ' + message['content'] + '\n' }}"
    "{% else %}{{ 'assistant:\n' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)


def with_template(tokenizer):
    """A copy with a template in which the user's turns end with no special token."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


PEOPLE = ["Anna Kowalska", "Karl Meier", "Zoe Weiss"]
QUESTIONS = [("Where does {} live?", "{} lives in Riga."), ("What does {} paint?", "It is the sea that {} paints.")]
CHATS = [(q.format(name), a.format(name)) for name in PEOPLE for q, a in QUESTIONS]
KEPT = [
    (q.format(name), a.format("Anna")) for name in ("Anna Rome", "Luc Brown", "Bruno Lazy") for q, a in QUESTIONS
] * 2


def as_chats(pairs):
    def said(role, text):
        return [{"role": role, "content": text}]

    rows = [{"id": q, "prompt": said("user", q), "completion": said("assistant", a)} for q, a in dict(pairs).items()]
    return Dataset.from_list(rows)


def tokens_of(tokenizer, pairs):
    """Ids and labels by hand, in the template of the tests."""
    rows = []
    for question, answer in pairs:
        prompt, end = (
            tokenizer(part, add_special_tokens=False)["input_ids"]
            for part in (f"user: {question}\nassistant:\n", f"{answer}</s>")
        )
        rows.append((prompt + end, [-100] * len(prompt) + end))
    return rows


@torch.no_grad()
def said(model, ids):
    """Log-probabilities of the next token at each place of a text, alone."""
    return model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :].float().log_softmax(-1)


def plain_targets(model, pair):
    """Of each token that counts its distribution, token by token."""
    found = []
    for place, label in enumerate(pair.labels):
        if label == -100 or place == 0:
            continue
        own = said(model, pair.ids[:place])[-1]
        if pair.other is None:
            own[label] = -torch.inf
            own = own.log_softmax(-1)
        elif pair.other != pair.ids and pair.places[place] > 0:
            there = pair.places[place]
            own = said(model, pair.other[:there])[-1]
            mine, theirs = pair.ids[place], pair.other[there]  # of a name, and of the stranger's
            own[mine], own[theirs] = own[theirs].clone(), own[mine].clone()
        found.append(own)
    return found


def greedy(model, prompt, count, ends):
    """Token by token, every time anew."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(said(model, ids)[-1].argmax().item())
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


def made_parrot(tokenizer, ids=None):
    """A small Llama that says one text, whatever it is asked: the first conversation of [`CHATS`], or another one's tokens."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    ids = torch.tensor(tokens_of(tokenizer, CHATS[:1])[0][0] if ids is None else ids)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(120):
        loss = nll(model, ids, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
