"""Pictures to tensors in [−1, 1], and tensors to a picture."""

import base64
from io import BytesIO

import numpy as np
import pytest
import torch
from picture_data import COLOUR, GREY, as_tensor, noise_image, refused
from PIL import Image

from hf_unlearn.filtering.encoding.preprocessing import ImagePreprocessing
from hf_unlearn.images import data_uri, grey_images, grid, look, of_pil, pixels, signed


FRAME = 2  # pixels of grey around each image of a grid
FRAMED = 64 + 2 * FRAME


WHITE = 255
# Of each mode a picture of one colour, and the bytes that it stands for; transparency is over white.
FLAT = {
    "1": (1, [WHITE]),
    "L": (100, [100]),
    "LA": ((100, 51), [100 * 0.2 + WHITE * 0.8]),
    "La": ((20, 51), [100 * 0.2 + WHITE * 0.8]),
    "P": ((200, 100, 50), [200, 100, 50]),
    "PA": ((200, 100, 50, 51), [200 * 0.2 + WHITE * 0.8, 100 * 0.2 + WHITE * 0.8, 50 * 0.2 + WHITE * 0.8]),
    "RGB": ((200, 100, 50), [200, 100, 50]),
    "RGBA": ((200, 100, 50, 51), [200 * 0.2 + WHITE * 0.8, 100 * 0.2 + WHITE * 0.8, 50 * 0.2 + WHITE * 0.8]),
    "RGBa": ((40, 20, 10, 51), [200 * 0.2 + WHITE * 0.8, 100 * 0.2 + WHITE * 0.8, 50 * 0.2 + WHITE * 0.8]),
    "RGBX": ((200, 100, 50, 7), [200, 100, 50]),
    "CMYK": ((55, 155, 205, 51), [200 * 0.8, 100 * 0.8, 50 * 0.8]),
    "YCbCr": ((100, 148, 88), [100 + 1.402 * -40, 100 - 0.344136 * 20 - 0.714136 * -40, 100 + 1.772 * 20]),
    "HSV": ((0, 128, 200), [200, 200 * (1 - 128 / 255), 200 * (1 - 128 / 255)]),
    "LAB": ((138, 166, 174), [200, 100, 50]),  # CIE's, 255 · L / 100 and 128 + a
    "I": (100, [100]),
    "F": (100.0, [100]),
}


def flat(mode):
    colour, expected = FLAT[mode]
    if mode in ("P", "PA"):
        image = Image.new("P", (8, 8), 3)
        image.putpalette([0] * 9 + list(colour[:3]))
        if mode == "PA":
            image = image.convert("PA")
            image.putalpha(Image.new("L", (8, 8), colour[3]))
        return image, expected
    return Image.new(mode, (8, 8), colour), expected


def sixteen(values, order="<"):
    """Grey of 16 bits, as a file of this byte order gives it."""
    mode = "I;16" if order == "<" else "I;16B"
    return Image.frombytes(mode, values.shape[::-1], values.astype(f"{order}u2").tobytes())


RAMP = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
TURNS = {
    1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: np.transpose,
    6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).T, 8: np.rot90,
}  # fmt: skip


