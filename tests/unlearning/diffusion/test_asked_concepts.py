"""What a user may ask to be redirected: words, anchors, positions, bad input; and how much of the effect is left, as it is said."""

import inspect
import logging
import re

import diffusers
import pytest
import torch
from text_to_image_data import KIND_NAMES, denoiser_of, tiny, unet

from hf_unlearn import ConceptRedirection, PromptEffect, redirect_concept
from hf_unlearn.unlearning.diffusion.anchor_words import AnchorWords
from hf_unlearn.unlearning.diffusion.pipelines import TEXT_SIDES, text_side_of
from hf_unlearn.unlearning.diffusion.text_moments import aligned, aligned_places, weighted
from hf_unlearn.unlearning.diffusion.wordings import (
    GENERIC,
    KINDS,
    exchanged,
    filled,
    kept_prompts,
    kind_of,
    naming,
    neighbours,
    plural,
)


KEPT = ["a red house", "the old blue guitar"]


def redirected(pipe, concept="cat", **given):
    return redirect_concept(
        pipe, concept, **({"anchor": "horse", "keep": KEPT, "keep_weight": 1.0, "measure": False} | given)
    )


def weights(pipe):
    return {name: value.clone() for name, value in denoiser_of(pipe).state_dict().items()}


def assert_refused(pipe, match, concept="cat", **given):
    """One line, and nothing was changed."""
    before = weights(pipe)
    with pytest.raises(ValueError, match=match) as error:
        redirected(pipe, concept, **given)
    assert "\n" not in str(error.value)
    after = denoiser_of(pipe).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


class TestWords:
    @pytest.mark.parametrize(
        ("prompt", "expected"),
        [
            ("A cat, CATS and cats; Cat catalogue", "An owl, OWLS and owls; Owl catalogue"),
            ("an apple a cat for an hour", "a banana an owl for an hour"),
            ("concatenate the tomcat", "concatenate the tomcat"),
            ("the cat's hat", "the owl's hat"),
            ("a big cherry tree and cherry trees", "a big fox and foxes"),
            ("a cherry and cherries", "a plum and plums"),
        ],
    )
    def test_exchanged(self, prompt, expected):
        anchors = {"cat": "owl", "apple": "banana", "cherry": "plum", "cherry tree": "fox"}
        assert exchanged(prompt, anchors) == expected
        assert exchanged(expected, anchors) == expected

    def test_an_anchor_with_its_own_article(self):
        assert exchanged("a photo of a cat", {"cat": "an old owl"}) == "a photo of an old owl"
        assert filled("a photo of a {} and a {}", "owl") == "a photo of an owl and an owl"

    @pytest.mark.parametrize(
        ("word", "expected"), [("box", "boxes"), ("city", "cities"), ("boy", "boys"), ("three", "threes")]
    )
    def test_plural(self, word, expected):
        assert plural(word) == expected

    def test_neighbours_are_asked_for_as_the_concepts_are(self):
        found = neighbours(["red", "cat"])
        assert {"a photo of a blue house", "a green thing", "a photo of a dog", "a painting of an owl"} <= set(found)
        assert not any(re.search(r"\b(red|cats?)\b", prompt) for prompt in found)
        assert len(found) == len(set(found))
        assert neighbours(["Ada Lovelace"]) == []

    def test_neighbours_weigh_as_much_as_all_else(self):
        weights = weighted(["a", "b", "c", "d"], ["d", "e"])
        assert weights == {"a": 1, "b": 1, "c": 1, "d": 3, "e": 2, "": 1}
        assert weighted(map(str, range(100)))[""] == 5

    def test_kept_prompts_name_no_concept(self):
        whole, without = kept_prompts(), kept_prompts(["Cat", "red"])
        assert len(whole) == len(set(whole)) > 1000
        assert without == [prompt for prompt in whole if not naming(["cat", "red"]).search(prompt)]
        assert 1000 < len(without) < len(whole)
        assert all(
            sum(bool(naming([word]).search(prompt)) for prompt in whole) >= 3
            for words in KINDS.values()
            for word in words
        )

    def test_no_word_is_of_two_kinds_but_orange(self):
        words = [word for kind in KINDS.values() for word in kind]
        assert {word for word in words if words.count(word) > 1} == {"orange"}

    def test_kinds(self):
        assert [kind_of(word) for word in ("Cats", "sea lion", "Van Gogh", "red", "wug")] == [
            "animal",
            "animal",
            "painter",
            "colour",
            None,
        ]


