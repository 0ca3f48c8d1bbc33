"""What is left without a prompt when a concept is gone: against mixtures whose parts are known, and against stock calls."""

import pytest
import torch
from text_to_image_data import tiny
from torch.testing import assert_close
from vdu_data import prompted_arguments

from hf_unlearn import VDUTrainer
from hf_unlearn.modes import seeded_generator
from hf_unlearn.unlearning.diffusion.unprompted import concept_share, without_concept


SHAPE = (4, 3, 5, 5)


def drawn(*seeds):
    return [torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]


class TestTheTarget:
    @pytest.mark.parametrize("scale", [1.5, 7.5, 30.0])
    def test_guided_it_is_the_originals_for_the_anchor(self, scale):
        unprompted, concept, instead = drawn(0, 1, 2)
        told, untold = without_concept(unprompted, concept, instead, scale)
        assert (untold - unprompted).abs().max() > 0.1
        assert_close(untold + scale * (told - untold), unprompted + scale * (instead - unprompted))

    def test_of_a_mixture_the_part_of_the_concept_becomes_the_anchors(self):
        """Of answers that all differ from each other alike: ε(∅) = Σ p_k ε_k, and q is how much more probable the concept is than the anchor."""
        directions = torch.linalg.qr(drawn(3)[0].reshape(12, 25).T)[0].T.reshape(12, 1, 5, 5)
        probabilities = torch.tensor([[0.1] * 10, [0.7] + [0.3 / 9] * 9, [1.0] + [0.0] * 9, [0.0, 0.6] + [0.05] * 8])
        answers = directions[:10]
        unprompted = torch.einsum("bk,kchw->bchw", probabilities.double(), answers)
        concept, instead = (answers[k].expand_as(unprompted) for k in (0, 1))
        expected = (probabilities[:, 0] - probabilities[:, 1]).clamp(min=0).double()
        assert_close(concept_share(unprompted, concept, instead).flatten(), expected, atol=1e-7, rtol=0)
        _, untold = without_concept(unprompted, concept, instead, 7.5)
        parts = torch.einsum("bchw,kchw->bk", untold, answers)
        moved = torch.zeros(4, 10, dtype=torch.float64)
        moved[:, 0], moved[:, 1] = -expected, expected
        assert_close(parts, probabilities.double() + moved, atol=1e-7, rtol=0)
        # What was certain of the concept is now certain of the anchor.
        assert_close(parts[2], torch.eye(10, dtype=torch.float64)[1], atol=1e-7, rtol=0)

    def test_where_concept_and_anchor_are_one_nothing_changes(self):
        unprompted, concept = drawn(0, 1)
        told, untold = without_concept(unprompted, concept, concept.clone(), 7.5)
        assert torch.equal(untold, unprompted)
        assert torch.equal(told, concept)


def trainer_of(tmp_path, **values):
    args = {"concept": {"cat": "dog"}, "forget_prompts": ["a photo of a cat", "a red cat"], "own_samples": 4}
    return VDUTrainer(pipeline=tiny("sd"), args=prompted_arguments(tmp_path, **(args | values)))


class TestTheTrainer:
    def test_some_images_are_shown_without_words(self, tmp_path):
        """Each row's target by stock calls of the original, and the student is asked accordingly."""
        trainer = trainer_of(tmp_path, learning_rate=0.0, max_steps=1, closed_form=False)
        trainer.train()
        pipeline, original = trainer.pipeline, tiny("sd").unet
        rows = [trainer.forget_dataset[row % len(trainer.forget_dataset)] for row in range(24)]
        batch = trainer.prepared(trainer.data_collator(rows), seeded_generator("cpu", 5))
        untold = batch["untold"]
        assert 0 < untold.sum() < 24
        empty, _ = pipeline.encode_prompt([""], "cpu", 1, False)
        with torch.no_grad():
            told = {
                "c": batch["conditioning"]["encoder_hidden_states"],
                "a": batch["neutral"]["encoder_hidden_states"],
                "": empty.expand(24, -1, -1),
            }
            found = {
                name: original(batch["noisy"], batch["timesteps"], encoder_hidden_states=states).sample
                for name, states in told.items()
            }
            with_words, without = without_concept(found[""], found["c"], found["a"], 7.5)
            target = torch.where(untold.view(-1, 1, 1, 1), without, with_words)
            assert_close(trainer.answer_without(batch), target, rtol=1e-4, atol=1e-5)
            asked = torch.where(untold.view(-1, 1, 1), told[""], told["c"])
            answer = original(batch["noisy"], batch["timesteps"], encoder_hidden_states=asked).sample
            weights = trainer.schedule.weights(batch["timesteps"], "min_snr", trainer.args.snr_gamma)
            expected = weights * (answer - target).square().mean((1, 2, 3))
            assert_close(trainer.forget_loss(trainer.model, batch), expected, rtol=1e-3, atol=1e-6)

    def test_what_is_kept_is_held_without_words_too(self, tmp_path):
        """A student that has changed its answer to nothing alone has lost something of what is kept."""
        trainer = trainer_of(tmp_path, learning_rate=0.0, max_steps=1, closed_form=False)
        trainer.train()
        forget = trainer.data_collator([trainer.forget_dataset[row % 4] for row in range(24)])
        batch = trainer.replay_inputs(trainer.prepared(forget, seeded_generator("cpu", 1)), seeded_generator("cpu", 2))
        empty = trainer._empty["encoder_hidden_states"]

        def student(*args, encoder_hidden_states, **kwargs):
            answer = trainer.model(*args, encoder_hidden_states=encoder_hidden_states, **kwargs)
            nothing = (encoder_hidden_states == empty).flatten(1).all(1)
            answer.sample = answer.sample + nothing.view(-1, 1, 1, 1)
            return answer

        with torch.no_grad():
            losses = trainer.replay_loss(student, batch)
        assert 0 < batch["untold"].sum() < 24
        weights = trainer.schedule.weights(batch["timesteps"], "min_snr", trainer.args.snr_gamma)
        assert_close(losses, batch["untold"] * weights, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(
        "values", [{"guidance_scale": 1.0}, {"negative_guidance": 0.0}, {"negative_guidance": 0.5}]
    )
    def test_is_left_as_it_is_without_guidance_or_when_told_how_far(self, tmp_path, values):
        trainer = trainer_of(tmp_path, **values)
        assert "untold" not in trainer.prepared(
            trainer.data_collator([trainer.forget_dataset[0]]), seeded_generator("cpu", 1)
        )
