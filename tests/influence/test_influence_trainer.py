"""`InfluenceTrainer`: it trains as `Trainer` does, and what it records is what loops over single examples compute."""

import copy
import dataclasses
import random

import numpy as np
import pytest
import torch
from brute_force import (
    MLP,
    QUIET,
    Brute,
    agrees,
    example_loss,
    images,
    mlp,
    observations,
    parameters,
    same,
    settings,
    state,
    stock,
    vectors,
    watched,
)
from datasets import Dataset, concatenate_datasets
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

from hf_unlearn.influence.report.observations import step_statistics
from hf_unlearn.influence.report.report import InfluenceReport
from hf_unlearn.influence.trainer import InfluenceTrainer


def dropout_vit():
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16,
        patch_size=8,
        num_channels=1,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=10,
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.1,
        initializer_range=0.2,
    )
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
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1, "lr_scheduler_type": "linear"}
RUNS = {
    "dropout, clipping, AdamW": ("vit", ADAM | {"max_grad_norm": 0.5}),
    "dropout, accumulation, SGD": ("vit", MOMENTUM | {"gradient_accumulation_steps": 2}),
    "activation checkpointing": ("vit", ADAM | {"activation_checkpointing": True}),
    "BatchNorm, accumulation, AdamW": ("resnet", ADAM | {"gradient_accumulation_steps": 2, "max_grad_norm": 1.0}),
    "BatchNorm, SGD": ("resnet", MOMENTUM),
    "long rows together": ("vit", MOMENTUM | {"train_sampling_strategy": "sequential"}),
}


class TestTrainingIsUnchanged:
    @pytest.mark.parametrize("observation", ["in_run", "propagated", "self"])
    @pytest.mark.parametrize("name", RUNS)
    def test_the_end_is_that_of_trainer(self, name, observation, tiny_resnet, tmp_path):
        """Weights, statistics, modes and every random state."""
        which, changes = RUNS[name]
        model = dropout_vit() if which == "vit" else tiny_resnet
        target = {"target": "self"} if observation == "self" else {"target_dataset": images(5, seed=2)}
        seen = "in_run" if observation == "self" else observation
        args = settings(
            tmp_path, observation=seen, target_every=2, target_batch_size=3, max_steps=5, **changes
        )  # fmt: skip
        plain = Trainer(copy.deepcopy(model), stock(args, TrainingArguments), train_dataset=images(13))
        plain.train()
        expected, expected_random = plain.model, random_state()

        trainer = InfluenceTrainer(copy.deepcopy(model), args, train_dataset=images(13), **target)
        trainer.train()
        assert not same(state(model), state(expected))
        assert same(state(trainer.model), state(expected))
        modes = [[module.training for module in m.modules()] for m in (trainer.model, expected)]
        assert modes[0] == modes[1]
        for actual, wanted in zip(random_state(), expected_random, strict=True):
            assert torch.equal(actual, wanted) if isinstance(actual, torch.Tensor) else actual == wanted
        assert len(observations(trainer).steps.step) == 5
        assert all(p.grad is None for p in trainer.model.parameters()) == all(
            p.grad is None for p in expected.parameters()
        )

    def test_evaluations_on_the_way_are_those_of_trainer(self, tmp_path):
        args = settings(tmp_path, eval_strategy="steps", eval_steps=2, max_steps=4)
        data = {"train_dataset": images(13), "eval_dataset": images(6, seed=1)}
        histories = []
        for make in (
            lambda: Trainer(dropout_vit(), stock(args, TrainingArguments), **data),
            lambda: InfluenceTrainer(dropout_vit(), args, **data, target_dataset=images(5, seed=2)),
        ):
            trainer = make()
            trainer.train()
            histories.append([log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log])
        assert histories[0] == histories[1]
        assert len(histories[0]) == 2

    @pytest.mark.parametrize("observation", ["in_run", "propagated"])
    def test_a_collator_that_draws_numbers_draws_the_same(self, observation, tmp_path):
        def noisy(rows):
            x = torch.stack([row["x"] for row in rows])
            return {"x": x + 0.1 * torch.randn(x.shape), "labels": torch.stack([row["labels"] for row in rows])}

        args, ends = settings(tmp_path, observation=observation, max_steps=5), []
        for trainer_class, config, extra in (
            (Trainer, TrainingArguments, {}),
            (InfluenceTrainer, None, {"target_dataset": vectors(3, seed=1)}),
        ):
            given = stock(args, config) if config else args
            trainer = trainer_class(mlp(dropout=0.2), given, noisy, vectors(13), **extra)
            trainer.train()
            ends.append(state(trainer.model))
        assert same(*ends)

    def test_rows_of_similar_length_stay_together(self, tiny_llama, tokenizer, tmp_path):
        rows = Dataset.from_list([{"input_ids": [5] * n, "labels": [5] * n, "length": n} for n in range(3, 16)])
        args = settings(tmp_path, train_sampling_strategy="group_by_length", max_steps=3)
        models = []
        for make in (
            lambda: Trainer(copy.deepcopy(tiny_llama), stock(args, TrainingArguments), padding(tokenizer), rows),
            lambda: InfluenceTrainer(copy.deepcopy(tiny_llama), args, padding(tokenizer), rows, target_dataset=rows),
        ):
            trainer = make()
            trainer.train()
            models.append(state(trainer.model))
        assert same(*models)


