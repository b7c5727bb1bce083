"""sage_sparse_attention by the kernels of _triton/attention."""

from __future__ import annotations

import torch

from .._triton.attention.launch import (
    Blocks,
    attend_on_hopper,
    attend_prepared,
    prepare,
    prepare_on_hopper,
)
from ..sparse_rules import empty_heads

ALL_BLOCKS = 1.0  # a share that nobody reads: the lists are given


def sage_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: torch.Tensor,
    block_q: int,
    block_k: int,
    pv: str,
    cuda: bool = False,
) -> torch.Tensor:
    o = empty_heads(q)
    if q.numel() == 0:
        return o
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    lists = lists.contiguous()
    if cuda:
        attend_on_hopper(o, lists, prepare_on_hopper(q, k, v, None, None))
        return o
    blocks = Blocks(ALL_BLOCKS, block_q, block_k)
    ready = prepare(q, k, v, blocks, rotation=None, projection=None, int8=True, fp8=pv == "fp8")
    attend_prepared(q, k, v, o, lists, ready, blocks)
    return o
