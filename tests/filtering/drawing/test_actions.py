"""What takes the place of images that are not released."""

import math
import pickle

import pytest
import torch
from filter_data import seeded

from hf_unlearn.filtering.drawing.actions import ACTIONS, FilteredImageError, blank, blur, check_action, replaced


SCORES = torch.tensor([[0.1], [0.2], [0.3]])


def pictures(n=3, channels=3, height=16, width=16):
    return torch.rand(n, channels, height, width, generator=seeded())


class TestBlur:
    @pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24), (1, 5), (33, 7), (1, 1)])
    def test_keeps_the_mean_of_each_channel(self, height, width):
        images = pictures(height=height, width=width)
        torch.testing.assert_close(blur(images).mean((2, 3)), images.mean((2, 3)))
        torch.testing.assert_close(blur(torch.full_like(images, 0.7)), torch.full_like(images, 0.7))

    @pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 96)])
    def test_is_a_gaussian_of_an_eighth_of_the_longer_side(self, height, width):
        """One bright pixel far from the borders, with those of the nearest mirror images."""
        images = torch.zeros(1, 1, height, width)
        row, column = height // 2, width // 3
        images[0, 0, row, column] = 1.0
        sigma = max(height, width) / 8

        def along(n, place):
            pixels = torch.arange(n, dtype=torch.float64)
            sources = [place + 2 * n * k for k in range(-6, 7)] + [-1 - place + 2 * n * k for k in range(-6, 7)]
            return sum(torch.exp(-((pixels - source) ** 2) / (2 * sigma**2)) for source in sources) / (
                sigma * math.sqrt(2 * math.pi)
            )

        expected = along(height, row)[:, None] * along(width, column)
        torch.testing.assert_close(blur(images)[0, 0].double(), expected, rtol=1e-4, atol=1e-7)

    def test_stripes_are_gone(self):
        stripes = (torch.arange(64) + 2).remainder(8)  # the mirror goes on with them
        stripes = stripes.lt(4).float().expand(1, 1, 64, 64)
        assert stripes.std() > 0.49
        assert blur(stripes).std() < 0.01

    def test_channels_do_not_mix(self):
        images = pictures()
        images[:, 1] = 0
        assert blur(images)[:, 1].abs().max() == 0


class TestReplaced:
    def test_names(self):
        images = pictures()
        assert replaced(images, SCORES, "blank").equal(torch.zeros_like(images))
        torch.testing.assert_close(replaced(images, SCORES, "blur"), blur(images))
        for action in (blank, blur):
            assert action(images.to(torch.bfloat16)).dtype == torch.bfloat16

    def test_pixels_that_are_not_finite_do_not_spread(self):
        images = pictures()
        images[1, 0, 3, 3] = torch.nan
        assert replaced(images, SCORES, "blur").isfinite().all()
        assert replaced(images, SCORES, lambda images, scores: images).isfinite().all()

    def test_a_function_gets_images_and_scores(self):
        images, given = pictures().to(torch.bfloat16), []
        result = replaced(images, SCORES, lambda *arguments: given.extend(arguments) or 1 - arguments[0])
        assert given[0].equal(images.float())
        assert given[1] is SCORES
        assert result.dtype == torch.bfloat16
        assert result.equal((1 - images.float()).to(torch.bfloat16))

    @pytest.mark.parametrize(
        ("give", "message"),
        [
            (lambda images: None, "gave NoneType, must give"),
            (lambda images: images[:1], r"gave torch.float32 \[1, 3, 16, 16\], must give"),
            (lambda images: (images * 255).byte(), r"gave torch.uint8 \[3, 3, 16, 16\], must give"),
            (lambda images: images * torch.nan, "gave images that are not finite or not in"),
            (lambda images: images + 1, "gave images that are not finite or not in"),
            (lambda images: images - 1, "gave images that are not finite or not in"),
        ],
    )
    def test_a_function_that_gives_no_images(self, give, message):
        with pytest.raises(ValueError, match=f"^action: {message}"):
            replaced(pictures(), SCORES, lambda images, scores: give(images))


def test_names_of_actions():
    assert ACTIONS == ("blank", "blur", "flag", "regenerate", "raise")
    assert all(check_action(name) == name for name in ACTIONS)
    assert check_action(len) is len
    for action in ("Blank", "", None, 3, ["blank"]):
        with pytest.raises(ValueError) as error:
            check_action(action, "filter_action")
        assert str(error.value) == (
            f"filter_action={action!r}: must be 'blank', 'blur', 'flag', 'regenerate', 'raise' "
            "or a function of images and scores"
        )


def test_the_error_says_what_was_not_released():
    error = FilteredImageError(torch.tensor([True, False, True]), SCORES)
    assert str(error) == "2 of 3 images are not released by the filter"
    again = pickle.loads(pickle.dumps(error))
    assert again.flags.equal(error.flags)
    assert again.scores.equal(SCORES)
