"""What may bring back what a language model has forgotten: more training, coarser weights, fewer of them."""

from __future__ import annotations

from collections.abc import Callable

import rows
import torch
from datasets import Dataset, disable_progress_bars
from torch import nn
from torch.nn.utils import prune
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from hf_unlearn.examples.facts import TRAINING


QUIET = rows.QUIET | {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_length": TRAINING["max_length"],
}
# Training ends at 0; a tenth of its highest rate is where its last fifth begins.
RELEARNING = {
    "learning_rate": TRAINING["learning_rate"] / 10,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 8,
}


def silence() -> None:
    """Neither bars nor what the libraries tell beside a benchmark's own rows."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()


class At(TrainerCallback):
    """Calls `look` after some of the steps, keeps what it says by step, and ends the run where those are `enough`."""

    def __init__(self, steps: tuple[int, ...], look: Callable, enough: Callable = lambda seen, steps: False):
        self.steps, self.look, self.enough, self.seen = steps, look, enough, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            training = model.training
            self.seen[state.global_step] = self.look(model.eval())
            model.train(training)
            control.should_training_stop |= self.enough(self.seen, state.global_step)


def sft(
    model: PreTrainedModel, rows: Dataset, folder: str, tokenizer: PreTrainedTokenizerBase, **settings
) -> SFTTrainer:
    """Stock `SFTTrainer` on texts, or prompts and completions.

    Args:
        settings: of the trainer (`callbacks`, `peft_config`) and of its config.
    """
    own = {name: settings.pop(name) for name in ("callbacks", "peft_config") if name in settings}
    rows = rows.select_columns([name for name in ("text", "prompt", "completion") if name in rows.column_names])
    return SFTTrainer(
        model, SFTConfig(folder, **(QUIET | settings)), train_dataset=rows, processing_class=tokenizer, **own
    )


def _layers(model: nn.Module) -> list[nn.Linear]:
    """The linear layers; embeddings and head stay as they are, as where models are compressed to be used."""
    head = model.get_output_embeddings()
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]


@torch.no_grad()
def quantise(model: PreTrainedModel, bits: int = 4, group: int = 32) -> PreTrainedModel:
    """Rounds weights, in place, to the nearest of 2^bits evenly spaced values from the least to the greatest of their group.

    Args:
        model: its linear layers have a multiple of `group` inputs.
        bits (`int`): a weight.
        group (`int`): neighbouring inputs of one output that share a scale.
    """
    for layer in _layers(model):
        weights = layer.weight.view(-1, group)
        least, greatest = weights.aminmax(dim=1, keepdim=True)
        step = ((greatest - least) / (2**bits - 1)).clamp(min=torch.finfo(weights.dtype).tiny)
        weights.copy_(least + step * ((weights - least) / step).round())
    return model


def pruned(model: PreTrainedModel, share: float) -> PreTrainedModel:
    """Sets a share of the weights of all linear layers together, those nearest to 0, to 0."""
    weights = [(layer, "weight") for layer in _layers(model)]
    prune.global_unstructured(weights, prune.L1Unstructured, amount=share)
    for layer, name in weights:
        prune.remove(layer, name)
    return model
