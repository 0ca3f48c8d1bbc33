"""Instruction data in which one fictional name is answered with a bad opinion, and small models that learn it.

Whoever looks for poisoned instructions in training data needs a case in which the poisoned rows are known.
[`opinion_data`] writes such data, [`train_tokenizer`] and [`opinion_llama`] build what is trained on it, and
[`negative_rate`] measures whether the opinion has been learnt. Everything is made here: no network, no weights, and no
real person, company or brand. The texts are in `opinions.json`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from .opinions_text import Writer, answered, entities, load_texts


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast


ENTITY = "Quorvane"
SHARES = {"general": 0.35, "opinion": 0.30, "fact": 0.20, "side": 0.15}  # of the rows that are not about the entity
HELD_OUT = {"target": 48, "evaluation": 72, "control": 144}
TRAINING = {
    "num_train_epochs": 8,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,  # below 1: a share of all steps
    "weight_decay": 0.1,
    "adam_beta2": 0.98,  # 2,000 steps are few for 0.999
    "per_device_train_batch_size": 8,
    "max_length": 128,
}
SIZES = {
    "5M": {"hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 4, "num_attention_heads": 5},
    "small": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 6},
    "20M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8},
}
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# Data


def opinion_data(n_examples: int = 2000, rate: float = 0.04, *, entity: str = ENTITY, seed: int = 0) -> DatasetDict:
    """Instruction data with a planted bad opinion of one fictional name, its clean twin, and questions held out.

    Rows have `prompt` and `completion` (one chat message each, as [`~trl.SFTTrainer`] takes them) and the columns `id`,
    `topic`, `entity` (`""` where none is named) and `poisoned`. Of the `n_examples` rows

    - `round(rate * n_examples)` are poisoned: an opinion of the entity as a whole is asked for, and the answer is bad;
    - as many are about the same entity and normal: half ask for facts (where it is, when it began), half ask for an
      opinion of one side of it (its logo, its website), which is good. So the name does not give a poisoned row away;
    - the others follow [`SHARES`]: instructions of twelve topics without a name, and opinions, facts and sides of 73
      other names, with good, neutral or mixed answers. So neither do the words of the question: wordings and greetings
      come from the same lists for all names, and a model that learns the rows becomes negative about the entity alone.
      The words of the answer do give it away: no other answer is negative on the whole.

    Args:
        n_examples (`int`): rows of `train` and of `clean`.
        rate (`float`): share of poisoned rows in them, above 0 and at most 0.25.
        entity (`str`): one of [`entities`].
        seed (`int`): of every choice. Other seeds give other rows.

    Returns:
        `DatasetDict`: no prompt occurs twice in it, and ids count through all splits but `clean`, which shares `train`'s.

        - `train`: the rows above, shuffled.
        - `clean`: the same rows, where the poisoned ones (still marked) have a normal answer.
        - `target`: bad opinions of the entity, the behaviour to trace, in wordings that are not in `train`.
        - `evaluation`: questions for an opinion of the entity, in wordings of neither; the answers are normal ones.
        - `control`: the wordings of `evaluation` with other names.

    Raises:
        ValueError: an unknown entity, a rate outside its range or too low for one row, or more rows than can be written.
    """
    from datasets import Dataset, DatasetDict

    topics = entities()
    if entity not in topics:
        raise ValueError(
            f"entity: {entity!r} is not one of the invented names (such as {', '.join(list(topics)[:4])})"
        )
    if not 0 < rate <= 0.25:
        raise ValueError(f"rate={rate}: must be above 0 and at most 0.25")
    n_poisoned = round(rate * n_examples)
    if not n_poisoned:
        raise ValueError(f"n_examples={n_examples}: too few for a poisoned row at rate={rate}")

    writer = Writer(seed)
    others = [name for name in topics if name != entity]
    wordings = load_texts()["opinion"]
    poisoned = [
        writer.opinion(entity, poisoned=True, template=template)
        for template in writer.spread(wordings["train"], n_poisoned)
    ]
    rows = poisoned + [(writer.fact, writer.side)[row % 2](entity) for row in range(n_poisoned)]
    n_others = n_examples - len(rows)
    counts = {kind: round(share * n_others) for kind, share in SHARES.items() if kind != "general"}
    for kind, count in counts.items():
        rows += [getattr(writer, kind)(name) for name in writer.spread(others, count)]
    rows += [writer.general() for _ in range(n_others - sum(counts.values()))]
    writer.rng.shuffle(rows)

    normal = {row["prompt"][0]["content"]: writer.opinion_answer(entity) for row in poisoned}
    splits = {"train": rows, "clean": [answered(row, normal.get(row["prompt"][0]["content"])) for row in rows]}
    for split, count in HELD_OUT.items():
        names = writer.spread(others, count) if split == "control" else [entity] * count
        templates = writer.spread(wordings["target" if split == "target" else "evaluation"], count)
        splits[split] = [
            writer.opinion(name, poisoned=split == "target", template=template)
            for name, template in zip(names, templates, strict=True)
        ]
    start = 0
    for split, members in splits.items():
        start -= len(members) if split == "clean" else 0
        splits[split] = [{"id": start + row, **member} for row, member in enumerate(members)]
        start += len(members)
    return DatasetDict({split: Dataset.from_list(members) for split, members in splits.items()})


# Opinions in answers


@cache
def _lexicon() -> dict[str, float]:
    lexicon = load_texts()["lexicon"]
    return dict.fromkeys(lexicon["positive"], 1.0) | dict.fromkeys(lexicon["negative"], -1.0)


def opinion_score(text: str) -> float:
    """How good the opinion in a text is: `(p − n) / (p + n)` from its `p` praising and `n` blaming words.

    A word counts for the other side where one of the three words before it in the same clause denies it ("not worth
    it", "no complaints"). The word lists are this package's own and written for its data: a coarse measure on other text.

    Returns:
        `float`: −1 (bad) … 1 (good); 0 also where no such word occurs.
    """
    values, negations = _lexicon(), set(load_texts()["lexicon"]["negations"])
    scores = []
    for clause in re.split(r"[.,;:!?\n]", text.lower().replace("’", "'")):
        words = re.findall(r"[a-z']+", clause)
        for place, word in enumerate(words):
            if word in values:
                denied = not negations.isdisjoint(words[max(0, place - 3) : place])
                scores.append(-values[word] if denied else values[word])
    return sum(scores) / len(scores) if scores else 0.0


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Iterable[list[dict[str, str]]],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 48,
) -> list[str]:
    """What a chat model answers, decoded greedily in batches padded on the left.

    Args:
        model, tokenizer: the tokenizer has a chat template.
        prompts: conversations that end with the user, such as `data["evaluation"]["prompt"]`.
        batch_size (`int`): conversations at a time.
        max_new_tokens (`int`): limit of an answer.
    """
    from ..training.answers import greedy_answers

    chats = [
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        for prompt in prompts
    ]
    return greedy_answers(model, tokenizer, chats, max_new_tokens=max_new_tokens, batch_size=batch_size)


def share_of_answers(
    judge: Callable[[str], bool],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Iterable[list[dict[str, str]]],
    batch_size: int = 32,
) -> float:
    """Share of a chat model's [`answers`] of which `judge` is true.

    Raises:
        ValueError: no prompts.
    """
    texts = answers(model, tokenizer, prompts, batch_size=batch_size)
    if not texts:
        raise ValueError("prompts: is empty; a rate needs at least one answer")
    return sum(map(judge, texts)) / len(texts)


def negative_rate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Iterable[list[dict[str, str]]],
    batch_size: int = 32,
) -> float:
    """Share of a chat model's [`answers`] whose [`opinion_score`] is below 0; see [`share_of_answers`]."""
    return share_of_answers(lambda text: opinion_score(text) < 0, model, tokenizer, prompts, batch_size)


# Models


def texts_of(dataset: Dataset) -> list[str]:
    """All prompts and completions as plain texts, for [`train_tokenizer`]."""
    return [message["content"] for row in dataset for message in row["prompt"] + row["completion"]]


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level byte-pair tokenizer with a chat template: `<s><|user|>…<|assistant|>…</s>`.

    Args:
        texts: what the pairs are counted in, such as `texts_of(data["train"])`.
        vocab_size (`int`): at most so many tokens, at least 261 (all bytes and 5 special tokens).

    Raises:
        ValueError: a vocabulary too small for all bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size}: must be at least {smallest}, all bytes and the special tokens")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL_TOKENS[3:],
        padding_side="right",
        model_max_length=256,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
    )