def padding(tokenizer, to=1):
    def collate(rows):
        longest = -(-max(len(row["input_ids"]) for row in rows) // to) * to
        batch = {"input_ids": [], "attention_mask": [], "labels": []}
        for row in rows:
            ids, labels = list(row["input_ids"]), list(row["labels"])
            empty = longest - len(ids)
            batch["input_ids"].append(ids + [tokenizer.pad_token_id] * empty)
            batch["attention_mask"].append([1] * len(ids) + [0] * empty)
            batch["labels"].append(labels + [-100] * empty)
        return {name: torch.tensor(values) for name, values in batch.items()}

    return collate


def texts(tokenizer, n=9, *, seed=0, prompt=2):
    """Rows of different lengths; of each the first `prompt` tokens do not count."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(n):
        ids = torch.randint(3, len(tokenizer), (4 + 3 * row % 11,), generator=generator).tolist()
        rows.append({"id": f"text {row}", "input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Dataset.from_list(rows)


class TestInRun:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
            {"max_grad_norm": 0.3, "lr_scheduler_type": "linear"},
            {"target_every": 3, "max_steps": 5, "activation_checkpointing": True},
            ADAM | {"max_grad_norm": 0.3, "learning_rate": 1e-2},
        ],
        ids=["plain", "accumulated", "clipped", "reused and checkpointed", "AdamW"],
    )
    @pytest.mark.parametrize("which", ["vit", "resnet", "mlp"])
    def test_equals_a_loop_over_examples(self, which, changes, tiny_vit, tiny_resnet, tmp_path):
        if which != "vit":  # the others have no activation checkpointing
            changes = {name: value for name, value in changes.items() if name != "activation_checkpointing"}
        rows, targets = (vectors(10), vectors(4, seed=1)) if which == "mlp" else (images(10), images(4, seed=1))
        model = {"vit": tiny_vit, "resnet": without_batch_norm(tiny_resnet), "mlp": mlp()}[which]
        trainer = watched()(model, settings(tmp_path, **changes), train_dataset=rows, target_dataset=targets)
        trainer.train()
        expected = Brute(trainer).observed([targets], every=changes.get("target_every", 1))
        assert agrees(observations(trainer), expected)

    def test_several_targets(self, tiny_vit, tmp_path):
        """A dict of sets, and a set with a column that tells them apart, are the same."""
        sets = {"one": images(3, seed=1), "another": images(2, seed=2)}
        args = settings(tmp_path / "sets")
        trainer = watched()(copy.deepcopy(tiny_vit), args, train_dataset=images(10), target_dataset=sets)
        trainer.train()
        assert agrees(observations(trainer), Brute(trainer).observed(list(sets.values())))
        assert observations(trainer).targets == ("one", "another")

        parts = [part.add_column("target", [name] * len(part)) for name, part in sets.items()]
        together = concatenate_datasets(parts)
        second = InfluenceTrainer(
            copy.deepcopy(tiny_vit), settings(tmp_path / "column"), train_dataset=images(10), target_dataset=together
        )
        second.train()
        assert observations(second).targets == ("one", "another")
        assert np.array_equal(observations(second).value, observations(trainer).value)

    @pytest.mark.parametrize("accumulation", [1, 2])
    @pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gpt2"])
    def test_language_models(self, fixture, accumulation, request, tokenizer, tmp_path):
        """Weights are the tokens that count; padding does not."""
        model = request.getfixturevalue(fixture)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        rows, targets = texts(tokenizer), texts(tokenizer, 4, seed=1)
        args = settings(
            tmp_path,
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=4 // accumulation,
            max_grad_norm=1.0,
        )
        trainer = watched()(model, args, padding(tokenizer, to=16), rows, target_dataset=targets)
        trainer.train()
        brute = Brute(trainer, collate=padding(tokenizer))
        assert agrees(observations(trainer), brute.observed([targets]))

    def test_preconditioned(self, tmp_path):
        """The target's gradient over √v̂ + ε; before the first step there is no v."""
        rows, targets = vectors(10), vectors(4, seed=1)
        moments = []

        class Look(TrainerCallback):
            def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
                found = getattr(optimizer, "optimizer", optimizer).state
                moments.append([(found[p]["exp_avg_sq"].clone(), float(found[p]["step"])) for p in found])

        args = settings(tmp_path, **ADAM, preconditioned=True, max_steps=4)
        trainer = watched()(mlp(), args, train_dataset=rows, target_dataset=targets, callbacks=[Look()])
        trainer.train()

        def fold(number, looks):
            if number == 0:
                return looks
            by_parameter = dict(zip(order, moments[number], strict=True))
            root = [(by_parameter[n][0] / (1 - 0.999 ** by_parameter[n][1])).sqrt() + 1e-8 for n in brute.names]
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
                tmp_path / str(size),
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
                max_steps=-1,
                num_train_epochs=1,
                learning_rate=1e-12,
                adam_epsilon=1.0,
            )
            trainer = InfluenceTrainer(
                copy.deepcopy(tiny_llama), args, padding(tokenizer), rows, target_dataset=targets
            )
            trainer.train()
            seen = observations(trainer)
            assert sorted(seen.example) == list(range(12))
            values.append(seen.value[np.argsort(seen.example)])
        for other in values[1:]:
            np.testing.assert_allclose(other, values[0], rtol=1e-4, atol=1e-4 * np.abs(values[0]).max())

    def test_groups_of_parameters_with_their_own_learning_rates(self, tmp_path):
        rows, targets, model = vectors(10), vectors(4, seed=1), mlp()
        groups = [{"params": list(model.first.parameters()), "lr": 0.3}, {"params": list(model.second.parameters())}]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        trainer = watched()(
            model,
            settings(tmp_path, target_every=2),
            train_dataset=rows,
            target_dataset=targets,
            optimizers=(optimizer, schedule),
        )
        trainer.train()
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
            trainer = watched()(mlp(), settings(tmp_path), train_dataset=vectors(10), target="self")
        else:
            model = tiny_llama
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
            trainer = watched()(model, settings(tmp_path), padding(tokenizer), texts(tokenizer), target="self")
        trainer.train()
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
                tmp_path / str(size),
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
                train_sampling_strategy="sequential",
                max_steps=1,
            )
            trainer = InfluenceTrainer(copy.deepcopy(tiny_llama), args, padding(tokenizer), rows, target="self")
            trainer.train()
            seen.append(observations(trainer))
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
        rows = texts(tokenizer, 4)
        silent = rows.map(lambda row, i: {"labels": [-100] * len(row["labels"])} if i == 1 else row, with_indices=True)
        seen = []
        for number, data in enumerate((silent, rows.select([0, 2, 3]))):
            args = settings(tmp_path / str(number), max_steps=1, train_sampling_strategy="sequential")
            trainer = InfluenceTrainer(copy.deepcopy(tiny_llama), args, padding(tokenizer), data, target="self")
            trainer.train()
            seen.append(observations(trainer))
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
        losses = [
            sum(example_loss(model, theta, brute.batch(data, row))[0] for row in range(len(data))) / len(data)
            for data in targets
        ]
        model.train()
        return torch.stack(losses)

    for number, step in enumerate(trainer.steps):
        if number > len(trainer.steps) - window:
            looks.append(target_loss())
        rows = sum(step["rows"], [])
        losses, counts = zip(
            *(example_loss(model, theta, brute.batch(brute.dataset, row)) for row in rows), strict=True
        )
        share = torch.tensor(counts) / sum(counts)
        q = share.clone().requires_grad_()
        coefficients.append((rows, counts, q))
        g = dict(
            zip(
                names,
                torch.autograd.grad((q * torch.stack(losses)).sum(), list(theta.values()), create_graph=True),
                strict=True,
            )
        )
        if args.max_grad_norm:
            norm = torch.cat([part.flatten() for part in g.values()]).norm()
            scale = (args.max_grad_norm / (norm + 1e-6)).clamp(max=1)
            g = {name: part * scale for name, part in g.items()}
        for name in names:
            if args.optim == "sgd":
                m[name] = g[name] if number == 0 else 0.9 * m[name] + g[name]
                theta[name] = theta[name] - step["lr"] * m[name]
            else:
                m[name] = 0.9 * m[name] + 0.1 * g[name]
                v[name] = 0.999 * v[name] + 0.001 * g[name] ** 2
                update = (m[name] / (1 - 0.9 ** (number + 1))) / (
                    (v[name] / (1 - 0.999 ** (number + 1)) + 1e-30).sqrt() + args.adam_epsilon
                )
                theta[name] = (1 - step["lr"] * (args.weight_decay if name in decayed else 0)) * theta[name] - step[
                    "lr"
                ] * update
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


