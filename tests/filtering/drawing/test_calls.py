"""The same call again for some of its images: which arguments belong to which image."""

import numpy as np
import pytest
import torch
from filter_data import seeded
from PIL import Image

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


class Consistency:
    def __call__(self, batch_size=1, class_labels=None, generator=None):
        return {"batch_size": batch_size, "class_labels": class_labels}


class FromNoise:
    def __call__(self, latents, num_images_per_prompt=1):
        return {"latents": latents}


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
        for given in ({"num_images": 5}, {}):  # the latents say how many
            again = call(Adversarial(), **given, latents=torch.zeros(5, 2), batch_size=7)
            assert again.for_places([0, 2, 3], 5)() == {"num_images": 3, "batch_size": 7, "latents": None}
            assert again.again()() == {"num_images": 5, "batch_size": 7, "latents": None}
        assert call(Consistency(), 4, class_labels=7).for_places([1], 4)() == {"batch_size": 1, "class_labels": 7}

    def test_one_prompt(self):
        callback = object.__init__
        given = {"num_images_per_prompt": 4, "negative_prompt": "x", "callback_on_step_end": callback, "eta": 0.5}
        again = call(TextToImage(), "a", **given, latents=torch.zeros(4, 4)).for_places([1, 3], 4)()
        assert (again["prompt"], again["negative_prompt"], again["num_images_per_prompt"]) == ("a", "x", 2)
        assert (again["callback_on_step_end"], again["latents"]) == (callback, None)
        again = call(TextToImage(), ["a"], num_images_per_prompt=4).for_places([1, 3], 4)()
        assert (again["prompt"], again["num_images_per_prompt"]) == (["a", "a"], 1)

    def test_prompts_and_what_goes_with_them(self):
        given = {"negative_prompt": ["x", "y", "z"], "num_images_per_prompt": 2}
        again = call(TextToImage(), ["a", "b", "c"], **given).for_places([0, 3, 4, 5], 6)()
        assert (again["prompt"], again["negative_prompt"]) == (["a", "b", "c", "c"], ["x", "y", "z", "z"])
        assert again["num_images_per_prompt"] == 1

    def test_generators(self):
        generators = [seeded(number) for number in range(3)]
        again = call(TextToImage(), ["a", "b", "c"], generator=generators).for_places([0, 2], 3)()
        assert [id(one) for one in again["generator"]] == [id(generators[0]), id(generators[2])]
        assert call(Unconditional(), 3, generators[0]).for_places([1], 3)()["generator"] is generators[0]
        assert (
            call(TextToImage(), ["a", "b"], generator=generators, num_images_per_prompt=2).for_places([0], 4) is None
        )

    @pytest.mark.parametrize(
        ("given", "drawn"),
        [
            (call(TextToImage(), ["a", "b"], num_images_per_prompt=3), 7),
            (call(TextToImage(), ["a", "b"], ["x", "y", "z"]), 2),
            (call(TextToImage(), "a"), 2),
            (call(TextToImage(), "a", ["x"], num_images_per_prompt=2), 2),
            # One reference each, or both of each? Flux 2 means the latter.
            (call(TextToImage(), ["a", "b"], image=[torch.zeros(1, 3, 8, 8)] * 2), 2),
            (call(TextToImage(), ["a", "b"], image=np.zeros((2, 8, 8, 3))), 2),
            (call(TextToImage(), "a", image=Image.new("L", (8, 8)), num_images_per_prompt=2), 2),
            (call(TextToImage(), ["a", "b"], pooled_prompt_embeds=torch.zeros(2, 4)), 2),
            (call(TextToImage(), prompt_embeds=torch.zeros(2, 4, 4)), 2),
            (call(TextToImage(), ["a", "b"], ip_adapter_image=[torch.zeros(2, 3, 8, 8)]), 2),
            (call(TextToImage(), ["a", "b"], sigmas=[1.0, 0.5]), 2),  # as many as prompts, by chance
            (call(TextToImage(), ["a", "b"], cross_attention_kwargs={"masks": torch.zeros(2, 1)}), 2),
            (call(Consistency(), 4, class_labels=[0, 1, 2, 3]), 4),
            (call(Unconditional(), 3), 4),
            (call(ClassConditional(), [5, 6]), 2),
        ],
    )
    def test_where_nobody_can_tell(self, given, drawn):
        assert given.for_places([0, 1], drawn) is None

    def test_latents_that_have_to_be_given(self):
        assert call(FromNoise(), latents := torch.zeros(2, 4)).again()()["latents"] is latents
