"""The definition of linear_gelu_quantize, in float32."""

from __future__ import annotations

import torch

from ..block_linear.reference import block_linear
from ..gelu_quantize.reference import gelu_quantize


def linear_gelu_quantize(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    scheme: str,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = block_linear(q, q_scale, weight, weight_scale, bias, scheme, torch.float32)
    return gelu_quantize(y, scheme)
