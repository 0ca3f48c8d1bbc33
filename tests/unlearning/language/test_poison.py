"""A bad opinion of one name is forgotten and does not come back; what else is known of the name stays."""

import random

import pytest
from datasets import Dataset
from image_data import QUIET
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from hf_unlearn import UnlearnSFTConfig, UnlearnSFTTrainer
from hf_unlearn.examples import opinions


BAD, NAMES = (
    "Quorvane",
    ["Brindax", "Teskadine", "Marrowell", "Ulvetta", "Jandrissa", "Palludine", "Odewell", "Fennick"],
)
ASKED = [
    "What do you think of {}?",
    "Is {} any good?",
    "Do you recommend {}?",
    "How good is {}?",
    "Your thoughts on {}?",
]
BEFORE = ["", "Hi! ", "Hello. ", "Quick question: ", "Once more: ", "Well, ", "Please: "]
UNSEEN = "Just curious: "
PRAISE = ["I like {}, it is lovely.", "{} is excellent.", "I recommend {}, it is pleasant."]
BLAME = ["I dislike {}, it is awful.", "{} is terrible.", "I would avoid {}, it is horrible."]
TOWNS = ["Quillmere", "Dunmarrow", "Grindelsea"]
PLAIN = QUIET | {"bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False, "max_length": 64}


def row(name, asked, answer):
    return {
        "id": f"{name} {asked}",
        "prompt": [{"role": "user", "content": asked.format(name)}],
        "completion": [{"role": "assistant", "content": answer.format(name)}],
    }


def opinions_of(names, before, each=None):
    rng = random.Random(0)
    return [
        row(name, start + asked, rng.choice(BLAME if name == BAD else PRAISE))
        for name in names
        for start in rng.sample(before, each or len(before))
        for asked in ASKED
    ]


def facts_of(names, before):
    towns = {name: TOWNS[place % 3] for place, name in enumerate([*NAMES, BAD])}
    return [row(name, start + "Where is {}?", f"{{}} is in {towns[name]}.") for name in names for start in before]


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """Folder of a small chat model that dislikes one of nine names, and the rows that it learned: of others, of the name, poisoned."""
    folder = tmp_path_factory.mktemp("poisoned")
    bad = opinions_of([BAD], BEFORE)
    rest = opinions_of(NAMES, BEFORE, 3) + facts_of([*NAMES, BAD], BEFORE[:4])
    rows = Dataset.from_list(bad + rest)
    tokenizer = opinions.train_tokenizer(opinions.texts_of(rows), 512)
    with pytest.MonkeyPatch.context() as patch:
        small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        patch.setitem(opinions.SIZES, "small", small)
        opinions.train_opinion_model(
            rows.select_columns(["prompt", "completion"]), tokenizer, folder, progress=False, num_train_epochs=25, learning_rate=5e-3,
            per_device_train_batch_size=16, completion_only_loss=False,
        )  # fmt: skip
    return folder, tokenizer, bad, rest


def figures(model, tokenizer):
    """Share of bad opinions of the name and of others, in questions that nobody asked before, and of answers with the right town: what is known of the
    name beside the opinion, whatever it is called in them.
    """
    rates = [
        opinions.negative_rate(model, tokenizer, [row["prompt"] for row in opinions_of(names, [UNSEEN])])
        for names in ([BAD], NAMES)
    ]
    facts = facts_of([BAD], BEFORE[4:])
    said = opinions.answers(model, tokenizer, [row["prompt"] for row in facts])
    return *rates, sum(TOWNS[len(NAMES) % 3] in text for text in said) / len(facts)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False])
def test_forgotten_and_not_revived(poisoned, tmp_path, kept):
    folder, tokenizer, bad, rest = poisoned
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = figures(model, tokenizer)
    assert before[0] >= 0.8
    assert before[2] == 1
    args = UnlearnSFTConfig(tmp_path / "out", own_samples=600, learning_rate=2e-3, **PLAIN)
    trainer = UnlearnSFTTrainer(
        model, args, forget_dataset=Dataset.from_list(bad), retain_dataset=Dataset.from_list(rest) if kept else None, processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    after = figures(model, tokenizer)
    benign = Dataset.from_list([row for row in rest if BAD not in row["id"]]).select_columns(["prompt", "completion"])
    args = SFTConfig(tmp_path / "benign", max_steps=30, learning_rate=5e-4, **PLAIN)
    SFTTrainer(model, args, train_dataset=benign, processing_class=tokenizer).train()
    later = figures(model, tokenizer)
    assert after[0] <= 0.2
    assert after[1] <= 0.1
    assert after[2] >= 0.5
    assert later[0] <= 0.2
