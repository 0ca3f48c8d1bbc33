"""Marked samples in every form that a user may have them in, and what they say about the original's own samples."""

import pytest
import torch
from datasets import Dataset
from PIL import Image

from hf_unlearn.gan.dcgan import DCGANGenerator
from hf_unlearn.gan.pipeline import GANPipeline
from hf_unlearn.unlearning.gan.feedback import (
    FEWEST,
    Feedback,
    marked_by,
    marked_samples,
    samples_of,
    spread_marks,
    spread_over,
)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def new_pipeline(channels=1, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GANPipeline(DCGANGenerator(8, channels, latent_dim=5, base_channels=4, **settings))


@pytest.fixture(scope="module", params=[1, 3], ids=["grey", "colour"])
def pipeline(request):
    return new_pipeline(request.param)


@pytest.fixture(scope="module")
def grey():
    return new_pipeline()


def drawn(pipeline, count=6, seed=0):
    """Latents, their images, and the same as pictures."""
    latents = torch.randn(count, 5, generator=seeded(seed))
    return latents, pipeline.draw(latents), pipeline(latents=latents).images


def taken(given, pipeline, resize=False):
    return samples_of(given, pipeline, resize=resize, argument="undesired")


def test_a_sample_marked_both_ways_is_refused_in_whatever_form(pipeline):
    latents, images, pictures = drawn(pipeline)
    rows = Dataset.from_dict({"image": pictures})
    forms = {"latents": latents, "tensor": images, "pictures": pictures, "rows": rows}
    pairs = [
        ("latents", "latents"),
        ("latents", "tensor"),
        ("tensor", "pictures"),
        ("rows", "tensor"),
        ("pictures", "rows"),
    ]
    for first, second in pairs:
        one = forms[first].select(range(3)) if first == "rows" else forms[first][:3]
        other = forms[second].select(range(1, 6)) if second == "rows" else forms[second][1:]
        with pytest.raises(
            ValueError, match="^undesired, clean: 2 samples are marked both .*; keep one of the marks$"
        ):
            marked_samples(one, other, pipeline, resize=False)
    undesired, clean = marked_samples(latents[:3], pictures[3:], pipeline, resize=False)
    assert (len(undesired), len(clean)) == (3, 3)


class TestSamplesOf:
    def test_latents_are_drawn_in_eval_mode_and_the_mode_is_left(self):
        pipeline = new_pipeline(norm="batch")
        latents, images, _ = drawn(pipeline)
        pipeline.generator.train()
        torch.testing.assert_close(taken(latents, pipeline), images)
        assert images.shape == (6, *pipeline.image_shape)
        assert all(module.training for module in pipeline.generator.modules())

    def test_latents_that_are_not_finite(self, pipeline):
        latents = drawn(pipeline)[0]
        latents[4, 1] = torch.nan
        with pytest.raises(ValueError, match="^undesired: latent 4 holds NaN or infinite numbers; remove it$"):
            taken(latents, pipeline)

    def test_tensors_and_arrays_are_taken_as_they_are(self, pipeline):
        images = drawn(pipeline)[1]
        for dtype in (torch.float64, torch.bfloat16):
            result = taken(images.to(dtype), pipeline)
            assert result.dtype == torch.float32
            assert torch.equal(result, images.to(dtype).float())
        rows = Dataset.from_dict({"pixel_values": images.numpy()})
        arrays = [[image.numpy() for image in images], tuple(images), images.numpy()]
        for given in (*arrays, *(rows.with_format(form) for form in ("torch", "numpy", None))):
            assert torch.equal(taken(given, pipeline), images)

    @pytest.mark.parametrize("column", ["image", "images", "pixel_values"])
    def test_datasets_of_pictures_in_their_order(self, pipeline, column):
        _, images, pictures = drawn(pipeline)
        order = [3, 0, 5]
        expected = taken(pictures, pipeline)[order]
        torch.testing.assert_close(expected, images[order], rtol=0, atol=0.51 / 127.5)  # in 256 levels
        rows = Dataset.from_dict({"label": list(range(6)), column: pictures})
        assert torch.equal(taken(rows.select(order), pipeline), expected)
        assert torch.equal(taken([{column: pictures[row]} for row in order], pipeline), expected)

    def test_larger_pictures_are_resized_on_demand(self, grey):
        large = [Image.new("L", (16, 16), 51)]
        torch.testing.assert_close(taken(large, grey, resize=True), torch.full((1, 1, 8, 8), 51 / 127.5 - 1))
        with pytest.raises(ValueError, match="^undesired: an image is 16 × 16, .* draws 8 × 8; set resize=True"):
            taken(large, grey)

    def test_images_that_were_drawn_with_gradients(self, grey):
        """Whoever calls the generator himself gets these; a graph cannot go where arrays are made of images."""
        images = grey.generator(torch.randn(4, 5, generator=seeded(0))).sample
        assert not taken(images, grey).requires_grad

    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (lambda: None, "missing or empty; give at least one"),
            (list, "missing or empty"),
            (lambda: torch.zeros(0, 1, 8, 8), "missing or empty"),
            (lambda: Dataset.from_dict({"picture": [1]}), "has no images; .*pixel_values, image, images"),
            (lambda: [{"latents": torch.zeros(5)}], "has no images"),
            (lambda: torch.zeros(3, 4), r"shape \(4,\), the model's is \(1, 8, 8\)"),
            (lambda: [torch.zeros(1, 8, 8), torch.zeros(1, 8, 9)], r"shape \(1, 8, 9\)"),
            (lambda: torch.full((2, 1, 8, 8), torch.nan), "NaN"),
        ],
    )
    def test_says_what_does_not_fit(self, grey, make, match):
        with pytest.raises(ValueError, match="^undesired: .*" + match) as error:
            taken(make(), grey)
        assert "\n" not in str(error.value)


