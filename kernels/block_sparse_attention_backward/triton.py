"""block_sparse_attention_backward in Triton: dq by query blocks, then dk and dv by key blocks.

The second kernel walks the transposed lists, so that no two programs add to the same gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from .._triton.tuning import fastest
from ..block_sparse_attention.triton import (
    LOG2_E,
    TileConfig,
    configs_of,
    head_offset,
    in_token_order,
    load_tokens,
    precision_of,
    store_tokens,
)
from ..sparse_rules import block_count, empty_heads
from . import BackwardArguments
from .transpose import transpose_lists

QUERY_CONFIGS = (TileConfig(64, 64, 4, 2), TileConfig(64, 64, 8, 2), TileConfig(128, 64, 8, 2))
KEY_CONFIGS = (TileConfig(64, 64, 4, 2), TileConfig(64, 64, 8, 2), TileConfig(64, 128, 8, 2))


@triton.jit
def _query_gradients(
    grad_o,  # (B, L, H, D) in memory, as q, k, v, o and dq
    q,
    k,
    v,
    o,
    log_sum,  # (B·H, L) float32
    lists,  # (B·H, NQ, keep) int32
    dq,
    delta,  # (B·H, L) float32, written here for the other kernel
    length,
    heads,
    queries,
    keep,
    scale,  # 1 / √D
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program takes TILE_Q queries of one block of one head."""
    head_of_all = tl.program_id(1)
    start = head_offset(head_of_all, length, heads, HEAD_DIM)
    token = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)
    block_q = tl.program_id(0) // (BLOCK_Q // TILE_Q)
    lists += (head_of_all.to(tl.int64) * queries + block_q) * keep
    q_tile = load_tokens(q + start, token, length, heads, HEAD_DIM)
    do_tile = load_tokens(grad_o + start, token, length, heads, HEAD_DIM)
    o_tile = load_tokens(o + start, token, length, heads, HEAD_DIM)
    own_delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), axis=1)
    at = head_of_all.to(tl.int64) * length + token
    tl.store(delta + at, own_delta, mask=token < length)
    # exp2(s − ∞) = 0 for tokens that do not exist.
    own_log_sum = tl.load(log_sum + at, mask=token < length, other=float("inf")) * LOG2_E
    acc = tl.zeros((TILE_Q, HEAD_DIM), dtype=tl.float32)
    TILES: tl.constexpr = BLOCK_K // TILE_K
    for index in range(keep * TILES):
        first = tl.load(lists + index // TILES) * BLOCK_K + (index % TILES) * TILE_K
        key = first + tl.arange(0, TILE_K)
        k_tile = load_tokens(k + start, key, length, heads, HEAD_DIM)
        v_tile = load_tokens(v + start, key, length, heads, HEAD_DIM)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2_E)
        s = tl.where((key < length)[None, :], s, -float("inf"))
        # Of huge scores the logarithm of the sum may be rounded below the score.
        p = tl.math.exp2(tl.minimum(s - own_log_sum[:, None], 0.0))
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
        ds = p * (dp - own_delta[:, None])
        acc += tl.dot(ds.to(k_tile.dtype), k_tile, input_precision=PRECISION)
    store_tokens(dq + start, acc * scale, token, length, heads, HEAD_DIM)


