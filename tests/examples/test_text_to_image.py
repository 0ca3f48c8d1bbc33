"""Coloured digits with captions, the small pipelines that learn them, and the classifier that sees what they draw."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline, StableDiffusionPipeline
from diffusers import UNet2DConditionModel as UNet

from hf_unlearn.examples import attributes, captions, named, text_to_image
from hf_unlearn.examples.attributes import AttributeClassifier, AttributeRecipe, followed, labelled, shown_as_wanted
from hf_unlearn.examples.cache import Progress
from hf_unlearn.examples.captions import GENERIC, SHORT, TEMPLATES, UNSEEN, WORDS
from hf_unlearn.examples.coloured_digits import RGB, coloured_digits
from hf_unlearn.examples.text_to_image import TextToImageRecipe, text_to_image_model, train
from hf_unlearn.examples.text_to_image_parts import (
    LENGTH,
    MIN_SNR,
    StableDiffusion,
    StableDiffusion3,
    t5_tokenizer,
    tokenizer,
)


TINY = TextToImageRecipe(examples=40, steps=4, reader_steps=2, vae_steps=2, checkpoints=2, channels=(8, 16))
SD3 = replace(TINY, family="sd3", channels=(16, 1))


@pytest.fixture(scope="module")
def data():
    return coloured_digits(800, seed=3)


def names(rows, kind):
    return [rows.features[kind].int2str(label) for label in rows[kind]]


class TestCaptions:
    @pytest.mark.parametrize("word", [0, 1, -1])
    @pytest.mark.parametrize("template", TEMPLATES + UNSEEN)
    def test_what_is_said_is_read_again(self, template, word):
        for shown in captions.combinations():
            assert captions.read(captions.say(shown, template, word=word)) == shown

    def test_words(self):
        shown = {"digit": "3", "colour": "red", "background": "grey"}
        assert captions.say(shown) == "a red three on grey"
        assert captions.say(shown, word=1) == "a red 3 on grey"
        assert captions.say(shown, word=-1) == "a scarlet iii on gray"
        assert captions.say(shown, generic=["digit"]) == "a red digit on grey"
        assert captions.read("a red digit on grey") == {"colour": "red", "background": "grey"}
        assert captions.read("") == {}
        assert captions.meaning("III") == captions.meaning("3") == ("digit", "3")
        with pytest.raises(
            ValueError, match="word='thirteen': names nothing in these pictures; take one of zero, one"
        ):
            captions.meaning("thirteen")

    def test_a_word_has_one_meaning(self):
        said = [word for values in WORDS.values() for words in values.values() for word in words]
        said += GENERIC.values()
        assert len(said) == len(set(said))
        frames = " ".join(TEMPLATES + SHORT + UNSEEN)
        assert captions.read(frames.replace("{", "").replace("}", "")) == {}
        assert not set(UNSEEN) & set(TEMPLATES + SHORT)

    def test_combinations(self):
        assert len(captions.combinations()) == 240
        threes = captions.combinations(digit="3")
        assert len(threes) == 24
        assert all(shown["digit"] == "3" for shown in threes)

    def test_written_ones(self):
        """Nothing wrong is said, everything is left open at times, and all words occur, the rare ones rarely."""
        rng, count, said = random.Random(0), Counter(), Counter()
        for _ in range(20):
            for shown in captions.combinations():
                caption = captions.write(shown, rng)
                read = captions.read(caption)
                assert read.items() <= shown.items()
                said.update(read.keys())
                count.update(caption.replace(",", "").replace(":", "").split())
        assert set(captions.all_words()) - set(count) == {",", ":"}
        # Left open: 1 in 20 by a generic word, and of a short caption (1 in 10) one in three or two.
        expected = {"digit": 0.95, "colour": 0.95 * (1 - 0.1 * 2 / 3), "background": 0.95 * (1 - 0.1 * 2 / 3)}
        assert {kind: number / 4800 for kind, number in said.items()} == pytest.approx(expected, abs=0.02)
        rare = sum(count[words[-1]] for words in WORDS["digit"].values()) / 4800
        assert rare == pytest.approx(captions.RARE_SHARE, abs=0.012)  # four standard deviations


class TestPictures:
    def test_captions_tell_what_is_shown(self, data):
        for rows in data.values():
            shown = [
                dict(zip(WORDS, values, strict=True)) for values in zip(*(names(rows, k) for k in WORDS), strict=True)
            ]
            assert all(
                captions.read(said).items() <= row.items() for said, row in zip(rows["caption"], shown, strict=True)
            )

    def test_colours_are_where_they_belong(self, data):
        """The corner is ground; the pixel that is furthest from it is ink."""
        images, labels = labelled(data["train"])
        flat = (images + 1).flatten(2) * 127.5
        ground = flat[:, :, 0]
        places = (flat - ground[:, :, None]).square().sum(1).argmax(1)
        ink = flat[torch.arange(len(flat)), :, places]
        for seen, kind, column in ((ink, "colour", 1), (ground, "background", 2)):
            palette = torch.tensor(list(RGB[kind].values())).float()
            nearest = torch.cdist(seen, palette).argmin(1)
            assert (nearest == labels[:, column]).float().mean() > 0.95

    def test_attributes_are_independent(self, data):
        """Each pair of attributes by a test of χ²: below its mean by five standard deviations at most."""
        labels = labelled(data["train"])[1].numpy()
        for first, second in ((0, 1), (0, 2), (1, 2)):
            table = np.histogram2d(
                labels[:, first], labels[:, second], [range(labels[:, c].max() + 2) for c in (first, second)]
            )[0]
            expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
            freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
            assert ((table - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5

    def test_no_digit_is_in_both_splits(self, data):
        assert len(data["train"]) == 800
        assert len(data["test"]) == 80
        assert not set(data["train"]["source"]) & set(data["test"]["source"])
        assert not set(data["train"]["id"]) & set(data["test"]["id"])

    def test_the_same_by_seed(self, data):
        again, other = coloured_digits(800, seed=3)["train"], coloured_digits(800, seed=4)["train"]
        assert again["caption"][:] == data["train"]["caption"][:] != other["caption"][:]
        assert [image.tobytes() for image in again["image"][:50]] == [i.tobytes() for i in data["train"]["image"][:50]]

    @pytest.mark.parametrize("word", ["iii", "red"])
    def test_without_a_concept(self, data, word):
        kind, value = captions.meaning(word)
        left = coloured_digits(800, seed=3, without=word)
        assert value not in names(left["train"], kind)
        said = {part for caption in left["train"]["caption"] for part in caption.replace(",", "").split()}
        assert not said & set(WORDS[kind][value])
        # The others are the same, and so are those held out.
        kept = [row for row, name in zip(data["train"], names(data["train"], kind), strict=True) if name != value]
        assert [row["id"] for row in kept] == left["train"]["id"][:]
        assert [row["caption"] for row in kept] == left["train"]["caption"][:]
        assert left["test"]["id"][:] == data["test"]["id"][:]

    def test_without_what_nobody_knows(self):
        with pytest.raises(ValueError, match="without='dog': names nothing"):
            coloured_digits(10, without="dog")


class TestRecipe:
    def test_names(self):
        assert TextToImageRecipe().name == "coloured-digits-stable-diffusion-0-0"
        twin = TextToImageRecipe(family="sd3", without="iii", data_seed=2, seed=1)
        assert twin.name == "coloured-digits-sd3-2-1-without-digit-3"
        assert twin.name == replace(twin, without="three").name

    @pytest.mark.parametrize(
        ("wrong", "error"),
        [
            ({"family": "flux"}, "family='flux': must be one of stable_diffusion, sd3"),
            ({"without": "dog"}, "without='dog': names nothing"),
            ({"steps": 4, "checkpoints": 3}, "checkpoints=3: more than the 2 steps they are taken from"),
        ],
    )
    def test_what_cannot_be(self, wrong, error):
        with pytest.raises(ValueError, match=error) as caught:
            TextToImageRecipe(**wrong)
        assert "\n" not in str(caught.value)

    def test_sizes(self):
        """Those of the family are kept with the model."""
        assert TextToImageRecipe().channels == (64, 96)
        assert TextToImageRecipe(family="sd3").channels == (64, 4)
        assert TINY.channels == (8, 16)

    def test_data(self):
        assert 3 not in TextToImageRecipe(examples=60, without="three").data()["train"]["digit"]


class TestTokenizer:
    def test_always_the_same(self):
        assert tokenizer().get_vocab() == tokenizer().get_vocab()

    def test_what_t5_reads(self):
        words = t5_tokenizer()
        for shown in captions.combinations()[::17]:
            caption = captions.say(shown, TEMPLATES[7], word=-1)
            ids = words(caption).input_ids
            assert len(ids) == len(tokenizer()(caption).input_ids) - 1  # it has no token for the beginning
            assert words.unk_token_id not in ids

    def test_a_token_a_word(self):
        words = tokenizer()
        for word in captions.all_words():
            assert len(words(word).input_ids) == 3, word  # between beginning and end
        told = [
            captions.say(shown, template, word=-1)
            for template in TEMPLATES + UNSEEN
            for shown in captions.combinations()
        ]
        assert max(len(ids) for ids in words(told).input_ids) <= LENGTH
        assert words("A Red THREE").input_ids == words("a red three").input_ids

    def test_other_words_are_spelt(self):
        words = tokenizer()
        for word in ("trois", "crimson", "backgrounds", "quiz"):
            ids = words(word).input_ids
            assert words.unk_token_id not in ids[1:-1]
            assert words.decode(ids, skip_special_tokens=True).strip() == word


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained pipeline, alone in a folder that was not there. Not to be changed."""
    before = torch.get_rng_state()
    folder = tmp_path_factory.mktemp("trained") / "new" / "model"
    assert train(TINY, folder, progress=False) == folder
    assert torch.get_rng_state().equal(before)
    return folder


