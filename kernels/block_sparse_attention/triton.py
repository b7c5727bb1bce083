"""block_sparse_attention in Triton: an online softmax over the blocks of a query block's list."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._triton.tuning import fastest
from ..sparse_rules import block_count, empty_heads

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class TileConfig(NamedTuple):
    """One way to launch: tokens of q and of k that are held at once, warps, pipeline stages."""

    q: int
    k: int
    warps: int
    stages: int

    def within(self, block_q: int, block_k: int) -> TileConfig:
        """With tiles no longer than the blocks, which they must divide."""
        return self._replace(q=min(self.q, block_q), k=min(self.k, block_k))


CONFIGS = (TileConfig(64, 64, 4, 3), TileConfig(64, 128, 4, 2), TileConfig(128, 64, 8, 3))
FLOAT32_CONFIGS = (TileConfig(32, 32, 8, 1),)  # four bytes and no tensor cores: small tiles


@triton.jit
def load_tokens(x, token, length, heads, HEAD_DIM: tl.constexpr):
    """A tile of a head's tokens, (TOKENS, HEAD_DIM); 0 beyond the last. `x` is at the head."""
    at = token.to(tl.int64)[:, None] * (heads * HEAD_DIM) + tl.arange(0, HEAD_DIM)[None, :]
    return tl.load(x + at, mask=(token < length)[:, None], other=0.0)


@triton.jit
def store_tokens(x, tile, token, length, heads, HEAD_DIM: tl.constexpr):
    """Write what `load_tokens` reads."""
    at = token.to(tl.int64)[:, None] * (heads * HEAD_DIM) + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(x + at, tile.to(x.dtype.element_ty), mask=(token < length)[:, None])


@triton.jit
def head_offset(head_of_all, length, heads, HEAD_DIM: tl.constexpr):
    """Where a head of a batch element begins in memory of (B, L, H, D)."""
    batch = (head_of_all // heads).to(tl.int64)
    return (batch * length * heads + head_of_all % heads) * HEAD_DIM


@triton.jit
def _attend(
    q,  # (B, L, H, D) in memory, as k, v and o
    k,
    v,
    lists,  # (B·H, NQ, keep) int32
    o,
    log_sum,  # (B·H, L) float32
    length,
    heads,
    queries,
    keep,
    scale,  # log2(e) / √D
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
    acc = tl.zeros((TILE_Q, HEAD_DIM), dtype=tl.float32)
    largest = tl.full((TILE_Q,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((TILE_Q,), dtype=tl.float32)
    TILES: tl.constexpr = BLOCK_K // TILE_K
    for index in range(keep * TILES):
        first = tl.load(lists + index // TILES) * BLOCK_K + (index % TILES) * TILE_K
        key = first + tl.arange(0, TILE_K)
        k_tile = load_tokens(k + start, key, length, heads, HEAD_DIM)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        s = tl.where((key < length)[None, :], s, -float("inf"))
        # A tile beyond the last token may be the first of a row: −∞ − −∞ must not occur.
        new_largest = tl.maximum(tl.maximum(largest, tl.max(s, axis=1)), -1e30)
        shrink = tl.math.exp2(largest - new_largest)
        p = tl.math.exp2(s - new_largest[:, None])
        total = total * shrink + tl.sum(p, axis=1)
        v_tile = load_tokens(v + start, key, length, heads, HEAD_DIM)
        product = tl.dot(p.to(v_tile.dtype), v_tile, input_precision=PRECISION)
        acc = acc * shrink[:, None] + product
        largest = new_largest
    store_tokens(o + start, acc / total[:, None], token, length, heads, HEAD_DIM)
    at = head_of_all.to(tl.int64) * length + token
    tl.store(log_sum + at, (largest + tl.math.log2(total)) * LN_2, mask=token < length)


def in_token_order(x_BHLD: torch.Tensor) -> torch.Tensor:
    """The same heads, in memory of (B, L, H, D); copied only where they are not."""
    return x_BHLD.transpose(1, 2).contiguous().transpose(1, 2)


def precision_of(dtype: torch.dtype) -> str:
    """How Triton multiplies: float32 in full."""
    return "ieee" if dtype is torch.float32 else "tf32"


def configs_of(
    dtype: torch.dtype, half_precision: tuple[TileConfig, ...], block_q: int, block_k: int
) -> list[TileConfig]:
    """The launches to choose among, each once."""
    chosen = FLOAT32_CONFIGS if dtype is torch.float32 else half_precision
    return list(dict.fromkeys(each.within(block_q, block_k) for each in chosen))


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: torch.Tensor,
    block_q: int,
    block_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, head_dim = q.shape
    o = empty_heads(q)
    log_sum = q.new_empty(q.shape[:3], dtype=torch.float32)
    if q.numel() == 0:
        return o, log_sum
    q, k, v = (in_token_order(x) for x in (q, k, v))
    lists = lists.contiguous()
    queries, keep = lists.shape[2:]

    def launch(config: TileConfig) -> None:
        grid = (queries * (block_q // config.q), batch * heads)
        _attend[grid](
            q, k, v, lists, o, log_sum, length, heads, queries, keep,
            LOG2_E.value / math.sqrt(head_dim),
            HEAD_DIM=head_dim, BLOCK_Q=block_q, BLOCK_K=block_k,
            TILE_Q=config.q, TILE_K=config.k, PRECISION=precision_of(q.dtype),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    assert block_count(length, block_q) == queries
    problem = ("block_sparse_attention", q.device, q.dtype, q.shape, keep, block_q, block_k)
    launch(fastest(problem, configs_of(q.dtype, CONFIGS, block_q, block_k), launch))
    return o, log_sum