class TestPositions:
    def test_equal_lengths(self):
        assert aligned([1, 5, 2, 9], [1, 6, 2, 9], 6) == [0, 1, 2, 3, 4, 5]

    def test_a_longer_concept(self):
        """Both words before the anchor's one; then words and end; the padding at its own place."""
        assert aligned([1, 5, 6, 2, 9], [1, 7, 2, 9], 7) == [0, 1, 1, 2, 3, 5, 6]

    def test_a_shorter_concept(self):
        """The last word of the anchor; padding where there still are words there is the first padding."""
        assert aligned([1, 7, 2, 9], [1, 5, 6, 2, 9], 7) == [0, 2, 3, 4, 5, 5, 6]

    def test_several_times_and_full_rooms(self):
        assert aligned([1, 7, 2, 7, 9], [1, 5, 6, 2, 5, 6, 9], 7) == [0, 2, 3, 5, 6, 6, 6]

    def test_a_word_that_is_left_out(self):
        assert aligned([1, 5, 7, 9], [1, 7, 9], 4) == [0, 1, 1, 2]

    def test_segments_lie_behind_each_other(self):
        side = text_side_of(tiny("sd3"))
        (places,) = aligned_places(side, [("a sea lion", "a cat")], 12 + 256).tolist()
        expected = aligned([0, 1, 2, 3, 4], [0, 1, 5, 4], 12)
        assert places[:12] == expected
        assert places[12:] == [12 + place for place in aligned([0, 1, 2, 3, 4], [0, 1, 5, 4], 256)]

    @pytest.mark.parametrize("kind", KIND_NAMES)
    @pytest.mark.parametrize(("concept", "anchor"), [("sea lion", "cat"), ("cat", "sea lion")])
    def test_phrases_of_other_lengths_lose_their_effect(self, kind, concept, anchor):
        pipe = tiny(kind)
        effect = PromptEffect.of(pipe, [(f"a photo of a {concept}", f"a photo of a {anchor}")])
        redirected(pipe, concept, anchor=anchor, wordings=["a photo of a {}"], ridge=1e-6)
        assert abs(effect.remaining(pipe)) < 0.35 * effect.guidance


