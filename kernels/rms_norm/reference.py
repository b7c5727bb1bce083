"""The definition of rms_norm, in float32."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    values = x.float()
    normalized = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        normalized = normalized * weight.float()
    return normalized.to(x.dtype).contiguous()
