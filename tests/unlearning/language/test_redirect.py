"""Redirect: targets, what is asked and what is written against one text at a time in plain torch; a step of the trainer; what it says."""

import copy
import logging
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from image_data import QUIET, same, weights
from language_data import assert_same_parameters, nll
from language_data import settings as text_settings
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from hf_unlearn import UnlearnConfig, UnlearnSFTConfig, UnlearnSFTTrainer, UnlearnTrainer
from hf_unlearn.hub.publish import publishable_files
from hf_unlearn.unlearning.language.asked import Asked, Pair, ask, log_p
from hf_unlearn.unlearning.language.own_samples import first_token, own_texts
from hf_unlearn.unlearning.language.redirect import FURTHER, TOLERANCE, further_questions
from hf_unlearn.unlearning.language.subject import Subjects, Words
from hf_unlearn.unlearning.language.targets import TOP, divergence_from, likeliest
from hf_unlearn.unlearning.language.written import written


# Sums of a few hundred terms of order 1 in fp32, in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'user: ' + message['content'] + '\n' }}"
    "{% else %}{{ 'assistant:\n' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tokenizer):
    """With a template in which the user's turns end with no special token."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


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
        divergence_from(logits, tokens, log_p).sum().backward()
        p, q = target.softmax(-1), logits.detach().softmax(-1)
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


@torch.no_grad()
def said(model, ids):
    """Log-probabilities of the next token at each place of a text, alone."""
    return model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)


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
    @pytest.mark.parametrize("batch_size", [1, 4, 16])
    def test_targets_are_those_of_one_text_at_a_time(self, batch_size, pairs, tiny_llama):
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

    def test_how_likely_an_answer_is_of_somebody_else_without_its_names(self, pairs, tiny_llama):
        pairs = [pair for pair in pairs if pair.other != pair.ids]
        for pair, value in zip(pairs, log_p(tiny_llama, pairs, batch_size=2), strict=True):
            expected = sum(
                said(tiny_llama, pair.other[:there])[-1, label].item()
                for there, label in zip(pair.places, pair.labels, strict=False)
                if label != -100 and there > 0 and pair.other[there] == label
            )
            assert value == pytest.approx(expected, rel=1e-4)
            assert (value == 0) == (pair.other is None)

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


def greedy(model, prompt, count, ends):
    """Token by token, every time anew."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(said(model, ids)[-1].argmax().item())
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


