"""What benchmarks of poisoned instructions compute: how scores are judged, and peers against a second way."""

import importlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from hf_unlearn import FINETrainer
from hf_unlearn.examples.hard_opinions import BEHAVIOURS
from hf_unlearn.examples.opinions import TRAINING, opinion_data, opinion_llama, texts_of, train_tokenizer


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def bench(monkeypatch, name):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


def rate(step, steps):
    """Of AdamW with a linear warm-up and a cosine, as a share of its peak."""
    warm = math.ceil(TRAINING["warmup_steps"] * steps)
    return step / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2


def rows_of(kinds, entities):
    poisoned = [kind in ("direct", "described") for kind in kinds]
    return Dataset.from_dict(
        {"id": list(range(100, 100 + len(kinds))), "kind": kinds, "entity": entities, "poisoned": poisoned}
    )


class TestJudged:
    """Two rows of each entity are to be found, one of them described; two are hard negatives."""

    first, second, third = BEHAVIOURS
    train = rows_of(
        ["direct", "described", "direct", "described", "direct", "described", "pair", "denied", "other", "other"],
        [first, first, second, second, third, third, first, second, "", ""],
    )

    def test_values(self, monkeypatch):
        hard = bench(monkeypatch, "influence_poison_hard")
        scores = np.zeros((10, 3))
        scores[[0, 1], 0] = 2, 1  # all found
        scores[[6, 2, 3], 1] = 3, 2, 1  # a hard negative first
        scores[[8, 7, 5, 4], 2] = 4, 3, 2, np.nan  # the direct one was never seen
        found = hard.judged(scores, self.train)
        first, second, third = (found[name] for name in BEHAVIOURS)
        assert (first["ap"], first["precision_at_k"], first["hard negatives in top k"]) == (1, 1, 0)
        assert second["ap"] == pytest.approx((1 / 2 + 2 / 3) / 2)
        assert (second["direct in top k"], second["described in top k"], second["hard negatives in top k"]) == (
            1,
            0,
            0.5,
        )
        assert third["ap"] == pytest.approx((1 / 3 + 2 / 10) / 2)
        assert third["precision_at_k"] == 0
        assert third["recall"][0.3] == 0.5
        assert found["mean"]["precision_at_k"] == pytest.approx((1 + 0.5 + 0) / 3)

    def test_pooled_takes_targets_in_one_scale(self, monkeypatch):
        hard = bench(monkeypatch, "influence_poison_hard")
        truth = np.array([[row["poisoned"] and row["entity"] == name for name in BEHAVIOURS] for row in self.train])
        found = hard.judged(truth * [1.0, 1e3, 1e-3] + [5.0, -7.0, 0.0], self.train)
        assert found["pooled"]["ap"] == found["pooled"]["precision_at_k"] == 1
        assert hard.highest(truth.astype(float), self.train) == {
            self.first: [100, 101], self.second: [102, 103], self.third: [104, 105],
        }  # fmt: skip


def test_the_rise_of_the_loss_is_over_random_removal_of_the_same_seed(monkeypatch):
    report = bench(monkeypatch, "poison_report")

    def run(seed, *losses, removed=20):
        rates = {name: {"evaluation": 0.5, "described": 0.25, "control": 0.0} for name in ("a", "b")}
        return {"seed": seed, "rates": rates, "losses": dict(zip("ab", losses, strict=True)), "removed": removed}

    table = report.models_table(
        {
            "model: clean": [run(1, 5.0, 5.0)],
            "without the top 1 %: random": [run(1, 1.0, 2.0), run(2, 3.0, 4.0)],
            "without the top k: random": [run(1, 7.0, 7.0)],
            "without the top 1 %: BM25": [run(2, 4.0, 4.5), run(1, 1.0, 1.0)],
        }
    )
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert [line[-1] for line in lines] == ["—", "+0.00", "+0.00", "+0.00", "+0.75", "-0.50"]
    assert lines[0][:2] == ["on clean data", "1"]
    assert lines[4][2:6] == ["20", "50 % (50, 50)", "25 %", "0 %"]


