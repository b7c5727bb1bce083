"""sla2 by kernels: the sparse branch by other operators, the linear branch and the mix by two.

The linear branch costs one product of the 0/1 matrix of blocks that are not kept, (NQ, NK), with
the blocks' states, (NK, D·D), by the library: the states are read once for many query blocks, which
a sum in each query block's own program would not do. Products are in q's dtype, sums in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..block_sparse_attention.triton import (
    head_offset,
    in_token_order,
    load_tokens,
    precision_of,
    store_tokens,
)
from ..sparse_rules import NORMALIZER_EPS, block_count, empty_heads, kept_blocks
from .reference import block_ratios, not_kept


class Tile(NamedTuple):
    """How a kernel runs: tokens of a block that are multiplied at a time, warps, stages."""

    tokens: int
    warps: int
    stages: int


KEYS_TILE = Tile(tokens=32, warps=8, stages=2)
QUERIES_TILE = Tile(tokens=64, warps=4, stages=1)
FLOAT32_QUERIES_TILE = Tile(tokens=32, warps=8, stages=1)  # the matrix alone fills registers


@triton.jit
def _feature(x, MAP: tl.constexpr):
    """φ over the channels of float32 rows."""
    if MAP == "softmax":
        x = tl.exp(x - tl.max(x, axis=1)[:, None])
        x = x / tl.sum(x, axis=1)[:, None]
    elif MAP == "elu":
        x = tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    else:
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def _block_states(
    k,  # (B, L, H, D) in memory, as v
    v,
    states,  # (B·H, NK, D, D) of their dtype: φ(k)ᵀv of each key block, times `scale`
    sums,  # (B·H, NK, D) float32: Σφ(k) of each key block, times `scale`
    length,
    heads,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    MAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program takes one key block of one head, TOKENS at a time."""
    block = tl.program_id(0)
    head_of_all = tl.program_id(1)
    start = head_offset(head_of_all, length, heads, HEAD_DIM)
    channel = tl.arange(0, HEAD_DIM)
    state = tl.zeros((HEAD_DIM, HEAD_DIM), dtype=tl.float32)
    total = tl.zeros((HEAD_DIM,), dtype=tl.float32)
    for first in range(0, BLOCK, TOKENS):
        token = block * BLOCK + first + tl.arange(0, TOKENS)
        phi = _feature(load_tokens(k + start, token, length, heads, HEAD_DIM).to(tl.float32), MAP)
        phi = tl.where((token < length)[:, None], phi, 0.0)
        v_tile = load_tokens(v + start, token, length, heads, HEAD_DIM)
        total += tl.sum(phi, axis=0)
        state += tl.dot(tl.trans(phi.to(v_tile.dtype)), v_tile, input_precision=PRECISION)
    place = head_of_all.to(tl.int64) * tl.num_programs(0) + block
    at = channel[:, None] * HEAD_DIM + channel[None, :]
    target = states + place * (HEAD_DIM * HEAD_DIM) + at
    tl.store(target, (state * scale).to(states.dtype.element_ty))
    tl.store(sums + place * HEAD_DIM + channel, total * scale)


