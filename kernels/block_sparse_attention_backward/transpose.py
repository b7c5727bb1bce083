"""The lists turned round: which query blocks keep each key block."""

from __future__ import annotations

from typing import NamedTuple

import torch


class TransposedLists(NamedTuple):
    """Compressed sparse rows, one for each key block of each head.

    Attributes:
        starts: (B·H·NK + 1,) int32; row r is `query_blocks[starts[r]:starts[r + 1]]`.
        query_blocks: (B·H·NQ·kept,) int32, ascending within a row.
    """

    starts: torch.Tensor
    query_blocks: torch.Tensor


def transpose_lists(lists: torch.Tensor, key_blocks: int) -> TransposedLists:
    """Rows of the key blocks from rows of the query blocks, without waiting for the device.

    Args:
        lists: (B, H, NQ, kept) int32.
        key_blocks: NK.
    """
    batch, heads, queries, kept = lists.shape
    head = torch.arange(batch * heads, device=lists.device)
    row = (lists.flatten(0, 1) + head[:, None, None] * key_blocks).flatten()
    order = row.argsort(stable=True)
    count = torch.zeros(batch * heads * key_blocks + 1, dtype=torch.int32, device=lists.device)
    count[1:].index_add_(0, row, torch.ones_like(row, dtype=torch.int32))
    starts = count.cumsum(0, dtype=torch.int32)
    return TransposedLists(starts, (order // kept % queries).to(torch.int32))
