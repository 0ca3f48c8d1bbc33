from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from hf_unlearn.influence.in_run import layers
from hf_unlearn.influence.in_run.ghost import GhostRecorder


def randomized(module, seed=0):
    """In fp64, with no parameter or statistic left at a special value."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
    return module


def inputs(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def losses(module, x):
    """A nonlinear function of each example's outputs, with every output in it."""
    output = module(x)
    weights = inputs(*output.shape[1:], seed=2)
    return (output * weights).tanh().flatten(1).sum(1)


def check(module, x, targets=2, rtol=1e-9, atol=1e-11, **options):
    parameters = dict(module.named_parameters())
    gradients = {
        name: torch.stack([torch.autograd.grad(losses(module, x[i : i + 1]).sum(), p)[0] for i in range(len(x))])
        for name, p in parameters.items()
    }
    goals = {name: inputs(targets, *p.shape, seed=3) for name, p in parameters.items()}
    expected = torch.cat([gradients[name].flatten(1) for name in parameters], 1)
    wanted = torch.cat([goals[name].flatten(1) for name in parameters], 1)
    always = {"FORMING_POSITIONS": -(10**6)} if options.get("form_gradients") else {}
    with (
        mock.patch.multiple(layers, **always) if always else nullcontext(),
        GhostRecorder(module, **options) as recorder,
    ):
        assert set(recorder.covered) == set(parameters)
        recorder.set_targets(goals)
        for asked in ("targets", "gram"):
            recorder.start(len(x), **{asked: True})
            losses(module, x).sum().backward()
            seen, right = (
                (recorder.dots, expected @ wanted.T) if asked == "targets" else (recorder.gram, expected @ expected.T)
            )
            torch.testing.assert_close(seen, right, rtol=rtol, atol=atol)


# Few positions and large matrices, or the reverse: the Gram matrix goes token by token, or by forming the gradients.
LINEAR = [  # every two of layer, positions, widths in and out, and how dots are asked for
    ("Linear", (), (3, 5), False), ("Conv1D", (), (6, 2), False), ("Linear", (), (25, 20), True),
    ("Conv1D", (1,), (3, 5), True), ("Linear", (1,), (6, 2), False), ("Conv1D", (1,), (25, 20), False),
    ("Linear", (2,), (3, 5), True), ("Conv1D", (2,), (6, 2), True), ("Linear", (2,), (25, 20), False),
    ("Conv1D", (30,), (3, 5), False), ("Linear", (30,), (6, 2), True), ("Conv1D", (30,), (25, 20), True),
    ("Linear", (2, 3), (3, 5), False), ("Conv1D", (2, 3), (6, 2), False), ("Linear", (2, 3), (25, 20), True),
]  # fmt: skip


@pytest.mark.parametrize("chunk", [layers.CHUNK_ELEMENTS, 7], ids=["at_once", "in_chunks"])
class TestMatrices:
    def test_linear(self, chunk, monkeypatch):
        monkeypatch.setattr(layers, "CHUNK_ELEMENTS", chunk)
        for kind, shape, (width_in, width_out), form_gradients in LINEAR:
            layer = nn.Linear(width_in, width_out) if kind == "Linear" else Conv1D(width_out, width_in)
            check(randomized(layer), inputs(3, *shape, width_in), form_gradients=form_gradients)

    @pytest.mark.parametrize("form_gradients", [False, True])
    @pytest.mark.parametrize("groups", [1, 2, 4])
    def test_convolution(self, groups, form_gradients, chunk, monkeypatch):
        monkeypatch.setattr(layers, "CHUNK_ELEMENTS", chunk)
        layer = randomized(nn.Conv2d(4, 8, 3, groups=groups, padding=1))
        check(layer, inputs(3, 4, 5, 4), form_gradients=form_gradients)
        check(layer, inputs(3, 4, 1, 1), form_gradients=form_gradients)

    def test_embedding(self, chunk, monkeypatch):
        monkeypatch.setattr(layers, "CHUNK_ELEMENTS", chunk)
        for length, padding in ((1, None), (1, 1), (4, None), (4, 1)):
            ids = torch.randint(0, 5, (3, length), generator=torch.Generator().manual_seed(0))
            ids[0] = 2  # one row, read at every position
            ids[1, 0] = 1
            check(randomized(nn.Embedding(6, 3, padding_idx=padding)), ids)