class TestPropagated:
    @pytest.mark.parametrize(
        "changes",
        [
            MOMENTUM | {"target_window": 0.0},
            MOMENTUM | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_grad_norm": 0.2},
            # with ε = 10⁻⁸ the first step is the gradient's sign, whose slope is a difference of large numbers
            ADAM | {"learning_rate": 1e-2, "max_grad_norm": 0.5, "trajectory_gigabytes": 1e-6, "adam_epsilon": 1e-2},
        ],
        ids=["momentum", "accumulated, clipped", "AdamW, recomputed"],
    )
    @pytest.mark.parametrize("which", ["mlp", "vit", "llama"])
    def test_equals_autograd_through_the_run(self, which, changes, tiny_vit, tiny_llama, tokenizer, tmp_path):
        args = settings(tmp_path, observation="propagated", max_steps=5, **({"target_window": 0.5} | changes))
        if which == "llama":
            model, rows = tiny_llama, texts(tokenizer)
            targets, collate = {"a": texts(tokenizer, 2, seed=1), "b": texts(tokenizer, 2, seed=2)}, padding(tokenizer)
        else:
            data = vectors if which == "mlp" else images
            model, rows = mlp() if which == "mlp" else tiny_vit, data(10)
            targets, collate = {"a": data(3, seed=1), "b": data(2, seed=2)}, None
        trainer = watched()(model, args, collate, rows, target_dataset=targets)
        trainer.train()
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

    def test_only_the_last_steps(self, tmp_path):
        values = []
        for name, changes in {"all": {}, "last": {"last_steps": 2}}.items():
            args = settings(tmp_path / name, observation="propagated", max_steps=5, target_window=0.0, **changes)
            trainer = InfluenceTrainer(mlp(), args, train_dataset=vectors(10), target_dataset=vectors(3, seed=1))
            trainer.train()
            values.append(observations(trainer))
        assert values[1].steps.step.tolist() == [3, 4]
        np.testing.assert_array_equal(values[1].value, values[0].since(3).value)

    def test_an_example_without_predictions_is_no_part_of_the_variance(self, tiny_llama, tokenizer, tmp_path):
        rows = texts(tokenizer, 4)
        silent = rows.map(lambda row, i: {"labels": [-100] * len(row["labels"])} if i == 1 else row, with_indices=True)
        args = settings(tmp_path, observation="propagated", max_steps=2, target_window=0.0)
        trainer = InfluenceTrainer(
            tiny_llama, args, padding(tokenizer), silent, target_dataset=texts(tokenizer, 2, seed=1)
        )
        trainer.train()
        seen = observations(trainer)
        for step in range(2):  # with this window the gains on record are those that σ² is the variance of
            mine = seen.step == step
            assert mine.sum() == 3
            variance = step_statistics(seen.weight[mine], seen.value[mine].astype(float))[2]
            np.testing.assert_allclose(seen.steps.variance[step], variance, rtol=1e-3)

    def test_leaves_no_trajectory_behind(self, tmp_path):
        args = settings(tmp_path, observation="propagated")
        trainer = InfluenceTrainer(mlp(), args, train_dataset=vectors(10), target_dataset=vectors(3, seed=1))
        trainer.train()
        assert not list(tmp_path.rglob("*.safetensors"))


