"""layer_norm_quantize: one pass for 1×128 groups; for 128×128 blocks, statistics first."""

from __future__ import annotations

import torch

from .._triton.blocks import quantize_tiles
from .._triton.rows import quantize_normalized_rows
from ..schemes import SCHEMES


def layer_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    scheme: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    rules = SCHEMES[scheme]
    if rules.activation_block[0] > 1:
        return quantize_tiles(x, rules, gain=weight, bias=bias, eps=eps)
    return quantize_normalized_rows(x, weight, bias, eps, rules, gain_offset=0.0)
