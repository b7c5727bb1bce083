"""linear_gelu_quantize as block_linear's tiled product with another end.

A block of 128 tokens by 128 features holds every value that its scales belong to: one scale for all
of it (int8) or one for each of its rows (fp8). So bias, GELU and rounding follow the sums in
registers, and neither sums nor GELU are stored. Rows beyond the last token, where GELU of the bias
would stand, are taken as zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._triton.blocks import new_quantized
from .._triton.device import block_scale, gelu_tanh, to_quantized
from .._triton.tuning import fastest
from ..block_linear.triton import (
    CONFIGS,
    ROWS_PER_BAND,
    ProductConfig,
    _add_scaled,
    _load_block,
    _scratch,
    _tile_of,
    _tma_serves,
)
from ..capability import multiprocessors
from ..schemes import BLOCK, SCHEMES


@triton.jit
def _store_gelu(
    y,
    descriptor,
    y_scale,
    bias,
    accumulator,
    row,
    column,
    rows,
    FEATURES: tl.constexpr,
    SIDE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    DIVISOR: tl.constexpr,
    TMA: tl.constexpr,
):
    """Add the bias, take GELU, and write a block of the quantized result and its scales.

    A block beyond the last feature is not written. Its bounds are masks: Triton 3.6 does not
    compile a branch at the end of a flattened loop.
    """
    at_row = row + tl.arange(0, SIDE)
    at_column = column + tl.arange(0, SIDE)
    block = column // SIDE + tl.arange(0, 1)
    within = block < FEATURES // SIDE
    exists = (at_row < rows) & within
    if bias is not None:
        bias_values = tl.load(bias + at_column, mask=at_column < FEATURES, other=0.0)
        accumulator += bias_values.to(tl.float32)[None, :]
    values = tl.where(exists[:, None], gelu_tanh(accumulator), 0.0)

    if PER_TOKEN:
        scale = block_scale(tl.max(tl.abs(values), axis=1), DIVISOR)
        tl.store(y_scale + block.to(tl.int64) * rows + at_row, scale, mask=exists)
        result = to_quantized(values, scale[:, None], y.dtype.element_ty)
    else:
        scale = block_scale(tl.max(tl.max(tl.abs(values), axis=1), axis=0), DIVISOR)
        tl.store(y_scale + row // SIDE * (FEATURES // SIDE) + block, scale, mask=within)
        result = to_quantized(values, scale, y.dtype.element_ty)

    if TMA:
        descriptor.store([row, column], result)
    else:
        offsets = at_row.to(tl.int64)[:, None] * FEATURES + at_column[None, :]
        tl.store(y + offsets, result, mask=exists[:, None])


@triton.jit
def _multiply_gelu_blocks(
    q,  # (M, K) int8 or fp8, contiguous
    q_scale,  # int8: (ceil(M / 128), K / 128); fp8: (M, K / 128); strides (scale_row, scale_group)
    weight,  # (N, K) of q's dtype, contiguous
    weight_scale,  # (N / 128, K / 128) float32, contiguous
    bias,  # (N,), or None
    y,  # (M, N) of q's dtype, contiguous
    y_scale,  # int8: (ceil(M / 128), N / 128), contiguous; fp8: (M, N / 128) with strides (1, M)
    tokens,  # M
    scale_row,
    scale_group,
    FEATURES: tl.constexpr,  # N
    IN_FEATURES: tl.constexpr,  # K
    SIDE: tl.constexpr,  # 128
    WIDE: tl.constexpr,  # two blocks of features per tile instead of one
    PER_TOKEN: tl.constexpr,  # q_scale and y_scale have one row per token
    DIVISOR: tl.constexpr,  # of the result's scheme
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,  # overlap a tile's end with the next one's start
    ROWS_PER_BAND: tl.constexpr,
):
    """Each program takes every num_programs-th tile."""
    GROUPS: tl.constexpr = IN_FEATURES // SIDE
    TILE_FEATURES: tl.constexpr = 2 * SIDE if WIDE else SIDE
    row_tiles = tl.cdiv(tokens, SIDE)
    column_tiles = tl.cdiv(FEATURES, TILE_FEATURES)
    if TMA:
        q_tma = tl.make_tensor_descriptor(q, [tokens, IN_FEATURES], [IN_FEATURES, 1], [SIDE, SIDE])
        weight_tma = tl.make_tensor_descriptor(
            weight, [FEATURES, IN_FEATURES], [IN_FEATURES, 1], [SIDE, SIDE]
        )
        y_tma = tl.make_tensor_descriptor(y, [tokens, FEATURES], [FEATURES, 1], [SIDE, SIDE])
    else:
        q_tma = q
        weight_tma = weight
        y_tma = y

    first = tl.program_id(0)
    for index in tl.range(first, row_tiles * column_tiles, tl.num_programs(0), flatten=FLATTEN):
        row_tile, column_tile = _tile_of(index, row_tiles, column_tiles, ROWS_PER_BAND)
        row = row_tile * SIDE
        column = column_tile * TILE_FEATURES
        feature_block = column // SIDE
        if PER_TOKEN:
            token = row + tl.arange(0, SIDE)
            token_exists = token < tokens
        accumulator = tl.zeros((SIDE, SIDE), dtype=tl.float32)
        if WIDE:
            accumulator_2 = tl.zeros((SIDE, SIDE), dtype=tl.float32)
            # A tile may begin with the last block of features: the second is then computed on
            # zeros and not stored, and must only not read scales beyond the end.
            block_2 = tl.minimum(feature_block + 1, (FEATURES - 1) // SIDE)

        for group in range(GROUPS):
            if PER_TOKEN:
                token_scale = tl.load(
                    q_scale + token * scale_row + group * scale_group, mask=token_exists, other=0.0
                )
            else:
                token_scale = tl.load(q_scale + row_tile * scale_row + group * scale_group)
            scale = tl.load(weight_scale + feature_block * GROUPS + group)
            if WIDE:
                scale_2 = tl.load(weight_scale + block_2 * GROUPS + group)
            at = group * SIDE
            q_block = _load_block(q, q_tma, row, at, tokens, IN_FEATURES, SIDE, TMA)
            w_block = _load_block(weight, weight_tma, column, at, FEATURES, IN_FEATURES, SIDE, TMA)
            sums = tl.dot(q_block, w_block.T)
            accumulator = _add_scaled(accumulator, sums, token_scale, scale, PER_TOKEN)
            if WIDE:
                w_block_2 = _load_block(
                    weight, weight_tma, column + SIDE, at, FEATURES, IN_FEATURES, SIDE, TMA
                )
                sums_2 = tl.dot(q_block, w_block_2.T)
                accumulator_2 = _add_scaled(accumulator_2, sums_2, token_scale, scale_2, PER_TOKEN)

        _store_gelu(
            y,
            y_tma,
            y_scale,
            bias,
            accumulator,
            row,
            column,
            tokens,
            FEATURES,
            SIDE,
            PER_TOKEN,
            DIVISOR,
            TMA,
        )
        if WIDE:
            _store_gelu(
                y,
                y_tma,
                y_scale,
                bias,
                accumulator_2,
                row,
                column + SIDE,
                tokens,
                FEATURES,
                SIDE,
                PER_TOKEN,
                DIVISOR,
                TMA,
            )


def linear_gelu_quantize(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    scheme: str,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    rules = SCHEMES[scheme]
    features, in_features = weight.shape
    # Of the result's shape, but one element in memory.
    y, y_scale = new_quantized(q.new_empty(()).expand(*q.shape[:-1], features), rules)
    if y.numel() == 0:
        return y, y_scale
    q_MK, y_MN = q.reshape(-1, in_features).contiguous(), y.view(-1, features)
    weight, weight_scale = weight.contiguous(), weight_scale.contiguous()
    bias = bias if bias is None else bias.contiguous()
    tokens = q_MK.shape[0]
    tma = _tma_serves(q_MK, weight, y_MN)
    if tma:
        triton.set_allocator(_scratch)

    def launch(config: ProductConfig) -> None:
        row_tiles = triton.cdiv(tokens, BLOCK)
        tiles = row_tiles * triton.cdiv(features, BLOCK * (2 if config.wide else 1))
        programs = min(tiles, multiprocessors(q.device) * config.programs)
        _multiply_gelu_blocks[(programs,)](
            q_MK,
            q_scale,
            weight,
            weight_scale,
            bias,
            y_MN,
            y_scale,
            tokens,
            q_scale.stride(0),
            q_scale.stride(1),
            FEATURES=features,
            IN_FEATURES=in_features,
            SIDE=BLOCK,
            WIDE=config.wide,
            PER_TOKEN=rules.activation_block[0] == 1,
            DIVISOR=rules.divisor,
            TMA=tma,
            FLATTEN=config.flatten,
            ROWS_PER_BAND=ROWS_PER_BAND,
            num_warps=config.warps,
            num_stages=config.stages,
            maxnreg=config.registers,
        )

    size = (features, in_features, tokens.bit_length())
    problem = ("linear_gelu_quantize", q.device, scheme, *size, tma)
    launch(fastest(problem, CONFIGS, launch))
    return y, y_scale
