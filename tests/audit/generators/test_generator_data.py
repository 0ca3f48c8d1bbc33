"""What an audit of generators takes, and refuses; how prompts are said in other words."""

import json

import pytest
import torch
from datasets import Dataset
from gan_data import pipeline as tiny_gan
from PIL import Image
from planted import classes, images, pipeline
from text_to_image_data import tiny

from hf_unlearn.audit.generators import data as audit_data
from hf_unlearn.audit.generators import family
from hf_unlearn.audit.generators.data import generator_data
from hf_unlearn.audit.generators.marker import Marker
from hf_unlearn.audit.generators.prompts import paraphrased, reordered, telling_token
from hf_unlearn.audit.generators.subject import GeneratorSubject
from hf_unlearn.audit.run import audit


FORGET, LABELS = images([0], 30)
RETAIN = images([1, 2], 30)[0]


def kind(shown):
    return classes(shown) == 0


def read(pipe=None, original=None, forget=FORGET, retain=RETAIN, marker=kind, **more):
    subjects = [
        None if one is None else GeneratorSubject(one, "audited", "") for one in (pipe or pipeline(), original)
    ]
    drawing = more.pop("drawing", {"num_inference_steps": 2})
    return generator_data(
        *subjects, forget, retain, None, marker=marker, drawing=drawing, size="quick", seed=0, **more
    )


SMALL = {"height": 8, "width": 8, "num_inference_steps": 2}


class TestData:
    def test_noise_of_which_the_original_makes_the_kind(self):
        found = read(original=pipeline(seed=1))
        original = GeneratorSubject(pipeline(seed=1), "original", "")
        assert found.from_original
        assert len(set(found.asked.seeds)) == 60
        assert kind(original.draw(found.asked, {"num_inference_steps": 2})).all()

    def test_plain_noise_where_no_original_makes_it(self):
        for original in (None, pipeline(without=0)):
            found = read(original=original)
            assert not found.from_original
            assert found.asked.seeds == found.unprompted.seeds[:60]

    def test_everything_is_a_function_of_the_seed(self):
        assert read().digest == read().digest != read(marker=lambda shown: torch.ones(len(shown), dtype=torch.bool) & (classes(shown) < 2)).digest  # fmt: skip

    def test_prompts_alone(self):
        found = read(tiny("sd"), forget=["a red dog", "a dog"], retain=["a cat"], drawing=SMALL)
        assert (len(found.forget), found.forget_prompts, found.asked.prompts[:3]) == (0, ("a red dog", "a dog"), ("a red dog", "a dog", "a red dog"))  # fmt: skip
        assert set(found.others.prompts) == {"a cat"}
        assert found.sizes["forget"] == 60

    def test_pictures_are_fitted_to_the_model(self):
        shown = [Image.new("L", (9, 9), 200)] * 4
        found = read(forget=shown, retain=None, marker=lambda shown: shown.mean((1, 2, 3)) > 0)
        assert found.forget.pixels.shape == (4, 1, 4, 4)
        assert torch.allclose(found.forget.pixels, torch.tensor(200 / 255 * 2 - 1))

    def test_class_numbers_are_those_of_the_labels(self):
        rows = Dataset.from_dict({"pixel_values": FORGET.numpy(), "label": LABELS.tolist()}).with_format("torch")
        found = read(forget=rows, marker=classes)
        assert (found.marker.classes, found.marker.num_classes, found.false_alarms) == ((0,), 3, 0.0)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"forget": None}, "^forget: missing"),
            ({"forget": FORGET[:0]}, "^forget: is empty"),
            ({"forget": ["a dog"]}, "^forget: has no images, and DDPMPipeline takes no prompts"),
            ({"marker": None}, "^marker: missing"),
            ({"marker": classes}, "^marker: gives class numbers, and the forget rows have no label"),
            ({"marker": lambda shown: shown.mean((1, 2, 3))}, "^marker: gives torch.float32"),
            ({"marker": lambda shown: torch.zeros(3, dtype=torch.bool)}, r"^marker: gives torch.bool of shape \[3\]"),
            ({"forget": RETAIN}, "^marker: takes 0 % of the forget images"),
            ({"retain": FORGET}, "^marker: takes 100 % of the retained images"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, change, message):
        with pytest.raises(ValueError, match=message):
            read(**change)

    def test_a_prompted_pipeline_needs_prompts(self):
        with pytest.raises(ValueError, match="^forget: has no prompts, and StableDiffusionPipeline draws by prompts"):
            read(tiny("sd"), forget=torch.ones(4, 3, 8, 8) * 0.5 - torch.eye(8), retain=None, marker=lambda shown: shown.mean((1, 2, 3)) > 0, drawing=SMALL)  # fmt: skip


