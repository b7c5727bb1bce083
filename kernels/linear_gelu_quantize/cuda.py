"""linear_gelu_quantize by linear.cu."""

from __future__ import annotations

import torch

from .._cuda import linear


def linear_gelu_quantize(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    scheme: str,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    return linear.linear_gelu_quantize(linear.Layer(q, q_scale, weight, weight_scale, bias))
