"""Every Fisher information against its definition, one derivative at a time; what is drawn, with every draw enumerated."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard
from torch import nn

from hf_unlearn.gan.dcgan import DCGANDiscriminator, DCGANGenerator
from hf_unlearn.parameters import fisher as fisher_module
from hf_unlearn.parameters.fisher import diagonal_fisher, gaussian_fisher, scalar_fisher, scaled_to_mean_one
from hf_unlearn.parameters.reference import trainable_parameters


pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # attention inside vmap


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def classify(forward, batch):
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    return forward(**inputs).logits, batch["labels"]


def next_token(forward, batch):
    logits, labels = classify(forward, batch)
    return logits[:, :-1], labels[:, 1:]


def regression(forward, batch):
    return forward(batch["x"]), torch.zeros(len(batch["x"]), dtype=torch.long)


def definition(model, examples, scalars):
    """Mean over examples of Σ w (∂ s)² over `(w, s)` in `scalars(example)`, in eval mode."""
    model.eval()
    parameters = trainable_parameters(model)
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for weight, scalar in itertools.chain.from_iterable(map(scalars, examples)):
        gradients = torch.autograd.grad(
            scalar, list(parameters.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for name, gradient in zip(parameters, gradients, strict=True):
            total[name] += weight * gradient.square()
    return {name: value / len(examples) for name, value in total.items()}


def of_classes(model, batch, predictions):
    def scalars(row):
        logits, targets = predictions(model, {k: v[row : row + 1] for k, v in batch.items()})
        for log_p in logits.flatten(0, -2)[targets.flatten() != -100].log_softmax(-1):
            yield from ((value.exp().detach(), value) for value in log_p)

    return definition(model, range(len(next(iter(batch.values())))), scalars)


def of_pixels(model, batch, answer):
    return definition(model, batch.split(1), lambda example: [(1, pixel) for pixel in answer(example).flatten()])


def of_scores(model, inputs, score):
    return definition(model, inputs.split(1), lambda z: [(1, score(model(z)).squeeze())])


def assert_close(actual, expected, rtol=1e-3):
    """Sums of some hundred squares in fp32, where squares of gradients that cancel have lost digits twice over."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == torch.float32
        torch.testing.assert_close(actual[name], value, rtol=rtol, atol=1e-5 * float(value.max()) + 1e-10, msg=name)


def stirred(model):
    """BatchNorm statistics that differ from those of any batch."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=seeded(1))
            module.running_var.uniform_(0.5, 2, generator=seeded(2))
    return model


def image_batch(n=4):
    return {"pixel_values": torch.randn(n, 1, 16, 16, generator=seeded(0)), "labels": torch.zeros(n, dtype=torch.long)}


def text_batch(side, n=3):
    ids = torch.randint(3, 300, (n, 6), generator=seeded(0))
    mask = torch.ones_like(ids)
    mask[1, slice(2) if side == "left" else slice(4, None)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def random_softmax_regression(features, n):
    model, x = nn.Linear(features, 4), 2 * torch.randn(n, features, generator=seeded(0))
    with torch.no_grad():
        model.weight.normal_(generator=seeded(1))
        return model, x, model(x).softmax(-1)


class TestExact:
    @pytest.mark.parametrize("fixture", ["tiny_resnet", "tiny_vit"])
    def test_image_classifiers_against_the_definition(self, fixture, request):
        model = stirred(request.getfixturevalue(fixture))
        expected = of_classes(model, image_batch(), classify)
        model.train()
        assert_close(diagonal_fisher(model, [image_batch()], classify), expected)
        other = image_batch() | {"labels": torch.tensor([3, 1, 4, 1])}  # labels are not used
        assert_close(diagonal_fisher(model, [other], classify), expected)

    def test_softmax_regression_has_a_closed_form(self):
        """F of weight [c, d] is the mean of p_c (1 − p_c) x_d², of bias [c] that of p_c (1 − p_c)."""
        model, x, p = random_softmax_regression(5, 7)
        spread = p * (1 - p)
        expected = {"weight": spread.T @ x.square() / 7, "bias": spread.mean(0)}
        assert_close(diagonal_fisher(model, [{"x": x}], regression), expected, rtol=1e-5)
        ignored = torch.tensor([0, -100, 2, 0, 1, -100, 3])  # such examples count with 0, and in the mean
        actual = diagonal_fisher(model, [{"x": x, "y": ignored}], lambda forward, b: (forward(b["x"]), b["y"]))
        torch.testing.assert_close(actual["bias"], spread[ignored != -100].sum(0) / 7)

    def test_batches_and_chunks_do_not_matter(self, tiny_resnet, monkeypatch):
        batch = image_batch(6)
        whole = diagonal_fisher(tiny_resnet, [batch], classify)
        uneven = [{k: v[a:b] for k, v in batch.items()} for a, b in ((0, 1), (1, 5), (5, 6))]
        assert_close(diagonal_fisher(tiny_resnet, uneven, classify), whole)
        for classes in (0, 4):
            elements = 1 + classes * sum(p.numel() for p in tiny_resnet.parameters())
            monkeypatch.setattr(fisher_module, "CHUNK_ELEMENTS", elements)
            assert_close(diagonal_fisher(tiny_resnet, [batch], classify), whole)

    def test_refuses_what_it_cannot_do(self, tiny_resnet, tiny_gpt2):
        batch = {"input_ids": torch.arange(8).view(2, 4), "labels": torch.zeros(2, 4, dtype=torch.long)}
        frozen = copy.deepcopy(tiny_resnet).requires_grad_(False)
        for arguments, method, message in (
            ((tiny_resnet, [], classify), "exact", "batches"),
            ((tiny_gpt2, [batch], next_token), "exact", "monte_carlo"),
            ((frozen, [image_batch()], classify), "exact", "trainable"),
            ((tiny_resnet, [image_batch()], classify), "montecarlo", "method="),
        ):
            with pytest.raises(ValueError, match=message):
                diagonal_fisher(*arguments, method=method)


@pytest.fixture
def draw(monkeypatch):
    """Calls `torch.multinomial` with answers of the test's choice: `draw(labels)`, one label for each prediction."""

    def choose(labels):
        def multinomial(p, samples, replacement, generator):
            assert replacement
            torch.testing.assert_close(p.sum(-1), torch.ones(len(p)))
            return torch.as_tensor(labels).expand(len(p))[:, None].expand(len(p), samples)

        monkeypatch.setattr(torch, "multinomial", multinomial)

    return choose


