"""What sparse-linear attention needs of q, k and v before it attends.

RMSNorm's statistics come first, since they span all heads; then each head is on its own. Keys and
values take two passes: the mean key, and v's largest value per channel, depend on all tokens. The
second also gathers the state of the linear branch, φ(k)ᵀv and Σφ(k), in parts that are then summed.
Queries come last and take one: they are quantized, averaged, and give the linear branch's result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..device import block_scale
from .device import (
    feature_halves,
    load_halves,
    load_weight,
    normalize_halves,
    row_max,
    to_int8,
)

INT8_MAX = tl.constexpr(127.0)
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


@triton.jit
def prepare_keys(
    k,  # as in measure_keys
    v,
    rstd,
    weight,
    cos,
    sin,
    k_mean,  # (B·H, D) float32, even channels first
    k_scale,  # (B·H, NK) float32
    v_scale,  # (B·H, D) float32
    k_int8,  # (B·H, NK, BLOCK, D) int8, even channels first; or None
    v_fp8,  # (B·H, NK, D, BLOCK) e4m3, transposed in each block; or None
    state,  # (B·H, parts, D, D) float32, rows even first; or None
    key_sum,  # (B·H, parts, D) float32, even first
    length,
    heads,
    blocks,  # NK
    per_part,
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
    MAP: tl.constexpr,
):
    """Each program takes `per_part` consecutive blocks of one head, TOKENS at a time."""
    HEAD_DIM: tl.constexpr = 2 * PAIRS
    part = tl.program_id(0)
    head_of_all = tl.program_id(1).to(tl.int64)
    batch = head_of_all // heads
    head = head_of_all % heads
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    even_weight, odd_weight = load_weight(weight, head, PAIRS)
    if cos is not None:
        rstd += batch * length
    pair = tl.arange(0, PAIRS)
    channel = tl.arange(0, HEAD_DIM)
    row = tl.arange(0, TOKENS)
    if k_int8 is not None:
        even_mean = tl.load(k_mean + head_of_all * HEAD_DIM + pair)[None, :]
        odd_mean = tl.load(k_mean + head_of_all * HEAD_DIM + PAIRS + pair)[None, :]
    if v_fp8 is not None:
        v_factor = 1.0 / tl.load(v_scale + head_of_all * HEAD_DIM + channel)[None, :]
    if state is not None:
        even_state = tl.zeros((PAIRS, HEAD_DIM), dtype=tl.float32)
        odd_state = tl.zeros((PAIRS, HEAD_DIM), dtype=tl.float32)
        even_sum = tl.zeros((TOKENS, PAIRS), dtype=tl.float32)
        odd_sum = tl.zeros((TOKENS, PAIRS), dtype=tl.float32)
    tiles: tl.constexpr = BLOCK // TOKENS
    for tile in range(part * per_part * tiles, tl.minimum((part + 1) * per_part, blocks) * tiles):
        block = tile // tiles
        within = tile % tiles * TOKENS
        first = block * BLOCK + within
        exists = (row < length - first)[:, None]
        even, odd = load_halves(k, first, length, k_token, TOKENS, PAIRS)
        even, odd = normalize_halves(
            even, odd, first, length, rstd, even_weight, odd_weight, cos, sin,
            table_token, table_pair, TOKENS, PAIRS,
        )  # fmt: skip
        start = v + tl.cast(first, tl.int64) * v_token
        v_tile = tl.load(start + row[:, None] * v_token + channel, mask=exists, other=0.0)
        place = head_of_all * blocks + block
        if k_int8 is not None:
            factor = 1.0 / tl.load(k_scale + place)
            target = k_int8 + (place * BLOCK + within) * HEAD_DIM
            at = row[:, None] * HEAD_DIM + pair[None, :]
            tl.store(target + at, to_int8(tl.where(exists, even - even_mean, 0.0), factor))
            tl.store(target + at + PAIRS, to_int8(tl.where(exists, odd - odd_mean, 0.0), factor))
        if v_fp8 is not None:
            quantized = (v_tile.to(tl.float32) * v_factor).to(v_fp8.dtype.element_ty)
            target = v_fp8 + place * (BLOCK * HEAD_DIM) + channel[:, None] * BLOCK
            tl.store(target + within + row[None, :], tl.trans(quantized))
        if state is not None:
            even, odd, factor = feature_halves(even, odd, MAP)
            factor = (1.0 / factor)[:, None]
            even = tl.where(exists, even * factor, 0.0)
            odd = tl.where(exists, odd * factor, 0.0)
            even_sum += even
            odd_sum += odd
            even_state = tl.dot(tl.trans(even.to(v_tile.dtype)), v_tile, even_state)
            odd_state = tl.dot(tl.trans(odd.to(v_tile.dtype)), v_tile, odd_state)
    if state is not None:
        place = head_of_all * tl.num_programs(0) + part
        at = place * (HEAD_DIM * HEAD_DIM) + pair[:, None] * HEAD_DIM + channel[None, :]
        tl.store(state + at, even_state)
        tl.store(state + at + PAIRS * HEAD_DIM, odd_state)
        tl.store(key_sum + place * HEAD_DIM + pair, tl.sum(even_sum, axis=0))
        tl.store(key_sum + place * HEAD_DIM + PAIRS + pair, tl.sum(odd_sum, axis=0))


@triton.jit
def finish_state(
    state,  # (B·H, parts, D, D) float32
    key_sum,  # (B·H, parts, D) float32
    proj_weight,  # (D, D)
    matrix,  # (B·H, D, D), 16 bits: Σ state · proj_weightᵀ · D / L
    normalizer,  # (B·H, D) float32: Σφ(k) · D / L
    parts,
    length,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum the parts and apply the projection, which commutes with the normalizer's division.

    Both are scaled by D / L, so that many keys do not overflow float16.
    """
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, HEAD_DIM)
    tile = row[:, None] * HEAD_DIM + channel[None, :]
    products = tl.zeros((ROWS, HEAD_DIM), dtype=tl.float32)
    sums = tl.zeros((ROWS,), dtype=tl.float32)
    for part in range(parts):
        place = head * parts + part
        products += tl.load(state + place * HEAD_DIM * HEAD_DIM + tile)
        sums += tl.load(key_sum + place * HEAD_DIM + row)
    square = channel[:, None] * HEAD_DIM + channel[None, :]
    weight = tl.load(proj_weight + square).to(tl.float32)
    result = tl.dot(products, tl.trans(weight), input_precision=PRECISION)
    result *= HEAD_DIM / length
    tl.store(matrix + head * HEAD_DIM * HEAD_DIM + tile, result.to(matrix.dtype.element_ty))
    tl.store(normalizer + head * HEAD_DIM + row, sums * (HEAD_DIM / length))


