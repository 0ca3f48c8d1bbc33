import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_unlearn.gan.dcgan import DCGANDiscriminator, DCGANGenerator
from hf_unlearn.parameters import fisher as fisher_module
from hf_unlearn.parameters.fisher import diagonal_fisher, gaussian_fisher, scalar_fisher, scaled_to_mean_one
from hf_unlearn.parameters.reference import trainable_parameters


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def classify(forward, batch):
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    return forward(**inputs).logits, batch["labels"]


def next_token(forward, batch):
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    return forward(**inputs).logits[:, :-1], batch["labels"][:, 1:]


def brute_force(model, batch, predictions):
    """The definition, one example, one prediction, one class at a time."""
    model.eval()
    parameters = trainable_parameters(model)
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    size = len(next(iter(batch.values())))
    for row in range(size):
        logits, targets = predictions(model, {k: v[row : row + 1] for k, v in batch.items()})
        counted = logits.flatten(0, -2)[targets.flatten() != -100]
        for log_p in counted.log_softmax(-1):
            for c in range(len(log_p)):
                gradients = torch.autograd.grad(log_p[c], list(parameters.values()), retain_graph=True)
                for name, gradient in zip(parameters, gradients, strict=True):
                    total[name] += log_p[c].exp().detach() * gradient.square()
    return {name: value / size for name, value in total.items()}


def assert_close(actual, expected, rtol=1e-3):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == torch.float32
        torch.testing.assert_close(actual[name], value, rtol=rtol, atol=1e-5 * float(value.max()) + 1e-10, msg=name)


def image_batch(n=4, seed=0):
    return {
        "pixel_values": torch.randn(n, 1, 16, 16, generator=seeded(seed)),
        "labels": torch.zeros(n, dtype=torch.long),
    }


class TestExact:
    @pytest.mark.parametrize("fixture", ["tiny_resnet", "tiny_vit"])
    def test_image_classifiers_against_the_definition(self, fixture, request):
        model = request.getfixturevalue(fixture)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # statistics that differ from those of any batch
                module.running_mean.normal_(generator=seeded(1))
                module.running_var.uniform_(0.5, 2, generator=seeded(2))
        expected = brute_force(model, image_batch(), classify)
        model.train()
        assert_close(diagonal_fisher(model, [image_batch()], classify), expected)

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    @pytest.mark.parametrize("side", [None, "right", "left"])
    def test_bert_with_padding_against_the_definition(self, tiny_bert, implementation, side):
        tiny_bert.set_attn_implementation(implementation)
        batch = text_batch(300, side) | {"labels": torch.zeros(3, dtype=torch.long)}
        assert_close(diagonal_fisher(tiny_bert, [batch], classify), brute_force(tiny_bert, batch, classify), rtol=5e-3)

    def test_softmax_regression_has_a_closed_form(self):
        """F of weight [c, d] is the mean of p_c (1 − p_c) x_d², of bias [c] that of p_c (1 − p_c)."""
        model, x = nn.Linear(5, 4), 2 * torch.randn(7, 5, generator=seeded(0))
        with torch.no_grad():
            model.weight.normal_(generator=seeded(1))
            p = model(x).softmax(-1)
        spread = p * (1 - p)
        expected = {"weight": spread.T @ x.square() / 7, "bias": spread.mean(0)}
        assert_close(diagonal_fisher(model, [{"x": x}], regression), expected, rtol=1e-5)

    def test_labels_are_not_used(self, tiny_vit):
        batch = image_batch()
        other = {**batch, "labels": torch.tensor([3, 1, 4, 1])}
        first, second = (diagonal_fisher(tiny_vit, [b], classify) for b in (batch, other))
        assert all(torch.equal(first[k], second[k]) for k in first)

    def test_batches_and_chunks_do_not_matter(self, tiny_resnet, monkeypatch):
        batch = image_batch(6)
        whole = diagonal_fisher(tiny_resnet, [batch], classify)
        uneven = [{k: v[a:b] for k, v in batch.items()} for a, b in ((0, 1), (1, 5), (5, 6))]
        assert_close(diagonal_fisher(tiny_resnet, uneven, classify), whole)
        size = 10 * sum(p.numel() for p in tiny_resnet.parameters())
        for elements in (1, size, 4 * size):
            monkeypatch.setattr(fisher_module, "CHUNK_ELEMENTS", elements)
            assert_close(diagonal_fisher(tiny_resnet, [batch], classify), whole)

    def test_frozen_parameters_are_left_out(self, tiny_resnet):
        tiny_resnet.resnet.requires_grad_(False)
        fisher = diagonal_fisher(tiny_resnet, [image_batch()], classify)
        assert set(fisher) == {"classifier.1.weight", "classifier.1.bias"}
        assert_close(fisher, brute_force(tiny_resnet, image_batch(), classify))

    def test_model_is_left_as_it_was(self, tiny_resnet):
        tiny_resnet.train()
        tiny_resnet.resnet.embedder.eval()
        state = {k: v.clone() for k, v in tiny_resnet.state_dict().items()}
        training, random_state = [m.training for m in tiny_resnet.modules()], torch.get_rng_state()
        diagonal_fisher(tiny_resnet, [image_batch()], classify)

        def fails(forward, batch):
            raise KeyError("pixel_values")

        with pytest.raises(KeyError):
            diagonal_fisher(tiny_resnet, [image_batch()], fails)
        assert [m.training for m in tiny_resnet.modules()] == training
        assert all(torch.equal(v, state[k]) for k, v in tiny_resnet.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in tiny_resnet.parameters())
        assert torch.equal(torch.get_rng_state(), random_state)

    def test_refuses_what_it_cannot_do(self, tiny_resnet, tiny_gpt2):
        with pytest.raises(ValueError, match="batches"):
            diagonal_fisher(tiny_resnet, [], classify)
        batch = {"input_ids": torch.arange(8).view(2, 4), "labels": torch.zeros(2, 4, dtype=torch.long)}
        with pytest.raises(ValueError, match="monte_carlo"):
            diagonal_fisher(tiny_gpt2, [batch], next_token)
        with pytest.raises(ValueError, match="trainable"):
            diagonal_fisher(tiny_resnet.requires_grad_(False), [image_batch()], classify)

    def test_refuses_an_unknown_method(self, tiny_resnet):
        with pytest.raises(ValueError, match="method"):
            diagonal_fisher(tiny_resnet, [image_batch()], classify, method="montecarlo", samples=3)

    def test_ignored_examples_do_not_count(self):
        model, x = nn.Linear(5, 4), torch.randn(3, 5, generator=seeded(0))
        targets = torch.tensor([0, -100, 2])
        actual = diagonal_fisher(model, [{"x": x, "y": targets}], lambda forward, b: (forward(b["x"]), b["y"]))
        p = model(x).softmax(-1).detach()[targets != -100]
        torch.testing.assert_close(actual["bias"], (p * (1 - p)).sum(0) / 3)


