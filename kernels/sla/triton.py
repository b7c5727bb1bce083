"""sla by the kernels of _triton/attention, in 16 bits."""

from __future__ import annotations

import torch

from .._triton.attention.launch import Blocks, Projection, sparse_linear_attention
from ..sparse_rules import empty_heads


def sla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    proj_weight: torch.Tensor | None,
    proj_bias: torch.Tensor | None,
    topk: float,
    block_q: int,
    block_k: int,
    feature_map: str,
) -> torch.Tensor:
    o = empty_heads(q)
    projection = None if proj_weight is None else Projection(proj_weight, proj_bias, feature_map)
    sparse_linear_attention(q, k, v, o, Blocks(topk, block_q, block_k), projection=projection)
    return o