@triton.jit
def _mix(
    q,  # (B, L, H, D) in memory, as o
    o,  # the sparse branch's result, which is replaced by the mix
    state,  # (B·H, NQ, D, D) of q's dtype
    normalizer,  # (B·H, NQ, D) float32
    alpha,  # (B·H, NQ) float32
    length,
    heads,
    queries,
    eps,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    MAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program takes TOKENS queries of one block of one head."""
    head_of_all = tl.program_id(1)
    start = head_offset(head_of_all, length, heads, HEAD_DIM)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    place = head_of_all.to(tl.int64) * queries + tl.program_id(0) // (BLOCK // TOKENS)
    channel = tl.arange(0, HEAD_DIM)
    q_tile = load_tokens(q + start, token, length, heads, HEAD_DIM)
    phi = _feature(q_tile.to(tl.float32), MAP)
    at = channel[:, None] * HEAD_DIM + channel[None, :]
    matrix = tl.load(state + place * (HEAD_DIM * HEAD_DIM) + at)
    weight = tl.load(normalizer + place * HEAD_DIM + channel)
    total = tl.sum(phi * weight[None, :], axis=1) + eps
    linear = tl.dot(phi.to(matrix.dtype), matrix, input_precision=PRECISION) / total[:, None]
    share = tl.load(alpha + place)
    sparse = load_tokens(o + start, token, length, heads, HEAD_DIM).to(tl.float32)
    mixed = share * sparse + (1.0 - share) * linear
    store_tokens(o + start, mixed, token, length, heads, HEAD_DIM)


def sla2(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    proj_q: torch.Tensor,
    proj_k: torch.Tensor,
    alpha_weight: torch.Tensor,
    alpha_bias: torch.Tensor,
    topk: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    qk: str,
    pv: str,
) -> torch.Tensor:
    if q.numel() == 0:
        return empty_heads(q)
    ops = torch.ops.turbo_opt
    length = q.shape[2]
    q, k, v = (in_token_order(x) for x in (q, k, v))
    q_means, k_means = _means(q, block_q), _means(k, block_k)
    keep, keys = kept_blocks(topk, length, block_k), block_count(length, block_k)
    lists = ops.block_routing.default(
        q_means @ proj_q.float().mT, _centered(k_means, length, block_k) @ proj_k.float().mT, keep
    )
    if qk == "int8":
        o = ops.sage_sparse_attention.default(q, k, v, lists, block_q, block_k, pv)
    else:
        o, _ = ops.block_sparse_attention.default(q, k, v, lists, block_q, block_k)
    if keep < keys:
        alpha = block_ratios(q_means, alpha_weight, alpha_bias)
        _mix_with_linear(q, k, v, o, lists, alpha, block_q, block_k, feature_map)
    return o


def _means(x_BHLD: torch.Tensor, block: int) -> torch.Tensor:
    """The mean token of every block, (B, H, blocks, D) float32, without a copy of x in float32."""
    whole = x_BHLD.shape[2] // block * block
    parts = [x_BHLD[:, :, :whole].unflatten(2, (-1, block)).mean(3, dtype=torch.float32)]
    if whole < x_BHLD.shape[2]:
        parts.append(x_BHLD[:, :, whole:].mean(2, keepdim=True, dtype=torch.float32))
    return torch.cat(parts, 2)


def _centered(means: torch.Tensor, length: int, block: int) -> torch.Tensor:
    """Block means less the mean of all tokens; the last block may be short."""
    starts = torch.arange(0, length, block, device=means.device)
    sizes = (length - starts).clamp_max(block)
    return means - (means * sizes[:, None]).sum(2, keepdim=True) / length


def _mix_with_linear(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lists: torch.Tensor,
    alpha: torch.Tensor,
    block_q: int,
    block_k: int,
    feature_map: str,
) -> None:
    """o ← α∘o + (1 − α)∘(linear attention over the blocks that are in no list)."""
    batch, heads, length, head_dim = q.shape
    all_heads, (queries, keep) = batch * heads, lists.shape[2:]
    keys = block_count(length, block_k)
    # Numerator and denominator alike. With softmax's φ no block's state exceeds the largest |v|,
    # and no sum of states D·|v|: in float16, 0 times an infinite state would be no number.
    scale = min(head_dim / (keys - keep), 1.0) / block_k
    constants = {
        "HEAD_DIM": head_dim,
        "MAP": feature_map,
        "PRECISION": precision_of(q.dtype),
    }
    states = q.new_empty((all_heads, keys, head_dim, head_dim))
    sums = q.new_empty((all_heads, keys, head_dim), dtype=torch.float32)
    _block_states[(keys, all_heads)](
        k, v, states, sums, length, heads, scale,
        BLOCK=block_k, TOKENS=KEYS_TILE.tokens,
        num_warps=KEYS_TILE.warps, num_stages=KEYS_TILE.stages, **constants,
    )  # fmt: skip
    rest = not_kept(lists, keys).flatten(0, 1)
    state = torch.bmm(rest.to(q.dtype), states.flatten(2))
    normalizer = torch.bmm(rest, sums)
    tile = FLOAT32_QUERIES_TILE if q.dtype is torch.float32 else QUERIES_TILE
    _mix[(queries * (block_q // tile.tokens), all_heads)](
        q, o, state, normalizer, alpha.contiguous(), length, heads, queries,
        NORMALIZER_EPS * scale,
        BLOCK=block_q, TOKENS=tile.tokens,
        num_warps=tile.warps, num_stages=tile.stages, **constants,
    )  # fmt: skip
