"""VDU on prompts: what follows from a concept, the closed form as its first act, and how that is judged."""

import logging

import pytest
import torch
from text_to_image_data import tiny
from vdu_data import prompted_arguments, rows

from hf_unlearn import VDUTrainer, redirect_concept
from hf_unlearn.unlearning.diffusion.concept import common_phrase
from hf_unlearn.unlearning.diffusion.pipelines import text_side_of
from hf_unlearn.unlearning.diffusion.wordings import neighbours, templates_for


WANTED = {"cat": "horse"}
ASKED = ["a photo of a cat", "a cat in the rain", "cat"]


def trainer_of(pipeline, folder, marker=None, forget=None, **values):
    plain = {"concept": WANTED, "max_steps": 2, "replay_prompts": None, "closed_form": None}
    args = prompted_arguments(folder, **(plain | values))
    return VDUTrainer(pipeline=pipeline, args=args, marker=marker, forget_dataset=forget)


def cross_attention(pipeline):
    return {layer.name: layer.linear.weight.detach().clone() for layer in text_side_of(pipeline).layers}


class TestTheConceptOfPrompts:
    @pytest.mark.parametrize(
        ("prompts", "phrase"),
        [
            (["a red three on white", "Three, painted blue over black"], "three"),
            (["a painting in the style of Van Gogh", "Van Gogh, starry night", "a portrait by van Gogh"], "Van Gogh"),
            (["a photo of a dog"], "dog"),
            (["a photo of an old dog", "an old dog's photo, in a dog house", "old dog"], "old dog"),
            (["a dog's photo", "the dog's portrait"], "dog"),
            (["a photo", "a picture"], None),
            (["one two", "three four"], None),
            ([], None),
        ],
    )
    def test_is_the_longest_phrase_in_common(self, prompts, phrase):
        assert common_phrase(prompts) == phrase


class TestWhatFollows:
    def test_of_one_word(self, tmp_path):
        """Wordings, what they are answered as, what is kept, how far beyond, and which weights: none of it has to be said."""
        args = prompted_arguments(tmp_path, concept="cat", replay_prompts=None, closed_form=None)
        trainer = VDUTrainer(pipeline=tiny("sd"), args=args)
        settled = trainer.args
        (anchor,) = settled.concept.values()
        assert len(settled.forget_prompts) >= 10
        instead = settled.redirected(settled.forget_prompts)
        for prompt, other in zip(settled.forget_prompts, instead, strict=True):
            words, others = prompt.replace(",", "").split(), other.replace(",", "").split()
            assert {"cat", anchor} == (set(words) ^ set(others)) - {"a", "an"}
        assert (settled.closed_form, settled.negative_guidance) == (True, None)
        assert {"cat", "cats"}.isdisjoint(" ".join(settled.replay_prompts).split())
        assert set(settled.replay_prompts[::3]) == set(instead)
        assert set(settled.replay_prompts[1::3]) == set(neighbours(["cat"]))
        assert not set(settled.replay_prompts[2::3]) <= {*instead, *neighbours(["cat"])}
        assert all(".attn2." in name for name, p in trainer.model.named_parameters() if p.requires_grad)
        assert (args.concept, args.forget_prompts, args.redirect_prompt, args.trainable) == ("cat", None, None, None)

    def test_of_the_prompts_of_images(self, tmp_path, caplog):
        images = rows(torch.rand(4, 3, 8, 8) - 0.2, prompt="a photo of a cat")
        with caplog.at_level(logging.INFO, "hf_unlearn"):
            trainer = trainer_of(tiny("sd"), tmp_path, forget=images, concept=None)
        assert list(trainer.args.concept) == ["cat"]
        assert "concept: 'cat', which all prompts to forget name" in caplog.text
        assert trainer.args.forget_prompts is None

    def test_what_the_user_says_comes_first(self, tmp_path):
        given = {
            "redirect_prompt": "a thing",
            "negative_guidance": 0.25,
            "replay_prompts": ["a dog"],
            "trainable": ["all"],
        }
        trainer = trainer_of(tiny("sd"), tmp_path, forget_prompts=ASKED, **given)
        assert {name: getattr(trainer.args, name) for name in given} == given
        assert all(parameter.requires_grad for parameter in trainer.model.parameters())

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"forget_prompts": ["a photo of a dog"]}, "forget_prompts: 'a photo of a dog' does not name 'cat'; "),
            ({"concept": {"cat": "cats"}}, "anchor='cats': names 'cats', which is to be forgotten; "),
            ({"closed_form": True, "trainable": ["lora"]}, "closed_form: changes the layers that read words"),
            ({"closed_form": True, "trainable": ["conv_out*"]}, "closed_form: changes the layers that read words"),
            ({"concept": None, "closed_form": True, "forget_prompts": ["one cat", "two dogs"]}, "closed_form: needs a concept; "),
            ({"forget_loss": "ascent"}, "concept: is of forget_loss='redirect', not of 'ascent'; "),
        ],
    )  # fmt: skip
    def test_refused(self, tmp_path, values, message):
        with pytest.raises(ValueError) as refused:
            trainer_of(tiny("sd"), tmp_path, **values)
        assert str(refused.value).startswith(message)
        assert "\n" not in str(refused.value)
        assert not list(tmp_path.rglob("*.json"))

    def test_a_model_without_prompts_is_refused(self, tiny_ddpm, tmp_path):
        with pytest.raises(ValueError, match=r"^concept: this model takes no prompts; [^\n]*$"):
            trainer_of(tiny_ddpm, tmp_path)


