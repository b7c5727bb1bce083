"""block_linear by linear.cu."""

from __future__ import annotations

import torch

from .._cuda.linear import Layer, linear


def block_linear(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    scheme: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    return linear(Layer(q, q_scale, weight, weight_scale, bias))
