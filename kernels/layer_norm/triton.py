"""layer_norm as one read and one write of x."""

from __future__ import annotations

import torch

from .._triton.rows import normalize_rows


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    return normalize_rows(x, weight, bias, eps, centered=True, gain_offset=0.0)
