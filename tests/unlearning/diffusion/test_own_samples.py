"""What a generator draws, parted into the forgotten kind and the rest: by a classifier, or by the forget images alone."""

import numpy as np
import pytest
import torch

from hf_unlearn.images import grey_images
from hf_unlearn.unlearning.diffusion.encoded import EncodedImages
from hf_unlearn.unlearning.diffusion.own_samples import part, resembles


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digit_images(digits):
    """Training digits in a random order, as `(images, labels)`, with a little noise: no two distances are equal."""
    rows = digits["train"].shuffle(seed=0)
    images = grey_images(rows, 8)
    return images + 1e-3 * torch.randn(images.shape, generator=seeded(0)), torch.tensor(rows["label"])


def parted(digit_images, digit, count=60):
    """`count` images of a digit to forget; all other images as samples, and which of these show the digit."""
    images, labels = digit_images
    given = torch.where(labels == digit)[0][-count:]
    rest = torch.ones(len(images), dtype=torch.bool)
    rest[given] = False
    return images[given], images[rest], labels[rest] == digit


class TestResembles:
    @pytest.mark.parametrize("digit", [0, 2, 6])
    def test_finds_a_digit_among_all_digits(self, digit, digit_images):
        forget, samples, true = parted(digit_images, digit)
        assert 0.03 < true.float().mean() < 0.1
        marked = resembles(samples, forget)
        assert (marked.shape, marked.dtype) == (true.shape, torch.bool)
        both = (marked & true).sum()
        assert both / true.sum() > 0.8  # recall: 0.96, 0.96, 1.00
        assert both / marked.sum() > 0.75  # precision: 0.94, 0.86, 0.96

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
        forget = torch.arange(count).view(-1, 1, 1, 1).expand(-1, 1, 2, 2) / 100
        far = 1 + torch.randn(30, 1, 2, 2, generator=seeded(0)) / 10
        marked = resembles(torch.cat([far, torch.zeros(1, 1, 2, 2)]), forget)
        assert marked.tolist() == [False] * 30 + [True]


class TestPart:
    samples = EncodedImages(torch.arange(10.0).view(10, 1, 1, 1) / 10)
    forget = EncodedImages(torch.ones(4, 1, 1, 1))

    def test_takes_away_what_a_classifier_marks(self):
        """It is asked about the samples, or about their images where these are latents; numpy's answers do too."""
        seen = []
        result = part(self.samples, self.forget, lambda images: (seen.append(images), images.flatten() >= 0.65)[1])
        assert torch.equal(seen[0], self.samples.latents)
        assert torch.equal(result.kept.latents, self.samples.latents[:7])
        assert result.share == pytest.approx(0.3)
        images = torch.arange(10.0, 0.0, -1.0).view(10, 1, 1, 1)
        result = part(self.samples, self.forget, lambda pictures: pictures.flatten() > 6, images)
        assert torch.equal(result.kept.latents, self.samples.latents[4:])
        assert result.share == pytest.approx(0.4)
        result = part(self.samples, self.forget, lambda images: np.zeros(len(images), bool))
        assert torch.equal(result.kept.latents, self.samples.latents)
        assert result.share == 0

    def test_what_belongs_to_an_image_stays_with_it(self):
        table, rows = torch.arange(3.0).view(3, 1), torch.tensor([0, 1, 2, 0])
        samples = EncodedImages(torch.arange(4.0).view(4, 1), torch.arange(4.0, 8.0).view(4, 1), {"c": table}, rows)
        kept = part(samples, self.forget, lambda images: torch.tensor([True, False, False, True])).kept
        items = [(kept[i]["latents"], kept[i]["latents_std"], kept[i]["conditioning"]["c"]) for i in range(2)]
        assert items == [(1, 5, 1), (2, 6, 2)]

    def test_without_a_classifier_what_resembles_the_forget_images_goes(self, digit_images):
        forget, samples, true = parted(digit_images, 0)
        result = part(EncodedImages(samples), EncodedImages(forget), None)
        assert torch.equal(result.kept.latents, samples[~resembles(samples, forget)])
        assert result.share == pytest.approx(true.float().mean().item(), rel=0.2)

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            (torch.zeros(10), "marker: gave torch.float32 of shape (10,) for 10 images"),  # probabilities
            (torch.zeros(10, dtype=torch.long), "marker: gave torch.int64"),  # classes
            (torch.zeros(10, 1, dtype=torch.bool), "marker: gave torch.bool of shape (10, 1)"),
            (torch.zeros(9, dtype=torch.bool), "marker: gave torch.bool of shape (9,)"),
            (torch.ones(10, dtype=torch.bool), "own_samples: all 10 samples"),
        ],
    )
    def test_refuses(self, answer, message):
        with pytest.raises(ValueError) as error:
            part(self.samples, self.forget, lambda images: answer)
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)
