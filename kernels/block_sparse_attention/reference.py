"""The definition of block_sparse_attention, in float32 (float64 for float64)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..sla.reference import QUERY_BLOCKS_AT_ONCE, gather_blocks, split_blocks
from ..sparse_rules import empty_heads


class Attended(NamedTuple):
    """Some query blocks Q with the J·block_k keys and values that they keep."""

    some: slice
    q: torch.Tensor  # (B, H, Q, block_q, D)
    k: torch.Tensor  # (B, H, Q, J·block_k, D)
    v: torch.Tensor
    s: torch.Tensor  # (B, H, Q, block_q, J·block_k), scaled scores; −∞ beyond the last token


def attended_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: torch.Tensor,
    block_q: int,
    block_k: int,
) -> Iterator[Attended]:
    """The scores of a few query blocks at a time, so that memory stays far below L²."""
    length, head_dim = q.shape[2:]
    q_blocks = split_blocks(q, block_q)
    k_blocks, v_blocks = split_blocks(k, block_k), split_blocks(v, block_k)
    inside = torch.arange(block_k, device=q.device)
    for first in range(0, q_blocks.shape[2], QUERY_BLOCKS_AT_ONCE):
        some = slice(first, first + QUERY_BLOCKS_AT_ONCE)
        chosen = lists[:, :, some].long()
        k_kept, v_kept = gather_blocks(k_blocks, chosen), gather_blocks(v_blocks, chosen)
        token = (chosen[..., None] * block_k + inside).flatten(-2)
        s = q_blocks[:, :, some] @ k_kept.mT * head_dim**-0.5
        s = s.masked_fill((token >= length)[..., None, :], -torch.inf)
        yield Attended(some, q_blocks[:, :, some], k_kept, v_kept, s)


def computing_dtype(q: torch.Tensor) -> torch.dtype:
    """What sums are kept in."""
    return torch.float64 if q.dtype is torch.float64 else torch.float32


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: torch.Tensor,
    block_q: int,
    block_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    length, dtype = q.shape[2], computing_dtype(q)
    o, log_sum = empty_heads(q), q.new_empty(q.shape[:3], dtype=dtype)
    if q.numel() == 0:
        return o, log_sum
    for part in attended_blocks(q.to(dtype), k.to(dtype), v.to(dtype), lists, block_q, block_k):
        tokens = slice(part.some.start * block_q, min(part.some.stop * block_q, length))
        count = tokens.stop - tokens.start
        part_log_sum = part.s.logsumexp(-1)
        p = (part.s - part_log_sum[..., None]).exp()
        o[:, :, tokens] = (p @ part.v).flatten(2, 3)[:, :, :count].to(o.dtype)
        log_sum[:, :, tokens] = part_log_sum.flatten(2)[:, :, :count]
    return o, log_sum
