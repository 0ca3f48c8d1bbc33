"""Figures of generators against formulas, double loops, published numbers and what they must be blind to."""

import importlib.util
import math
import tracemalloc

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import binom
from torch import nn

from hf_unlearn.metrics import generation
from hf_unlearn.metrics.features import ClassifierFeatures, FeatureMoments, Features, features_of, inception_features
from hf_unlearn.metrics.generation import (
    class_shift,
    density_coverage,
    frechet_distance,
    kernel_distance,
    per_class_counts,
    percentage_unlearned,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(values):
    return Features(values, "test")


def refuses(call, *parts):
    """`call` raises a `ValueError` whose message is one line and has all these parts."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


class TestPercentageUnlearned:
    def test_counts(self):
        before, after = [3, 3, 3, 3, 1, 2], [3, 0, 1, 2, 1, 2]
        result = percentage_unlearned(before, after, 3)
        assert (result.pul, result.n_before, result.n_after, result.n_samples) == (75.0, 4, 1, 6)
        assert percentage_unlearned(before, after, forgotten={1, 3}).pul == 40.0
        assert percentage_unlearned(torch.tensor(before), np.array(after), [3]) == result
        for before, after, pul in (([3, 3], [0, 1], 100), ([3, 3], [3, 3], 0), ([3, 0, 1], [3, 3, 3], -200)):
            assert percentage_unlearned(before, after, 3).pul == pul

    def test_interval_of_another_implementation(self):
        """R's contingencytables on Cavo et al. (2012): both 59, first only 6, second only 16, neither 80; the ratio of
        the first to the second is 0.8667, from 0.7579 to 0.9910."""
        first, second = np.repeat([[1, 1], [1, 0], [0, 1], [0, 0]], [59, 6, 16, 80], axis=0).T
        result = percentage_unlearned(second, first, 1)
        figures = [1 - figure / 100 for figure in (result.pul, result.high, result.low)]
        assert figures == pytest.approx([0.8667, 0.7579, 0.9910], abs=5e-5)
        swapped = percentage_unlearned(first, second, 1)
        assert [1 - bound / 100 for bound in (swapped.low, swapped.high)] == pytest.approx(
            [1 / (1 - bound / 100) for bound in (result.high, result.low)]
        )

    @pytest.mark.parametrize(("rate", "left"), [(0.1, 0.5), (0.1, 0.02), (0.4, 0.9)])
    def test_interval_covers(self, rate, left):
        """About 95 in 100 intervals of 200 latents each hold the true figure: all outcomes, weighed by their probability."""
        covered = total = 0.0
        for n in range(1, 200):
            chances = binom.pmf(n, 200, rate) * binom.pmf(range(n + 1), n, left)
            for kept in np.flatnonzero(chances > 1e-5):
                result = percentage_unlearned(1 * (np.arange(200) < n), 1 * (np.arange(200) < kept), 1)
                total += chances[kept]
                covered += chances[kept] * (result.low <= 100 * (1 - left) <= result.high)
        assert total > 0.99
        assert 0.93 < covered / total < 0.97

    def test_interval_stays_open_where_nothing_is_left(self):
        few, many = (percentage_unlearned([3] * n + [1] * n, [1] * 2 * n, 3) for n in (5, 500))
        assert few.high == many.high == 100
        assert few.low < 70 < 98 < many.low
        narrow = percentage_unlearned([3] * 5 + [1] * 5, [1] * 10, 3, confidence=0.5)
        assert few.low < narrow.low

    def test_refuses(self):
        refuses(lambda: percentage_unlearned([1, 2], [1, 2], 3), "nothing to unlearn", "none of 2")
        refuses(lambda: percentage_unlearned([], [], 3), "before", "float64")
        refuses(lambda: percentage_unlearned([3, 3], [3], 3), "after", "the same 2 latents", "got 1")
        refuses(lambda: percentage_unlearned([[3.0]], [3], 3), "before", "[1, 1]")
        refuses(lambda: percentage_unlearned([3], [3], []), "forgotten")
        refuses(lambda: percentage_unlearned([3], [3], 3, confidence=95), "confidence", "95")


class TestClassShift:
    @pytest.mark.parametrize(
        ("before", "after", "forgotten", "expected"),
        [
            ([0] * 10 + [1] * 10 + [2] * 20, [0] * 15 + [1] * 5 + [2] * 2, 2, 0.25),  # a neighbour is half lost
            ([0] * 10 + [1] * 10 + [2] * 20, [0] * 15, [2], 0.5),
            ([0] * 10 + [1] * 30 + [2] * 40, [0] * 20 + [1] * 60, 2, 0),  # its place is divided in proportion
            ([0, 1, 2], [1, 1, 2], [2, 0], 0),
            ([0, 2], [1, 2], 2, 1),
        ],
    )
    def test_is_half_the_change_of_the_other_shares(self, before, after, forgotten, expected):
        result = class_shift(before, after, forgotten, 3)
        assert result.total_variation == pytest.approx(expected)
        assert result.before == tuple(before.count(c) for c in range(3))
        assert result.after == tuple(after.count(c) for c in range(3))
        assert result.forgotten == tuple(sorted([forgotten] if isinstance(forgotten, int) else forgotten))

    def test_counts_and_refusals(self):
        assert per_class_counts([2, 0, 2], 4).tolist() == [1, 0, 2, 0]
        refuses(lambda: per_class_counts([0, 4], 4), "[0, 4)", "0 to 4")
        refuses(lambda: per_class_counts([-1], 4), "[0, 4)", "-1")
        refuses(lambda: class_shift([0, 1], [2, 2], 2, 3), "after", "no image of a kept class")
        refuses(lambda: class_shift([0, 1], [0, 1], 3, 3), "forgotten", "(3,)")


class TestFrechetDistance:
    def test_is_the_formula(self):
        real, fake = normal(60, 5) @ normal(5, 5, seed=1) + 3, normal(80, 5, seed=2)
        covariances = [np.cov(side.numpy(), rowvar=False) for side in (real, fake)]
        expected = (
            ((real.mean(0) - fake.mean(0)) ** 2).sum().item()
            + sum(np.trace(covariance) for covariance in covariances)
            - 2 * np.trace(sqrtm(covariances[0] @ covariances[1]).real)
        )
        result = frechet_distance(features(real), features(fake))
        assert result.distance == pytest.approx(expected, rel=1e-9)
        assert (result.extractor, result.n_real, result.n_fake, result.n_features) == ("test", 60, 80, 5)

    @pytest.mark.parametrize("offset", [0.0, 1e7])
    def test_of_a_shift_is_its_squared_length(self, offset):
        real, shift = normal(50, 4) + offset, torch.tensor([1.0, -2.0, 0.0, 3.0])
        assert frechet_distance(features(real), features(real + shift)).distance == pytest.approx(14, rel=1e-6)

    def test_of_equal_sets_is_zero_and_symmetric_and_blind_to_order(self):
        for real in (features(normal(50, 4)), features(normal(10, 40))):
            assert 0 <= frechet_distance(real, real).distance < 1e-5
        real, fake = normal(30, 4), normal(40, 4, seed=1) * 2
        expected = pytest.approx(frechet_distance(features(real), features(fake)).distance)
        assert frechet_distance(features(fake), features(real)).distance == expected
        assert frechet_distance(features(real.flip(0)), features(fake.flip(0))).distance == expected

    @pytest.mark.parametrize("sizes", [(300, 200, 6), (12, 9, 20)])
    def test_is_that_of_torchmetrics(self, sizes):
        """Also of fewer images than numbers, whose covariances have no inverse."""
        from torchmetrics.image.fid import FrechetInceptionDistance

        real, fake = (normal(count, sizes[2], seed=count) + count / 200 for count in sizes[:2])
        given = nn.Identity()
        given.num_features = sizes[2]
        metric = FrechetInceptionDistance(feature=given)
        metric.update(real, real=True)
        metric.update(fake, real=False)
        # Roots of eigenvalues that are 0 but for 1e-15 of the largest: 3e-8 of its root, of each.
        assert frechet_distance(features(real), features(fake)).distance == pytest.approx(
            metric.compute().item(), rel=1e-5
        )

    @pytest.mark.parametrize("offset", [0.0, 1e4])
    def test_of_parts_is_that_of_the_whole(self, offset):
        """Parts of every size, 1,024 rows and more among them, one of a single row."""
        real, fake = normal(2_500, 6) @ normal(6, 6, seed=1) + offset, normal(3_000, 6, seed=2) + offset
        held = FeatureMoments()
        for part in real.split([1, 1_500, 999]):
            held.update(features(part))
        assert (len(held), held.size, held.extractor) == (2_500, 6, "test")
        # Two passes: n rounded additions of numbers as large as the mean, each off by 2⁻⁵³ of them.
        off = 2_500 * 2.0**-53 * real.abs().max().item()
        centred = real - real.mean(0)
        torch.testing.assert_close(held.mean, real.mean(0), rtol=0, atol=off)
        torch.testing.assert_close(held.covariance, centred.T @ centred / 2_499, rtol=1e-12, atol=2 * off)
        expected = frechet_distance(features(real), features(fake))
        for one, other in ((held, features(fake)), (held, FeatureMoments().update(features(fake)))):
            result = frechet_distance(one, other)
            assert result.distance == pytest.approx(expected.distance, rel=1e-7 if offset else 1e-10)
            assert (result.n_real, result.n_fake, result.n_features) == (2_500, 3_000, 6)

    def test_memory_does_not_grow_with_the_images(self):
        def peak(parts):
            held = FeatureMoments()
            tracemalloc.start()
            for part in range(parts):
                held.update(
                    features(np.random.default_rng(part).standard_normal((1_000, 64)))
                )  # numpy's, which is seen
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return peak

        peak(1)  # what is imported meanwhile
        few, many = peak(2), peak(16)
        assert many < few + 1_000 * 64 * 8 / 4  # not a quarter of one part more; all others would be fourteen

    def test_refuses(self):
        one, two = features(normal(1, 4)), features(normal(2, 4))
        refuses(lambda: FeatureMoments().update(two).update(Features(normal(2, 4), "other")), "'test'", "'other'")
        refuses(
            lambda: frechet_distance(FeatureMoments().update(two), features(normal(2, 3))), "one extractor", "4", "3"
        )
        refuses(lambda: frechet_distance(two, FeatureMoments().update(one)), "at least 2", "got 2 and 1")
        refuses(lambda: frechet_distance(one, two), "at least 2", "got 1 and 2")
        refuses(lambda: frechet_distance(two, Features(normal(2, 4), "other")), "'test'", "'other'")
        refuses(lambda: frechet_distance(two, features(normal(2, 3))), "one extractor", "4", "3")
        refuses(lambda: features([[1.0, math.nan]]), "'test'", "finite")
        refuses(lambda: features(normal(4)), "[n, d]", "[4]")
        refuses(lambda: features(normal(0, 4)), "[0, 4]")


class TestKernelDistance:
    def test_is_brute_force(self):
        """With subsets of everything: the unbiased estimator, pair by pair."""
        real, fake = normal(12, 3).numpy(), normal(12, 3, seed=1).numpy() + 1

        def kernel(x, y):
            return (x @ y / 3 + 1) ** 3

        def within(points):
            return np.mean([kernel(x, y) for i, x in enumerate(points) for j, y in enumerate(points) if i != j])

        across = np.mean([kernel(x, y) for x in real for y in fake])
        result = kernel_distance(features(real), features(fake), subsets=2, subset_size=12)
        assert result.distance == pytest.approx(within(real) + within(fake) - 2 * across)
        assert result.std == pytest.approx(0, abs=1e-12)
        assert (result.extractor, result.n_real, result.n_fake, result.subset_size) == ("test", 12, 12, 12)

    def test_only_the_seed_matters(self):
        real, fake = features(normal(30, 4)), features(normal(40, 4, seed=1))
        state = torch.random.get_rng_state()
        first = kernel_distance(real, fake, subsets=5, subset_size=10, seed=1)
        assert torch.equal(torch.random.get_rng_state(), state)
        torch.rand(3)
        assert kernel_distance(real, fake, subsets=5, subset_size=10, seed=1) == first
        assert kernel_distance(real, fake, subsets=5, subset_size=10, seed=2).distance != first.distance

    @pytest.mark.filterwarnings("error")
    def test_refuses_quietly(self):
        some = features(normal(20, 4))
        refuses(lambda: kernel_distance(some, some), "at least 1000", "got 20 and 20", "smaller `subset_size`")
        refuses(lambda: kernel_distance(some, some, subset_size=1), "subset_size", "100 and 1")
        refuses(lambda: kernel_distance(some, some, subsets=0), "subsets", "0 and 1000")
        kernel_distance(some, some, subset_size=20)


class TestDensityCoverage:
    @pytest.mark.parametrize(
        ("on_grid", "k", "chunk"), [(False, 1, 7), (False, 4, 1024), (True, 1, 1024), (True, 4, 7)]
    )
    def test_is_a_double_loop(self, on_grid, k, chunk, monkeypatch):
        monkeypatch.setattr(generation, "CHUNK", chunk)
        real, fake = normal(30, 2).numpy(), normal(25, 2, seed=1).numpy() * 1.5 + 0.3
        if on_grid:
            real, fake = (3 * real).round(), (3 * fake).round()

        def squared(x, y):  # whole numbers on the grid: ties are ties
            return sum((a - b) ** 2 for a, b in zip(x, y, strict=True))

        def radii(points):
            return [sorted(squared(x, y) for j, y in enumerate(points) if j != i)[k - 1] for i, x in enumerate(points)]

        inside_real = np.array([[squared(x, y) < r for y in fake] for x, r in zip(real, radii(real), strict=True)])
        inside_fake = np.array([[squared(x, y) < r for y, r in zip(fake, radii(fake), strict=True)] for x in real])
        result = density_coverage(features(real), features(fake), k=k)
        assert result.density == pytest.approx(inside_real.sum() / (k * 25))
        assert result.coverage == pytest.approx(inside_real.any(1).mean())
        assert result.precision == pytest.approx(inside_real.any(0).mean())
        assert result.recall == pytest.approx(inside_fake.any(1).mean())
        assert (result.n_real, result.n_fake, result.k, result.extractor) == (30, 25, k, "test")

    def test_equal_and_far_away_sets(self):
        real = normal(40, 6) + 1000
        same = density_coverage(features(real), features(real))
        assert (same.density, same.coverage, same.precision, same.recall) == (1, 1, 1, 1)
        far = density_coverage(features(real), features(real + 100))
        assert (far.density, far.coverage, far.precision, far.recall) == (0, 0, 0, 0)

    def test_blind_to_order_and_place(self):
        real, fake = normal(30, 4), normal(40, 4, seed=1)
        expected = density_coverage(features(real), features(fake))
        assert density_coverage(features(real.flip(0)), features(fake.flip(0))) == expected
        assert density_coverage(features(real + 1e8), features(fake + 1e8)) == expected

    def test_refuses_few(self):
        few = features(normal(5, 3))
        refuses(lambda: density_coverage(few, few), "at least 6", "got 5 and 5", "smaller `k`")
        refuses(lambda: density_coverage(few, few, k=0), "k:", "got 0")


class Mean(nn.Module):
    """Mean colour, through dropout."""

    name = "mean"

    def __init__(self):
        super().__init__()
        self.dropout, self.norm = nn.Dropout(), nn.BatchNorm2d(1).requires_grad_(False)

    def forward(self, images):
        return self.norm(self.dropout(images)).mean((2, 3))


IMAGES = torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


class TestFeatures:
    def test_any_callable_will_do(self):
        actual = features_of(IMAGES, lambda images: images.flatten(1), name="pixels")
        assert torch.equal(actual.values, IMAGES.flatten(1).double())
        assert (actual.extractor, len(actual)) == ("pixels", 7)

    def test_a_module_runs_in_eval_mode_and_keeps_its_modes(self):
        extractor = Mean()
        extractor.norm.eval()
        actual = features_of(IMAGES, extractor, batch_size=3)
        assert torch.allclose(actual.values, IMAGES.mean((2, 3)).double(), atol=1e-4)
        assert actual.extractor == "mean"
        assert (extractor.training, extractor.dropout.training, extractor.norm.training) == (True, True, False)

    def test_refuses(self):
        refuses(lambda: features_of(IMAGES, lambda images: images), "name", "pass one")
        refuses(lambda: features_of((IMAGES * 100).byte(), Mean()), "images", "torch.uint8")
        refuses(lambda: features_of(IMAGES[0], Mean()), "images", "[1, 8, 8]")
        refuses(lambda: features_of(IMAGES[:0], Mean()), "images", "[0, 1, 8, 8]")
        refuses(lambda: features_of(IMAGES + math.nan, Mean()), "images", "finite")
        refuses(lambda: features_of(IMAGES * 255, Mean()), "images", "[−1, 1]")
        refuses(lambda: features_of(IMAGES, Mean(), value_range=(0, 1)), "images", "[0, 1]")
        refuses(lambda: features_of(IMAGES, Mean(), value_range=(0, 255)), "value_range", "(0, 255)")
        refuses(lambda: features_of(IMAGES, lambda images: images.flatten(1) / 0, name="odd"), "'odd'", "finite")
        refuses(lambda: features_of(IMAGES, lambda images: images, name="odd"), "'odd'", "[7, 1, 8, 8]")

    def test_of_one_range(self):
        """Images of one law in [−1, 1] and in [0, 1] are no two laws: they are told apart, or brought together."""
        refuses(lambda: features_of((IMAGES + 1) / 2, Mean()), "images", "[0, 1]", "value_range=")
        scaled, own = (
            features_of(images, lambda images: images.flatten(1), name="pixels", value_range=value_range).values
            for images, value_range in (((IMAGES + 1) / 2, (0, 1)), (IMAGES, None))
        )
        assert torch.allclose(scaled, own, atol=1e-6)
        bright = features_of(IMAGES.abs(), Mean(), value_range=(-1, 1)).values
        assert torch.allclose(bright, IMAGES.abs().mean((2, 3)).double(), atol=1e-4)

    def test_inception_asks_for_what_is_missing(self):
        if importlib.util.find_spec("torch_fidelity"):
            pytest.skip("torch-fidelity is installed")
        refuses(inception_features, "pip install torch-fidelity", "ClassifierFeatures")

    def test_inception_gets_bytes_of_three_channels(self, monkeypatch):
        import torchmetrics.image.fid

        class Stub(nn.Module):
            def __init__(self, feature):
                super().__init__()
                self.inception = nn.Flatten()

        monkeypatch.setattr(torchmetrics.image.fid, "FrechetInceptionDistance", Stub)
        ends = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 1, 1, 3)
        actual = features_of(ends, inception_features())
        assert actual.values.tolist() == [[0, 128, 255] * 3]
        assert actual.extractor == "inception-v3-compat"


class TestClassifierFeatures:
    @pytest.mark.parametrize(("name", "width", "edge"), [("tiny_resnet", 16, 24), ("tiny_vit", 16, 16)])
    def test_are_what_the_head_sees(self, name, width, edge, request):
        model = request.getfixturevalue(name)
        extractor = ClassifierFeatures(model.train())
        images = torch.cat([IMAGES.repeat(1, 1, 3, 3), -IMAGES.repeat(1, 1, 3, 3)])
        actual = features_of(images, extractor)
        pixels = nn.functional.interpolate(images, (edge, edge), mode="bilinear", antialias=True)
        assert model.training
        with torch.no_grad():
            logits = model.eval()(pixel_values=pixels).logits
            assert torch.allclose(model.classifier(actual.values.float()), logits, atol=1e-5)
        assert actual.values.shape == (14, width)
        chosen = logits.gather(1, ClassifierFeatures(model.train()).classify(images, batch_size=2).unsqueeze(1))
        assert (
            logits.amax(1, keepdim=True) - chosen
        ).max() < 1e-5  # the largest, or as large in another batch's rounding
        assert not model.classifier._forward_pre_hooks

    def test_do_not_depend_on_the_batch(self, tiny_resnet):
        extractor = ClassifierFeatures(tiny_resnet)
        whole = features_of(IMAGES, extractor).values
        assert torch.allclose(features_of(IMAGES, extractor, batch_size=2).values, whole, atol=1e-5)
        assert torch.allclose(features_of(IMAGES.flip(0), extractor, batch_size=3).values.flip(0), whole, atol=1e-5)

    def test_follow_a_processor_and_repeat_the_channel(self, tiny_vit):
        from transformers import ViTConfig, ViTImageProcessorPil

        config = ViTConfig(**{**tiny_vit.config.to_dict(), "num_channels": 3})
        model = type(tiny_vit)(config).eval()
        mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
        processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=mean, image_std=std)
        pixels = ClassifierFeatures(model, processor)._prepared(IMAGES)
        assert pixels.shape == (7, 3, 16, 16)
        corner = ((IMAGES[0, 0, 0, 0] + 1) / 2 - torch.tensor(mean)) / torch.tensor(std)
        assert torch.allclose(pixels[0, :, 0, 0], corner, atol=1e-5)
        square = ViTImageProcessorPil(size={"shortest_edge": 24}, do_normalize=False)
        pixels = ClassifierFeatures(model, square)._prepared(IMAGES)
        assert pixels.shape == (7, 3, 24, 24)
        assert pixels.min() >= 0
        assert features_of(IMAGES, ClassifierFeatures(model)).values.shape == (7, 16)

    def test_name(self, tiny_resnet):
        assert ClassifierFeatures(tiny_resnet).name == "ResNetForImageClassification"
        tiny_resnet.config.name_or_path = "me/digits"
        assert ClassifierFeatures(tiny_resnet).name == "me/digits"
        assert features_of(IMAGES, ClassifierFeatures(tiny_resnet, name="judge")).extractor == "judge"

    def test_refuses(self, tiny_resnet):
        extractor = ClassifierFeatures(tiny_resnet)
        refuses(lambda: ClassifierFeatures(tiny_resnet, head="fc"), "no submodule 'fc'")
        refuses(lambda: features_of(IMAGES.expand(-1, 3, -1, -1), extractor), "1 channels", "got 3")
        refuses(lambda: extractor.classify(IMAGES * 2), "[−1, 1]")
