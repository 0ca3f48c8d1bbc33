r"""Influence through segments of a run, from its checkpoints (SOURCE, arXiv 2405.12186), and the run-to-run noise along them.

Within a segment of K steps the curvature F, the preconditioner P and the examples' gradients are held at their values at its
checkpoint. The steps' product and sum have a closed form then, with z = Σ η_t over the segment and Λ the eigenvalues of P^½ F P^½ (weight
decay adds to them):

$$ \prod_t (1 - \eta_t \Lambda) \approx e^{-z\Lambda}, \qquad
   \sum_t \eta_t \prod_{s>t} (1 - \eta_s \Lambda) \approx \frac{1 - e^{-z\Lambda}}{\Lambda}. $$

A target's gradient λ is carried back by the first, and an example's gain in the segment is the product of its gradient with the second of λ.

Where SOURCE takes the eigenbasis of Kronecker factors, this takes that of F within the space of all λ and F λ (Rayleigh–Ritz in a
block Krylov space): λ lies along the largest curvature, of which the factors see too little, so that too much is left of early steps. F itself is
only multiplied with, so every layer counts that per-example gradients are seen of, and what lies between layers does too.

Batches are noise. The batch of a step whose gains are a_{t,i} adds Var_i(a_{t,i})/b to the variance of the target's loss, but what one batch of an
epoch has, the others lack: over the random order of an epoch it is Σ_t Var_i(a_{t,i})/b − Var_i(Σ_t a_{t,i})/n. All of it follows from the
products of the examples' gradients with the basis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checkpoints import Segment


FLOOR = 0.01  # least share of the variance that shuffling leaves


@dataclass(frozen=True, eq=False)
class Basis:
    """Of a segment's curvature, as far as its targets are concerned.

    Attributes:
        vectors (`[size, parameters]`): orthonormal.
        eigenvalues (`[size]`): Λ.
        root (`[parameters]`): √P.
        coordinates (`[2C, size]`): the targets' √P λ.
    """

    vectors: Tensor
    eigenvalues: Tensor
    root: Tensor
    coordinates: Tensor

    @property
    def probes(self) -> Tensor:
        """`[size, parameters]`: their products with examples' gradients are the gradients' coordinates."""
        return self.vectors * self.root


def basis_of(vectors: Tensor, root: Tensor, decay: Tensor, products, forms) -> Basis:
    """Rayleigh–Ritz of P^½ F P^½ + decay in the space of √P λ and its image.

    Args:
        vectors (`[2C, parameters]`): λ.
        root, decay (`[parameters]`): √P and weight decay.
        products: vectors `[·, parameters]` → F v.
        forms: vectors → ⟨v, F v'⟩ of all pairs.
    """
    start = vectors * root
    first = _orthonormal(start)
    image = products(first * root) * root + first * decay
    both = _orthonormal(torch.cat([first, torch.nn.functional.normalize(image, dim=1)]))
    # What an exhausted space is filled up with is measured like the rest.
    form = forms(both * root) + ((both * decay) @ both.T).double()
    eigenvalues, rotation = torch.linalg.eigh((form + form.T) / 2)
    both = rotation.to(both).T @ both
    return Basis(both, eigenvalues.clamp(min=0), root, (start @ both.T).double())


@dataclass(eq=False)
class Unrolled:
    """Carries cotangents back through segments, the last first.

    Args:
        steps_per_epoch (`float`), examples (`int`): of the run.

    Attributes:
        vectors (`[2C, parameters]`): λ of what is observed, and λ of the loss after the last step, which σ is of.
        epoch (`[examples, C]`): what the end's loss gained by examples in the epoch that the sweep is in.
    """

    steps_per_epoch: float
    examples: int
    vectors: Tensor | None = None
    epoch: Tensor | None = None

    def add(self, gradients: Tensor, share: float) -> None:
        """A share of the targets' gradients `[C, parameters]` at the place that the sweep has come to."""
        if self.vectors is None:
            self.vectors = torch.cat([torch.zeros_like(gradients), gradients])
        self.vectors[: len(gradients)] += share * gradients

    def through(
        self, segment: Segment, basis: Basis, coordinates: Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Carry back through a segment.

        Args:
            coordinates (`[examples, size]`): of the examples' gradients, products with `basis.probes`.
            share (`[examples]`): an example's weight over the mean weight.

        Returns:
            gains `[examples, C]`; the variance `[C]` that the segment's batches would add to the loss after the last step if they were
            independent draws; and what they do add, less what the epoch that ends in it has in common.
        """
        z, rate = float(segment.rates.sum()), basis.eigenvalues.to(coordinates)
        start = basis.coordinates.to(coordinates)
        count = len(start) // 2
        gains = coordinates @ (start[:count] * filtered(rate, z)).T
        v, noise, plain = start[count:], 0, 0
        so_far = coordinates.new_zeros(self.examples, count) if self.epoch is None else self.epoch
        # E_i[x xᵀ] of the weighted and centred coordinates, so that variances of their combinations are forms in it.
        centred = share[:, None] * (coordinates - (share[:, None] * coordinates).mean(0))
        spread = centred.T @ centred / self.examples
        for step, rates in self._pieces(segment):
            part = float(rates.sum())
            pace = float((rates**2).sum()) / part if part else 0.0
            # Σ_t η_t² of e^{−(Λ_j + Λ_k) z_t}, for every pair of directions
            paired = spread * filtered(rate[:, None] + rate[None, :], part) * pace
            added = torch.einsum("cj,jk,ck->c", v, paired, v) * self.steps_per_epoch / self.examples
            noise, plain = noise + added, plain + added
            so_far = so_far + coordinates @ (v * filtered(rate, part)).T
            if self._begins_epoch(step):
                noise = noise - variance(so_far, share) / self.examples
                so_far = torch.zeros_like(so_far)
            v = v * torch.exp(-part * rate)
        self.epoch = so_far
        left = basis.coordinates * torch.exp(-z * basis.eigenvalues)
        inverse = torch.where(basis.root > 0, 1 / basis.root, 0)
        self.vectors = left.to(basis.vectors) @ basis.vectors * inverse
        return gains, plain, noise

    def _pieces(self, segment: Segment) -> list[tuple[int, object]]:
        """The segment's steps by epoch, the last first: the first step of each piece, and its rates."""
        found, stop = [], segment.stop
        for step in range(segment.stop - 1, segment.start - 1, -1):
            if step == segment.start or self._begins_epoch(step):
                found.append((step, segment.rates[step - segment.start : stop - segment.start]))
                stop = step
        return found

    def _begins_epoch(self, step: int) -> bool:
        return step == 0 or int(step / self.steps_per_epoch + 1e-6) != int((step - 1) / self.steps_per_epoch + 1e-6)


def filtered(rate: Tensor, z: float) -> Tensor:
    """(1 − e^{−zΛ})/Λ, z where Λ is nothing."""
    small = rate * z < 1e-6
    return torch.where(small, torch.full_like(rate, z), -torch.expm1(-z * rate) / rate.where(~small, 1.0))


def variance(gains: Tensor, share: Tensor) -> Tensor:
    """`[C]` of gains `[examples, C]`, weighted as a batch's mean weighs them."""
    return (share[:, None] * (gains - (share[:, None] * gains).mean(0))).square().mean(0)


def shared_out(plain: Tensor, noise: Tensor) -> Tensor:
    """The variance of the whole run `[C]`, over its segments `[segments, C]`: as independent draws would have it between them."""
    total = torch.maximum(noise.sum(0), FLOOR * plain.sum(0))
    return torch.nan_to_num(plain / plain.sum(0)) * total


def target_shares(steps: Sequence[int], window: float) -> list[float]:
    """Of the checkpoints after these steps, the share of each in the mean over the last share `window` of the steps."""
    inside = [step > (1 - window) * steps[-1] or step == steps[-1] for step in steps]
    return [one / sum(inside) for one in inside]


def _orthonormal(vectors: Tensor) -> Tensor:
    """Rows that span the same space, and others where it is smaller than their number; no more than they have elements."""
    return torch.linalg.qr(vectors.T.double()).Q.T.to(vectors)
