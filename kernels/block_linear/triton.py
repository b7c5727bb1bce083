"""block_linear as a persistent, tiled product: int8 from sm80, fp8 from sm89.

A residual stream may be added to the result, times a gate, before that is stored.

A tile is 128 tokens by one or two blocks of 128 output features, so a block of K has one scale per
(token, feature block) of the tile. Tensor-core sums of one K block are scaled into float32
accumulators: Hopper's fp8 units keep fewer bits than float32, and int8's sums must be scaled.
From sm90 on, tiles move by TMA descriptors; else, and for unaligned tensors, by pointers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._triton.support import interpreting
from .._triton.tuning import fastest
from ..capability import capability_of, multiprocessors
from ..schemes import BLOCK


@triton.jit
def _tile_of(index, row_tiles, column_tiles, ROWS_PER_BAND: tl.constexpr):
    """Walk tiles in bands of ROWS_PER_BAND row tiles, column by column: neighbours share cache."""
    per_band = ROWS_PER_BAND * column_tiles
    first_row = (index // per_band) * ROWS_PER_BAND
    band_rows = tl.minimum(row_tiles - first_row, ROWS_PER_BAND)
    within = index % per_band
    return first_row + within % band_rows, within // band_rows


@triton.jit
def _load_block(
    matrix, descriptor, row, column, rows, columns, SIDE: tl.constexpr, TMA: tl.constexpr
):
    """A SIDE×SIDE block of a row-major (rows, columns) matrix; rows beyond the end are 0."""
    if TMA:
        return descriptor.load([row, column])
    at_row = row + tl.arange(0, SIDE)
    at_column = column + tl.arange(0, SIDE)
    offsets = at_row.to(tl.int64)[:, None] * columns + at_column[None, :]
    return tl.load(matrix + offsets, mask=at_row[:, None] < rows, other=0.0)


@triton.jit
def _add_scaled(accumulator, sums, token_scale, feature_scale, PER_TOKEN: tl.constexpr):
    """accumulator += sums · scales, sums being one K block's int32 or float32 products."""
    if PER_TOKEN:
        return accumulator + sums.to(tl.float32) * (token_scale * feature_scale)[:, None]
    return accumulator + sums.to(tl.float32) * (token_scale * feature_scale)


@triton.jit
def _store_block(
    y,
    descriptor,
    bias,
    x,
    gate,
    gate_batch,
    gate_row,
    length,
    accumulator,
    row,
    column,
    rows,
    columns,
    GATE_PER_ROW: tl.constexpr,
    SIDE: tl.constexpr,
    TMA: tl.constexpr,
):
    """Add bias and stream and write a block of the row-major (rows, columns) result."""
    at_row = row + tl.arange(0, SIDE)
    at_column = column + tl.arange(0, SIDE)
    offsets = at_row.to(tl.int64)[:, None] * columns + at_column[None, :]
    inside = (at_row[:, None] < rows) & (at_column[None, :] < columns)
    if bias is not None:
        values = tl.load(bias + at_column, mask=at_column < columns, other=0.0).to(tl.float32)
        accumulator += values[None, :]
    if gate is not None:
        if GATE_PER_ROW:
            batch, token = at_row // length, (at_row % length).to(tl.int64)
            of_row = batch.to(tl.int64) * gate_batch + token * gate_row
            gates = tl.load(gate + of_row[:, None] + at_column[None, :], mask=inside, other=0.0)
            accumulator *= gates.to(tl.float32)
        else:
            gates = tl.load(gate + at_column, mask=at_column < columns, other=0.0)
            accumulator *= gates.to(tl.float32)[None, :]
    if x is not None:
        accumulator += tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    result = accumulator.to(y.dtype.element_ty)
    if TMA:
        descriptor.store([row, column], result)
    else:
        tl.store(y + offsets, result, mask=inside)


