"""Attention to keys that are all alike from a token on, which is read on the device."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..device import block_scale, to_quantized

ROWS, KEYS = 64, 32  # of a tile of scores; small ones, as a prompt has few


@triton.jit
def attend_padded(
    q, k, v,  # by strides: batch, head, token; channels are contiguous
    start,  # (B,) int32
    o,  # (B, H, L, D) by strides, 16 bits; or e4m3 where there is o_scale
    o_scale,  # (B·L, H) float32 with strides (1, B·L), or None
    length, keys, heads, batches, scale,
    q_batch, q_head, q_token,
    k_batch, k_head, k_token,
    v_batch, v_head, v_token,
    o_batch, o_head, o_token,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """A program has ROWS queries of one head, and goes over the keys before the padding and one."""
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, HEAD_DIM)
    inside = (row < length)[:, None]
    q += batch.to(tl.int64) * q_batch + head * q_head
    k += batch.to(tl.int64) * k_batch + head * k_head
    v += batch.to(tl.int64) * v_batch + head * v_head
    o += batch.to(tl.int64) * o_batch + head * o_head
    wide_row = row.to(tl.int64)[:, None]
    q_tile = tl.load(q + wide_row * q_token + channel[None, :], mask=inside, other=0.0)
    padding = tl.load(start + batch)
    added = tl.log2((keys - padding).to(tl.float32))
    largest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    for first in range(0, padding + 1, KEYS):
        key = first + tl.arange(0, KEYS)
        present = key <= padding
        token = tl.where(key == padding, keys - 1, key)
        k_tile = tl.load(
            k + token[None, :] * k_token + channel[:, None], mask=present[None, :], other=0.0
        )
        scores = tl.dot(q_tile, k_tile) * scale
        scores += tl.where(key == padding, added, tl.where(present, 0.0, -float("inf")))[None, :]
        higher = tl.maximum(largest, tl.max(scores, axis=1))
        p = tl.math.exp2(scores - higher[:, None])
        shrink = tl.math.exp2(largest - higher)
        total = total * shrink + tl.sum(p, axis=1)
        v_tile = tl.load(
            v + token[:, None] * v_token + channel[None, :], mask=present[:, None], other=0.0
        )
        sums = sums * shrink[:, None] + tl.dot(p.to(v_tile.dtype), v_tile)
        largest = higher
    sums = sums / total[:, None]
    at = o + wide_row * o_token + channel[None, :]
    if o_scale is None:
        tl.store(at, sums.to(o.dtype.element_ty), mask=inside)
    else:
        steps = block_scale(tl.max(tl.abs(sums), axis=1), 448.0)
        tl.store(at, to_quantized(sums, steps[:, None], o.dtype.element_ty), mask=inside)
        rows = tl.cast(length, tl.int64) * batches
        place = head * rows + batch * length + row
        tl.store(o_scale + place, steps, mask=row < length)


def attend_to_padded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    scale: float | None,
    o: torch.Tensor,
    o_scale: torch.Tensor | None = None,
) -> None:
    """Write `padded_attention` into `o`.

    Args:
        q, k, v, start, scale: as `turbo_opt.kernels.padded_attention` takes them, in 16 bits.
        o: (B, H, L, D), channels contiguous; e4m3 where `o_scale` is given, which D = 128 needs.
        o_scale: (B·L, H) float32 with strides (1, B·L).
    """
    if q.numel() == 0:
        return
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, length, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    attend_padded[(triton.cdiv(length, ROWS), batch * heads)](
        q, k, v, start.contiguous(), o, o_scale,
        length, k.shape[2], heads, batch, math.log2(math.e) * scale,
        *(stride for x in (q, k, v, o) for stride in x.stride()[:3]),
        HEAD_DIM=head_dim, ROWS=ROWS, KEYS=KEYS,
        num_warps=4, num_stages=2,
    )  # fmt: skip
