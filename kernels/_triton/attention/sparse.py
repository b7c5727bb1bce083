"""Attention of each query block over the key blocks of its list, and the linear branch added.

    o = softmax(q·kᵀ · scale over the kept blocks)·v + branch

Without lists every block is kept: dense attention, also to keys of another number than queries.

q and k are int8, with a scale per query and per key block, or 16 bits. P and v are e4m3, v scaled
per channel, or 16 bits. Softmax runs online in base 2 (Milakov and Gimelshein, arXiv 1805.02867);
each block's product with v is summed in its own accumulator and added to the float32 result,
because Hopper's fp8 units keep fewer bits than float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOG2_448 = tl.constexpr(8.807354922057604)


@triton.jit
def _load_block(source, place, inner, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """Tile `place` of a tensor of contiguous (ROWS, COLUMNS) tiles."""
    if TMA:
        tile = source.load([place * ROWS, 0])
    else:
        tile = tl.load(source + place.to(tl.int64) * (ROWS * COLUMNS) + inner)
    return tile


@triton.jit
def _block_at(lists, index):
    """The key block at a place of the list; without one, blocks in order."""
    if lists is None:
        block = index
    else:
        block = tl.load(lists + index)
    return block


@triton.jit
def _attend_block(
    acc, largest, total,  # running sum, maximum (base 2) and normalizer of each query
    q, q_step, block, head_of_all, blocks, key_length,
    k, k_scale, v, k_token, v_token, k_inner, v_inner,
    scale,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    INT8: tl.constexpr, FP8: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One key block of the online softmax."""
    place = head_of_all * blocks + block
    token = block * BLOCK_K + tl.arange(0, BLOCK_K)
    if INT8:
        k_tile = _load_block(k, place, k_inner, BLOCK_K, HEAD_DIM, TMA)
        step = q_step * tl.load(k_scale + place)
        s = tl.dot(q, tl.trans(k_tile)).to(tl.float32) * step[:, None]
    else:
        channel = tl.arange(0, HEAD_DIM)
        at = token.to(tl.int64)[None, :] * k_token + channel[:, None]
        if MASKED:
            k_tile = tl.load(k + at, mask=(token < key_length)[None, :], other=0.0)
        else:
            k_tile = tl.load(k + at)
        s = tl.dot(q, k_tile) * scale
    if MASKED:
        s = tl.where((token < key_length)[None, :], s, -float("inf"))
    new_largest = tl.maximum(largest, tl.max(s, axis=1))
    shrink = tl.math.exp2(largest - new_largest)
    if FP8:
        p = tl.math.exp2(s - (new_largest - LOG2_448)[:, None])
    else:
        p = tl.math.exp2(s - new_largest[:, None])
    total = total * shrink + tl.sum(p, axis=1)
    if FP8:
        v_tile = _load_block(v, place, v_inner, HEAD_DIM, BLOCK_K, TMA)
        product = tl.dot(p.to(tl.float8e4nv), tl.trans(v_tile))
    else:
        channel = tl.arange(0, HEAD_DIM)
        at = token.to(tl.int64)[:, None] * v_token + channel[None, :]
        if MASKED:
            v_tile = tl.load(v + at, mask=(token < key_length)[:, None], other=0.0)
        else:
            v_tile = tl.load(v + at)
        product = tl.dot(p.to(v_tile.dtype), v_tile)
    return acc * shrink[:, None] + product, new_largest, total


@triton.jit
def attend(
    q,  # head h of token t of batch b at b·q_batch + t·q_token + h·q_head
    q_int8,  # (B·H, NQ, BLOCK_Q, D) int8, or None: q itself is attended with
    q_scale,  # (B·H, NQ, BLOCK_Q) float32
    k,  # (B·H, NK, BLOCK_K, D) int8; else 16 bits by strides, as q
    k_scale,  # (B·H, NK) float32
    v,  # (B·H, NK, D, BLOCK_K) e4m3; else 16 bits by strides, as q
    v_scale,  # (B·H, D) float32
    lists,  # (B·H, NQ, keep) int32, ascending; or None: every block
    o,  # as q, by strides
    branch,  # (B, L, H, D) of q's dtype, the linear branch's result; or None
    length,
    key_length,
    heads,
    keep,
    scale,  # of q·kᵀ, times log2(e)
    q_batch, q_token, q_head,
    k_batch, k_token, k_head,
    v_batch, v_token, v_head,
    o_batch, o_token, o_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FP8: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Each program takes one query block of one head."""
    INT8: tl.constexpr = q_int8 is not None
    block_q = tl.program_id(0)
    head_of_all = tl.program_id(1)
    batch = (head_of_all // heads).to(tl.int64)
    head = head_of_all % heads
    queries = tl.num_programs(0)
    blocks = tl.cdiv(key_length, BLOCK_K)
    channel = tl.arange(0, HEAD_DIM)
    token = (block_q * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
    exists = (token < length)[:, None]
    q += batch * q_batch + head * q_head
    place = head_of_all.to(tl.int64) * queries + block_q
    inside = tl.arange(0, BLOCK_Q)[:, None] * HEAD_DIM + channel[None, :]
    if INT8:
        q_tile = tl.load(q_int8 + place * (BLOCK_Q * HEAD_DIM) + inside)
        q_step = tl.load(q_scale + place * BLOCK_Q + tl.arange(0, BLOCK_Q)) * scale
    else:
        q_tile = tl.load(q + token[:, None] * q_token + channel[None, :], mask=exists, other=0.0)
        q_step = scale
        k += batch * k_batch + head * k_head
    if not FP8:
        v += batch * v_batch + head * v_head
    k_inner = tl.arange(0, BLOCK_K)[:, None] * HEAD_DIM + channel[None, :]
    v_inner = channel[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    acc = tl.zeros((BLOCK_Q, HEAD_DIM), dtype=tl.float32)
    largest = tl.full((BLOCK_Q,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    if lists is not None:
        lists += place * keep
    # Lists ascend, so that only a row's last block can be the partial one.
    for index in range(keep - 1):
        acc, largest, total = _attend_block(
            acc, largest, total, q_tile, q_step, _block_at(lists, index), head_of_all, blocks,
            key_length, k, k_scale, v, k_token, v_token, k_inner, v_inner, scale,
            HEAD_DIM, BLOCK_Q, BLOCK_K, INT8, FP8, TMA, False,
        )  # fmt: skip
    acc, largest, total = _attend_block(
        acc, largest, total, q_tile, q_step, _block_at(lists, keep - 1), head_of_all, blocks,
        key_length, k, k_scale, v, k_token, v_token, k_inner, v_inner, scale,
        HEAD_DIM, BLOCK_Q, BLOCK_K, INT8, FP8, TMA, True,
    )  # fmt: skip
    result = acc / total[:, None]
    if FP8:
        result *= tl.load(v_scale + head_of_all * HEAD_DIM + channel)[None, :]
    if branch is not None:
        at = ((batch * length + token[:, None]) * heads + head) * HEAD_DIM + channel[None, :]
        result += tl.load(branch + at, mask=exists, other=0.0).to(tl.float32)
    target = batch * o_batch + token[:, None] * o_token + head * o_head + channel[None, :]
    tl.store(o + target, result.to(o.dtype.element_ty), mask=exists)
