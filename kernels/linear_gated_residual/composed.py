"""linear_gated_residual as two operators: block_linear, stored as x is, then gated_residual."""

from __future__ import annotations

import torch

from ..block_linear import block_linear
from ..gated_residual import gated_residual


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
    y = block_linear(q, q_scale, weight, weight_scale, bias, scheme, x.dtype)
    return gated_residual(x, y, gate)