class TestWritten:
    PROMPTS = ["The fox", "Paris is", "My order never arrived and", "shoes"]

    @pytest.fixture
    def prompts(self, tokenizer):
        return [tokenizer(text)["input_ids"] for text in self.PROMPTS]

    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    @pytest.mark.parametrize("batch_size", [1, 3, 128])
    def test_the_likeliest_whatever_the_generation_config(self, name, batch_size, prompts, tokenizer, request):
        model = request.getfixturevalue(f"tiny_{name}")
        for key, value in {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "num_beams": 2, "min_p": 0.5}.items():
            setattr(model.generation_config, key, value)
        texts = written(model, tokenizer, prompts, max_new_tokens=15, temperature=0, batch_size=batch_size)
        plain = [greedy(model, prompt, 15, {tokenizer.eos_token_id}) for prompt in prompts]
        assert texts == plain
        assert any(len(set(text)) < len(text) for text in plain)  # which a penalty would have undone
        stop = plain[0][4]
        texts = written(
            model, tokenizer, prompts, max_new_tokens=15, temperature=0, batch_size=batch_size, stop=[stop]
        )
        assert texts == [greedy(model, prompt, 15, {stop, tokenizer.eos_token_id}) for prompt in prompts]

    def test_draws_from_the_models_own_distribution(self, tiny_llama, tokenizer):
        """4,000 draws of one token: shares within five standard deviations of what the model says."""
        for key, value in {"top_k": 1, "temperature": 0.1, "top_p": 0.1}.items():
            setattr(tiny_llama.generation_config, key, value)
        prompt = tokenizer("The fox")["input_ids"]
        tiny_llama.train()
        state = torch.get_rng_state()
        texts = written(tiny_llama, tokenizer, [prompt] * 4000, max_new_tokens=1, batch_size=4000)
        assert torch.equal(state, torch.get_rng_state())
        assert tiny_llama.training
        p = said(tiny_llama.eval(), prompt)[-1].exp()
        counts = torch.tensor([token for (token,) in texts]).bincount(minlength=len(p))
        assert ((counts - 4000 * p).abs() <= 5 * (4000 * p * (1 - p)).sqrt() + 1).all()
        assert written(tiny_llama, tokenizer, [prompt] * 8, seed=1) == written(
            tiny_llama, tokenizer, [prompt] * 8, seed=1
        )
        assert written(tiny_llama, tokenizer, [prompt] * 8, seed=1) != written(
            tiny_llama, tokenizer, [prompt] * 8, seed=2
        )

    def test_no_further_than_the_model_has_positions(self, tiny_gpt2, tokenizer):
        prompts = [[5] * length for length in (120, 127, 128, 130)]
        texts = written(tiny_gpt2, tokenizer, prompts, max_new_tokens=50, temperature=0, batch_size=1)
        assert [len(text) for text in texts] == [8, 1, 0, 0]

    def test_own_texts_are_turns_of_the_template(self, tiny_llama, tokenizer):
        start = tokenizer("user:", add_special_tokens=False)["input_ids"]
        texts = own_texts(tiny_llama, tokenizer, 12, chat=True, max_new_tokens=10)
        assert 0 < len(texts) <= 12
        for ids, begin, answer in texts:
            assert (ids[:begin], begin) == (start, len(start))
            assert tokenizer.decode(ids[:answer]).endswith("\nassistant:\n")
        assert texts == own_texts(tiny_llama, tokenizer, 12, chat=True, max_new_tokens=10)
        asked = ["Who?", "Where is Rome?"]
        for ids, begin, answer in own_texts(tiny_llama, tokenizer, 5, chat=True, prompts=asked, max_new_tokens=10):
            assert tokenizer.decode(ids[:begin]) in [f"user: {question}\nassistant:\n" for question in asked]
            assert begin == answer < len(ids)
        for ids, begin, answer in own_texts(tiny_llama, tokenizer, 12, chat=False, max_new_tokens=10):
            assert (ids[0], begin, answer) == (tokenizer.bos_token_id, 1, 1)
            assert 1 < len(ids) <= 11

    def test_a_question_ends_where_the_template_ends_it(self, parrot, tokenizer):
        """Here by no special token: a model of this template goes on and answers."""
        whole = tokens_of(tokenizer, CHATS[:1])[0][0]
        texts = [ids for ids, _, _ in own_texts(parrot, tokenizer, 20, chat=True, max_new_tokens=60)]
        assert sum(ids == whole for ids in texts) > 10
        assert not [ids for ids in texts if tokenizer.decode(ids).count("assistant:") > 1]


