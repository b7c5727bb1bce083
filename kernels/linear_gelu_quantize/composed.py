"""linear_gelu_quantize as two operators: block_linear, stored in `dtype`, then gelu_quantize."""

from __future__ import annotations

import torch

from ..block_linear import block_linear
from ..gelu_quantize import gelu_quantize


def linear_gelu_quantize(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    scheme: str,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = block_linear(q, q_scale, weight, weight_scale, bias, scheme, dtype)
    return gelu_quantize(y, scheme)
