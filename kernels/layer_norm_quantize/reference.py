"""The definition of layer_norm_quantize, in float32."""

from __future__ import annotations

import torch

from ..block_quantize.reference import quantize_activation
from ..layer_norm.reference import layer_norm_in_float


def layer_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    scheme: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_activation(layer_norm_in_float(x, weight, bias, eps), scheme)
