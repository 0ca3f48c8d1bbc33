"""The checker: what it releases, that it loads whole or not at all, and that it holds in Stable Diffusion's slot."""

import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import torch
from filter_data import (
    Flatten,
    bright_images,
    clean_latents,
    dark_images,
    fitted_filter,
    fitter_of_latents,
    of_brightness,
    seeded,
    tiny_encoder,
    undesired_latents,
    unmarked_latents,
)
from fresh import run_python
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_unlearn import FASTConfig, FASTFitter, FASTSafetyChecker, FilterEncoder, FilterOutput
from hf_unlearn.filtering.integrity import fingerprint_of_scores


KINDS = ("latents", "resnet", "vit", "clip", "bert", "own")
TEXTS = {
    "undesired": ["forget me", "forget this", "please forget"],
    "clean": ["keep me", "the quick brown fox", "my order"],
}


def assert_near(found, expected):
    """Scores of the same weights: fp32, below 100 summands of at most 10, so some √100 · 10 · 6e-8 = 6e-6, × 10."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=6e-5)


def of_latents(score="quadratic", **arguments):
    return fitter_of_latents(score, **arguments).fit().checker()


def of_two_concepts():
    """Each looks along one axis."""
    fitter = FASTFitter(score="mean_difference", concepts=("first", "second"))
    x = np.eye(4)
    for axis, name in enumerate(fitter.concepts):
        fitter.update(undesired=np.stack([2 * x[axis], 3 * x[axis]]), concept=name)
    fitter.update(clean=np.stack([-x[2] * 0, x[3] * 1e-9]))
    return fitter.fit(threshold="pooled_mean").checker()


def own_encoder(scale=1.0):
    return FilterEncoder.own(Flatten(64, scale), name="flat")


def case(kind, request):
    """A checker with an encoder of some kind, and inputs for it."""
    if kind == "latents":
        return of_latents(), torch.from_numpy(undesired_latents(10, seed=8))
    if kind == "bert":
        bert, tokenizer = request.getfixturevalue("tiny_bert").bert, request.getfixturevalue("tokenizer")
        encoder = FilterEncoder(bert, kind="text", tokenizer=tokenizer, normalize=True)
        fitter = FASTFitter(encoder, score="lda").update(**TEXTS)
        return fitter.fit(threshold="pooled_mean").checker(), ["forget the order", "", "keep this fox in Paris"]
    channels = 3 if kind == "clip" else 1
    images = bright_images(5, channels, seed=4) * 1.8 - 0.9
    if kind in ("clip", "own"):
        return of_brightness(own_encoder() if kind == "own" else tiny_encoder("clip"), channels), images
    model = request.getfixturevalue(f"tiny_{kind}").base_model
    return of_brightness(FilterEncoder(model, kind="image")), images


class TestJudging:
    @pytest.mark.parametrize("score", ["quadratic", "mean_difference"])
    def test_blocks_what_scores_above(self, score):
        fitted = fitter_of_latents(score).fit()
        concept, checker = fitted["undesired"], fitted.checker()
        x = np.concatenate([undesired_latents(50, seed=8), clean_latents(50, seed=8)])
        verdict = checker.judge(torch.from_numpy(x))
        expected = concept.score(x)
        np.testing.assert_allclose(verdict.scores[:, 0], expected, rtol=1e-4, atol=1e-4)
        assert verdict.flags.tolist() == (expected > concept.threshold.value).tolist()
        assert 15 < sum(verdict.flags[:50]) <= 50
        assert sum(verdict.flags[50:]) < 10

    def test_at_the_threshold_it_is_released(self):
        checker, x = of_two_concepts(), torch.zeros(1, 4)  # of which every sum is exact
        scores = checker.judge(x).scores[0].numpy()
        for value, flagged in ((scores[1], False), (np.nextafter(scores[1], np.float32(-np.inf)), True)):
            checker.set_threshold("second", value.item())
            assert checker(x).flags == [flagged]

    def test_any_concept(self):
        checker = of_two_concepts()
        x = 5 * torch.tensor([[0.0, 0, 1, 1], [1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0], [-1, -1, 0, 0]])
        assert checker.concepts == ("first", "second")
        assert checker(x).flags == [False, True, True, True, False]
        assert checker.judge(x).scores.shape == (5, 2)
        checker.set_threshold("first", 100)
        assert checker(x).flags == [False, False, True, True, False]

    @pytest.mark.parametrize(("bad", "score"), [(math.nan, "quadratic"), (math.inf, "mean_difference")])
    def test_what_is_not_finite_is_blocked_and_nothing_else(self, bad, score):
        checker, x = of_latents(score), torch.from_numpy(clean_latents(20))
        checker.set_threshold("undesired", 1e30)
        assert not any(checker(x).flags)
        for value in (bad, -bad):
            x[4, 1] = value
            assert checker(x).flags == [row == 4 for row in range(20)]

    @pytest.mark.parametrize(("kind", "bad"), [("resnet", math.nan), ("vit", math.inf), ("own", -math.inf)])
    def test_broken_images(self, kind, bad, request):
        checker, images = case(kind, request)
        checker.set_threshold("bright", 1e30)
        images[2, 0, 3, 3] = bad
        assert checker(images).flags == [row == 2 for row in range(5)]

    def test_forms_of_latents(self):
        checker, x = of_latents(), torch.from_numpy(clean_latents(20))
        expected = checker.judge(x)
        for other in (x.view(20, 1, 2, 2), x.numpy(), x.tolist(), x.float()):
            found = checker.judge(other)
            assert torch.equal(found.flags, expected.flags)
            assert_near(found.scores, expected.scores)
        for odd in (torch.zeros(0, 4), torch.zeros(4), torch.zeros(3, 5), torch.zeros(3, 4, dtype=torch.long)):
            with pytest.raises(ValueError, match=r"^inputs: [^\n]*$"):
                checker.judge(odd)

    def test_encoder_of_another_size(self):
        checker = fitted_filter()
        checker.encoder = own_encoder()
        with pytest.raises(ValueError, match=r"^inputs: give embeddings of 64 numbers, the filter was fitted on 16$"):
            checker.judge(bright_images(2))

    def test_images_in_another_range(self):
        """In [0, 1] a dark image would be bright to a filter, or the other way round: refused, or scaled if it is said."""
        checker = fitted_filter()
        images = torch.cat([bright_images(2, 3), dark_images(2, 3)])
        halved = (images + 1) / 2
        for judge in (checker.judge, checker):
            with pytest.raises(
                ValueError, match=r"^images: has no pixel below 0, so it is in \[0, 1\][^\n]* value_range="
            ):
                judge(halved)
        expected = checker.judge(images)
        assert expected.flags.tolist() == [True, True, False, False]
        assert_near(checker.judge(halved, value_range=(0, 1)).scores, expected.scores)
        assert checker.judge(bright_images(2, 3).abs(), value_range=(-1, 1)).flags.all()
        as_bytes = (halved * 255).round().byte()
        assert checker.judge(as_bytes).flags.tolist() == expected.flags.tolist()

    def test_in_half_precision_scores_stay(self):
        """In 16 bits they would be off by 4e-3 of their terms."""
        checker, x = of_latents(), torch.from_numpy(clean_latents(20)).bfloat16()
        expected = checker.judge(x).scores
        for cast in (torch.bfloat16, torch.float16):
            found = checker.to(dtype=cast).judge(x)
            assert found.scores.dtype == torch.float32
            assert_near(found.scores, expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert_near(checker.judge(x).scores, expected)


class TestCalls:
    def test_output(self):
        """Of tensors and of arrays; what was given stays."""
        checker, images = of_brightness(own_encoder()), torch.cat([bright_images(2, seed=5), dark_images(2, seed=5)])
        output = checker(images)
        assert isinstance(output, FilterOutput)
        assert output.flags == [True, True, False, False]
        assert (output.images[:2] == -1).all()  # black
        assert torch.equal(output.images[2:], images[2:])
        assert images.max() > 0.9
        assert output.scores.shape == (4, 1)
        assert torch.equal(output[2], output.scores)
        array = (images / 2 + 0.5).permute(0, 2, 3, 1).numpy()
        found = checker(array)
        assert found.flags == [True, True, False, False]
        assert not found.images[:2].any()
        np.testing.assert_array_equal(found.images[2:], array[2:])
        assert array[:2].any()
        assert_near(found.scores, output.scores)

    @pytest.mark.parametrize(
        ("mode", "size"),
        [
            *(("L", (1, 1)), ("RGB", (8, 8)), ("RGBA", (300, 2)), ("LA", (1, 1)), ("P", (8, 8))),
            *(("1", (300, 2)), ("CMYK", (1, 1)), ("YCbCr", (8, 8)), ("I;16", (300, 2))),
        ],
    )
    def test_images_of_any_mode_and_size(self, mode, size):
        checker = fitted_filter()
        if mode == "I;16":
            bright, dark = (Image.fromarray(np.full(size[::-1], value, np.uint16)) for value in (64000, 1500))
        else:
            through = "RGB" if mode == "P" else "L"
            bright, dark = (Image.new("L", size, value).convert(through).convert(mode) for value in (250, 5))
        output = checker([bright, dark, bright])
        assert output.flags == [True, False, True]
        assert output.images[1] is dark
        assert output.images[0].size == size
        assert not np.asarray(output.images[0].convert("L")).any()
        assert np.asarray(bright if mode == "I;16" else bright.convert("L")).any()

    def test_texts(self, request):
        checker, _ = case("bert", request)
        output = checker([*TEXTS["undesired"], *TEXTS["clean"]])
        assert output.flags == [True] * 3 + [False] * 3
        assert output.images == [""] * 3 + TEXTS["clean"]

    def test_latents_and_actions(self, caplog, tmp_path):
        checker, x = of_latents(), torch.from_numpy(undesired_latents(20, seed=8))
        assert checker.action == "blank"
        output = checker(x)
        flags = torch.tensor(output.flags)
        assert flags.any()
        assert (output.images[flags] == 0).all()
        assert torch.equal(output.images[~flags], x[~flags])
        warning = "the filter gives out what it flags"
        assert warning not in caplog.text
        checker.action = "flag"
        assert warning in caplog.text
        output = checker(x)
        assert torch.equal(output.images, x)
        assert output.flags == flags.tolist()
        with pytest.raises(ValueError, match=r"^action='release': must be one of blank, flag$"):
            checker.action = "release"
        checker.save_pretrained(tmp_path)
        caplog.clear()
        assert FASTSafetyChecker.from_pretrained(tmp_path).action == "flag"
        assert warning in caplog.text

    def test_thresholds(self, tmp_path):
        checker = of_two_concepts()
        before = checker.thresholds
        assert set(before) == {"first", "second"}
        checker.set_threshold("second", 0.1)
        assert checker.thresholds == {"first": before["first"], "second": pytest.approx(0.1)}
        checker.save_pretrained(tmp_path)
        again = FASTSafetyChecker.from_pretrained(tmp_path)
        assert again.thresholds == checker.thresholds
        assert again.config.concepts[1]["threshold"]["rule"] == "fixed"

    def test_another_threshold_promises_nothing(self):
        checker = of_latents()
        entry = checker.config.concepts[0]
        assert "at most 5 % of clean samples are blocked" in entry["threshold"]["promise"]
        assert entry["figures"]["recall"]["value"] > 0
        checker.set_threshold("undesired", 2.5)
        entry = checker.config.concepts[0]
        assert entry["threshold"] == {"value": 2.5, "rule": "fixed", "promise": None}
        assert not entry["figures"]

    def test_bad_thresholds(self):
        """1e39 is finite in fp64, infinite where it is compared: it would release what is finite, and no file would load."""
        checker = of_latents()
        before = checker.thresholds
        for value in (math.nan, math.inf, -math.inf, 1e39):
            with pytest.raises(ValueError, match=r"^value=[^\n]*must be finite[^\n]*$"):
                checker.set_threshold("undesired", value)
        with pytest.raises(ValueError, match=r"^concept='cats': is not one of 'undesired'$"):
            checker.set_threshold("cats", 1.0)
        assert checker.thresholds == before

    def test_calibrated_on_unmarked_samples(self):
        """The bound on their contamination is part of the promise, and of the file."""
        fitter = FASTFitter().update(undesired=undesired_latents(20), unmarked=unmarked_latents(400))
        threshold = fitter.fit(max_prevalence=0.25, rate=0.1).checker().config.concepts[0]["threshold"]
        assert "unmarked samples" in threshold["promise"]
        assert "at most 25 % of what is drawn is undesired" in threshold["promise"]
        assert threshold["max_prevalence"] == 0.25


class TestSaving:
    @pytest.mark.parametrize("kind", KINDS)
    def test_loads_as_it_was(self, kind, request, tmp_path):
        checker, inputs = case(kind, request)
        expected = checker.judge(inputs)
        given = {"encoder": own_encoder()} if kind == "own" else {}
        for folder in (tmp_path / "once", tmp_path / "again"):  # and once more, from what was loaded
            checker.save_pretrained(folder)
            again = FASTSafetyChecker.from_pretrained(folder, **given)
            found = again.judge(inputs)
            assert_near(found.scores, expected.scores)
            assert torch.equal(found.flags, expected.flags)
            assert again.concepts == checker.concepts
            assert again.thresholds == checker.thresholds
            assert again.config.concepts == json.loads(json.dumps(checker.config.concepts))
            assert not again.training
            for name, value in checker.state_dict().items():
                assert again.state_dict()[name].equal(value)
            checker = again

    @pytest.mark.parametrize("marks", [2, 3])
    def test_quadratic_scores_without_directions(self, marks, tmp_path):
        """Two marks: the form is linear, and its directions are a tensor of no numbers."""
        checker, x = of_latents(undesired=marks), torch.from_numpy(clean_latents(9))
        checker.save_pretrained(tmp_path / "safety_checker")
        again = FASTSafetyChecker.from_pretrained(tmp_path, subfolder="safety_checker")
        assert_near(again.judge(x).scores, checker.judge(x).scores)

    @pytest.mark.parametrize(
        ("kind", "dtype"),
        [("vit", torch.bfloat16), ("clip", torch.float16), ("clip", "bfloat16"), ("latents", "bfloat16")],
    )
    def test_encoder_in_16_bits(self, kind, dtype, request, tmp_path):
        """The whole of it is cast, and nothing of the scores; and it comes back as it was saved."""
        checker, inputs = case(kind, request)
        checker.save_pretrained(tmp_path)
        again = FASTSafetyChecker.from_pretrained(tmp_path, dtype=dtype)
        again.save_pretrained(tmp_path / "again")
        third = FASTSafetyChecker.from_pretrained(tmp_path / "again")
        for loaded in (again, third):
            for name, value in checker.bank.state_dict().items():
                assert loaded.bank.state_dict()[name].dtype == torch.float32
                assert torch.equal(loaded.bank.state_dict()[name], value)
            if kind != "latents":
                wanted = torch.float16 if dtype == torch.float16 else torch.bfloat16
                assert {value.dtype for value in loaded.encoder.parameters()} == {wanted}
                assert_near(loaded.judge(inputs).scores, loaded.bank(loaded.encoder(inputs)))
            scores = loaded.judge(inputs).scores
            assert scores.dtype == torch.float32
            # 2⁻⁸ of some tens of roundings; the scores are of order 1.
            torch.testing.assert_close(scores, checker.judge(inputs).scores, rtol=0.1, atol=0.1)

    def test_own_encoder_is_asked_for(self, tmp_path):
        checker = of_brightness(own_encoder())
        checker.save_pretrained(tmp_path)
        assert not any(name.startswith("encoder") for name in load_file(tmp_path / "model.safetensors"))
        with pytest.raises(ValueError, match=r"^encoder: [^\n]*'flat'; pass encoder=[^\n]*$"):
            FASTSafetyChecker.from_pretrained(tmp_path)
        module, settings = own_encoder().model, {"name": "flat"}
        for other, what in (
            (own_encoder(scale=1.5), "has other weights[^\n]*'flat'$"),
            (FilterEncoder.own(module, **settings, normalize=True), "has another normalize than the one"),
            (FilterEncoder.own(module, **settings, size=(8, 8)), "has another preprocessing than the one"),
        ):
            with pytest.raises(ValueError, match=f"^encoder: {what}"):
                FASTSafetyChecker.from_pretrained(tmp_path, encoder=other)

    def test_own_encoder_of_another_size(self, tmp_path):
        encoder = FilterEncoder.own(lambda images: images.flatten(1), name="a function")
        of_brightness(encoder).save_pretrained(tmp_path)
        other = FilterEncoder.own(lambda images: images.flatten(1)[:, :9], name="a function")
        with pytest.raises(ValueError, match=r"^[^\n]* 9 numbers[^\n]*64$"):
            FASTSafetyChecker.from_pretrained(tmp_path, encoder=other).judge(bright_images(2))
        other(bright_images(1))  # now it is known
        with pytest.raises(ValueError, match=r"^encoder: gives 9 numbers an input, the filter was fitted on 64$"):
            FASTSafetyChecker.from_pretrained(tmp_path, encoder=other)

    @pytest.mark.parametrize("kind", ["latents", "vit"])
    def test_encoder_where_none_is_wanted(self, kind, request, tmp_path):
        case(kind, request)[0].save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"^encoder: the filter [^\n]*$"):
            FASTSafetyChecker.from_pretrained(tmp_path, encoder=own_encoder())

    def test_push_to_hub_is_another_method(self, tmp_path):
        with pytest.raises(ValueError, match=r"^push_to_hub=True: [^\n]*push_to_hub\(\)$"):
            of_latents().save_pretrained(tmp_path / "filter", push_to_hub=True)
        assert not (tmp_path / "filter").exists()

    def test_no_such_folder(self, tmp_path):
        for folder in (tmp_path, str(tmp_path / "none")):
            with pytest.raises((OSError, ValueError)):
                FASTSafetyChecker.from_pretrained(folder)


# Breaks: functions of a filter's folder


def config(**changes):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def spec(**changes):
    return lambda folder: config(
        encoder_spec=json.loads((folder / "config.json").read_text())["encoder_spec"] | changes
    )(folder)


def weights(change):
    def changed(folder):
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return changed


def weight(key, change):
    return weights(lambda found: found.update({key: change(found[key]).clone()}))


def with_nan(value):
    value = value.clone()
    value.view(-1)[0] = math.nan
    return value


def cut_off(name):
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_bytes()[: (folder / name).stat().st_size // 2]
    )


def first_of_encoder(found):
    return min(key for key in found if key.startswith("encoder."))


BROKEN = {
    "linear": {
        "no config": lambda folder: (folder / "config.json").unlink(),
        "no weights": lambda folder: (folder / "model.safetensors").unlink(),
        "cut-off config": cut_off("config.json"),
        "cut-off weights": cut_off("model.safetensors"),
        "empty weights": lambda folder: (folder / "model.safetensors").write_bytes(b""),
        "config that is no JSON": lambda folder: (folder / "config.json").write_text("fast"),
        "config that is a list": lambda folder: (folder / "config.json").write_text("[]"),
        "empty config": lambda folder: (folder / "config.json").write_text("{}"),
        "weights of nothing": weights(lambda found: found.clear()),
        "one more": weights(lambda found: found.update(more=torch.ones(1))),
        "another shape": weight("bank.weight", lambda value: value[:-1]),
        "another threshold": weight("bank.threshold", lambda value: value + 1),
        "negated": weight("bank.weight", lambda value: -value),
        "NaN threshold": weight("bank.threshold", with_nan),
        "NaN weight": weight("bank.weight", with_nan),
        "another version": config(schema_version=2),
        "no version": config(schema_version=None),
        "no concepts": config(concepts=[]),
        "concepts are none": config(concepts=None),
        "one concept more": config(concepts=[{"name": "a"}, {"name": "b"}]),
        "concept without a name": config(concepts=[{}]),
        "no embedding": config(embedding_size=0),
        "another embedding": config(embedding_size=5),
        "no fingerprint": config(fingerprint=None),
        "unknown action": config(action="release"),
        "size as a word": config(embedding_size="four"),
    },
    "quadratic": {"no squares": config(components=0), "fewer directions": config(directions=1)},
    "encoder": {
        "no encoder": config(encoder_spec=None),
        "empty spec": config(encoder_spec={}),
        "own encoder": spec(kind="custom"),
        "reference": spec(reference={"id": "a/b"}),
        "unknown architecture": spec(architecture="NoSuchModel"),
        "architecture of another library": spec(architecture="os"),
        "another architecture": spec(architecture="ResNetModel"),
        "no config of it": spec(config=None),
        "NaN": weights(
            lambda found: found.update({first_of_encoder(found): with_nan(found[first_of_encoder(found)])})
        ),
        "cut-off weights": cut_off("model.safetensors"),
    },
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of filters, to be copied and broken."""
    checkers = {"linear": of_latents("mean_difference"), "quadratic": of_latents(), "encoder": fitted_filter()}
    folders = {name: tmp_path_factory.mktemp(name) for name in checkers}
    for name, folder in folders.items():
        checkers[name].save_pretrained(folder)
    return folders


