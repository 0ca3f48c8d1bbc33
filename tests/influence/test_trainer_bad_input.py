"""What an influence trainer refuses: in one line that names the argument, before anything is written or lost."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from brute_force import MLP, QUIET, images, mlp, observations, same, settings, state, vectors
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig

from hf_unlearn.influence.checks import check_model
from hf_unlearn.influence.config import FINEConfig, InfluenceConfig
from hf_unlearn.influence.sft import FINETrainer
from hf_unlearn.influence.trainer import InfluenceTrainer


def one_line(error):
    return "\n" not in str(error.value)


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def earlier(tmp_path):
    """A folder in which a run has left its records."""
    trainer = InfluenceTrainer(mlp(), settings(tmp_path), train_dataset=vectors(8), target_dataset=vectors(3, seed=1))
    trainer.train()
    return tmp_path


def refused(match, folder, *, model=None, rows=None, train=False, error=ValueError, **given):
    """By the constructor, or with `train=True` by training; the files in the folder and the model stay as they are."""
    values = {name: given.pop(name) for name in list(given) if name in InfluenceConfig.__dataclass_fields__}
    model = mlp() if model is None and "model_init" not in given else model
    if "target" not in given:
        given.setdefault("target_dataset", vectors(3, seed=1))
    before, kept = None if model is None else state(model), files(folder)

    def make():
        args = given.pop("args", None) or settings(folder, **values)
        return InfluenceTrainer(model, args, train_dataset=vectors(8) if rows is None else rows, **given)

    trainer = make() if train else None
    with pytest.raises(error, match=match) as raised:
        trainer.train() if train else make()
    assert one_line(raised)
    assert files(folder) == kept
    if model is not None:
        assert same(state(model), before)


class TestDatasets:
    @pytest.mark.parametrize(
        "empty", [vectors(3).select([]), {}, {"one": vectors(2), "two": vectors(3).select([])}, []], ids=str
    )
    def test_empty_targets(self, empty, earlier):
        refused("^target_dataset: .*is empty; pass", earlier, target_dataset=empty)

    def test_empty_targets_with_a_column(self, earlier):
        rows = vectors(3).add_column("target", ["a"] * 3).select([])
        refused("^target_dataset: is empty", earlier, target_dataset=rows)

    def test_targets_without_labels(self, earlier):
        rows = {"good": vectors(2), "bad": vectors(3).remove_columns("labels")}
        refused("^target_dataset: 'bad' gives batches without 'labels'", earlier, target_dataset=rows)

    def test_targets_with_other_columns(self, earlier):
        rows = Dataset.from_dict({"question": ["who?"], "answer": ["me"]})
        refused("^target_dataset: 'target' ", earlier, target_dataset=rows)

    def test_targets_that_the_collator_does_not_take(self, earlier):
        rows = Dataset.from_dict({"x": [["one"] * 8], "labels": [1]})
        refused("^target_dataset: 'target' cannot be collated", earlier, target_dataset=rows)

    def test_training_rows_without_labels(self, earlier):
        refused("^train_dataset: gives batches without 'labels'", earlier, rows=vectors(8).remove_columns("labels"))

    def test_streams(self, earlier):
        refused("^train_dataset: a streaming", earlier, rows=vectors(8).to_iterable_dataset())
        refused("^target_dataset: .*stream", earlier, target_dataset=vectors(3).to_iterable_dataset())

    def test_nothing_to_train_on(self, earlier):
        refused("^train_dataset: is empty", earlier, rows=vectors(8).select([]))

    def test_ids_that_occur_twice(self, earlier):
        rows = vectors(4).remove_columns("id").add_column("id", ["a", "b", "c", "b"])
        refused("^train_dataset: id 'b' occurs twice in column 'id'", earlier, rows=rows)

    @pytest.mark.parametrize("ids", [["a", None, "c", "d"], [0.5, 1.5, 2.5, 3.5], [[1], [2], [3], [4]]], ids=str)
    def test_ids_of_other_kinds(self, ids, earlier):
        rows = vectors(4).remove_columns("id").add_column("id", ids)
        refused("^train_dataset: column 'id' must hold ids", earlier, rows=rows)

    def test_neither_or_both_targets(self, earlier):
        refused("^target_dataset: pass it, or target='self', and not both", earlier, target_dataset=None)
        refused("^target_dataset: pass it, or", earlier, target="self", target_dataset=vectors(2))
        refused("^target: 'other' is not 'self'", earlier, target="other")

    def test_a_target_called_self(self, earlier):
        refused("^target_dataset: a target cannot be called 'self'", earlier, target_dataset={"self": vectors(2)})


class TestSettings:
    @pytest.mark.parametrize(
        ("match", "values"),
        [
            ("^label_smoothing_factor: not supported", {"label_smoothing_factor": 0.1}),
            ("^n_calibration_runs: needs model_init=", {"n_calibration_runs": 2}),
            ("^n_calibration_runs: .*target='self'", {"n_calibration_runs": 2, "target": "self"}),
            ("^preconditioned: .*target='self'", {"preconditioned": True, "target": "self"}),
            ("^per_device_train_batch_size: target='self'", {"per_device_train_batch_size": 1, "target": "self"}),
            (
                "^load_best_model_at_end: the sweep",
                {
                    "observation": "propagated",
                    "load_best_model_at_end": True,
                    "save_strategy": "steps",
                    "eval_strategy": "steps",
                    "eval_dataset": vectors(2),
                },
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_that_do_not_go_together(self, match, values, earlier):
        refused(match, earlier, **values)

    def test_a_loss_function_of_ones_own(self, earlier):
        refused("^compute_loss_func: not supported", earlier, compute_loss_func=lambda *args, **kwargs: 0)

    def test_the_best_model_may_be_loaded_where_nothing_is_swept(self, tiny_resnet, tmp_path):
        args = settings(
            tmp_path,
            load_best_model_at_end=True,
            save_strategy="steps",
            eval_strategy="steps",
            save_steps=2,
            eval_steps=2,
        )
        data = {"train_dataset": images(8), "eval_dataset": images(4), "target_dataset": images(2)}
        trainer = InfluenceTrainer(tiny_resnet, args, **data)
        trainer.train()
        assert len(observations(trainer).steps.step) == 3

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("observation", "magic"),
            ("target_every", 0),
            ("target_batch_size", 0),
            ("last_steps", 0),
            ("burn_in", 1.0),
            ("target_window", -0.1),
            ("trajectory_gigabytes", 0),
            ("n_calibration_runs", 1),
        ],
    )
    @pytest.mark.parametrize("config", [InfluenceConfig, FINEConfig])
    def test_out_of_range(self, config, name, value, tmp_path):
        with pytest.raises(ValueError, match=f"^{name}: ") as error:
            config(str(tmp_path / "new"), use_cpu=True, bf16=False, **{name: value})
        assert one_line(error)
        assert not (tmp_path / "new").exists()

    def test_arguments_of_another_trainer(self, earlier):
        refused("^args: InfluenceTrainer needs InfluenceConfig, got SFTConfig", earlier,
                args=SFTConfig(str(earlier), use_cpu=True, bf16=False))  # fmt: skip

    @pytest.mark.parametrize("name", ["packing", "padding_free"])
    def test_rows_of_several_documents(self, name, tiny_llama, tokenizer, tmp_path):
        args = FINEConfig(str(tmp_path / "new"), bf16=False, **QUIET, **{name: True})
        rows = Dataset.from_dict({"text": ["one", "two"]})
        with pytest.raises(ValueError, match=f"^{name}=True: mixes documents") as error:
            FINETrainer(tiny_llama, args, train_dataset=rows, target_dataset=rows, processing_class=tokenizer)
        assert one_line(error)
        assert not (tmp_path / "new").exists()

    def test_calibration_of_a_language_model(self, tiny_llama, tokenizer, tmp_path):
        args = FINEConfig(str(tmp_path), bf16=False, n_calibration_runs=2, **QUIET)
        rows = Dataset.from_dict({"text": ["one", "two"]})
        with pytest.raises(ValueError, match="^n_calibration_runs: SFTTrainer") as error:
            FINETrainer(tiny_llama, args, train_dataset=rows, target_dataset=rows, processing_class=tokenizer)
        assert one_line(error)


class TestModels:
    def test_nothing_trainable(self, earlier):
        refused("^model: none of its parameters is trainable", earlier, model=mlp().requires_grad_(False))

    def test_nothing_to_see(self, earlier):
        refused("^layers: 'nowhere' matches no module", earlier, layers=["nowhere"])

    @pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
    def test_other_problems(self, problem, tiny_resnet, earlier):
        tiny_resnet.config.problem_type = problem
        refused(
            f"^model: problem_type='{problem}'", earlier, model=tiny_resnet, rows=images(8), target_dataset=images(2)
        )

    def test_labels_that_are_no_classes(self, tiny_resnet, earlier):
        rows = images(8).remove_columns("labels").add_column("labels", [[0.0, 1.0] * 5] * 8)
        refused("^train_dataset: has labels that are no classes", earlier, model=tiny_resnet, rows=rows,
                target_dataset=rows)  # fmt: skip

    def test_several_gpus_in_one_process(self, earlier):
        args = settings(earlier)
        args._n_gpu = 2
        refused("^several GPUs in one process", earlier, args=args, model=Parallel())

    @pytest.mark.parametrize("name", ["is_deepspeed_enabled", "is_fsdp_enabled"])
    def test_sharded_parameters(self, name, earlier):
        """As a trainer that is sharded says of itself; there is none without GPUs."""
        flags = {"is_deepspeed_enabled": False, "is_fsdp_enabled": False, name: True}
        with pytest.raises(ValueError, match="^DeepSpeed and FSDP are not supported yet") as error:
            check_model(SimpleNamespace(args=SimpleNamespace(n_gpu=0), model=mlp(), **flags))
        assert one_line(error)

    def test_processes_that_do_not_know_of_each_other(self, earlier, monkeypatch):
        args = settings(earlier)
        monkeypatch.setenv("WORLD_SIZE", "2")
        refused("^use_cpu: 2 processes were launched", earlier, args=args)


class Parallel(MLP):
    """Says that it is spread over GPUs already, so that Trainer leaves it alone."""

    is_parallelizable = model_parallel = True


class Both(torch.nn.Module):
    """A loss with a penalty that belongs to no example."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 3)

    def forward(self, x, labels=None):
        logits = self.layer(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels) + self.layer.weight.square().sum(), "logits": logits}


