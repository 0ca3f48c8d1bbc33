"""VDU's term B = Σ (θᵢ − μᵢ)²/2vᵢ (arXiv 2510.04058): an anchor over the variance of checkpoints, or over what stands in for it."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ...parameters.anchors import Anchor, QuadraticAnchor, SumOfAnchors
from ...parameters.fisher import scaled_to_mean_one
from ...parameters.moments import ParameterMoments


logger = logging.getLogger(__name__)


class StabilityMixin:
    """The anchor that [`~hf_unlearn.VDUConfig`] sets by `stability_weight`, `checkpoints`, `variance_floor`, `stability` and `anchor`."""

    _precision_name: str | None = None

    def build_anchor(self) -> Anchor | None:
        anchors = [super().build_anchor(), self._stability()]
        anchors = [anchor for anchor in anchors if anchor is not None]
        return SumOfAnchors(*anchors) if anchors else None

    def _stability(self) -> Anchor | None:
        args, reference = self.args, self.reference.parameters
        if not args.stability_weight:
            return None
        moments = self._moments()
        precision = self._precision(moments)
        center = reference
        if args.anchor == "checkpoint_mean" and moments is not None:
            center = {name: moments.mean[name].to(value) for name, value in reference.items()}
        logger.info("stability: precision %s around %s", self.precision_name, args.anchor)
        return QuadraticAnchor(
            center, diagonal=precision, diagonal_weight=args.stability_weight, diagonal_name="stability"
        )

    @property
    def precision_name(self) -> str | None:
        """What stands in for 1/v in the term B, as log and card say it; None without the term."""
        if not self.args.stability_weight:
            return None
        return self._precision_name

    def _moments(self) -> ParameterMoments | None:
        """Mean and variance over the checkpoints; a resumed run reads what the first one computed."""
        if self.args.checkpoints is None:
            return None
        file = self.private_dir / "moments.safetensors"
        if self._resuming:
            if not file.is_file():
                raise ValueError(f"resume_from_checkpoint: {file} is missing; start again, or set stability_weight=0")
            return ParameterMoments.load(file, self.args.device)
        moments = ParameterMoments.from_checkpoints(
            self.args.checkpoints, self.reference.parameters, subfolder=self.architecture.part
        )
        if self.args.should_save:
            moments.save(file)
        return moments

    def _precision(self, moments: ParameterMoments | None) -> dict[str, Tensor]:
        """P of B = Σ Pᵢ(θᵢ − μᵢ)²: 1/2v, or half a Fisher information or an identity where there is no variance."""
        kind, count = self.args.stability, 0 if moments is None else moments.count
        if kind == "auto":
            kind = "inverse_variance" if count >= 2 else "fisher"
        if kind == "inverse_variance" and count < 2:
            raise ValueError(f"checkpoints: K = {count} has no variance; name two or more, or set stability='fisher'")
        if kind == "inverse_variance":
            self._precision_name = f"inverse variance over {count} checkpoints"
            precision = moments.precision(self.args.variance_floor)
            return {name: value.to(self.args.device) for name, value in precision.items()}
        self._precision_name = f"{kind}, scaled to a mean of one"
        if kind == "isotropic":
            return {name: torch.full_like(value, 0.5) for name, value in self.reference.parameters.items()}
        if self.args.stability == "auto":
            logger.warning(
                "checkpoints: K = %d has no variance; the stability term uses the Fisher information", count
            )
        return {name: value / 2 for name, value in scaled_to_mean_one(self._fisher()).items()}