class TestAnchors:
    @pytest.mark.parametrize("concept", ["cat", "red", "Monet", "three", "guitar"])
    def test_is_of_the_kind_and_said(self, concept, caplog):
        with caplog.at_level("INFO", "hf_unlearn"):
            found = ConceptRedirection.of(tiny("sd"), concept, keep=[])
        (anchor,) = found.anchors.values()
        assert anchor in KINDS[kind_of(concept)]
        assert anchor != concept
        assert f"{concept!r} is redirected to {anchor!r}" in caplog.text
        assert all(anchor in instead and concept not in instead for _, instead in found.pairs)

    def states_of(self, places):
        """Chooses among words whose states are known."""
        words = AnchorWords(text_side_of(tiny("sd")), ["cat"])
        plane = {word: torch.tensor([100.0 + 10 * n, 100.0]) for n, word in enumerate(sum(KINDS.values(), []))}
        plane |= {word: torch.tensor(place) for word, place in places.items()}
        words.states = lambda some: torch.stack([plane[word] for word in some]).double()
        return words

    def test_what_the_denoiser_draws_instead(self):
        """A dog is nearer, but drawn like a cat; a fox means nothing to the denoiser, a wolf is a landscape; of a mouse there is less cat. There
        is still less at the last two, which are one word to the text encoder.
        """
        places = {
            "cat": [0.0, 0.0],
            "dog": [4.0, 0.0],
            "fox": [0.0, 6.0],
            "wolf": [-8.0, 0.0],
            "mouse": [-9.0, 9.0],
            "lion": [9.0, 9.0],
            "tiger": [9.1, 9.0],
        }
        words = self.states_of(places)
        drawn = {"cat": [2.0, 0.0], "dog": [1.5, 0.5], "wolf": [0.5, 9.0], "mouse": [-1.0, 0.5]}
        drawn |= {"lion": [-3.0, 0.0], "tiger": [-3.0, 0.0]}

        def answers(prompts, share, seed):
            named = [[word for word in drawn if word in prompt] for prompt in prompts]
            return torch.tensor([drawn[found[0]] if found else [0.0, 0.0] for found in named]) + seed

        words._answers = answers
        assert words.of("cat") == "mouse"
        likeness = words.likeness("cat", ["dog", "fox", "wolf", "mouse"], "animal")
        centred = torch.tensor([drawn["cat"], drawn["dog"], [0.0, 0.0], drawn["wolf"], drawn["mouse"]])
        centred -= centred.mean(0)
        angles = torch.atan2(centred[:, 1], centred[:, 0])
        torch.testing.assert_close(likeness, torch.cos(angles[1:] - angles[0]))

    def test_asks_the_denoiser_as_it_is_asked_for_a_prompt(self):
        """Of a tiny one: all words in one batch or in several, one noise for all, as [`PromptEffect`] asks it."""
        words = AnchorWords(text_side_of(tiny("sd")), ["cat"])
        prompts = [f"a photo of a {word}" for word in ("cat", "dog", "fox", "wolf", "mouse", "lion")]
        whole = words._answers(prompts, 0.75, 3)
        for place in range(len(prompts)):
            torch.testing.assert_close(words._answers(prompts[place : place + 1], 0.75, 3), whole[[place]])
        assert (whole - words._answers(prompts, 0.75, 4)).abs().amax() > 0.1

    def test_the_least_confused_of_the_nearest(self):
        """Fox and wolf are nearer, but beside each other; the mouse is by itself."""
        places = {
            "cat": [0.0, 0.0],
            "fox": [8.0, 0.0],
            "wolf": [9.0, 0.0],
            "mouse": [-12.0, 0.0],
            "bear": [13.0, 0.0],
            "dog": [13.0, 4.0],
        }
        assert self.states_of(places).of("cat", asks=False) == "mouse"

    def test_not_another_word_for_the_same(self):
        places = {"cat": [0.0, 0.0], "mouse": [-1.0, 0.0], "bear": [-90.0, 0.0]}
        assert self.states_of(places).of("cat", asks=False) == "bear"
        assert self.states_of(places).of("cat") != "mouse"

    def test_an_unlisted_word_is_of_its_neighbours_kind(self):
        near = self.states_of({"kitty": [100.0 + 10 * 13, 101.0]})  # beside the first animal
        assert near.of("kitty") in KINDS["animal"]
        assert self.states_of({"kitty": [-9000.0, 0.0]}).of("kitty") == GENERIC

    def test_forms(self):
        pipe = tiny("sd")
        for given in (
            {"concept": {"cat": "horse", "dog": "cow"}},
            {"concept": ["cat ", "dog"], "anchor": ["horse", " cow"]},
            {"concept": ["cat", "dog"], "anchor": {"dog": "cow", "cat": "horse"}},
        ):
            assert ConceptRedirection.of(pipe, keep=[], **given).anchors == {"cat": "horse", "dog": "cow"}
        one = ConceptRedirection.of(pipe, ["cat", "dog"], anchor="horse", keep=[])
        assert one.anchors == {"cat": "horse", "dog": "horse"}
        assert {first for first, _ in one.pairs[:2]} == {"cat", "dog"}  # in turn

    def test_some_given_and_some_chosen(self):
        found = ConceptRedirection.of(tiny("sd"), ["red", "dog"], anchor={"dog": "cow"}, keep=[]).anchors
        assert found["dog"] == "cow"
        assert found["red"] in KINDS["colour"]

    def test_a_chosen_anchor_is_no_concept(self):
        animals = KINDS["animal"]
        assert ConceptRedirection.of(tiny("sd"), animals[:-2], keep=[]).anchors["dog"] in animals[-2:]