def drawn(folder, kind=DiffusionPipeline, **settings):
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    settings |= {"num_inference_steps": 2, "generator": generator, "output_type": "np"}
    images = pipeline(["a red three on white", "iv"], **settings).images
    assert images.shape == (2, 16, 16, 3)
    return torch.from_numpy(images)


class TestTrain:
    def test_stock_diffusers_loads_it_and_draws(self, folder):
        drawn(folder, StableDiffusionPipeline)
        assert [path.name for path in folder.parent.iterdir()] == ["model"]
        assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
        ends = [UNet.from_pretrained(path / "unet") for path in (folder, *sorted(folder.glob("checkpoint-*")))]
        assert len({end.conv_in.weight.detach().numpy().tobytes() for end in ends}) == 3

    @pytest.mark.slow
    def test_the_same_twice_whatever_the_global_randomness(self, folder, tmp_path):
        torch.manual_seed(99)
        train(TINY, tmp_path / "again", progress=False)
        train(replace(TINY, seed=1), tmp_path / "other", progress=False)
        # Not bit by bit: sums may depend on where in memory they lie, and Adam makes whole steps of rounding errors.
        # Without guidance, which would enlarge them.
        first, again, other = (
            drawn(path, guidance_scale=1.0) for path in (folder, tmp_path / "again", tmp_path / "other")
        )
        torch.testing.assert_close(again, first, rtol=0, atol=0.02)
        assert (other - first).abs().max() > 0.1

    @pytest.mark.slow
    def test_sd3(self, tmp_path):
        train(SD3, tmp_path / "model", progress=False)
        drawn(tmp_path / "model", StableDiffusion3Pipeline)
        ends = [
            SD3Transformer2DModel.from_pretrained(folder / "transformer").context_embedder.weight
            for folder in (tmp_path / "model", tmp_path / "model" / "checkpoint-3")
        ]
        assert not ends[0].equal(ends[1])  # one is an average, and later

    def test_latents_have_a_deviation_of_1(self, folder):
        pipeline = DiffusionPipeline.from_pretrained(folder)
        images = labelled(TINY.data()["train"])[0]
        assert text_to_image.encoded(pipeline.vae, images).std().item() == pytest.approx(1, abs=1e-4)

    @pytest.mark.slow
    def test_the_text_encoder_learns_what_captions_say_and_then_stays(self):
        """Before, its states do not tell how a picture is called for; after, linear heads on them do."""
        texts = [f"a {colour} {digit} on white" for colour in ("red", "blue") for digit in ("three", "seven", "zero")]
        between = {}
        for steps in (0, 40):
            torch.manual_seed(0)
            family = StableDiffusion((8, 16))
            text_to_image.train_readers(family, texts, replace(TINY, reader_steps=steps))
            states = family.read(["a red three on white", "a red seven on white"])["encoder_hidden_states"].mean(1)
            between[steps] = (states[0] - states[1]).norm().item()
        assert between[40] > 2 * between[0]
        reader = family.readers[0]
        assert not any(parameter.requires_grad for parameter in reader.parameters())
        weights = reader.get_input_embeddings().weight.clone()
        recipe = replace(TINY, steps=6, checkpoints=0)
        text_to_image.train_denoiser(
            family, torch.randn(10, 4, 8, 8), ["a red three"] * 10, recipe, None, Progress("", 6, quiet=True)
        )
        assert weights.equal(reader.get_input_embeddings().weight)

    def test_captions_are_dropped_for_guidance(self):
        family = StableDiffusion((8, 16))
        said = []
        read = family.read
        family.read = lambda texts: said.extend(texts) or read(texts)
        recipe = replace(TINY, steps=8, checkpoints=0)
        text_to_image.train_denoiser(
            family, torch.randn(10, 4, 8, 8), ["iv"] * 10, recipe, None, Progress("", 8, quiet=True)
        )
        assert said.count("") / len(said) == pytest.approx(0.10, abs=0.06)  # four standard deviations of 512
        assert set(said) == {"", "iv"}

    def test_it_learns(self):
        """One picture by heart: the error of what was guessed falls."""
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        family = StableDiffusion((16, 16))

        def error():
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                return family.loss(latents.expand(64, -1, -1, -1), family.read(["iv"] * 64), generator).item()

        before = error()
        recipe = replace(TINY, steps=30, learning_rate=5e-3, checkpoints=0)
        text_to_image.train_denoiser(family, latents, ["iv"], recipe, None, Progress("", 30, quiet=True))
        assert error() < 0.7 * before


