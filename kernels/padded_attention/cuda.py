"""padded_attention by padded_attention.cu."""

from __future__ import annotations

import torch

from .._cuda.padded_attention import attend_to_padded
from ..sparse_rules import empty_heads


def padded_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor, scale: float | None
) -> torch.Tensor:
    o = empty_heads(q)
    attend_to_padded(q, k, v, start, scale, o)
    return o