class TestWordings:
    def test_whole_prompts_and_templates(self):
        found = ConceptRedirection.of(
            tiny("sd"),
            ["cat", "dog"],
            anchor="horse",
            wordings=["old {}", "a cat in the house", "a cat and a dog"],
            keep=[],
        )
        assert set(found.pairs) == {
            ("old cat", "old horse"), ("old dog", "old horse"), ("a cat in the house", "a horse in the house"),
            ("a cat and a dog", "a horse and a horse"),
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("wordings", "match"),
        [
            (["a red house"], "^wordings: 'a red house' has no {} and names no concept"),
            ("a photo of {}", "^wordings='a photo of {}': is one text; pass a list"),
            ([""], "^wordings: '' is no text"),
            (["a dog"], "^wordings: none asks for 'cat'"),
            (["cat and dog", " ".join(["old"] * 12) + " cat dog"], None),
            ([" ".join(["old"] * 12) + " cat dog"], "^wordings: the encoder reads none as far as 'cat'"),
        ],
    )
    def test_refused(self, wordings, match):
        if match is None:  # one of them is read
            found = ConceptRedirection.of(tiny("sd"), ["cat", "dog"], anchor="horse", wordings=wordings, keep=KEPT)
            assert set(found.pairs) == {("cat and dog", "horse and horse")}
        else:
            assert_refused(tiny("sd"), match, ["cat", "dog"], wordings=wordings)

    def test_longer_than_the_encoder(self, caplog):
        long = "a cat " + " ".join(["old"] * 12)
        redirected(tiny("sd"), wordings=[long], keep=["red " * 20])
        assert "wordings: 1 of 1 have more than the encoder's 12 tokens" in caplog.text
        assert "keep: 1 of 1 have more than the encoder's 12 tokens" in caplog.text

    def test_kept_prompts_that_name_it_are_left_out(self, caplog):
        with_it, without = tiny("sd"), tiny("sd")
        redirected(with_it, keep=[*KEPT, "Two CATS", "category"])
        assert "keep: 1 of 4 prompts name what is to be forgotten ('Two CATS'), and are left out" in caplog.text
        redirected(without, keep=[*KEPT, "category"])
        assert all(torch.equal(weights(with_it)[name], value) for name, value in weights(without).items())