@pytest.fixture(scope="module")
def _parrot(tokenizer):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    ids = torch.tensor(tokens_of(tokenizer, CHATS[:1])[0][0])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(120):
        loss = nll(model, ids, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def parrot(_parrot):
    """A small Llama that says one conversation, whatever it is asked."""
    return copy.deepcopy(_parrot)


NAMES = ["Anna", "Bruno", "Clara", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Luis"]
CITIES = ["Riga", "Cairo", "Quito", "Berne", "Lima", "Oslo", "Hanoi", "Tunis", "Paris", "Delhi", "Rome", "Accra"]
FACTS = [(f"Where does {n} live?", f"{n} lives in {c}.") for n, c in zip(NAMES, CITIES, strict=True)]
FORGOTTEN = [FACTS[place] for place in (2, 5, 9)]
REMAINING = [fact for fact in FACTS if fact not in FORGOTTEN]


@pytest.fixture(scope="module")
def _taught(tokenizer, tmp_path_factory):
    """A small Llama that stock `SFTTrainer` taught twelve conversations by heart, questions too."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        args = SFTConfig(
            str(tmp_path_factory.mktemp("taught")), **QUIET, bf16=False, gradient_checkpointing=False, learning_rate=3e-3,
            lr_scheduler_type="constant", per_device_train_batch_size=12, num_train_epochs=80, completion_only_loss=False,
        )  # fmt: skip
        SFTTrainer(model, args=args, train_dataset=as_chats(FACTS), processing_class=tokenizer).train()
    model.save_pretrained(args.output_dir)
    return args.output_dir


@pytest.fixture
def taught(_taught):
    """Fresh from its folder: what trained it may hold on to a copy."""
    return LlamaForCausalLM.from_pretrained(_taught)


def name_in(row):
    """Whom a question of [`FACTS`] is about."""
    return row["id"].split()[2]


def settings(folder, **changes):
    return text_settings(
        folder,
        UnlearnSFTConfig,
        **{"forget_loss": "redirect", "own_samples": 8, "per_device_train_batch_size": 64} | changes,
    )


def forgetting(model, tokenizer, folder, rows=CHATS, retain=None, subject=None, **changes):
    return UnlearnSFTTrainer(
        model, args=settings(folder, **changes), processing_class=tokenizer, subject=subject,
        forget_dataset=rows if hasattr(rows, "column_names") else as_chats(rows),
        retain_dataset=None if retain is None else as_chats(retain),
    )  # fmt: skip


def divergence(model, asked, row):
    """Mean over the tokens of a row, alone, the tokens without a name as one."""
    ids, labels = asked.rows[row]["input_ids"], asked.rows[row]["labels"]
    log_q = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    places = [place for place, label in enumerate(labels) if label != -100 and place > 0]
    values = []
    for place, tokens, target in zip(places, *asked.targets.at([row]), strict=True):
        named = log_q[place - 1, tokens.long()]
        rest = torch.log(1 - named.exp().sum())
        values.append((target.exp() * (target - torch.cat([named, rest[None]]))).sum())
    return sum(values) / len(values)


LORA = {"target_modules": ["q_proj", "v_proj"], "r": 4, "init_lora_weights": "gaussian"}


class TestTrainer:
    @pytest.mark.parametrize(
        ("kind", "reduction"),
        [("own samples", "example"), ("retain rows", "sum"), ("LoRA", "token"), ("accumulated", "example")],
    )
    def test_two_steps_equal_plain_torch(self, kind, reduction, taught, tokenizer, tmp_path):
        """Divergence on what is asked, and `retain_weight` times that on `retain_per_forget` rows to keep for each."""
        rate = 2e-4 if reduction == "sum" else 1e-2
        size = {"per_device_train_batch_size": 1 + FURTHER, "gradient_accumulation_steps": 2}
        model = get_peft_model(taught, LoraConfig(**LORA)) if kind == "LoRA" else taught
        student = copy.deepcopy(model)
        trainer = forgetting(
            model, tokenizer, tmp_path, rows=FORGOTTEN[:2], retain=REMAINING if kind == "retain rows" else None, subject=name_in,
            retain_weight=0.7, retain_per_forget=3,
            loss_reduction=reduction, learning_rate=rate, **size if kind == "accumulated" else {},
        )  # fmt: skip
        trainer.train()
        asked, kept = trainer.asked, trainer.kept
        assert len(asked.rows) == 2 * (1 + FURTHER)
        if kind == "retain rows":
            assert kept.rows["input_ids"][:] == trainer.retain_dataset["input_ids"][:]
        optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=rate)
        terms = []
        for epoch in range(2):
            draw = torch.Generator().manual_seed((trainer.args.seed << 20) + epoch)
            count = 3 * len(asked.rows)
            rounds = -(-count // len(kept.rows))
            drawn = torch.cat([torch.randperm(len(kept.rows), generator=draw) for _ in range(rounds)])[:count].tolist()
            parts = [(asked, range(len(asked.rows))), (kept, drawn)]
            means = []
            for number, (part, rows) in enumerate(parts):
                values = [divergence(student, part, row) for row in rows]
                counts = [len(part.targets.places([row])) for row in rows]
                if reduction == "token" or (reduction == "sum" and number == 0):
                    values = [value * count for value, count in zip(values, counts, strict=True)]
                means.append(sum(values) / (sum(counts) if reduction == "token" else len(values)))
            loss = means[0] + 0.7 * means[1]
            terms.append([mean.item() for mean in means])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        logs = [log for log in trainer.state.log_history if "forget_loss" in log]
        found = [[log["forget_loss"], log["retain_loss"]] for log in logs]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(terms), rtol=1e-3, atol=1e-5)
        assert terms[1][0] < terms[0][0]
        assert_same_parameters(trainer.model, student)

    def test_what_the_guard_sees_equals_plain_loops(self, parrot, tokenizer, tmp_path):
        original = copy.deepcopy(parrot)
        trainer = forgetting(
            parrot, tokenizer, tmp_path, retain=KEPT, learning_rate=0.05, subject=lambda row: "Anna Kowalska"
        )
        trainer.train()
        known, probability, other_known, other_probability = ([] for _ in range(4))
        for ids, labels in tokens_of(tokenizer, CHATS):
            counts = [(place, label) for place, label in enumerate(labels) if label != -100]
            for model, knows, likely in (
                (parrot.eval(), known, probability),
                (original, other_known, other_probability),
            ):
                if model is parrot:
                    log_p = [said(model, ids)[place - 1] for place, _ in counts]
                else:
                    subject = trainer.subjects.of[len(other_known)]
                    other = trainer.subjects.replaced(ids, trainer.subjects.strangers[subject]) if subject else None
                    pair = Pair(ids, labels, other and other.ids, other.places if other else [])
                    log_p = plain_targets(model, pair)
                knows.append(all(p.argmax() == label for p, (_, label) in zip(log_p, counts, strict=True)))
                likely.append(
                    sum(p[label] for p, (_, label) in zip(log_p, counts, strict=True)).div(len(counts)).exp().item()
                )
        rows = len(CHATS)
        others = {"known": sum(other_known) / rows, "probability": sum(other_probability) / rows}
        assert trainer.others == pytest.approx(others, rel=1e-4)
        excess = max(sum(known) / rows - others["known"], sum(probability) / rows - others["probability"])
        assert trainer.remembered() == pytest.approx(excess - TOLERANCE, abs=1e-5)
        assert {subject != () for subject in trainer.subjects.of} == {True, False}

    def test_utility_without_data_is_the_divergence_on_what_the_original_wrote(self, parrot, tokenizer, tmp_path):
        original = copy.deepcopy(parrot)
        trainer = forgetting(parrot, tokenizer, tmp_path, rows=CHATS[2:], learning_rate=0.5)
        trainer.train()
        values, row = [], 0
        for row, (ids, labels) in enumerate(
            zip(trainer.kept.rows["input_ids"], trainer.kept.rows["labels"], strict=True)
        ):
            p, q = (said(model, ids)[:-1] for model in (original, parrot.eval()))
            tokens = torch.tensor([label != -100 for label in labels[1:]])
            assert tokens.sum() == len(trainer.kept.targets.places([row]))
            values.append((p.exp() * (p - q)).sum(-1)[tokens].mean().item())
        assert trainer.utility_kind == "divergence"
        # What is not kept by name is at most 2 % of the probability, of tokens that differ by some hundredths of a nat.
        assert trainer.utility() == pytest.approx(sum(values) / len(values), rel=0.05)
        assert trainer.utility() > 10 * abs(trainer.utility(trainer.reference_forward))

    def test_a_resumed_run_needs_what_was_asked_and_nothing_of_it_is_published(self, parrot, tokenizer, tmp_path):
        trainer = forgetting(parrot, tokenizer, tmp_path, save_strategy="steps", save_steps=1)
        trainer.train()
        trainer.save_model()
        private = {"asked.safetensors", "kept.safetensors"}
        assert private <= {path.name for path in (tmp_path / "_private").iterdir()}
        assert not private & {Path(name).name for name in publishable_files(tmp_path)}
        assert sorted(private) == sorted({path.name for path in tmp_path.rglob("*.safetensors")} & private)
        for name in private:
            kept = (tmp_path / "_private" / name).rename(tmp_path / "away")
            with pytest.raises(
                ValueError, match=rf"^resume_from_checkpoint: .*_private/{name} is missing; start again$"
            ):
                forgetting(parrot, tokenizer, tmp_path, save_strategy="steps", save_steps=1).train(
                    resume_from_checkpoint=True
                )
            kept.rename(tmp_path / "_private" / name)


class TestWhatIsSaid:
    """Of rows and models that it cannot do its work with."""

    def said(self, caplog):
        return [record.getMessage() for record in caplog.records if record.name.startswith("hf_unlearn")]

    @pytest.mark.parametrize("retain", [None, KEPT])
    def test_a_model_that_knows_nothing_is_left_alone(self, retain, parrot, tokenizer, tmp_path, caplog):
        before = weights(parrot)
        trainer = forgetting(
            parrot, tokenizer, tmp_path, rows=CHATS[2:], retain=retain, guard=True, learning_rate=0.1, max_steps=50,
            subject=lambda row: next(name for name in PEOPLE if name in row["id"]),
        )  # fmt: skip
        trainer.train()
        assert trainer.state.global_step == 0
        assert same(before, weights(parrot))
        why = "the original knows the forget texts no better than if they were about somebody whom it never met (0.0% word for word, "
        assert trainer.failed_checks[0].startswith(f"Nothing was there to forget before the first step: {why}")
        assert any(line.startswith(f"forgotten before the first step: {why}") for line in self.said(caplog))
        trainer.save_model()
        assert why in trainer.model_card(tmp_path).content

    def test_nothing_is_left_of_own_samples(self, parrot, tokenizer, tmp_path):
        """A model that speaks of nothing else than the subject."""
        trainer = forgetting(
            parrot, tokenizer, tmp_path, rows=CHATS[:2], own_samples=3, subject=lambda row: "Anna Kowalska"
        )
        with pytest.raises(
            ValueError,
            match=r"^own_samples=3: of 3 texts that the original wrote 3 are about [^\n]+ pass retain_dataset=$",
        ):
            trainer.train()
        assert not list(tmp_path.rglob("*.safetensors"))

    def test_rows_to_keep_that_are_about_the_subject_are_told_and_kept(self, parrot, tokenizer, tmp_path, caplog):
        about = [(f"Is it true, {number}?", "So Anna Kowalska said.") for number in range(7)]
        trainer = forgetting(parrot, tokenizer, tmp_path, retain=KEPT[:6] + about, subject=lambda row: "Anna Kowalska")
        trainer.train()
        message = "retain_dataset: 7 of 13 rows are about what is to be forgotten (6, 7, 8, 9, 10, …); "
        assert any(line.startswith(message) for line in self.said(caplog))
        assert len(trainer.kept.rows) == 13

    def test_no_subject(self, parrot, tokenizer, tmp_path, caplog):
        """What is kept speaks of the same people."""
        others = [(f"Once more: {question}", answer) for question, answer in CHATS]
        trainer = forgetting(parrot, tokenizer, tmp_path, retain=others)
        trainer.train()
        assert any(line.startswith("forget_dataset: no subject found in 6 of 6 rows; ") for line in self.said(caplog))
        assert len(trainer.asked.rows) == 6

    @pytest.mark.parametrize(
        ("model", "retain", "level"), [("tiny_llama", KEPT, logging.WARNING), ("parrot", None, logging.INFO)]
    )
    def test_what_the_targets_take_and_leave_out(self, model, retain, level, tokenizer, tmp_path, caplog, request):
        """Above 2 % of the probability, which is much, it is warned of."""
        trainer = forgetting(request.getfixturevalue(model), tokenizer, tmp_path, rows=CHATS[2:], retain=retain)
        with caplog.at_level(logging.INFO, "hf_unlearn"):
            trainer.train()
        for name, part in (("asked", trainer.asked), ("kept", trainer.kept)):
            targets = part.targets
            total = sum(sum(label != -100 for label in labels[1:]) for labels in part.rows["labels"])
            lost = targets.log_p[:, -1].exp().mean().item()
            start = f"redirect: what is {name} at {total} tokens takes {targets.megabytes:.3g} MB; the 64 likeliest of 300 tokens are kept"
            (record,) = [record for record in caplog.records if record.getMessage().startswith(start)]
            assert f"and {lost:.2g} of the probability" in record.getMessage()
            assert record.levelno == level
            assert (lost > 0.02) == (level == logging.WARNING)

    def test_token_ids_know_no_subject(self, tiny_llama, tokenizer, tmp_path, caplog):
        ids = [dict(tokenizer(question)) for question, _ in CHATS]
        rows = Dataset.from_list([{**row, "labels": row["input_ids"]} for row in ids])
        trainer = UnlearnTrainer(
            tiny_llama, UnlearnConfig(tmp_path, forget="examples", use_cpu=True), forget_dataset=rows
        )
        assert trainer.forget_loss_name == "redirect"
        assert any("(DELETE). UnlearnSFTTrainer takes texts" in line for line in self.said(caplog))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"rows": as_chats(CHATS).add_column("subject", ["painting", "live_1"] * 3)},
             "forget_dataset: column 'subject' has 'painting' in row 0, which is not in its prompt, and so it is in all rows; write"),
            ({"subject": lambda row: 5}, "forget_dataset: row 0 has 5 in column 'subject', which is no text; mend it"),
            ({"rows": as_chats(CHATS).add_column("subject", ["Anna"] * 6), "subject": lambda row: "Karl"},
             "subject: forget_dataset has a column 'subject' too; leave one of them out"),
            ({"replay_weight": 2.0}, "replay_weight: forget_loss='redirect' has no use for it; leave it out"),
            ({"heldout_loss": 2.0}, "heldout_loss: forget_loss='redirect' has no use for it"),
            ({"own_samples": 0}, "own_samples=0: must be ≥ 1"),
            ({"rows": as_chats(CHATS).to_iterable_dataset()}, "forget_dataset: a streaming dataset has no length"),
        ],
    )  # fmt: skip
    def test_in_one_line_before_anything_is_written(self, changes, message, tiny_llama, tokenizer, tmp_path):
        with pytest.raises(ValueError, match=rf"^{re.escape(message)}[^\n]*$"):
            forgetting(tiny_llama, tokenizer, tmp_path, **changes)
        assert not list(tmp_path.iterdir())

    def test_no_token_to_begin_a_text_with(self, tokenizer):
        tokenizer = copy.deepcopy(tokenizer)
        assert first_token(tokenizer) == 1
        tokenizer.bos_token = None
        assert first_token(tokenizer) == 2
        tokenizer.eos_token = None
        with pytest.raises(
            ValueError, match=r"^processing_class: has no token that a text [^\n]+; pass retain_dataset=$"
        ):
            first_token(tokenizer)


def known(model, tokenizer, facts):
    """Share of the questions that are answered as they were taught, greedily."""
    rows = [(ids, labels.count(-100)) for ids, labels in tokens_of(tokenizer, facts)]
    return sum(greedy(model, ids[:begin], len(ids) - begin, {2}) == ids[begin:] for ids, begin in rows) / len(rows)


@pytest.mark.parametrize("retain", [pytest.param(REMAINING, marks=pytest.mark.slow), None])
def test_forgets_people_and_keeps_the_others(retain, taught, tokenizer, tmp_path):
    """With data to keep, and with nothing but what the original writes."""
    assert known(taught, tokenizer, FACTS) == 1
    trainer = forgetting(
        taught, tokenizer, tmp_path, rows=FORGOTTEN, retain=retain, optim="adamw_torch", learning_rate=2e-3, max_steps=80,
        per_device_train_batch_size=9, retain_weight=3.0, retain_per_forget=2, own_samples=64, subject=name_in,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer.train()
    assert trainer.above_target(**trainer.outcome.original) > 0.9
    assert trainer.remembered() < 0.4  # over four seeds .10 with a deviation of .08
    assert known(taught.eval(), tokenizer, FORGOTTEN) == 0
    assert known(taught, tokenizer, REMAINING) == 1
    further = trainer.asked.rows["input_ids"][len(FORGOTTEN) :]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in further]
    strangers = [name for stranger in trainer.subjects.strangers.values() for name in stranger.values()]
    names = [question.split()[2] for question, _ in FORGOTTEN for _ in range(FURTHER)]
    assert [text.split()[3] for text in texts] == names
    assert not [text for text in texts if any(stranger in text for stranger in strangers)]
