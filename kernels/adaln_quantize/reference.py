"""The definition of adaln_quantize, in float32."""

from __future__ import annotations

import torch

from ..adaln.reference import adaln_in_float
from ..block_quantize.reference import quantize_activation


def adaln_quantize(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, scheme: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_activation(adaln_in_float(x, scale, shift, eps), scheme)
