"""SPEED: the change against the constrained least squares that it solves, and what is kept of it against their loop."""

import pytest
import torch
from text_to_image_data import KIND_NAMES, latents, tiny
from vdu_data import seeded

from hf_unlearn import speed
from hf_unlearn.unlearning.diffusion.closed_form import regression
from hf_unlearn.unlearning.diffusion.pipelines import text_side_of
from hf_unlearn.unlearning.diffusion.speed import _invariants, _refined
from hf_unlearn.unlearning.diffusion.text_moments import last_words
from hf_unlearn.unlearning.diffusion.wordings import KINDS


KEPT = ["a red house", "piano", "the old blue guitar"]
PLAIN = {"retain_filter": False, "augment": 0, "threshold": 1e-9, "keep": KEPT}


def values(pipe):
    return {layer.name: layer.linear.weight.detach().double() for layer in text_side_of(pipe).layers}


def change_of(kind="sd", **more):
    pipe = tiny(kind)
    old = values(pipe)
    assert speed(pipe, ["cat", "dog"], anchor="horse", **more) is pipe
    new = values(pipe)
    return {name: new[name] - old[name] for name in old}, old


@torch.no_grad()
def test_is_the_least_squares_within_its_constraints():
    """Over all changes that move neither what is kept nor the empty prompt, by a basis of these."""
    change, old = change_of(keys=True, retain_scale=0.3, **PLAIN)
    side = text_side_of(tiny("sd"))
    asked, instead, kept = (last_words(side, texts, 4)["tokens"] for texts in (["cat", "dog"], ["horse"] * 2, KEPT))
    fixed = torch.cat([kept, _invariants(side, 0)["tokens"].T])
    assert fixed.shape == (len(KEPT) + 4, 64)
    basis = torch.linalg.svd(fixed, full_matrices=True).Vh[len(fixed) :].T
    rows = torch.cat([asked @ basis / 2**0.5, 0.3**0.5 * torch.eye(basis.shape[1], dtype=torch.float64)])
    for name, found in change.items():
        moves = (instead - asked) @ old[name].T / 2**0.5
        answers = torch.cat([moves, torch.zeros(basis.shape[1], len(old[name]), dtype=torch.float64)])
        expected = (basis @ torch.linalg.lstsq(rows, answers, driver="gelsd").solution).T
        assert (found - expected).norm() < 1e-4 * expected.norm()
        assert (found @ fixed.T).norm() < 1e-5 * (found @ asked.T).norm()


def test_changes_values_alone_unless_keys_are_asked_for():
    change, _ = change_of(**PLAIN)
    assert all(bool(found.any()) == name.endswith("to_v") for name, found in change.items())
    assert all(found.any() for found in change_of(keys=True, **PLAIN)[0].values())


def test_what_is_fixed_may_be_kept_anyway():
    """Of SDXL's pooled vector the empty prompt's is all that is fixed; where it is kept too, nothing is divided by nothing."""
    first, again = (change_of("sdxl", **(PLAIN | {"keep": keep}))[0] for keep in ([*KEPT, ""], KEPT))
    for name, found in first.items():
        torch.testing.assert_close(found, again[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("retain_filter", [True, False])
def test_what_is_kept_is_refined_as_in_their_loop(retain_filter):
    """Filtered, then copied with noise and filtered again, one by one."""
    kept, weight = (torch.randn(*size, generator=seeded(7), dtype=torch.float64) for size in ((9, 6), (8, 6)))
    here = torch.randn(4, 6, generator=seeded(8), dtype=torch.float64)
    second = here.T @ here
    edit = weight @ regression(-0.5 * second, second, 0 * second, second.new_tensor(1.0))
    moment = _refined(kept, weight, edit, retain_filter, 5, seeded(1))
    lengths = torch.stack([(edit @ state).norm() for state in kept])
    chosen = [
        state for state, length in zip(kept, lengths, strict=True) if length > lengths.mean() or not retain_filter
    ]
    last = torch.linalg.eigh(weight.T @ weight)[1][:, 0]
    # The sign of a singular vector is nobody's: that of the function's own.
    own = torch.linalg.svd(weight, full_matrices=False).Vh[-1]
    project = torch.outer(last, last)
    noise = torch.randn(5, len(chosen), generator=seeded(1), dtype=torch.float64)
    copies = [state + project @ (draw * own) for draws in noise for draw, state in zip(draws, chosen, strict=True)]
    lengths = torch.stack([(edit @ copy).norm() for copy in copies])
    copies = [copy for copy, length in zip(copies, lengths, strict=True) if length > lengths.mean()]
    assert 0 < len(copies) < 5 * len(chosen)
    everything = torch.stack([*chosen, *copies])
    torch.testing.assert_close(moment, everything.T @ everything / len(everything), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_with_its_defaults_every_pipeline_still_draws(kind):
    pipe = tiny(kind)
    before = latents(pipe, ["a cat"])
    speed(pipe, "cat", anchor="horse", keep=KEPT)
    after = latents(pipe, ["a cat"])
    assert after.isfinite().all()
    assert not torch.equal(before, after)


def test_refuses():
    pipe = tiny("sd")
    for given, match in (
        ({"keep": []}, "^keep: there is nothing to keep"),
        ({"keep": sum(KINDS.values(), []), "threshold": 1e-9}, "^keep: fills every direction of .*to_v"),
        ({"keep": KEPT, "augment": -1}, "^augment=-1: must be ≥ 0"),
        ({"anchor": "cats"}, "^anchor='cats': names 'cats'"),
    ):
        with pytest.raises(ValueError, match=match):
            speed(pipe, "cat", **({"anchor": "horse"} | given))