class TestLowRank:
    def test_of_enough_rank_it_is_exact(self):
        for gradients, rank in (
            *((inputs(*shape), min(shape[1:])) for shape in ((3, 9, 6), (1, 6, 9), (2, 4, 1))),
            (inputs(2, 9, 6), 100),
            (inputs(2, 40, 2) @ inputs(2, 2, 60, seed=2), 2),
        ):
            u, v = layers.low_rank(gradients, rank)
            assert u.shape == (*gradients.shape[:2], min(rank, *gradients.shape[1:]))
            torch.testing.assert_close(u @ v.mT, gradients)

    def test_it_is_the_best_approximation(self):
        left, singular, right = torch.linalg.svd(inputs(1, 60, 50), full_matrices=False)
        decaying = left * 0.6 ** torch.arange(50) @ right  # as gradients have it
        u, v = layers.low_rank(decaying, 4)
        assert (decaying - u @ v.mT).norm() <= 1.001 * (0.6 ** torch.arange(4, 50).double()).norm()

    def test_dtype_and_random_state(self):
        state = torch.get_rng_state()
        gradients = inputs(1, 30, 20).bfloat16()
        first, second = layers.low_rank(gradients, 3), layers.low_rank(gradients, 3)
        assert torch.equal(torch.get_rng_state(), state)
        assert first[0].dtype == torch.bfloat16
        torch.testing.assert_close(first, second)  # the same draws: no further apart than rounding
        assert not any(factor.isnan().any() for factor in layers.low_rank(torch.zeros(1, 5, 4), 2))

    @pytest.mark.parametrize(("kind", "shape"), [("Linear", ()), ("Conv1D", (7,)), ("Linear", (2, 3))])
    def test_dots(self, kind, shape):
        layer = randomized(nn.Linear(6, 9) if kind == "Linear" else Conv1D(9, 6))
        x, (rows, columns) = inputs(3, *shape, 6), layer.weight.shape
        u, v = inputs(2, rows, 4), inputs(2, columns, 4, seed=2)
        bias = inputs(2, 9)
        seen = []
        for target in (u @ v.mT, (u, v)):
            with GhostRecorder(layer) as recorder:
                assert recorder.matrices == {"weight"}
                recorder.set_targets({"weight": target, "bias": bias})
                recorder.start(3, targets=True)
                losses(layer, x).sum().backward()
                seen.append(recorder.dots)
        torch.testing.assert_close(*seen)


class TestMaskedTokens:
    """Tokens without a gradient are left out of the products, and change nothing."""

    @pytest.mark.parametrize(
        ("count", "widths", "masked"),
        [(1, (70, 80), 0.0), (3, (80, 70), 0.0), (1, (80, 70), 0.5), (3, (70, 80), 0.5), (1, (70, 80), 1.0), (3, (80, 70), 1.0)],
    )  # fmt: skip
    def test_dots(self, count, widths, masked, monkeypatch):
        layer, x = randomized(nn.Linear(*widths)), inputs(4, 6, widths[0])
        y = inputs(4, 6, widths[1], seed=2)
        y[torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) < masked] = 0
        sizes, original = [], layers.MatrixGradients._tokens_that_count
        watch = lambda self, count: sizes.append(original(self, count)) or sizes[-1]  # noqa: E731
        monkeypatch.setattr(layers.MatrixGradients, "_tokens_that_count", watch)
        target = inputs(count, *layer.weight.shape, seed=3)
        with GhostRecorder(layer, layers=[""]) as recorder:
            recorder.set_targets({"weight": target, "bias": torch.zeros(count, widths[1])})
            recorder.start(4, targets=True)
            layer(x).backward(y)
        torch.testing.assert_close(recorder.dots, torch.einsum("bto,bti,coi->bc", y, x, target))
        assert len(sizes[0][0]) == (y != 0).any(-1).sum()

    def test_what_is_not_finite_is_not_hidden(self):
        layer, y = nn.Linear(64, 64), torch.zeros(2, 3, 64)
        y[0, 0, 0] = torch.nan
        with GhostRecorder(layer) as recorder:
            recorder.set_targets({"weight": torch.ones(1, 64, 64), "bias": torch.zeros(1, 64)})
            recorder.start(2, targets=True)
            layer(torch.ones(2, 3, 64)).backward(y)
        assert recorder.dots.isnan().squeeze().tolist() == [True, False]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
