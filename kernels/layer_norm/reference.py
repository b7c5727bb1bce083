"""The definition of layer_norm, in float32."""

from __future__ import annotations

import torch


def layer_norm_in_float(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """LN(x) · weight + bias, not rounded back to x's dtype."""
    weight = weight if weight is None else weight.float()
    bias = bias if bias is None else bias.float()
    return torch.nn.functional.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    return layer_norm_in_float(x, weight, bias, eps).to(x.dtype).contiguous()
