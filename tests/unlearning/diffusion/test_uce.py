"""Unified Concept Editing: every layer against least squares over stacked rows of last tokens."""

import pytest
import torch
from text_to_image_data import denoiser_of, tiny

from hf_unlearn import uce
from hf_unlearn.unlearning.diffusion.pipelines import text_side_of
from hf_unlearn.unlearning.diffusion.text_moments import last_words


def last(pipe, prompt):
    """As their code finds it: by the mask of the padded prompt, one before the end."""
    mask = pipe.tokenizer(prompt, padding="max_length", max_length=12, truncation=True).attention_mask
    with torch.no_grad():
        return pipe.encode_prompt(prompt, "cpu", 1, False)[0][0, sum(mask) - 2].double()


@pytest.mark.parametrize("anchor", ["", "horse"])
def test_is_the_least_squares_of_its_docstring(anchor):
    pipe, edited = tiny("sd"), tiny("sd")
    assert (
        uce(
            edited,
            ["cat", "blue dog"],
            anchor=anchor,
            keep=["red house"],
            erase_scale=2.0,
            preserve_scale=0.7,
            lamb=0.3,
        )
        is edited
    )
    asked, instead, kept = (
        [last(pipe, text) for text in texts] for texts in (["cat", "blue dog"], [anchor] * 2, ["red house"])
    )
    e, p, root = 2.0**0.5, 0.7**0.5, 0.3**0.5 * torch.eye(64, dtype=torch.float64)
    rows = torch.stack([*(e * state for state in asked), *(p * state for state in kept), *root])
    answers = torch.stack([*(e * state for state in instead), *(p * state for state in kept), *root])
    changed = {f"{layer.name}.weight" for layer in text_side_of(pipe).layers}
    for name, weight in pipe.unet.named_parameters():
        new = edited.unet.get_parameter(name)
        if name not in changed:
            assert torch.equal(weight, new)
            continue
        expected = torch.linalg.lstsq(rows, answers @ weight.double().T, driver="gelsd").solution.T
        assert (new - expected).norm() < 1e-5 * (weight - expected).norm()


@pytest.mark.parametrize("kind", ["sdxl", "pixart", "sd3", "flux"])
def test_other_pipelines_are_changed_and_draw_finite(kind):
    """The concept's last token is read as the anchor's by every layer, up to λ."""
    pipe = tiny(kind)
    side = text_side_of(pipe)
    concept, anchor = (last_words(side, [word], 4) for word in ("cat", "horse"))
    old = {layer.name: layer.linear.weight[:, : layer.width].detach().double() for layer in side.layers}
    uce(pipe, "cat", anchor="horse", lamb=1e-6)
    for layer in text_side_of(pipe).layers:
        new = denoiser_of(pipe).get_submodule(layer.name).weight[:, : layer.width].double()
        here, there = concept[layer.stream], anchor[layer.stream]
        wanted, was = there @ old[layer.name].T, here @ old[layer.name].T
        assert (here @ new.T - wanted).norm() < 1e-2 * (was - wanted).norm()


def test_last_words_of_two_encoders_behind_each_other():
    """Stable Diffusion 3: of CLIP's positions and of T5's; the empty prompt's is its first."""
    pipe = tiny("sd3")
    side = text_side_of(pipe)
    tokens = side.told(["a red cat", ""]).tokens.double()
    found = last_words(side, ["a red cat", ""], 1)["tokens"]
    places = [(0, 3), (0, 12 + 3), (1, 0), (1, 12)]  # prompt by prompt, each first of CLIP: <s> a red cat </s>
    torch.testing.assert_close(found, torch.stack([tokens[place] for place in places]), rtol=1e-4, atol=1e-5)


def test_refuses():
    pipe = tiny("sd")
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    for concept, values, match in (
        ("cat", {"lamb": 0}, "^lamb=0: must be > 0"),
        ("cat", {"anchor": "cat"}, "^anchor='cat': is the concept itself"),
        ("", {}, "^concept: '' is no text"),
        ("cat", {"keep": "dog"}, "^keep='dog': is one text; pass a list"),
        ("zyx", {"anchor": "xyz"}, "^wordings: the encoder reads none as far as 'zyx'"),
    ):
        with pytest.raises(ValueError, match=match):
            uce(pipe, concept, **values)
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    uce(pipe, {"cat": "horse", "dog": ""})  # a dict needs no anchor
