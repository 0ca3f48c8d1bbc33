"""`InfluenceTrainer`: it trains as `Trainer` does, and what it records is what loops over single examples compute."""

import copy
import dataclasses
import random

import numpy as np
import pytest
import torch
from brute_force import (
    MLP,
    Brute,
    agrees,
    alike,
    assert_near,
    example_loss,
    images,
    mlp,
    observations,
    parameters,
    settings,
    state,
    stock,
    trained,
    vectors,
)  # fmt: skip
from datasets import Dataset, concatenate_datasets
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from hf_unlearn.influence.report import shuffling
from hf_unlearn.influence.report.observations import step_statistics
from hf_unlearn.influence.report.report import InfluenceReport
from hf_unlearn.influence.report.shuffling import Panel
from hf_unlearn.influence.trainer import InfluenceTrainer


def dropout_vit():
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16, patch_size=8, num_channels=1, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, num_labels=10, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1, initializer_range=0.2,
    )  # fmt: skip
    return ViTForImageClassification(config)


def without_batch_norm(model):
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(2, child.num_features))
    return model


def random_state():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()


MOMENTUM = {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.05}
# ε well above rounding: a key's bias, whose gradient is nothing else, would go a whole step in any direction.
ADAM = {
    "optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1, "lr_scheduler_type": "linear", "adam_epsilon": 1e-4,
}  # fmt: skip
TWICE, CHECKPOINTED = {"gradient_accumulation_steps": 2}, {"activation_checkpointing": True}


def both(make, args, rows, collator=None, evaluated=None, **target):
    """Trainer and influence trainer, each trained from the start that `make` builds, and the random states in which they end."""
    ends = []
    for trainer_class, own, extra in ((Trainer, stock(args, TrainingArguments), {}), (InfluenceTrainer, args, target)):
        trainer = trainer_class(make(), own, collator, rows, eval_dataset=evaluated, **extra)
        trainer.train()
        ends += [trainer, random_state()]
    assert alike(state(ends[2].model), state(ends[0].model), state(make()))
    return ends


class TestTrainingIsUnchanged:
    @pytest.mark.parametrize(
        ("which", "observation", "changes"),
        [
            ("vit", "in_run", ADAM | {"max_grad_norm": 0.5}),
            ("vit", "in_run", ADAM | CHECKPOINTED),
            ("vit", "propagated", MOMENTUM | TWICE | CHECKPOINTED),
            ("vit", "propagated", ADAM | {"max_grad_norm": 0.5, "train_sampling_strategy": "sequential"}),
            ("vit", "self", MOMENTUM | TWICE),
            ("resnet", "in_run", ADAM | TWICE | {"max_grad_norm": 1.0}),
            ("resnet", "propagated", MOMENTUM),
            ("resnet", "self", ADAM),
        ],
    )
    def test_the_end_is_that_of_trainer(self, which, observation, changes, tiny_resnet, tmp_path):
        """Weights, statistics, modes and every random state."""
        target = {"target": "self"} if observation == "self" else {"target_dataset": images(5, seed=2)}
        seen = "in_run" if observation == "self" else observation
        args = settings(tmp_path, observation=seen, target_every=2, target_batch_size=3, max_steps=5, **changes)
        make = dropout_vit if which == "vit" else lambda: copy.deepcopy(tiny_resnet)
        plain, expected_random, trainer, random = both(make, args, images(13), **target)
        modes = [[module.training for module in each.model.modules()] for each in (trainer, plain)]
        gradients = [[p.grad is None for p in each.model.parameters()] for each in (trainer, plain)]
        assert modes[0] == modes[1]
        assert gradients[0] == gradients[1]
        for actual, wanted in zip(random, expected_random, strict=True):
            assert torch.equal(actual, wanted) if isinstance(actual, torch.Tensor) else actual == wanted
        assert len(observations(trainer).steps.step) == 5

    def test_evaluations_on_the_way_are_those_of_trainer(self, tmp_path):
        args = settings(tmp_path, eval_strategy="steps", eval_steps=2, max_steps=4)
        plain, _, trainer, _ = both(
            dropout_vit, args, images(13), evaluated=images(6, seed=1), target_dataset=images(5, seed=2)
        )
        expected, history = (
            [log["eval_loss"] for log in each.state.log_history if "eval_loss" in log] for each in (plain, trainer)
        )
        assert history == pytest.approx(expected, rel=1e-5)
        assert len(history) == 2

    @pytest.mark.parametrize("observation", ["in_run", "propagated"])
    def test_a_collator_that_draws_numbers_draws_the_same(self, observation, tmp_path):
        def noisy(rows):
            x = torch.stack([row["x"] for row in rows])
            return {"x": x + 0.1 * torch.randn(x.shape), "labels": torch.stack([row["labels"] for row in rows])}

        args = settings(tmp_path, observation=observation, max_steps=5)
        both(lambda: mlp(dropout=0.2), args, vectors(13), noisy, target_dataset=vectors(3, seed=1))

    def test_rows_of_similar_length_stay_together(self, tiny_llama, tokenizer, tmp_path):
        rows = Dataset.from_list([{"input_ids": [5] * n, "labels": [5] * n, "length": n} for n in range(3, 16)])
        args = settings(tmp_path, train_sampling_strategy="group_by_length", max_steps=3)
        both(lambda: copy.deepcopy(tiny_llama), args, rows, padding(tokenizer), target_dataset=rows)


