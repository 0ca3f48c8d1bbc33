import pytest
import torch

from hf_unlearn.images import grey_images
from hf_unlearn.unlearning.diffusion.encoded import EncodedImages
from hf_unlearn.unlearning.diffusion.own_samples import part, resembles


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digit_images(digits):
    """Training digits in a random order, as `(images, labels)`."""
    rows = digits["train"].shuffle(seed=0)
    return grey_images(rows, 8), torch.tensor(rows["label"])


def parted(digit_images, digit, count=60, limit=None):
    """`count` images of a digit to forget; all other images as samples, and which of these show the digit."""
    images, labels = digit_images
    given = torch.where(labels == digit)[0][-count:]
    rest = torch.ones(len(images), dtype=torch.bool)
    rest[given] = False
    return images[given], images[rest][:limit], (labels[rest] == digit)[:limit]


class TestResembles:
    @pytest.mark.parametrize("digit", [0, 2, 6])
    def test_finds_a_digit_among_all_digits(self, digit, digit_images):
        forget, samples, true = parted(digit_images, digit)
        assert 0.03 < true.float().mean() < 0.1
        marked = resembles(samples, forget)
        assert marked.shape == true.shape
        assert marked.dtype == torch.bool
        both = (marked & true).sum()
        assert both / true.sum() > 0.85  # recall
        assert both / marked.sum() > 0.85  # precision

    def test_a_verdict_hardly_depends_on_the_number_of_samples(self, digit_images):
        forget, samples, _ = parted(digit_images, 0, count=60)
        verdicts = {count: resembles(samples[:count], forget)[:300] for count in (300, 600, len(samples))}
        assert verdicts[600].sum() > 5
        for count in (300, 600):
            assert (verdicts[count] == verdicts[len(samples)]).float().mean() > 0.97

    def test_beyond_the_crowd_a_sample_changes_no_other_ones_verdict(self, digit_images):
        forget, samples, _ = parted(digit_images, 0, count=20)
        crowd = 10 * 20
        alone, beside = resembles(samples[:crowd], forget), resembles(samples, forget)
        assert torch.equal(alone, beside[:crowd])
        outside = resembles(torch.cat([samples[:crowd], samples[-100:]]), forget)[crowd:]
        assert torch.equal(outside, beside[-100:])
        assert beside[crowd:].any()

    def test_far_samples_are_not_marked_and_copies_are(self, digit_images):
        forget, _, _ = parted(digit_images, 0)
        far = 5 + torch.randn(50, 1, 8, 8, generator=seeded(0))
        marked = resembles(torch.cat([far, forget + 1e-3]), forget)
        assert not marked[:50].any()
        assert marked[50:].float().mean() > 0.85

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_few_forget_images_do(self, count):
        forget, far = (
            torch.zeros(count, 1, 2, 2) + torch.arange(count).view(-1, 1, 1, 1) / 100,
            torch.ones(30, 1, 2, 2),
        )
        far = far + torch.randn(far.shape, generator=seeded(0)) / 10
        marked = resembles(torch.cat([far, torch.zeros(1, 1, 2, 2)]), forget)
        assert not marked[:30].any()
        assert marked[30]


class TestPart:
    samples = EncodedImages(torch.arange(10.0).view(10, 1, 1, 1) / 10)
    forget = EncodedImages(torch.ones(4, 1, 1, 1))

    def test_takes_away_what_a_classifier_marks(self):
        seen = []

        def marks(images):
            seen.append(images)
            return images.flatten() >= 0.65

        result = part(self.samples, self.forget, marks)
        assert torch.equal(seen[0], self.samples.latents)
        assert torch.equal(result.kept.latents, self.samples.latents[:7])
        assert result.share == pytest.approx(0.3)

    def test_asks_about_the_images_where_the_latents_are_none(self):
        images = torch.arange(10.0, 0.0, -1.0).view(10, 1, 1, 1)
        result = part(self.samples, self.forget, lambda pictures: pictures.flatten() > 5, images)
        assert torch.equal(result.kept.latents, self.samples.latents[5:])
        assert result.share == pytest.approx(0.5)

    def test_what_belongs_to_an_image_stays_with_it(self):
        table = torch.arange(3.0).view(3, 1)
        rows = torch.tensor([0, 1, 2, 0])
        samples = EncodedImages(torch.arange(4.0).view(4, 1), torch.arange(4.0, 8.0).view(4, 1), {"c": table}, rows)
        kept = part(samples, self.forget, lambda images: torch.tensor([True, False, False, True])).kept
        assert [kept[i]["latents"].item() for i in range(2)] == [1, 2]
        assert [kept[i]["latents_std"].item() for i in range(2)] == [5, 6]
        assert [kept[i]["conditioning"]["c"].item() for i in range(2)] == [1, 2]

    def test_without_a_classifier_what_resembles_the_forget_images_goes(self, digit_images):
        forget, samples, true = parted(digit_images, 0)
        result = part(EncodedImages(samples), EncodedImages(forget), None)
        assert torch.equal(result.kept.latents, samples[~resembles(samples, forget)])
        assert result.share == pytest.approx(true.float().mean().item(), rel=0.2)

    def test_numpy_masks_do_and_nothing_marked_keeps_all(self):
        import numpy as np

        result = part(self.samples, self.forget, lambda images: np.zeros(len(images), bool))
        assert torch.equal(result.kept.latents, self.samples.latents)
        assert result.share == 0

    @pytest.mark.parametrize(
        "answer",
        [
            lambda n: torch.zeros(n),  # probabilities
            lambda n: torch.zeros(n, dtype=torch.long),  # classes
            lambda n: torch.zeros(n, 1, dtype=torch.bool),
            lambda n: torch.zeros(n - 1, dtype=torch.bool),
            lambda n: torch.tensor(True),
        ],
    )
    def test_anything_but_a_mark_for_each_is_refused(self, answer):
        with pytest.raises(ValueError, match=r"^replay_filter: gave .* for 10 images") as error:
            part(self.samples, self.forget, lambda images: answer(len(images)))
        assert "\n" not in str(error.value)

    def test_nothing_left_is_refused(self):
        with pytest.raises(ValueError, match="^replay_samples: all 10 samples") as error:
            part(self.samples, self.forget, lambda images: torch.ones(len(images), dtype=torch.bool))
        assert "\n" not in str(error.value)