class TestConvolution:
    @settings(deadline=None, max_examples=40)
    @given(
        groups=st.sampled_from([1, 2, 4]),
        kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        stride=st.tuples(st.integers(1, 2), st.integers(1, 3)),
        dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
        padding=st.one_of(st.tuples(st.integers(0, 2), st.integers(0, 2)), st.sampled_from(["same", "valid"])),
        form_gradients=st.booleans(),
        bias=st.booleans(),
    )
    def test_all_its_options(self, groups, kernel, stride, dilation, padding, form_gradients, bias):
        stride = 1 if padding == "same" else stride
        layer = nn.Conv2d(4, 4, kernel, stride, padding, dilation, groups, bias)
        check(randomized(layer), inputs(2, 4, 6, 5), form_gradients=form_gradients)

    def test_uneven_same_padding(self):
        check(randomized(nn.Conv2d(2, 3, (2, 4), padding="same")), inputs(2, 2, 5, 6))

    def test_several_images_per_example(self):
        class Frames(nn.Module):
            def __init__(self):
                super().__init__()
                self.convolution, self.norm = nn.Conv2d(2, 4, 3, groups=2), nn.GroupNorm(2, 4)

            def forward(self, x):
                hidden = self.norm(self.convolution(x.flatten(0, 1)))
                return hidden.unflatten(0, x.shape[:2])

        check(randomized(Frames()), inputs(3, 2, 2, 5, 5))


