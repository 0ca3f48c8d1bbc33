"""The same call again for some of its images: which arguments belong to which image."""

import numpy as np
import pytest
import torch
from filter_data import seeded

from hf_unlearn.filtering.drawing.calls import Call


class TextToImage:
    def __call__(
        self,
        prompt=None,
        negative_prompt=None,
        image=None,
        prompt_embeds=None,
        pooled_prompt_embeds=None,
        ip_adapter_image=None,
        num_images_per_prompt=1,
        generator=None,
        latents=None,
        callback_on_step_end=None,
        **kwargs,
    ):
        return {name: value for name, value in locals().items() if name != "self"}


class Unconditional:
    def __call__(self, batch_size=1, generator=None, output_type="pil"):
        return {"batch_size": batch_size, "generator": generator}


class Adversarial:
    def __call__(self, num_images=1, generator=None, latents=None, *, batch_size=64):
        return {"num_images": num_images, "batch_size": batch_size, "latents": latents}


class ClassConditional:
    def __call__(self, class_labels, generator=None):
        return {"class_labels": class_labels}


def call(pipeline, *args, **kwargs):
    return Call(pipeline, args, kwargs)


class TestArguments:
    def test_are_as_a_call_takes_them(self):
        given = call(TextToImage(), "a", ["b"], extra=3)
        assert (given["prompt"], given["negative_prompt"], given["num_images_per_prompt"]) == ("a", ["b"], 1)
        assert given["padding_mask_crop"] is None
        assert given()["kwargs"] == {"extra": 3}
        with pytest.raises(TypeError, match="unexpected keyword argument 'prompt'"):
            call(Unconditional(), prompt="a")

    def test_replaced_only_where_there_are_such(self):
        given = call(Unconditional(), 3)
        assert given.replace(batch_size=2, latents=None)()["batch_size"] == 2
        assert given()["batch_size"] == 3


class TestForPlaces:
    def test_numbers(self):
        assert call(Unconditional(), 5).for_places([1, 4], 5)()["batch_size"] == 2
        again = call(Adversarial(), 5, latents=torch.zeros(5, 2), batch_size=7).for_places([0, 2, 3], 5)()
        assert again == {"num_images": 3, "batch_size": 7, "latents": None}

    @pytest.mark.parametrize("prompt", ["a", ["a"]])
    def test_one_prompt(self, prompt):
        image = torch.zeros(3, 8, 8)
        again = call(TextToImage(), prompt, image=image, num_images_per_prompt=4).for_places([1, 3], 4)()
        assert again["prompt"] == prompt
        assert again["image"] is image
        assert again["num_images_per_prompt"] == 2

    def test_prompts_and_what_goes_with_them(self):
        embeddings, pooled, callback = torch.arange(6.0).view(3, 2, 1), torch.arange(3.0).view(3, 1), object()
        given = {"negative_prompt": ["x", "y", "z"], "prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}
        given |= {"num_images_per_prompt": 2, "callback_on_step_end": callback, "latents": torch.zeros(6, 4)}
        again = call(TextToImage(), **given).for_places([0, 3, 4, 5], 6)()
        assert again["negative_prompt"] == ["x", "y", "z", "z"]
        assert again["prompt_embeds"].equal(embeddings[[0, 1, 2, 2]])
        assert again["pooled_prompt_embeds"].equal(pooled[[0, 1, 2, 2]])
        assert again["num_images_per_prompt"] == 1
        assert again["callback_on_step_end"] is callback
        assert again["latents"] is None

    def test_pictures(self):
        """Of several images a prompt, diffusers 0.42 has the pictures in another order than the prompts."""
        images = np.arange(3 * 4).reshape(3, 2, 2, 1)
        again = call(TextToImage(), ["a", "b", "c"], image=images).for_places([0, 2], 3)()
        assert (again["image"] == images[[0, 2]]).all()
        assert call(TextToImage(), ["a", "b", "c"], image=images, num_images_per_prompt=2).for_places([0], 6) is None

    def test_what_all_prompts_share(self):
        again = call(TextToImage(), ["a", "b"], "x", image=torch.zeros(1, 3, 8, 8)).for_places([1], 2)()
        assert (again["prompt"], again["negative_prompt"]) == (["b"], "x")
        assert again["image"].shape == (1, 3, 8, 8)

    def test_generators(self):
        generators = [seeded(number) for number in range(3)]
        again = call(TextToImage(), ["a", "b", "c"], generator=generators).for_places([0, 2], 3)()
        assert [id(one) for one in again["generator"]] == [id(generators[0]), id(generators[2])]
        assert call(Unconditional(), 3, generators[0]).for_places([1], 3)()["generator"] is generators[0]

    def test_labels(self):
        assert call(ClassConditional(), [5, 6, 7]).for_places([0, 2], 3)()["class_labels"] == [5, 7]
        labels = torch.tensor([5, 6, 7])
        assert call(ClassConditional(), labels).for_places([2], 3)()["class_labels"].tolist() == [7]

    @pytest.mark.parametrize(
        ("given", "drawn"),
        [
            (call(TextToImage(), ["a", "b"], num_images_per_prompt=3), 7),
            (call(TextToImage(), ["a", "b"], ["x", "y", "z"]), 2),
            (call(TextToImage(), ["a", "b"], image=torch.zeros(2, 8, 8)), 2),
            (call(TextToImage(), ["a", "b"], ip_adapter_image=[torch.zeros(2, 3, 8, 8)]), 2),
        ],
    )
    def test_where_nobody_can_tell(self, given, drawn):
        assert given.for_places([0, 1], drawn) is None

    def test_with_several_control_networks(self):
        """Whose images are a list too, of one for each network."""
        pipeline = TextToImage()
        pipeline.controlnet = torch.nn.Module()
        pipeline.controlnet.nets = torch.nn.ModuleList()
        images = [torch.zeros(1, 3, 8, 8)] * 2
        assert call(pipeline, ["a", "b"], image=images).for_places([1], 2) is None
        assert call(pipeline, "a", image=images, num_images_per_prompt=2).for_places([1], 2)()["image"] is images
