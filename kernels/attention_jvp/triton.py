"""attention_jvp in Triton: an online softmax that also sums what moves.

What is the same for all keys of a row of tS moves nothing, but would be rounded with P ∘ tS where
keys have much in common, as a model's do. So tS is taken relative to its value at the mean key.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .._triton.tuning import fastest
from ..block_sparse_attention.triton import (
    LOG2_E,
    TileConfig,
    head_offset,
    in_token_order,
    load_tokens,
    precision_of,
    store_tokens,
)
from ..sparse_rules import empty_heads

# Two sums of TILE_Q×D and two tiles of scores lie in registers: eight warps, or short tiles.
CONFIGS = (
    TileConfig(128, 64, 8, 2),
    TileConfig(128, 32, 8, 3),
    TileConfig(64, 64, 4, 2),
    TileConfig(64, 64, 8, 2),
    TileConfig(64, 32, 4, 3),
)
FLOAT32_CONFIGS = (TileConfig(32, 32, 8, 1),)  # four bytes and no tensor cores: small tiles


@triton.jit
def _attend(
    q,  # (B, L, H, D) in memory, as tq, o and to
    k,  # (B, Lk, H, D) in memory, as v, tk and tv
    v,
    tq,
    tk,
    tv,
    k_mean,  # (B·H, D) float32, as tk_mean
    tk_mean,
    o,
    to,
    length,
    keys,
    heads,
    scale,  # 1 / √D
    log2_scale,  # log2(e) / √D
    HEAD_DIM: tl.constexpr,
    KEYS_MOVE: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program takes TILE_Q queries of one head."""
    head_of_all = tl.program_id(1)
    start = head_offset(head_of_all, length, heads, HEAD_DIM)
    key_start = head_offset(head_of_all, keys, heads, HEAD_DIM)
    token = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)
    q_tile = load_tokens(q + start, token, length, heads, HEAD_DIM)
    tq_tile = load_tokens(tq + start, token, length, heads, HEAD_DIM)
    channel = head_of_all * HEAD_DIM + tl.arange(0, HEAD_DIM)
    common = tl.sum(tq_tile.to(tl.float32) * tl.load(k_mean + channel)[None, :], axis=1)
    if KEYS_MOVE:
        common += tl.sum(q_tile.to(tl.float32) * tl.load(tk_mean + channel)[None, :], axis=1)
    acc = tl.zeros((TILE_Q, HEAD_DIM), dtype=tl.float32)
    moved = tl.zeros((TILE_Q, HEAD_DIM), dtype=tl.float32)
    largest = tl.full((TILE_Q,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((TILE_Q,), dtype=tl.float32)
    total_moved = tl.zeros((TILE_Q,), dtype=tl.float32)
    for first in range(0, keys, TILE_K):
        key = first + tl.arange(0, TILE_K)
        k_tile = load_tokens(k + key_start, key, keys, heads, HEAD_DIM)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * log2_scale
        ts = tl.dot(tq_tile, tl.trans(k_tile), input_precision=PRECISION)
        if KEYS_MOVE:
            tk_tile = load_tokens(tk + key_start, key, keys, heads, HEAD_DIM)
            ts = tl.dot(q_tile, tl.trans(tk_tile), ts, input_precision=PRECISION)
        s = tl.where((key < keys)[None, :], s, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(s, axis=1))
        shrink = tl.math.exp2(largest - new_largest)
        p = tl.math.exp2(s - new_largest[:, None])
        p_ts = p * ((ts - common[:, None]) * scale)
        total = total * shrink + tl.sum(p, axis=1)
        total_moved = total_moved * shrink + tl.sum(p_ts, axis=1)
        v_tile = load_tokens(v + key_start, key, keys, heads, HEAD_DIM)
        p_16 = p.to(v_tile.dtype)
        acc = tl.dot(p_16, v_tile, acc * shrink[:, None], input_precision=PRECISION)
        moved = tl.dot(
            p_ts.to(v_tile.dtype), v_tile, moved * shrink[:, None], input_precision=PRECISION
        )
        if KEYS_MOVE:
            tv_tile = load_tokens(tv + key_start, key, keys, heads, HEAD_DIM)
            moved = tl.dot(p_16, tv_tile, moved, input_precision=PRECISION)
        largest = new_largest
    result = acc / total[:, None]
    store_tokens(o + start, result, token, length, heads, HEAD_DIM)
    moved = (moved - total_moved[:, None] * result) / total[:, None]
    store_tokens(to + start, moved, token, length, heads, HEAD_DIM)


def attention_jvp(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tq: torch.Tensor,
    tk: torch.Tensor | None,
    tv: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, head_dim = q.shape
    o, to = empty_heads(q), empty_heads(q)
    if q.numel() == 0:
        return o, to
    keys, keys_move = k.shape[2], tk is not None
    q, k, v, tq = (in_token_order(x) for x in (q, k, v, tq))
    # What stays is not read: any pointer will do.
    tk, tv = (k if x is None else in_token_order(x) for x in (tk, tv))
    k_mean = k.mean(2, dtype=torch.float32).contiguous()
    tk_mean = tk.mean(2, dtype=torch.float32).contiguous() if keys_move else k_mean

    def launch(config: TileConfig) -> None:
        _attend[(triton.cdiv(length, config.q), batch * heads)](
            q, k, v, tq, tk, tv, k_mean, tk_mean, o, to, length, keys, heads,
            1 / math.sqrt(head_dim), LOG2_E.value / math.sqrt(head_dim),
            HEAD_DIM=head_dim, KEYS_MOVE=keys_move,
            TILE_Q=config.q, TILE_K=config.k, PRECISION=precision_of(q.dtype),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    problem = ("attention_jvp", q.device, q.dtype, q.shape, keys, keys_move)
    launch(fastest(problem, FLOAT32_CONFIGS if q.dtype is torch.float32 else CONFIGS, launch))
    return o, to