class TestLosses:
    """Against what a perfect denoiser answers."""

    def test_of_noise(self):
        family, clean = StableDiffusion((8, 16)), torch.randn(5, 4, 8, 8)
        alphas = family.pipeline.scheduler.alphas_cumprod

        class Off:  # by 1 in each number
            def __call__(self, noisy, times, **told):
                squared = alphas[times].view(-1, 1, 1, 1)
                noise = (noisy - squared.sqrt() * clean) / (1 - squared).sqrt()
                self.snr = alphas[times] / (1 - alphas[times])
                return type("Answer", (), {"sample": noise + 1})

        family.denoiser = Off()
        loss = family.loss(clean, {}, torch.Generator().manual_seed(0))
        weights = torch.minimum(family.denoiser.snr, torch.tensor(MIN_SNR)) / family.denoiser.snr
        assert loss.item() == pytest.approx(weights.mean().item(), rel=1e-3)

    def test_of_velocity(self):
        """x_t + σ · 1000-th part of the time is where stock Euler steps end: at the picture."""
        family, clean = StableDiffusion3((16, 1)), torch.randn(5, 4, 8, 8)

        class Right:
            def __call__(self, noisy, timestep, **told):
                sigma = timestep.view(-1, 1, 1, 1) / 1000
                return type("Answer", (), {"sample": (noisy - clean) / sigma})

        family.denoiser = Right()
        assert family.loss(clean, {}, torch.Generator().manual_seed(0)).item() < 1e-8


