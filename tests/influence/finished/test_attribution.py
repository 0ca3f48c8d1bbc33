"""`attribute`: closed forms at a finished model, checkpoints of real trainings, what has no unit, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from brute_force import QUIET, mlp, settings, vectors
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from scipy.stats import spearmanr
from test_curvature import Softmax, dense
from transformers import Trainer, TrainingArguments

from hf_unlearn import FINEConfig, InfluenceConfig, InfluenceTrainer, attribute
from hf_unlearn.influence.finished.checkpoints import checkpoints_of, optimizer_of, segments_of


OPTIONS = {"trainer_class": InfluenceTrainer}
TARGETS = {"a": vectors(4, seed=1), "b": vectors(5, seed=2)}


def saved(model, folder, rows, **values):
    """A stock training, with a checkpoint an epoch."""
    plain = {
        "num_train_epochs": 4, "per_device_train_batch_size": 4, "learning_rate": 0.2, "optim": "sgd", "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant", "save_strategy": "epoch", "logging_strategy": "steps", "logging_steps": 1,
        "use_cpu": True, "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    trainer = Trainer(model, TrainingArguments(output_dir=str(folder), **(plain | values)), train_dataset=rows)
    trainer.train()
    return trainer


def plain(tmp_path, **values):
    return InfluenceConfig(output_dir=str(tmp_path / "a"), **(QUIET | {"max_grad_norm": 0.0} | values))


def test_one_model_is_the_influence_function(tmp_path):
    model, rows = Softmax(), vectors(20)
    report = attribute(model, rows, TARGETS, args=plain(tmp_path, per_device_eval_batch_size=7), **OPTIONS)

    names = [name for name, _ in model.named_parameters()]
    f, h = dense(model, rows, names)
    g = torch.stack([dense(model, part, names)[1].mean(0) for part in TARGETS.values()])
    expected = h @ torch.linalg.solve(f + 0.1 * f.diagonal().mean() * torch.eye(len(f)), g.T)
    np.testing.assert_allclose(report.observations.value, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
    order = np.argsort(report._values("mu", "a"))
    assert order.tolist() == expected[:, 0].argsort().tolist()
    assert report.observations.sample_ids.tolist() == [f"v{row}" for row in range(20)]
    # Groups' scores are sums, up to what else is left of the training set.
    groups = report.group({"x": ["v0", "v1"]}, "a")["mu"][0]
    sums = report.observations.value[:2, 0].sum() / 18 / np.sqrt(report.observations.variance[0, 0])
    assert groups == pytest.approx(sums, rel=1e-5)


def test_it_has_no_unit_and_says_so(tmp_path, caplog):
    report = attribute(mlp(), vectors(9), TARGETS, args=plain(tmp_path), **OPTIONS)
    why = "no unit: order only, since one finished model does not tell"
    assert report.order_only
    assert report.unit.startswith(why)
    assert all(np.isnan(value) for value in report.sigma.values())
    assert np.isnan(report.dataset["mu_low"][:]).all()
    assert why in str(report.summary(2).caption)
    assert set(report.summary(2).columns[3].cells) == {"–"}
    assert why in report.dataset_card("me/report").replace("\n", " ")
    assert why in caplog.text
    report.save_to_disk(tmp_path / "report")
    again = type(report).load_from_disk(tmp_path / "report")
    assert again.order_only
    assert again.dataset["mu"][:] == report.dataset["mu"][:]


def test_on_themselves(tmp_path):
    model, rows = Softmax(), vectors(15)
    report = attribute(model, rows, target="self", args=plain(tmp_path), **OPTIONS)
    f, h = dense(model, rows, [name for name, _ in model.named_parameters()])
    expected = (h * torch.linalg.solve(f + 0.1 * f.diagonal().mean() * torch.eye(len(f)), h.T).T).sum(1)
    np.testing.assert_allclose(report.observations.value[:, 0], expected, rtol=1e-4)
    assert np.argmax(report.dataset["mu"][:]) == expected.argmax()
    assert report.order_only


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_segments_agree_with_the_sweep(tmp_path, optim):
    rows = vectors(40)
    rate = 0.2 if optim == "sgd" else 0.01
    args = settings(
        tmp_path / "run", observation="propagated", max_steps=-1, num_train_epochs=5, save_strategy="epoch", logging_strategy="steps",
        logging_steps=5, learning_rate=rate, optim=optim, weight_decay=0.01,
    )  # fmt: skip
    trainer = InfluenceTrainer(mlp(), args, train_dataset=rows, target_dataset=TARGETS)
    trainer.train()
    swept = trainer.influence
    model = mlp()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    report = attribute(model, rows, TARGETS, checkpoints=tmp_path / "run", args=plain(tmp_path), **OPTIONS)

    for target in TARGETS:
        # 0.89 to 0.93: the sweep sees each example at its own steps, the segments see all of them at all. (σ is not compared: with ten
        # steps an epoch the sweep's is too large.)
        assert spearmanr(report._values("mu", target), swept._values("mu", target))[0] > 0.8
        assert 0 < report.sigma[target] < swept.sigma[target]
    assert not report.order_only
    assert len(report.observations.steps.step) == 5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    named = [str(tmp_path / "run" / f"checkpoint-{10 * epoch}") for epoch in (5, 1, 2, 3, 4)]
    same = attribute(model, rows, TARGETS, checkpoints=named, args=plain(tmp_path), **OPTIONS)
    np.testing.assert_allclose(same.dataset["mu"][:], report.dataset["mu"][:], rtol=1e-6)


def test_without_optimizers_it_is_order_only(tmp_path):
    rows = vectors(16)
    saved(mlp(), tmp_path / "run", rows)
    known = attribute(mlp(), rows, TARGETS, checkpoints=tmp_path / "run", args=plain(tmp_path), **OPTIONS)
    assert not known.order_only
    (tmp_path / "run/checkpoint-8/optimizer.pt").unlink()
    report = attribute(mlp(), rows, TARGETS, checkpoints=tmp_path / "run", args=plain(tmp_path), **OPTIONS)
    assert report.unit.startswith("no unit: order only, since a checkpoint has no state of SGD, Adam or AdamW")
    # Plain descent without momentum is what is taken instead, and what it was.
    np.testing.assert_allclose(report.observations.value, known.observations.value, rtol=1e-6)


def test_optimizers_and_their_steps(tmp_path):
    model = mlp()
    trainer = saved(model, tmp_path / "run", vectors(16), optim="adamw_torch", learning_rate=0.01, weight_decay=0.1)
    last = checkpoints_of(tmp_path / "run")[-1]
    named = dict(model.named_parameters())
    decayed = [n for n in named if not n.endswith("bias")]
    found = optimizer_of(last, named, [decayed, [n for n in named if n.endswith("bias")]])
    for name, parameter in named.items():
        state = trainer.optimizer.state[parameter]
        root = (state["exp_avg_sq"] / (1 - 0.999**16)).sqrt() + 1e-8
        torch.testing.assert_close(found.preconditioner[name], 1 / root)
        assert found.decay[name] == (0.0 if name.endswith("bias") else pytest.approx(0.1))
    assert (found.rate, found.adaptive) == (0.01, True)

    saved(mlp(), tmp_path / "other", vectors(16), optim="sgd", optim_args="momentum=0.8", lr_scheduler_type="linear")
    several = checkpoints_of(tmp_path / "other")
    momentum = optimizer_of(several[-1], named, [decayed, [n for n in named if n.endswith("bias")]])
    torch.testing.assert_close(momentum.preconditioner["first.bias"], torch.full((6,), 5.0))
    segments = segments_of(several, [None] * 4, 0.0)
    assert [(one.start, one.stop) for one in segments] == [(0, 6), (6, 10), (10, 14), (14, 16)]
    rates = np.concatenate([one.rates for one in segments])
    np.testing.assert_allclose(rates, 0.2 * (1 - np.arange(16) / 16), atol=0.2 / 16 + 1e-9)
    clipped = segments_of(several, [None] * 4, 1e-3)
    assert all((a.rates < b.rates).all() for a, b in zip(clipped, segments, strict=True) if b.rates.all())


def test_an_adapter_in_a_folder(tmp_path, tiny_llama, tokenizer):
    asked = [f"Where is order {17 * number}?" for number in range(8)]
    rows = Dataset.from_dict({"prompt": asked, "completion": [f" It is lost, {number}." for number in range(8)]})
    tiny_llama.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = type(tiny_llama).from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    args = FINEConfig(output_dir=str(tmp_path / "a"), max_length=64, bf16=False, **QUIET)

    report = attribute(tmp_path / "adapter", rows, rows.select(range(2)), args=args, processing_class=tokenizer)

    assert report.targets == ("target",)
    assert "unseen" not in report.manifest
    assert report.manifest["curvature"] == "labels drawn from the model"
    low = adapted.to(torch.bfloat16)
    args = FINEConfig(output_dir=str(tmp_path / "b"), max_length=64, bf16=False, **QUIET)
    half = attribute(low, rows, rows.select(range(2)), args=args, processing_class=tokenizer)
    assert spearmanr(half.dataset["mu"][:], report.dataset["mu"][:])[0] > 0.9


class TestRefused:
    def refused(self, tmp_path, *args, **options):
        with pytest.raises(ValueError) as error:
            attribute(*args, **({"args": plain(tmp_path)} | OPTIONS | options))
        assert "\n" not in str(error.value)
        return str(error.value)

    def test_values(self, tmp_path):
        for name, value in (("damping", 0.0), ("curvature_examples", 0), ("target_window", 1.0)):
            said = self.refused(tmp_path, mlp(), vectors(4), TARGETS, **{name: value})
            assert said.startswith(f"{name}={value}: must be ")
        assert self.refused(tmp_path, 3, vectors(4), TARGETS).startswith("model: int is no model; ")
        assert self.refused(tmp_path, mlp(), vectors(4), TARGETS, target="self").startswith(
            "target_dataset: pass it, or"
        )

    def test_checkpoints(self, tmp_path):
        rows = vectors(16)
        (tmp_path / "empty").mkdir()
        said = self.refused(tmp_path, mlp(), rows, TARGETS, checkpoints=tmp_path / "empty")
        assert said.endswith("holds no whole checkpoint-<step>; train with save_strategy, or pass the model")
        saved(mlp(), tmp_path / "run", rows)
        last = tmp_path / "run/checkpoint-16"
        shutil.copytree(last, tmp_path / "half")
        (tmp_path / "half/trainer_state.json").unlink()
        said = self.refused(tmp_path, mlp(), rows, TARGETS, checkpoints=[last, tmp_path / "half"])
        assert said.endswith("is no whole checkpoint of a Trainer (no trainer_state.json); leave it out")
        assert "are of the same step" in self.refused(tmp_path, mlp(), rows, TARGETS, checkpoints=[last, last])
        (last / "optimizer.pt").write_bytes(b"x")
        assert "optimizer.pt' cannot be read (" in self.refused(tmp_path, mlp(), rows, TARGETS, checkpoints=[last])
        (last / "optimizer.pt").unlink()
        state = json.loads((last / "trainer_state.json").read_text())
        (last / "trainer_state.json").write_text(json.dumps(state | {"log_history": []}))
        assert "tells of learning rates" in self.refused(tmp_path, mlp(), rows, TARGETS, checkpoints=[last])

    def test_losses_that_are_no_sums(self, tmp_path):
        class Penalised(InfluenceTrainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
                return loss + sum(p.square().sum() for p in model.parameters())

        said = self.refused(tmp_path, mlp(), vectors(8), TARGETS, trainer_class=Penalised)
        assert said.startswith("compute_loss: ")


def test_a_loss_of_ones_own(tmp_path):
    class Squared(InfluenceTrainer):
        def per_example_loss(self, model, inputs):
            logits = model(inputs["x"])["logits"]
            wanted = torch.nn.functional.one_hot(inputs["labels"], 3)
            return (logits - wanted).square().sum(1), torch.ones(len(logits))

    report = attribute(mlp(), vectors(9), TARGETS, args=plain(tmp_path), trainer_class=Squared)
    assert report.manifest["curvature"] == "the training set's own losses"
    assert np.isfinite(report.dataset["mu"][:]).all()


def test_targets_are_taken_whole(tmp_path):
    """Whatever `target_batch_size` says, which is of looks while training."""
    args = plain(tmp_path, target_batch_size=1)
    one = attribute(mlp(), vectors(9), TARGETS, args=args, **OPTIONS)
    other = attribute(mlp(), vectors(9), TARGETS, args=plain(tmp_path), **OPTIONS)
    np.testing.assert_array_equal(one.observations.value, other.observations.value)
