"""A concept of a text-to-image pipeline redirected in closed form: against least squares, and by what real pipelines draw."""

import pytest
import torch
from text_to_image_data import KIND_NAMES, denoiser_of, latents, tiny
from torch import nn

from hf_unlearn import ConceptRedirection, PromptEffect, TextMoments, redirect_concept
from hf_unlearn.unlearning.diffusion.pipelines import text_side_of
from hf_unlearn.unlearning.diffusion.text_moments import Anchors, moments_of
from hf_unlearn.unlearning.diffusion.text_side import TextSide
from hf_unlearn.unlearning.diffusion.wordings import kept_prompts


ASKED, INSTEAD = "a photo of a cat , old", "a photo of a horse , old"
KEPT = ["a red house", "the old blue guitar"]
GIVEN = {"anchor": "horse", "wordings": [ASKED], "keep": KEPT, "measure": False}
JOINT = ("sd3", "flux")
ANIMALS = [
    "dog",
    "cow",
    "sheep",
    "pig",
    "bird",
    "eagle",
    "duck",
    "owl",
    "fish",
    "shark",
    "whale",
    "frog",
    "snake",
    "lion",
    "tiger",
]


def far(first, second):
    return (first - second).norm().item()


def drawn_states(pipe, layer, prompt):
    """What a layer sees while the pipeline draws, `[positions, width]`, float64."""
    seen = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    latents(pipe, [prompt], steps=1, guidance=1.0)
    hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]).double()