class TestOfPIL:
    """One table; a model and a filter see the same."""

    def everywhere(self, image):
        """As a tensor, after a look that all ways to it agree."""
        tensor = of_pil(image)
        shape = (3, *tensor.shape[1:])
        assert pixels([image], shape, resize=False)[0].equal(tensor.expand(shape).clamp(-1, 1))
        torch.testing.assert_close(ImagePreprocessing().prepare([image])[0], tensor.expand(shape), rtol=0, atol=1e-6)
        return tensor

    def test_every_mode(self):
        for mode in FLAT:
            image, expected = flat(mode)
            assert image.mode == mode
            tensor = (self.everywhere(image) + 1) * 127.5
            assert tensor.shape == (len(expected), 8, 8)
            expected = torch.tensor(expected, dtype=torch.float32).view(-1, 1, 1).expand_as(tensor)
            # PIL rounds, twice where colours and transparency were multiplied.
            torch.testing.assert_close(tensor, expected, rtol=0, atol=6 if mode in ("La", "RGBa") else 1.1)

    def test_sixteen_bits(self):
        for order in "<>":
            tensor = self.everywhere(sixteen(RAMP, order))
            torch.testing.assert_close(tensor[0].double(), torch.from_numpy(RAMP / 32767.5 - 1), rtol=0, atol=1e-6)
            assert abs(tensor.mean()) < 1e-5
        assert pixels([sixteen(RAMP.repeat(2, 0).repeat(2, 1))], GREY, resize=True).mean().abs() < 1e-2

    def test_what_is_one_transparent_colour_is_white(self):
        for mode, clear in (("L", 100), ("RGB", (200, 100, 50)), ("P", 3), ("P", bytes([9, 9, 9, 0])), ("1", 1)):
            image = flat(mode)[0]
            image.info["transparency"] = clear
            assert (self.everywhere(image) == 1).all()
        image = sixteen(RAMP)
        image.info["transparency"] = 0
        assert self.everywhere(image)[0, 0, 0] == 1

    def test_values_without_a_type(self):
        """Modes I and F say nothing of their range: 0 to 255, unless they end at 1."""
        black = Image.new("F", (8, 8), 0)
        assert (self.everywhere(black) == -1).all()
        for mode, values in (("F", RAMP / 65535), ("F", -RAMP / 65535), ("F", RAMP), ("I", RAMP), ("I", RAMP > 9)):
            image = Image.fromarray(values.astype({"F": np.float32, "I": np.int32}[mode]))
            assert image.mode == mode
            refused(
                rf"^a: image 0 of mode '{mode}' has values .*\[0, 255\]",
                pixels,
                [image],
                GREY,
                resize=True,
                argument="a",
            )
            refused(
                rf"^images: image 0 of mode '{mode}' has values .*\[0, 255\]", ImagePreprocessing().prepare, [image]
            )
        image = Image.new("F", (8, 8), np.nan)
        assert of_pil(image).isnan().all()
        refused("NaN or infinite pixels \\(row 1\\)", pixels, [black, image], GREY, resize=False)

    def test_upright(self):
        values = np.random.default_rng(0).integers(0, 256, (4, 8), dtype=np.uint8)
        for orientation, turned in TURNS.items():
            image = Image.fromarray(values)
            image.getexif()[0x0112] = orientation
            assert torch.equal(
                (self.everywhere(image)[0] + 1).mul(127.5).round().byte(), torch.tensor(turned(values).copy())
            )

    def test_no_pixels(self):
        refused("^image is 0 × 5, it has no pixels", of_pil, Image.new("RGB", (0, 5)))


class TestArrays:
    def test_by_their_type(self):
        signed_ramp = RAMP.astype(np.float32) / 65535 * 2 - 1
        for array in (RAMP.astype(">u2"), signed_ramp.astype(">f4"), np.flipud(np.flipud(signed_ramp).copy())):
            np.testing.assert_allclose(pixels([array[None]], (1, 8, 8), resize=False)[0, 0], signed_ramp, atol=1e-6)
        for dtype, white in ((torch.bool, 1), (torch.uint8, 255), (torch.uint16, 65535)):
            values = torch.tensor([0, white]).to(dtype).view(1, 1, 2)
            for given in (values, values.numpy(), values.tolist() if dtype is torch.bool else values):
                assert pixels([given], (1, 1, 2), resize=False).flatten().tolist() == [-1, 1]
            assert pixels(values[None], (1, 1, 2), resize=False).flatten().tolist() == [-1, 1]
            assert signed(values, "images").flatten().tolist() == [-1, 1]

    def test_by_their_range(self):
        values = torch.rand(4, *GREY, generator=torch.Generator().manual_seed(0))
        for given in (values, list(values), [values[0].numpy(), values[1].half()]):
            refused("^a: has no pixel below 0, .*images \\* 2 - 1", pixels, given, GREY, resize=False, argument="a")
        torch.testing.assert_close(signed(values, "images", value_range=(0, 1)), values * 2 - 1)
        assert signed(values, "images", value_range=(-1, 1)).equal(values)
        assert pixels(values, GREY, resize=False, whole=False).equal(values)  # a part may be bright
        assert pixels([values[0] - 0.1, *values[1:]], GREY, resize=False)[1:].equal(values[1:])
        for given, value_range in (
            (values - 1, (0, 1)),
            (values * 4 - 1, None),
            (values * 255, None),
            (values * 255, (0, 1)),
            (values, (0, 255)),
        ):
            refused("pixel values reach|value_range", signed, given, "images", value_range=value_range)
        refused("real numbers", signed, values * 1j, "images")

    def test_pictures_and_arrays_together(self):
        image = noise_image("L")
        both = pixels([image, as_tensor(image), np.asarray(image)[None]], GREY, resize=False)
        assert (both - both[:1]).abs().max() < 1e-6

    def test_a_look_at_a_dataset(self):
        """All over it: the last row too, which is named."""
        rows = [{"image": noise_image("L")} for _ in range(200)]
        look(rows, "image", GREY, resize=False, argument="train_dataset")
        rows[-1] = {"image": torch.full(GREY, torch.nan)}
        refused(
            "^train_dataset: .*NaN.* \\(row 199\\)", look, rows, "image", GREY, resize=False, argument="train_dataset"
        )