class TestSigma:
    """σ of one propagated run, against runs of plain gradient descent in other orders."""

    ROWS, BATCH, EPOCHS, RATE = 320, 20, 8, 0.5

    def run_once(self, folder, **changes):
        args = settings(
            folder,
            observation="propagated",
            per_device_train_batch_size=self.BATCH,
            num_train_epochs=self.EPOCHS,
            max_steps=-1,
            learning_rate=self.RATE,
            burn_in=0.1,
            **changes,
        )
        targets = {"a": vectors(6, seed=1), "b": vectors(5, seed=2)}
        trainer = InfluenceTrainer(mlp(), args, train_dataset=vectors(self.ROWS), target_dataset=targets)
        trainer.train()
        return trainer

    def losses_in_other_orders(self, targets, runs=150):
        rows, found = vectors(self.ROWS), []
        x, labels = rows["x"][:], rows["labels"][:]
        generator = torch.Generator().manual_seed(0)
        for _ in range(runs):
            model = mlp()
            theta = list(model.parameters())
            for _ in range(self.EPOCHS):
                for batch in torch.randperm(self.ROWS, generator=generator).split(self.BATCH):
                    gradients = torch.autograd.grad(model(x[batch], labels[batch])["loss"], theta)
                    with torch.no_grad():
                        torch._foreach_sub_(theta, gradients, alpha=self.RATE)
            with torch.no_grad():
                found.append([model(data["x"][:], data["labels"][:])["loss"].item() for data in targets.values()])
        return np.std(found, axis=0, ddof=1)

    def test_is_the_spread_over_orders(self, tmp_path):
        sigmas, independent = [], []
        for seed in range(5):
            trainer = self.run_once(tmp_path / str(seed), seed=seed)
            sigmas.append(list(trainer.influence.sigma.values()))
            report = trainer.influence
            plain = dataclasses.replace(report.observations, shuffling=None).since(report.burn_in)
            independent.append(plain.sigma)
        assert trainer.influence.manifest["shuffling"]["steps_per_epoch"] == self.ROWS // self.BATCH
        true = self.losses_in_other_orders(trainer.target_sets)
        assert (np.abs(np.log(np.mean(sigmas, axis=0) / true)) < np.log(1.5)).all()
        assert (np.mean(independent, axis=0) > 2 * true).all()

    @pytest.mark.parametrize("changes", [{"num_train_epochs": 1}, {"train_sampling_strategy": "sequential"}])
    def test_says_nothing_of_orders_it_cannot_know(self, changes, tmp_path, monkeypatch):
        monkeypatch.setattr(self, "EPOCHS", changes.get("num_train_epochs", self.EPOCHS), raising=False)
        trainer = self.run_once(tmp_path, **{k: v for k, v in changes.items() if k != "num_train_epochs"})
        assert trainer.influence.manifest["shuffling"] is None
        assert trainer.influence.observations.shuffling is None