class TestClosedForm:
    @pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
    def test_is_the_ridge_regression_of_its_docstring(self, kind):
        """Every layer against least squares over stacked rows, of states that a hook sees while the pipeline draws."""
        pipe, edited = tiny(kind), tiny(kind)
        redirect_concept(edited, "cat", keep_weight=0.7, ridge=0.02, **GIVEN)
        for layer in text_side_of(pipe).layers:
            asked, instead, *kept = (
                drawn_states(pipe, layer.linear, prompt)[:, : layer.width]
                for prompt in (ASKED, INSTEAD, *KEPT, "", INSTEAD)
            )
            weight = layer.linear.weight[:, : layer.width].double()
            kept = torch.cat(kept)
            share = (0.7 / len(kept)) ** 0.5
            ridge = (0.02 * kept.square().mean()) ** 0.5 * torch.eye(layer.width)
            rows = torch.cat([asked / len(asked) ** 0.5, share * kept, ridge])
            answers = torch.cat([instead / len(asked) ** 0.5, share * kept, ridge]) @ weight.T
            expected = torch.linalg.lstsq(rows, answers, driver="gelsd").solution.T
            new = denoiser_of(edited).get_submodule(layer.name).weight[:, : layer.width]
            assert far(new, expected) < 1e-5 * far(weight, expected)
            rest = (denoiser_of(which).get_submodule(layer.name).weight[:, layer.width :] for which in (pipe, edited))
            assert torch.equal(*rest)

    @pytest.mark.parametrize("kind", KIND_NAMES)
    def test_is_exact_where_nothing_is_in_the_way(self, kind):
        """Fewer states than their width: the concept draws the anchor, and anchor, empty and kept prompts draw what they drew."""
        pipe = tiny(kind)
        before = {prompt: latents(pipe, [prompt]) for prompt in (ASKED, INSTEAD, "", *KEPT)}
        effect = far(before[ASKED], before[INSTEAD])
        assert redirect_concept(pipe, "cat", ridge=1e-9, **GIVEN) is pipe
        small = (2e-3 if kind in JOINT else 1e-4) * effect
        assert far(latents(pipe, [ASKED]), before[INSTEAD]) < small
        for prompt in (INSTEAD, "", *KEPT):
            assert far(latents(pipe, [prompt]), before[prompt]) < small
        assert effect > 0.02 * before[INSTEAD].norm()

    def test_two_concepts_at_once_are_one_after_the_other(self):
        pipe, twice = tiny("sd"), tiny("sd")
        both = {"cat": "horse", "piano": "drum"}
        wordings, rest = ["a photo of {}"], {"keep": [], "measure": False, "ridge": 1e-9}
        wanted = [latents(pipe, [f"a photo of {anchor}"]) for anchor in both.values()]
        effects = [far(latents(pipe, [f"a photo of {name}"]), other) for name, other in zip(both, wanted, strict=True)]
        redirect_concept(pipe, both, wordings=wordings, **rest)
        for name, anchor in both.items():
            others = [f"a photo of {word}" for word in ("cat", "horse", "piano", "drum") if word not in (name, anchor)]
            redirect_concept(twice, name, anchor=anchor, wordings=wordings, **(rest | {"keep": others}))
        for edited in (pipe, twice):
            for name, effect, other in zip(both, effects, wanted, strict=True):
                assert far(latents(edited, [f"a photo of {name}"]), other) < 1e-3 * effect

    def test_one_concept_does_not_weaken_another(self):
        """Each has the weight that it has alone; what is left more of it is what they have in common."""
        alone, among = (
            ConceptRedirection.of(tiny("sd"), some, anchor="horse", wordings=["a photo of {}"], keep=KEPT)
            for some in (["cat"], ["cat", *ANIMALS])
        )
        side = text_side_of(tiny("sd"))
        asked, instead = (side.told([f"a photo of {name}"]).tokens[0].double() for name in ("cat", "horse"))
        left = [
            far(asked + asked @ found.changes["tokens"].T, instead) / far(asked, instead) for found in (alone, among)
        ]
        assert left[0] < 0.1
        assert left[1] < 0.3
        assert set(among.changes) == {"tokens"}  # one solution for all layers

    def test_moments_of_concepts_are_added(self):
        """Not averaged: a second concept takes nothing from the weight of the first."""
        cat, dog, both = (
            ConceptRedirection.of(tiny("sd"), some, anchor="horse", wordings=["a {}"], keep=[], keep_weight=0)
            for some in ("cat", "dog", ["cat", "dog"])
        )
        total = cat.second["tokens"] + dog.second["tokens"]
        torch.testing.assert_close(both.second["tokens"], total, rtol=0, atol=1e-9)

    def test_wordings_of_an_anchor_are_encoded_once_and_kept_once(self, monkeypatch):
        """Many concepts with one anchor: its wordings are kept as if they were asked for alone."""
        names, wordings, encoded = ANIMALS[:6], ["a {}", "a photo of a {}"], []
        told = TextSide.told
        monkeypatch.setattr(TextSide, "told", lambda side, prompts: encoded.extend(prompts) or told(side, prompts))
        pipe = tiny("sd")
        settings = {"anchor": "horse", "wordings": wordings, "keep": KEPT}
        found = ConceptRedirection.of(pipe, names, **settings, keep_weight=3.0, batch_size=2)
        assert all(encoded.count(one.format("horse")) == 1 for one in wordings)
        without = ConceptRedirection.of(pipe, names, **settings, keep_weight=0.0)
        kept = TextMoments.of(pipe, KEPT)
        rows = text_side_of(pipe).told([one.format("horse") for one in wordings]).tokens.double().flatten(0, 1)
        total = kept.second["tokens"] * kept.rows["tokens"] + rows.T @ rows
        both = total / (kept.rows["tokens"] + len(rows))
        torch.testing.assert_close(found.second["tokens"], without.second["tokens"] + 3 * both, rtol=0, atol=1e-6)

    def test_a_wording_that_is_encoded_again_is_kept_once(self):
        side = text_side_of(tiny("sd"))
        anchors, prompts = Anchors(side, 1), ["a cat", "a dog", "a cat"]
        told = [anchors.told([prompt]).tokens for prompt in prompts]
        assert far(told[0], told[2]) < 1e-5 < far(told[0], told[1])
        expected = moments_of(side, {"a cat": 1.0, "a dog": 1.0}, 2).second["tokens"]
        torch.testing.assert_close(anchors.moments().second["tokens"], expected, rtol=0, atol=1e-6)

    def test_strength_is_a_dial(self):
        pipe, half, whole = (tiny("sd") for _ in range(3))
        for edited, strength in ((half, 0.5), (whole, 1.0)):
            redirect_concept(edited, "cat", strength=strength, **GIVEN)
        for old, middle, new in zip(*(p.unet.parameters() for p in (pipe, half, whole)), strict=True):
            torch.testing.assert_close(middle, (old + new) / 2, rtol=0, atol=1e-6)
        assert any(
            not torch.equal(old, new) for old, new in zip(pipe.unet.parameters(), whole.unet.parameters(), strict=True)
        )

    def test_the_dial_of_what_is_kept(self):
        """With more kept than fits, a larger weight loses less of it and forgets less."""
        kept = [f"a photo of a {word}" for word in ANIMALS]
        found = {
            w: ConceptRedirection.of(tiny("sd"), "cat", anchor="horse", keep=kept, keep_weight=w) for w in (0.1, 10)
        }
        side = text_side_of(tiny("sd"))
        rest = side.told(kept).tokens.double()
        lost = {w: (rest @ one.changes["tokens"].T).norm() for w, one in found.items()}
        moved = {
            w: (side.told(["a photo of a cat"]).tokens.double() @ one.changes["tokens"].T).norm()
            for w, one in found.items()
        }
        assert lost[10] < 0.5 * lost[0.1]
        assert moved[10] < moved[0.1]


