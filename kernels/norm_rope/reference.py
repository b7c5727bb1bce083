"""The definition of norm_rope, in float32."""

from __future__ import annotations

import torch


def norm_rope(
    x: torch.Tensor, weight: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    return norm_rope_in_float(x, weight, cos, sin, eps).to(x.dtype).contiguous()


def norm_rope_in_float(
    x: torch.Tensor, weight: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    """(B, L, H, D) float32, not rounded."""
    values = x.float()
    values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        values = values * weight.float()
    first, second = values.unflatten(-1, (-1, cos.shape[-1], 2)).unbind(-1)
    turned = (first * cos - second * sin, first * sin + second * cos)
    return torch.stack(turned, -1).flatten(-2)
