"""linear_gated_residual by linear.cu."""

from __future__ import annotations

import torch

from .._cuda import linear


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
    layer = linear.Layer(q, q_scale, weight, weight_scale, bias)
    return linear.linear_gated_residual(layer, x, gate)
