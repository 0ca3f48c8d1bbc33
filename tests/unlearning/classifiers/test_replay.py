import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_unlearn.unlearning.classifiers.replay import perturb_images
from hf_unlearn.unlearning.language.replay import perturb_tokens
from hf_unlearn.unlearning.losses import divergence


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def images_with_distinct_pixels(n, channels=2, height=5, width=4):
    """Every pixel of every channel has a value of its own, so that where it went can be read off."""
    return torch.arange(n * channels * height * width, dtype=torch.float32).view(n, channels, height, width)


def origin(result, images):
    """The index of the image whose pixels are a permutation of `result`'s, or None."""
    rows = images.flatten(1).sort(-1).values
    hits = (rows == result.flatten().sort().values).all(-1).nonzero().flatten().tolist()
    return hits[0] if hits else None


def kind_of(result, images):
    """What was done to an image with distinct pixels, found by trying everything."""
    source = origin(result, images)
    if source is None:
        return "new pixels"
    original = images[source]
    height, width = original.shape[-2:]
    if any(torch.equal(original.roll((i, j), (-2, -1)), result) for i in range(height) for j in range(width)):
        return "rolled"
    if any(torch.equal(original.flip(axes), result) for axes in ([-1], [-2], [-1, -2])):
        return "flipped"
    # Channels move together: the second channel is the first plus a constant, before and after.
    assert torch.equal(result[1] - result[0], original[1] - original[0])
    return "shuffled"


class TestPerturbImages:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("n", [1, 2, 4, 5, 7, 12])
    def test_shape_dtype_determinism_and_untouched_input(self, n, dtype):
        images = torch.randn(n, 3, 6, 5, generator=seeded(0)).to(dtype)
        before = images.clone()
        result = perturb_images(images, seeded(1))
        assert (result.shape, result.dtype) == (images.shape, dtype)
        assert result.isfinite().all()
        assert torch.equal(images, before)
        assert torch.equal(result, perturb_images(images, seeded(1)))
        if n > 1:
            assert not torch.equal(result, perturb_images(images, seeded(2)))

    @pytest.mark.parametrize("seed", range(2))
    def test_a_fifth_of_the_batch_each(self, seed):
        images = images_with_distinct_pixels(15)
        result = perturb_images(images, seeded(seed))
        expected = ["rolled", "flipped", "new pixels", "shuffled", "new pixels"]
        assert [kind_of(image, images) for image in result] == [kind for kind in expected for _ in range(3)]
        sources = [origin(image, images) for image in (*result[:6], *result[9:12])]
        assert len(set(sources)) == 9
        assert sources != sorted(sources)  # drawn at random

    def test_all_rolls_and_flips_occur(self):
        images = images_with_distinct_pixels(1, 1, 3, 2).repeat(1500, 1, 1, 1)
        result = perturb_images(images, seeded(0))

        def different(images):
            return {tuple(image.flatten().tolist()) for image in images}

        original = images[0]
        rolls = different(original.roll((i, j), (-2, -1)) for i in range(3) for j in range(2))
        assert different(result[:300]) == rolls
        assert different(result[300:600]) == different(original.flip(axes) for axes in ([-1], [-2], [-1, -2]))
        assert len(different(result[900:1200])) > 200  # of 720 orders

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_noise_has_the_batch_s_own_size(self, dtype):
        images = (4 + 3 * torch.randn(50, 1, 16, 16, generator=seeded(0))).to(dtype)
        result = perturb_images(images, seeded(1)).float()
        low, high = images.float().min(), images.float().max()
        uniform = result[40:]
        ulp = (high - low) * torch.finfo(dtype).eps
        assert low - ulp <= uniform.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < uniform.max() <= high + ulp
        torch.testing.assert_close(uniform.mean(), (low + high) / 2, rtol=0, atol=0.3)

        flat = torch.full((10, 1, 64, 64), 2.0)
        flat[:, :, ::2] = -1  # standard deviation 1.5, whichever two images are drawn
        noised = perturb_images(flat.to(dtype), seeded(1)).float()[4:6] - flat[4:6]
        torch.testing.assert_close(noised.std(), torch.tensor(1.5), rtol=0.05, atol=0)
        torch.testing.assert_close(noised.mean(), torch.tensor(0.0), rtol=0, atol=0.1)

    def test_every_kind_occurs_in_small_batches_too(self):
        images = torch.arange(20.0).view(1, 1, 5, 4)
        results = [perturb_images(images, seeded(seed))[0] for seed in range(100)]
        assert {origin(result, images) for result in results} == {0, None}  # permuted, and new pixels
        constant = torch.full((5, 1, 4, 4), 0.25)
        assert torch.equal(perturb_images(constant, seeded(0)), constant)


VOCABULARY = torch.arange(10, 40)


@st.composite
def token_batches(draw):
    """`(input_ids, attention_mask or None)`: ids 0 to 9 are special, padding is 0 on the right."""
    n, length = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    rows = draw(st.lists(st.lists(st.integers(1, 39), min_size=length, max_size=length), min_size=n, max_size=n))
    ids = torch.tensor(rows)
    if draw(st.booleans()):
        return ids, None
    lengths = torch.tensor(draw(st.lists(st.integers(1, length), min_size=n, max_size=n)))
    mask = (torch.arange(length) < lengths[:, None]).long()
    return ids * mask, mask


