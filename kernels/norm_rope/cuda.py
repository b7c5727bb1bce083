"""norm_rope by rows.cu."""

from __future__ import annotations

import torch

from .._cuda.rows import process_rows


def norm_rope(
    x: torch.Tensor, weight: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    head_dim = 2 * cos.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    process_rows(x, gain=weight, eps=eps, tables=(cos, sin), y=y)
    return y.unflatten(-1, (-1, head_dim))
