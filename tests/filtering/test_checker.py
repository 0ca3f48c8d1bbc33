"""The checker: what it releases, that it loads whole or not at all, and that it holds in Stable Diffusion's slot."""

import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from checker_data import (
    Flatten,
    bright_images,
    clean_latents,
    dark_images,
    fitter_of_latents,
    of_brightness,
    seeded,
    tiny_clip,
    undesired_latents,
    unmarked_latents,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor

from hf_unlearn import FASTConfig, FASTFitter, FASTSafetyChecker, FilterEncoder, FilterOutput


KINDS = ("latents", "resnet", "vit", "clip", "bert", "own")
TEXTS = {
    "undesired": ["forget me", "forget this", "please forget"],
    "clean": ["keep me", "the quick brown fox", "my order"],
}


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


def case(kind, request):
    """A checker with an encoder of some kind, and inputs for it."""
    if kind == "latents":
        return of_latents(), torch.from_numpy(undesired_latents(10, seed=8))
    if kind == "bert":
        bert, tokenizer = request.getfixturevalue("tiny_bert").bert, request.getfixturevalue("tokenizer")
        encoder = FilterEncoder(bert, kind="text", tokenizer=tokenizer, normalize=True)
        fitter = FASTFitter(encoder, score="lda").update(**TEXTS)
        return fitter.fit(threshold="pooled_mean").checker(), ["forget the order", "", "keep this fox in Paris"]
    if kind == "clip":
        return of_brightness(tiny_clip(), channels=3), bright_images(5, 3, seed=4) * 1.8 - 0.9
    if kind == "own":
        return of_brightness(own_encoder()), bright_images(5, seed=4) * 1.8 - 0.9
    model = (
        request.getfixturevalue("tiny_resnet").resnet if kind == "resnet" else request.getfixturevalue("tiny_vit").vit
    )
    return of_brightness(FilterEncoder(model, kind="image")), bright_images(5, seed=4) * 1.8 - 0.9


def own_encoder(scale=1.0):
    return FilterEncoder.own(Flatten(64, scale), name="flat")


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
        checker, x = of_latents(), torch.from_numpy(clean_latents(20))
        scores = checker.judge(x).scores[:, 0]
        checker.set_threshold("undesired", scores[7].item())
        assert checker.judge(x).flags.tolist() == (scores > scores[7]).tolist()
        assert not checker.judge(x).flags[7]
        checker.set_threshold("undesired", np.nextafter(scores[7].numpy(), np.float32(-np.inf)).item())
        assert checker.judge(x).flags[7]

    def test_any_concept(self):
        checker = of_two_concepts()
        x = 5 * torch.tensor([[0.0, 0, 1, 1], [1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0], [-1, -1, 0, 0]])
        assert checker.concepts == ("first", "second")
        assert checker(x).flags == [False, True, True, True, False]
        assert checker.judge(x).scores.shape == (5, 2)
        checker.set_threshold("first", 100)
        assert checker(x).flags == [False, False, True, True, False]

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("score", ["quadratic", "mean_difference"])
    def test_what_is_not_finite_is_blocked_and_nothing_else(self, bad, score):
        checker, x = of_latents(score), torch.from_numpy(clean_latents(20))
        checker.set_threshold("undesired", 1e30)
        assert not any(checker(x).flags)
        x[4, 1] = bad
        assert checker(x).flags == [row == 4 for row in range(20)]

    @pytest.mark.parametrize("kind", ["resnet", "vit", "own"])
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_broken_images(self, kind, bad, request):
        checker, images = case(kind, request)
        checker.set_threshold("bright", 1e30)
        images[2, 0, 3, 3] = bad
        assert checker(images).flags == [row == 2 for row in range(5)]

    def test_batch_size_and_shape_of_latents(self):
        checker, x = of_latents(), torch.from_numpy(clean_latents(20))
        expected = checker.judge(x)
        for other in (x.view(20, 1, 2, 2), x.numpy(), x.tolist(), x.float()):
            found = checker.judge(other)
            assert torch.equal(found.flags, expected.flags)
            torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        "inputs", [torch.zeros(0, 4), torch.zeros(4), torch.zeros(3, 5), torch.zeros(3, 4, dtype=torch.long)]
    )
    def test_odd_latents(self, inputs):
        with pytest.raises(ValueError, match=r"^inputs: [^\n]*$"):
            of_latents().judge(inputs)

    def test_encoder_of_another_size(self, tiny_vit):
        checker = of_brightness(FilterEncoder(tiny_vit.vit, kind="image"))
        checker.encoder = own_encoder()
        with pytest.raises(ValueError, match=r"^inputs: give embeddings of 64 numbers, the filter was fitted on 16$"):
            checker.judge(bright_images(2))

    def test_in_half_precision_scores_stay(self):
        checker, x = of_latents(), torch.from_numpy(clean_latents(20)).bfloat16()
        expected = checker.judge(x).scores
        for cast in (torch.bfloat16, torch.float16):
            found = checker.to(dtype=cast).judge(x)
            assert found.scores.dtype == torch.float32
            assert torch.equal(found.scores, expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(checker.judge(x).scores, expected)


class TestCalls:
    def test_output(self):
        checker = of_brightness(own_encoder())
        images = torch.cat([bright_images(2, seed=5), dark_images(2, seed=5)])
        output = checker(images)
        assert isinstance(output, FilterOutput)
        assert output.flags == [True, True, False, False]
        assert (output.images[:2] == -1).all()  # black
        assert torch.equal(output.images[2:], images[2:])
        assert images.max() > 0.9  # what was given stays
        assert output.scores.shape == (4, 1)
        assert torch.equal(output[2], output.scores)

    def test_arrays(self):
        checker = of_brightness(own_encoder())
        images = torch.cat([bright_images(2, seed=5), dark_images(2, seed=5)])
        array = (images / 2 + 0.5).permute(0, 2, 3, 1).numpy()
        output = checker(array)
        assert output.flags == [True, True, False, False]
        assert not output.images[:2].any()
        np.testing.assert_array_equal(output.images[2:], array[2:])
        assert array[:2].any()  # what was given stays
        torch.testing.assert_close(output.scores, checker(images).scores)

    @pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK", "YCbCr", "I;16"])
    @pytest.mark.parametrize("size", [(1, 1), (8, 8), (300, 2)])
    def test_images_of_any_mode_and_size(self, mode, size, tiny_vit):
        checker = of_brightness(FilterEncoder(tiny_vit.vit, kind="image"))
        if mode == "I;16":
            images = [Image.fromarray(np.full(size[::-1], value, np.uint16)) for value in (64000, 1500)]
        else:
            images = [
                Image.new("L", size, value).convert("RGB" if mode == "P" else "L").convert(mode) for value in (250, 5)
            ]
        images = [images[0], images[1], images[0]]
        output = checker(images)
        assert output.flags == [True, False, True]
        assert output.images[1] is images[1]
        assert output.images[0].size == size
        assert not np.asarray(output.images[0].convert("L")).any()
        assert np.asarray(images[0].convert("L") if mode != "I;16" else images[0]).any()

    def test_texts(self, request):
        checker, _ = case("bert", request)
        texts = [*TEXTS["undesired"], *TEXTS["clean"]]
        output = checker(texts)
        assert output.flags == [True] * 3 + [False] * 3
        assert output.images == [""] * 3 + TEXTS["clean"]

    def test_latents(self):
        checker, x = of_latents(), torch.from_numpy(undesired_latents(20, seed=8))
        output = checker(x)
        flags = torch.tensor(output.flags)
        assert flags.any()
        assert (output.images[flags] == 0).all()
        assert torch.equal(output.images[~flags], x[~flags])

    def test_action(self, caplog):
        checker, x = of_latents(), torch.from_numpy(undesired_latents(20, seed=8))
        assert checker.action == "blank"
        flags = checker(x).flags
        checker.action = "flag"
        assert "flag" in caplog.text
        output = checker(x)
        assert torch.equal(output.images, x)
        assert output.flags == flags
        with pytest.raises(ValueError, match=r"^action='release': must be one of blank, flag$"):
            checker.action = "release"
        assert checker.action == "flag"

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
        assert entry["threshold"]["promise"] is None
        assert "confidence" not in entry["threshold"]
        assert not entry["figures"]
        assert entry["threshold"]["value"] == 2.5

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_threshold_that_is_none(self, value):
        checker = of_latents()
        before = checker.thresholds
        with pytest.raises(ValueError, match=r"^value=[^\n]*must be finite[^\n]*$"):
            checker.set_threshold("undesired", value)
        with pytest.raises(ValueError, match=r"^concept='cats': is not one of 'undesired'$"):
            checker.set_threshold("cats", 1.0)
        assert checker.thresholds == before

    def test_threshold_beyond_fp32(self):
        """Finite in fp64, infinite where it is compared: it would release what is finite, and no file would load."""
        checker = of_latents()
        before = checker.thresholds
        with pytest.raises(ValueError, match=r"^value=[^\n]*must be finite"):
            checker.set_threshold("undesired", 1e39)
        assert checker.thresholds == before


class TestSaving:
    @pytest.mark.parametrize("kind", KINDS)
    def test_loads_as_it_was(self, kind, request, tmp_path):
        checker, inputs = case(kind, request)
        expected = checker.judge(inputs)
        checker.save_pretrained(tmp_path)
        given = {"encoder": own_encoder()} if kind == "own" else {}
        again = FASTSafetyChecker.from_pretrained(tmp_path, **given)
        found = again.judge(inputs)
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-6)
        assert torch.equal(found.flags, expected.flags)
        assert again.concepts == checker.concepts
        assert again.thresholds == checker.thresholds
        assert again.config.concepts == json.loads(json.dumps(checker.config.concepts))
        assert not again.training
        assert again.config.concepts[0]["threshold"]["promise"] == checker.config.concepts[0]["threshold"]["promise"]
        # and once more, from what was loaded
        again.save_pretrained(tmp_path / "again")
        third = FASTSafetyChecker.from_pretrained(tmp_path / "again", **given)
        assert torch.equal(third.judge(inputs).scores, found.scores)

    @pytest.mark.parametrize("marks", [2, 3])
    def test_quadratic_scores_without_directions(self, marks, tmp_path):
        """Two marks: the form is linear, and its directions are a tensor of no numbers."""
        checker, x = of_latents(undesired=marks), torch.from_numpy(clean_latents(9))
        checker.save_pretrained(tmp_path)
        again = FASTSafetyChecker.from_pretrained(tmp_path)
        assert torch.equal(again.judge(x).scores, checker.judge(x).scores)

    def test_action_is_kept(self, tmp_path):
        checker = of_latents()
        checker.action = "flag"
        checker.save_pretrained(tmp_path)
        assert FASTSafetyChecker.from_pretrained(tmp_path).action == "flag"

    @pytest.mark.parametrize("kind", ["vit", "latents"])
    def test_encoder_in_16_bits(self, kind, request, tmp_path):
        checker, inputs = case(kind, request)
        checker.save_pretrained(tmp_path)
        again = FASTSafetyChecker.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert {value.dtype for value in again.bank.parameters()} == {torch.float32}
        for name, value in checker.bank.state_dict().items():
            assert torch.equal(again.bank.state_dict()[name], value)
        if kind == "vit":
            assert {value.dtype for value in again.encoder.parameters()} == {torch.bfloat16}
            assert torch.equal(again.judge(inputs).scores, again.bank(again.encoder(inputs)))
        scores = again.judge(inputs).scores
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, checker.judge(inputs).scores, rtol=0.1, atol=0.1)

    def test_own_encoder_is_asked_for(self, tmp_path):
        checker = of_brightness(own_encoder())
        checker.save_pretrained(tmp_path)
        assert not any(name.startswith("encoder") for name in load_file(tmp_path / "model.safetensors"))
        with pytest.raises(ValueError, match=r"^encoder: [^\n]*'flat'; pass encoder=[^\n]*$"):
            FASTSafetyChecker.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"^encoder: has other weights[^\n]*'flat'$"):
            FASTSafetyChecker.from_pretrained(tmp_path, encoder=own_encoder(scale=1.5))

    def test_encoder_of_another_size(self, tmp_path):
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
        with pytest.raises(OSError):
            FASTSafetyChecker.from_pretrained(tmp_path)
        with pytest.raises((OSError, ValueError)):
            FASTSafetyChecker.from_pretrained(str(tmp_path / "none"))

    def test_from_a_subfolder(self, tmp_path):
        checker, x = of_latents(), torch.from_numpy(clean_latents(5))
        checker.save_pretrained(tmp_path / "safety_checker")
        again = FASTSafetyChecker.from_pretrained(tmp_path, subfolder="safety_checker")
        assert torch.equal(again.judge(x).scores, checker.judge(x).scores)