@triton.jit
def _multiply_blocks(
    q,  # (M, K) int8 or fp8, contiguous
    q_scale,  # int8: (ceil(M / 128), K / 128); fp8: (M, K / 128); strides (scale_row, scale_group)
    weight,  # (N, K) of q's dtype, contiguous
    weight_scale,  # (ceil(N / 128), K / 128) float32, contiguous
    bias,  # (N,), or None
    x,  # (M, N), contiguous, added to the result; or None
    gate,  # broadcast to (M / length, length, N), strides (gate_batch, gate_row, 1); or None
    y,  # (M, N), contiguous
    tokens,  # M
    scale_row,
    scale_group,
    gate_batch,
    gate_row,
    length,
    FEATURES: tl.constexpr,  # N
    IN_FEATURES: tl.constexpr,  # K
    SIDE: tl.constexpr,  # 128
    WIDE: tl.constexpr,  # two blocks of features per tile instead of one
    PER_TOKEN: tl.constexpr,  # q_scale has one row per token
    GATE_PER_ROW: tl.constexpr,  # else one gate serves all rows
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
            # zeros and never stored, and must only not read scales beyond the end.
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

        _store_block(
            y,
            y_tma,
            bias,
            x,
            gate,
            gate_batch,
            gate_row,
            length,
            accumulator,
            row,
            column,
            tokens,
            FEATURES,
            GATE_PER_ROW,
            SIDE,
            TMA,
        )
        if WIDE:
            _store_block(
                y,
                y_tma,
                bias,
                x,
                gate,
                gate_batch,
                gate_row,
                length,
                accumulator_2,
                row,
                column + SIDE,
                tokens,
                FEATURES,
                GATE_PER_ROW,
                SIDE,
                TMA,
            )


class ProductConfig(NamedTuple):
    """One way to launch the product; `programs` are per multiprocessor."""

    wide: bool
    warps: int
    stages: int
    programs: int
    flatten: bool
    registers: int | None = None  # per thread, at most; for two programs to fit


# The first serves unmeasured, so it fits every GPU: 96 KiB of shared memory.
CONFIGS = (
    ProductConfig(wide=False, warps=8, stages=2, programs=2, flatten=False, registers=128),
    ProductConfig(wide=False, warps=8, stages=4, programs=1, flatten=True),
    ProductConfig(wide=True, warps=8, stages=3, programs=1, flatten=False),
    ProductConfig(wide=True, warps=8, stages=3, programs=1, flatten=True),
)
ROWS_PER_BAND = 8


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Device memory in which a kernel builds its TMA descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _tma_serves(*matrices: torch.Tensor) -> bool:
    """TMA wants sm90, a base address and a row of whole 16 bytes."""
    device = matrices[0].device
    if device.type == "cuda":
        capable = capability_of(device).at_least(9, 0)
    else:
        capable = interpreting()
    return capable and all(
        matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0
        for matrix in matrices
    )


class Residual(NamedTuple):
    """What the result is added to, times a gate."""

    x: torch.Tensor  # (B, L, N)
    gate: torch.Tensor | None  # (B or 1, L or 1, N)


def block_linear(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    scheme: str,
    dtype: torch.dtype,
    residual: Residual | None = None,
) -> torch.Tensor:
    features, in_features = weight.shape
    y = torch.empty((*q.shape[:-1], features), dtype=dtype, device=q.device)
    if y.numel() == 0:
        return y
    q_MK, y_MN = q.reshape(-1, in_features).contiguous(), y.view(-1, features)
    weight, weight_scale = weight.contiguous(), weight_scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    tokens = q_MK.shape[0]
    tma = _tma_serves(q_MK, weight, y_MN)
    if tma:
        triton.set_allocator(_scratch)
    x, gate, length, per_row = None, None, tokens, False
    if residual is not None:
        x, length = residual.x.contiguous(), residual.x.shape[1]
        if residual.gate is not None:
            per_row = tuple(residual.gate.shape[:2]) != (1, 1)
            gate = residual.gate if residual.gate.stride(-1) == 1 else residual.gate.contiguous()
            gate = gate.expand(x.shape)

    def launch(config: ProductConfig) -> None:
        row_tiles = triton.cdiv(tokens, BLOCK)
        tiles = row_tiles * triton.cdiv(features, BLOCK * (2 if config.wide else 1))
        programs = min(tiles, multiprocessors(q.device) * config.programs)
        _multiply_blocks[(programs,)](
            q_MK,
            q_scale,
            weight,
            weight_scale,
            bias,
            x,
            gate,
            y_MN,
            tokens,
            q_scale.stride(0),
            q_scale.stride(1),
            0 if gate is None else gate.stride(0),
            0 if gate is None else gate.stride(1),
            length,
            FEATURES=features,
            IN_FEATURES=in_features,
            SIDE=BLOCK,
            WIDE=config.wide,
            PER_TOKEN=scheme == "fp8-block",
            GATE_PER_ROW=per_row,
            TMA=tma,
            FLATTEN=config.flatten,
            ROWS_PER_BAND=ROWS_PER_BAND,
            num_warps=config.warps,
            num_stages=config.stages,
            maxnreg=config.registers,
        )

    kind = (residual is not None, gate is not None, per_row)
    problem = (q.device, scheme, dtype, features, in_features, tokens.bit_length(), tma, kind)
    launch(fastest(problem, CONFIGS, launch))
    return y
