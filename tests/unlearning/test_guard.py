import json
import logging

import pytest
import torch
from image_data import arguments, images, same, weights
from safetensors.torch import load_file

from hf_unlearn import UnlearnTrainer
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
        folder = self.private_dir / "guard"
        self.files = getattr(self, "files", {}) | {self.state.global_step: {path.name for path in folder.glob("*")}}
        return self.script[self.state.global_step][0]

    def utility_drop(self, baseline):
        return self.script[self.state.global_step][1]


def drawn(total, limit, seed=42):
    """The rows that a look takes: at most `limit`, by the seed of the run, in their order."""
    return sorted(torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:limit].tolist())


def scripted(model, tmp_path, script, **values):
    trainer_class = type("Scripted", (Scripted,), {"script": dict(enumerate(script))})
    settings = {"guard_steps": 1, "max_steps": len(script) - 1, "learning_rate": 0.01, "utility_tolerance": 0.1}
    args = arguments(tmp_path, guard=True, **settings | values)
    trainer = trainer_class(model, args, forget_dataset=images(4, [3]))
    trainer.train()
    return trainer


def guard_file(folder, step):
    saved = load_file(folder / "_private" / "guard" / f"step-{step}.safetensors")
    return {name.split("/", 1)[1]: value for name, value in saved.items()}


def guard_files(folder):
    return {path.name for path in (folder / "_private" / "guard").iterdir()}


def test_a_collapse_ends_early_in_the_best_kept_state(digits_classifier, digits_parts, tmp_path):
    """Ascent at a learning rate that destroys the model; the statistics of BatchNorm are restored with the weights."""
    args = arguments(
        tmp_path, forget_loss="ascent", optim="adamw_torch", learning_rate=3e-3, max_steps=60, guard=True, bn="train",
        guard_steps=2, per_device_train_batch_size=32, guard_examples=128, max_grad_norm=1.0,
    )  # fmt: skip
    trainer = Keeper(
        digits_classifier, args, forget_dataset=digits_parts["forget"], processing_class=digits_processor(),
        eval_dataset={"retain": digits_parts["retain"]},
    )  # fmt: skip
    trainer.train()
    looks, best = trainer.guard.looks, trainer.guard.best
    assert looks[-1].utility_drop > 0.1  # it did collapse
    assert trainer.state.global_step < 60
    assert best.kept
    assert best == max(looks, key=lambda look: look.rank)
    assert best.step < looks[-1].step
    assert same(weights(digits_classifier), trainer.seen[best.step])
    assert same(guard_file(tmp_path, best.step), trainer.seen[best.step])
    (statistics, *_) = [name for name in trainer.seen[0] if "running_mean" in name]
    assert not torch.equal(trainer.seen[0][statistics], trainer.seen[2][statistics])

    kept = digits_parts["retain"].select(drawn(len(digits_parts["retain"]), 128))
    batch = RawCollator(digits_processor(), "image")(list(kept))
    with torch.no_grad():
        right = digits_classifier.eval()(batch["pixel_values"]).logits.argmax(-1) == batch["labels"]
    drop = trainer.guard.state.baseline - right.float().mean().item()
    assert drop == pytest.approx(best.utility_drop, abs=1.5 / 128)  # rounding may turn a picture, not two


