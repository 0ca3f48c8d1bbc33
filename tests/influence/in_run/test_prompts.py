"""Virtual tokens: what every example did to a prompt that all share."""

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model


from trainers import build, llama, seeded  # isort: skip

from hf_unlearn.influence.in_run.ghost import GhostRecorder
from hf_unlearn.training.losses import cross_entropy, next_tokens


KINDS = {"prompt": PromptTuningConfig, "p-tuning": PromptEncoderConfig, "prefix": PrefixTuningConfig}


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_each_example_alone(kind):
    given = {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": 8} if kind == "p-tuning" else {}
    config = KINDS[kind](num_virtual_tokens=3, task_type="CAUSAL_LM", **given)
    model = get_peft_model(seeded(llama), config).double()
    ids = torch.randint(2, 12, (5, 7), generator=torch.Generator().manual_seed(0))

    def losses(rows):
        return cross_entropy(*next_tokens(model(input_ids=rows, use_cache=False).logits, rows))

    plain = losses(ids).detach()
    recorder = GhostRecorder(model)
    names = list(recorder.covered)
    draw = torch.Generator().manual_seed(1)
    targets = {n: torch.randn(2, *p.shape, generator=draw).double() for n, p in recorder.covered.items()}
    recorder.set_targets(targets)
    with recorder:
        recorder.start(len(ids), targets=True)
        seen = losses(ids)
        seen.sum().backward()
        recorder.stop()
    torch.testing.assert_close(seen.detach(), plain)
    assert "get_prompt" not in vars(model)
    for row in range(len(ids)):
        alone = torch.autograd.grad(losses(ids[row : row + 1]).sum(), list(recorder.covered.values()))
        dots = sum((targets[n] * g).flatten(1).sum(1) for n, g in zip(names, alone, strict=True))
        torch.testing.assert_close(recorder.dots[row].double(), dots, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("observation", ["in_run", "propagated"])
def test_of_a_prompt(observation, tmp_path):
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    trainer = build("fine", tmp_path, peft_config=config, observation=observation, max_steps=2)
    trainer.train()
    assert len(trainer.influence.top(3)) == 3
