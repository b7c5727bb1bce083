"""layer_norm by rows.cu."""

from __future__ import annotations

import torch

from .._cuda.rows import process_rows


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    process_rows(x, gain=weight, bias=bias, eps=eps, centered=True, y=y)
    return y
