"""layer_norm_quantize by rows.cu in groups of 1×128, by blocks.cu in 128×128."""

from __future__ import annotations

import torch

from .._cuda.blocks import quantize_norm


def layer_norm_quantize(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, scheme: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_norm(x, weight, bias, eps, scheme, gain_offset=0)