class TestTheFirstAct:
    def test_is_the_closed_form_and_stands_before_the_first_step(self, tmp_path):
        """At a rate of nothing the result is that of `redirect_concept`; judged, and restored, against what was there before."""
        pipeline, before = tiny("sd"), tiny("sd")
        trainer = trainer_of(
            pipeline, tmp_path, forget_prompts=["a photo of a cat"], learning_rate=0.0, guard=True, guard_steps=1
        )
        trainer.train()
        edited = redirect_concept(
            tiny("sd"), WANTED, wordings=[*templates_for("cat", "animal"), "a photo of a cat"], measure=False
        )
        expected = cross_attention(edited)
        for name, weight in cross_attention(pipeline).items():
            assert torch.allclose(weight, expected[name], rtol=0, atol=1e-6)
            assert torch.equal(trainer.reference.parameters[f"{name}.weight"], cross_attention(before)[name])
        assert trainer.guard.state.baseline == pytest.approx(0, abs=1e-9)  # that of the original
        assert trainer.guard.looks[0].utility_drop > 1e-6
        outcome = trainer.outcome
        assert outcome.original["effect"] == pytest.approx(7.5)
        logged = [row["prompt_effect"] for row in trainer.state.log_history if "prompt_effect" in row]
        assert logged == [pytest.approx(outcome.now["effect"], rel=1e-4)] * 2
        assert abs(outcome.now["effect"]) < 0.95 * outcome.original["effect"]
        assert f"times guidance, is {outcome.now['effect']:.3g} (7.5 before)" in trainer.outcome_line

    # With T5 a thousand kept prompts of 256 tokens are encoded, twice.
    @pytest.mark.parametrize(
        "kind", ["sdxl", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("pixart", "sd3", "flux"))]
    )
    def test_of_other_architectures(self, kind, tmp_path):
        pipeline = tiny(kind)
        trainer = trainer_of(pipeline, tmp_path, forget_prompts=["a photo of a cat"], learning_rate=0.0, max_steps=1)
        assert trainer.args.closed_form
        trainer.train()
        edited = redirect_concept(
            tiny(kind), WANTED, wordings=[*templates_for("cat", "animal"), "a photo of a cat"], measure=False
        )
        expected, before = cross_attention(edited), cross_attention(tiny(kind))
        for name, weight in cross_attention(pipeline).items():
            assert torch.allclose(weight, expected[name], rtol=0, atol=1e-5)
            assert not torch.allclose(weight, before[name], rtol=0, atol=1e-4)
        assert trainer.outcome.now["effect"] < trainer.outcome.original["effect"]

    def test_is_left_out_with_an_adapter_or_when_told(self, tmp_path):
        for number, values in enumerate(({"trainable": ["lora"]}, {"closed_form": False, "learning_rate": 0.0})):
            pipeline, before = tiny("sd"), cross_attention(tiny("sd"))
            trainer = trainer_of(pipeline, tmp_path / str(number), forget_prompts=ASKED, **values)
            trainer.train()
            assert trainer.args.closed_form is False
            if "lora" not in str(values):
                assert all(torch.equal(weight, before[name]) for name, weight in cross_attention(pipeline).items())

    def test_a_resumed_run_does_not_begin_with_it_again(self, tmp_path):
        values = {"save_strategy": "steps", "save_steps": 1, "adam_epsilon": 1e-3, "forget_prompts": ASKED}
        whole, half = (tiny("sd") for _ in range(2))
        trainer_of(whole, tmp_path / "whole", **values).train()
        trainer_of(half, tmp_path / "halves", **(values | {"max_steps": 1})).train()
        first = cross_attention(half)
        rest = tiny("sd")
        trainer_of(rest, tmp_path / "halves", **values).train(resume_from_checkpoint=True)
        name = next(iter(first))
        step = (cross_attention(whole)[name] - first[name]).norm()
        assert (cross_attention(rest)[name] - cross_attention(whole)[name]).norm() < 1e-3 * step


class TestTheOutcome:
    def test_a_marker_counts_what_is_drawn(self, tmp_path):
        """By brute force: what the pipeline draws for the forget prompts, before and after."""
        means = []

        def marker(images):
            means.append(images.mean((1, 2, 3)))
            return images.mean((1, 2, 3)) > 0

        trainer = trainer_of(tiny("sd"), tmp_path, marker, forget_prompts=ASKED, learning_rate=0.05)
        trainer.train()
        now, before = trainer.outcome.now["shown"], trainer.outcome.original["shown"]
        shown, unasked, shown_before, unasked_before = means[-4:]
        assert now == pytest.approx((shown > 0).float().mean().item())
        assert before == pytest.approx((shown_before > 0).float().mean().item())
        assert trainer.outcome.now["unasked"] == pytest.approx((unasked > 0).float().mean().item())
        assert not torch.allclose(shown, shown_before)
        assert not torch.allclose(unasked, unasked_before)
        figures = {figure.name: figure for figure in trainer.outcome_figures}
        shown = figures["Images drawn for the forget prompts that the marker marks"]
        assert (shown.before, shown.after) == (100 * before, 100 * now)

    def test_what_is_still_drawn_is_said_and_stands_in_the_card(self, tmp_path, caplog):
        trainer = trainer_of(tiny("sd"), tmp_path, forget_prompts=ASKED, closed_form=False, learning_rate=0.0)
        with caplog.at_level(logging.WARNING, "hf_unlearn"):
            trainer.train()
        assert "What was to be forgotten is probably still drawn" in caplog.text
        trainer.save_model()
        assert (
            "probably still drawn: its prompts still have 7.5 times the effect" in (tmp_path / "README.md").read_text()
        )