class TestDecisions:
    def test_rank(self):
        kept = [Look(0, *look, True) for look in ((0.9, 0.0), (0.4, 0.02), (0.0, 0.02), (-0.2, 0.01))]
        lost = [Look(0, 0.5, 0.3, False), Look(0, -0.1, 0.2, False)]
        assert sorted([kept[1], lost[0], kept[3], kept[0], lost[1], kept[2]], key=lambda look: look.rank)[2:] == kept

    @pytest.mark.parametrize(
        ("script", "patience", "stops", "best"),
        [
            # Of the forgotten ones the best.
            ([(0.9, 0.0), (0.0, 0.02), (0.0, 0.01), (0.0, 0.015), (0.5, 0.0)], 10, 4, 2),
            # What fell below tolerance and came back counts.
            ([(0.9, 0.0), (0.0, 0.3), (0.0, 0.2), (0.0, 0.05), (0.0, 0.06)], 10, 4, 3),
            # Patience counts looks that bring nothing,
            ([(0.9, 0.0), (0.5, 0.0), (0.0, 0.02)] + [(0.0, 0.05)] * 5, 1, 3, 2),
            ([(0.9, 0.0), (0.5, 0.0), (0.0, 0.02)] + [(0.0, 0.05)] * 5, 3, 5, 2),
            # and from the beginning after a gain.
            ([(0.9, 0.0), (0.0, 0.05), (0.0, 0.06), (0.0, 0.04), (0.0, 0.05), (0.0, 0.05), (0.0, 0.0)], 2, 5, 3),
            # On the way it does not stop.
            ([(0.9, 0.0), (0.8, 0.05), (0.9, 0.05), (0.85, 0.05), (0.9, 0.05), (0.88, 0.05)], 1, 5, 1),
            # Out of tolerance it does.
            ([(0.9, 0.0), (0.8, 0.2), (0.7, 0.2), (0.6, 0.2)], 2, 2, 0),
            # Without a target the latest kept state is the best, and there is time to regain utility.
            ([(float("inf"), drop) for drop in (0.0, 0.05, 0.2, 0.3, 0.06, 0.2)], 1, 5, 4),
        ],
    )
    def test_where_it_stops_and_what_it_restores(self, script, patience, stops, best, tiny_vit, tmp_path):
        trainer = scripted(tiny_vit, tmp_path, script, guard_patience=patience)
        assert (trainer.state.global_step, trainer.guard.best.step) == (stops, best)
        assert same(weights(tiny_vit), guard_file(tmp_path, best))
        assert guard_files(tmp_path) == {f"step-{best}.safetensors"}  # one is left

    def test_a_restored_state_is_what_is_saved(self, tiny_vit, tmp_path):
        trainer = scripted(tiny_vit, tmp_path, [(0.9, 0.0), (0.0, 0.0), (0.0, 0.5)])
        trainer.save_model()
        assert same(weights(type(tiny_vit).from_pretrained(tmp_path)), guard_file(tmp_path, 1))

    @pytest.mark.parametrize(
        ("script", "patience", "said"),
        [
            ([(0.9, 0.0), (0.3, 0.2), (0.0, 0.5)], 10,
             "restored step 0 of 2: utility drop 0 (tolerance 0.1), 0.9 above the forget target"),
            ([(0.9, 0.0), (0.8, 0.2), (0.7, 0.2), (0.6, 0.2)], 2, "ended the run at step 2 of 3 (2 looks: too low a utility) and "
             "restored step 0 of 2: utility drop 0 (tolerance 0.1), 0.9 above the forget target"),
            ([(0.9, 0.0), (0.0, 0.05), (0.0, 0.06), (0.0, 0.0)], 1, "ended the run at step 2 of 3 (1 looks: no gain) and restored "
             "step 1 of 2: utility drop 0.05 (tolerance 0.1), 0 above the forget target"),
            ([(float("inf"), drop) for drop in (0.0, 0.05, 0.2)], 1,
             "restored step 1 of 2: utility drop 0.05 (tolerance 0.1)"),
            ([(0.9, 0.0), (0.0, 0.05), (0.0, 0.0)], 5, None),
        ],
    )  # fmt: skip
    def test_whatever_it_does_it_says(self, script, patience, said, tiny_vit, tmp_path, caplog):
        with caplog.at_level(logging.WARNING, "hf_unlearn.unlearning.guard"):
            trainer = scripted(tiny_vit, tmp_path, script, guard_patience=patience)
        messages = [r.getMessage() for r in caplog.records if r.name == "hf_unlearn.unlearning.guard"]
        assert messages == ([] if said is None else [f"the guard {said}"])
        best = trainer.guard.best
        assert any(failed.startswith("Nothing was unlearned") for failed in trainer.failed_checks) == (best.step == 0)
        missing = f"The forget target was not reached: {best.remembered:.3g} accuracy"
        assert any(failed.startswith(missing) for failed in trainer.failed_checks) == (0 < best.remembered < 1)

    def test_once_per_epoch_by_default_and_at_the_end(self, tiny_vit, tmp_path):
        args = arguments(tmp_path, guard=True, max_steps=8, learning_rate=1e-3)
        trainer = UnlearnTrainer(tiny_vit, args, forget_dataset=images(12, [3]))
        trainer.train()
        assert [look.step for look in trainer.guard.looks] == [0, 3, 6, 8]

    def test_with_checkpoints_what_the_last_one_needs_is_left(self, tiny_vit, tmp_path):
        script = [(0.9, 0.0), (0.0, 0.05), (0.0, 0.04), (0.0, 0.03), (0.0, 0.02), (0.0, 0.05), (0.0, 0.0)]
        trainer = scripted(tiny_vit, tmp_path, script, save_strategy="steps", save_steps=3, guard_patience=1)
        assert (trainer.state.global_step, trainer.guard.best.step) == (5, 4)
        # checkpoint-3 would go back to the first; that of the end, which is written in its place, to the other
        assert trainer.files[5] == {"step-3.safetensors", "step-4.safetensors"}
        assert guard_files(tmp_path) == {"step-4.safetensors"}

    def test_state_survives_json(self):
        looks = [Look(0, 0.9, 0.0, True), Look(3, float("inf"), 0.1, False)]
        for state in (GuardState(0.97, looks[0], 2, looks), GuardState()):
            assert GuardState.from_json(json.loads(json.dumps(state.to_json()))) == state

    def test_a_second_run_of_the_same_trainer_starts_its_own_looks(self, tiny_vit, tmp_path):
        args = arguments(tmp_path, guard=True, guard_steps=1, learning_rate=1e-3, max_steps=3)
        parts = {"retain": images(20, [1, 2], seed=1)}
        trainer = UnlearnTrainer(tiny_vit, args, forget_dataset=images(4, [3]), eval_dataset=parts)
        trainer.train()
        baseline = trainer.guard.state.baseline
        trainer.train()
        assert [look.step for look in trainer.guard.looks] == [0, 1, 2, 3]
        assert trainer.guard.state.baseline == baseline


