"""Kernels over whole rows: normalize, modulate, and optionally quantize in groups of 128.

LayerNorm and RMSNorm, plain, affine or modulated (adaln), differ only in constants here:

    y = (x − mean) · rstd · (OFFSET + gain) + bias
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..schemes import BLOCK, Scheme
from .device import (
    block_scale,
    load_float,
    reciprocal_deviation,
    subtract_mean,
    to_quantized,
)


@triton.jit
def _normalize_rows(
    x,  # (B, L, C), strides (x_batch, x_row, 1)
    gain,  # broadcast to (B, L, C), strides (gain_batch, gain_row, 1), or None
    bias,  # broadcast to (B, L, C), strides (bias_batch, bias_row, 1), or None
    y,  # (B, L, C), contiguous; quantized if y_scale is given
    y_scale,  # (B·L, GROUPS) with strides (1, B·L), or None
    eps,
    length,
    x_batch,
    x_row,
    gain_batch,
    gain_row,
    bias_batch,
    bias_row,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    CENTERED: tl.constexpr,
    OFFSET: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    DIVISOR: tl.constexpr,
):
    """Each program takes TILES tiles of ROWS rows of one batch element."""
    batch = tl.program_id(1).to(tl.int64)
    group = tl.arange(0, GROUPS)[None, :, None]
    channel = group * GROUP + tl.arange(0, GROUP)[None, None, :]
    exists = channel < CHANNELS

    if not PER_TOKEN:  # one load serves all rows of the program
        if gain is not None:
            shared_gain = OFFSET + load_float(gain + batch * gain_batch, channel, exists)
        if bias is not None:
            shared_bias = load_float(bias + batch * bias_batch, channel, exists)

    for tile in range(TILES):
        first = (tl.program_id(0) * TILES + tile) * ROWS
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
        inside = exists & (row < length)
        values = load_float(x + batch * x_batch, row * x_row + channel, inside)
        if CENTERED:
            values, _ = subtract_mean(values, inside, CHANNELS)
        values *= reciprocal_deviation(values, eps, CHANNELS)
        if gain is not None:
            if PER_TOKEN:
                offsets = row * gain_row + channel
                values *= OFFSET + load_float(gain + batch * gain_batch, offsets, inside)
            else:
                values *= shared_gain
        if bias is not None:
            if PER_TOKEN:
                offsets = row * bias_row + channel
                values += load_float(bias + batch * bias_batch, offsets, inside)
            else:
                values += shared_bias
        target = (batch * length + row) * CHANNELS + channel
        if y_scale is not None:
            values = tl.where(inside, values, 0.0)
            scale = block_scale(tl.max(tl.abs(values), axis=2)[:, :, None], DIVISOR)
            tl.store(y + target, to_quantized(values, scale, y.dtype.element_ty), mask=inside)
            rows_in_all = tl.num_programs(1).to(tl.int64) * length
            scale_at = group * rows_in_all + batch * length + row
            scale_exists = (group * GROUP < CHANNELS) & (row < length)
            tl.store(y_scale + scale_at, scale, mask=scale_exists)
        else:
            tl.store(y + target, values.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _measure_rows(
    x,  # (B, L, C), strides (x_batch, x_row, 1)
    statistics,  # (2, B·L) float32: mean, then reciprocal deviation
    eps,
    length,
    x_batch,
    x_row,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
    group = tl.arange(0, GROUPS)[None, :, None]
    channel = group * GROUP + tl.arange(0, GROUP)[None, None, :]
    inside = (channel < CHANNELS) & (row < length)
    values = load_float(x + batch * x_batch, row * x_row + channel, inside)
    values, mean = subtract_mean(values, inside, CHANNELS)
    rstd = reciprocal_deviation(values, eps, CHANNELS)
    target = batch * length + row
    rows_in_all = tl.num_programs(1).to(tl.int64) * length
    tl.store(statistics + target, mean, mask=row < length)
    tl.store(statistics + rows_in_all + target, rstd, mask=row < length)


class RowTiling(NamedTuple):
    """How a row is split and how many rows a tile takes: about 32 values per thread."""

    groups: int
    group: int
    rows: int
    warps: int

    @classmethod
    def of(cls, channels: int) -> RowTiling:
        whole = channels % BLOCK == 0
        group = BLOCK if whole else triton.next_power_of_2(channels)
        groups = triton.next_power_of_2(channels // BLOCK) if whole else 1
        width = groups * group
        return cls(groups, group, max(1, 4096 // width), min(16, max(4, width // 1024)))


def as_batched_rows(x: torch.Tensor) -> torch.Tensor:
    """View `x` (copying if there is no such view) as (B, L, C) with unit stride along C."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])