def regression(forward, batch):
    return forward(batch["x"]), torch.zeros(len(batch["x"]), dtype=torch.long)


def text_batch(vocabulary, side=None, n=3, length=6):
    ids = torch.randint(3, vocabulary, (n, length), generator=seeded(0))
    if side is None:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    if side == "right":
        mask[1, 4:] = 0
    else:
        mask[1, :2] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


class TestMonteCarlo:
    def test_mean_and_variance_on_softmax_regression(self):
        """One draw for bias c is (1[y = c] − p_c)²: mean p(1 − p), fourth moment p(1 − p)⁴ + (1 − p)p⁴."""
        draws, n = 4000, 3
        model, x = nn.Linear(2, 4), torch.randn(n, 2, generator=seeded(0))
        with torch.no_grad():
            model.weight.normal_(generator=seeded(1))
            p = model(x).softmax(-1)
        mean = p * (1 - p)
        variance = p * (1 - p) ** 4 + (1 - p) * p**4 - mean**2
        x_squared = x.square()
        options = {"method": "monte_carlo", "samples": draws, "generator": seeded(2)}
        actual = diagonal_fisher(model, [{"x": x}], regression, **options)
        bias_z = (actual["bias"] - mean.mean(0)) / (variance.sum(0) / n**2 / draws).sqrt()
        weight_z = (actual["weight"] - mean.T @ x_squared / n) / (
            variance.T @ x_squared.square() / n**2 / draws
        ).sqrt()
        assert bias_z.abs().max() < 4.5
        assert weight_z.abs().max() < 4.5

    @pytest.mark.parametrize("samples", [1, 8])
    def test_token_sequences_are_unbiased(self, samples, tiny_llama):
        """Against the sum over all counted tokens and the whole vocabulary; far closer than if one token were lost."""
        from transformers import LlamaForCausalLM

        config = tiny_llama.config
        config.vocab_size, config.hidden_size, config.intermediate_size = 7, 8, 8
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = LlamaForCausalLM(config)
        batch = text_batch(7, n=2, length=5)
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][0, :2] = -100
        batch["labels"][1, 3:] = -100
        expected = brute_force(model, batch, next_token)
        generator = seeded(0)
        repeated = {k: v.repeat(64 // samples, 1) for k, v in batch.items()}
        options = {"method": "monte_carlo", "samples": samples, "generator": generator}
        runs = [diagonal_fisher(model, [repeated], next_token, **options) for _ in range(12)]
        for name in expected:
            sums = torch.stack([run[name].sum() for run in runs])
            error = sums.mean() - expected[name].sum()
            assert error.abs() < 5 * sums.std() / len(runs) ** 0.5, name
            assert error.abs() < 0.12 * expected[name].sum(), name

    def test_same_generator_same_estimate_whatever_the_chunks(self, tiny_llama, monkeypatch):
        batch = text_batch(300)
        batch["labels"] = batch["input_ids"]
        options = {"method": "monte_carlo", "samples": 2}
        first = diagonal_fisher(tiny_llama, [batch], next_token, generator=seeded(3), **options)
        monkeypatch.setattr(fisher_module, "CHUNK_ELEMENTS", 1)
        assert_close(diagonal_fisher(tiny_llama, [batch], next_token, generator=seeded(3), **options), first)
        other = diagonal_fisher(tiny_llama, [batch], next_token, generator=seeded(4), **options)
        assert not torch.allclose(other["lm_head.weight"], first["lm_head.weight"], rtol=0.01)

    def test_gpt2_with_a_pad_token_and_no_mask(self, tiny_gpt2):
        batch = text_batch(300)
        batch["labels"] = batch["input_ids"]
        fisher = diagonal_fisher(tiny_gpt2, [batch], next_token, method="monte_carlo", generator=seeded(0))
        assert all(value.isfinite().all() for value in fisher.values())

    @pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gpt2"])
    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    @pytest.mark.parametrize("side", ["right", "left"])
    def test_padding_does_not_count(self, fixture, implementation, side, request):
        """A padded sequence counts like the same sequence alone: the batch's Fisher is the sum of the parts'."""
        model = request.getfixturevalue(fixture)
        model.set_attn_implementation(implementation)
        padded = text_batch(300, side, n=2)
        mask = padded["attention_mask"].bool()
        short, long = padded["input_ids"][1][mask[1]], padded["input_ids"][0]
        padded["labels"] = padded["input_ids"].masked_fill(~mask, -100)
        padded["labels"][1, mask[1].int().argmax()] = -100  # nothing precedes it when it stands alone
        if fixture == "tiny_gpt2":
            padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        options = {"method": "monte_carlo", "samples": 400}
        together = diagonal_fisher(model, [padded], next_token, generator=seeded(0), **options)
        alone = [
            {"input_ids": row[None], "attention_mask": torch.ones_like(row[None]), "labels": row[None]}
            for row in (long, short)
        ]
        apart = diagonal_fisher(model, alone, next_token, generator=seeded(1), **options)
        for name in together:
            torch.testing.assert_close(together[name].sum(), apart[name].sum(), rtol=0.1, atol=0, msg=name)


def written_out_gaussian(model, batch, answer):
    """The definition: one example, one pixel at a time."""
    parameters = trainable_parameters(model)
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in range(len(batch)):
        for pixel in answer(batch[row : row + 1]).flatten():
            gradients = torch.autograd.grad(pixel, list(parameters.values()), retain_graph=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                total[name] += gradient.square()
    return {name: value / len(batch) for name, value in total.items()}


class TestGaussian:
    @pytest.fixture
    def model(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    batch = torch.randn(4, 3, generator=seeded(0))

    def test_mean_over_all_signs_is_the_definition(self, model, monkeypatch):
        """Two examples of two pixels: with each of the 16 patterns once, nothing is left to chance."""
        batch = self.batch[:2]
        patterns = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4).view(16, 2, 2)
        draws = iter(patterns)
        monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: next(draws))
        actual = gaussian_fisher(model, [batch] * 16, model, generator=seeded(0))
        assert_close(actual, written_out_gaussian(model, batch, model), rtol=1e-5)

    @pytest.mark.parametrize("size", [1, 2, 4])
    def test_is_unbiased_at_every_batch_size(self, size, model):
        batches = [part for _ in range(2000 * size // 4) for part in self.batch.split(size)]
        actual = gaussian_fisher(model, batches, model, generator=seeded(1))
        expected = written_out_gaussian(model, self.batch, model)
        for name, value in expected.items():
            # A draw of q = (Σ ξₖ gₖ)² has at most twice its mean as standard deviation.
            torch.testing.assert_close(actual[name], value, rtol=0.25, atol=0.02 * float(value.max()), msg=name)
            assert actual[name].sum() == pytest.approx(value.sum().item(), rel=0.08)

    def test_a_single_answer_needs_no_luck(self):
        model, batch = nn.Linear(3, 1), self.batch
        expected = written_out_gaussian(model, batch, model)
        assert_close(expected, {"weight": batch.square().mean(0, keepdim=True), "bias": torch.ones(1)})
        for seed in range(3):
            assert_close(gaussian_fisher(model, batch.split(1), model, generator=seeded(seed)), expected)

    def test_of_a_denoiser(self, tiny_ddpm):
        unet, timesteps = tiny_ddpm.unet, torch.tensor([3])
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(name.startswith(("conv_out", "conv_norm_out")))
        noisy = torch.randn(1, 1, 8, 8, generator=seeded(2))

        def answer(images):
            return unet(images, timesteps).sample

        actual = gaussian_fisher(unet, [noisy] * 150, answer, generator=seeded(3))
        expected = written_out_gaussian(unet, noisy, answer)
        assert actual.keys() == {"conv_norm_out.weight", "conv_norm_out.bias", "conv_out.weight", "conv_out.bias"}
        assert actual["conv_out.bias"].item() == pytest.approx(64, rel=0.4)
        for name, value in expected.items():
            assert actual[name].sum() == pytest.approx(value.sum().item(), rel=0.4)

    def test_is_drawn_by_the_generator_alone_and_leaves_the_model_as_it_was(self, model):
        before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
        first = gaussian_fisher(model, [self.batch], model, generator=seeded(1))
        second = gaussian_fisher(model, [self.batch], model, generator=seeded(1))
        other = gaussian_fisher(model, [self.batch], model, generator=seeded(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert not all(torch.equal(first[name], other[name]) for name in first)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_parameters_that_are_frozen_or_not_used(self, model):
        model[0].bias.requires_grad_(False)
        model.register_parameter("spare", nn.Parameter(torch.ones(2)))
        fisher = gaussian_fisher(
            model, [self.batch], lambda batch: model[2](model[1](model[0](batch))), generator=seeded(1)
        )
        assert fisher.keys() == {"0.weight", "2.weight", "2.bias", "spare"}
        assert torch.equal(fisher["spare"], torch.zeros(2))
        assert fisher["0.weight"].sum() > 0


def by_hand(model, inputs, score):
    """The definition of the scalar Fisher: one example at a time, in eval mode."""
    twin = copy.deepcopy(model).eval()
    parameters = trainable_parameters(twin)
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for z in inputs:
        gradients = torch.autograd.grad(
            score(twin(z[None])).squeeze(), list(parameters.values()), allow_unused=True, materialize_grads=True
        )
        for name, gradient in zip(parameters, gradients, strict=True):
            total[name] += gradient.square()
    return {name: value / len(inputs) for name, value in total.items()}


def contrast(images):
    """A score of an image: neither linear in it nor a sum over pixels."""
    return images.square().mean().sqrt() + 3 * images.mean()


class TestScalar:
    inputs = torch.randn(7, 1, 6, 6, generator=seeded(0))

    @pytest.fixture
    def model(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(
                nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Tanh(), nn.Conv2d(3, 2, 3), nn.Softplus()
            )
        model[1].running_mean.normal_(generator=seeded(1))  # statistics that differ from those of any batch
        model[1].running_var.uniform_(0.5, 2, generator=seeded(2))
        return model

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("batch_size", [1, 3, 32])
    def test_against_the_definition(self, model, training, batch_size):
        expected = by_hand(model, self.inputs, contrast)
        model.train(training)
        assert_close(scalar_fisher(model, self.inputs, contrast, batch_size=batch_size), expected, rtol=1e-4)

    @pytest.mark.parametrize("norm", ["pixel", "batch"])
    def test_of_a_generator_by_what_its_discriminator_says(self, norm):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            generator = DCGANGenerator(8, latent_dim=4, base_channels=4, norm=norm)
            discriminator = DCGANDiscriminator(8, base_channels=4)
        latents = torch.randn(5, 4, generator=seeded(1))

        def score(drawn):
            return discriminator(drawn.sample).logits

        actual = scalar_fisher(generator, latents, score, batch_size=2)
        assert_close({k: v.detach() for k, v in actual.items()}, by_hand(generator, latents, score), rtol=1e-4)
        assert all(value.sum() > 0 for name, value in actual.items() if name.endswith("weight"))
        assert all(p.grad is None for p in (*generator.parameters(), *discriminator.parameters()))

    def test_keeps_no_graph_of_what_scores(self):
        """A discriminator is trained too: the graph of every example would stay in memory, and reach the penalty."""
        model, discriminator = nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        fisher = scalar_fisher(model, torch.randn(5, 3, generator=seeded(0)), discriminator)
        assert not any(value.requires_grad for value in fisher.values())

    def test_linear_regression_has_a_closed_form(self):
        """The score a·(w x + b) has the gradients a x and a."""
        model, x = nn.Linear(5, 1), torch.randn(9, 5, generator=seeded(0))
        fisher = scalar_fisher(model, x, lambda y: 3 * y)
        assert_close(fisher, {"weight": 9 * x.square().mean(0, keepdim=True), "bias": torch.tensor([9.0])}, rtol=1e-5)

    def test_chunks_do_not_matter_and_are_bounded_by_memory(self, model, monkeypatch):
        whole = scalar_fisher(model, self.inputs, contrast)
        size = sum(p.numel() for p in model.parameters())
        for elements in (1, size, 3 * size):
            monkeypatch.setattr(fisher_module, "CHUNK_ELEMENTS", elements)
            assert_close(scalar_fisher(model, self.inputs, contrast), whole, rtol=1e-5)

    def test_is_a_mean_over_examples(self, model):
        parts = [scalar_fisher(model, part, contrast) for part in (self.inputs[:3], self.inputs[3:])]
        whole = scalar_fisher(model, self.inputs, contrast)
        assert_close({name: (3 * parts[0][name] + 4 * parts[1][name]) / 7 for name in whole}, whole, rtol=1e-5)

    def test_parameters_that_are_frozen_or_not_used(self, model):
        expected = by_hand(model, self.inputs, contrast)
        model[0].requires_grad_(False)
        model.register_parameter("spare", nn.Parameter(torch.ones(2)))
        fisher = scalar_fisher(model, self.inputs, contrast)
        spare = fisher.pop("spare")
        assert_close(fisher, {name: value for name, value in expected.items() if not name.startswith("0.")}, rtol=1e-4)
        assert torch.equal(spare, torch.zeros(2))

    @pytest.mark.parametrize("fails", [False, True])
    def test_model_is_left_as_it_was(self, model, fails):
        model.train()
        model[1].eval()  # flags differ between modules
        state, modes = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]
        random_state = torch.get_rng_state()
        if fails:
            with pytest.raises(ZeroDivisionError):
                scalar_fisher(model, self.inputs, lambda images: 1 / 0)
        else:
            scalar_fisher(model, self.inputs, contrast)
        assert [m.training for m in model.modules()] == modes
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert torch.equal(torch.get_rng_state(), random_state)

    def test_adds_up_in_fp32(self):
        model, x = nn.Linear(4, 1).bfloat16(), torch.randn(300, 4, generator=seeded(0)).bfloat16()
        fisher = scalar_fisher(model, x, lambda y: y)
        expected = {"weight": x.float().square().mean(0, keepdim=True), "bias": torch.ones(1)}
        assert_close(fisher, expected, rtol=1e-5)

    def test_refuses_nothing_to_compute(self, model):
        frozen = copy.deepcopy(model).requires_grad_(False)
        for what, inputs in ((model, self.inputs[:0]), (frozen, self.inputs)):
            with pytest.raises(ValueError, match="^inputs, model: no examples or nothing trainable"):
                scalar_fisher(what, inputs, contrast)


DIAGONALS = st.lists(st.lists(st.floats(0, 100, width=32), min_size=1, max_size=5), min_size=1, max_size=4).filter(
    lambda rows: sum(map(sum, rows)) > 1e-3
)


class TestScaledToMeanOne:
    @given(rows=DIAGONALS)
    def test_mean_over_all_elements_is_one_and_ratios_stay(self, rows):
        fisher = {f"tensor{index}": torch.tensor(row) for index, row in enumerate(rows)}
        scaled = scaled_to_mean_one(fisher)
        assert scaled.keys() == fisher.keys()
        flat, before = (torch.cat([one[name].double() for name in fisher]) for one in (scaled, fisher))
        assert flat.mean().item() == pytest.approx(1, rel=1e-5)
        torch.testing.assert_close(flat * before.sum(), before * flat.sum(), rtol=1e-4, atol=1e-8)

    @given(rows=DIAGONALS, unit=st.floats(1e-3, 1e3))
    def test_has_no_unit(self, rows, unit):
        fisher = {str(index): torch.tensor(row) for index, row in enumerate(rows)}
        plain, other = scaled_to_mean_one(fisher), scaled_to_mean_one({k: unit * v for k, v in fisher.items()})
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-6)

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
