"""What is left without a prompt when a concept is gone: against mixtures whose parts are known, and against stock calls."""

import copy

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
    def test_of_a_mixture_the_part_of_the_concept_becomes_the_anchors(self):
        """Of answers that all differ from each other alike: ε(∅) = Σ p_k ε_k, and q is how much more probable the concept is than the anchor."""
        directions = torch.linalg.qr(drawn(3)[0].reshape(12, 25).T)[0].T.reshape(12, 1, 5, 5)
        probabilities = torch.tensor([[0.1] * 10, [0.7] + [0.3 / 9] * 9, [1.0] + [0.0] * 9, [0.0, 0.6] + [0.05] * 8])
        answers = directions[:10]
        unprompted = torch.einsum("bk,kchw->bchw", probabilities.double(), answers)
        concept, instead = (answers[k].expand_as(unprompted) for k in (0, 1))
        expected = (probabilities[:, 0] - probabilities[:, 1]).clamp(min=0).double()
        assert_close(concept_share(unprompted, concept, instead).flatten(), expected, atol=1e-7, rtol=0)
        untold = without_concept(unprompted, concept, instead)
        parts = torch.einsum("bchw,kchw->bk", untold, answers)
        moved = torch.zeros(4, 10, dtype=torch.float64)
        moved[:, 0], moved[:, 1] = -expected, expected
        assert_close(parts, probabilities.double() + moved, atol=1e-7, rtol=0)
        # What was certain of the concept is now certain of the anchor.
        assert_close(parts[2], torch.eye(10, dtype=torch.float64)[1], atol=1e-7, rtol=0)

    def test_where_concept_and_anchor_are_one_nothing_changes(self):
        unprompted, concept = drawn(0, 1)
        assert torch.equal(without_concept(unprompted, concept, concept.clone()), unprompted)


def trainer_of(tmp_path, **values):
    args = {"concept": {"cat": "dog"}, "forget_prompts": ["a photo of a cat", "a red cat"], "own_samples": 4}
    return VDUTrainer(pipeline=tiny("sd"), args=prompted_arguments(tmp_path, **(args | values)))


def begun(tmp_path, **values):
    """A trainer that knows its original, its model moved away from it; and a function that asks a U-Net."""
    trainer = trainer_of(tmp_path, learning_rate=0.0, max_steps=1, closed_form=False, **values)
    trainer.train()
    moved = copy.deepcopy(trainer.model)
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if ".attn2." in name:
                weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=seeded_generator("cpu", 9))

    @torch.no_grad()
    def ask(unet, batch, states):
        return unet(
            batch["noisy"], batch["timesteps"], encoder_hidden_states=states.expand(len(batch["noisy"]), -1, -1)
        ).sample

    return trainer, moved, ask


class TestTheTrainer:
    def test_each_image_is_shown_with_words_and_without(self, tmp_path):
        """The loss by stock calls: ε*(∅) of the original, and its guided answer to the anchor."""
        trainer, original, ask = begun(tmp_path)
        rows = [trainer.forget_dataset[row % len(trainer.forget_dataset)] for row in range(6)]
        batch = trainer.prepared(trainer.data_collator(rows), seeded_generator("cpu", 5))
        empty, _ = trainer.pipeline.encode_prompt([""], "cpu", 1, False)
        concept, anchor = (batch[name]["encoder_hidden_states"] for name in ("conditioning", "neutral"))
        nothing, c, a = (ask(original, batch, states) for states in (empty, concept, anchor))
        told, untold = ask(trainer.model, batch, concept), ask(trainer.model, batch, empty)
        guided = 7.5 * (told - a) - 6.5 * (untold - nothing)
        apart = (untold - without_concept(nothing, c, a)).square() + guided.square() / 7.5**2
        weights = trainer.schedule.weights(batch["timesteps"], "min_snr", trainer.args.snr_gamma)
        expected = weights * apart.mean((1, 2, 3)) / 2
        assert expected.min() > 1e-5
        assert_close(trainer.forget_loss(trainer.model, batch).detach(), expected, rtol=1e-3, atol=1e-7)
        trainer.args.forget_sum = True  # over images, timesteps and numbers of a latent
        every = len(trainer.forget_dataset) * len(trainer.schedule) * batch["clean"][0].numel()
        assert_close(trainer.forget_loss(trainer.model, batch).detach(), every * expected, rtol=1e-3, atol=0)

    def test_what_is_kept_is_held_with_words_and_without(self, tmp_path):
        trainer, original, ask = begun(tmp_path)
        forget = trainer.data_collator([trainer.forget_dataset[row % 4] for row in range(6)])
        batch = trainer.replay_inputs(trainer.prepared(forget, seeded_generator("cpu", 1)), seeded_generator("cpu", 2))
        empty, _ = trainer.pipeline.encode_prompt([""], "cpu", 1, False)
        prompt = batch["conditioning"]["encoder_hidden_states"]
        told, untold = (ask(trainer.model, batch, states) - ask(original, batch, states) for states in (prompt, empty))
        apart = untold.square() + (7.5 * told - 6.5 * untold).square() / 7.5**2
        weights = trainer.schedule.weights(batch["timesteps"], "min_snr", trainer.args.snr_gamma)
        expected = weights * apart.mean((1, 2, 3)) / 2
        assert expected.min() > 1e-5
        assert_close(trainer.replay_loss(trainer.model, batch).detach(), expected, rtol=1e-3, atol=1e-7)

    @pytest.mark.parametrize(
        ("values", "weight"),
        [({}, 4), ({"guidance_scale": 1.0}, 1), ({"negative_guidance": 0.0}, 1), ({"replay_weight": 2.0}, 2)],
    )
    def test_replay_weighs_more_where_guidance_multiplies_what_is_lost(self, values, weight, tmp_path):
        assert begun(tmp_path, **values)[0].replay_weight == weight

    @pytest.mark.parametrize("values", [{"guidance_scale": 1.0}, {"negative_guidance": 0.0}])
    def test_without_guidance_or_with_an_eta_words_alone_are_redirected(self, tmp_path, values):
        trainer, original, ask = begun(tmp_path, **values)
        batch = trainer.prepared(trainer.data_collator([trainer.forget_dataset[0]]), seeded_generator("cpu", 1))
        concept, anchor = (batch[name]["encoder_hidden_states"] for name in ("conditioning", "neutral"))
        weights = trainer.schedule.weights(batch["timesteps"], "min_snr", trainer.args.snr_gamma)
        apart = (ask(trainer.model, batch, concept) - ask(original, batch, anchor)).square().mean((1, 2, 3))
        assert_close(trainer.forget_loss(trainer.model, batch).detach(), weights * apart, rtol=1e-3, atol=1e-7)