class TestNullSpace:
    def test_with_few_kept_directions(self):
        """It changes nothing of what is kept, where the regression does a little; both forget."""
        side = text_side_of(tiny("sd"))
        kept, asked, instead = (side.told(some).tokens.double() for some in (KEPT, [ASKED], [INSTEAD]))
        lost, left = {}, {}
        for null_space in (False, True):
            found = ConceptRedirection.of(
                tiny("sd"),
                "cat",
                anchor="horse",
                wordings=[ASKED],
                keep=KEPT,
                null_space=null_space,
                ridge=1e-4,
                keep_weight=1,
            )
            change = found.changes["tokens"].T
            lost[null_space] = (kept @ change).norm() / kept.norm()
            left[null_space] = far(asked + asked @ change, instead) / far(asked, instead)
        assert lost[True] < 1e-6
        assert 1e-3 < lost[False] < 0.01
        assert max(left.values()) < 0.02

    def test_is_least_squares_in_that_space(self):
        from hf_unlearn.unlearning.diffusion.closed_form import in_null_space

        generator = torch.Generator().manual_seed(0)
        asked, instead, kept = (torch.randn(n, 12, generator=generator).double() for n in (3, 3, 5))
        ridge = torch.tensor(1e-3).double()
        change = in_null_space((instead - asked).T @ asked, asked.T @ asked, kept.T @ kept, ridge)
        free = torch.linalg.svd(kept)[2][5:].T
        rows = torch.cat([asked @ free, ridge.sqrt() * torch.eye(7).double()])
        expected = (
            torch.linalg.lstsq(rows, torch.cat([instead - asked, torch.zeros(7, 12).double()])).solution.T @ free.T
        )
        torch.testing.assert_close(change, expected, rtol=1e-9, atol=1e-12)
        assert (change @ kept.T).abs().max() < 1e-12

    def test_is_refused_where_nothing_is_left(self):
        with pytest.raises(ValueError, match="^null_space: what is kept fills every direction that the concept"):
            redirect_concept(tiny("sd"), "cat", anchor="horse", null_space=True, ridge=1e-9)