class TestWhatIsNotSeen:
    def run(self, model, folder, caplog, rows=None, **changes):
        trainer = InfluenceTrainer(
            model, settings(folder, **changes), train_dataset=rows or images(10), target_dataset=images(3, seed=1)
        )
        with caplog.at_level("WARNING", "hf_unlearn"):
            trainer.train()
        return [record.getMessage() for record in caplog.records if record.name.startswith("hf_unlearn")]

    def test_parameters_outside_of_layers(self, tiny_vit, tmp_path, caplog):
        (warning,) = self.run(tiny_vit, tmp_path, caplog)
        assert "vit.embeddings.cls_token" in warning
        assert "vit.embeddings.position_embeddings" in warning
        assert "BatchNorm" not in warning
        unseen = sum(p.numel() for n, p in tiny_vit.named_parameters() if "token" in n or "position" in n)
        assert f"{100 * unseen / sum(p.numel() for p in tiny_vit.parameters()):.1f} %" in warning

    def test_layers_that_were_left_out(self, tiny_vit, tmp_path, caplog):
        (warning,) = self.run(tiny_vit, tmp_path, caplog, layers=["classifier"])
        assert "excluded by layers=" in warning
        assert " and 37 more" in warning or " more." in warning

    def test_batch_norm(self, tiny_resnet, tmp_path, caplog):
        (warning,) = self.run(tiny_resnet, tmp_path, caplog)
        assert "BatchNorm layers in train mode" in warning
        assert "not seen" not in warning

    def test_nothing_to_say(self, tiny_resnet, tmp_path, caplog):
        assert self.run(without_batch_norm(tiny_resnet), tmp_path, caplog) == []

    def test_propagated_sees_everything(self, tiny_vit, tmp_path, caplog):
        assert self.run(tiny_vit, tmp_path, caplog, observation="propagated") == []


