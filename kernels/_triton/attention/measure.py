"""What must be known of all tokens before q, k and v can be prepared.

RMSNorm's statistics come first, since they span all heads; then each head is on its own. The mean
key, and v's largest value per channel, depend on all tokens: a first pass over keys and values
measures each block, and what is found is put together.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..device import block_scale
from .device import INT8_MAX, load_halves, load_weight, normalize_halves

FP8_MAX = tl.constexpr(448.0)


@triton.jit
def measure_rms(
    q,  # token t of batch b at b·q_batch + t·q_token, its H·D channels together
    k,
    rstd,  # (2, B, L) float32: of q, of k
    eps,
    length,
    q_batch,
    q_token,
    k_batch,
    k_token,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """1 / sqrt(mean square over all heads + eps) of each token of q and of k."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1).to(tl.int64)
    exists = token < length
    rows = token.to(tl.int64)[:, None]
    q_squares = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    k_squares = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for first in tl.static_range(0, CHANNELS, WIDTH):
        channel = first + tl.arange(0, WIDTH)[None, :]
        inside = exists[:, None] & (channel < CHANNELS)
        x = tl.load(q + batch * q_batch + rows * q_token + channel, mask=inside, other=0.0)
        y = tl.load(k + batch * k_batch + rows * k_token + channel, mask=inside, other=0.0)
        q_squares += x.to(tl.float32) * x.to(tl.float32)
        k_squares += y.to(tl.float32) * y.to(tl.float32)
    batches = tl.num_programs(1)
    q_rstd = 1.0 / tl.sqrt(tl.sum(q_squares, axis=1) / CHANNELS + eps)
    k_rstd = 1.0 / tl.sqrt(tl.sum(k_squares, axis=1) / CHANNELS + eps)
    tl.store(rstd + batch * length + token, q_rstd, mask=exists)
    tl.store(rstd + (batches + batch) * length + token, k_rstd, mask=exists)