class TestWhereTextEnters:
    @pytest.mark.parametrize("kind", KIND_NAMES)
    def test_states_are_those_that_the_layers_see(self, kind):
        pipe = tiny(kind)
        side = text_side_of(pipe)
        told = side.told([ASKED])
        for layer in side.layers:
            seen = drawn_states(pipe, layer.linear, ASKED)
            torch.testing.assert_close(
                told.streams[layer.stream][0].double(), seen[:, : layer.width], rtol=0, atol=1e-5
            )
        assert {layer.stream for layer in side.layers} == set(told.streams)

    @pytest.mark.parametrize("kind", KIND_NAMES)
    def test_nothing_else_reads_text(self, kind):
        """With those layers answering the same to everything, prompts have no effect at all."""
        pipe = tiny(kind)
        assert far(*(latents(pipe, [prompt], guidance=1.0) for prompt in (ASKED, "a red house"))) > 0
        for layer in text_side_of(pipe).layers:
            with torch.no_grad():
                layer.linear.weight[:, : layer.width] = 0
        if kind == "pixart":  # the mask still tells how many words there are
            pipe.encode_prompt = with_all_attended(pipe.encode_prompt)
        torch.testing.assert_close(
            *(latents(pipe, [prompt], guidance=1.0) for prompt in (ASKED, "a red house")), rtol=0, atol=1e-5
        )

    def test_masked_padding_does_not_count(self):
        told = text_side_of(tiny("pixart")).told([ASKED])
        assert told.attended.sum().item() == len(ASKED.split()) + 2

    def test_a_pipeline_without_t5(self):
        pipe = tiny("sd3")
        pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
        before = latents(pipe, [INSTEAD])
        redirect_concept(pipe, "cat", ridge=1e-9, **GIVEN)
        assert far(latents(pipe, [ASKED]), before) < 1e-3 * before.norm()


def with_all_attended(encode):
    def encoded(*args, **kwargs):
        states, mask, *rest = encode(*args, **kwargs)
        return states, torch.ones_like(mask), *rest

    return encoded


class TestSaved:
    @pytest.mark.parametrize("kind", KIND_NAMES)
    def test_stock_diffusers_loads_it(self, kind, tmp_path):
        from diffusers import DiffusionPipeline

        pipe = redirect_concept(tiny(kind), "cat", **GIVEN)
        pipe.save_pretrained(tmp_path)
        loaded = DiffusionPipeline.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        loaded.default_sample_size = getattr(pipe, "default_sample_size", None)
        torch.testing.assert_close(latents(loaded, [ASKED]), latents(pipe, [ASKED]), rtol=0, atol=1e-4)

    @pytest.mark.parametrize("kind", [kind for kind in KIND_NAMES if kind != "pixart"])
    def test_as_a_lora_of_full_rank(self, kind, tmp_path):
        plain, other = tiny(kind), tiny(kind)
        found = ConceptRedirection.of(plain, "cat", anchor="horse", wordings=[ASKED], keep=KEPT)
        before = latents(plain, [ASKED])
        found.save_lora(plain, tmp_path, 128)
        found.apply(plain)
        other.load_lora_weights(tmp_path)
        wanted = latents(plain, [ASKED])
        assert far(latents(other, [ASKED]), wanted) < 1e-4 * far(before, wanted)

    def test_a_lora_of_low_rank_is_the_best_on_the_states(self):
        from hf_unlearn.unlearning.diffusion.closed_form import low_rank

        generator = torch.Generator().manual_seed(0)
        states, change = (torch.randn(n, 12, generator=generator).double() for n in (40, 7))
        states = states * torch.linspace(0.1, 5, 12)
        errors = []
        for rank in (1, 3, 7):
            out, down = low_rank(change, states.T @ states, rank)
            assert out.shape == (7, rank)
            errors.append((states @ (change - out @ down).T).square().sum().item())
            # Eckart and Young: what is left are the squared singular values of the answers behind the first ones
            expected = torch.linalg.svdvals(states @ change.T)[rank:].square().sum().item()
            assert errors[-1] == pytest.approx(expected, rel=1e-6, abs=1e-8)

    def test_pixart_has_no_lora(self, tmp_path):
        pipe = tiny("pixart")
        found = ConceptRedirection.of(pipe, "cat", anchor="horse", wordings=[ASKED], keep=KEPT)
        with pytest.raises(ValueError, match="^pipe: PixArtSigmaPipeline loads no LoRA in diffusers"):
            found.save_lora(pipe, tmp_path, 4)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_weights_in_16_bits(self, dtype):
        pipe = tiny("sd")
        original = {name: value.to(dtype) for name, value in pipe.unet.state_dict().items()}
        pipe.to(dtype)
        effect = PromptEffect.of(pipe, [(ASKED, INSTEAD)])
        redirect_concept(pipe, "cat", **GIVEN)
        assert abs(effect.remaining(pipe)) < 0.1 * effect.guidance
        new = pipe.unet.state_dict()
        assert {value.dtype for value in new.values()} == {dtype}
        changed = {name for name in new if not torch.equal(new[name], original[name])}
        assert changed == {f"{layer.name}.weight" for layer in text_side_of(pipe).layers}

    def test_is_rounded_once(self):
        exact, pipe = tiny("sd"), tiny("sd")
        pipe.unet.to(torch.bfloat16)
        for parameter, rounded in zip(exact.unet.parameters(), pipe.unet.parameters(), strict=True):
            parameter.data = rounded.float()
        found = ConceptRedirection.of(exact, "cat", anchor="horse", wordings=[ASKED], keep=KEPT)
        found.apply(exact)
        found.apply(pipe)
        for parameter, rounded in zip(exact.unet.parameters(), pipe.unet.parameters(), strict=True):
            assert torch.equal(parameter.to(torch.bfloat16), rounded)


