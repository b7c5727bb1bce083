"""The definition of padded_attention_quantize: attention's result in float32, quantized."""

from __future__ import annotations

import torch

from ..block_quantize.reference import quantize_activation
from ..padded_attention.reference import padded_attention_into
from ..sparse_rules import empty_heads


def padded_attention_quantize(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    scale: float | None,
    scheme: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    o = padded_attention_into(empty_heads(q).float(), q, k, v, start, scale)
    return quantize_activation(o.transpose(1, 2).flatten(2), scheme)