class TestPerturbTokens:
    @settings(deadline=None, max_examples=80)
    @given(batch=token_batches(), seed=st.integers(0, 10**6))
    def test_fixed_places_stay_and_new_tokens_come_from_the_vocabulary(self, batch, seed):
        ids, mask = batch
        before = ids.clone()
        result = perturb_tokens(ids, mask, VOCABULARY, seeded(seed))
        assert torch.equal(ids, before)
        assert (result.shape, result.dtype) == (ids.shape, ids.dtype)
        assert torch.equal(result, perturb_tokens(ids, mask, VOCABULARY, seeded(seed)))
        fixed = ids < 10
        fixed[:, 0] = True
        if mask is not None:
            fixed |= mask == 0
        assert torch.equal(result[fixed], ids[fixed])
        assert ((result[~fixed] >= 10) & (result[~fixed] < 40)).all()
        # Of n rows at least ⌊n/3⌋ are permutations of what they were.
        same = (result.sort(-1).values == ids.sort(-1).values).all(-1)
        assert same.sum() >= len(ids) // 3

    def test_a_third_of_the_rows_each(self):
        n, length = 30, 200
        ids = torch.arange(1000, 1000 + n * length).view(n, length)
        ids[:, 50] = 7
        vocabulary = torch.arange(1000, 50000)
        result = perturb_tokens(ids, None, vocabulary, seeded(0))
        kept = (result == ids).float().mean(-1)
        permuted = (result.sort(-1).values == ids.sort(-1).values).all(-1)
        half = (kept > 0.35) & (kept < 0.65)
        assert permuted.sum() == 10
        assert half.sum() == 10
        assert (kept < 0.1).sum() == 20  # the permuted and the redrawn ones
        assert torch.equal(result[:, 0], ids[:, 0])
        assert (result[:, 50] == 7).all()
        other = perturb_tokens(ids, None, vocabulary, seeded(1))
        assert not torch.equal(permuted, (other.sort(-1).values == ids.sort(-1).values).all(-1))  # drawn at random

    def test_permutations_and_draws_are_uniform(self):
        ids = torch.tensor([[1, 10, 11, 12]]).repeat(9000, 1)
        result = perturb_tokens(ids, None, torch.arange(10, 13), seeded(0))
        counts = torch.bincount(((result[:, 1:] - 10) * torch.tensor([9, 3, 1])).sum(-1), minlength=27)
        # Of each third: the original order stays with probability 1/6 | (1/2 + 1/6)³ | 1/27.
        orders = [5, 7, 11, 15, 19, 21]
        p = torch.zeros(27)
        for code in range(27):
            tokens = torch.tensor([code // 9, code // 3 % 3, code % 3])
            agrees = tokens == torch.arange(3)
            p[code] = ((code in orders) / 6 + torch.where(agrees, 2 / 3, 1 / 6).prod() + 1 / 27) / 3
        assert p.sum().sub(1).abs() < 1e-6
        z = (counts - 9000 * p) / (9000 * p * (1 - p)).sqrt()
        assert z.abs().max() < 4.5

    def test_padding_on_the_left_and_the_first_token_stay(self):
        for first in (1, 11):  # whatever the first token is; padding is in the vocabulary here
            ids = torch.tensor([[10, 10, first, 12, 13, 14]]).repeat(30, 1)
            mask = torch.tensor([[0, 0, 1, 1, 1, 1]]).repeat(30, 1)
            result = perturb_tokens(ids, mask, VOCABULARY, seeded(0))
            assert torch.equal(result[:, :3], ids[:, :3])
            assert (result[:, 3:] != ids[:, 3:]).any(0).all()

        ids = torch.arange(10, 30).view(1, -1)  # single rows are not only permuted
        results = [perturb_tokens(ids, None, VOCABULARY, seeded(seed)) for seed in range(50)]
        assert not all(torch.equal(r.sort(-1).values, ids) for r in results)


LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=12, max_size=12).map(lambda v: torch.tensor(v).view(3, 4))


class TestDivergence:
    @settings(deadline=None, max_examples=80)
    @given(logits=LOGITS, reference=LOGITS, shift=st.floats(-50, 50))
    def test_is_kl_div_non_negative_and_shift_invariant(self, logits, reference, shift):
        value = divergence(logits, reference)
        expected = F.kl_div(
            logits.double().log_softmax(-1), reference.double().log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-4)
        assert (value >= -1e-5).all()
        assert (divergence(reference, reference) == 0).all()
        torch.testing.assert_close(divergence(logits + shift, reference - shift), value, rtol=1e-4, atol=1e-4)

    @settings(deadline=None, max_examples=40)
    @given(logits=LOGITS, reference=LOGITS)
    def test_excluded_classes_have_no_influence(self, logits, reference):
        excluded = torch.tensor([False, True, False, True])
        logits.requires_grad_()
        value = divergence(logits, reference, excluded)
        torch.testing.assert_close(value, divergence(logits[:, [0, 2]], reference[:, [0, 2]]))
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert (gradient[:, excluded] == 0).all()
        q = logits.detach()[:, ~excluded].softmax(-1)
        torch.testing.assert_close(
            gradient[:, ~excluded], q - reference[:, ~excluded].softmax(-1), rtol=1e-4, atol=1e-6
        )

    def test_half_precision_is_computed_in_fp32_and_sequences_keep_their_axes(self):
        logits, reference = torch.randn(2, 3, 5, 7, generator=seeded(0)).bfloat16()
        value = divergence(logits, reference)
        assert (value.shape, value.dtype) == ((3, 5), torch.float32)
        torch.testing.assert_close(value, divergence(logits.float(), reference.float()))

    def test_classes_that_both_rule_out_contribute_nothing(self):
        logits, reference = torch.randn(2, 5, generator=seeded(0))
        logits[3] = reference[3] = -torch.inf
        expected = divergence(logits[[0, 1, 2, 4]], reference[[0, 1, 2, 4]])
        torch.testing.assert_close(divergence(logits, reference), expected)