class TestBrokenFiles:
    """All or nothing: one line, and no filter."""

    def refused(self, folder, **options):
        with pytest.raises((ValueError, OSError)) as caught:
            FASTSafetyChecker.from_pretrained(folder, **options)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(("kind", "how"), [(kind, how) for kind, breaks in BROKEN.items() for how in breaks])
    def test_one_thing_wrong(self, kind, how, saved, tmp_path):
        folder = shutil.copytree(saved[kind], tmp_path / "filter")
        BROKEN[kind][how](folder)
        self.refused(folder)
        if how == "another shape":
            for option in ({"ignore_mismatched_sizes": True}, {"use_safetensors": False}, {"low_cpu_mem_usage": True}):
                self.refused(folder, **option)

    @pytest.mark.parametrize("kind", BROKEN)
    def test_every_key_is_needed(self, kind, saved, tmp_path):
        """And a copy in which nothing is missing loads: so it is the break that the other tests see."""
        folder = shutil.copytree(saved[kind], tmp_path / "whole")
        config()(folder)
        weights(lambda found: None)(folder)
        loaded, whole = (FASTSafetyChecker.from_pretrained(path) for path in (folder, saved[kind]))
        assert loaded.thresholds == whole.thresholds
        for number, key in enumerate(load_file(folder / "model.safetensors")):
            other = shutil.copytree(saved[kind], tmp_path / str(number))
            weights(lambda found, key=key: found.pop(key))(other)
            self.refused(other)

    def test_every_file_of_a_text_filter_is_needed(self, request, tmp_path):
        checker, texts = case("bert", request)
        checker.save_pretrained(tmp_path / "whole")
        expected, messages = checker.judge(texts).scores, []
        for name in os.listdir(tmp_path / "whole"):
            for number, damage in enumerate((lambda folder, name=name: (folder / name).unlink(), cut_off(name))):
                folder = shutil.copytree(tmp_path / "whole", tmp_path / f"{name} {number}")
                damage(folder)
                try:
                    again = FASTSafetyChecker.from_pretrained(folder)
                except (ValueError, OSError) as error:
                    messages.append(str(error))
                else:  # a file that says nothing of it
                    assert_near(again.judge(texts).scores, expected)
        assert len(messages) >= 6  # without its config, weights or vocabulary, or with half of them
        assert not any("\n" in message for message in messages)

    def test_no_model_of_nothing(self):
        """Weights may even fit: without concepts every input would be released."""
        settings = {"schema_version": 1, "concepts": [{"name": "hats"}], "embedding_size": 4}
        checker = FASTSafetyChecker(FASTConfig(**settings))
        assert checker.judge(
            torch.randn(50, 4, generator=seeded())
        ).flags.all()  # without weights it blocks everything
        for change in ({"concepts": []}, {"embedding_size": 0}, {"schema_version": 2}):
            with pytest.raises(ValueError, match=r"^[^\n]*$"):
                FASTSafetyChecker(FASTConfig(**settings | change))

    def test_pickles_are_not_read(self, saved, tmp_path):
        folder = shutil.copytree(saved["linear"], tmp_path / "filter")
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        self.refused(folder)
        self.refused(folder, use_safetensors=False)