def change_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | changes))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_spec(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    change_config(folder, encoder_spec=config["encoder_spec"] | changes)


def cut_off(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


def set_nan(weights, key):
    weights[key] = weights[key].clone()
    weights[key].view(-1)[0] = math.nan


def first_of_encoder(weights):
    return min(key for key in weights if key.startswith("encoder."))


BROKEN = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "cut-off config": lambda folder: cut_off(folder, "config.json"),
    "cut-off weights": lambda folder: cut_off(folder, "model.safetensors"),
    "empty weights": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "config that is no JSON": lambda folder: (folder / "config.json").write_text("fast"),
    "config that is a list": lambda folder: (folder / "config.json").write_text("[]"),
    "empty config": lambda folder: (folder / "config.json").write_text("{}"),
    "weights of nothing": lambda folder: change_weights(folder, lambda weights: weights.clear()),
    "no threshold": lambda folder: change_weights(folder, lambda weights: weights.pop("bank.threshold")),
    "no weight": lambda folder: change_weights(folder, lambda weights: weights.pop("bank.weight")),
    "one more": lambda folder: change_weights(folder, lambda weights: weights.update(more=torch.ones(1))),
    "another shape": lambda folder: change_weights(
        folder, lambda weights: weights.update({"bank.weight": weights["bank.weight"][:-1].clone()})
    ),
    "another threshold": lambda folder: change_weights(
        folder, lambda weights: weights.update({"bank.threshold": weights["bank.threshold"] + 1})
    ),
    "negated": lambda folder: change_weights(
        folder, lambda weights: weights.update({"bank.weight": -weights["bank.weight"]})
    ),
    "NaN threshold": lambda folder: change_weights(folder, lambda weights: set_nan(weights, "bank.threshold")),
    "NaN weight": lambda folder: change_weights(folder, lambda weights: set_nan(weights, "bank.weight")),
    "another version": lambda folder: change_config(folder, schema_version=2),
    "no version": lambda folder: change_config(folder, schema_version=None),
    "no concepts": lambda folder: change_config(folder, concepts=[]),
    "concepts are none": lambda folder: change_config(folder, concepts=None),
    "one concept more": lambda folder: change_config(folder, concepts=[{"name": "a"}, {"name": "b"}]),
    "concept without a name": lambda folder: change_config(folder, concepts=[{}]),
    "no embedding": lambda folder: change_config(folder, embedding_size=0),
    "another embedding": lambda folder: change_config(folder, embedding_size=5),
    "no fingerprint": lambda folder: change_config(folder, fingerprint=None),
    "unknown action": lambda folder: change_config(folder, action="release"),
    "size as a word": lambda folder: change_config(folder, embedding_size="four"),
}
BROKEN_QUADRATIC = {
    "no squares": lambda folder: change_config(folder, components=0),
    "fewer directions": lambda folder: change_config(folder, directions=1),
    "no gains": lambda folder: change_weights(folder, lambda weights: weights.pop("bank.gains")),
}
BROKEN_ENCODER = {
    "no encoder": lambda folder: change_config(folder, encoder_spec=None),
    "empty spec": lambda folder: change_config(folder, encoder_spec={}),
    "own encoder": lambda folder: change_spec(folder, kind="custom"),
    "reference": lambda folder: change_spec(folder, reference={"id": "a/b"}),
    "unknown architecture": lambda folder: change_spec(folder, architecture="NoSuchModel"),
    "architecture of another library": lambda folder: change_spec(folder, architecture="os"),
    "another architecture": lambda folder: change_spec(folder, architecture="ResNetModel"),
    "no config of it": lambda folder: change_spec(folder, config=None),
    "NaN": lambda folder: change_weights(folder, lambda weights: set_nan(weights, first_of_encoder(weights))),
    "one less": lambda folder: change_weights(folder, lambda weights: weights.pop(first_of_encoder(weights))),
    "cut-off weights": lambda folder: cut_off(folder, "model.safetensors"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of filters, to be copied and broken."""
    from transformers import ViTConfig, ViTModel

    folders = {}
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = FilterEncoder(ViTModel(config).eval(), kind="image")
    for name, checker in (
        ("linear", of_latents("mean_difference")),
        ("quadratic", of_latents()),
        ("encoder", of_brightness(encoder)),
    ):
        folders[name] = tmp_path_factory.mktemp(name)
        checker.save_pretrained(folders[name])
    return folders


class TestBrokenFiles:
    """All or nothing: one line, and no filter."""

    def refused(self, folder):
        with pytest.raises((ValueError, OSError)) as caught:
            FASTSafetyChecker.from_pretrained(folder)
        assert "\n" not in str(caught.value)

    @pytest.fixture
    def copy(self, saved, tmp_path):
        def copied(kind):
            return shutil.copytree(saved[kind], tmp_path / "filter")

        return copied

    @pytest.mark.parametrize("kind", ["linear", "quadratic", "encoder"])
    def test_untouched_copies_load(self, kind, copy, saved):
        """So that it is the break that the other tests see."""
        folder = copy(kind)
        change_config(folder)
        change_weights(folder, lambda weights: None)
        loaded, whole = (FASTSafetyChecker.from_pretrained(path) for path in (folder, saved[kind]))
        assert loaded.thresholds == whole.thresholds

    @pytest.mark.parametrize("how", BROKEN)
    def test_any_filter(self, how, copy):
        folder = copy("linear")
        BROKEN[how](folder)
        self.refused(folder)

    @pytest.mark.parametrize("how", BROKEN_QUADRATIC)
    def test_quadratic(self, how, copy):
        folder = copy("quadratic")
        BROKEN_QUADRATIC[how](folder)
        self.refused(folder)

    @pytest.mark.parametrize("how", BROKEN_ENCODER)
    def test_encoder(self, how, copy):
        folder = copy("encoder")
        BROKEN_ENCODER[how](folder)
        self.refused(folder)

    def test_every_key_is_needed(self, saved, tmp_path):
        for kind, folder in saved.items():
            for number, key in enumerate(load_file(folder / "model.safetensors")):
                other = shutil.copytree(folder, tmp_path / f"{kind}{number}")
                change_weights(other, lambda weights, key=key: weights.pop(key))
                self.refused(other)

    def test_every_file_of_a_text_filter_is_needed(self, request, tmp_path):
        checker, texts = case("bert", request)
        checker.save_pretrained(tmp_path / "whole")
        expected, messages = checker.judge(texts).scores, []
        for name in os.listdir(tmp_path / "whole"):
            for number, damage in enumerate(
                (lambda file: file.unlink(), lambda file: cut_off(file.parent, file.name))
            ):
                folder = shutil.copytree(tmp_path / "whole", tmp_path / f"{name} {number}")
                damage(folder / name)
                try:
                    again = FASTSafetyChecker.from_pretrained(folder)
                except (ValueError, OSError) as error:
                    messages.append(str(error))
                else:  # a file that says nothing of it
                    torch.testing.assert_close(again.judge(texts).scores, expected)
        assert len(messages) >= 6  # without its config, weights or vocabulary, or with half of them
        assert not any("\n" in message for message in messages)

    @pytest.mark.parametrize(
        "arguments", [{"ignore_mismatched_sizes": True}, {"use_safetensors": False}, {"low_cpu_mem_usage": True}]
    )
    def test_options_do_not_make_it_less_strict(self, arguments, copy):
        folder = copy("linear")
        change_weights(folder, lambda weights: weights.update({"bank.weight": weights["bank.weight"][:-1].clone()}))
        with pytest.raises(ValueError):
            FASTSafetyChecker.from_pretrained(folder, **arguments)

    @pytest.mark.parametrize("change", [{"concepts": []}, {"embedding_size": 0}, {"schema_version": 2}])
    def test_no_model_of_nothing(self, change):
        """Weights may even fit: without concepts every input would be released."""
        settings = {"schema_version": 1, "concepts": [{"name": "hats"}], "embedding_size": 4}
        FASTSafetyChecker(FASTConfig(**settings))
        with pytest.raises(ValueError, match=r"^[^\n]*$"):
            FASTSafetyChecker(FASTConfig(**settings | change))

    def test_pickles_are_not_read(self, copy):
        folder = copy("linear")
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        self.refused(folder)
        with pytest.raises((ValueError, OSError)):
            FASTSafetyChecker.from_pretrained(folder, use_safetensors=False)


def slot(pipeline, checker):
    """The pipeline with the checker where the stock one would be."""
    from diffusers import StableDiffusionPipeline

    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    parts = pipeline.components | {"safety_checker": checker, "feature_extractor": processor}
    filled = StableDiffusionPipeline(**parts, requires_safety_checker=True)
    filled.set_progress_bar_config(disable=True)
    return filled


def drawn(pipeline, output_type="np", return_dict=True):
    return pipeline(
        prompt=["a photo", "hot p"],
        num_images_per_prompt=2,
        num_inference_steps=2,
        output_type=output_type,
        generator=seeded(),
        return_dict=return_dict,
    )


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


class TestSlot:
    """As `safety_checker` of Stable Diffusion: called with images and clip_input."""

    CLIP = torch.zeros(4, 3, 8, 8)

    @pytest.fixture
    def checker(self):
        return of_brightness(FilterEncoder.own(Flatten(192), name="flat", size=(8, 8), channels=3), channels=3)

    @pytest.fixture
    def images(self):
        return torch.cat([bright_images(2, 3, seed=5), dark_images(2, 3, seed=5)])

    def test_tensors(self, checker, images):
        """Released ones stay in [−1, 1]; the pipelines take flagged ones as they are, in [0, 1]."""
        found, flags = checker(images=images * 1.7, clip_input=self.CLIP)  # what a VAE decodes may be beyond
        assert flags == [True, True, False, False]
        assert isinstance(flags, list)
        assert (found[:2] == 0).all()
        assert torch.equal(found[2:], images[2:] * 1.7)

    def test_arrays(self, checker, images):
        array = (images / 2 + 0.5).permute(0, 2, 3, 1).numpy()
        found, flags = checker(images=array, clip_input=self.CLIP)
        assert flags == [True, True, False, False]
        assert not found[:2].any()
        np.testing.assert_array_equal(found[2:], array[2:])

    def test_broken_image(self, checker, images):
        images[3, 0, 0, 0] = math.nan
        found, flags = checker(images=images, clip_input=self.CLIP)
        assert flags == [True, True, False, True]
        assert (found[3] == 0).all()

    @pytest.mark.parametrize("action", ["blank", "flag"])
    def test_what_is_given_stays(self, action, checker, images):
        checker.action = action
        array = (images / 2 + 0.5).permute(0, 2, 3, 1).numpy()
        for given in (images, array):
            before = given.copy() if isinstance(given, np.ndarray) else given.clone()
            checker(images=given, clip_input=self.CLIP)
            assert (given == before).all()

    def test_half_precision(self, checker, images):
        found, flags = checker(images=images.half(), clip_input=self.CLIP.half())
        assert flags == [True, True, False, False]
        assert found.dtype == torch.float16

    @pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
    def test_in_the_pipeline(self, output_type, checker, tiny_stable_diffusion):
        tiny_stable_diffusion.set_progress_bar_config(disable=True)
        plain = as_array(drawn(tiny_stable_diffusion, output_type).images)
        blocked = middle(checker, plain)
        output = drawn(slot(tiny_stable_diffusion, checker), output_type)
        assert output.nsfw_content_detected == blocked.tolist()
        assert sum(blocked) == 2
        found = as_array(output.images)
        assert not found[blocked].any()
        assert plain[blocked].max() > 0.1
        np.testing.assert_array_equal(found[~blocked], plain[~blocked])

    @pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
    @pytest.mark.parametrize("scale", [1, 4])  # of the decoder, so that it leaves [−1, 1]
    def test_flagged_images_look_as_before(self, output_type, scale, checker, tiny_stable_diffusion):
        tiny_stable_diffusion.set_progress_bar_config(disable=True)
        tiny_stable_diffusion.vae.decoder.conv_out.weight.data *= scale
        plain = as_array(drawn(tiny_stable_diffusion, output_type).images)
        blocked = middle(checker, plain)
        checker.action = "flag"
        output = drawn(slot(tiny_stable_diffusion, checker), output_type)
        assert output.nsfw_content_detected == blocked.tolist()
        np.testing.assert_allclose(as_array(output.images), plain, atol=1e-6)
        if scale > 1:
            assert (plain == 1).any() or (plain == 0).any()

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
torch.set_num_threads(1)
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
        checker = of_brightness(tiny_clip(), channels=3)
        tiny_stable_diffusion.set_progress_bar_config(disable=True)
        blocked = middle(checker, as_array(drawn(tiny_stable_diffusion).images))
        slot(tiny_stable_diffusion, checker).save_pretrained(tmp_path)
        run = subprocess.run(
            [sys.executable, "-c", self.SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=300
        )
        assert run.returncode == 0, run.stderr
        found = json.loads(run.stdout.split("FOUND")[1])
        for answer in found.values():
            if "raised" not in answer:
                assert answer["checker"] == "FASTSafetyChecker"
                assert answer["flags"] == blocked.tolist()
                assert [brightest == 0 for brightest in answer["brightest"]] == blocked.tolist()
        assert "flags" in found["named"], found["named"]


class TestPool:
    def test_calibrated_on_unmarked_samples(self):
        """The bound on their contamination is part of the promise, and of the file."""
        fitter = FASTFitter().update(undesired=undesired_latents(20), unmarked=unmarked_latents(400))
        checker = fitter.fit(max_prevalence=0.25, rate=0.1).checker()
        assert "unmarked samples" in checker.config.concepts[0]["threshold"]["promise"]
        assert "at most 25 % of what is drawn is undesired" in checker.config.concepts[0]["threshold"]["promise"]
        assert checker.config.concepts[0]["threshold"]["max_prevalence"] == 0.25


class TestPrecision:
    @pytest.fixture
    def of_clip(self):
        images = torch.rand(40, 3, 8, 8, generator=seeded()) * 2 - 1
        fitter = FASTFitter(tiny_clip(), score="mean_difference").update(
            undesired=images[:20] / 5 + 0.8, clean=images[20:]
        )
        return fitter.fit(threshold="pooled_mean").checker(), images

    @pytest.mark.parametrize("asked", [torch.float16, torch.bfloat16, "bfloat16"])
    def test_the_whole_encoder_is_cast_at_load(self, of_clip, asked, tmp_path):
        checker, images = of_clip
        expected = checker.judge(images).scores
        checker.save_pretrained(tmp_path)
        loaded = FASTSafetyChecker.from_pretrained(tmp_path, dtype=asked)
        wanted = torch.bfloat16 if asked == "bfloat16" else asked
        assert {parameter.dtype for parameter in loaded.encoder.parameters()} == {wanted}
        assert {parameter.dtype for parameter in loaded.bank.parameters()} == {torch.float32}
        torch.testing.assert_close(loaded.judge(images).scores, expected, atol=0.05, rtol=0.05)

    def test_it_comes_back_as_it_was_saved(self, of_clip, tmp_path):
        checker, images = of_clip
        checker.bfloat16()
        expected = checker.judge(images).scores
        checker.save_pretrained(tmp_path)
        loaded = FASTSafetyChecker.from_pretrained(tmp_path)
        assert {parameter.dtype for parameter in loaded.encoder.parameters()} == {torch.bfloat16}
        assert loaded.judge(images).scores.equal(expected)


class TestEncoderOfTheUsersOwn:
    @pytest.mark.parametrize(
        ("change", "name"), [({"normalize": False}, "normalize"), ({"size": (8, 8)}, "preprocessing")]
    )
    def test_another_setting_is_refused(self, change, name, tmp_path):
        module = torch.nn.Flatten()
        settings = {"name": "pixels", "normalize": True}
        images = torch.rand(40, 3, 4, 4, generator=seeded()) * 2 - 1
        fitter = FASTFitter(FilterEncoder.own(module, **settings), score="mean_difference")
        fitter.update(undesired=images[:20] / 5 + 0.8, clean=images[20:])
        fitter.fit(threshold="pooled_mean").checker().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=f"^encoder: has another {name} than the one"):
            FASTSafetyChecker.from_pretrained(tmp_path, encoder=FilterEncoder.own(module, **settings | change))
        same = FASTSafetyChecker.from_pretrained(tmp_path, encoder=FilterEncoder.own(module, **settings))
        assert len(same.judge(images).flags) == 40


def test_from_a_config_alone_everything_is_blocked():
    checker = FASTSafetyChecker(FASTConfig(schema_version=1, concepts=[{"name": "a"}], embedding_size=4))
    assert checker.judge(torch.randn(50, 4, generator=seeded())).flags.all()


def test_a_filter_that_flags_only_says_so_when_it_is_loaded(tmp_path, caplog):
    checker = FASTFitter(score="mean_difference").update(undesired=undesired_latents(20), clean=clean_latents(20))
    checker = checker.fit(threshold="pooled_mean").checker()
    checker.action = "flag"
    checker.save_pretrained(tmp_path)
    caplog.clear()
    FASTSafetyChecker.from_pretrained(tmp_path)
    assert "the filter gives out what it flags" in caplog.text