class TestMonteCarlo:
    def test_mean_and_variance_on_softmax_regression(self):
        """One draw for bias c is (1[y = c] − p_c)²: mean p(1 − p), fourth moment p(1 − p)⁴ + (1 − p)p⁴."""
        draws, n = 4000, 3
        model, x, p = random_softmax_regression(2, n)
        mean, x_squared = p * (1 - p), x.square()
        variance = p * (1 - p) ** 4 + (1 - p) * p**4 - mean**2
        options = {"method": "monte_carlo", "samples": draws, "generator": seeded(2)}
        actual = diagonal_fisher(model, [{"x": x}], regression, **options)
        bias_z = (actual["bias"] - mean.mean(0)) / (variance.sum(0) / n**2 / draws).sqrt()
        weight_z = (actual["weight"] - mean.T @ x_squared / n) / (
            variance.T @ x_squared.square() / n**2 / draws
        ).sqrt()
        assert bias_z.abs().max() < 4.5
        assert weight_z.abs().max() < 4.5

    def test_token_sequences_are_unbiased(self, tiny_llama, draw):
        """The mean over everything that can be drawn is the sum over all counted tokens and the whole vocabulary."""
        from transformers import LlamaForCausalLM

        tiny_llama.config.vocab_size = 3
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = LlamaForCausalLM(tiny_llama.config).eval()
        batch = {"input_ids": torch.tensor([[2, 0, 1, 1]]), "labels": torch.tensor([[2, -100, 1, 1]])}
        with torch.no_grad():
            p = model(input_ids=batch["input_ids"]).logits[0].softmax(-1)
        expected = of_classes(model, batch, next_token)
        mean = {name: torch.zeros_like(value) for name, value in expected.items()}
        for second, third in itertools.product(range(3), repeat=2):
            draw([0, second, third])  # the first of the three predictions does not count
            fisher = diagonal_fisher(model, [batch], next_token, method="monte_carlo", samples=2)
            for name, value in fisher.items():
                mean[name] += p[1, second] * p[2, third] * value
        assert_close(mean, expected)

    def test_same_generator_same_estimate_whatever_the_chunks(self, tiny_llama, monkeypatch):
        batch = text_batch("right")
        batch["labels"] = batch["input_ids"]
        options = {"method": "monte_carlo", "samples": 2}
        first = diagonal_fisher(tiny_llama, [batch], next_token, generator=seeded(3), **options)
        monkeypatch.setattr(fisher_module, "CHUNK_ELEMENTS", 1)
        assert_close(diagonal_fisher(tiny_llama, [batch], next_token, generator=seeded(3), **options), first)
        other = diagonal_fisher(tiny_llama, [batch], next_token, generator=seeded(4), **options)
        assert not torch.allclose(other["lm_head.weight"], first["lm_head.weight"], rtol=0.01)

    @pytest.mark.parametrize(
        ("fixture", "implementation", "side"),
        [
            ("tiny_llama", "eager", "right"),
            ("tiny_llama", "sdpa", "left"),
            ("tiny_gpt2", "eager", "left"),
            ("tiny_gpt2", "sdpa", "right"),
        ],
    )
    def test_padding_does_not_count(self, fixture, implementation, side, request, draw):
        """A padded sequence counts like the same sequence alone: the batch's Fisher is the mean of the parts'."""
        model = request.getfixturevalue(fixture)
        model.set_attn_implementation(implementation)
        padded = text_batch(side, n=2)
        mask = padded["attention_mask"].bool()
        short, long = padded["input_ids"][1][mask[1]], padded["input_ids"][0]
        padded["labels"] = padded["input_ids"].masked_fill(~mask, -100)
        padded["labels"][1, mask[1].int().argmax()] = -100  # nothing precedes it when it stands alone
        if fixture == "tiny_gpt2":
            padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        draw(7)
        together = diagonal_fisher(model, [padded], next_token, method="monte_carlo")
        alone = [
            {"input_ids": row[None], "attention_mask": torch.ones_like(row[None]), "labels": row[None]}
            for row in (long, short)
        ]
        assert_close(together, diagonal_fisher(model, alone, next_token, method="monte_carlo"))


