import copy
import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, concatenate_datasets
from image_data import arguments, close, distance, images, same, weights
from safetensors.torch import load_file
from torch.utils.data import Subset
from transformers import TrainerCallback

from hf_unlearn import UnlearnTrainer
from hf_unlearn.examples.classifier import digits_processor


class Recorder(UnlearnTrainer):
    """Keeps what every micro-batch was computed from: inputs, replay inputs, weights before, loss."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.records = []

    def compute_loss(self, model, inputs, **kwargs):
        record = {"inputs": copy.deepcopy(inputs), "weights": weights(self.model)}
        self.records.append(record)
        loss = super().compute_loss(model, inputs, **kwargs)
        record["loss"] = loss.item()
        return loss

    def replay_inputs(self, batch, generator):
        batch = super().replay_inputs(batch, generator)
        if self.model.training:  # not where the guard looks or the run is judged
            self.records[-1]["replay"] = {k: v.clone() for k, v in batch.items()}
        return batch


class FixedReplay(UnlearnTrainer):
    def replay_inputs(self, batch, generator):
        return batch | {"pixel_values": batch["pixel_values"].flip(-1)}


@torch.no_grad()
def probabilities(model, state, batch):
    """`[batch, classes]` in float64 in eval mode, of the weights `state`."""
    model = copy.deepcopy(model).eval()
    model.load_state_dict(state)
    return model(pixel_values=batch["pixel_values"]).logits.double().softmax(-1)


def cross_entropy(p, labels):
    return torch.stack([-p[row, label].log() for row, label in enumerate(labels)])


def equation(name, p, p_original, labels, *, forgotten, beta=0.1, target=None):
    """The forget losses once more, from probabilities, one example at a time."""
    values = []
    for row, label in enumerate(labels.tolist()):
        if name == "ascent":
            values.append(p[row, label].log())
        elif name == "match":
            values.append(-p[row, label].log())
        elif name == "uniform":
            classes = p.shape[1]
            values.append(sum((1 / classes) * ((1 / classes) / p[row, c]).log() for c in range(classes)))
        elif name == "npo":
            ratio = p[row, label] / p_original[row, label]
            values.append(-2 / beta * (1 / (1 + ratio**beta)).log())
        elif name == "redirect":
            kept = [c for c in range(p.shape[1]) if c not in (forgotten or [label])]
            mass = sum(p_original[row, c] for c in kept)
            values.append(-sum(p_original[row, c] / mass * p[row, c].log() for c in kept))
    mean = torch.stack(values).mean()
    return (mean - target).abs() if name == "match" else mean


def replayed(p, p_original, forgotten):
    kept = [c for c in range(p.shape[1]) if c not in forgotten]
    p, q = p_original[:, kept], p[:, kept]
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    return (p * (p / q).log()).sum(1).mean()


class TestLossOfAStep:
    @pytest.mark.parametrize(
        ("name", "family", "forget"),
        [("ascent", "resnet", "class"), ("npo", "vit", "examples"), ("redirect", "resnet", "class"),
         ("redirect", "vit", "examples"), ("uniform", "resnet", "examples"), ("match", "vit", "class")],
    )  # fmt: skip
    def test_equals_the_equation_at_every_step(self, name, family, forget, request, tmp_path):
        model = request.getfixturevalue(f"tiny_{family}")
        original = weights(model)
        args = arguments(
            tmp_path, forget=forget, forget_loss=name, preference_beta=0.3, heldout_loss=4.0, forget_weight=1.5,
            retain_weight=0.5, replay_weight=2.0, learning_rate=0.05,
        )  # fmt: skip
        trainer = Recorder(model, args, forget_dataset=images(8, [3, 5]), retain_dataset=images(6, [0, 1, 7], seed=1))
        trainer.train()
        forgotten = [3, 5] if forget == "class" else []  # of single examples only their own label is taken away
        assert len(trainer.records) == 3
        assert distance(trainer.records[-1]["weights"], original) > 0.01  # the student has left the reference
        for record in trainer.records:
            rows, retain = record["inputs"]["forget"], record["inputs"]["retain"]
            p, p_original = (probabilities(model, state, rows) for state in (record["weights"], original))
            expected = (
                1.5 * equation(name, p, p_original, rows["labels"], forgotten=forgotten, beta=0.3, target=4.0)
                + 0.5 * cross_entropy(probabilities(model, record["weights"], retain), retain["labels"]).mean()
            )
            p, p_original = (probabilities(model, s, record["replay"]) for s in (record["weights"], original))
            expected += 2.0 * replayed(p, p_original, forgotten)
            assert record["loss"] == pytest.approx(expected.item(), rel=1e-4)

    def test_bounded_means_sever_or_match(self, tiny_vit, tmp_path):
        forget = images(4, [3])
        assert UnlearnTrainer(tiny_vit, arguments(tmp_path), forget_dataset=forget).forget_loss_name == "sever"
        args, heldout = arguments(tmp_path, forget="examples"), images(5, [3, 4], seed=2)
        trainer = UnlearnTrainer(tiny_vit, args, forget_dataset=forget, heldout_dataset=heldout)
        assert trainer.forget_loss_name == "match"
        expected = F.cross_entropy(tiny_vit(pixel_values=heldout["pixel_values"][:]).logits, heldout["labels"][:])
        trainer.train()
        assert trainer.heldout_loss == pytest.approx(expected.item(), rel=1e-5)

    def test_replay_is_the_default_exactly_where_there_is_no_retained_data(self, tiny_vit, tmp_path):
        args, retain = arguments(tmp_path, replay_weight=None), images(4, [1], seed=1)
        assert UnlearnTrainer(tiny_vit, args, forget_dataset=images(4, [3])).replay_weight == 5
        trainer = UnlearnTrainer(tiny_vit, args, forget_dataset=images(4, [3]), retain_dataset=retain)
        assert trainer.replay_weight == 0


class PenaltyInTheLoss(UnlearnTrainer):
    """The same objective, with the penalty left to autograd."""

    fisher = None
    penalty = None  # γ, β

    def build_anchor(self):
        return None

    def compute_loss(self, model, inputs, **kwargs):
        loss = super().compute_loss(model, inputs, **kwargs)
        gamma, beta = self.penalty
        for name, parameter in self.model.named_parameters():
            change = (parameter - self.reference.parameters[name]).square()
            loss = loss + gamma * change.sum()
            if beta:
                loss = loss + beta * (self.fisher[name] * change).sum()
        return loss


class TestAnchor:
    @pytest.mark.parametrize(
        ("beta", "accumulation", "clipping"), [(0.0, 1, 0.0), (0.0, 4, 0.5), (3.0, 1, 0.5), (3.0, 4, 0.0)]
    )
    def test_equals_a_penalty_in_the_loss(self, beta, accumulation, clipping, tiny_resnet, tmp_path):
        gamma = 0.7
        forget = images(16, [3])
        settings = {
            "per_device_train_batch_size": 8 // accumulation,
            "gradient_accumulation_steps": accumulation,
            "max_grad_norm": clipping,
            "learning_rate": 0.2,
        }
        start = weights(tiny_resnet)
        runs = {}
        for kind, trainer_class, anchor in (
            ("anchor", UnlearnTrainer, {"isotropic_weight": gamma, "fisher_weight": beta}),
            ("autograd", PenaltyInTheLoss, {}),
            ("without", UnlearnTrainer, {}),
        ):
            model = copy.deepcopy(tiny_resnet)
            trainer = trainer_class(model, arguments(tmp_path / kind, **settings, **anchor), forget_dataset=forget)
            if kind == "autograd":
                trainer.penalty = (gamma, beta)
                trainer.fisher = load_file(tmp_path / "anchor" / "_private" / "fisher.safetensors") if beta else None
            trainer.train()
            runs[kind] = weights(model)
        assert close(runs["anchor"], runs["autograd"], start)
        assert distance(runs["anchor"], runs["without"]) > 1e-2 * distance(start, runs["without"])

    @pytest.mark.filterwarnings("ignore:There is a performance drop")
    def test_logged_values_are_the_penalties(self, tiny_vit, tmp_path):
        start = weights(tiny_vit)
        args = arguments(
            tmp_path,
            isotropic_weight=0.7,
            fisher_weight=3.0,
            logging_strategy="steps",
            logging_steps=1,
            forget_loss="redirect",
        )
        trainer = UnlearnTrainer(tiny_vit, args, forget_dataset=images(8, [3]))
        trainer.train()
        fisher = load_file(tmp_path / "_private" / "fisher.safetensors")
        change = {k: (v - start[k]).double().square() for k, v in weights(tiny_vit).items()}
        logs = [log for log in trainer.state.log_history if "loss" in log][-1]
        assert not {"retain_loss", "replay_loss"} & set(logs)  # absent terms are not logged
        assert logs["anchor_isotropic"] == pytest.approx(0.7 * sum(v.sum().item() for v in change.values()), rel=1e-4)
        expected = 3.0 * sum((fisher[k] * v).sum().item() for k, v in change.items())
        assert logs["anchor_fisher"] == pytest.approx(expected, rel=1e-4)


class NeverStops(UnlearnTrainer):
    """Looks for real, and then says that the latest state is the best."""

    def remembered(self):
        assert super().remembered() <= 1
        return 1000.0 - self.state.global_step


class RecordsAndNeverStops(Recorder, NeverStops):
    pass


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch, of the Fisher of attention
class TestPrecisionAndAccumulation:
    @pytest.mark.parametrize("family", ["resnet", "vit"])
    def test_bf16_stays_close_to_fp32(self, family, request, tmp_path):
        start = request.getfixturevalue(f"tiny_{family}")
        ends = []
        for bf16 in (False, True):
            model = copy.deepcopy(start)
            args = arguments(tmp_path, bf16=bf16, replay_weight=1.0, isotropic_weight=0.5, fisher_weight=1.0)
            trainer = Recorder(model, args, forget_dataset=images(8, [3]))
            trainer.train()
            ends.append(weights(model))
            assert {value.dtype for value in ends[-1].values() if value.is_floating_point()} == {torch.float32}
        assert 0 < distance(*ends) < 0.1 * distance(weights(start), ends[0])

    @pytest.mark.parametrize(("family", "retain"), [("resnet", True), ("vit", False)])
    def test_eight_at_once_and_four_times_two_agree(self, family, retain, request, tmp_path):
        start = request.getfixturevalue(f"tiny_{family}")
        ends = []
        for size in (8, 2):
            model = copy.deepcopy(start)
            args = arguments(
                tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, max_grad_norm=1.0,
                replay_weight=2.0, isotropic_weight=0.1,
            )  # fmt: skip
            data = {"retain_dataset": images(5, [0, 1], seed=1)} if retain else {}
            FixedReplay(model, args, forget_dataset=images(8, [3, 4]), **data).train()
            ends.append(weights(model))
        assert close(*ends, weights(start))

    @pytest.mark.parametrize("bn", ["frozen", "train"])
    def test_batchnorm_keeps_its_statistics_or_drifts_and_normalises_by_the_batch(self, bn, tiny_resnet, tmp_path):
        start, before = copy.deepcopy(tiny_resnet), weights(tiny_resnet)
        args = arguments(tmp_path, bn=bn, forget_loss="ascent", guard=True, utility_tolerance=1e9)
        trainer = RecordsAndNeverStops(tiny_resnet, args, forget_dataset=images(8, [3]))
        trainer.train()
        statistics = [name for name in before if "running" in name]
        unchanged = [torch.equal(before[name], tiny_resnet.state_dict()[name]) for name in statistics]
        assert statistics
        assert all(unchanged) if bn == "frozen" else not any(unchanged)
        batch = trainer.records[0]["inputs"]["forget"]
        logits = start.train(bn == "train")(pixel_values=batch["pixel_values"]).logits
        expected = -F.cross_entropy(logits, batch["labels"]).item()
        assert trainer.records[0]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def vit_with_dropout(tiny_vit):
    dropouts = [module for module in tiny_vit.modules() if isinstance(module, torch.nn.Dropout)]
    for module in dropouts:
        module.p = 0.2
    assert dropouts
    return tiny_vit


class TestReproducibility:
    def run(self, model, tmp_path, trainer_class=UnlearnTrainer, **values):
        model = copy.deepcopy(model)
        settings = {"replay_weight": 1.0, "isotropic_weight": 0.1, "max_steps": 5} | values
        data = {"forget_dataset": images(12, [3]), "eval_dataset": {"forget": images(4, [3])}}
        trainer = trainer_class(model, arguments(tmp_path, **settings), **data)
        trainer.train()
        return weights(model), trainer

    def test_depends_on_the_seed_and_not_on_guard_logs_or_evaluation(self, vit_with_dropout, tmp_path):
        start = weights(vit_with_dropout)
        plain, _ = self.run(vit_with_dropout, tmp_path)
        watched = {"guard": True, "guard_steps": 1, "guard_patience": 100, "utility_tolerance": 1e9}
        guarded, trainer = self.run(vit_with_dropout, tmp_path, NeverStops, **watched)
        assert [look.step for look in trainer.guard.looks] == list(range(6))
        loud = {"logging_strategy": "steps", "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
        for again in (
            self.run(vit_with_dropout, tmp_path)[0],
            guarded,
            self.run(vit_with_dropout, tmp_path, **loud)[0],
        ):
            assert close(plain, again, start)
        other, _ = self.run(vit_with_dropout, tmp_path, seed=1)
        assert distance(plain, other) > 0.01 * distance(start, plain)

    def test_dropout_is_on(self, vit_with_dropout, tmp_path):
        start, (with_dropout, _) = weights(vit_with_dropout), self.run(vit_with_dropout, tmp_path)
        for module in vit_with_dropout.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        assert distance(with_dropout, self.run(vit_with_dropout, tmp_path)[0]) > 0.01 * distance(start, with_dropout)

    def test_replay_differs_from_micro_batch_to_micro_batch(self, tiny_vit, tmp_path):
        args = arguments(
            tmp_path, replay_weight=1.0, max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=2
        )
        one = images(1, [3])  # twice, so only randomness differs
        trainer = Recorder(tiny_vit, args, forget_dataset=concatenate_datasets([one, one]))
        trainer.train()
        keys = {tuple(record["replay"]["pixel_values"].flatten().tolist()) for record in trainer.records}
        assert trainer.state.global_step == 2
        assert len(keys) == len(trainer.records) == 4


class TestRetainedData:
    @pytest.mark.parametrize(("forget", "retain", "epochs"), [(12, 5, 1), (4, 9, 20)])
    def test_every_row_is_reached(self, forget, retain, epochs, tiny_vit, tmp_path):
        """In one epoch where there are fewer than forget rows, over the epochs where there are more."""
        rows = images(retain, [0, 1], seed=1)
        args = arguments(tmp_path, num_train_epochs=epochs, max_steps=-1, learning_rate=1e-3)
        trainer = Recorder(tiny_vit, args, forget_dataset=images(forget, [3]), retain_dataset=rows)
        trainer.train()
        known = {tuple(row.flatten().tolist()): number for number, row in enumerate(rows["pixel_values"])}
        batches = [record["inputs"]["retain"]["pixel_values"] for record in trainer.records]
        seen = [known[tuple(row.flatten().tolist())] for batch in batches for row in batch]
        assert len(seen) == forget * epochs
        assert set(seen) == set(range(retain))
        if epochs == 1:
            assert max(map(seen.count, seen)) - min(map(seen.count, seen)) <= 1


def test_raw_rows_ready_rows_and_torch_rows_are_the_same_training(tiny_vit, digits, tmp_path):
    processor = digits_processor()
    forget = digits["train"].filter(lambda label: label == 3, input_columns="label").select(range(8))
    retain = digits["train"].filter(lambda label: label != 3, input_columns="label").select(range(8))

    def ready(dataset):
        pixels = processor(images=list(dataset["image"]), return_tensors="pt")["pixel_values"]
        return [{"pixel_values": p, "labels": label} for p, label in zip(pixels, dataset["label"], strict=True)]

    forms = {
        "raw": lambda dataset: dataset,
        "ready": lambda dataset: Dataset.from_list(
            [{"pixel_values": row["pixel_values"].tolist(), "labels": row["labels"]} for row in ready(dataset)]
        ),
        "torch": lambda dataset: Subset(ready(dataset), range(len(dataset))),
    }
    ends, scores = {}, {}
    for name, form in forms.items():
        model = copy.deepcopy(tiny_vit)
        trainer = UnlearnTrainer(
            model, arguments(tmp_path, replay_weight=1.0), forget_dataset=form(forget), retain_dataset=form(retain),
            processing_class=processor, eval_dataset={"forget": form(forget), "retain": form(retain)},
        )  # fmt: skip
        trainer.train()
        ends[name], scores[name] = weights(model), trainer.evaluate()
    for name in ("ready", "torch"):
        assert close(ends["raw"], ends[name], weights(tiny_vit))
        for part in ("forget", "retain"):
            assert scores[name][f"eval_{part}_loss"] == pytest.approx(scores["raw"][f"eval_{part}_loss"], rel=1e-4)


class TestEvaluationAndLogs:
    def test_accuracies_are_those_of_a_direct_computation(self, tiny_resnet, tmp_path):
        parts = {"forget": images(7, [3]), "retain": images(23, [0, 1, 2, 4, 5], seed=4)}
        for name, part in parts.items():  # two labels in three are what the model says: no accuracy is 0 or 1
            answers = tiny_resnet(pixel_values=part["pixel_values"][:]).logits.argmax(-1).tolist()
            labels = [a if row % 3 else (a + 1) % 10 for row, a in enumerate(answers)]
            parts[name] = part.remove_columns("labels").add_column("labels", labels)
        args = arguments(tmp_path, learning_rate=0.01)
        trainer = UnlearnTrainer(tiny_resnet, args, forget_dataset=images(4, [3]), eval_dataset=parts)
        trainer.train()
        metrics = trainer.evaluate()
        tiny_resnet.eval()
        for name, part in parts.items():
            logits = tiny_resnet(pixel_values=part["pixel_values"][:]).logits.detach()
            accuracy = (logits.argmax(-1) == part["labels"][:]).float().mean().item()
            assert 0 < accuracy < 1
            assert metrics[f"eval_{name}_accuracy"] == pytest.approx(accuracy)
            loss = F.cross_entropy(logits, part["labels"][:]).item()
            assert metrics[f"eval_{name}_loss"] == pytest.approx(loss, rel=1e-5)

    def test_terms_are_logged_one_by_one_and_add_up(self, tiny_vit, tmp_path):
        args = arguments(
            tmp_path, replay_weight=3.0, retain_weight=0.5, forget_weight=2.0, isotropic_weight=0.1, max_steps=6,
            logging_strategy="steps", logging_steps=2, gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer = UnlearnTrainer(tiny_vit, args, forget_dataset=images(16, [3]), retain_dataset=images(4, [1], seed=1))
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert len(logs) == 3
        for log in logs:
            total = 2.0 * log["forget_loss"] + 0.5 * log["retain_loss"] + 3.0 * log["replay_loss"]
            assert log["loss"] == pytest.approx(total, rel=1e-4)
            assert log["anchor_isotropic"] > 0
        assert len({log["forget_loss"] for log in logs}) == 3


class NotFinite(UnlearnTrainer):
    """nan from the fourth optimiser step on, in the second of two micro-batches."""

    def task_loss(self, model, batch):
        loss = super().task_loss(model, batch)
        broken = self.is_in_train and self.state.global_step == 3 and self._micro_step == 1
        return loss * math.nan if broken else loss


class Keeper(TrainerCallback):
    def __init__(self, model):
        self.model, self.weights = model, weights(model)

    def on_step_end(self, args, state, control, **kwargs):
        self.weights = weights(self.model)


class TestNonFiniteLoss:
    @pytest.mark.parametrize("bn", ["frozen", "train"])
    def test_infinite_pixels_stop_before_the_optimiser_steps(self, bn, tiny_resnet, tmp_path):
        forget = images(12, [3])
        pixels = forget["pixel_values"][:].clone()
        pixels[5, 0, 3, 3] = torch.inf
        forget = forget.remove_columns("pixel_values").add_column("pixel_values", pixels.tolist())
        settings = {"bn": bn, "guard_steps": 100, "max_steps": 10}
        trainer = self.stopped(UnlearnTrainer, tiny_resnet, forget, tmp_path, "not finite at step", **settings)
        assert trainer.state.global_step < 3

    def test_a_loss_of_nan_after_some_steps(self, tiny_vit, tmp_path):
        start, settings = (
            weights(tiny_vit),
            {"gradient_accumulation_steps": 2, "forget_loss": "ascent", "max_steps": 10},
        )
        message = "at step 4 .forget_loss nan"
        trainer = self.stopped(NotFinite, tiny_vit, images(16, [3]), tmp_path, message, **settings)
        assert trainer.state.global_step == 3
        assert distance(start, weights(tiny_vit)) > 0

    def stopped(self, trainer_class, model, forget, tmp_path, message, **settings):
        """The last good weights are in the model and on disk, and it says so in one line."""
        keeper, args = Keeper(model), arguments(tmp_path, guard=True, **settings)
        trainer = trainer_class(model, args, forget_dataset=forget, callbacks=[keeper])
        with pytest.raises(FloatingPointError, match=message) as error:
            trainer.train()
        assert "\n" not in str(error.value)
        assert f"step {trainer.state.global_step + 1} " in str(error.value)
        assert all(torch.isfinite(value).all() for value in weights(model).values())
        assert same(weights(model), keeper.weights)
        saved = load_file(tmp_path / "_private" / "last_good.safetensors")
        assert same({name.split("/", 1)[1]: value for name, value in saved.items()}, keeper.weights)
        return trainer

    def test_without_the_guard_nothing_stops_it(self, tiny_vit, tmp_path):
        args = arguments(tmp_path, gradient_accumulation_steps=2, forget_loss="ascent", max_steps=5)
        trainer = NotFinite(tiny_vit, args, forget_dataset=images(16, [3]))
        trainer.train()
        assert trainer.state.global_step == 5
        assert not all(torch.isfinite(value).all() for value in weights(tiny_vit).values())
        assert not (tmp_path / "_private" / "last_good.safetensors").exists()