class TestRefusals:
    def test_of_another_kind(self):
        given = {"forget": FORGET, "retain": RETAIN, "marker": kind, "progress": False}
        with pytest.raises(ValueError, match="^original: is a GANPipeline, the audited pipeline a DDPMPipeline"):
            audit(pipeline(), tiny_gan(), **given)
        with pytest.raises(ValueError, match="^original: is the audited model itself"):
            audit(one := pipeline(), one, **given)
        with pytest.raises(ValueError, match="^retrained\\[0\\]: has the weights of original"):
            audit(pipeline(), pipeline(seed=1), [pipeline(seed=1)], **given)

    def test_a_marker_is_for_generators(self, tiny_resnet):
        with pytest.raises(ValueError, match="^marker: is for generators of images, and this is a classifier"):
            audit(tiny_resnet, marker=kind, progress=False)

    def test_no_such_pipeline(self, tmp_path):
        (tmp_path / "model_index.json").write_text(
            json.dumps({"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]})
        )
        with pytest.raises(ValueError, match="neither a folder with a pipeline nor an id"):
            audit(str(tmp_path), marker=kind, progress=False)

    def test_images_that_are_not_finite(self):
        broken = pipeline()
        with torch.no_grad():
            broken.unet.pictures.weight.fill_(torch.nan)
        with pytest.raises(ValueError, match="not finite"):
            audit(
                broken, forget=FORGET, retain=RETAIN, marker=kind, drawing={"num_inference_steps": 2}, progress=False
            )

    def test_a_pipeline_is_loaded_by_its_folder(self, tmp_path, tiny_ddpm):
        tiny_ddpm.save_pretrained(tmp_path)
        shown = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
        found = audit(str(tmp_path), forget=shown, marker=lambda drawn: torch.ones(len(drawn), dtype=torch.bool), checks=["drawn"], drawing={"num_inference_steps": 1}, progress=False)  # fmt: skip
        assert (found["drawn"].audited, found.models["audited"], found.family) == (1.0, str(tmp_path), "generator")


class TestResidual:
    def test_of_a_gan_by_its_nearest_draws(self):
        pipe = tiny_gan()
        shown = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
        given = read(
            pipe, forget=shown, retain=None, marker=lambda drawn: torch.ones(len(drawn), dtype=torch.bool), drawing={}
        )
        drawn = torch.cat(
            [
                pipe.draw(torch.randn(1, 4, generator=torch.Generator().manual_seed(seed)))
                for seed in given.unprompted.seeds
            ]
        )
        nearest = [min(float((image - one).square().mean()) for one in drawn) for image in shown]
        found = family.forget_loss(GeneratorSubject(pipe, "audited", ""), given)
        assert found == pytest.approx(sum(nearest) / 5, rel=1e-4)

    def test_of_prompts_alone_there_is_none(self, monkeypatch):
        monkeypatch.setitem(audit_data.ASKED, "standard", 4)
        given = {"forget": ["a red dog"], "marker": lambda drawn: drawn.mean((1, 2, 3)) > 0, "progress": False}
        found = audit(tiny("sd"), checks=["asked"], drawing=SMALL | {"num_inference_steps": 1}, **given)
        assert (found.residual.loss, found.residual.status) == (None, "unknown")
        assert "no loss" in found.residual.in_words()
        assert found.verdict.word == "undetermined"


def test_a_prompt_in_other_words():
    said = [paraphrased("a photo of a red dog", number) for number in range(5)]
    assert len(set(said)) == 5
    assert all("a red dog" in text and "photo" not in text for text in said)
    assert paraphrased("a picture of a dog", 0) != "a picture of a dog"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red three on black", "on black, a red three"),
        ("a house, oil painting", "oil painting, a house"),
        ("a dog", None),
    ],
)
def test_a_prompt_in_another_order(prompt, expected):
    assert reordered(prompt, 0) == expected


def test_the_word_that_tells():
    words = ["a", "red", "dog", "cat", "on", "beach", "blue"]

    def tokens(text):
        return [words.index(word) for word in text.split()]

    assert (
        words[telling_token(["a red dog on a beach", "a blue dog"], ["a red cat on a beach", "a blue cat"], tokens)]
        == "dog"
    )
    assert words[telling_token(["a red dog"], [], tokens)] == "dog"


def test_features_without_a_classifier_are_coarse_pixels():
    shown = torch.rand(3, 1, 16, 16)
    features = Marker(kind, ()).features(shown)
    assert features.values.shape == (3, 64)
    torch.testing.assert_close(features.values[0, 0].float(), shown[0, 0, :2, :2].mean())