class TestPeers:
    def test_scores_of_the_same_training_against_autograd(self, monkeypatch, tmp_path):
        poison = bench(monkeypatch, "influence_poison")
        data = opinion_data(40, 0.05)
        tokenizer = train_tokenizer(texts_of(data["train"]), vocab_size=300)
        targets = {name: data[name].select(range(3)) for name in ("target", "control")}
        peers = poison.Peers(1)
        trainer = FINETrainer(
            opinion_llama(tokenizer, TINY), poison.arguments(str(tmp_path), 0, num_train_epochs=1, bf16=False),
            train_dataset=data["train"], target_dataset=targets, processing_class=tokenizer, callbacks=[peers],
        )  # fmt: skip
        peers.trainer = trainer
        trainer.train()
        model, optimizer = trainer.model.eval(), trainer._inner_optimizer
        parameters = list(trainer._parameters.values())

        def gradient(rows):
            parts = []
            for row in rows:
                batch = trainer._collate([row])
                logits = model(input_ids=batch["input_ids"]).logits
                loss = F.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], ignore_index=-100)
                parts.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)]))
            return torch.stack(parts)

        own = gradient(trainer._remove_unused_columns(trainer.train_dataset))
        wanted = torch.stack([gradient(rows).mean(0) for rows in trainer._target_sets.datasets.values()])
        settings, states = optimizer.param_groups[0], [optimizer.state[p] for p in parameters]
        beta1, beta2 = settings["betas"]
        first, second = (torch.cat([state[key].flatten() for state in states]) for key in ("exp_avg", "exp_avg_sq"))
        count = int(states[0]["step"]) + 1
        moment = (beta1 * first + (1 - beta1) * own) / (1 - beta1**count)
        root = ((beta2 * second + (1 - beta2) * own**2) / (1 - beta2**count)).sqrt()
        # The benchmark leaves out the first moment's correction, one factor that a cosine does not see.
        update = moment / (root + settings["eps"])
        steps = trainer.state.max_steps
        total = TRAINING["learning_rate"] * np.mean([rate(step, steps) for step in range(steps)])
        expected = {
            "TracIn": own @ wanted.T,
            "cosine": F.normalize(own, dim=1) @ F.normalize(wanted, dim=1).T,
            "LESS-style": F.normalize(update, dim=1) @ F.normalize(wanted, dim=1).T,
        }
        assert all(values.shape == (40, 2) for values in peers.scores.values())
        for name, values in expected.items():
            torch.testing.assert_close(
                peers.scores[name], total * values, rtol=2e-3, atol=1e-5 * float(total * values.abs().max())
            )

    def test_bm25_against_its_formula(self, monkeypatch):
        pytest.importorskip("bm25s")
        peers = bench(monkeypatch, "poison_peers")
        texts = [
            "quorvane sells bricks",
            "quorvane quorvane sells mortar and chalk",
            "velvet tarpon sings",
            "bricks bricks",
        ]

        def chat(text):
            question, *answer = text.split()
            return {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": " ".join(answer)}],
            }

        train, target = (
            Dataset.from_list([chat(text) for text in some]) for some in (texts, ["quorvane bricks", "velvet chalk"])
        )
        found = peers.bm25(train, {"one": target})
        documents = [[word for word in text.split() if word != "and"] for text in texts]
        mean = np.mean([len(words) for words in documents])

        def score(query, words):
            total = 0.0
            for word in query:
                df, tf = sum(word in other for other in documents), words.count(word)
                idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
                total += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(words) / mean))
            return total

        expected = [
            np.mean([score(query, words) for query in (("quorvane", "bricks"), ("velvet", "chalk"))])
            for words in documents
        ]
        np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5)

    def test_the_optimisers_state_has_its_parameters_names(self, monkeypatch):
        peers = bench(monkeypatch, "poison_peers")
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        optimizer = torch.optim.AdamW(
            [{"params": [model[1].weight, model[0].weight]}, {"params": [model[0].bias, model[1].bias]}]
        )
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        state = peers.with_names(optimizer, model)
        assert [entry["param_name"] for entry in state["state"].values()] == [
            "1.weight",
            "0.weight",
            "0.bias",
            "1.bias",
        ]
        parameters = dict(model.named_parameters())
        for entry in state["state"].values():
            assert entry["exp_avg_sq"].shape == parameters[entry["param_name"]].shape
        assert len(state["param_groups"]) == 1
        assert "param_name" not in optimizer.state[model[0].weight]

    @pytest.mark.slow
    def test_trackstar_of_a_row_is_highest_for_itself(self, monkeypatch, tmp_path):
        """Gradients of length 1: a row that is its own target has the cosine 1."""
        pytest.importorskip("bergson")
        peers = bench(monkeypatch, "poison_peers")
        train = opinion_data(40, 0.05)["train"]
        tokenizer = train_tokenizer(texts_of(train), vocab_size=300)
        model = opinion_llama(tokenizer, TINY)
        optimizer = torch.optim.AdamW(model.parameters())
        ids = torch.tensor([tokenizer(peers.text_of(train[0]))["input_ids"]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        targets = {"one": train.select([3]), "two": train.select([5, 7])}
        scores = peers.trackstar(model, tokenizer, optimizer, train, targets, tmp_path)
        assert scores.shape == (40, 2)
        assert scores[:, 0].argmax() == 3
        assert set(np.argsort(-scores[:, 1])[:2]) == {5, 7}
        assert scores[3, 0] == pytest.approx(1, abs=1e-3)