def broadcast_to_rows(parameter: torch.Tensor | None, x_BLC: torch.Tensor) -> torch.Tensor | None:
    """View a gain or bias as (B, L, C), with stride 0 where it is shared."""
    if parameter is None:
        return None
    if parameter.stride(-1) != 1:
        parameter = parameter.contiguous()
    return parameter.expand(x_BLC.shape)


def row_strides(parameter: torch.Tensor | None) -> tuple[int, int]:
    """Strides of a broadcast parameter along batch and rows; a size of 1 strides by 0."""
    if parameter is None:
        return 0, 0
    strides = (s if n > 1 else 0 for s, n in zip(parameter.stride(), parameter.shape, strict=True))
    batch, row, *_ = strides
    return batch, row


def normalize_rows(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    centered: bool,
    gain_offset: float,
    scheme: Scheme | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Normalize each row of `x` (…, C); with a scheme of 1×128 groups, quantize the result.

    Returns y of x's shape and None, or q of x's shape and its scale (M, C / 128), strides (1, M).
    """
    y = torch.empty(x.shape, dtype=scheme.dtype if scheme else x.dtype, device=x.device)
    rows_BLC = as_batched_rows(x)
    batch, length, channels = rows_BLC.shape
    scale = None
    if scheme is not None:
        groups = channels // scheme.activation_block[1]
        scale = torch.empty((groups, batch * length), dtype=torch.float32, device=x.device).t()
    if x.numel() == 0:
        return y, scale
    gain, bias = broadcast_to_rows(gain, rows_BLC), broadcast_to_rows(bias, rows_BLC)
    gain_batch, gain_row = row_strides(gain)
    bias_batch, bias_row = row_strides(bias)
    tiling = RowTiling.of(channels)
    tiles = 4 if batch * length >= 16384 else 1  # amortizes loading gain and bias
    _normalize_rows[(triton.cdiv(length, tiling.rows * tiles), batch)](
        rows_BLC,
        gain,
        bias,
        y,
        scale,
        eps,
        length,
        rows_BLC.stride(0),
        rows_BLC.stride(1),
        gain_batch,
        gain_row,
        bias_batch,
        bias_row,
        CHANNELS=channels,
        GROUPS=tiling.groups,
        GROUP=tiling.group,
        ROWS=tiling.rows,
        TILES=tiles,
        CENTERED=centered,
        OFFSET=gain_offset,
        PER_TOKEN=gain_row != 0 or bias_row != 0,
        DIVISOR=scheme.divisor if scheme else 1.0,
        num_warps=tiling.warps,
    )
    return y, scale


def measure_rows(x_BLC: torch.Tensor, eps: float) -> torch.Tensor:
    """Mean and reciprocal deviation of each row: (2, B·L) float32."""
    batch, length, channels = x_BLC.shape
    statistics = torch.empty((2, batch * length), dtype=torch.float32, device=x_BLC.device)
    tiling = RowTiling.of(channels)
    _measure_rows[(triton.cdiv(length, tiling.rows), batch)](
        x_BLC,
        statistics,
        eps,
        length,
        x_BLC.stride(0),
        x_BLC.stride(1),
        CHANNELS=channels,
        GROUPS=tiling.groups,
        GROUP=tiling.group,
        ROWS=tiling.rows,
        num_warps=tiling.warps,
    )
    return statistics