def slot(pipeline, checker):
    """The pipeline with the checker where the stock one would be."""
    from diffusers import StableDiffusionPipeline

    parts = pipeline.components | {"safety_checker": checker, "feature_extractor": checker.feature_extractor}
    filled = StableDiffusionPipeline(**parts, requires_safety_checker=True)
    filled.set_progress_bar_config(disable=True)
    return filled


def drawn(pipeline, output_type="np"):
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_images_per_prompt": 2, "num_inference_steps": 2, "output_type": output_type}
    return pipeline(prompt=["a photo", "hot p"], generator=seeded(), **settings)


def as_array(images):
    if isinstance(images, torch.Tensor):
        return images.permute(0, 2, 3, 1).float().numpy()
    return np.stack([np.asarray(image, np.float32) / 255 for image in images]) if isinstance(images, list) else images


def middle(checker, images):
    """Puts the threshold where two of four images lie above; which."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
    scores = checker.judge(pixels).scores[:, 0]
    ordered = scores.sort().values
    checker.set_threshold("bright", ordered[1:3].mean().item())
    return (scores > ordered[1:3].mean()).numpy()


class TestIntegrity:
    def test_everything_that_decides_is_covered(self, tmp_path, caplog):
        """One flipped sign in the encoder that is stored; another preprocessing, action, name, threshold."""
        of_brightness(tiny_encoder("vit"), 3).save_pretrained(tmp_path)
        weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
        whole, settings = load_file(weights), json.loads(config.read_text())
        assert FASTSafetyChecker.from_pretrained(tmp_path).config.fingerprint == settings["fingerprint"]
        for key in ("encoder.model.layernorm.weight", "bank.weight", "bank.threshold"):
            changed = dict(whole)
            changed[key] = whole[key].clone()
            changed[key].view(-1)[0] *= -1
            save_file(changed, weights, {"format": "pt"})
            with pytest.raises(ValueError, match="are not those that its config.json was written for"):
                FASTSafetyChecker.from_pretrained(tmp_path)
        save_file(whole, weights, {"format": "pt"})
        spec = settings["encoder_spec"]
        for change in (
            {"action": "flag"},
            {"encoder_spec": spec | {"preprocessing": spec["preprocessing"] | {"mean": [0.4]}}},
            {"concepts": [settings["concepts"][0] | {"name": "dark"}]},
        ):
            config.write_text(json.dumps(settings | change))
            with pytest.raises(ValueError, match="are not those that its config.json was written for"):
                FASTSafetyChecker.from_pretrained(tmp_path)
        config.write_text(json.dumps(settings))
        loaded = FASTSafetyChecker.from_pretrained(tmp_path)
        caplog.clear()
        config.write_text(json.dumps(settings | {"fingerprint": fingerprint_of_scores(loaded.config, loaded.bank)}))
        FASTSafetyChecker.from_pretrained(tmp_path)  # of an earlier version
        assert "whose fingerprint leaves out the encoder's weights" in caplog.text

    @pytest.mark.parametrize(
        ("file", "change", "message"),
        [
            (
                "tokenizer.json",
                {"normalizer": {"type": "Lowercase"}},
                "are not those that its config.json was written for",
            ),
            ("tokenizer.json", {"normalizer": {"type": "Nonsense"}}, "cannot be loaded"),
            ("tokenizer_config.json", {"model_max_length": 1}, "are not those that its config.json was written for"),
        ],
    )
    def test_how_texts_become_tokens_is_covered_too(self, file, change, message, request, tmp_path):
        case("bert", request)[0].save_pretrained(tmp_path)
        FASTSafetyChecker.from_pretrained(tmp_path)
        content = json.loads((tmp_path / file).read_text())
        (tmp_path / file).write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=message):
            FASTSafetyChecker.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"action": "flag"}, "action: a filter is loaded as it was saved"),
            ({"use_safetensors": False}, "use_safetensors: a filter is loaded as it was saved"),
            ({"ignore_mismatched_sizes": True}, "ignore_mismatched_sizes: a filter is loaded as it was saved"),
            ({"nonsense": 1}, "from_pretrained() got an unexpected keyword argument 'nonsense'"),
        ],
    )
    def test_what_is_asked_for_besides_is_not_swallowed(self, given, message, tmp_path):
        fitter_of_latents().fit().checker().save_pretrained(tmp_path)
        FASTSafetyChecker.from_pretrained(tmp_path, use_safetensors=True, ignore_mismatched_sizes=False)
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            FASTSafetyChecker.from_pretrained(tmp_path, **given)

    def test_a_config_that_asks_for_too_much_is_refused_before_anything_is_made(self, tmp_path):
        of_brightness(tiny_encoder("vit"), 3).save_pretrained(tmp_path)
        config = tmp_path / "config.json"
        settings = json.loads(config.read_text())
        spec = settings["encoder_spec"]
        for change, message in (
            ({"components": 10**9}, "components=1000000000: must be from 0 to 16"),
            ({"directions": 10**9}, "directions=1000000000: must be from 0 to 0"),
            ({"embedding_size": 10**9, "components": 10**9}, "config.json asks for"),
            (
                {"encoder_spec": spec | {"config": spec["config"] | {"intermediate_size": 10**9}}},
                "config.json asks for",
            ),
            ({"encoder_spec": spec | {"config": spec["config"] | {"num_hidden_layers": 10**9}}}, "weights or more"),
        ):
            config.write_text(json.dumps(settings | change))
            with pytest.raises(ValueError, match=message):
                FASTSafetyChecker.from_pretrained(tmp_path)


class TestSlot:
    """As `safety_checker` of Stable Diffusion: called with images and clip_input."""

    CLIP = torch.zeros(4, 3, 8, 8)

    @pytest.fixture
    def checker(self):
        return of_brightness(FilterEncoder.own(Flatten(192), name="flat", size=(8, 8), channels=3), channels=3)

    @pytest.fixture
    def images(self):
        return torch.cat([bright_images(2, 3, seed=5), dark_images(2, 3, seed=5)])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_tensors(self, checker, images, dtype):
        """Released ones stay in [−1, 1]; the pipelines take flagged ones as they are, in [0, 1]."""
        images = (images * 1.7).to(dtype)  # what a VAE decodes may be beyond
        images[3, 0, 0, 0] = math.nan
        before = images.clone()
        found, flags = checker(images=images, clip_input=self.CLIP.to(dtype))
        assert flags == [True, True, False, True]
        assert isinstance(flags, list)
        assert found.dtype == dtype
        assert not found[[0, 1, 3]].any()
        assert torch.equal(found[2], images[2])
        assert images.nan_to_num(9).equal(before.nan_to_num(9))  # what is given stays

    def test_arrays(self, checker, images):
        array = (images / 2 + 0.5).permute(0, 2, 3, 1).numpy()
        before = array.copy()
        found, flags = checker(images=array, clip_input=self.CLIP)
        assert flags == [True, True, False, False]
        assert not found[:2].any()
        np.testing.assert_array_equal(found[2:], array[2:])
        checker.action = "flag"
        for given in (array, images):
            checker(images=given, clip_input=self.CLIP)
        np.testing.assert_array_equal(array, before)
        assert images.max() > 0.9
        assert images.min() < -0.9

    # Of two draws: sums in another order differ by √72 · 6e-8, over 100 layers, ×2; or one level of 255.
    @pytest.mark.parametrize(("output_type", "rounding"), [("np", 1e-4), ("pt", 1e-4), ("pil", 1.01 / 255)])
    @pytest.mark.parametrize(("action", "scale"), [("blank", 1), ("flag", 1), ("flag", 4)])
    def test_in_the_pipeline(self, output_type, rounding, action, scale, checker, tiny_stable_diffusion):
        tiny_stable_diffusion.vae.decoder.conv_out.weight.data *= scale  # so that it leaves [−1, 1]
        plain = as_array(drawn(tiny_stable_diffusion, output_type).images)
        blocked = middle(checker, plain)
        assert sum(blocked) == 2
        assert plain[blocked].max() > 0.1
        assert scale == 1 or (plain == 1).any() or (plain == 0).any()
        checker.action = action
        output = drawn(slot(tiny_stable_diffusion, checker), output_type)
        assert output.nsfw_content_detected == blocked.tolist()
        found = as_array(output.images)
        np.testing.assert_allclose(found[~blocked], plain[~blocked], rtol=0, atol=rounding * scale)
        if action == "blank":
            assert not found[blocked].any()
        else:
            np.testing.assert_allclose(found[blocked], plain[blocked], rtol=0, atol=rounding * scale)

    @pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
    def test_broken_decoder(self, checker, tiny_stable_diffusion):
        tiny_stable_diffusion.vae.decoder.conv_out.bias.data[0] = math.nan
        checker.set_threshold("bright", 1e30)
        output = drawn(slot(tiny_stable_diffusion, checker))
        assert output.nsfw_content_detected == [True] * 4
        assert not output.images.any()

    def test_pipeline_in_half_precision(self, checker, tiny_stable_diffusion):
        """Components are cast together; scores and thresholds are not."""
        pipeline = slot(tiny_stable_diffusion, checker)
        expected = {name: value.clone() for name, value in checker.bank.state_dict().items()}
        pipeline.to(torch.bfloat16)
        for name, value in pipeline.safety_checker.bank.state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(value, expected[name])
        assert len(drawn(pipeline).nsfw_content_detected) == 4

    SCRIPT = """
