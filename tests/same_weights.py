"""Whether two models, or two runs, have come to the same."""

import os

import torch


def weights(model):
    """A copy of parameters and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(first, second):
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def nearly(first, second):
    """To rounding. Adam moves a weight whose gradient is all rounding by its learning rate either way: so, most of them."""
    differences = [(first[name].double() - second[name].double()).abs().flatten() for name in first]
    return first.keys() == second.keys() and (torch.cat(differences) < 1e-5).double().mean().item() > 0.95


def same_run(first, second):
    """What two runs of the same steps have come to: the same bits where MKL's sums do not depend on where in memory they are."""
    return same(first, second) if os.environ.get("MKL_CBWR") else nearly(first, second)