class TestTraining:
    def test_a_loss_that_is_no_mean_over_examples(self, tmp_path):
        model = Both()
        before = state(model)
        trainer = InfluenceTrainer(
            model, settings(tmp_path), train_dataset=vectors(8), target_dataset=vectors(3, seed=1)
        )
        with pytest.raises(ValueError, match="^compute_loss: .* is not the mean of the examples' own losses") as error:
            trainer.train()
        assert one_line(error)
        assert same(state(model), before)
        assert not trainer._ghost._handles

    def test_such_a_loss_with_its_own_per_example_loss(self, tmp_path):
        class Own(InfluenceTrainer):
            def per_example_loss(self, model, inputs):
                losses, weights = super().per_example_loss(model, inputs)
                return losses + model.layer.weight.square().sum(), weights

        trainer = Own(Both(), settings(tmp_path), train_dataset=vectors(8), target_dataset=vectors(3, seed=1))
        trainer.train()
        assert len(observations(trainer).steps.step) == 3

    @pytest.mark.parametrize("optim", ["adafactor", "rmsprop", "adagrad"])
    def test_an_optimizer_without_an_adjoint(self, optim, earlier):
        refused("^optim: .* cannot be carried influence through", earlier, observation="propagated", optim=optim,
                train=True)  # fmt: skip

    def test_preconditioned_without_adam(self, earlier):
        refused("^preconditioned: needs Adam or AdamW of torch, and optim is SGD", earlier, preconditioned=True,
                train=True)  # fmt: skip

    @pytest.mark.parametrize("observation", ["in_run", "propagated"])
    def test_gradients_that_are_not_finite(self, observation, tmp_path):
        """At the third step: nothing is updated with them, and what was recorded before is kept."""

        class Explodes(TrainerCallback):
            def on_step_begin(self, args, state, control, model=None, **kwargs):
                if state.global_step == 2:
                    weights.append(copy.deepcopy(model.state_dict()))
                    model.second.bias.register_hook(lambda gradient: gradient * math.nan)

        weights = []
        args = settings(tmp_path, max_steps=5, max_grad_norm=1.0, observation=observation)
        trainer = InfluenceTrainer(
            mlp(), args, train_dataset=vectors(8), target_dataset=vectors(3, seed=1), callbacks=[Explodes()]
        )
        with pytest.raises(
            FloatingPointError, match="^gradient is not finite at step 3: nothing was updated"
        ) as error:
            trainer.train()
        assert one_line(error)
        assert same(trainer.model.state_dict(), weights[0])
        if observation == "in_run":
            assert observations(trainer).steps.step.tolist() == [0, 1]
            assert np.isfinite(observations(trainer).value).all()
            assert len(trainer.influence.top(2)) == 2

    def test_influence_before_training(self, tmp_path):
        trainer = InfluenceTrainer(
            mlp(), settings(tmp_path / "new"), train_dataset=vectors(8), target_dataset=vectors(3, seed=1)
        )
        with pytest.raises(
            ValueError, match=r"^influence: this trainer has not trained; call train\(\) first"
        ) as error:
            trainer.influence  # noqa: B018 (a property)
        assert one_line(error)