@triton.jit
def measure_keys(
    k,  # head h of token t of batch b at b·k_batch + t·k_token + h·k_head
    v,
    rstd,  # (B, L) float32
    weight,  # (H·D,), or None
    cos,  # (L, PAIRS) by strides (table_token, table_pair), or None: k is used as it is
    sin,
    k_means,  # (B·H, NK, D) float32, even channels first
    k_bounds,  # (2, B·H, NK, D) float32: least and largest of each block and channel; or None
    v_amax,  # (B·H, NK, D) float32, or None
    length,
    heads,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    table_token,
    table_pair,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Each program takes one block of one head, TOKENS at a time."""
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    head_of_all = tl.program_id(1).to(tl.int64)
    batch = head_of_all // heads
    head = head_of_all % heads
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    even_weight, odd_weight = load_weight(weight, head, PAIRS)
    if cos is not None:
        rstd += batch * length
    pair = tl.arange(0, PAIRS)
    channel = tl.arange(0, 2 * PAIRS)
    row = tl.arange(0, TOKENS)[:, None]
    even_sum = tl.zeros((TOKENS, PAIRS), dtype=tl.float32)
    odd_sum = tl.zeros((TOKENS, PAIRS), dtype=tl.float32)
    if k_bounds is not None:
        even_least = tl.full((TOKENS, PAIRS), float("inf"), dtype=tl.float32)
        odd_least = tl.full((TOKENS, PAIRS), float("inf"), dtype=tl.float32)
        even_most = tl.full((TOKENS, PAIRS), -float("inf"), dtype=tl.float32)
        odd_most = tl.full((TOKENS, PAIRS), -float("inf"), dtype=tl.float32)
    if v_amax is not None:
        v_most = tl.zeros((TOKENS, 2 * PAIRS), dtype=tl.float32)
    for first in range(block * BLOCK, tl.minimum((block + 1) * BLOCK, length), TOKENS):
        exists = row < length - first
        even, odd = load_halves(k, first, length, k_token, TOKENS, PAIRS)
        even, odd = normalize_halves(
            even, odd, first, length, rstd, even_weight, odd_weight, cos, sin,
            table_token, table_pair, TOKENS, PAIRS,
        )  # fmt: skip
        even_sum += even
        odd_sum += odd
        if k_bounds is not None:
            even_least = tl.minimum(even_least, tl.where(exists, even, float("inf")))
            odd_least = tl.minimum(odd_least, tl.where(exists, odd, float("inf")))
            even_most = tl.maximum(even_most, tl.where(exists, even, -float("inf")))
            odd_most = tl.maximum(odd_most, tl.where(exists, odd, -float("inf")))
        if v_amax is not None:
            start = v + tl.cast(first, tl.int64) * v_token
            at = row * v_token + channel[None, :]
            tile = tl.load(start + at, mask=exists, other=0.0).to(tl.float32)
            v_most = tl.maximum(v_most, tl.abs(tile))
    count = tl.minimum(length - block * BLOCK, BLOCK)
    place = (head_of_all * blocks + block) * (2 * PAIRS)
    tl.store(k_means + place + pair, tl.sum(even_sum, axis=0) / count)
    tl.store(k_means + place + PAIRS + pair, tl.sum(odd_sum, axis=0) / count)
    if k_bounds is not None:
        tl.store(k_bounds + place + pair, tl.min(even_least, axis=0))
        tl.store(k_bounds + place + PAIRS + pair, tl.min(odd_least, axis=0))
        place_most = place + tl.num_programs(1).to(tl.int64) * blocks * (2 * PAIRS)
        tl.store(k_bounds + place_most + pair, tl.max(even_most, axis=0))
        tl.store(k_bounds + place_most + PAIRS + pair, tl.max(odd_most, axis=0))
    if v_amax is not None:
        tl.store(v_amax + place + channel, tl.max(v_most, axis=0))


@triton.jit
def finish_measures(
    k_means,  # (B·H, NK, D) float32
    v_amax,  # (B·H, NK, D) float32, or None
    k_mean,  # (B·H, D) float32
    v_scale,  # (B·H, D) float32
    blocks,  # NK
    length,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The mean key of each head, and v's scale per channel."""
    head = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
    largest = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
    for first in range(0, blocks, ROWS):
        block = first + tl.arange(0, ROWS)
        at = (head * blocks + block[:, None]) * HEAD_DIM + channel[None, :]
        exists = (block < blocks)[:, None]
        count = tl.minimum(length - block * BLOCK, BLOCK).to(tl.float32)[:, None]
        total += tl.load(k_means + at, mask=exists, other=0.0) * count
        if v_amax is not None:
            largest = tl.maximum(largest, tl.load(v_amax + at, mask=exists, other=0.0))
    tl.store(k_mean + head * HEAD_DIM + channel, tl.sum(total, axis=0) / length)
    if v_amax is not None:
        tl.store(v_scale + head * HEAD_DIM + channel, block_scale(tl.max(largest, axis=0), FP8_MAX))


@triton.jit
def scale_keys(
    k_mean,  # (B·H, D) float32
    k_bounds,  # (2, B·H, NK, D) float32
    k_scale,  # (B·H, NK) float32
    blocks,  # NK
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The int8 scale of each block of smoothed keys, from its least and largest values."""
    head = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, HEAD_DIM)
    exists = (block < blocks)[:, None]
    mean = tl.load(k_mean + head * HEAD_DIM + channel)[None, :]
    at = (head * blocks + block[:, None]) * HEAD_DIM + channel[None, :]
    largest = tl.num_programs(1).to(tl.int64) * blocks * HEAD_DIM + at
    below = mean - tl.load(k_bounds + at, mask=exists, other=0.0)
    above = tl.load(k_bounds + largest, mask=exists, other=0.0) - mean
    step = block_scale(tl.max(tl.maximum(below, above), axis=1), INT8_MAX)
    tl.store(k_scale + head * blocks + block, step, mask=block < blocks)