class TestRefused:
    @pytest.mark.parametrize(
        ("concept", "given", "match"),
        [
            ("cat", {"anchor": "Cat"}, "^anchor='Cat': is the concept itself"),
            ("cat", {"anchor": "two cats"}, "^anchor='two cats': names 'cats', which is to be forgotten"),
            (["cat", "dog"], {"anchor": ["dog", "cow"]}, "^anchor='dog': names 'dog', which is to be forgotten"),
            (["cat", "dog"], {"anchor": ["cow"]}, "^anchor: 1 for 2 concepts"),
            (["cat"], {"anchor": {"dog": "cow"}}, "^anchor: 'dog' is no concept"),
            ({"cat": "horse"}, {}, "^anchor: given beside a dict"),
            (["cat", "Cat "], {}, "^concept: 'cat' is given twice"),
            ([], {}, "^concept: there is none"),
            (" ", {}, "^concept: ' ' is no text"),
            ([3], {}, "^concept: 3 is no text"),
            ("wugg", {"anchor": "blickk"}, "^concept='wugg': the text encoder knows no difference to 'blickk'"),
            ("cat", {"keep": "a red house"}, "^keep='a red house': is no file of TextMoments"),
            ("cat", {"keep": [None]}, "^keep: None is no text"),
            ("cat", {"strength": 0}, "^strength=0: must be > 0"),
            ("cat", {"strength": float("nan")}, "^strength=nan: must be > 0"),
            ("cat", {"ridge": 0.0}, "^ridge=0.0: must be > 0"),
            ("cat", {"keep_weight": -1}, "^keep_weight=-1: must be ≥ 0"),
            (
                "cat",
                {"keep_weight": 0, "ridge": 1e-30, "wordings": ["a {}"]},
                "^ridge: is too small for these text states",
            ),
        ],
    )
    def test_what_makes_no_sense(self, concept, given, match):
        assert_refused(tiny("sd"), match, concept, **given)

    def test_every_other_pipeline_by_name(self):
        """What is supported is one of diffusers' text-to-image pipelines and derives from no other one here."""
        for name in TEXT_SIDES:
            assert "prompt" in inspect.signature(getattr(diffusers, name).__call__).parameters
        with pytest.raises(
            ValueError, match="^pipe: int is not supported; pass a pipeline of one of StableDiffusion, "
        ):
            redirect_concept(3, "cat")
        from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

        unet = UNet2DModel(sample_size=4, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=2)  # fmt: skip
        with pytest.raises(ValueError, match="^pipe: DDPMPipeline is not supported"):
            redirect_concept(DDPMPipeline(unet, DDPMScheduler()), "cat")

    @pytest.mark.parametrize(
        ("kind", "part"), [("sd", "text_encoder"), ("sdxl", "text_encoder_2"), ("flux", "tokenizer_2")]
    )
    def test_a_missing_part(self, kind, part):
        pipe = tiny(kind)
        pipe.register_modules(**{part: None})
        assert_refused(pipe, rf"^pipe: {type(pipe).__name__} has no {part}; load the pipeline with it")

    @pytest.mark.parametrize("kind", ["sd", "sd3"])
    def test_a_lora_that_is_loaded(self, kind, tmp_path):
        pipe = tiny(kind)
        ConceptRedirection.of(pipe, "dog", anchor="cow", keep=KEPT).save_lora(pipe, tmp_path, 2)
        pipe.load_lora_weights(tmp_path)
        part = "unet" if kind == "sd" else "transformer"
        assert_refused(pipe, f"^pipeline: {part} holds an adapter")

    def test_quantised_weights(self):
        pipe = tiny("sd")
        layer = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k
        layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
        with pytest.raises(
            ValueError, match=r"^pipe: unet\.down_blocks.*attn2.to_k is quantised \(Linear, torch.float8_e4m3fn\)"
        ):
            redirected(pipe)

    def test_weights_that_are_offloaded_one_by_one(self):
        from accelerate import cpu_offload

        pipe = tiny("sd")
        cpu_offload(pipe.unet, execution_device="cpu")
        with pytest.raises(
            ValueError, match=r"^pipe: the weights of its unet are offloaded one by one; call remove_all_hooks"
        ):
            redirected(pipe)

    def test_whole_parts_that_are_offloaded(self):
        """As `enable_model_cpu_offload()` has it, whose hooks stay."""
        from accelerate import cpu_offload_with_hook

        pipe, plain = tiny("sd"), tiny("sd")
        _, hook = cpu_offload_with_hook(pipe.text_encoder, "cpu")
        cpu_offload_with_hook(pipe.unet, "cpu", prev_module_hook=hook)
        for each in (pipe, plain):
            redirected(each, measure=True)
        assert hasattr(pipe.unet, "_hf_hook")
        assert all(torch.equal(weights(plain)[name], value) for name, value in weights(pipe).items())

    def test_nan_states(self):
        pipe = tiny("sd")
        torch.nn.init.constant_(pipe.text_encoder.get_input_embeddings().weight, float("nan"))
        assert_refused(pipe, "^pipe: its text encoder gives NaN or infinity")

    def test_a_denoiser_that_is_told_more(self):
        pipe = tiny("sd")
        pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
        assert_refused(pipe, "^pipe: its unet has encoder_hid_dim_type='ip_image_proj'")

    def test_fused_projections_are_taken_apart(self):
        pipe, plain = tiny("sd"), tiny("sd")
        pipe.fuse_qkv_projections()
        for each in (pipe, plain):
            redirected(each)
        assert all(torch.equal(weights(plain)[name], value) for name, value in weights(pipe).items())


