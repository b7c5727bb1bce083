"""Which angles τ are trained, from numbers evenly spread in [0, 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST = 1e-6
"""Of 1 − u and u, so that no noise level is 0 or infinite."""


@dataclass(frozen=True)
class LogNormalAngles:
    """τ = atan σ with ln σ normal: the times of the forward term.

    Source: EDM, arXiv 2206.00364, §5, as sCM (arXiv 2410.11081) and rCM (arXiv 2510.08431) take it.
    """

    mean: float = -0.8
    std: float = 1.6

    def at(self, u: Tensor) -> Tensor:
        """(B,) float64 in (0, π/2)."""
        normal = torch.special.ndtri(u.double().clamp(_LEAST, 1 - _LEAST))
        return torch.exp(self.mean + self.std * normal).atan()
