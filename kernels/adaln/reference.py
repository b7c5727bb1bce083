"""The definition of adaln, in float32."""

from __future__ import annotations

import torch
from torch.nn.functional import layer_norm


def adaln_in_float(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float
) -> torch.Tensor:
    """LN(x) · (1 + scale) + shift, not rounded back to x's dtype."""
    normalized = layer_norm(x.float(), x.shape[-1:], eps=eps)
    return normalized * (1 + scale.float()) + shift.float()


def adaln(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    return adaln_in_float(x, scale, shift, eps).to(x.dtype).contiguous()
