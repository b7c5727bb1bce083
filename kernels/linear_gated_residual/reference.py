"""The definition of linear_gated_residual, in float32."""

from __future__ import annotations

import torch

from ..block_linear.reference import block_linear


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
    y = block_linear(q, q_scale, weight, weight_scale, bias, scheme, torch.float32)
    branch = y if gate is None else y * gate.float()
    return (x.float() + branch).to(x.dtype).contiguous()