class TestCalibration:
    def test_scale_is_the_spread_of_whole_trainings(self, tmp_path):
        rows, targets = vectors(24), {"a": vectors(5, seed=1), "b": vectors(4, seed=2)}
        args = settings(
            tmp_path, observation="propagated", n_calibration_runs=3, max_steps=6, burn_in=0.4, seed=7, **ADAM
        )
        trainer = InfluenceTrainer(model_init=lambda: MLP(), args=args, train_dataset=rows, target_dataset=targets)
        trainer.train()
        losses = []
        for seed in (8, 9, 10):
            plain = stock(args, TrainingArguments)
            plain.seed = seed
            other = Trainer(model_init=lambda: MLP(), args=plain, train_dataset=rows)
            other.train()
            theta = parameters(other.model)
            losses.append([
                np.mean([example_loss(other.model, theta, Brute(trainer).batch(data, row))[0].item() for row in range(len(data))])
                for data in targets.values()
            ])  # fmt: skip
        measured = np.var(losses, axis=0, ddof=1)
        own = observations(trainer).since(round(0.4 * 6)).sigma
        report = trainer.influence
        assert report.scale == pytest.approx(np.sqrt(measured.sum() / (own**2).sum()), rel=1e-4)
        assert report.sigma["a"] == pytest.approx(report.scale * own[0])

    def test_the_run_itself_stays_as_it_is(self, tmp_path):
        ends = []
        for runs in (0, 2):
            args = settings(tmp_path / str(runs), n_calibration_runs=runs)
            trainer = InfluenceTrainer(
                model_init=lambda: MLP(), args=args, train_dataset=vectors(10), target_dataset=vectors(3, seed=1)
            )
            trainer.train()
            ends.append((state(trainer.model), observations(trainer).value))
            assert (trainer.influence.scale == 1.0) == (runs == 0)
        assert same(ends[0][0], ends[1][0])
        assert np.array_equal(ends[0][1], ends[1][1])

    def test_raw_rows(self, tiny_vit, digits, tmp_path):
        """The further trainings get the columns that the first one got."""
        from transformers import ViTImageProcessor

        processor = ViTImageProcessor(
            size={"height": 16, "width": 16}, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False
        )
        args = settings(tmp_path, n_calibration_runs=2, max_steps=2)
        trainer = InfluenceTrainer(
            model_init=lambda: copy.deepcopy(tiny_vit),
            args=args,
            train_dataset=digits["train"].select(range(12)),
            target_dataset=digits["validation"].select(range(3)),
            processing_class=processor,
        )
        trainer.train()
        assert trainer.influence.scale > 0


class TestReport:
    @pytest.mark.parametrize("observation", ["in_run", "propagated"])
    def test_finds_the_example_that_is_the_target(self, observation, tiny_vit, tmp_path):
        rows = images(24, labels=[0, 1, 2, 3])
        target = rows.select([5])
        args = settings(tmp_path, observation=observation, max_steps=24, learning_rate=0.02)
        trainer = InfluenceTrainer(tiny_vit, args, train_dataset=rows, target_dataset=target)
        trainer.train()
        report = trainer.influence
        assert isinstance(report, InfluenceReport)
        top = report.top(3)
        assert top["sample_id"][0] == rows["id"][5]
        assert top["mu"][0] > 0
        assert len(top) == 3

    def test_ids_from_another_column_and_none(self, tiny_vit, tmp_path):
        rows = images(8)
        named = rows.add_column("name", [f"image {i}" for i in range(8)])
        for number, (data, column, expected) in enumerate(
            ((named, "name", named["name"][:]), (rows.remove_columns("id"), "id", list(range(8))))
        ):
            args = settings(tmp_path / str(number), id_column=column)
            trainer = InfluenceTrainer(
                copy.deepcopy(tiny_vit), args, train_dataset=data, target_dataset=images(2, seed=1)
            )
            trainer.train()
            assert trainer.influence.dataset["sample_id"][:] == list(expected)

    def test_a_list_of_rows_will_do(self, tmp_path):
        rows, target = list(vectors(8)), list(vectors(2, seed=1))
        for row in rows + target:
            row.pop("id")
        trainer = InfluenceTrainer(mlp(), settings(tmp_path), train_dataset=rows, target_dataset=target)
        trainer.train()
        assert trainer.influence.dataset["sample_id"][:] == list(range(8))

    def test_a_second_run_starts_new_records(self, tmp_path):
        args = settings(tmp_path)
        trainer = InfluenceTrainer(mlp(), args, train_dataset=vectors(8), target_dataset=vectors(2, seed=1))
        trainer.train()
        first = trainer.influence.manifest["run_id"]
        trainer.train()
        assert trainer.influence.manifest["run_id"] != first
        assert len(trainer.influence.observations.steps.step) == 3
        assert not trainer._ghost._handles
        assert QUIET["save_strategy"] == "no"
