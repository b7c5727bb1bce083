"""rms_norm as one read and one write of x."""

from __future__ import annotations

import torch

from .._triton.rows import normalize_rows


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return normalize_rows(x, weight, None, eps, centered=False, gain_offset=0.0)
