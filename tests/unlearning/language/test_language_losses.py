"""The field's losses, against open-unlearning's formulas over a whole batch (text by text: `test_language.py::TestAgainstPlainTorch`),
and what they have in common with ours.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hf_unlearn.training.losses import cross_entropy
from hf_unlearn.unlearning import losses as shared
from hf_unlearn.unlearning.language.ceu import ceu
from hf_unlearn.unlearning.language.pdu import Dual
from hf_unlearn.unlearning.language.preference import dpo
from hf_unlearn.unlearning.language.rmu import direction, rmu
from hf_unlearn.unlearning.language.tokens import TokenLoss
from hf_unlearn.unlearning.language.undial import undial
from hf_unlearn.unlearning.objective import FORGET_LOSSES


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits, reference = 3 * torch.randn(2, 3, 6, 8, generator=generator)
    return logits, reference, torch.randint(8, (3, 6), generator=generator)


@pytest.fixture
def padded(batch):
    """Prompts and padding of unlike lengths do not count; most answers are likely, or SimNPO would be 0."""
    logits, reference, targets = batch
    logits = logits + 4 * F.one_hot(targets, 8)
    counts = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0]]).bool()
    return logits.requires_grad_(), reference, targets.masked_fill(~counts, -100), counts


def assert_alike(ours, theirs, *leaves):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    for one, other in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * other.abs().max().item())


def theirs(name, logits, reference, targets, counts):
    """A mean over the tokens of a batch; of SimNPO over texts."""
    z, y = logits[counts], targets[counts]
    nll, own = F.cross_entropy(z, y, reduction="none"), F.one_hot(y, 8)
    p = (-nll).exp().detach()
    if name == "simnpo":
        means = torch.stack([row.mean() for row in nll.split(counts.sum(1).tolist())])
        return -F.logsigmoid(4.5 * (means - 0.0)).mean() * 2 / 4.5
    return {
        "undial": lambda: F.cross_entropy(z, (reference[counts] - 10.0 * own).softmax(-1)),
        "wga": lambda: -(p**1.0 * nll).mean(),
        "satimp": lambda: -(p**5.0 * (1 - p) ** 1.0 * nll).mean(),
        "ceu": lambda: F.cross_entropy(z, z.detach().masked_fill(own.bool(), -torch.inf).softmax(-1)),
        "pdu": lambda: ((z.max(-1)[0] - z.mean(-1)) ** 2).mean(),
    }[name]()


def trainer_of(logits, reference, targets):
    """What a loss asks of a trainer: of the model "student" or of the original, where a token counts."""
    counts = targets != -100
    asked = {"student": (logits[counts], targets), "original": (reference[counts], targets)}
    return SimpleNamespace(
        args=None, retain_dataset=[], reference_forward="original", counted=lambda model, batch: asked[model],
        task_loss=lambda model, batch: cross_entropy(logits, targets),
    )  # fmt: skip


class TestTheFieldsFormulas:
    @pytest.mark.parametrize(
        "name", ["simnpo", *(n for n, loss in FORGET_LOSSES.items() if issubclass(loss, TokenLoss))]
    )
    def test_of_tokens(self, name, padded):
        logits, reference, targets, counts = padded
        ours = FORGET_LOSSES[name](trainer_of(logits, reference, targets)).means("student", None)
        weights = torch.ones(3) if name == "simnpo" else counts.sum(1)
        assert_alike((ours * weights).sum() / weights.sum(), theirs(name, *padded), logits)

    def test_of_pairs(self, padded):
        logits, reference, targets, counts = padded
        alternates = targets.roll(1, 0)

        def nll(logits, targets):
            return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(1)

        ratio, other = (nll(reference, y) - nll(logits, y) for y in (targets, alternates))
        nlls = (nll(z, y) for y in (targets, alternates) for z in (logits, reference))
        formula = -2 / 0.3 * F.logsigmoid(0.3 * (other - ratio)).mean()
        assert_alike(dpo(*nlls, beta=0.3).mean(), formula, logits)

    def test_of_hidden_states(self, padded):
        """Squared errors of an answer's tokens, averaged over the size and the tokens, and then over texts."""
        hidden, kept, _, counts = padded
        u = direction(8, seed=3)
        assert u.norm().item() == pytest.approx(1)
        assert (u > 0).all()
        for target in (6.5 * u, kept):
            away = F.mse_loss(hidden, target.expand_as(hidden), reduction="none") * counts.unsqueeze(-1)
            formula = (away.mean(2).sum(1) / counts.sum(1)).mean()
            values = rmu(hidden, target)
            assert_alike(
                torch.stack([row[c].mean() for row, c in zip(values, counts, strict=True)]).mean(), formula, hidden
            )

    def test_of_the_dual_variable(self):
        dual, weight = Dual(1.0, limit=0.5, rate=2.0), 1.0
        for step in ([0.4, 1.0], [0.1, 0.1], [0.0, 0.0], [0.9, 0.3]):
            for loss in step:
                dual.saw(torch.tensor(loss))
            dual.step(lambda mean: mean)
            weight = max(0.0, weight + 2.0 * (sum(step) / 2 - 0.5))
            assert dual.weight == pytest.approx(weight)
        assert vars(Dual(**dual.to_json())) == vars(dual)
        assert weight == pytest.approx(0.2)  # from 0, where it may not fall further


def test_undial_tends_to_redirect(batch):
    logits, reference, targets = batch
    own = F.one_hot(targets, 8).bool()
    torch.testing.assert_close(undial(logits, reference, targets, beta=1e4), shared.redirect(logits, reference, own))


@pytest.mark.parametrize("loss", [ceu, lambda z, y: undial(z, z.detach(), y)])
def test_places_that_do_not_count_take_nothing_away(batch, loss):
    logits, _, targets = batch
    ignored = targets.clone()
    ignored[0, 2] = -100
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(loss(logits, ignored)[0, 2], entropy[0, 2])
