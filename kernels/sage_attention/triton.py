"""sage_attention by the kernels of _triton/attention."""

from __future__ import annotations

import torch

from .._triton.attention.launch import dense_attention
from ..sparse_rules import empty_heads


def sage_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, pv: str
) -> torch.Tensor:
    o = empty_heads(q)
    dense_attention(q, k, v, o, scale, fp8=pv == "fp8")
    return o
