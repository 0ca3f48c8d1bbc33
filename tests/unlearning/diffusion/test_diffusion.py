"""Images and prompts as a denoiser sees them, and seeded samples that are those of the stock pipeline."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DDIMScheduler
from picture_data import COLOUR, GREY, as_tensor, noise_image, refused
from torch import nn
from torch.utils.data import default_collate

from hf_unlearn.images import decode, pixels
from hf_unlearn.unlearning.diffusion.denoiser import is_prompted, resolution
from hf_unlearn.unlearning.diffusion.drawing import generate
from hf_unlearn.unlearning.diffusion.encoded import EncodedImages, encode, encode_prompts


PROMPTS = ["a photo", "hot", "a photo", "", "a hot photo"]


class TestEncodedImages:
    @pytest.fixture(params=["images", "latents"])
    def encoded(self, request):
        latents = torch.arange(10.0).view(5, 1, 1, 2)
        if request.param == "images":
            return EncodedImages(latents)
        table = {"encoder_hidden_states": torch.arange(6.0).view(2, 3), "other": torch.tensor([[5], [6]])}
        return EncodedImages(latents, latents + 100, table, torch.tensor([1, 0, 0, 1, 0]))

    def test_rows_are_looked_up_in_the_tables(self):
        table = torch.arange(6.0).view(2, 3)
        encoded = EncodedImages(torch.zeros(3, 1), None, {"told": table}, torch.tensor([1, 0, 1]))
        assert [encoded[row]["conditioning"]["told"].tolist() for row in range(2)] == [[3, 4, 5], [0, 1, 2]]
        assert set(encoded[1]) == {"latents", "conditioning"}
        assert set(EncodedImages(torch.zeros(3, 1))[0]) == {"latents"}

    def test_batches_and_selections_have_the_same_items(self, encoded):
        picked = [4, 0, 3, 3]
        together, collated = encoded[torch.tensor(picked)], default_collate([encoded[row] for row in picked])
        torch.testing.assert_close(collated, together, rtol=0, atol=0)
        for keep in (torch.tensor([True, False, False, True, True]), torch.tensor([0, 3, 4])):
            selected = encoded.select(keep)
            assert len(selected) == 3
            for place, row in enumerate([0, 3, 4]):
                torch.testing.assert_close(selected[place], encoded[row], rtol=0, atol=0)
            torch.testing.assert_close(selected.select(torch.tensor([2]))[0], encoded[4], rtol=0, atol=0)
        assert len(encoded) == 5


class TestEncode:
    def test_unprompted_models_see_the_images(self, tiny_ddpm):
        images = [noise_image("L", seed=seed) for seed in range(5)]
        for column in ("image", "pixel_values", "images"):
            encoded = encode([{column: image} for image in images], tiny_ddpm, device="cpu", batch_size=2)
            torch.testing.assert_close(encoded.latents, pixels(images, GREY, resize=False))
            assert encoded.latents_std is None
            assert set(encoded[0]) == {"latents"}

    def test_a_dataset_of_the_hub(self, tiny_stable_diffusion):
        images = [noise_image(size=(10, 8), seed=seed) for seed in range(3)]
        dataset = Dataset.from_dict({"image": images, "caption": PROMPTS[:3]})
        encoded = encode(dataset, tiny_stable_diffusion, device="cpu", resize=True)
        resized = zip(pixels(images, COLOUR, resize=True), PROMPTS, strict=False)
        listed = [{"pixel_values": image, "prompt": prompt} for image, prompt in resized]
        same = encode(listed, tiny_stable_diffusion, device="cpu")
        for row in range(3):
            torch.testing.assert_close(encoded[row], same[row])

    @pytest.mark.parametrize("shift", [None, 0.25])
    def test_prompted_models_see_scaled_latents(self, tiny_stable_diffusion, shift):
        vae = tiny_stable_diffusion.vae
        vae.register_to_config(scaling_factor=0.5, shift_factor=shift)
        images = [noise_image(seed=seed) for seed in range(5)]
        rows = [{"image": image, "text": prompt} for image, prompt in zip(images, PROMPTS, strict=True)]
        encoded = encode(rows, tiny_stable_diffusion, device="cpu", batch_size=2)
        assert encoded.latents.shape == encoded.latents_std.shape == (5, 4, 4, 4)
        assert not encoded.latents.requires_grad
        with torch.no_grad():
            for row, image in enumerate(images):
                posterior = vae.encode(as_tensor(image).float().unsqueeze(0)).latent_dist
                mean = (posterior.mean[0] - (shift or 0)) * 0.5
                torch.testing.assert_close(encoded.latents[row], mean, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(encoded.latents_std[row], posterior.std[0] * 0.5, rtol=1e-4, atol=1e-5)
                prompt = tiny_stable_diffusion.encode_prompt(PROMPTS[row], "cpu", 1, False)[0][0]
                told = encoded[row]["conditioning"]["encoder_hidden_states"]
                torch.testing.assert_close(told, prompt, rtol=1e-4, atol=1e-5)
        assert len(encoded.conditioning["encoder_hidden_states"]) == 4  # of five prompts, two are the same

    def test_more_prompts_than_one_batch(self, tiny_stable_diffusion):
        # The tokenizer knows four letters, where another one follows.
        prompts = ["".join("phot"[int(digit)] for digit in np.base_repr(64 + n, 4)) + "t" for n in range(70)][::-1]
        conditioning, rows = encode_prompts(prompts + prompts[:5], tiny_stable_diffusion, device="cpu")
        table = conditioning["encoder_hidden_states"]
        assert table.shape == (70, 16, 8)
        torch.testing.assert_close(rows[70:], rows[:5])
        assert len(table.flatten(1).unique(dim=0)) == 70
        for row in (0, 7, 63, 64, 69):
            with torch.no_grad():
                alone = tiny_stable_diffusion.encode_prompt(prompts[row], "cpu", 1, False)[0][0]
            torch.testing.assert_close(table[rows[row]], alone, rtol=1e-4, atol=1e-5)

    def test_says_what_is_missing(self, tiny_ddpm, tiny_stable_diffusion):
        grey, colour = noise_image("L"), noise_image()
        some = [{"image": colour, "text": "a photo"}]
        for pipeline, rows, match in (
            (tiny_ddpm, [], "is empty"),
            (tiny_ddpm, [{"picture": grey}], "has no images"),
            (tiny_ddpm, [{"image": grey}, {"image": None}], "row 1 has no image"),
            (tiny_ddpm, [{"image": colour}], "3 channels"),
            (tiny_stable_diffusion, [{"image": colour}], "prompts are missing"),
            (tiny_stable_diffusion, [{"image": colour, "label": 3}], "prompts are missing"),
            (tiny_stable_diffusion, some * 9 + [{"image": colour, "text": None}], "row 9 has no text"),
            (tiny_stable_diffusion, [{"image": noise_image(size=(7, 8)), "text": "a photo"}], "set resize=True"),
        ):
            refused(f"^retain_dataset: .*{match}", encode, rows, pipeline, device="cpu", argument="retain_dataset")


class Cases:
    """What `generate` is called with for either kind of pipeline."""

    def __init__(self, pipeline):
        self.pipeline = pipeline
        self.prompted = is_prompted(pipeline)

    def what(self, count):
        return (PROMPTS * 2)[:count] if self.prompted else count

    def __call__(self, count=4, **options):
        return generate(self.pipeline, self.what(count), num_inference_steps=3, **options)

    def stock(self, count, seed):
        seeds = np.random.SeedSequence(seed).generate_state(count, np.uint64)
        generators = [torch.Generator().manual_seed(int(value) % 2**63) for value in seeds]
        what = {"prompt": self.what(count)} if self.prompted else {"batch_size": count}
        images = self.pipeline(**what, generator=generators, num_inference_steps=3, output_type="np").images
        return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1


@pytest.fixture(params=["tiny_ddpm", "tiny_ddim", "tiny_stable_diffusion"])
def draw(request, tiny_ddpm):
    if request.param == "tiny_ddim":
        tiny_ddpm.scheduler = DDIMScheduler.from_config(tiny_ddpm.scheduler.config)
        return Cases(tiny_ddpm)
    return Cases(request.getfixturevalue(request.param))


# Pixels in [−1, 1] after three passes of some ten layers in fp32, whose sums another batch takes in another order.
CLOSE = {"rtol": 0, "atol": 1e-5}


class TestGenerate:
    def test_draws_what_the_stock_pipeline_does(self, draw):
        for seed in (0, 3):
            images = draw(4, seed=seed)
            assert images.shape == (4, *resolution(draw.pipeline))
            assert (images.dtype, images.requires_grad) == (torch.float32, False)
            assert images.abs().max() <= 1
            assert images.std(0).max() > 0.01
            torch.testing.assert_close(images, draw.stock(4, seed), **CLOSE)

    def test_images_are_functions_of_the_seed_whatever_is_drawn_beside_them(self, draw):
        torch.manual_seed(1)
        images = draw(5)
        torch.manual_seed(2)
        for other in (draw(5, batch_size=2), draw(5, batch_size=1)):
            torch.testing.assert_close(other, images, **CLOSE)
        torch.testing.assert_close(draw(2), images[:2], **CLOSE)
        assert (draw(2, seed=6) - images[:2]).abs().max() > 1e-3
        assert all((images[i] - images[j]).abs().max() > 1e-3 for i in range(5) for j in range(i))

    @pytest.mark.parametrize(("shown", "fails"), [(None, True), ({"desc": "mine"}, False)])
    def test_leaves_everything_as_it_was(self, draw, shown, fails, capfd):
        """And drops nothing out."""
        expected, unet = draw(2), draw.pipeline.unet
        for module in unet.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        unet.train()
        unet.mid_block.eval()
        if shown is not None:
            draw.pipeline.set_progress_bar_config(**shown)
        modes = {name: module.training for name, module in unet.named_modules()}
        weights = {name: value.clone() for name, value in unet.state_dict().items()}
        random = torch.get_rng_state(), np.random.get_state()[1].copy()
        if fails:
            with pytest.raises((ValueError, TypeError)):
                generate(draw.pipeline, draw.what(1), num_inference_steps="many")
        else:
            torch.testing.assert_close(draw(2), expected, **CLOSE)
        assert "it/s" not in capfd.readouterr().err
        assert {name: module.training for name, module in unet.named_modules()} == modes
        assert getattr(draw.pipeline, "_progress_bar_config", None) == shown
        torch.testing.assert_close(dict(unet.state_dict()), weights, rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), random[0])
        assert (np.random.get_state()[1] == random[1]).all()

    def test_latents_are_those_that_the_images_are_decoded_from(self, tiny_stable_diffusion):
        draw, vae = Cases(tiny_stable_diffusion), tiny_stable_diffusion.vae
        images, latents = draw(3), draw(3, latents=True, batch_size=2)
        assert latents.shape == (3, 4, 4, 4)
        with torch.no_grad():
            expected = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            decode(latents, tiny_stable_diffusion, batch_size=2), expected, rtol=1e-4, atol=1e-5
        )
        vae.register_to_config(shift_factor=0.25)
        with torch.no_grad():
            expected = vae.decode(latents / vae.config.scaling_factor + 0.25).sample.clamp(-1, 1)
        torch.testing.assert_close(decode(latents, tiny_stable_diffusion), expected, rtol=1e-4, atol=1e-5)

    def test_prompts_and_guidance_matter(self, tiny_stable_diffusion):
        def latents(prompt, **options):
            return generate(tiny_stable_diffusion, [prompt], num_inference_steps=3, latents=True, **options)

        default = latents("a photo")
        torch.testing.assert_close(latents("a photo", guidance_scale=7.5), default, rtol=1e-5, atol=1e-5)
        assert (latents("a photo", guidance_scale=1.0) - default).abs().max() > 1e-3
        assert (latents("hot") - default).abs().max() > 1e-3

    def test_number_of_steps(self, tiny_ddpm, tiny_stable_diffusion):
        """The pipeline's own, which is 50 or 1000, or as many as the scheduler has."""
        for pipeline, what, own in ((tiny_ddpm, 1, 20), (tiny_stable_diffusion, ["a photo"], 50)):
            calls = []
            handle = pipeline.unet.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            for asked, expected in ((None, own), (3, 3)):
                calls.clear()
                generate(pipeline, what, num_inference_steps=asked, latents=is_prompted(pipeline))
                assert len(calls) == expected
            handle.remove()
