"""EK-FAC, projections and the looks that they come from, against dense matrices."""

import pytest
import torch
import torch.nn.functional as F
from brute_force import settings, vectors
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_unlearn import InfluenceTrainer
from hf_unlearn.influence.attribution import finished_trainer
from hf_unlearn.influence.finished.curvature import damped
from hf_unlearn.influence.finished.projection import Projections


class Bar:
    def update(self):
        pass


class Softmax(nn.Module):
    """Softmax regression, of which F is the Hessian; with all weights zero it is a Kronecker product, exactly."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x, labels=None):
        logits = self.layer(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Mixed(nn.Module):
    """A convolution in groups, a norm, both kinds of linear layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 1, 1), nn.LayerNorm(8)
        self.conv2 = nn.Conv2d(2, 4, 2, groups=2)
        self.back, self.out = Conv1D(5, 12), nn.Linear(5, 3)

    def forward(self, x, labels=None):
        hidden = self.conv2(self.norm(x).view(-1, 2, 2, 2)).flatten(1)
        hidden = torch.cat([hidden, x], dim=1)
        logits = self.out(torch.tanh(self.back(hidden)))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def made(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind()


def dense(model, rows, names):
    """F over all named parameters, by one example and class at a time."""
    theta = {name: p.detach() for name, p in model.named_parameters()}
    total, gradients = 0, []
    for row in range(len(rows)):
        x, label = rows[row]["x"][None], rows[row]["labels"]

        def logits(values, x=x):
            return torch.func.functional_call(model, values, (x,))["logits"][0]

        jacobian = torch.func.jacrev(logits)(theta)
        jacobian = torch.cat([jacobian[name].flatten(1) for name in names], dim=1).double()
        p = logits(theta).softmax(0).double()
        total = total + jacobian.T @ (torch.diag(p) - p[:, None] * p) @ jacobian / len(rows)
        gradients.append((p - F.one_hot(label, 3)) @ jacobian)
    return total, torch.stack(gradients)


@pytest.fixture
def looked(tmp_path):
    def look(model, rows):
        with finished_trainer(
            model, rows, vectors(3, seed=1), args=settings(tmp_path), trainer_class=InfluenceTrainer
        ) as (trainer, looks):
            with looks.quiet():
                curvature = looks.curvature(range(len(rows)), seed=0, bar=Bar())
            return trainer, looks, curvature

    return look


def flat(parts, names):
    return torch.cat([parts[name].flatten(1) for name in names], dim=1).double()


def test_it_is_exact_where_f_is_a_kronecker_product(looked):
    model, rows = Softmax(), vectors(20)
    trainer, looks, curvature = looked(model, rows)
    names = list(trainer._ghost.covered)
    f, gradients = dense(model, rows, names)
    v = torch.randn(4, f.shape[0], generator=torch.Generator().manual_seed(0))
    mean = f.diagonal().mean()

    found = flat(curvature.apply(looks.split(v), damped(0.1)), names)

    expected = torch.linalg.solve(f + 0.1 * mean * torch.eye(len(f)), v.double().T).T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_eigenvalues_are_the_diagonal_in_the_basis(looked):
    model, rows = made(Mixed), vectors(9)
    trainer, looks, curvature = looked(model, rows)
    names = list(trainer._ghost.covered)
    assert set(names) == {n for n, _ in model.named_parameters() if not n.startswith("conv.")}
    assert sorted(curvature.blocks) == ["back", "conv2", "norm.bias", "norm.weight", "out"]
    f, _ = dense(model, rows, names)
    like = {name: p.detach() for name, p in model.named_parameters()}
    for mine in curvature.blocks.values():
        size = mine.eigenvalues.numel()
        basis = mine.block.unpack(mine.rotated_back(torch.eye(size).view(size, *mine.eigenvalues.shape)), like)
        whole = {name: basis.get(name, torch.zeros(size, *like[name].shape)) for name in names}
        q = flat(whole, names)
        torch.testing.assert_close(q @ q.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-5)
        diagonal = ((q @ f) * q).sum(1)
        torch.testing.assert_close(
            mine.eigenvalues.flatten().double(), diagonal, rtol=1e-4, atol=1e-5 * diagonal.max().item()
        )


def test_products_and_forms_of_f(looked):
    model, rows = made(Mixed), vectors(9)
    trainer, looks, _ = looked(model, rows)
    f, _ = dense(model, rows, list(trainer._ghost.covered))
    v = torch.randn(3, len(f), generator=torch.Generator().manual_seed(0))
    with looks.quiet():
        found = looks.fisher_products(v, range(9), seed=0, bar=Bar())
        forms = looks.fisher_forms(v, range(9), seed=0, bar=Bar())
    expected = v.double() @ f
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    torch.testing.assert_close(forms, expected @ v.double().T, rtol=1e-4, atol=1e-6)


def rows_of(looks, projections, number):
    found, parts = {}, []

    def visit(layer, gradients):
        projections.see(layer, gradients, found)

    with looks.quiet():
        for _ in looks.own(range(number), visitor=visit):
            parts.append(torch.cat([found[name] for name in projections.blocks], dim=1))
            found.clear()
    return torch.cat(parts)


def test_projections_are_those_of_whole_gradients_and_unbiased(looked):
    model, rows = made(Mixed), vectors(9)
    trainer, looks, curvature = looked(model, rows)
    names = list(trainer._ghost.covered)
    f, gradients = dense(model, rows, names)
    v = torch.randn(2, len(f), generator=torch.Generator().manual_seed(0))
    score = gradients @ flat(curvature.apply(looks.split(v), damped(0.1)), names).T

    whole = Projections.of(curvature, damping=0.1, size=None, seed=0)
    assert whole.width == len(f)
    found = rows_of(looks, whole, 9) @ whole.query(looks.split(v)).T
    torch.testing.assert_close(found.double(), score, rtol=1e-3, atol=1e-4 * score.abs().max().item())

    few = Projections.of(curvature, damping=0.1, size=3, seed=0, random=True)
    mine = few.blocks["back"]
    left, right = few._whole["back"]
    split = looks.split(gradients.float())
    dense_projection = (left @ mine.pack(split) @ right.mT).flatten(1)
    place = sum(
        few.widths[name] for name in few.blocks if list(few.blocks).index(name) < list(few.blocks).index("back")
    )
    torch.testing.assert_close(rows_of(looks, few, 9)[:, place : place + 9], dense_projection, rtol=1e-3, atol=1e-4)
    # The mean over 400 projections is within five of its standard errors, in every entry.
    each = []
    for seed in range(400):
        one = Projections.of(curvature, damping=0.1, size=3, seed=seed, random=True)
        phi = torch.cat(
            [(one._whole[n][0] @ b.pack(split) @ one._whole[n][1].mT).flatten(1) for n, b in one.blocks.items()], 1
        )
        each.append((phi @ one.query(looks.split(v)).T).double())
    each = torch.stack(each)
    error = each.std(0) / 20
    assert ((each.mean(0) - score).abs() < 5 * error).all()
    assert (error > 0).all()