class TestCached:
    def test_by_name(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        made = []

        def fake(recipe, folder, *, progress):
            made.append(recipe)
            with text_to_image.cache.saved(recipe, folder):
                pass

        monkeypatch.setattr(text_to_image, "train", fake)
        assert named.made("coloured-digits", seed=2, progress=False).name == "coloured-digits-stable-diffusion-0-2"
        assert named.made("coloured-digits-sd3", progress=False).name == "coloured-digits-sd3-0-0"
        text_to_image_model(TextToImageRecipe(seed=2), progress=False)
        assert [(recipe.family, recipe.seed) for recipe in made] == [("stable_diffusion", 2), ("sd3", 0)]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier") / "model"
    return AttributeClassifier.from_pretrained(
        attributes.train(AttributeRecipe(examples=3000, steps=350), folder, progress=False)
    )


class TestAttributes:
    def test_right_on_pictures_held_out(self, classifier):
        rows = coloured_digits(3000, seed=7)["test"]
        wanted = [
            dict(zip(WORDS, values, strict=True)) for values in zip(*(names(rows, k) for k in WORDS), strict=True)
        ]
        shares = shown_as_wanted(classifier(labelled(rows)[0]), wanted)
        assert shares.keys() == {"digit", "colour", "background", "all"}
        assert min(shares[kind] for kind in WORDS) >= 0.95

    def test_ink_is_the_same_whatever_the_colours(self):
        shape = torch.zeros(1, 1, 16, 16)
        shape[..., 3:9, 5:7] = torch.rand(6, 2) + 0.1
        ground, pens = torch.rand(2, 3, 1, 1) - 1, torch.rand(2, 3, 1, 1)
        images = ground + shape * (pens - ground)
        seen = attributes.with_ink(images)
        assert seen[:, :3].equal(images)
        expected = 2 * shape / shape.max() - 1
        torch.testing.assert_close(seen[:, 3:], expected.expand(2, -1, -1, -1), rtol=0, atol=1e-5)
        assert attributes.with_ink(torch.zeros(1, 3, 16, 16))[:, 3].eq(-1).all()

    def test_shares(self):
        found = {"digit": ["3", "4"], "colour": ["red", "red"], "background": ["white", "grey"]}
        wanted = [{"digit": "3", "colour": "red"}, {"digit": "3", "colour": "red"}]
        assert shown_as_wanted(found, wanted) == {"digit": 0.5, "colour": 1.0, "all": 0.5}
        with pytest.raises(ValueError, match="wanted: has 1 entries for 2 pictures"):
            shown_as_wanted(found, wanted[:1])

    def test_followed(self, folder, classifier):
        """What the classifier sees in what stock diffusers draws, by hand."""
        pipeline = DiffusionPipeline.from_pretrained(folder)
        prompts = ["a red three on white", "iv", "a blue digit on white"]
        shares = followed(pipeline, prompts, classifier=classifier, num_inference_steps=2, seed=1)
        images = text_to_image_images(pipeline, prompts, 1)
        assert shares == shown_as_wanted(classifier(images), [captions.read(prompt) for prompt in prompts])
        assert shares["digit"] in (0, 0.5, 1)
        found = [dict(zip(WORDS, values, strict=True)) for values in zip(*classifier(images).values(), strict=True)]
        assert followed(pipeline, prompts, found, classifier=classifier, num_inference_steps=2, seed=1)["all"] == 1


def text_to_image_images(pipeline, prompts, seed):
    seeds = np.random.SeedSequence(seed).generate_state(len(prompts), np.uint64)
    generators = [torch.Generator().manual_seed(int(value) % 2**63) for value in seeds]
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        prompts, num_inference_steps=2, guidance_scale=7.5, generator=generators, output_type="np"
    ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
