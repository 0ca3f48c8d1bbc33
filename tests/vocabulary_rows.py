"""How many rows of logits there are at once."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Rows(TorchDispatchMode):
    """Most rows of any tensor that is as wide as the vocabulary."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.most = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else [found]:
            # A head's own weight is looked at turned over: `[width, vocabulary]`, made of nothing new.
            is_wide = isinstance(one, torch.Tensor) and one.dim() and one.shape[-1] == self.vocabulary
            if is_wide and function is not torch.ops.aten.t.default:
                self.most = max(self.most, one.numel() // self.vocabulary)
        return found
