"""adaln_quantize: one pass for 1×128 groups; for 128×128 blocks, statistics first."""

from __future__ import annotations

import torch

from .._triton.blocks import quantize_tiles
from .._triton.rows import quantize_normalized_rows
from ..schemes import SCHEMES


def adaln_quantize(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, scheme: str
) -> tuple[torch.Tensor, torch.Tensor]:
    rules = SCHEMES[scheme]
    if rules.activation_block[0] > 1:
        return quantize_tiles(x, rules, gain=scale, bias=shift, gain_offset=1.0, eps=eps)
    return quantize_normalized_rows(x, scale, shift, eps, rules, gain_offset=1.0)
