"""What the guard remembers of a run that was broken off."""

import shutil

import pytest
from image_data import arguments, images, same, weights

from hf_unlearn import UnlearnTrainer


class Stops(UnlearnTrainer):
    """Forgotten at step 2; from then on utility falls."""

    def remembered(self):
        return 2.0 - self.state.global_step

    def utility_drop(self, baseline):
        return 0.001 * self.state.global_step


@pytest.fixture
def run(tiny_vit, tmp_path):
    def run(resume=None):
        settings = {
            "guard": True, "guard_steps": 1, "guard_patience": 2, "max_steps": 10, "save_strategy": "steps",
            "save_steps": 1, "learning_rate": 0.05,
        }  # fmt: skip
        trainer = Stops(tiny_vit, arguments(tmp_path, **settings), forget_dataset=images(4, [3]))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def test_goes_on(run, tiny_vit, tmp_path, caplog):
    first = run()
    end, state = weights(tiny_vit), first.guard.state
    assert (first.state.global_step, first.guard.best.step) == (4, 2)
    again = run(resume=True)  # a run that it had stopped stays stopped
    assert again.guard.state == state
    assert same(weights(tiny_vit), end)
    shutil.rmtree(tmp_path / "checkpoint-4")  # patience is counted on
    again = run(resume=True)
    assert [look.step for look in again.guard.looks] == [0, 1, 2, 3, 4]
    assert same(weights(tiny_vit), end)
    shutil.rmtree(tmp_path / "_private" / "guard")
    with caplog.at_level("WARNING", "hf_unlearn"):  # without the best state's file the last state is kept
        run(resume=True)
    assert "step 2, is gone" in caplog.text