def answers(model, dataset):
    with torch.no_grad():
        return model(pixel_values=dataset["pixel_values"][:]).logits.argmax(-1)


def with_labels(dataset, labels):
    return dataset.remove_columns("labels").add_column("labels", labels)


class TestUtility:
    def trainer(self, model, tmp_path, **data):
        return UnlearnTrainer(model, arguments(tmp_path), forget_dataset=images(6, [3]), **data)

    def test_is_accuracy_on_retained_evaluation_data_else_on_retained_training_data(self, tiny_vit, tmp_path):
        forget, evaluated, retain = (images(n, [6], seed=n) for n in (3, 10, 8))
        said = answers(tiny_vit, evaluated).tolist()
        evaluated = with_labels(evaluated, said[:7] + [(a + 1) % 10 for a in said[7:]])
        retain = with_labels(retain, [0 if a == 3 else a for a in answers(tiny_vit, retain).tolist()])
        share = (answers(tiny_vit, retain) == retain["labels"][:]).float().mean().item()
        for parts, expected in (({"retain": evaluated, "forget": forget}, 0.7), ({"forget": forget}, share)):
            trainer = self.trainer(tiny_vit, tmp_path, eval_dataset=parts, retain_dataset=retain)
            assert (trainer.utility_kind, trainer.utility_tolerance) == ("accuracy", 0.02)
            assert trainer.utility() == pytest.approx(expected)
            assert trainer.utility_drop(0.75) == pytest.approx(0.75 - expected)

    def test_is_else_divergence_over_the_other_classes(self, tiny_vit, tmp_path):
        trainer = self.trainer(tiny_vit, tmp_path)
        trainer.train()
        assert (trainer.utility_kind, trainer.utility_tolerance) == ("divergence", 0.5)
        assert trainer.utility() == pytest.approx(trainer.utility(), rel=1e-4)  # the same replay inputs at every look
        assert trainer.utility_drop(0.25) == pytest.approx(trainer.utility() - 0.25, rel=1e-4)
        assert trainer.utility() > 1e-4
        trainer.reference.restore(tiny_vit)
        assert trainer.utility() == pytest.approx(0, abs=1e-6)
        with torch.no_grad():
            tiny_vit.classifier.bias[3] -= 50
            assert trainer.utility() == pytest.approx(0, abs=1e-5)
            tiny_vit.classifier.bias[4] -= 50
        assert trainer.utility() > 0.01

    def test_remembered_is_accuracy_above_the_target_of_rows_drawn_from_everywhere(self, tiny_vit, tmp_path):
        said = answers(tiny_vit, images(40, [3])).tolist()
        forget = with_labels(
            images(40, [3]), said[:20] + [(a + 1) % 10 for a in said[20:]]
        )  # sorted: the first half is known
        known = sum(row < 20 for row in drawn(40, 16))
        assert 3 <= known <= 13
        for limit, expected in ((512, 0.5), (16, known / 16)):
            args = arguments(tmp_path, forget_accuracy=0.25, guard_examples=limit)
            trainer = UnlearnTrainer(tiny_vit, args, forget_dataset=forget)
            assert trainer.remembered() == pytest.approx(expected - 0.25)

    def test_says_when_there_was_nothing_to_forget_or_the_target_was_not_reached(self, tiny_vit, tmp_path, caplog):
        said = answers(tiny_vit, images(8, [3])).tolist()
        never = next(label for label in range(10) if label not in said)
        common = max(set(said), key=said.count)
        for label, failure, warned in (
            (never, "Nothing was there to forget", True),
            (common, "The forget target was not", False),
        ):
            args = arguments(tmp_path, guard=True, guard_steps=1, learning_rate=1e-6)
            trainer = UnlearnTrainer(tiny_vit, args, forget_dataset=images(8, [label]))
            caplog.clear()
            with caplog.at_level(logging.WARNING, "hf_unlearn"):
                trainer.train()
            assert any("id2label" in record.getMessage() for record in caplog.records) == warned
            (failed,) = trainer.failed_checks
            assert failed.startswith(failure)
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