@triton.jit
def _key_gradients(
    grad_o,  # (B, L, H, D) in memory, as q, k, v, dk and dv
    q,
    k,
    v,
    log_sum,  # (B·H, L) float32
    delta,  # (B·H, L) float32
    starts,  # (B·H·NK + 1,) int32
    query_blocks,  # (B·H·NQ·keep,) int32
    dk,
    dv,
    length,
    heads,
    keys,
    scale,  # 1 / √D
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program takes TILE_K keys of one block of one head; scores are transposed."""
    head_of_all = tl.program_id(1)
    start = head_offset(head_of_all, length, heads, HEAD_DIM)
    key = tl.program_id(0) * TILE_K + tl.arange(0, TILE_K)
    row = head_of_all.to(tl.int64) * keys + tl.program_id(0) // (BLOCK_K // TILE_K)
    k_tile = load_tokens(k + start, key, length, heads, HEAD_DIM)
    v_tile = load_tokens(v + start, key, length, heads, HEAD_DIM)
    dk_acc = tl.zeros((TILE_K, HEAD_DIM), dtype=tl.float32)
    dv_acc = tl.zeros((TILE_K, HEAD_DIM), dtype=tl.float32)
    TILES: tl.constexpr = BLOCK_Q // TILE_Q
    begin = tl.load(starts + row)
    count = tl.load(starts + row + 1) - begin
    for index in range(count * TILES):
        block_q = tl.load(query_blocks + begin + index // TILES)
        token = block_q * BLOCK_Q + (index % TILES) * TILE_Q + tl.arange(0, TILE_Q)
        at = head_of_all.to(tl.int64) * length + token
        q_tile = load_tokens(q + start, token, length, heads, HEAD_DIM)
        do_tile = load_tokens(grad_o + start, token, length, heads, HEAD_DIM)
        their_log_sum = tl.load(log_sum + at, mask=token < length, other=float("inf")) * LOG2_E
        their_delta = tl.load(delta + at, mask=token < length, other=0.0)
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * (scale * LOG2_E)
        p = tl.math.exp2(tl.minimum(s - their_log_sum[None, :], 0.0))
        dv_acc += tl.dot(p.to(do_tile.dtype), do_tile, input_precision=PRECISION)
        dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
        ds = p * (dp - their_delta[None, :])
        dk_acc += tl.dot(ds.to(q_tile.dtype), q_tile, input_precision=PRECISION)
    store_tokens(dk + start, dk_acc * scale, key, length, heads, HEAD_DIM)
    store_tokens(dv + start, dv_acc, key, length, heads, HEAD_DIM)


def block_sparse_attention_backward(
    *arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_o, q, k, v, o, log_sum, lists, block_q, block_k = BackwardArguments(*arguments)
    batch, heads, length, head_dim = q.shape
    dq, dk, dv = empty_heads(q), empty_heads(q), empty_heads(q)
    if q.numel() == 0:
        return dq, dk, dv
    grad_o, q, k, v, o = (in_token_order(x) for x in (grad_o, q, k, v, o))
    lists, log_sum = lists.contiguous(), log_sum.contiguous()
    delta = torch.empty_like(log_sum)
    queries, keep = lists.shape[2:]
    keys = block_count(length, block_k)
    starts, query_blocks = transpose_lists(lists, keys)
    shape = {"HEAD_DIM": head_dim, "BLOCK_Q": block_q, "BLOCK_K": block_k}
    scale, precision = 1 / math.sqrt(head_dim), precision_of(q.dtype)

    def by_queries(config: TileConfig) -> None:
        _query_gradients[(queries * (block_q // config.q), batch * heads)](
            grad_o, q, k, v, o, log_sum, lists, dq, delta, length, heads, queries, keep, scale,
            **shape, TILE_Q=config.q, TILE_K=config.k, PRECISION=precision,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    def by_keys(config: TileConfig) -> None:
        _key_gradients[(keys * (block_k // config.k), batch * heads)](
            grad_o, q, k, v, log_sum, delta, starts, query_blocks, dk, dv,
            length, heads, keys, scale,
            **shape, TILE_Q=config.q, TILE_K=config.k, PRECISION=precision,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    problem = (q.device, q.dtype, q.shape, keep, block_q, block_k)
    for name, launch, configs in (("dq", by_queries, QUERY_CONFIGS), ("dk", by_keys, KEY_CONFIGS)):
        allowed = configs_of(q.dtype, configs, block_q, block_k)
        launch(fastest((name, *problem), allowed, launch))
    return dq, dk, dv
