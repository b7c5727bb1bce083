"""adaln as one read and one write of x."""

from __future__ import annotations

import torch

from .._triton.rows import normalize_rows


def adaln(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    return normalize_rows(x, scale, shift, eps, centered=True, gain_offset=1.0)