class TestMoments:
    def test_a_file_stands_for_its_prompts(self, tmp_path):
        by_list, by_file, by_moments = (tiny("sdxl") for _ in range(3))
        moments = TextMoments.of(by_list, KEPT, batch_size=1)
        moments.save(tmp_path / "kept.safetensors")
        plain = GIVEN | {"keep": KEPT}
        redirect_concept(by_list, "cat", **plain)
        redirect_concept(by_file, "cat", **(plain | {"keep": tmp_path / "kept.safetensors"}))
        redirect_concept(by_moments, "cat", **(plain | {"keep": moments}))
        for edited in (by_file, by_moments):
            for first, second in zip(by_list.unet.parameters(), edited.unet.parameters(), strict=True):
                torch.testing.assert_close(first, second, rtol=0, atol=1e-5)

    def test_are_means_over_rows(self):
        pipe = tiny("pixart")
        side = text_side_of(pipe)
        moments = TextMoments.of(pipe, [*KEPT, "", *KEPT])
        rows = torch.cat([told.tokens[told.attended].double() for told in (side.told([text]) for text in (*KEPT, ""))])
        torch.testing.assert_close(moments.second["tokens"], rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
        assert moments.rows == {"tokens": len(rows)}

    def test_the_empty_prompt_is_a_twentieth(self):
        side = text_side_of(tiny("sd"))
        prompts = kept_prompts()[:100]
        moments = TextMoments.of(side.pipe, prompts)
        sums = {text: side.told([text]).tokens[0].double() for text in (*prompts, "")}
        expected = sum((5 if not text else 1) * rows.T @ rows for text, rows in sums.items()) / (105 * 12)
        torch.testing.assert_close(moments.second["tokens"], expected, rtol=1e-5, atol=1e-5)

    def test_together(self):
        pipe = tiny("sd")
        first, second = TextMoments.of(pipe, KEPT), TextMoments.of(pipe, ["a photo of a cat"])
        both = first.plus(second)
        assert both.rows["tokens"] == 5 * 12
        expected = (3 * first.second["tokens"] + 2 * second.second["tokens"]) / 5
        torch.testing.assert_close(both.second["tokens"], expected, rtol=0, atol=1e-9)

    def test_of_another_encoder(self, tmp_path):
        pipe, other = tiny("sd"), tiny("sd")
        for parameter in other.text_encoder.parameters():
            nn.init.normal_(parameter)
        for moments in (TextMoments.of(other, KEPT), TextMoments.of(tiny("sdxl"), KEPT)):
            with pytest.raises(ValueError, match="^keep: these moments are of another text encoder"):
                redirect_concept(pipe, "cat", anchor="horse", keep=moments)

    def test_damaged(self, tmp_path):
        (tmp_path / "kept.safetensors").write_bytes(b"no")
        with pytest.raises(ValueError, match=r"kept.safetensors is damaged"):
            TextMoments.load(tmp_path / "kept.safetensors")
        with pytest.raises(ValueError, match=r"nothing.safetensors is missing"):
            redirect_concept(tiny("sd"), "cat", anchor="horse", keep="nothing.safetensors")