class TestNorms:
    @pytest.mark.parametrize(
        ("layer", "shape"),
        [
            (nn.LayerNorm(6), (3, 4, 6)), (nn.LayerNorm(6, bias=False, eps=0.1), (3, 4, 6)), (nn.LayerNorm((4, 6)), (3, 4, 6)),
            (nn.RMSNorm(6), (3, 4, 6)), (nn.RMSNorm((4, 6), eps=0.1), (3, 4, 6)), (LlamaRMSNorm(6, eps=0.1), (3, 4, 6)),
            (T5LayerNorm(6), (3, 4, 6)), (GemmaRMSNorm(6), (3, 4, 6)),
            (nn.GroupNorm(3, 6, eps=0.1), (3, 6)), (nn.GroupNorm(3, 6, eps=0.1), (3, 6, 2, 3)),
            # in eval mode: with their running statistics
            (nn.BatchNorm1d(6), (3, 6)), (nn.BatchNorm1d(6), (3, 6, 2)), (nn.BatchNorm2d(6, eps=0.1), (3, 6, 2, 2)),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
    )  # fmt: skip
    def test_scales_and_biases(self, layer, shape):
        # transformers' own normalise in fp32, whatever the input is: 2⁻²⁴ of numbers of up to 30
        rounded = type(layer).__module__.startswith("transformers")
        check(randomized(layer).eval(), inputs(*shape), **({"rtol": 1e-5, "atol": 1e-5} if rounded else {}))

    def test_batch_norm_with_the_batchs_statistics(self):
        layer, x = randomized(nn.BatchNorm2d(3, eps=0.1, track_running_stats=False)).eval(), inputs(4, 3, 2, 2)
        y = inputs(4, 3, 2, 2, seed=2)
        with GhostRecorder(layer) as recorder:
            assert recorder.mixes_examples == [""]
            recorder.set_targets({"weight": torch.eye(3).double(), "bias": torch.zeros(3, 3)})
            recorder.start(4, targets=True)
            layer(x).backward(y)
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        torch.testing.assert_close(recorder.dots, (y * (x - mean) / (variance + 0.1).sqrt()).sum((2, 3)))


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Named(nn.Linear):
    pass


class CubicRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return self.weight**3 * super().forward(x)


class Rotated(nn.Module):
    """Two outputs and a parameter of its own name, and an input that examples share."""

    def __init__(self):
        super().__init__()
        self.turn = nn.Parameter(torch.zeros(4, 4))

    def forward(self, x, *, table=None):
        return x @ self.turn, (x @ self.turn.T).sum(1)


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = Rotated()

    def forward(self, x):
        first, second = self.part(x, table=x[:1])
        return first * second.unsqueeze(1)


class TestOfAnyKind:
    """Layers without a rule run again, example by example."""

    @pytest.mark.parametrize(
        ("layer", "shape", "rounded"),
        [
            (Scaled(4, 2), (3, 5, 4), False),
            (CubicRMSNorm(6), (3, 4, 6), True),
            (nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), (3, 1, 4, 5), False),
            (nn.Conv1d(4, 2, 3, stride=2, groups=2), (3, 4, 9), False),
            (nn.Conv3d(1, 2, 2), (3, 1, 3, 2, 4), False),
            (nn.ConvTranspose2d(2, 3, 2), (3, 2, 3, 3), False),
            (Both(), (3, 5, 4), False),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
    )
    def test_equals_a_loop(self, layer, shape, rounded):
        check(randomized(layer), inputs(*shape), **({"rtol": 1e-5, "atol": 1e-5} if rounded else {}))

    def test_scaled_embeddings_are_lookups(self):
        ids = torch.tensor([[1, 2, 2], [0, 4, 1]])
        for layer in (Gemma3TextScaledWordEmbedding(5, 4, 0, embed_scale=3.3), BartScaledWordEmbedding(5, 4, 1, 0.5)):
            assert layers.rule_for(layer).func is layers.embedding
            check(randomized(layer), ids)


class TestUnsupported:
    @pytest.mark.parametrize(
        ("layer", "why"),
        [
            (nn.Embedding(3, 2, max_norm=1.0), "Embedding' with max_norm or scale_grad_by_freq"),
            (nn.Embedding(3, 2, scale_grad_by_freq=True), "Embedding' with max_norm or scale_grad_by_freq"),
            (nn.SyncBatchNorm(2, affine=True), "SyncBatchNorm'"),
            (nn.ParameterList([torch.zeros(2)]), "Sequential'"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_layers_that_do_something_else(self, layer, why):
        recorder = GhostRecorder(nn.Sequential(randomized(layer), Named(2, 2, bias=False)))
        assert set(recorder.uncovered.values()) == {f"unsupported layer type '{why}"}
        assert set(recorder.covered) == {"1.weight"}

    def test_attention_that_uses_its_linear_layers_weight_itself(self):
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "head": nn.Linear(2, 2)})
        uncovered = GhostRecorder(model).uncovered
        assert "nn.MultiheadAttention" in uncovered["attention.out_proj.weight"]
        assert uncovered["attention.in_proj_weight"] == "unsupported layer type 'MultiheadAttention'"


class TestCost:
    @pytest.fixture
    def formed(self, monkeypatch):
        calls, original = [], layers.MatrixGradients._formed
        monkeypatch.setattr(layers.MatrixGradients, "_formed", lambda self: calls.append(1) or original(self))
        return calls

    @pytest.mark.parametrize("allowed", [False, True])
    def test_dots_form_no_gradients_unless_allowed(self, allowed, formed):
        for layer, shape in ((nn.Linear(4, 3), (2, 50, 4)), (nn.Conv2d(2, 3, 3), (2, 2, 9, 9))):
            with GhostRecorder(layer, form_gradients=allowed) as recorder:
                recorder.set_targets({name: torch.zeros(4, *p.shape) for name, p in layer.named_parameters()})
                recorder.start(shape[0], targets=True)
                layer(torch.zeros(shape)).sum().backward()
        assert len(formed) == 2 * allowed

    def test_gradients_are_formed_where_that_is_cheaper(self, formed):
        for positions, count, forms in (
            (1, 1000, False), (64, 1, False), (10**5, 1, False), (64, 2, True), (40, 3, True), (10, 5, False),
        ):  # fmt: skip
            assert layers.forming_is_cheaper(positions, count) == forms
        layer = nn.Linear(32, 32)
        for positions, asked in ((2, "gram"), (200, "gram")):
            formed.clear()
            with GhostRecorder(layer) as recorder:
                recorder.start(2, **{asked: True})
                layer(torch.randn(2, positions, 32)).sum().backward()
            assert bool(formed) == (positions == 200)

    def test_sizes_of_intermediates(self):
        largest = []

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                largest.append(result.numel() if isinstance(result, torch.Tensor) else 0)
                return result

        batch, positions, wide, narrow = 4, 3, 512, 8
        for r, c in ((wide, narrow), (narrow, wide)):
            gradients = layers.MatrixGradients(
                torch.randn(batch, 1, positions, r), torch.randn(batch, 1, positions, c)
            )
            goals = torch.randn(2, r, c)
            with Watch():
                gradients.dots(goals, False)
            # G and the layer's rows and columns, viewed; a product is as its narrower side; all h_i would be batch · r · c
            assert max(largest) <= goals.numel() < batch * r * c
            assert largest.count(batch * positions * narrow) >= 2 * len(goals)
            largest.clear()

        gradients = layers.MatrixGradients(torch.randn(4, 1, 2, 256), torch.randn(4, 1, 2, 256))
        with Watch():
            gradients.gram()
        assert max(largest) == 4 * 2 * 256  # x and y themselves
