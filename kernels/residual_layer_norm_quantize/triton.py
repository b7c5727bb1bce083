"""residual_layer_norm_quantize: one pass for 1×128 groups; for 128×128 blocks, the sum first."""

from __future__ import annotations

import torch

from .._triton.blocks import quantize_tiles
from .._triton.rows import Branch, quantize_normalized_rows
from ..schemes import SCHEMES


def residual_layer_norm_quantize(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    scheme: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rules = SCHEMES[scheme]
    stream = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    branch = Branch(y, gate, stream)
    if rules.activation_block[0] > 1:
        q, q_scale = quantize_tiles(
            x, rules, gain=weight, bias=bias, gain_offset=0.0, eps=eps, branch=branch
        )
    else:
        q, q_scale = quantize_normalized_rows(
            x, weight, bias, eps, rules, gain_offset=0.0, branch=branch
        )
    return stream, q, q_scale
