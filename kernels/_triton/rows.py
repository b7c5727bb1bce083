"""Kernels over whole rows: add a gated branch, normalize, modulate, quantize in groups of 128.

LayerNorm and RMSNorm, plain, affine or modulated (adaln), differ only in constants here:

    x' = x + y · gate
    y = (x' − mean) · rstd · (OFFSET + gain) + bias

A row is held in registers in two parts, since a tile's sides are powers of two: 5120 channels are
4096 and 1024, so that no lane is idle.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..schemes import BLOCK, Scheme
from .device import block_scale, load_float, sum_of_row, to_quantized

TILES_PER_PROGRAM = 4  # amortizes loading gain, bias and gate


@triton.jit
def _channels(FIRST: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """The channels of a part: (1, GROUPS, GROUP)."""
    group = tl.arange(0, GROUPS)[None, :, None]
    return FIRST + group * GROUP + tl.arange(0, GROUP)[None, None, :]


@triton.jit
def _shared(pointer, channel, CHANNELS: tl.constexpr, PER_TOKEN: tl.constexpr):
    """What all rows share of a gain, bias or gate; 0 without one, or where rows differ."""
    if pointer is None or PER_TOKEN:
        values = tl.zeros_like(channel).to(tl.float32)
    else:
        values = load_float(pointer, channel, channel < CHANNELS)
    return values


@triton.jit
def _of_row(shared, pointer, offsets, inside, PER_TOKEN: tl.constexpr):
    """A parameter's value for these rows: the shared one, or each row's own."""
    if PER_TOKEN:
        values = load_float(pointer, offsets, inside)
    else:
        values = shared
    return values


@triton.jit
def _summed(
    x, y, gate, gate_shared, stream, row, inside, channel, x_row, y_row, gate_row, target,
    PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """x, plus the gated branch if there is one; the sum is stored and rounded as stored."""
    values = load_float(x, row * x_row + channel, inside)
    if y is not None:
        branch = load_float(y, row * y_row + channel, inside)
        if gate is not None:
            branch *= _of_row(gate_shared, gate, row * gate_row + channel, inside, PER_TOKEN)
        rounded = (values + branch).to(stream.dtype.element_ty)
        tl.store(stream + target, rounded, mask=inside)
        values = rounded.to(tl.float32)
    return values


@triton.jit
def _modulated(
    values, gain, gain_shared, gain_row, bias, bias_shared, bias_row, row, inside, channel,
    OFFSET: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """values · (OFFSET + gain) + bias."""
    if gain is not None:
        at = row * gain_row + channel
        values *= OFFSET + _of_row(gain_shared, gain, at, inside, PER_TOKEN)
    if bias is not None:
        values += _of_row(bias_shared, bias, row * bias_row + channel, inside, PER_TOKEN)
    return values


@triton.jit
def _write(
    values, y, y_scale, target, inside, exists, scale_row, rows_in_all, FIRST: tl.constexpr,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, CHANNELS: tl.constexpr, DIVISOR: tl.constexpr,
):  # fmt: skip
    """Store a part, quantized per group of each row if there is a scale."""
    if y_scale is not None:
        values = tl.where(inside, values, 0.0)
        scale = block_scale(tl.max(tl.abs(values), axis=2)[:, :, None], DIVISOR)
        tl.store(y + target, to_quantized(values, scale, y.dtype.element_ty), mask=inside)
        group = FIRST // GROUP + tl.arange(0, GROUPS)[None, :, None]
        in_row = exists & (group * GROUP < CHANNELS)
        tl.store(y_scale + group * rows_in_all + scale_row, scale, mask=in_row)
    else:
        tl.store(y + target, values.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _normalize_rows(
    x,  # (B, L, C), strides (x_batch, x_row, 1)
    branch,  # as x, or None
    gate,  # broadcast to (B, L, C), strides (gate_batch, gate_row, 1), or None
    gain,  # as gate
    bias,  # as gate
    stream,  # (B, L, C), contiguous: x plus the gated branch; None without a branch
    y,  # (B, L, C), contiguous; quantized if y_scale is given; None: not normalized
    y_scale,  # (B·L, C / GROUP) with strides (1, B·L), or None
    statistics,  # (2, B·L) float32: mean, then reciprocal deviation; or None
    eps,
    length,
    x_batch, x_row, branch_batch, branch_row, gate_batch, gate_row,
    gain_batch, gain_row, bias_batch, bias_row,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS_A: tl.constexpr,
    GROUPS_B: tl.constexpr,  # 0: one part holds the row
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    CENTERED: tl.constexpr,
    OFFSET: tl.constexpr,
    GATE_PER_TOKEN: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    DIVISOR: tl.constexpr,
):  # fmt: skip
    """Each program takes TILES tiles of ROWS rows of one batch element."""
    batch = tl.program_id(1).to(tl.int64)
    rows_in_all = tl.num_programs(1).to(tl.int64) * length
    FIRST_B: tl.constexpr = GROUPS_A * GROUP
    x += batch * x_batch
    if branch is not None:
        branch += batch * branch_batch
    if gate is not None:
        gate += batch * gate_batch
    if gain is not None:
        gain += batch * gain_batch
    if bias is not None:
        bias += batch * bias_batch
    channel_a = _channels(0, GROUPS_A, GROUP)
    gate_a = _shared(gate, channel_a, CHANNELS, GATE_PER_TOKEN)
    gain_a = _shared(gain, channel_a, CHANNELS, PER_TOKEN)
    bias_a = _shared(bias, channel_a, CHANNELS, PER_TOKEN)
    if GROUPS_B:
        channel_b = _channels(FIRST_B, GROUPS_B, GROUP)
        gate_b = _shared(gate, channel_b, CHANNELS, GATE_PER_TOKEN)
        gain_b = _shared(gain, channel_b, CHANNELS, PER_TOKEN)
        bias_b = _shared(bias, channel_b, CHANNELS, PER_TOKEN)

    for tile in range(TILES):
        first = (tl.program_id(0) * TILES + tile) * ROWS
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
        exists = row < length
        target = (batch * length + row) * CHANNELS
        in_a = exists & (channel_a < CHANNELS)
        a = _summed(
            x, branch, gate, gate_a, stream, row, in_a, channel_a, x_row, branch_row, gate_row,
            target + channel_a, GATE_PER_TOKEN,
        )  # fmt: skip
        total = sum_of_row(a)
        if GROUPS_B:
            in_b = exists & (channel_b < CHANNELS)
            b = _summed(
                x, branch, gate, gate_b, stream, row, in_b, channel_b, x_row, branch_row,
                gate_row, target + channel_b, GATE_PER_TOKEN,
            )  # fmt: skip
            total += sum_of_row(b)
        mean = total / CHANNELS
        if CENTERED:
            a = tl.where(in_a, a - mean, 0.0)
            if GROUPS_B:
                b = tl.where(in_b, b - mean, 0.0)
        squares = sum_of_row(a * a)
        if GROUPS_B:
            squares += sum_of_row(b * b)
        rstd = 1.0 / tl.sqrt(squares / CHANNELS + eps)
        if statistics is not None:
            tl.store(statistics + batch * length + row, mean, mask=exists)
            tl.store(statistics + rows_in_all + batch * length + row, rstd, mask=exists)
        if y is not None:
            a = _modulated(
                a * rstd, gain, gain_a, gain_row, bias, bias_a, bias_row, row, in_a, channel_a,
                OFFSET, PER_TOKEN,
            )  # fmt: skip
            _write(
                a, y, y_scale, target + channel_a, in_a, exists, batch * length + row,
                rows_in_all, 0, GROUPS_A, GROUP, CHANNELS, DIVISOR,
            )  # fmt: skip
            if GROUPS_B:
                b = _modulated(
                    b * rstd, gain, gain_b, gain_row, bias, bias_b, bias_row, row, in_b,
                    channel_b, OFFSET, PER_TOKEN,
                )  # fmt: skip
                _write(
                    b, y, y_scale, target + channel_b, in_b, exists, batch * length + row,
                    rows_in_all, FIRST_B, GROUPS_B, GROUP, CHANNELS, DIVISOR,
                )  # fmt: skip


class RowTiling(NamedTuple):
    """How a row is split in two parts, and how many rows a tile takes."""

    group: int
    groups_a: int
    groups_b: int
    rows: int
    warps: int

    @classmethod
    def of(cls, channels: int) -> RowTiling:
        """About 24 values per thread."""
        if channels % BLOCK:
            group, groups = triton.next_power_of_2(channels), 1
        else:
            group, groups = BLOCK, channels // BLOCK
        groups_a = 1 << (groups.bit_length() - 1)
        rest = groups - groups_a
        groups_b = triton.next_power_of_2(rest) if rest else 0
        width = triton.next_power_of_2(channels)
        rows = max(1, 4096 // width)
        warps = min(16, max(4, rows * width // 1024))
        return cls(group, groups_a, groups_b, rows, warps)


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


class Branch(NamedTuple):
    """What is added to the residual stream before it is normalized, and where the sum goes."""

    y: torch.Tensor  # (B, L, C)
    gate: torch.Tensor | None  # (B or 1, L or 1, C)
    stream: torch.Tensor  # (B, L, C), contiguous


def process_rows(
    x: torch.Tensor,
    *,
    branch: Branch | None = None,
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 0.0,
    centered: bool = False,
    gain_offset: float = 0.0,
    y: torch.Tensor | None = None,
    y_scale: torch.Tensor | None = None,
    divisor: float = 1.0,
    statistics: torch.Tensor | None = None,
) -> None:
    """Add `branch` to x (…, C), normalize the sum into `y`, and measure it, as far as asked for."""
    if x.numel() == 0:
        return
    x = as_batched_rows(x)
    batch, length, channels = x.shape
    y_branch = gate = stream = None
    if branch is not None:
        y_branch, gate, stream = as_batched_rows(branch.y), branch.gate, branch.stream
    gate, gain, bias = (broadcast_to_rows(p, x) for p in (gate, gain, bias))
    tiling = RowTiling.of(channels)
    tiles = TILES_PER_PROGRAM if batch * length >= 16384 else 1
    strides = (row_strides(gate), row_strides(gain), row_strides(bias))
    _normalize_rows[(triton.cdiv(length, tiling.rows * tiles), batch)](
        x, y_branch, gate, gain, bias, stream, y, y_scale, statistics, eps, length,
        x.stride(0), x.stride(1),
        *((y_branch.stride(0), y_branch.stride(1)) if y_branch is not None else (0, 0)),
        *(stride for pair in strides for stride in pair),
        CHANNELS=channels,
        GROUP=tiling.group,
        GROUPS_A=tiling.groups_a,
        GROUPS_B=tiling.groups_b,
        ROWS=tiling.rows,
        TILES=tiles,
        CENTERED=centered,
        OFFSET=gain_offset,
        GATE_PER_TOKEN=strides[0][1] != 0,
        PER_TOKEN=strides[1][1] != 0 or strides[2][1] != 0,
        DIVISOR=divisor,
        num_warps=tiling.warps,
    )  # fmt: skip


def normalize_rows(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    centered: bool,
    gain_offset: float,
) -> torch.Tensor:
    """Normalize each row of `x` (…, C) into a contiguous tensor like it."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    process_rows(x, gain=gain, bias=bias, eps=eps, centered=centered, gain_offset=gain_offset, y=y)
    return y


def quantize_normalized_rows(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    scheme: Scheme,
    *,
    gain_offset: float,
    branch: Branch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm of `x` (…, C), or of x plus a branch, quantized in 1×128 groups.

    Returns q of x's shape and its scale (M, C / 128), strides (1, M).
    """
    q = torch.empty(x.shape, dtype=scheme.dtype, device=x.device)
    rows, groups = x.numel() // x.shape[-1], x.shape[-1] // BLOCK
    scale = torch.empty((groups, rows), dtype=torch.float32, device=x.device).t()
    process_rows(
        x, branch=branch, gain=gain, bias=bias, eps=eps, centered=True, gain_offset=gain_offset,
        y=q, y_scale=scale, divisor=scheme.divisor,
    )  # fmt: skip
    return q, scale


def measure_rows(x: torch.Tensor, eps: float, branch: Branch | None = None) -> torch.Tensor:
    """Mean and reciprocal deviation of each row of x, or of x plus a branch: (2, M) float32."""
    rows = x.numel() // x.shape[-1]
    statistics = torch.empty((2, rows), dtype=torch.float32, device=x.device)
    process_rows(x, branch=branch, eps=eps, centered=True, statistics=statistics)
    return statistics
