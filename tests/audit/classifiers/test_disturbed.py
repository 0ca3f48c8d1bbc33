import copy

import pytest
import torch
from torch import nn

from hf_unlearn.audit.classifiers.disturbed import Noisy, Pruned, Quantised, _noise
from hf_unlearn.audit.classifiers.subject import ClassifierSubject
from hf_unlearn.audit.weights import quantised, weights_of
from hf_unlearn.training.models import head_of


class TestQuantised:
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("shape", [(6, 40), (5, 3, 2, 2)])
    def test_each_weight_goes_to_the_nearest_level_of_its_output(self, bits, shape):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        found, largest = quantised(weight, bits), 2 ** (bits - 1) - 1
        for row, rounded in zip(weight, found, strict=True):
            levels = torch.arange(-largest, largest + 1) * row.abs().max() / largest
            nearest = levels[(row.flatten()[:, None] - levels).abs().argmin(1)]
            torch.testing.assert_close(rounded.flatten(), nearest)

    def test_of_nothing_comes_nothing(self):
        assert torch.equal(quantised(torch.zeros(3, 4), 4), torch.zeros(3, 4))

    def test_only_layers_are(self, tiny_resnet):
        model = copy.deepcopy(tiny_resnet)
        with torch.no_grad():
            Quantised().disturb(model, 4)
        changed = {
            name
            for name, value in model.state_dict().items()
            if not torch.equal(value, tiny_resnet.state_dict()[name])
        }
        assert changed
        assert all(name.endswith("weight") and model.state_dict()[name].dim() > 1 for name in changed)


class TestPruned:
    @pytest.mark.parametrize("share", [0.1, 0.3])
    def test_the_smallest_of_all_layers_are_gone(self, tiny_resnet, share):
        model = copy.deepcopy(tiny_resnet)
        before = torch.cat([w.detach().flatten() for w in weights_of(model)])
        with torch.no_grad():
            Pruned().disturb(model, share)
        after = torch.cat([w.detach().flatten() for w in weights_of(model)])
        gone = after == 0
        assert gone.sum() == round(share * len(before))
        assert before[gone].abs().max() <= before[~gone].abs().min()
        assert torch.equal(after[~gone], before[~gone])


class TestNoisy:
    def test_noise_is_in_units_of_what_it_is_put_on(self):
        output = 7 + 3 * torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
        noise = _noise(0.5, torch.Generator().manual_seed(1))(None, (), output) - output
        assert noise.std().item() == pytest.approx(0.5 * 3, rel=0.02)  # 40,000 values: 0.4 %
        assert noise.mean().abs() < 0.05

    def test_without_noise_the_answers_are_the_models(self, models, sets, rows):
        from hf_unlearn.audit.classifiers.family import data

        subject = ClassifierSubject(models.originals[0], "audited", "a")
        parts = data(subject, **sets, processing_class=None, size="standard", seed=0)
        assert torch.equal(Noisy().right(subject, 0.0, parts.forget, 0), subject.look(parts.forget).right)
        assert Noisy().right(subject, 3.0, parts.forget, 0).mean() < 0.9


def test_the_head_is_the_last_layer_with_a_number_for_each_class(tiny_resnet, tiny_vit, tiny_bert):
    for model, head in (
        (tiny_resnet, tiny_resnet.classifier[1]),
        (tiny_vit, tiny_vit.classifier),
        (tiny_bert, tiny_bert.classifier),
    ):
        assert head_of(model) is head
    bare = nn.Linear(3, 4)
    bare.config = tiny_resnet.config
    with pytest.raises(ValueError, match="Linear has no linear head with 10 outputs"):
        head_of(bare)