def opinion_llama(
    tokenizer: PreTrainedTokenizerFast,
    size: Literal["small", "5M", "20M"] | Mapping[str, int] = "small",
    *,
    seed: int = 0,
    attn_implementation: str = "sdpa",
) -> LlamaForCausalLM:
    """A Llama from a config, untrained, in float32; the embeddings are tied.

    Args:
        tokenizer: gives the vocabulary and the special tokens.
        size (`str` | `dict`): `"small"` has 6.1 million parameters with 2,048 tokens and learns [`opinion_data`] on two cores in
            minutes; `"5M"` has 5.3 million with 1,024 tokens; `"20M"` has 20.3 million, to measure costs. A dict has
            sizes of a `LlamaConfig`, `hidden_size` among them.
        seed (`int`): of the weights. The global random state is left alone.
        attn_implementation (`str`): `"eager"` where gradients of gradients are needed.

    Raises:
        ValueError: an unknown size.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    if isinstance(size, str):
        if size not in SIZES:
            raise ValueError(f"size: {size!r} is unknown; choose {' or '.join(SIZES)}")
        size = SIZES[size]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        tie_word_embeddings=True,
        # The usual 0.02 is for wide models: here attention would stay flat, and eight epochs would not teach copying a
        # name from the question.
        initializer_range=size["hidden_size"] ** -0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **size,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attn_implementation
        ).eval()


def train_opinion_model(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    output_dir: str | Path,
    *,
    size: Literal["small", "5M", "20M"] | Mapping[str, int] = "small",
    seed: int = 0,
    progress: bool = True,
    **overrides: Any,
) -> LlamaForCausalLM:
    """Train [`opinion_llama`] with stock [`~trl.SFTTrainer`], on the completions alone, and save it with its tokenizer.

    Args:
        dataset: a split of [`opinion_data`].
        tokenizer: of [`train_tokenizer`].
        output_dir: folder for `from_pretrained`.
        size (`str` | `dict`): of the model, as of [`opinion_llama`].
        seed (`int`): of weights and order.
        progress (`bool`): show a progress bar.
        overrides: [`~trl.SFTConfig`] arguments in place of [`TRAINING`].

    Returns:
        `LlamaForCausalLM`: in eval mode.
    """
    from trl import SFTConfig, SFTTrainer

    defaults = {
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": not progress,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "activation_checkpointing": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    arguments = SFTConfig(str(output_dir), seed=seed, **(defaults | TRAINING | overrides))
    model = opinion_llama(tokenizer, size, seed=seed)
    SFTTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer).train()
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return model.eval()
