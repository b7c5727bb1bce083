"""adaln_quantize: one pass for 1×128 groups; for 128×128 blocks, statistics first."""

from __future__ import annotations

import torch

from .._triton.blocks import quantize_norm


def adaln_quantize(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, scheme: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_norm(x, scale, shift, eps, scheme, gain_offset=1.0)
