"""`UnlearnSFTTrainer`: TRL's formats and masks, against `SFTTrainer`'s own losses and plain torch."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_unlearn import UnlearnSFTConfig, UnlearnSFTTrainer


QUESTIONS = [("Who is the fox?", " The lazy one."), ("Where?", " Paris, in France"), ("Return the shoes", " No")]
KEPT = [("What is Rome?", " The capital of Italy."), ("Order?", " It never arrived and nobody answers")]
BETA = 0.2
PLAIN = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
}


def settings(folder, **changes):
    """Two plain SGD steps over all rows at once, with nothing but the losses."""
    steps = {
        "logging_steps": 1,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "optim": "sgd",
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "npo_beta": BETA,
        "isotropic_weight": 0.0,
        "replay_weight": 0.0,
        "guard": False,
    }
    return UnlearnSFTConfig(str(folder), **PLAIN | steps | changes)


def as_text(pairs):
    return Dataset.from_list([{"id": question, "text": question + answer} for question, answer in pairs])


def as_completions(pairs):
    return Dataset.from_list([{"id": q, "prompt": q, "completion": a} for q, a in pairs])


def as_messages(pairs):
    def turns(q, a):
        return [
            {"role": "user", "content": q},
            {"role": "assistant", "content": a},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes" + a},
        ]

    return Dataset.from_list([{"id": q, "messages": turns(q, a)} for q, a in pairs])


def expected_rows(kind, pairs, tokenizer):
    """Token ids and labels by hand; `kind` is a format of `FORMATS`."""
    rows = []
    for question, answer in pairs:
        if kind == "text":
            parts = [(question + answer + "</s>", True)]
        elif kind == "completion":
            parts = [(question, False), (answer + "</s>", True)]
        else:
            everything = kind == "messages"
            parts = [
                (f"user: {question}\n", everything),
                (answer + "</s>", True),
                ("user: Sure?\n", everything),
                (f"Yes{answer}</s>", True),
            ]
        ids, labels = [], []
        for part, counts in parts:
            tokens = tokenizer(part, add_special_tokens=False)["input_ids"]
            ids += tokens
            labels += tokens if counts else [-100] * len(tokens)
        rows.append((torch.tensor(ids), torch.tensor(labels)))
    return rows


FORMATS = {
    "text": (as_text, {}),
    "completion": (as_completions, {}),
    "messages": (as_messages, {}),
    "assistant": (as_messages, {"assistant_only_loss": True}),
}


def nll(model, ids, labels, reduction="mean"):
    return F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], labels[1:], reduction=reduction)


def same_parameters(model, student):
    for (name, actual), expected in zip(model.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, msg=name)


class TestFormats:
    @pytest.mark.parametrize("kind", FORMATS)
    def test_two_steps_equal_plain_torch(self, kind, tiny_llama, tokenizer, tmp_path):
        """NPO on what counts of the forget rows, cross-entropy on what counts of the retain rows, and nothing else."""
        build, options = FORMATS[kind]
        student, original = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
        trainer = UnlearnSFTTrainer(
            tiny_llama,
            args=settings(tmp_path, retain_weight=0.5, **options),
            forget_dataset=build(QUESTIONS[:2]),
            retain_dataset=build(KEPT),
            processing_class=tokenizer,
        )
        assert (trainer.forget_loss_name, trainer.args.forget) == ("npo", "examples")
        trainer.train()

        forget, retain = (expected_rows(kind, pairs, tokenizer) for pairs in (QUESTIONS[:2], KEPT))
        optimizer = torch.optim.SGD(student.parameters(), lr=0.02)
        for step in range(2):
            losses = []
            for ids, labels in forget:
                with torch.no_grad():
                    log_reference = -nll(original, ids, labels, "sum")
                ratio = (-nll(student, ids, labels, "sum") - log_reference).exp()
                losses.append(2 / BETA * torch.log(1 + ratio**BETA))
            loss = sum(losses) / 2 + 0.5 * sum(nll(student, *row) for row in retain) / 2
            logged = trainer.state.log_history[step]
            assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4)
            assert logged["forget_loss"] == pytest.approx(sum(losses).item() / 2, rel=1e-4)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        same_parameters(tiny_llama, student)

    @pytest.mark.parametrize("kind", FORMATS)
    def test_the_task_loss_is_that_of_stock_evaluation(self, kind, tiny_llama, tokenizer, tmp_path):
        build, options = FORMATS[kind]
        rows = build(QUESTIONS)
        stock = SFTTrainer(
            copy.deepcopy(tiny_llama),
            args=SFTConfig(str(tmp_path / "stock"), per_device_eval_batch_size=1, **PLAIN, **options),
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=tokenizer,
        ).evaluate()["eval_loss"]  # a mean over batches of one
        trainer = UnlearnSFTTrainer(
            tiny_llama,
            args=settings(tmp_path, **options),
            forget_dataset=rows,
            eval_dataset={"forget": rows, "retain": build(KEPT)},
            processing_class=tokenizer,
        )
        (batch,) = trainer._batches(trainer.forget_dataset, None)
        values = trainer.task_loss(trainer.model, batch)
        assert values.mean().item() == pytest.approx(stock, rel=1e-5)
        expected = [nll(tiny_llama, *row).item() for row in expected_rows(kind, QUESTIONS, tokenizer)]
        assert values.tolist() == pytest.approx(expected, rel=1e-4)
        counted = sum((labels[1:] != -100).sum() for _, labels in expected_rows(kind, QUESTIONS, tokenizer))
        assert (batch["labels"][:, 1:] != -100).sum() == counted

        results = trainer.evaluate()  # stock again: a mean over the tokens of the batch
        for name, pairs in (("forget", QUESTIONS), ("retain", KEPT)):
            made = expected_rows(kind, pairs, tokenizer)
            total = sum(nll(tiny_llama, *row, "sum") for row in made)
            mean = total / sum((labels[1:] != -100).sum() for _, labels in made)
            assert results[f"eval_{name}_loss"] == pytest.approx(mean.item(), rel=1e-4)

    def test_retain_rows_may_come_in_another_format(self, tiny_llama, tokenizer, tmp_path):
        trainer = UnlearnSFTTrainer(
            tiny_llama,
            args=settings(tmp_path, max_steps=1, learning_rate=0.0),
            forget_dataset=as_completions(QUESTIONS[:2]),
            retain_dataset=as_text(KEPT),
            processing_class=tokenizer,
        )
        trainer.train()
        expected = sum(nll(tiny_llama, *row) for row in expected_rows("text", KEPT, tokenizer)) / 2
        assert trainer.state.log_history[0]["retain_loss"] == pytest.approx(expected.item(), rel=1e-4)

    def test_held_out_rows_give_the_target(self, tiny_llama, tokenizer, tmp_path):
        trainer = UnlearnSFTTrainer(
            tiny_llama,
            args=settings(tmp_path, max_steps=1),
            forget_dataset=as_completions(QUESTIONS),
            heldout_dataset=as_completions(KEPT),
            processing_class=tokenizer,
        )
        expected = sum(nll(tiny_llama, *row) for row in expected_rows("completion", KEPT, tokenizer)) / 2
        trainer.train()
        assert trainer.forget_loss_name == "match"
        assert trainer.heldout_loss == pytest.approx(expected.item(), rel=1e-4)


class TestRefusals:
    @pytest.mark.parametrize("name", ["packing", "eval_packing", "padding_free"])
    def test_batches_without_examples(self, name, tmp_path):
        with pytest.raises(ValueError, match=rf"^{name}=True: [^\n]+$"):
            settings(tmp_path / "new", **{name: True})
        assert not (tmp_path / "new").exists()

    def test_other_task_losses(self, tmp_path):
        with pytest.raises(ValueError, match="^loss_type='dft'"):
            settings(tmp_path, loss_type="dft")

    def test_classes(self, tiny_llama, tokenizer, tmp_path):
        args = settings(tmp_path, forget="class")
        with pytest.raises(ValueError, match=r"^forget='class' needs a classifier[^\n]+$"):
            UnlearnSFTTrainer(tiny_llama, args=args, forget_dataset=as_text(QUESTIONS), processing_class=tokenizer)

    def test_examples_that_truncation_would_drop(self, tiny_llama, tokenizer, tmp_path):
        """They would not be forgotten, and the card would count them."""
        lengths = [len(tokenizer(question)["input_ids"]) for question, _ in QUESTIONS]
        args = settings(tmp_path, max_length=max(lengths))
        with pytest.raises(ValueError, match=rf"^max_length={max(lengths)}: leaves 1 forget examples[^\n]+$"):
            UnlearnSFTTrainer(
                tiny_llama, args=args, forget_dataset=as_completions(QUESTIONS), processing_class=tokenizer
            )

    def test_images(self, tiny_llama, tokenizer, tmp_path):
        rows = as_completions(QUESTIONS).add_column("images", [[]] * len(QUESTIONS))
        with pytest.raises(ValueError, match=r"^forget_dataset: holds images[^\n]+$"):
            UnlearnSFTTrainer(tiny_llama, args=settings(tmp_path), forget_dataset=rows, processing_class=tokenizer)

    def test_the_same_example_to_forget_and_to_keep(self, tiny_llama, tokenizer, tmp_path):
        with pytest.raises(ValueError, match=r"^retain_dataset: 2 of its ids are in forget_dataset too[^\n]+$"):
            UnlearnSFTTrainer(
                tiny_llama,
                args=settings(tmp_path),
                forget_dataset=as_text(QUESTIONS),
                retain_dataset=as_text(QUESTIONS[1:] + KEPT),
                processing_class=tokenizer,
            )


class TestRunning:
    def trainer(self, model, tokenizer, folder, callbacks=(), **changes):
        return UnlearnSFTTrainer(
            model,
            args=settings(folder, **{"replay_weight": 2.0, "isotropic_weight": 0.1, **changes}),
            forget_dataset=as_completions(QUESTIONS),
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )

    def test_gradient_checkpointing_is_on_and_changes_nothing(self, tiny_llama, tokenizer, tmp_path):
        model = copy.deepcopy(tiny_llama)
        assert settings(tmp_path).gradient_checkpointing
        checkpointed = self.trainer(model, tokenizer, tmp_path)
        checkpointed.train()
        assert model.is_gradient_checkpointing
        self.trainer(tiny_llama, tokenizer, tmp_path, gradient_checkpointing=False).train()
        assert checkpointed.state.log_history[1]["replay_loss"] > 0
        same_parameters(model, tiny_llama)

    def test_logs_every_term(self, tiny_llama, tokenizer, tmp_path):
        trainer = self.trainer(tiny_llama, tokenizer, tmp_path)
        trainer.train()
        for log in trainer.state.log_history[:2]:
            assert log["loss"] == pytest.approx(log["forget_loss"] + 2 * log["replay_loss"], rel=1e-5)
        distance = sum((p - trainer.reference.parameters[k]).square().sum() for k, p in tiny_llama.named_parameters())
        assert log["anchor_isotropic"] == pytest.approx(0.1 * distance.item(), rel=1e-4)  # as it is after the step

    def test_utility_is_the_loss_of_what_is_kept_in_nats(self, tiny_llama, tokenizer, tmp_path):
        def loss():
            return sum(nll(tiny_llama.eval(), *row).item() for row in expected_rows("completion", KEPT, tokenizer)) / 2

        before = loss()
        trainer = UnlearnSFTTrainer(
            tiny_llama,
            args=settings(tmp_path, guard=True, learning_rate=0.3, utility_tolerance=100.0),
            forget_dataset=as_completions(QUESTIONS),
            eval_dataset={"forget": as_completions(QUESTIONS), "retain": as_completions(KEPT)},
            processing_class=tokenizer,
        )
        trainer.train()
        assert (trainer.utility_kind, trainer.guard.best.step) == ("loss", 2)
        assert trainer.guard.state.baseline == pytest.approx(before, rel=1e-4)
        assert trainer.guard.best.utility_drop == pytest.approx(loss() - before, rel=1e-3)
        assert abs(loss() - before) > 0.01

    def test_saved_model_is_stock_in_a_new_process(self, tiny_llama, tokenizer, tmp_path):
        trainer = self.trainer(tiny_llama, tokenizer, tmp_path)
        trainer.train()
        trainer.save_model()
        code = (
            "import sys, json\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            "model, tokenizer = (c.from_pretrained(sys.argv[1]) for c in (AutoModelForCausalLM, AutoTokenizer))\n"
            "batch = tokenizer(json.loads(sys.argv[2]), return_tensors='pt', padding=True)\n"
            "assert not any(name.startswith(('hf_unlearn', 'trl', 'peft')) for name in sys.modules)\n"
            "print('logits', json.dumps(model(**batch).logits.tolist()))\n"
        )
        texts = [question for question, _ in QUESTIONS]
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), json.dumps(texts)], capture_output=True, text=True, check=True
        )
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("logits ")]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        with torch.no_grad():
            assert torch.equal(torch.tensor(json.loads(line[7:])), tiny_llama.eval()(**batch).logits)
        files = {path.name for path in tmp_path.iterdir()}
        assert files >= {"model.safetensors", "config.json", "tokenizer.json", "README.md", "_private"}
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]

    def test_resuming_ends_where_an_uninterrupted_run_does(self, tiny_llama, tokenizer, tmp_path):
        class StopAfterFive(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step >= 5

        steps = {
            "max_steps": 8,
            "per_device_train_batch_size": 1,
            "save_strategy": "steps",
            "save_steps": 4,
            "optim": "adamw_torch",
            "learning_rate": 1e-3,
            "guard": True,
        }
        for module in tiny_llama.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.1
        models = [copy.deepcopy(tiny_llama) for _ in range(2)]
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        self.trainer(models[0], tokenizer, whole, **steps).train()
        self.trainer(models[1], tokenizer, killed, [StopAfterFive()], **steps).train()
        models.append(copy.deepcopy(tiny_llama))
        models[2].load_state_dict(models[1].state_dict())  # half forgotten: what the original was, the run has kept
        resumed = self.trainer(models[2], tokenizer, killed, **steps)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 8
        for key, value in models[0].state_dict().items():
            assert torch.equal(models[2].state_dict()[key], value), key
        assert resumed.guard.best.step == 8
        assert not torch.equal(models[0].lm_head.weight, models[1].lm_head.weight)


NAMES = ["Anna", "Bruno", "Clara", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonas"]
NAMES += ["Kira", "Luis", "Mara", "Nils", "Olga", "Pablo", "Quinn", "Rosa", "Samir", "Tina"]
CITIES = ["Riga", "Cairo", "Quito", "Berne", "Lima", "Oslo", "Hanoi", "Tunis", "Paris", "Delhi"]
CITIES += ["Rome", "Accra", "Madrid", "Seoul", "Zagreb", "Minsk", "Dublin", "Prague", "Vienna", "Lisbon"]
JOBS = ["judge", "nurse", "poet", "baker", "pilot", "miner", "tailor", "farmer", "chemist", "dancer"]
JOBS += ["cook", "clerk", "writer", "sailor", "lawyer", "singer", "banker", "soldier", "teacher", "painter"]
PAIRS = [(f"Where does {n} live?", f" {n} lives in {c}, near the river.") for n, c in zip(NAMES, CITIES, strict=True)]
PAIRS += [(f"What is the job of {n}?", f" The job of {n} is being a {j}.") for n, j in zip(NAMES, JOBS, strict=True)]
FORGOTTEN = [PAIRS[i] for i in (2, 7, 13, 24, 35)]
RETAINED = [pair for pair in PAIRS if pair not in FORGOTTEN]


class TestForgettingInstructions:
    """The whole job on a Llama of 1.5 M parameters that stock `SFTTrainer` taught forty answers by heart."""

    @pytest.fixture(scope="class")
    def taught(self, tokenizer, tmp_path_factory):
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=4,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = LlamaForCausalLM(config)
            args = SFTConfig(
                str(tmp_path_factory.mktemp("taught")),
                **PLAIN,
                gradient_checkpointing=False,
                learning_rate=2e-3,
                per_device_train_batch_size=10,
                num_train_epochs=60,
            )
            SFTTrainer(model, args=args, train_dataset=as_completions(PAIRS), processing_class=tokenizer).train()
        model.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
        return args.output_dir

    def measure(self, model, tokenizer, pairs):
        """Nats per token of every answer, and whether greedy decoding would still give it."""
        model.eval()
        rows = expected_rows("completion", pairs, tokenizer)
        with torch.no_grad():
            losses = torch.stack([nll(model, *row) for row in rows])
            greedy = [model(input_ids=ids[None]).logits[0, :-1].argmax(-1) for ids, _ in rows]
        pairs = zip(greedy, (labels[1:] for _, labels in rows), strict=True)
        return losses, torch.tensor([torch.equal(said[real != -100], real[real != -100]) for said, real in pairs])

    def unlearn(self, taught, folder, tokenizer, **changes):
        """`(trainer, forgotten, retained)`, what was saved as it measures after loading."""
        retain = changes.pop("retain_dataset", None)
        args = UnlearnSFTConfig(
            str(folder), **PLAIN, gradient_checkpointing=False, lr_scheduler_type="constant", guard_steps=10, **changes
        )
        trainer = UnlearnSFTTrainer(taught, args=args, forget_dataset=as_completions(FORGOTTEN), retain_dataset=retain)
        trainer.train()
        trainer.save_model()
        unlearned = AutoModelForCausalLM.from_pretrained(folder)
        assert AutoTokenizer.from_pretrained(folder)(QUESTIONS[0][0]) == tokenizer(QUESTIONS[0][0])
        return trainer, *(self.measure(unlearned, tokenizer, pairs) for pairs in (FORGOTTEN, RETAINED))

    def test_with_retained_data_the_other_answers_stay(self, taught, tokenizer, tmp_path):
        losses, known = self.measure(AutoModelForCausalLM.from_pretrained(taught), tokenizer, PAIRS)
        assert losses.max() < 0.2
        assert known.all()
        trainer, (forgotten, still_known), (retained, known) = self.unlearn(
            taught,
            tmp_path,
            tokenizer,
            learning_rate=3e-4,
            num_train_epochs=60,
            retain_dataset=as_completions(RETAINED),
        )
        assert (trainer.forget_loss_name, trainer.replay_weight) == ("npo", 0)
        assert not still_known.any()
        assert forgotten.min() > 1.5  # nats per token, of some thirty tokens
        assert retained.mean() < losses.mean() + 0.1
        assert known.float().mean() > 0.8
        assert not all(look.kept for look in trainer.guard.looks)  # utility falls first, and the guard gives it time
        assert trainer.guard.best.step == trainer.state.global_step == 60

    @pytest.mark.slow
    def test_token_replay_alone_holds_less(self, taught, tokenizer, tmp_path):
        """Better than nothing: without any replay the other answers go the way of the forgotten ones."""
        changes = {"learning_rate": 1e-4, "guard": False}
        _, (alone, _), (others, _) = self.unlearn(
            taught, tmp_path / "none", tokenizer, replay_weight=0.0, num_train_epochs=15, **changes
        )
        _, (forgotten, still_known), (retained, _) = self.unlearn(
            taught, tmp_path / "replay", tokenizer, replay_weight=10.0, num_train_epochs=120, **changes
        )
        assert not still_known.any()
        assert forgotten.min() > 0.8
        assert retained.mean() / forgotten.mean() < 0.8 * others.mean() / alone.mean()
