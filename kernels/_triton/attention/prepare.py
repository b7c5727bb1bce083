"""Make what sparse-linear attention reads of q, k and v, once they are measured.

A second pass over keys and values rounds them and gathers the state of the linear branch, φ(k)ᵀv
and Σφ(k), in parts that are then summed. Queries come last and take one pass: they are quantized,
averaged, and give the linear branch's result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..device import block_scale
from .device import (
    INT8_MAX,
    feature_halves,
    load_halves,
    load_weight,
    normalize_halves,
    row_max,
    to_int8,
)


@triton.jit
def prepare_keys(
    k,  # as in measure_keys of measure.py
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
    q,  # as k in measure_keys of measure.py
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
