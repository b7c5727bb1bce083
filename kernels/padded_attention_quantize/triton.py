"""padded_attention_quantize in one pass: a program holds the heads that it quantizes."""

from __future__ import annotations

import torch

from .._triton.attention.padded import attend_to_padded
from . import fake


def padded_attention_quantize(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    scale: float | None,
    scheme: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    quantized, o_scale = fake(q, k, v, start, scale, scheme)
    heads = quantized.unflatten(-1, (q.shape[1], q.shape[3])).transpose(1, 2)
    attend_to_padded(q, k, v, start, scale, heads, o_scale)
    return quantized, o_scale
