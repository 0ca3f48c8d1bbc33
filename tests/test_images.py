"""Pictures to tensors in [−1, 1], and tensors to a picture."""

import numpy as np
import pytest
import torch
from picture_data import COLOUR, GREY, as_tensor, noise_image, refused
from PIL import Image

from hf_unlearn.images import grey_images, grid, pixels


FRAME = 2  # pixels of grey around each image of a grid
FRAMED = 64 + 2 * FRAME


class TestPixels:
    @pytest.mark.parametrize(("mode", "shape", "resize"), [("L", GREY, True), ("RGB", COLOUR, False)])
    def test_pil_images_of_the_models_size(self, mode, shape, resize):
        images = [noise_image(mode, seed=seed) for seed in range(3)]
        tensors = pixels(images, shape, resize=resize)
        assert tensors.dtype == torch.float32
        torch.testing.assert_close(tensors.double(), torch.stack([as_tensor(image) for image in images]))

    def test_grey_and_transparent_images_become_colour(self):
        grey, transparent = noise_image("L"), noise_image("RGBA")
        tensors = pixels([grey, transparent], COLOUR, resize=False)
        torch.testing.assert_close(tensors[0].double(), as_tensor(grey).expand(3, 8, 8))
        torch.testing.assert_close(tensors[1].double(), as_tensor(transparent)[:3])

    @pytest.mark.parametrize(("mode", "upright"), [("L", True), ("RGB", False)])
    def test_resizing_keeps_proportions_and_the_centre(self, mode, upright):
        """A ramp along the long side of 32 × 16 pixels keeps its slope per pixel, and loses both ends."""
        ramp = np.broadcast_to(np.arange(32, dtype=np.uint8) * 8, (16, 32))
        middle = 8 * (8 + 2 * torch.arange(8.0) + 0.5)  # columns 8 to 23, two at a time
        expected = (middle / 127.5 - 1).expand(8, 8)
        if upright:
            ramp, expected = ramp.T, expected.T
        shape = COLOUR if mode == "RGB" else GREY
        tensors = pixels([Image.fromarray(ramp.copy()).convert(mode)], shape, resize=True)
        torch.testing.assert_close(tensors[0], expected.expand(shape), rtol=0, atol=1.1 / 127.5)

    def test_models_that_are_not_square(self):
        image = noise_image(size=(12, 8))
        torch.testing.assert_close(pixels([image], (3, 8, 12), resize=False)[0].double(), as_tensor(image))
        assert pixels([image], (3, 4, 16), resize=True).shape == (1, 3, 4, 16)
        refused("an image is 12 × 8, the model draws 8 × 12", pixels, [image], (3, 12, 8), resize=False)

    def test_resizes_palettes_as_colours(self):
        """Single columns of black and white mix to grey; picked pixels would stay black or white."""
        stripes = Image.fromarray(np.tile(np.array([0, 255], dtype=np.uint8), (32, 16))).convert("RGB")
        tensors = pixels([stripes.quantize(2)], COLOUR, resize=True)
        assert tensors[..., 1:-1].abs().max() < 0.1

    @pytest.mark.parametrize("kind", [np.array, torch.tensor, list, lambda x: torch.tensor(x, dtype=torch.bfloat16)])
    def test_arrays_are_taken_as_they_are(self, kind):
        values = np.random.default_rng(0).integers(-4, 5, (5, *COLOUR)) / 4
        tensors = pixels([kind(image.tolist()) for image in values], COLOUR, resize=True)
        assert tensors.dtype == torch.float32
        assert torch.equal(tensors, torch.from_numpy(values).float())
        nearly = pixels([torch.full(COLOUR, 1.005)], COLOUR, resize=False)  # rounding of whoever made them
        assert torch.equal(nearly, torch.ones(1, *COLOUR))

    @pytest.mark.parametrize(
        ("images", "shape", "match"),
        [
            ([noise_image(), noise_image(size=(9, 8))], COLOUR, "an image is 9 × 8, the model draws 8 × 8"),
            ([noise_image("L"), noise_image()], GREY, "images have 3 channels, the model has 1"),
            ([noise_image("RGBA")], (4, 8, 8), "model's 4 channels"),
            ([torch.zeros(3, 8, 9)], COLOUR, r"shape \(3, 8, 9\), the model's is \(3, 8, 8\)"),
            ([torch.zeros(COLOUR), torch.zeros(3, 4, 4)], COLOUR, r"shape \(3, 4, 4\)"),
            ([torch.zeros(1, 8, 8)], COLOUR, r"shape \(1, 8, 8\)"),
            ([torch.zeros(8, 8)], GREY, r"shape \(8, 8\)"),
            ([np.zeros((8, 8, 3))], COLOUR, r"shape \(8, 8, 3\)"),
            ([torch.zeros(COLOUR), torch.full(COLOUR, torch.nan)], COLOUR, "NaN"),
            ([torch.full(COLOUR, -torch.inf)], COLOUR, "infinite"),
            ([np.array(noise_image()).transpose(2, 0, 1)], COLOUR, r"pixel values reach 2\d\d.*\[−1, 1\]"),
            ([torch.zeros(COLOUR), torch.full(COLOUR, -1.5)], COLOUR, "reach 1.5"),
        ],
    )
    def test_says_what_does_not_fit(self, images, shape, match):
        refused("^retain_dataset: .*" + match, pixels, images, shape, resize=False, argument="retain_dataset")