class TestGaussian:
    batch = torch.randn(4, 3, generator=seeded(0))

    @pytest.fixture
    def model(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    @pytest.fixture
    def all_signs(self, monkeypatch):
        """Signs from a Hadamard matrix: any two answers agree in half of the rows, so nothing is left to chance."""

        def start(answers, shape):
            rows = itertools.cycle((torch.tensor(hadamard(answers)).float() + 1) / 2)
            monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: next(rows).view(shape))

        return start

    @pytest.mark.parametrize("size", [1, 2, 4])
    def test_mean_over_signs_is_the_definition_at_every_batch_size(self, model, size, all_signs):
        all_signs(2 * size, (size, 2))
        batches = [part for part in self.batch.split(size) for _ in range(2 * size)]
        actual = gaussian_fisher(model, batches, model, generator=seeded(0))
        assert_close(actual, of_pixels(model, self.batch, model), rtol=1e-5)

    def test_signs_are_drawn_for_each_pixel_by_the_generator_alone(self, model):
        first, second, other = (gaussian_fisher(model, [self.batch], model, generator=seeded(s)) for s in (1, 1, 2))
        assert_close(second, first)
        assert any((first[name] - other[name]).abs().max() > 0.01 * first[name].max() for name in first)
        # (Σ ξ)² of 8 signs is 8 on average, with a standard deviation of √(2 · 8 · 7) = 10.6: 0.47 for the mean of 500.
        weight = nn.ParameterDict({"w": nn.Parameter(torch.ones(()))})
        mean = gaussian_fisher(weight, range(500), lambda _: weight["w"].expand(1, 8), generator=seeded(0))["w"]
        assert mean.item() == pytest.approx(8, abs=5 * 0.47)


def contrast(images):
    """A score of an image: neither linear in it nor a sum over pixels."""
    return images.square().mean().sqrt() + 3 * images.mean()