@triton.jit
def prepare_queries(
    q,  # as k in measure_keys
    rstd,
    weight,
    cos,
    sin,
    q_int8,  # (B·H, NQ, BLOCK, D) int8, even channels first; or None
    q_scale,  # (B·H, NQ, BLOCK) float32
    q_means,  # (B·H, NQ, D) float32, even channels first
    matrix,  # (B·H, D, D), as finish_state gives it; or None: no linear branch
    normalizer,  # (B·H, D) float32, as well
    proj_bias,  # (D,), or None
    branch,  # (B, L, H, D) of q's dtype: φ(q)·matrix / (φ(q)·normalizer + 1e-5·D/L) + proj_bias
    length,
    heads,
    blocks,  # NQ
    per_part,
    q_batch,
    q_token,
    q_head,
    table_token,
    table_pair,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    MAP: tl.constexpr,
):
    """Each program takes `per_part` consecutive blocks of one head, TOKENS at a time."""
    HEAD_DIM: tl.constexpr = 2 * PAIRS
    part = tl.program_id(0)
    head_of_all = tl.program_id(1).to(tl.int64)
    batch = head_of_all // heads
    head = head_of_all % heads
    q += batch * q_batch + head * q_head
    even_weight, odd_weight = load_weight(weight, head, PAIRS)
    if cos is not None:
        rstd += batch * length
    pair = tl.arange(0, PAIRS)
    channel = tl.arange(0, HEAD_DIM)
    row = tl.arange(0, TOKENS)
    if matrix is not None:
        dtype: tl.constexpr = matrix.dtype.element_ty
        rows = pair[:, None] * HEAD_DIM + channel[None, :]
        matrix += head_of_all * (HEAD_DIM * HEAD_DIM)
        even_matrix = tl.load(matrix + rows)
        odd_matrix = tl.load(matrix + PAIRS * HEAD_DIM + rows)
        normalizer += head_of_all * HEAD_DIM
        even_normalizer = tl.load(normalizer + pair)[None, :]
        odd_normalizer = tl.load(normalizer + PAIRS + pair)[None, :]
    even_sum = tl.zeros((TOKENS, PAIRS), dtype=tl.float32)
    odd_sum = tl.zeros((TOKENS, PAIRS), dtype=tl.float32)
    tiles: tl.constexpr = BLOCK // TOKENS
    for tile in range(part * per_part * tiles, tl.minimum((part + 1) * per_part, blocks) * tiles):
        block = tile // tiles
        within = tile % tiles * TOKENS
        first = block * BLOCK + within
        even, odd = load_halves(q, first, length, q_token, TOKENS, PAIRS)
        even, odd = normalize_halves(
            even, odd, first, length, rstd, even_weight, odd_weight, cos, sin,
            table_token, table_pair, TOKENS, PAIRS,
        )  # fmt: skip
        place = head_of_all * blocks + block
        even_sum += even
        odd_sum += odd
        if tile % tiles == tiles - 1:
            count = tl.minimum(length - block * BLOCK, BLOCK)
            tl.store(q_means + place * HEAD_DIM + pair, tl.sum(even_sum, axis=0) / count)
            tl.store(q_means + place * HEAD_DIM + PAIRS + pair, tl.sum(odd_sum, axis=0) / count)
            even_sum = tl.zeros((TOKENS, PAIRS), dtype=tl.float32)
            odd_sum = tl.zeros((TOKENS, PAIRS), dtype=tl.float32)
        if q_int8 is not None:
            step = block_scale(row_max(tl.abs(even), tl.abs(odd)), INT8_MAX)
            tl.store(q_scale + place * BLOCK + within + row, step)
            factor = (1.0 / step)[:, None]
            target = q_int8 + (place * BLOCK + within) * HEAD_DIM
            at = row[:, None] * HEAD_DIM + pair[None, :]
            tl.store(target + at, to_int8(even, factor))
            tl.store(target + at + PAIRS, to_int8(odd, factor))
        if matrix is not None:
            even, odd, factor = feature_halves(even, odd, MAP)
            sums = tl.sum(even * even_normalizer + odd * odd_normalizer, axis=1)
            result = tl.dot(even.to(dtype), even_matrix)
            result = tl.dot(odd.to(dtype), odd_matrix, result)
            result *= (1.0 / (sums + 1e-5 * HEAD_DIM / length * factor))[:, None]
            if proj_bias is not None:
                result += tl.load(proj_bias + channel).to(tl.float32)[None, :]
            target = branch + ((batch * length + first) * heads + head) * HEAD_DIM
            at = row[:, None] * (heads * HEAD_DIM) + channel[None, :]
            tl.store(target + at, result.to(dtype), mask=(row < length - first)[:, None])