class TestGrid:
    def test_images_stand_row_by_row_each_pixel_a_square(self):
        values = torch.linspace(-1, 1, 6 * 8 * 8).view(6, 1, 8, 8)
        picture = np.asarray(grid(values, columns=3))
        assert picture.shape == (2 * FRAMED, 3 * FRAMED, 3)
        for index, image in enumerate(values):
            row, column = divmod(index, 3)
            part = picture[FRAMED * row :, FRAMED * column :][FRAME : FRAME + 64, FRAME : FRAME + 64]
            expected = ((image[0] + 1) * 127.5).round().byte().numpy().repeat(8, 0).repeat(8, 1)
            for channel in range(3):
                np.testing.assert_array_equal(part[..., channel], expected)

    def test_colours(self):
        values = torch.stack([torch.full((64, 64), value) for value in (-1.0, 0.2, 7.0)])[None]
        picture = grid(values)
        assert picture.size == (FRAMED, FRAMED)  # large enough as it is
        assert picture.getpixel((5, 5)) == (0, 153, 255)
        assert picture.getpixel((0, 5)) == picture.getpixel((FRAMED - 1, 5)) == (134, 142, 150)

    def test_a_square_of_what_fills_whole_rows(self):
        for count, (rows, columns) in {1: (1, 1), 4: (2, 2), 7: (2, 3), 9: (3, 3), 3: (1, 2)}.items():
            assert grid(torch.zeros(count, 1, 64, 64)).size == (FRAMED * columns, FRAMED * rows)
        assert grid(torch.zeros(2, 1, 64, 64), columns=5).size == (FRAMED * 2, FRAMED)


class TestGreyImages:
    def test_are_the_pixels_in_their_order(self, digits):
        rows = digits["validation"].select(range(20))
        images = grey_images(rows, 8)
        assert images.dtype == torch.float32
        torch.testing.assert_close(images, pixels(rows["image"], GREY, resize=False))

    def test_colours_are_made_grey_and_sizes_one(self):
        pictures = [noise_image(), noise_image("L", size=(8, 8), seed=1), noise_image(size=(20, 12), seed=2)]
        images = grey_images({"image": pictures}, 8)
        assert images.shape == (3, *GREY)
        weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(3, 1, 1)
        luminance = (as_tensor(pictures[0]) * weights).sum(0)
        torch.testing.assert_close(images[0, 0].double(), luminance, rtol=0, atol=1.1 / 127.5)
        torch.testing.assert_close(images[1].double(), as_tensor(pictures[1]), rtol=0, atol=1e-6)
