"""layer_norm_quantize: one pass for 1×128 groups; for 128×128 blocks, statistics first."""

from __future__ import annotations

import torch

from .._triton.blocks import quantize_norm


def layer_norm_quantize(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, scheme: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_norm(x, weight, bias, eps, scheme, gain_offset=0.0)