class TestScalar:
    inputs = torch.randn(7, 1, 6, 6, generator=seeded(0))

    @pytest.fixture
    def model(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Tanh(), nn.Conv2d(3, 2, 3)]
            return stirred(nn.Sequential(*layers, nn.Softplus()))

    @pytest.mark.parametrize(("training", "batch_size"), [(False, 1), (True, 3), (True, 32)])
    def test_against_the_definition(self, model, training, batch_size):
        expected = of_scores(model, self.inputs, contrast)
        model.train(training)
        assert_close(scalar_fisher(model, self.inputs, contrast, batch_size=batch_size), expected, rtol=1e-4)

    def test_of_a_generator_by_what_its_discriminator_says(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            generator = DCGANGenerator(8, latent_dim=4, base_channels=4, norm="batch")
            discriminator = DCGANDiscriminator(8, base_channels=4)
        latents = torch.randn(5, 4, generator=seeded(1))

        def score(drawn):
            return discriminator(drawn.sample).logits

        actual = scalar_fisher(generator, latents, score, batch_size=2)
        # A discriminator is trained too: the graph of every example would stay in memory, and reach the penalty.
        assert not any(value.requires_grad for value in actual.values())
        assert_close(actual, of_scores(generator, latents, score), rtol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_linear_regression_has_a_closed_form_and_adds_up_in_fp32(self, dtype):
        """The score a·(w x + b) has the gradients a x and a."""
        model, x = nn.Linear(5, 1).to(dtype), torch.randn(300, 5, generator=seeded(0)).to(dtype)
        expected = {"weight": 16 * x.float().square().mean(0, keepdim=True), "bias": torch.tensor([16.0])}
        assert_close(scalar_fisher(model, x, lambda y: 4 * y), expected, rtol=1e-5)

    def test_is_a_mean_over_examples_with_chunks_bounded_by_memory(self, model, monkeypatch):
        whole = scalar_fisher(model, self.inputs, contrast)
        parts = [scalar_fisher(model, part, contrast) for part in (self.inputs[:3], self.inputs[3:])]
        assert_close({name: (3 * parts[0][name] + 4 * parts[1][name]) / 7 for name in whole}, whole, rtol=1e-5)
        size = sum(p.numel() for p in model.parameters())
        for elements in (1, 3 * size):
            monkeypatch.setattr(fisher_module, "CHUNK_ELEMENTS", elements)
            assert_close(scalar_fisher(model, self.inputs, contrast), whole, rtol=1e-5)

    def test_refuses_nothing_to_compute(self, model):
        frozen = copy.deepcopy(model).requires_grad_(False)
        for what, inputs in ((model, self.inputs[:0]), (frozen, self.inputs)):
            with pytest.raises(ValueError, match="^inputs, model: no examples or nothing trainable"):
                scalar_fisher(what, inputs, contrast)


WAYS = {
    "diagonal": lambda model, images, score: diagonal_fisher(
        model, [{"x": images}], lambda forward, batch: (score(forward(batch["x"])), torch.zeros(len(images)))
    ),
    "gaussian": lambda model, images, score: gaussian_fisher(
        model, [images], lambda batch: score(model(batch)), generator=seeded(0)
    ),
    "scalar": lambda model, images, score: scalar_fisher(model, images, lambda out: score(out).square().sum()),
}


class TestEveryWay:
    images = torch.randn(7, 1, 6, 6, generator=seeded(0))

    @pytest.fixture
    def model(self):
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 5))
        return stirred(model).train()

    @pytest.mark.parametrize("fails", [False, True])
    @pytest.mark.parametrize("way", WAYS)
    def test_model_is_left_as_it_was(self, model, way, fails):
        model[1].eval()  # flags differ between modules
        state, modes = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]
        random_state = torch.get_rng_state()
        if fails:
            with pytest.raises(ZeroDivisionError):
                WAYS[way](model, self.images, lambda out: 1 / 0)
        else:
            WAYS[way](model, self.images, lambda out: out)
        assert [m.training for m in model.modules()] == modes
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert torch.equal(torch.get_rng_state(), random_state)

    @pytest.mark.parametrize("way", WAYS)
    def test_parameters_that_are_frozen_or_not_used(self, model, way):
        expected = WAYS[way](model.eval(), self.images, lambda out: out)
        model[0].requires_grad_(False)
        model.register_parameter("spare", nn.Parameter(torch.ones(2)))
        fisher = WAYS[way](model, self.images, lambda out: out)
        assert torch.equal(fisher.pop("spare"), torch.zeros(2))
        assert_close(fisher, {name: value for name, value in expected.items() if not name.startswith("0.")}, rtol=1e-4)


DIAGONALS = st.lists(st.lists(st.floats(0, 100, width=32), min_size=1, max_size=5), min_size=1, max_size=4).filter(
    lambda rows: sum(map(sum, rows)) > 1e-3
)


class TestScaledToMeanOne:
    @given(rows=DIAGONALS, unit=st.floats(1e-3, 1e3))
    @settings(max_examples=50, deadline=None)
    def test_mean_over_all_elements_is_one_ratios_stay_and_there_is_no_unit(self, rows, unit):
        fisher = {f"tensor{index}": torch.tensor(row) for index, row in enumerate(rows)}
        scaled = scaled_to_mean_one(fisher)
        assert scaled.keys() == fisher.keys()
        flat, before = (torch.cat([one[name].double() for name in fisher]) for one in (scaled, fisher))
        assert flat.mean().item() == pytest.approx(1, rel=1e-5)
        torch.testing.assert_close(flat * before.sum(), before * flat.sum(), rtol=1e-4, atol=1e-8)
        other = scaled_to_mean_one({name: unit * value for name, value in fisher.items()})
        torch.testing.assert_close(other, scaled, rtol=1e-4, atol=1e-6)

    def test_is_the_same_to_the_bit_in_every_order(self):
        """A file gives the tensors in another order than the model."""
        sizes = [2.0**exponent for exponent in range(-12, 12)]
        fisher = {f"{n}": s * torch.rand(5, generator=seeded(n)) for n, s in enumerate(sizes)}
        turned = scaled_to_mean_one(dict(reversed(fisher.items())))
        assert all(torch.equal(turned[name], value) for name, value in scaled_to_mean_one(fisher).items())

    def test_counts_elements_and_not_tensors(self):
        fisher = {"large": torch.full((2, 3), 2.0), "small": torch.tensor(16.0)}
        scaled = scaled_to_mean_one(fisher)
        torch.testing.assert_close(scaled, {"large": torch.full((2, 3), 0.5), "small": torch.tensor(4.0)})
        assert fisher["small"] == 16
