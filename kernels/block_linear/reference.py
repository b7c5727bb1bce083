"""The definition of block_linear, in float32."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from ..block_quantize import dequantize_activation, dequantize_weight


def block_linear(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    scheme: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    x = dequantize_activation(q, q_scale, scheme)
    bias = bias if bias is None else bias.float()
    return linear(x, dequantize_weight(weight, weight_scale), bias).to(dtype).contiguous()
