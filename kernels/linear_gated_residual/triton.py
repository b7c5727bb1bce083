"""linear_gated_residual by block_linear's tiled product."""

from __future__ import annotations

import torch

from ..block_linear.triton import Residual, block_linear


def linear_gated_residual(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor,
    gate: torch.Tensor | None,
    scheme: str,
) -> torch.Tensor:
    residual = Residual(x, gate)
    return block_linear(q, q_scale, weight, weight_scale, bias, scheme, x.dtype, residual)