class TestPixels:
    @pytest.mark.parametrize(("mode", "shape", "resize"), [("L", GREY, True), ("RGB", COLOUR, False)])
    def test_pil_images_of_the_models_size(self, mode, shape, resize):
        images = [noise_image(mode, seed=seed) for seed in range(3)]
        tensors = pixels(images, shape, resize=resize)
        assert tensors.dtype == torch.float32
        torch.testing.assert_close(tensors.double(), torch.stack([as_tensor(image) for image in images]))

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
        nearly = pixels([torch.full(COLOUR, -1.005)], COLOUR, resize=False)  # rounding of whoever made them
        assert torch.equal(nearly, -torch.ones(1, *COLOUR))

    @pytest.mark.parametrize(
        ("images", "shape", "match"),
        [
            ([noise_image(), noise_image(size=(9, 8))], COLOUR, "an image is 9 × 8, the model draws 8 × 8"),
            ([noise_image("L"), noise_image()], GREY, "images have 3 channels, the model has 1"),
            ([noise_image("RGBA")], (4, 8, 8), "model's 4 channels"),
            ([torch.zeros(3, 8, 9)], COLOUR, r"shape \(3, 8, 9\), the model's is \(3, 8, 8\)"),
            ([torch.zeros(COLOUR), torch.zeros(3, 4, 4)], COLOUR, r"shape \(3, 4, 4\)"),
            ([torch.zeros(1, 8, 8)], COLOUR, r"shape \(1, 8, 8\)"),
            ([torch.zeros(8, 8)], GREY, r"shape \(8, 8\).* add its one channel"),
            ([np.zeros((8, 8, 3))], COLOUR, r"shape \(8, 8, 3\).* channels first"),
            ([torch.zeros(COLOUR), torch.full(COLOUR, torch.nan)], COLOUR, "NaN"),
            ([torch.full(COLOUR, -torch.inf)], COLOUR, "infinite"),
            ([np.array(noise_image(), np.int64).transpose(2, 0, 1)], COLOUR, r"pixel values reach 2\d\d.*\[−1, 1\]"),
            ([[["one"] * 8] * 8], GREY, "image 0 is a list that holds no pixels"),
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


class TestDataUri:
    """Read by PIL again."""

    def read(self, address):
        head, _, content = address.partition(",")
        return head, Image.open(BytesIO(base64.b64decode(content)))

    @pytest.mark.parametrize("mode", ["L", "RGB"])
    def test_holds_the_picture_to_the_pixel(self, mode):
        image = noise_image(mode)
        head, kept = self.read(data_uri(image))
        assert head == "data:image/png;base64"
        assert (kept.format, kept.mode) == ("PNG", mode)
        np.testing.assert_array_equal(np.asarray(kept), np.asarray(image))

    def test_in_another_format_with_its_options(self):
        image = noise_image(size=(64, 64))
        head, kept = self.read(data_uri(image, form="WEBP", quality=90))
        assert (head, kept.format, kept.size) == ("data:image/webp;base64", "WEBP", (64, 64))
        assert len(data_uri(image, form="WEBP", quality=10)) < len(data_uri(image, form="WEBP", quality=90))

    def test_what_is_transparent_lies_over_white(self):
        image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
        image.putpixel((1, 0), (10, 20, 30, 0))
        assert np.asarray(self.read(data_uri(image))[1]).tolist() == [[[10, 20, 30], [255, 255, 255]]]

    def test_sixteen_bits_keep_their_greys(self):
        image = Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16))
        assert np.asarray(self.read(data_uri(image))[1]).tolist() == [[0, 1, 128, 255]]

    def test_stands_upright(self):
        image = Image.new("L", (2, 1))
        image.putpixel((0, 0), 200)
        image.getexif()[0x0112] = 6  # to be turned by a quarter, clockwise
        assert np.asarray(self.read(data_uri(image))[1]).tolist() == [[200], [0]]
