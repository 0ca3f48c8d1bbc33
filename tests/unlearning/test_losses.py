import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_unlearn.unlearning import losses


LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=15, max_size=15).map(lambda v: torch.tensor(v).view(3, 5))
EXCLUDED = st.lists(st.booleans(), min_size=5, max_size=5).filter(lambda v: not all(v)).map(torch.tensor)
NLL = st.floats(0, 200)


def gradient(value, variable):
    return torch.autograd.grad(value.sum(), variable)[0]


class TestNPO:
    @settings(deadline=None, max_examples=100)
    @given(nll=NLL, reference=NLL, beta=st.floats(1e-3, 5))
    def test_value_and_gradient_are_those_of_the_paper(self, nll, reference, beta):
        nll = torch.tensor(nll, dtype=torch.float64, requires_grad=True)
        reference = torch.tensor(reference, dtype=torch.float64)
        value = losses.npo(nll, reference, beta)
        log_ratio = reference - nll  # log π_θ / π_ref
        torch.testing.assert_close(value, -2 / beta * F.logsigmoid(-beta * log_ratio), rtol=1e-6, atol=1e-6)
        assert value >= 0
        # Adaptive weight W = 2π^β / (π^β + π_ref^β) of the paper, times gradient ascent on log-likelihood.
        weight = 2 / (1 + torch.exp(-beta * log_ratio))
        torch.testing.assert_close(gradient(value, nll), -weight.detach(), rtol=1e-6, atol=1e-6)

    def test_small_beta_is_gradient_ascent_and_forgotten_is_free(self):
        nll = torch.tensor([0.1, 3.0, 9.0], dtype=torch.float64, requires_grad=True)
        reference = torch.tensor([4.0, 3.0, 1.0], dtype=torch.float64)
        ascent = gradient(losses.ascent(nll), nll)
        distance = [(gradient(losses.npo(nll, reference, b), nll) - ascent).abs().max() for b in (1e-1, 1e-2, 1e-3)]
        assert distance[1] < 0.11 * distance[0]
        assert distance[2] < 0.11 * distance[1]
        beta = 1e-6
        torch.testing.assert_close(
            losses.npo(nll, reference, beta) - 2 / beta * math.log(2), (reference - nll).detach(), rtol=1e-3, atol=1e-4
        )
        assert losses.npo(torch.tensor(500.0), torch.tensor(1.0)) < 1e-10  # β 0.1


class TestRedirect:
    @settings(deadline=None, max_examples=60)
    @given(logits=LOGITS, reference=LOGITS, excluded=EXCLUDED)
    def test_value_gradient_and_bound(self, logits, reference, excluded):
        logits.requires_grad_()
        value = losses.redirect(logits, reference, excluded)
        target = torch.zeros(3, 5)
        target[:, ~excluded] = reference[:, ~excluded].softmax(-1)
        expected = F.cross_entropy(logits, target, reduction="none")
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradient(value, logits), logits.detach().softmax(-1) - target, rtol=1e-3, atol=1e-5)
        entropy = torch.special.entr(target).sum(-1)
        assert (value >= entropy - 1e-4).all()
        attained = losses.redirect(target.clamp(min=1e-30).log(), reference, excluded)
        torch.testing.assert_close(attained, entropy, rtol=1e-4, atol=1e-5)

    def test_what_the_original_said_of_the_excluded_does_not_matter(self):
        generator = torch.Generator().manual_seed(0)
        logits, reference = torch.randn(2, 3, 5, generator=generator)
        excluded = torch.tensor([True, False, False, True, False])
        other = torch.where(excluded, 50 * torch.randn(3, 5, generator=generator), reference)
        torch.testing.assert_close(
            losses.redirect(logits, reference, excluded), losses.redirect(logits, other, excluded)
        )

    def test_each_example_may_have_its_own_classes(self):
        logits, reference = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
        excluded = F.one_hot(torch.tensor([4, 0, 2]), 5).bool()
        expected = torch.stack([losses.redirect(logits[i], reference[i], excluded[i]) for i in range(3)])
        torch.testing.assert_close(losses.redirect(logits, reference, excluded), expected)
        assert losses.redirect(logits.bfloat16(), reference.bfloat16(), excluded).dtype == torch.float32


class TestUniform:
    @settings(deadline=None, max_examples=40)
    @given(logits=LOGITS, shift=st.floats(-50, 50))
    def test_is_the_divergence_from_the_uniform_distribution(self, logits, shift):
        p = torch.distributions.Categorical(logits=logits.double())
        u = torch.distributions.Categorical(probs=torch.full((3, 5), 0.2, dtype=torch.float64))
        expected = torch.distributions.kl_divergence(u, p)
        torch.testing.assert_close(losses.uniform(logits).double(), expected, rtol=1e-4, atol=1e-4)
        assert (losses.uniform(logits) >= -1e-5).all()
        torch.testing.assert_close(losses.uniform(logits + shift), losses.uniform(logits), rtol=1e-4, atol=1e-4)
        logits.requires_grad_()
        torch.testing.assert_close(
            gradient(losses.uniform(logits), logits), logits.detach().softmax(-1) - 0.2, rtol=1e-3, atol=1e-6
        )


def test_match_and_ascent():
    loss = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64, requires_grad=True)
    assert [losses.match(loss, target).item() for target in (3.0, 1.0, 4.5)] == pytest.approx([0, 2, 1.5], abs=1e-12)
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(gradient(losses.match(loss, 1.0), loss), third)
    torch.testing.assert_close(gradient(losses.match(loss, 4.5), loss), -third)
    assert torch.equal(losses.ascent(loss), -loss)
