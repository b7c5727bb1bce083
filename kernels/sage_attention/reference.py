"""The definition of sage_attention: its operands are rounded to 8 bits, its sums are float32."""

from __future__ import annotations

import torch

from ..sagesla.reference import round_operands
from ..sla.reference import softmax_attention
from ..sparse_rules import empty_heads

BLOCK_K = 128  # keys that share an int8 scale
QUERIES_AT_ONCE = 512  # bounds the memory of the scores


def sage_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, pv: str
) -> torch.Tensor:
    o = empty_heads(q)
    if q.numel() == 0:
        return o
    k32 = k.float()
    smooth = k32 - k32.mean(2, keepdim=True)
    q_rounded, k_rounded, v_rounded, round_p = round_operands(q.float(), smooth, v, BLOCK_K, pv)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    for first in range(0, q.shape[2], QUERIES_AT_ONCE):
        some = slice(first, first + QUERIES_AT_ONCE)
        o[:, :, some] = softmax_attention(
            q_rounded[:, :, some], k_rounded, v_rounded, scale, round_p
        )
    return o
