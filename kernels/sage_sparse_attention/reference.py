"""The definition of sage_sparse_attention: operands rounded to 8 bits, sums in float32."""

from __future__ import annotations

import torch

from ..sagesla.reference import round_operands
from ..sla.reference import sparse_attention
from ..sparse_rules import empty_heads


def sage_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: torch.Tensor,
    block_q: int,
    block_k: int,
    pv: str,
) -> torch.Tensor:
    if q.numel() == 0:
        return empty_heads(q)
    k32 = k.float()
    smooth = k32 - k32.mean(2, keepdim=True)
    q_rounded, k_rounded, v_rounded, round_p = round_operands(q.float(), smooth, v, block_k, pv)
    o = sparse_attention(q_rounded, k_rounded, v_rounded, lists, block_q, block_k, round_p)
    return empty_heads(q).copy_(o)
