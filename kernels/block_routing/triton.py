"""block_routing: scores by the library, then each row's threshold bit by bit, then the indices."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SCORES_PER_PROGRAM = 1024  # of one warp: warps that share a row would wait for each count


@triton.jit
def _keep_highest(
    scores,  # (rows, keys) float32
    lists,  # (rows, keep) int32
    rows,
    keys,
    keep,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,  # keys rounded up to a power of two
):
    """The `keep`-th highest score of each row is found from its highest bit to its lowest."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    key = tl.arange(0, KEYS)
    inside = (row < rows)[:, None] & (key < keys)[None, :]
    at = row.to(tl.int64)[:, None] * keys + key[None, :]
    bits = tl.load(scores + at, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    # Integers that sort as the floats do; 0 is below every score.
    rank = tl.where(bits < 0, ~bits, bits | -2147483648).to(tl.uint32, bitcast=True)
    rank = tl.where(inside, rank, 0)
    threshold = tl.zeros((ROWS,), dtype=tl.uint32)
    bit = tl.full((), 1 << 31, dtype=tl.uint32)
    for _ in range(32):
        candidate = threshold | bit
        above = tl.sum((rank >= candidate[:, None]).to(tl.int32), axis=1)
        threshold = tl.where(above >= keep, candidate, threshold)
        bit = bit >> 1
    higher = rank > threshold[:, None]
    equal = rank == threshold[:, None]
    room = keep - tl.sum(higher.to(tl.int32), axis=1)
    chosen = higher | (equal & (tl.cumsum(equal.to(tl.int32), axis=1) <= room[:, None]))
    position = tl.cumsum(chosen.to(tl.int32), axis=1) - 1
    target = row.to(tl.int64)[:, None] * keep + position
    tl.store(lists + target, tl.broadcast_to(key[None, :], (ROWS, KEYS)), mask=chosen & inside)


def block_routing(q_means: torch.Tensor, k_means: torch.Tensor, keep: int) -> torch.Tensor:
    scores = q_means @ k_means.transpose(-1, -2)
    *outer, keys = scores.shape
    lists = torch.empty((*outer, keep), dtype=torch.int32, device=scores.device)
    rows, width = lists.numel() // keep, max(16, triton.next_power_of_2(keys))
    rows_at_once = max(1, SCORES_PER_PROGRAM // width)
    _keep_highest[(triton.cdiv(rows, rows_at_once),)](
        scores, lists, rows, keys, keep, ROWS=rows_at_once, KEYS=width, num_warps=1
    )
    return lists
