"""The field's losses against open-unlearning's formulas, written out, on one batch without padding: values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from hf_unlearn.unlearning import losses as shared
from hf_unlearn.unlearning.language import losses


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits, reference, other, other_reference = 3 * torch.randn(4, 3, 6, 8, generator=generator)
    targets, other_targets = torch.randint(8, (2, 3, 6), generator=generator)
    return logits.requires_grad_(), reference, targets, other.requires_grad_(), other_reference, other_targets


def nll(logits, targets):
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


def same(ours, theirs, *inputs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for mine, yours in zip(
        torch.autograd.grad(ours, inputs, retain_graph=True),
        torch.autograd.grad(theirs, inputs, retain_graph=True),
        strict=True,
    ):
        assert yours.abs().max() > 1e-4
        torch.testing.assert_close(mine, yours, rtol=1e-5, atol=1e-6)


def test_dpo_and_npo(batch):
    logits, reference, targets, other, other_reference, other_targets = batch
    lose, lose_reference = nll(logits, targets).sum(-1), nll(reference, targets).sum(-1)
    win, win_reference = nll(other, other_targets).sum(-1), nll(other_reference, other_targets).sum(-1)
    ratio = -(win - win_reference) + (lose - lose_reference)
    theirs = -2 / 0.3 * F.logsigmoid(0.3 * ratio).mean()
    same(losses.dpo(lose, lose_reference, win, win_reference, beta=0.3).mean(), theirs, logits, other)
    zero = torch.zeros(3)
    torch.testing.assert_close(
        losses.dpo(lose, lose_reference, zero, zero, beta=0.3), shared.npo(lose, lose_reference, 0.3)
    )


def test_simnpo(batch):
    logits, _, targets, *_ = batch
    theirs = -F.logsigmoid(0.5 * (nll(logits, targets).sum(-1) / 6 - 0.2)).mean() * 2 / 0.5
    same(losses.simnpo(nll(logits, targets).mean(-1), 0.5, 0.2).mean(), theirs, logits)


def test_undial_tends_to_redirect(batch):
    logits, reference, targets, *_ = batch
    lowered = reference.clone()
    for row in range(3):
        for place in range(6):
            lowered[row, place, targets[row, place]] -= 10
    theirs = F.cross_entropy(logits.reshape(-1, 8), lowered.softmax(-1).reshape(-1, 8))
    same(losses.undial(logits, reference, targets).mean(), theirs, logits)
    own = F.one_hot(targets, 8).bool()
    torch.testing.assert_close(
        losses.undial(logits, reference, targets, beta=1e4), shared.redirect(logits, reference, own)
    )


def test_weighted_ascent(batch):
    logits, _, targets, *_ = batch
    loss = nll(logits, targets)
    p = (-loss).exp().detach()
    same(losses.wga(loss, 0.7).mean(), -(p**0.7 * loss).mean(), logits)
    same(losses.satimp(loss, 2.0, 0.5).mean(), -(p**2 * (1 - p) ** 0.5 * loss).mean(), logits)


def test_ceu(batch):
    logits, _, targets, *_ = batch
    target = logits.detach().clone().scatter(-1, targets.unsqueeze(-1), -torch.inf).softmax(-1)
    theirs = F.cross_entropy(logits.reshape(-1, 8), target.reshape(-1, 8))
    same(losses.ceu(logits, targets).mean(), theirs, logits)


def test_pdu(batch):
    logits = batch[0]
    same(losses.pdu(logits).mean(), ((logits.max(-1)[0] - logits.mean(-1)) ** 2).mean(), logits)
    assert losses.dual_weight(1.0, 0.5, 0.2, 2.0) == pytest.approx(1.6)
    assert losses.dual_weight(0.1, 0.0, 0.2, 2.0) == 0


def test_rmu(batch):
    hidden, wanted = batch[0], torch.randn(8)
    mask = torch.ones(3, 6)
    squared = F.mse_loss(hidden, wanted.expand_as(hidden), reduction="none")
    theirs = ((squared * mask.unsqueeze(-1)).mean(dim=2).sum(dim=1) / mask.sum(-1)).mean()
    same(losses.rmu(hidden, wanted).mean(), theirs, hidden)


@pytest.mark.parametrize("loss", [losses.ceu, lambda z, y: losses.undial(z, z.detach(), y)])
def test_places_that_do_not_count_take_nothing_away(batch, loss):
    logits, _, targets, *_ = batch
    ignored = targets.clone()
    ignored[0, 2] = -100
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(loss(logits, ignored)[0, 2], entropy[0, 2])