IMAGES = torch.linspace(-1, 1, 10).view(10, 1, 1, 1).expand(10, 1, 2, 2)


class TestMarkedBy:
    @pytest.mark.parametrize("form", [lambda x: x, lambda x: list(x.numpy())])
    def test_marked_are_the_negatives(self, form):
        seen = []

        def marks(images):
            seen.append(images)
            return form(images.mean((1, 2, 3)) > 0.4)

        feedback = marked_by(marks, IMAGES)
        (shown,) = seen
        assert torch.equal(shown, IMAGES)
        assert torch.equal(feedback.undesired, IMAGES[7:])
        assert torch.equal(feedback.clean, IMAGES[:7])
        assert feedback.more_undesired.shape == feedback.more_clean.shape == (0, 1, 2, 2)
        assert torch.equal(feedback.all_undesired, IMAGES[7:])
        assert torch.equal(feedback.all_clean, IMAGES[:7])

    @pytest.mark.parametrize(
        "answer",
        [
            lambda n: torch.rand(n),  # probabilities
            lambda n: torch.arange(n) % 2,  # classes
            lambda n: torch.zeros(n, 1, dtype=torch.bool),
            lambda n: torch.zeros(n - 1, dtype=torch.bool),
            lambda n: [0, 1] * (n // 2),
        ],
    )
    def test_anything_but_a_mark_for_each_is_refused(self, answer):
        with pytest.raises(ValueError, match=r"^marker: gave .* for 10 images; it must mark each") as error:
            marked_by(lambda images: answer(len(images)), IMAGES)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(("mark", "match"), [(True, "^clean: none"), (False, "^undesired: none")])
    def test_one_kind_alone_is_refused(self, mark, match):
        with pytest.raises(ValueError, match=match + " among 10 samples.*raise mark_samples"):
            marked_by(lambda images: torch.full((len(images),), mark), IMAGES)


def two_kinds(seed, count):
    """Images of which the first half are bright and the others dark, with noise."""
    bright = torch.where(torch.arange(count) < count // 2, 0.5, -0.5).view(-1, 1, 1, 1)
    return bright + 0.4 * torch.randn(count, 1, 4, 4, generator=seeded(seed)).clamp(-1, 1)


def given(undesired=12, clean=12):
    marked = two_kinds(1, 200)
    return Feedback(marked[:undesired], marked[100 : 100 + clean], marked[:0], marked[:0])


def as_they_are(images):
    return images


class TestSpreadOver:
    def test_samples_are_sorted_and_marks_kept(self):
        feedback, samples = given(), two_kinds(2, 60)[torch.randperm(60, generator=seeded(3))]
        result = spread_over(feedback, samples, as_they_are, miss_rate=0.05, seed=0)
        assert result.undesired is feedback.undesired
        assert result.clean is feedback.clean
        bright = samples.mean((1, 2, 3)) > 0
        # In their order, and each at most once.
        assert torch.equal(result.more_undesired, samples[bright])
        assert torch.equal(result.more_clean, samples[~bright])
        assert torch.equal(result.all_undesired, torch.cat([feedback.undesired, samples[bright]]))
        assert torch.equal(result.all_clean, torch.cat([feedback.clean, samples[~bright]]))

    @pytest.mark.parametrize(("miss_rate", "seed"), [(0.05, 0), (0.1, 1)])
    def test_is_what_the_marks_say_of_the_features(self, miss_rate, seed):
        def features(images):
            """Two pixels with the noise of others, so that some samples are in doubt."""
            return images[:, :, 0, :2] + images[:, :, 1, :2] - images[:, :, 2, :2]

        feedback, samples = given(60, 40), two_kinds(2, 300)
        known = [features(images).flatten(1).numpy() for images in (feedback.undesired, feedback.clean, samples)]
        expected = spread_marks(*known, miss_rate=miss_rate, seed=seed)
        result = spread_over(feedback, samples, features, miss_rate=miss_rate, seed=seed)
        assert torch.equal(result.more_undesired, samples[torch.from_numpy(expected.negative)])
        assert torch.equal(result.more_clean, samples[torch.from_numpy(expected.positive)])
        assert len(result.more_undesired) > 20 < len(result.more_clean)
        assert expected.low < 0
        assert len(result.more_undesired) + len(result.more_clean) < 300

    @pytest.mark.parametrize("counts", [(FEWEST - 1, 20), (20, FEWEST - 1)])
    def test_too_few_marks_stand_alone_with_a_warning(self, caplog, counts):
        feedback = given(*counts)

        def features(images):
            raise AssertionError("there is nothing to compute")

        with caplog.at_level("WARNING", "hf_unlearn"):
            assert spread_over(feedback, two_kinds(2, 60), features, miss_rate=0.05, seed=0) is feedback
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert record.getMessage().startswith(f"own_samples: {min(counts)} marks of a kind are too few")

    def test_as_many_as_are_needed_do_without_one(self, caplog):
        with caplog.at_level("INFO", "hf_unlearn"):
            result = spread_over(given(FEWEST, FEWEST), two_kinds(2, 60), as_they_are, miss_rate=0.05, seed=0)
        assert len(result.more_undesired) == len(result.more_clean) == 30
        (record,) = caplog.records
        assert record.levelname == "INFO"
        assert record.getMessage().startswith(
            "of 60 own samples, 30 are taken for positive and 30 for negative; 0 % of"
        )