import json, sys
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

def attempt(loader):
    try:
        pipeline = loader.from_pretrained(sys.argv[1])
        pipeline.set_progress_bar_config(disable=True)
        output = pipeline(prompt=["a photo", "hot p"], num_images_per_prompt=2, num_inference_steps=2,
                          output_type="np", generator=torch.Generator().manual_seed(0))
    except Exception as error:
        return {"raised": f"{type(error).__name__}: {error}"}
    return {"flags": output.nsfw_content_detected, "brightest": [float(image.max()) for image in output.images],
            "checker": type(pipeline.safety_checker).__name__}

found = {"before": attempt(DiffusionPipeline), "own class": attempt(StableDiffusionPipeline)}
import hf_unlearn
found["imported"] = attempt(DiffusionPipeline)
from hf_unlearn import FASTSafetyChecker
found["named"] = attempt(DiffusionPipeline)
print("FOUND" + json.dumps(found))
"""

    def test_saved_pipeline_in_a_new_process(self, tiny_stable_diffusion, tmp_path):
        """It filters, or it does not load."""
        checker = of_brightness(tiny_encoder("clip"), channels=3)
        blocked = middle(checker, as_array(drawn(tiny_stable_diffusion).images))
        slot(tiny_stable_diffusion, checker).save_pretrained(tmp_path)
        found = json.loads(run_python(self.SCRIPT, tmp_path).stdout.split("FOUND")[1])
        for answer in found.values():
            if "raised" not in answer:
                assert answer["checker"] == "FASTSafetyChecker"
                assert answer["flags"] == blocked.tolist()
                assert [brightest == 0 for brightest in answer["brightest"]] == blocked.tolist()
        assert "flags" in found["named"], found["named"]
