"""Which state of a GAN is kept: the best checkpoint comes back, and a collapse of before is no reason to stop."""

from pathlib import Path

import pytest
from gan_data import Watch, arguments, images, own_images, pipeline, players, same, weights

from hf_unlearn import GANPipeline, GANTrainer


@pytest.mark.parametrize("greater", [False, None], ids=["told", "known of the distance"])
def test_the_best_comes_back(tmp_path, greater):
    """The data are what the model draws before the first step, so training makes it worse. Transformers takes anything that
    is not called a loss for a score.
    """
    pipe = pipeline()
    data, seen = own_images(pipe, 40), {}
    args = arguments(
        tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, max_steps=4,
        load_best_model_at_end=True, metric_for_best_model="eval_fid", learning_rate=0.02, greater_is_better=greater,
    )  # fmt: skip
    look = Watch(lambda event, step: event == "begin" and seen.update({step: players(trainer)}))
    trainer = GANTrainer(pipe, args, train_dataset=images(), eval_dataset=data, callbacks=[look])
    trainer.train()
    figures = {log["step"]: log["eval_fid"] for log in trainer.state.log_history if "eval_fid" in log}
    best = min(figures, key=figures.get)
    assert best < 4  # or there would be nothing to load
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{best}"
    assert same(players(trainer), seen[best])
    assert trainer.evaluate()["eval_fid"] == pytest.approx(figures[best], rel=1e-6)
    assert same(weights(trainer.pipeline.generator), weights(trainer.averaged))
    trainer.save_model()
    loaded = weights(GANPipeline.from_pretrained(tmp_path).generator)
    averaged = {name[9:]: value for name, value in seen[best].items() if name.startswith("averaged.")}
    assert same(loaded, averaged)


def test_trained_again_after_a_collapse(tmp_path):
    """The same trainer goes on from a checkpoint of before: what collapsed later is no reason to stop now."""
    args = arguments(
        tmp_path, save_strategy="steps", save_steps=2, max_steps=6, guard=True, guard_steps=1, learning_rate=1e-4
    )

    def look(event, step):
        if (event, step) == ("end", 3) and not done:
            done.append(step)
            for player in (trainer.model.generator, trainer.averaged):
                for parameter in player.parameters():
                    parameter.data.zero_()

    done = []
    trainer = GANTrainer(pipeline(), args, train_dataset=own_images(pipeline()), callbacks=[Watch(look)])
    trainer.train()
    assert trainer.guard.collapsed.step == trainer.state.global_step == 3
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 6
    assert trainer.guard.collapsed is None