class TestEffect:
    @pytest.mark.parametrize("kind", KIND_NAMES)
    def test_is_the_guidance_scale_before_and_nothing_after(self, kind, caplog):
        pipe = tiny(kind)
        effect = PromptEffect.of(pipe, [("a photo of a cat", "a photo of a horse"), ("a cat", "a horse")])
        assert effect.remaining(pipe) == pytest.approx(effect.guidance)
        assert effect.guidance == {"sd": 7.5, "sdxl": 5, "pixart": 4.5, "sd3": 7, "flux": 1}[kind]
        with caplog.at_level("INFO", "hf_unlearn"):
            redirected(pipe, measure=True, ridge=1e-6, wordings=["a photo of a {}", "a {}"])
        assert abs(effect.remaining(pipe)) < 0.05 * effect.guidance
        assert f"{effect.guidance:.3g} before" in caplog.text
        assert caplog.records[-1].levelname == "INFO"

    def test_is_what_the_denoiser_answers(self):
        """By hand: the U-Net's own answers at the first of the noise levels."""
        pipe = tiny("sd")
        effect = PromptEffect.of(pipe, [("a cat", "a horse")])
        from hf_unlearn.modes import seeded_generator

        noise = torch.randn(1, 4, 4, 4, generator=seeded_generator("cpu", 0))
        with torch.no_grad():
            asked, instead, empty = (
                pipe.unet(noise, 950, pipe.encode_prompt(text, "cpu", 1, False)[0]).sample
                for text in ("a cat", "a horse", "")
            )
        torch.testing.assert_close(effect.before, asked - instead, rtol=0, atol=1e-6)
        assert effect.whole.item() == pytest.approx((instead - empty).square().sum().item(), rel=1e-4)

    def test_what_is_still_drawn_is_said(self, caplog):
        pipe = tiny("pixart")
        redirected(pipe, measure=True, strength=0.01)
        assert "it is probably still drawn; lower ridge" in caplog.text

    def test_measuring_leaves_no_trace(self):
        pipe = tiny("sd")
        pipe.unet.train()
        state = torch.get_rng_state()
        PromptEffect.of(pipe, [("a cat", "a horse")]).remaining(pipe)
        assert pipe.unet.training
        assert torch.equal(state, torch.get_rng_state())

    def test_what_the_model_does_not_know(self, caplog):
        """It hears the words, and does not follow them."""
        pipe = tiny("sd")
        with torch.no_grad():
            for layer in text_side_of(pipe).layers:
                layer.linear.weight.zero_()
        redirected(pipe, measure=True)
        assert "so it does not know the concept, or as the same" in caplog.text
        assert PromptEffect.of(pipe, [("a cat", "a horse")]).remaining(pipe) == 0

    def test_a_denoiser_that_is_told_the_guidance(self):
        """Latent consistency: the scale multiplies nothing when it draws."""
        from diffusers import LatentConsistencyModelPipeline, LCMScheduler

        parts = tiny("sd").components | {
            "unet": unet(cross_attention_dim=64, time_cond_proj_dim=8),
            "scheduler": LCMScheduler(),
        }
        pipe = LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
        effect = PromptEffect.of(pipe, [("a cat", "a horse")])
        assert effect.remaining(pipe) == pytest.approx(1)
        redirected(pipe, ridge=1e-6, wordings=["a {}"])
        assert abs(effect.remaining(pipe)) < 0.05

    def test_of_nothing(self):
        with pytest.raises(ValueError, match="^pairs: there are none"):
            PromptEffect.of(tiny("sd"), [])


@pytest.fixture(autouse=True)
def caplog_of_the_package(caplog):
    caplog.set_level(logging.WARNING, "hf_unlearn")
