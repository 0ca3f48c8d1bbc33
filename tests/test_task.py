import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_unlearn.task import cross_entropy, mean_over_predictions


class TestCrossEntropy:
    @settings(deadline=None, max_examples=40)
    @given(
        logits=st.lists(st.floats(-20, 20, width=32), min_size=24, max_size=24),
        targets=st.lists(st.sampled_from([-100, 0, 1, 2]), min_size=8, max_size=8),
    )
    def test_sequences_against_torch_one_by_one(self, logits, targets):
        logits, targets = torch.tensor(logits).view(2, 4, 3), torch.tensor(targets).view(2, 4)
        actual = cross_entropy(logits, targets)
        for row in range(2):
            if (targets[row] == -100).all():
                assert actual[row] == 0
            else:
                torch.testing.assert_close(actual[row], F.cross_entropy(logits[row], targets[row]))

    def test_classification_and_deeper_shapes(self):
        generator = torch.Generator().manual_seed(0)
        logits, targets = torch.randn(6, 4, generator=generator), torch.tensor([0, 1, 2, 3, -100, 0])
        expected = F.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
        torch.testing.assert_close(cross_entropy(logits, targets), expected)
        maps, classes = torch.randn(2, 3, 5, 4, generator=generator), torch.randint(4, (2, 3, 5), generator=generator)
        expected = F.cross_entropy(maps.movedim(-1, 1), classes, reduction="none").mean((1, 2))
        torch.testing.assert_close(cross_entropy(maps, classes), expected)
        assert cross_entropy(maps.bfloat16(), classes).dtype == torch.float32

    def test_ignored_predictions_have_no_gradient(self):
        logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
        targets = torch.tensor([[0, -100, 2, -100], [-100] * 4])
        assert torch.equal(
            torch.autograd.grad(cross_entropy(logits, targets).sum(), logits)[0].any(-1), targets != -100
        )

    def test_ignored_values_may_be_anything(self):
        values = torch.tensor([[1.0, torch.inf], [torch.nan, 3.0]])
        means = mean_over_predictions(values, torch.tensor([[5, -100], [-100, 5]]))
        torch.testing.assert_close(means, torch.tensor([1.0, 3.0]))


def test_gradcheck_of_the_mean_over_predictions():
    targets = torch.tensor([[0, -100], [-100, -100], [1, 2], [0, 0]])
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 2, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mean_over_predictions(x, targets), values)