def padding(tokenizer, to=1):
    def collate(rows):
        longest = -(-max(len(row["input_ids"]) for row in rows) // to) * to
        empty = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
        filled = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        return {
            name: torch.tensor([[*row[name]] + [value] * (longest - len(row[name])) for row in filled])
            for name, value in empty.items()
        }

    return collate


def texts(tokenizer, n=9, *, seed=0, prompt=2):
    """Rows of different lengths; of each the first `prompt` tokens do not count."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(n):
        ids = torch.randint(3, len(tokenizer), (4 + 3 * row % 11,), generator=generator).tolist()
        rows.append({"id": f"text {row}", "input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Dataset.from_list(rows)


def one_silent(rows):
    """The second row has no predictions."""
    return rows.map(lambda row, i: {"labels": [-100] * len(row["labels"])} if i == 1 else row, with_indices=True)


class TestInRun:
    @pytest.mark.parametrize(
        ("which", "changes"),
        [
            ("vit", {}),
            ("vit", {"target_every": 3, "max_steps": 5} | CHECKPOINTED),
            ("vit", ADAM | {"max_grad_norm": 0.3, "learning_rate": 1e-2}),
            ("resnet", TWICE | {"per_device_train_batch_size": 2}),
            ("resnet", {"max_grad_norm": 0.3, "lr_scheduler_type": "linear"}),
            ("mlp", TWICE | {"per_device_train_batch_size": 2, "max_grad_norm": 0.3}),
            ("mlp", ADAM | {"target_every": 3, "max_steps": 5}),
        ],
    )
    def test_equals_a_loop_over_examples(self, which, changes, tiny_vit, tiny_resnet, tmp_path):
        rows, targets = (vectors(10), vectors(4, seed=1)) if which == "mlp" else (images(10), images(4, seed=1))
        model = {"vit": tiny_vit, "resnet": without_batch_norm(tiny_resnet), "mlp": mlp()}[which]
        trainer = trained(model, settings(tmp_path, **changes), rows, targets)
        expected = Brute(trainer).observed([targets], every=changes.get("target_every", 1))
        assert agrees(observations(trainer), expected)

    def test_several_targets(self, tiny_vit, tmp_path):
        """A dict of sets, and a set with a column that tells them apart, are the same."""
        sets = {"one": images(3, seed=1), "another": images(2, seed=2)}
        trainer = trained(copy.deepcopy(tiny_vit), settings(tmp_path / "sets"), images(10), sets)
        first = observations(trainer)
        assert agrees(first, Brute(trainer).observed(list(sets.values())))
        parts = [part.add_column("target", [name] * len(part)) for name, part in sets.items()]
        second = observations(
            trained(tiny_vit, settings(tmp_path / "column"), images(10), concatenate_datasets(parts))
        )
        assert first.targets == second.targets == ("one", "another")
        assert_near(second.value, first.value)

    @pytest.mark.parametrize(("fixture", "accumulation"), [("tiny_gpt2", 1), ("tiny_llama", 2)])
    def test_language_models(self, fixture, accumulation, request, tokenizer, tmp_path):
        """Weights are the tokens that count; padding does not."""
        model = request.getfixturevalue(fixture)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        batch = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
        targets, args = texts(tokenizer, 4, seed=1), settings(tmp_path, max_grad_norm=1.0, **batch)
        trainer = trained(model, args, texts(tokenizer), targets, padding(tokenizer, to=16))
        brute = Brute(trainer, collate=padding(tokenizer))
        assert agrees(observations(trainer), brute.observed([targets]))

    def test_preconditioned(self, tmp_path):
        """The target's gradient over √v̂ + ε; before the first step there is no v."""
        targets, moments = vectors(4, seed=1), []

        class Look(TrainerCallback):
            def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
                found = getattr(optimizer, "optimizer", optimizer).state
                moments.append([(found[p]["exp_avg_sq"].clone(), float(found[p]["step"])) for p in found])

        args = settings(tmp_path, **ADAM, preconditioned=True, max_steps=4)
        trainer = trained(mlp(), args, vectors(10), targets, callbacks=[Look()])

        def fold(number, looks):
            if number == 0:
                return looks
            by_parameter = dict(zip(order, moments[number], strict=True))
            root = [(by_parameter[n][0] / (1 - 0.999 ** by_parameter[n][1])).sqrt() + 1e-4 for n in brute.names]
            return looks / torch.cat([part.flatten() for part in root]).double()

        brute = Brute(trainer)
        named = {id(p): name for name, p in trainer.model.named_parameters()}
        order = [named[id(p)] for p in trainer._inner_optimizer.state]
        expected = {number: step for number, step in enumerate(brute.observed([targets], fold=fold)) if number}
        assert agrees(observations(trainer), expected)

    def test_who_shares_the_batch_does_not_matter(self, tiny_llama, tokenizer, tmp_path):
        """The same weights at every step, so that an example is worth the same in batches of any size."""
        rows, targets, values = texts(tokenizer, 12), texts(tokenizer, 4, seed=1), []
        for size, accumulation in ((1, 1), (3, 1), (2, 2), (12, 1)):
            args = settings(
                tmp_path / str(size), per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
                max_steps=-1, num_train_epochs=1, learning_rate=1e-12, adam_epsilon=1.0,
            )  # fmt: skip
            seen = observations(trained(copy.deepcopy(tiny_llama), args, rows, targets, padding(tokenizer)))
            assert sorted(seen.example) == list(range(12))
            values.append(seen.value[np.argsort(seen.example)])
        for other in values[1:]:
            assert_near(other, values[0])

    def test_groups_of_parameters_with_their_own_learning_rates(self, tmp_path):
        targets, model = vectors(4, seed=1), mlp()
        groups = [{"params": list(model.first.parameters()), "lr": 0.3}, {"params": list(model.second.parameters())}]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        args = settings(tmp_path, target_every=2)
        trainer = trained(model, args, vectors(10), targets, optimizers=(optimizer, schedule))
        brute = Brute(trainer)

        def fold(number, looks):
            first = sum(p.numel() for p in model.first.parameters())
            return torch.cat([looks[:, :first] * 3, looks[:, first:]], dim=1)

        for number, step in enumerate(trainer.steps):
            step["lr"] = 0.1 / (1 + number)
        assert agrees(observations(trainer), brute.observed([targets], every=2, fold=fold))


class TestSelf:
    @pytest.mark.parametrize("which", ["mlp", "llama"])
    def test_equals_the_gram_matrix(self, which, tiny_llama, tokenizer, tmp_path):
        if which == "mlp":
            trainer = trained(mlp(), settings(tmp_path), vectors(10), "self")
        else:
            tiny_llama.lm_head.weight = nn.Parameter(tiny_llama.lm_head.weight.clone())
            trainer = trained(tiny_llama, settings(tmp_path), texts(tokenizer), "self", padding(tokenizer))
        expected = []
        brute = Brute(trainer, collate=padding(tokenizer) if which == "llama" else None)
        for step in trainer.steps:
            rows, counts, gradients, factor = brute.step(step)
            gram = factor * gradients @ gradients.T
            of_batch = [step_statistics(counts.numpy(), row[:, None].numpy()) for row in gram]
            values = [[gram[i, i].item(), mean[0], spread[0]] for i, (_, mean, spread) in enumerate(of_batch)]
            if len(rows) == 1:  # its batch tells nothing of others
                values[0][2] = 0.0
            expected.append((rows, counts, torch.tensor(values)))
        assert agrees(observations(trainer), expected, rtol=2e-3)

    def test_accumulated_batches_stand_for_the_whole_step(self, tiny_llama, tokenizer, tmp_path):
        """Of examples that are all the same two, each micro-batch knows what the whole step would have told, but for the
        size of the sample that σ² is of.
        """
        rows = texts(tokenizer, 2)
        rows = Dataset.from_list([row | {"id": str(i)} for i, row in enumerate(list(rows) * 4)])
        seen = []
        for size, accumulation in ((8, 1), (2, 4), (4, 2)):
            args = settings(
                tmp_path / str(size), per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
                train_sampling_strategy="sequential", max_steps=1,
            )  # fmt: skip
            seen.append(observations(trained(copy.deepcopy(tiny_llama), args, rows, "self", padding(tokenizer))))
        own = seen[0].value[:2, 0]
        weight = seen[0].weight[:2]
        for part, size in zip(seen, (8, 2, 4), strict=True):
            np.testing.assert_allclose(part.value[:, 0], seen[0].value[:, 0], rtol=1e-4)
            value = part.value[0]
            cross = (seen[0].value[0, 1] * weight.sum() - own[0] * weight[0]) / weight[1]
            others = (weight[0] * own[0] * (size / 2 - 1) + weight[1] * cross * size / 2) / (
                weight[0] * (size / 2 - 1) + weight[1] * size / 2
            )
            whole = 4 * weight.sum()
            mean = (weight[0] * own[0] + (whole - weight[0]) * others) / whole
            np.testing.assert_allclose(value[1], mean, rtol=1e-3)
            assert value[2] == pytest.approx(seen[0].value[0, 2] * (size / (size - 1)) / (8 / 7), rel=0.01)

    def test_an_example_without_predictions_spoils_no_other(self, tiny_llama, tokenizer, tmp_path):
        seen = []
        for number, data in enumerate((one_silent(texts(tokenizer, 4)), texts(tokenizer, 4).select([0, 2, 3]))):
            args = settings(tmp_path / str(number), max_steps=1, train_sampling_strategy="sequential")
            seen.append(observations(trained(copy.deepcopy(tiny_llama), args, data, "self", padding(tokenizer))))
        assert seen[0].example.tolist() == [0, 2, 3]
        np.testing.assert_allclose(seen[0].value, seen[1].value, rtol=1e-4)


def unrolled(trainer, targets, dataset, collate=None):
    """Propagated observations and σ² by autograd through the whole run, as one function of every example's coefficient."""
    args, brute = trainer.args, Brute(trainer, dataset, collate)
    model, names = trainer.model, list(parameters(trainer.model))
    theta = {name: value.clone().requires_grad_() for name, value in trainer.steps[0]["theta"].items()}
    m = {name: torch.zeros_like(value) for name, value in theta.items()}
    v = dict(m)
    coefficients, averaged, looks = [], [], []
    decayed = set(trainer.get_decay_parameter_names(model))
    window = max(1, round(args.target_window * len(trainer.steps)))
    model.train()

    def target_loss():
        model.eval()
        sets = [
            [example_loss(model, theta, brute.batch(data, row))[0] for row in range(len(data))] for data in targets
        ]
        model.train()
        return torch.stack([sum(losses) / len(losses) for losses in sets])

    for number, step in enumerate(trainer.steps):
        if number > len(trainer.steps) - window:
            looks.append(target_loss())
        rows = sum(step["rows"], [])
        pairs = [example_loss(model, theta, brute.batch(brute.dataset, row)) for row in rows]
        losses, counts = zip(*pairs, strict=True)
        q = (torch.tensor(counts) / sum(counts)).requires_grad_()
        coefficients.append((rows, counts, q))
        loss = (q * torch.stack(losses)).sum()
        g = dict(zip(names, torch.autograd.grad(loss, list(theta.values()), create_graph=True), strict=True))
        if args.max_grad_norm:
            norm = torch.cat([part.flatten() for part in g.values()]).norm()
            scale = (args.max_grad_norm / (norm + 1e-6)).clamp(max=1)
            g = {name: part * scale for name, part in g.items()}
        for name in names:
            if args.optim == "sgd":
                m[name] = g[name] if number == 0 else 0.9 * m[name] + g[name]
                theta[name] = theta[name] - step["lr"] * m[name]
            else:
                m[name], v[name] = 0.9 * m[name] + 0.1 * g[name], 0.999 * v[name] + 0.001 * g[name] ** 2
                root = (v[name] / (1 - 0.999 ** (number + 1)) + 1e-30).sqrt() + args.adam_epsilon
                kept = 1 - step["lr"] * args.weight_decay * (name in decayed)
                theta[name] = kept * theta[name] - step["lr"] * m[name] / (1 - 0.9 ** (number + 1)) / root
    looks.append(target_loss())
    averaged = torch.stack(looks).mean(0)
    inputs = [q for _, _, q in coefficients]
    gains, at_end = (
        [torch.autograd.grad(loss, inputs, retain_graph=True) for loss in losses] for losses in (averaged, looks[-1])
    )
    expected = {}
    for number, (rows, counts, _) in enumerate(coefficients):
        values, last = (-torch.stack([each[number] for each in kind], dim=1) for kind in (gains, at_end))
        expected[number] = rows, torch.tensor(counts, dtype=torch.float64), values.double(), last.double()
    return expected


# With ε = 10⁻⁸ the first step is the gradient's sign, whose slope is a difference of large numbers.
LARGE_ADAM = ADAM | {"learning_rate": 1e-2, "max_grad_norm": 0.5, "adam_epsilon": 1e-2}


class TestPropagated:
    @pytest.mark.parametrize(
        ("which", "changes"),
        [
            ("mlp", MOMENTUM | {"target_window": 0.0}),
            ("mlp", LARGE_ADAM | {"trajectory_gigabytes": 1e-6}),
            ("vit", MOMENTUM | TWICE | {"per_device_train_batch_size": 2, "max_grad_norm": 0.2}),
            ("llama", MOMENTUM | TWICE | {"per_device_train_batch_size": 2, "max_grad_norm": 0.2}),
            ("llama", LARGE_ADAM | {"trajectory_gigabytes": 1e-6}),
        ],
    )
    def test_equals_autograd_through_the_run(self, which, changes, tiny_vit, tiny_llama, tokenizer, tmp_path):
        args = settings(tmp_path, observation="propagated", max_steps=5, **({"target_window": 0.5} | changes))
        if which == "llama":
            model, rows = tiny_llama, texts(tokenizer)
            targets, collate = {"a": texts(tokenizer, 2, seed=1), "b": texts(tokenizer, 2, seed=2)}, padding(tokenizer)
        else:
            data = vectors if which == "mlp" else images
            model, rows = mlp() if which == "mlp" else tiny_vit, data(10)
            targets, collate = {"a": data(3, seed=1), "b": data(2, seed=2)}, None
        trainer = trained(model, args, rows, targets, collate)
        if hasattr(model, "config"):
            model.config._attn_implementation = "eager"
        expected, seen = unrolled(trainer, list(targets.values()), rows, collate), observations(trainer)
        scale = max(values.abs().max().item() for _, _, values, _ in expected.values())
        for position, (step, (examples, counts, values, last)) in enumerate(expected.items()):
            mine = seen.step == step
            assert seen.example[mine].tolist() == examples
            assert seen.weight[mine].tolist() == counts.tolist()
            np.testing.assert_allclose(seen.value[mine], values.numpy(), rtol=2e-3, atol=5e-4 * scale)
            variance = step_statistics(counts.numpy(), last.numpy())[2]
            np.testing.assert_allclose(seen.steps.variance[position], variance, rtol=1e-2, atol=1e-3 * scale**2)

    def test_wrong_labels_are_the_most_harmful(self, tmp_path):
        """Classes that lie far apart: whoever has a wrong label pulls away from all right ones."""
        generator = torch.Generator().manual_seed(0)
        label = torch.arange(72) % 3
        x = 2 * torch.eye(8)[label] + 0.3 * torch.randn(72, 8, generator=generator)
        wrong = torch.arange(48) % 6 == 0
        given = torch.where(wrong, (label[:48] + 1) % 3, label[:48])
        rows, targets = (
            Dataset.from_dict({"x": part.numpy(), "labels": labels.tolist()}).with_format("torch")
            for part, labels in ((x[:48], given), (x[48:], label[48:]))
        )
        args = settings(tmp_path, observation="propagated", max_steps=24, per_device_train_batch_size=8, burn_in=0.1)
        mu = np.array(trained(mlp(), args, rows, targets).influence.dataset["mu"][:])
        assert mu[wrong].max() < mu[~wrong].min()
        assert mu[wrong].max() < 0

    def test_runs_of_a_few_batches(self, tmp_path):
        """Few looks at an example, in more bins than they fill."""
        args = settings(
            tmp_path,
            observation="propagated",
            max_steps=-1,
            num_train_epochs=4,
            per_device_train_batch_size=8,
            burn_in=0.1,
        )
        report = trained(mlp(), args, vectors(48), vectors(3, seed=1)).influence
        assert np.isfinite(report.observations.shuffling.variance).all()
        assert report.observations.shuffling.steps == (6,) * 4
        assert np.isfinite(report.dataset["mu"][:]).all()

    def test_only_the_last_steps(self, tmp_path):
        values = []
        for name, changes in {"all": {}, "last": {"last_steps": 2}}.items():
            args = settings(tmp_path / name, observation="propagated", max_steps=5, target_window=0.0, **changes)
            values.append(observations(trained(mlp(), args, vectors(10), vectors(3, seed=1))))
        assert values[1].steps.step.tolist() == [3, 4]
        assert not list(tmp_path.rglob("*.safetensors"))  # the trajectory is gone
        assert_near(values[1].value, values[0].since(3).value)

    def test_an_example_without_predictions_is_no_part_of_the_variance(self, tiny_llama, tokenizer, tmp_path):
        args, targets = (
            settings(tmp_path, observation="propagated", max_steps=2, target_window=0.0),
            texts(tokenizer, 2),
        )
        seen = observations(trained(tiny_llama, args, one_silent(texts(tokenizer, 4)), targets, padding(tokenizer)))
        for step in range(2):  # with this window the gains on record are those that σ² is the variance of
            mine = seen.step == step
            assert mine.sum() == 3
            variance = step_statistics(seen.weight[mine], seen.value[mine].astype(float))[2]
            np.testing.assert_allclose(seen.steps.variance[step], variance, rtol=1e-3)


class TestSigma:
    """σ of one propagated run of shuffled epochs."""

    def run_once(self, folder, rows=160, epochs=3, **changes):
        args = settings(
            folder, observation="propagated", per_device_train_batch_size=20, num_train_epochs=epochs, max_steps=-1,
            learning_rate=0.5, **changes,
        )  # fmt: skip
        return trained(mlp(), args, vectors(rows), {"a": vectors(6, seed=1), "b": vectors(5, seed=2)})

    def test_the_panel_has_the_gains_that_its_examples_would_have_in_the_batch(self, tmp_path, monkeypatch):
        looks = {}

        class Seen(Panel):
            def look(self, step, weight, gains):
                looks[step] = gains.clone()
                super().look(step, weight, gains)

        monkeypatch.setattr("hf_unlearn.influence.trainer.Panel", Seen)
        trainer = self.run_once(tmp_path, target_window=0.0)  # the gains on record are then those that σ² is of
        seen = observations(trainer)
        assert len(looks) == shuffling.FEWER + 8 + 8
        for step, gains in looks.items():  # of all 160 examples, 20 of which were in the batch
            mine = seen.step == step
            np.testing.assert_allclose(gains[seen.example[mine]], seen.value[mine], rtol=1e-3, atol=1e-6)
        last = np.array(seen.shuffling.variance)[-1]
        parts = np.stack([looks[step] for step in range(16, 24)])
        parts = parts - parts.mean(1, keepdims=True)
        exact = ((parts**2).sum((0, 1)) / 20 - (parts.sum(0) ** 2).sum(0) / 160) / 159
        np.testing.assert_allclose(last, exact, rtol=1e-3)

    def test_one_epoch_is_enough(self, tmp_path):
        influence = self.run_once(tmp_path, epochs=1).influence
        assert influence.observations.shuffling.steps == (8,)
        independent = np.sqrt(influence.observations.independent_variance.sum(0))
        assert (np.array(list(influence.sigma.values())) < 0.9 * independent).all()

    def test_an_order_that_never_changes_is_said(self, tmp_path, caplog):
        with caplog.at_level("WARNING", "hf_unlearn"):
            self.run_once(tmp_path, train_sampling_strategy="sequential")
        assert "all epochs had the same order" in caplog.text

    @pytest.mark.slow
    def test_is_the_spread_over_orders(self, tmp_path):
        """Against runs of plain gradient descent in other orders."""
        sigmas, independent = [], []
        for seed in range(5):
            report = self.run_once(tmp_path / str(seed), 320, 8, burn_in=0.1, seed=seed).influence
            sigmas.append(list(report.sigma.values()))
            independent.append(dataclasses.replace(report.observations, shuffling=None).since(report.burn_in).sigma)
        rows, targets, found = vectors(320)[:], (vectors(6, seed=1)[:], vectors(5, seed=2)[:]), []
        generator = torch.Generator().manual_seed(0)
        for _ in range(150):
            model = mlp()
            theta = list(model.parameters())
            for batch in (part for _ in range(8) for part in torch.randperm(320, generator=generator).split(20)):
                gradients = torch.autograd.grad(model(rows["x"][batch], rows["labels"][batch])["loss"], theta)
                with torch.no_grad():
                    torch._foreach_sub_(theta, gradients, alpha=0.5)
            with torch.no_grad():
                found.append([model(data["x"], data["labels"])["loss"].item() for data in targets])
        true = np.std(found, axis=0, ddof=1)
        assert (np.abs(np.log(np.mean(sigmas, axis=0) / true)) < np.log(1.3)).all()
        assert (np.mean(independent, axis=0) > 2 * true).all()


class TestWhatIsNotSeen:
    @pytest.mark.parametrize(
        ("model", "changes", "words", "others"),
        [
            ("tiny_vit", {}, ["vit.embeddings.cls_token", "vit.embeddings.position_embeddings"], ["BatchNorm"]),
            ("tiny_vit", {"layers": ["classifier"]}, ["excluded by layers=", " and 33 more."], []),
            ("tiny_resnet", {}, ["BatchNorm layers in train mode"], ["not seen"]),
            ("group norm", {}, None, []),
            ("tiny_vit", {"observation": "propagated"}, None, []),
        ],
    )
    def test_one_warning_names_it(self, model, changes, words, others, request, tiny_resnet, tmp_path, caplog):
        model = without_batch_norm(tiny_resnet) if model == "group norm" else request.getfixturevalue(model)
        args = settings(tmp_path, max_steps=1, **changes)
        with caplog.at_level("WARNING", "hf_unlearn"):
            trainer = trained(model, args, images(10), images(3, seed=1))
        warnings = [record.getMessage() for record in caplog.records if record.name.startswith("hf_unlearn")]
        assert len(warnings) == (words is not None)
        assert all(word in warnings[0] for word in words or [])
        assert not any(word in warnings[0] for word in others)
        unseen = trainer.influence.manifest.get("unseen")
        assert (unseen is not None) == (bool(words) and "not seen" not in others)
        if "cls_token" in str(words):
            size = sum(p.numel() for n, p in model.named_parameters() if "token" in n or "position" in n)
            share = size / sum(p.numel() for p in model.parameters())
            assert unseen["share"] == pytest.approx(share)
            assert set(unseen["parameters"]) == {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}
            for text in (warnings[0], trainer.influence.summary().caption):
                assert f"{100 * share:.1f} % of the trainable parameters" in text


class TestCalibration:
    def test_scale_is_the_spread_of_whole_trainings(self, tmp_path):
        rows, targets = vectors(24), {"a": vectors(5, seed=1), "b": vectors(4, seed=2)}
        args = settings(
            tmp_path, observation="propagated", n_calibration_runs=3, max_steps=6, burn_in=0.4, seed=7, **ADAM
        )
        trainer = trained(None, args, rows, targets, model_init=lambda: MLP())
        losses, batch = [], Brute(trainer).batch
        for seed in (8, 9, 10):
            plain = stock(args, TrainingArguments)
            plain.seed = seed
            other = Trainer(model_init=lambda: MLP(), args=plain, train_dataset=rows)
            other.train()
            theta = parameters(other.model)
            each = [[example_loss(other.model, theta, batch(data, i))[0].item() for i in range(len(data))] for data in targets.values()]  # fmt: skip
            losses.append([np.mean(values) for values in each])
        measured = np.var(losses, axis=0, ddof=1)
        own = observations(trainer).since(round(0.4 * 6)).sigma
        report = trainer.influence
        assert report.scale == pytest.approx(np.sqrt((measured / own**2).mean()), rel=1e-4)
        assert report.sigma["a"] == pytest.approx(report.scale * own[0])

    def test_some_runs_leave_examples_out(self, tmp_path):
        """Those of a group, and are as long and from the same seed as a plain training on the others."""
        rows, targets = vectors(24), {"a": vectors(5, seed=1), "b": vectors(4, seed=2)}
        args = settings(tmp_path, observation="in_run", n_calibration_runs=4, max_steps=6, learning_rate=0.5, seed=7)
        trainer = trained(None, args, rows, targets, model_init=lambda: MLP())
        manifest = trainer.influence.manifest
        assert ("gain" in manifest) != ("order_only" in manifest)
        assert trainer.influence.order_only == ("order_only" in manifest)
        found = trainer._losses_without(np.array([0, 3]), 1)
        plain = stock(args, TrainingArguments)
        plain.seed = 9
        kept = [row for row in range(24) if row not in (0, 3)]
        other = Trainer(model_init=lambda: MLP(), args=plain, train_dataset=rows.select(kept))
        other.train()
        theta, batch = parameters(other.model), Brute(trainer).batch
        expected = [
            np.mean([example_loss(other.model, theta, batch(data, i))[0].item() for i in range(len(data))])
            for data in targets.values()
        ]
        np.testing.assert_allclose(found, expected, rtol=1e-5)

    def test_the_run_itself_stays_as_it_is(self, tmp_path):
        ends = []
        for runs in (0, 2):
            args = settings(tmp_path / str(runs), n_calibration_runs=runs)
            set_seed(args.seed)
            start = state(MLP())
            trainer = trained(None, args, vectors(10), vectors(3, seed=1), model_init=lambda: MLP())
            ends.append((state(trainer.model), observations(trainer).value))
            assert (trainer.influence.scale == 1.0) == (runs == 0)
        assert alike(ends[1][0], ends[0][0], start)
        assert_near(ends[1][1], ends[0][1])

    def test_raw_rows(self, tiny_vit, digits, tmp_path):
        """The further trainings get the columns that the first one got."""
        from transformers import ViTImageProcessor

        mean, size = [0.5], {"height": 16, "width": 16}
        processor = ViTImageProcessor(size=size, image_mean=mean, image_std=mean, do_convert_rgb=False)
        args, targets = settings(tmp_path, n_calibration_runs=2, max_steps=2), digits["validation"].select(range(3))
        trainer = trained(
            None, args, digits["train"].select(range(12)), targets, model_init=lambda: copy.deepcopy(tiny_vit),
            processing_class=processor,
        )  # fmt: skip
        assert trainer.influence.scale > 0


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


class Dies(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise ConnectionError("as if it were killed")


class TestReport:
    def test_of_a_run_whose_trainer_is_gone(self, tmp_path):
        """The steps that were closed before it died, as an unbroken run has them."""
        args = settings(tmp_path / "whole", max_steps=6, burn_in=0.25)
        whole = trained(mlp(), args, vectors(10), vectors(3, seed=1)).influence
        args = settings(tmp_path / "dead", max_steps=6, burn_in=0.25)
        trainer = InfluenceTrainer(
            mlp(), args, train_dataset=vectors(10), target_dataset=vectors(3, seed=1), callbacks=[Dies()]
        )
        with pytest.raises(ConnectionError):
            trainer.train()
        del trainer
        report = InfluenceReport.from_run(tmp_path / "dead", confidence=0.8)
        assert report.observations.steps.step.tolist() == [0, 1, 2]
        assert (report.burn_in, report.confidence) == (1, 0.8)
        early = whole.observations.step < 3
        np.testing.assert_allclose(report.observations.value, whole.observations.value[early], rtol=1e-5, atol=1e-9)
        expected = InfluenceReport.from_observations(report.observations, report.manifest, burn_in=1, confidence=0.8)
        np.testing.assert_array_equal(report.dataset["mu"][:], expected.dataset["mu"][:])  # some are NaN
        np.testing.assert_array_equal(report.dataset["mu_low"][:], expected.dataset["mu_low"][:])

    @pytest.mark.parametrize("made", [False, True])
    def test_of_a_folder_without_a_run(self, made, tmp_path):
        if made:
            (tmp_path / "x" / "_private").mkdir(parents=True)
        with pytest.raises(
            ValueError,
            match=r"^output_dir='[^\n]*x': holds no records of an influence run [^\n]*give the output_dir of one$",
        ):
            InfluenceReport.from_run(tmp_path / "x")

    @pytest.mark.parametrize("observation", ["in_run", "propagated"])
    def test_a_run_that_was_stopped_early(self, observation, tmp_path):
        """A share of the steps that were taken is burnt in, and never all of them."""
        for number, (burn_in, first) in enumerate(((0.5, 2), (0.99, 3))):
            args = settings(tmp_path / str(number), max_steps=40, burn_in=burn_in, observation=observation)
            report = trained(mlp(), args, vectors(10), vectors(3, seed=1), callbacks=[StopAt(4)]).influence
            assert report.observations.steps.step.tolist() == [0, 1, 2, 3]
            assert report.burn_in == first
            assert np.isfinite(report.dataset["mu"][:]).any()

    def test_a_run_that_was_stopped_before_anything_was_kept(self, tmp_path):
        args = settings(tmp_path, max_steps=40, last_steps=5, observation="propagated")
        trainer = InfluenceTrainer(
            mlp(), args, train_dataset=vectors(8), target_dataset=vectors(3), callbacks=[StopAt(2)]
        )
        with pytest.raises(ValueError, match=r"^last_steps=5: the run stopped at step 2, [^\n]*leave last_steps out"):
            trainer.train()
        with pytest.raises(ValueError, match=r"^observations: hold no step; train again[^\n]*$"):
            trainer.influence  # noqa: B018 (a property)

    def test_ids_from_another_column_none_and_a_list_of_rows(self, tmp_path):
        rows, targets = vectors(8), vectors(2, seed=1)
        plain = rows.remove_columns("id")
        named = rows.add_column("name", [f"row {i}" for i in range(8)])
        for data, target, column in (
            (named, targets, "name"),
            (plain, targets, "id"),
            ([*plain], [*targets.remove_columns("id")], "id"),
        ):
            args = settings(tmp_path, id_column=column, max_steps=1)
            found = trained(mlp(), args, data, target).influence.dataset["sample_id"][:]
            assert found == (named["name"][:] if column == "name" else [*range(8)])

    def test_a_second_run_starts_new_records(self, tmp_path):
        trainer = trained(mlp(), settings(tmp_path), vectors(8), vectors(2, seed=1))
        first = trainer.influence.manifest["run_id"]
        trainer.steps = []
        trainer.train()
        assert trainer.influence.manifest["run_id"] != first
        assert len(trainer.influence.observations.steps.step) == 3
        assert not trainer._ghost._handles
