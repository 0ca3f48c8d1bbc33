import copy
import json
import logging

import pytest
import torch
from image_data import arguments, images, same, weights
from safetensors.torch import load_file

from hf_unlearn import PBUConfig, PBUTrainer, UnlearnTrainer
from hf_unlearn.examples.classifier import digits_processor
from hf_unlearn.training.collators import RawCollator
from hf_unlearn.unlearning.guard import GuardState, Look


class Keeper(UnlearnTrainer):
    """Keeps the weights of every step at which the guard looks."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = {}

    def remembered(self):
        self.seen[self.state.global_step] = weights(self.model)
        return super().remembered()


class Scripted(UnlearnTrainer):
    """A guard that sees what the test says: by step, what is remembered and the utility drop."""

    script = {}

    def remembered(self):
        return self.script[self.state.global_step][0]

    def utility_drop(self, baseline):
        return self.script[self.state.global_step][1]


def drawn(total, limit, seed=42):
    """The rows that a look takes: at most `limit`, by the seed of the run, in their order."""
    return sorted(torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:limit].tolist())


def scripted(model, tmp_path, script, **values):
    trainer_class = type("Scripted", (Scripted,), {"script": dict(enumerate(script))})
    settings = {"guard": True, "guard_steps": 1, "max_steps": len(script) - 1, "learning_rate": 0.01} | values
    trainer = trainer_class(model, arguments(tmp_path, **settings), forget_dataset=images(4, [3]))
    trainer.train()
    return trainer


def guard_file(folder, step):
    saved = load_file(folder / "_private" / "guard" / f"step-{step}.safetensors")
    return {name.split("/", 1)[1]: value for name, value in saved.items()}


@torch.no_grad()
def accuracy(model, dataset):
    batch = RawCollator(digits_processor(), "image")(list(dataset))
    return (model.eval()(batch["pixel_values"]).logits.argmax(-1) == batch["labels"]).float().mean().item()


class TestCollapse:
    """Ascent with a learning rate that destroys the model: what is left must be within tolerance."""

    def collapse(self, model, parts, tmp_path, **values):
        settings = {
            "forget_loss": "ascent", "optim": "adamw_torch", "learning_rate": 3e-3, "max_steps": 60, "guard": True,
            "guard_steps": 2, "per_device_train_batch_size": 32, "guard_examples": 128, "max_grad_norm": 1.0,
        }  # fmt: skip
        trainer = Keeper(
            model, arguments(tmp_path, **(settings | values)), forget_dataset=parts["forget"],
            eval_dataset={"retain": parts["retain"]}, processing_class=digits_processor(),
        )  # fmt: skip
        trainer.train()
        return trainer

    def test_restores_the_best_kept_state_and_stops_early(self, digits_classifier, digits_parts, tmp_path):
        trainer = self.collapse(digits_classifier, digits_parts, tmp_path)
        looks, best = trainer.guard.looks, trainer.guard.best
        assert looks[-1].utility_drop > 0.1  # it did collapse
        assert trainer.state.global_step < 60
        assert best.kept
        assert best == max(looks, key=lambda look: look.rank)
        assert best.step < looks[-1].step
        assert same(weights(digits_classifier), trainer.seen[best.step])
        assert same(guard_file(tmp_path, best.step), trainer.seen[best.step])
        kept = digits_parts["retain"].select(drawn(len(digits_parts["retain"]), 128))
        drop = trainer.guard.state.baseline - accuracy(digits_classifier, kept)
        assert drop == pytest.approx(best.utility_drop, abs=1e-6)
        assert drop <= 0.02

    def test_warns_where_nothing_was_forgotten_within_tolerance(
        self, digits_classifier, digits_parts, tmp_path, caplog
    ):
        with caplog.at_level(logging.WARNING, "hf_unlearn"):
            trainer = self.collapse(
                digits_classifier, digits_parts, tmp_path, guard_steps=20, max_steps=20, utility_tolerance=0.0
            )
        assert trainer.guard.best.kept
        assert not trainer.guard.best.forgotten
        warnings = [record.getMessage() for record in caplog.records if "utility_tolerance" in record.getMessage()]
        assert len(warnings) == 1
        assert "forget target was not reached" in warnings[0]

    def test_statistics_of_batchnorm_are_restored_too(self, digits_classifier, digits_parts, tmp_path):
        trainer = self.collapse(digits_classifier, digits_parts, tmp_path, bn="train", max_steps=12)
        best = trainer.guard.best
        assert best.step < trainer.state.global_step
        statistics = [name for name in weights(digits_classifier) if "running_mean" in name]
        for name in statistics:
            assert torch.equal(digits_classifier.state_dict()[name], trainer.seen[best.step][name])
        assert not torch.equal(trainer.seen[0][statistics[0]], trainer.seen[2][statistics[0]])


def test_pbu_forgets_and_the_guard_says_so(digits_classifier, digits_parts, tmp_path, caplog):
    trainer = PBUTrainer(
        digits_classifier,
        PBUConfig(str(tmp_path), num_train_epochs=4, report_to="none", disable_tqdm=True, use_cpu=True),
        forget_dataset=digits_parts["forget"],
        processing_class=digits_processor(),
    )
    with caplog.at_level(logging.WARNING, "hf_unlearn"):
        trainer.train()
    assert trainer.utility_kind == "divergence"
    assert trainer.guard.looks[0].remembered > 0.9
    assert trainer.guard.best.forgotten
    assert trainer.guard.best.kept
    assert not caplog.records


class TestDecisions:
    def test_rank(self):
        ordered = [
            Look(0, 0.5, 0.3, False),
            Look(0, -0.1, 0.2, False),
            Look(0, 0.9, 0.0, True),
            Look(0, 0.4, 0.02, True),
            Look(0, 0.0, 0.02, True),
            Look(0, -0.2, 0.01, True),
        ]
        mixed = [ordered[position] for position in (3, 0, 5, 2, 4, 1)]
        assert sorted(mixed, key=lambda look: look.rank)[2:] == ordered[2:]
        assert all(lost.rank < kept.rank for lost in ordered[:2] for kept in ordered[2:])

    def test_the_best_of_the_forgotten_is_restored(self, tiny_vit, tmp_path):
        script = [(0.9, 0.0), (0.0, 0.02), (0.0, 0.01), (0.0, 0.015), (0.5, 0.0)]
        trainer = scripted(tiny_vit, tmp_path, script, guard_patience=10, utility_tolerance=0.1)
        assert trainer.guard.best.step == 2
        assert same(weights(tiny_vit), guard_file(tmp_path, 2))

    def test_utility_that_never_fell_below_tolerance_again_counts(self, tiny_vit, tmp_path):
        script = [(0.9, 0.0), (0.0, 0.3), (0.0, 0.2), (0.0, 0.05), (0.0, 0.06)]
        trainer = scripted(tiny_vit, tmp_path, script, guard_patience=10, utility_tolerance=0.1)
        assert trainer.guard.best.step == 3

    @pytest.mark.parametrize("patience", [1, 3])
    def test_patience_counts_looks_that_bring_nothing(self, patience, tiny_vit, tmp_path):
        script = [(0.9, 0.0), (0.5, 0.0), (0.0, 0.02)] + [(0.0, 0.05)] * 5
        trainer = scripted(tiny_vit, tmp_path, script, guard_patience=patience, utility_tolerance=0.1)
        assert trainer.state.global_step == 2 + patience
        assert trainer.guard.best.step == 2

    def test_a_gain_starts_the_count_again(self, tiny_vit, tmp_path):
        script = [(0.9, 0.0), (0.0, 0.05), (0.0, 0.06), (0.0, 0.04), (0.0, 0.05), (0.0, 0.05), (0.0, 0.0)]
        trainer = scripted(tiny_vit, tmp_path, script, guard_patience=2, utility_tolerance=0.1)
        assert trainer.state.global_step == 5
        assert trainer.guard.best.step == 3

    def test_it_does_not_stop_on_the_way(self, tiny_vit, tmp_path):
        script = [(0.9, 0.0), (0.8, 0.05), (0.9, 0.05), (0.85, 0.05), (0.9, 0.05), (0.88, 0.05)]
        trainer = scripted(tiny_vit, tmp_path, script, guard_patience=1, utility_tolerance=0.1)
        assert trainer.state.global_step == 5
        assert trainer.guard.best.step == 1

    def test_once_per_epoch_by_default_and_at_the_end(self, tiny_vit, tmp_path):
        args = arguments(tmp_path, guard=True, max_steps=8, learning_rate=1e-3)
        trainer = UnlearnTrainer(tiny_vit, args, forget_dataset=images(12, [3]))
        trainer.train()
        assert [look.step for look in trainer.guard.looks] == [0, 3, 6, 8]

    def test_one_file_is_left(self, tiny_vit, tmp_path):
        script = [(0.9 - 0.1 * step, 0.0) for step in range(6)]
        trainer = scripted(tiny_vit, tmp_path, script)
        assert trainer.guard.best.step == 5
        assert [path.name for path in (tmp_path / "_private" / "guard").iterdir()] == ["step-5.safetensors"]

    def test_with_checkpoints_what_the_last_one_needs_is_left(self, tiny_vit, tmp_path):
        script = [(0.9, 0.0), (0.0, 0.05), (0.0, 0.04), (0.0, 0.03), (0.0, 0.02), (0.0, 0.05), (0.0, 0.0)]
        trainer = scripted(tiny_vit, tmp_path, script, save_strategy="steps", save_steps=3, guard_patience=1)
        assert (trainer.state.global_step, trainer.guard.best.step) == (5, 4)
        left = {path.name for path in (tmp_path / "_private" / "guard").iterdir()}
        assert left == {"step-3.safetensors", "step-4.safetensors"}  # checkpoint-3 would go back to the first

    def test_state_survives_json(self):
        looks = [Look(0, 0.9, 0.0, True), Look(3, float("inf"), 0.1, False)]
        state = GuardState(0.97, looks[0], 2, looks)
        assert GuardState.from_json(json.loads(json.dumps(state.to_json()))) == state
        assert GuardState.from_json(json.loads(json.dumps(GuardState().to_json()))) == GuardState()

    def test_a_second_run_of_the_same_trainer_starts_its_own_looks(self, tiny_vit, tmp_path):
        args = arguments(tmp_path, guard=True, guard_steps=1, learning_rate=1e-3, max_steps=3)
        trainer = UnlearnTrainer(
            tiny_vit, args, forget_dataset=images(4, [3]), eval_dataset={"retain": images(20, [1, 2], seed=1)}
        )
        trainer.train()
        baseline = trainer.guard.state.baseline
        trainer.train()
        assert [look.step for look in trainer.guard.looks] == [0, 1, 2, 3]
        assert trainer.guard.state.baseline == baseline

    def test_a_restored_state_is_what_is_saved(self, tiny_vit, tmp_path):
        script = [(0.9, 0.0), (0.0, 0.0), (0.0, 0.5)]
        trainer = scripted(tiny_vit, tmp_path, script)
        trainer.save_model()
        assert same(weights(type(tiny_vit).from_pretrained(tmp_path)), guard_file(tmp_path, 1))


class TestUtility:
    def trainer(self, model, tmp_path, **data):
        return UnlearnTrainer(model, arguments(tmp_path), forget_dataset=images(6, [3]), **data)

    def test_retained_evaluation_data_come_first(self, tiny_vit, tmp_path):
        parts = {"retain": images(10, [0, 1, 2, 5], seed=2), "forget": images(3, [3], seed=3)}
        trainer = self.trainer(tiny_vit, tmp_path, eval_dataset=parts, retain_dataset=images(8, [6], seed=1))
        logits = tiny_vit(pixel_values=parts["retain"]["pixel_values"][:]).logits
        expected = (logits.argmax(-1) == parts["retain"]["labels"][:]).float().mean().item()
        assert (trainer.utility_kind, trainer.utility_tolerance) == ("accuracy", 0.02)
        assert trainer.utility() == pytest.approx(expected)
        assert trainer.utility_drop(0.75) == pytest.approx(0.75 - expected)

    def test_then_the_retained_training_data(self, tiny_vit, tmp_path):
        retain = images(8, [0, 1, 2, 4, 5, 6, 7, 8], seed=1)
        trainer = self.trainer(tiny_vit, tmp_path, retain_dataset=retain, eval_dataset={"forget": images(3, [3])})
        expected = (tiny_vit(pixel_values=retain["pixel_values"][:]).logits.argmax(-1) == retain["labels"][:]).float()
        assert trainer.utility_kind == "accuracy"
        assert trainer.utility() == pytest.approx(expected.mean().item())

    def test_then_divergence_which_is_zero_at_the_original(self, tiny_vit, tmp_path):
        trainer = self.trainer(tiny_vit, tmp_path)
        trainer.train()
        assert (trainer.utility_kind, trainer.utility_tolerance) == ("divergence", 0.5)
        assert trainer.utility() == trainer.utility() > 0
        assert trainer.utility_drop(0.0) == trainer.utility()
        trainer.reference.restore(tiny_vit)
        assert trainer.utility() == pytest.approx(0, abs=1e-6)

    def test_divergence_does_not_count_the_forgotten_class(self, tiny_vit, tmp_path):
        trainer = self.trainer(tiny_vit, tmp_path)
        trainer.train()
        trainer.reference.restore(tiny_vit)
        with torch.no_grad():
            tiny_vit.classifier.bias[3] -= 50
        assert trainer.utility() == pytest.approx(0, abs=1e-5)
        with torch.no_grad():
            tiny_vit.classifier.bias[4] -= 50
        assert trainer.utility() > 0.01

    def test_remembered_is_accuracy_above_the_target(self, tiny_vit, tmp_path):
        answers = tiny_vit(pixel_values=images(6, [3])["pixel_values"][:]).logits.argmax(-1).tolist()
        forget = (
            images(6, [3])
            .remove_columns("labels")
            .add_column("labels", answers[:4] + [(a + 1) % 10 for a in answers[4:]])
        )
        args = arguments(tmp_path, forget_accuracy=0.25)
        trainer = UnlearnTrainer(tiny_vit, args, forget_dataset=forget)
        assert trainer.remembered() == pytest.approx(4 / 6 - 0.25)
        args = copy.deepcopy(args)
        args.guard_examples = 4
        trainer = UnlearnTrainer(tiny_vit, args, forget_dataset=forget)
        known = [row < 4 for row in drawn(6, 4)]
        assert trainer.remembered() == pytest.approx(sum(known) / 4 - 0.25)

    def test_a_sorted_dataset_is_not_seen_by_its_first_class_only(self, tiny_vit, tmp_path):
        answers = tiny_vit(pixel_values=images(40, [3])["pixel_values"][:]).logits.argmax(-1).tolist()
        labels = answers[:20] + [(a + 1) % 10 for a in answers[20:]]  # the first half is known, the second is not
        forget = images(40, [3]).remove_columns("labels").add_column("labels", labels)
        args = arguments(tmp_path, guard_examples=20, forget="examples", forget_loss="ascent")
        trainer = UnlearnTrainer(tiny_vit, args, forget_dataset=forget)
        seen = torch.cat([batch["labels"] for batch in trainer._batches(trainer.forget_dataset, 20)])
        assert seen.tolist() == [labels[row] for row in drawn(40, 20)]
        assert 4 <= sum(row < 20 for row in drawn(40, 20)) <= 16

    def test_says_when_there_was_nothing_to_forget(self, tiny_vit, tmp_path, caplog):
        answers = tiny_vit(pixel_values=images(8, [3])["pixel_values"][:]).logits.argmax(-1).tolist()
        never = next(label for label in range(10) if label not in answers)
        args = arguments(tmp_path, guard=True, guard_steps=1, learning_rate=1e-4)
        trainer = UnlearnTrainer(tiny_vit, args, forget_dataset=images(8, [never]))
        with caplog.at_level(logging.WARNING, "hf_unlearn"):
            trainer.train()
        assert any("id2label" in record.getMessage() for record in caplog.records)
        assert "Nothing was there to forget" in trainer.failed_checks[0]
        assert "Nothing was there to forget" in trainer.model_card(tmp_path).content

    def test_a_target_that_was_not_reached_is_on_the_card(self, tiny_vit, tmp_path):
        answers = tiny_vit(pixel_values=images(8, [3])["pixel_values"][:]).logits.argmax(-1).tolist()
        common = max(set(answers), key=answers.count)
        args = arguments(tmp_path, guard=True, guard_steps=1, learning_rate=1e-6)
        trainer = UnlearnTrainer(tiny_vit, args, forget_dataset=images(8, [common]))
        trainer.train()
        (failed,) = trainer.failed_checks
        assert failed.startswith("The forget target was not reached")
        assert failed in trainer.model_card(tmp_path).content
        assert trainer.provenance().steps == trainer.guard.best.step

    def test_looking_changes_neither_weights_nor_random_state_nor_modes(self, tiny_resnet, tmp_path):
        trainer = self.trainer(tiny_resnet, tmp_path)
        trainer.train()
        tiny_resnet.train()
        tiny_resnet.classifier.eval()
        modes = [module.training for module in tiny_resnet.modules()]
        before, state = weights(tiny_resnet), torch.get_rng_state()
        trainer.remembered(), trainer.utility()
        assert same(before, weights(tiny_resnet))
        assert torch.equal(state, torch.get_rng_state())
        assert modes == [module.training for module in tiny_resnet.modules()]
