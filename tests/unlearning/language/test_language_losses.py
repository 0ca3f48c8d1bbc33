"""What the field's losses have in common with ours. Their formulas are in `test_language.py::TestAgainstPlainTorch`."""

import pytest
import torch
import torch.nn.functional as F

from hf_unlearn.unlearning import losses as shared
from hf_unlearn.unlearning.language import losses


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits, reference = 3 * torch.randn(2, 3, 6, 8, generator=generator)
    return logits, reference, torch.randint(8, (3, 6), generator=generator)


def test_undial_tends_to_redirect(batch):
    logits, reference, targets = batch
    own = F.one_hot(targets, 8).bool()
    torch.testing.assert_close(
        losses.undial(logits, reference, targets, beta=1e4), shared.redirect(logits, reference, own)
    )


@pytest.mark.parametrize("loss", [losses.ceu, lambda z, y: losses.undial(z, z.detach(), y)])
def test_places_that_do_not_count_take_nothing_away(batch, loss):
    logits, _, targets = batch
    ignored = targets.clone()
    ignored[0, 2] = -100
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(loss(logits, ignored)[0, 2], entropy[0, 2])
