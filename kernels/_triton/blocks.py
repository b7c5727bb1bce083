"""Quantize (M, K) in tiles of 128×128, one scale per tile or one per row of it.

Whoever fuses a norm in front passes each row's statistics, measured before in a pass of its own:
a block's scale depends on 128 whole rows, more than one program can hold.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..schemes import BLOCK, SCHEMES, Scheme, blocks
from .device import block_scale, gelu_tanh, load_float, to_quantized
from .rows import (
    Branch,
    as_batched_rows,
    broadcast_to_rows,
    measure_rows,
    quantize_normalized_rows,
    row_strides,
)


@triton.jit
def _quantize_tiles(
    x,  # (B, L, K), strides (x_batch, x_row, 1); M = B·L
    statistics,  # (2, M) float32: mean, reciprocal deviation; or None: x is quantized as it is
    gain,  # broadcast to (B, L, K), strides (gain_batch, gain_row, 1), or None
    bias,  # broadcast to (B, L, K), strides (bias_batch, bias_row, 1), or None
    q,  # (M, K), contiguous
    q_scale,  # (ceil(M / 128), K / 128) contiguous, or PER_ROW (M, K / 128) with strides (1, M)
    rows,  # M
    length,
    x_batch,
    x_row,
    gain_batch,
    gain_row,
    bias_batch,
    bias_row,
    COLUMNS: tl.constexpr,
    SIDE: tl.constexpr,
    OFFSET: tl.constexpr,
    PER_ROW: tl.constexpr,
    SHARED: tl.constexpr,  # all rows have the same gain and bias
    GELU: tl.constexpr,
    DIVISOR: tl.constexpr,
):
    column_block = tl.program_id(0)
    row_block = tl.program_id(1)
    if statistics is not None:  # the rows measured last are the ones still in cache
        row_block = tl.num_programs(1) - 1 - row_block
    row = (row_block * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    column = (column_block * SIDE + tl.arange(0, SIDE))[None, :]
    exists = row < rows
    inside = exists[:, None] & (column < COLUMNS)
    batch = (row // length)[:, None]
    token = (row % length)[:, None]

    values = load_float(x, batch * x_batch + token * x_row + column, inside)
    if statistics is not None:
        mean = tl.load(statistics + row, mask=exists, other=0.0)[:, None]
        rstd = tl.load(statistics + rows + row, mask=exists, other=0.0)[:, None]
        values = (values - mean) * rstd
    if GELU:
        values = gelu_tanh(values)
    if gain is not None:
        if SHARED:
            values *= OFFSET + load_float(gain, column, column < COLUMNS)
        else:
            offsets = batch * gain_batch + token * gain_row + column
            values *= OFFSET + load_float(gain, offsets, inside)
    if bias is not None:
        if SHARED:
            values += load_float(bias, column, column < COLUMNS)
        else:
            values += load_float(bias, batch * bias_batch + token * bias_row + column, inside)
    values = tl.where(inside, values, 0.0)

    if PER_ROW:
        scale = block_scale(tl.max(tl.abs(values), axis=1), DIVISOR)
        tl.store(q_scale + column_block.to(tl.int64) * rows + row, scale, mask=exists)
        quantized = to_quantized(values, scale[:, None], q.dtype.element_ty)
    else:
        scale = block_scale(tl.max(tl.max(tl.abs(values), axis=1), axis=0), DIVISOR)
        tl.store(q_scale + row_block * tl.num_programs(0) + column_block, scale)
        quantized = to_quantized(values, scale, q.dtype.element_ty)
    tl.store(q + row[:, None] * COLUMNS + column, quantized, mask=inside)


def new_quantized(x: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialized outputs of quantizing `x` (…, K), in the layout that operators return."""
    columns = x.shape[-1]
    rows = x.numel() // columns
    q = torch.empty(x.shape, dtype=scheme.dtype, device=x.device)
    if scheme.activation_block[0] == 1:
        scale = torch.empty((columns // BLOCK, rows), dtype=torch.float32, device=x.device).t()
    else:
        shape = (blocks(rows), columns // BLOCK)
        scale = torch.empty(shape, dtype=torch.float32, device=x.device)
    return q, scale


def quantize_tiles(
    x: torch.Tensor,
    scheme: Scheme,
    *,
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    gain_offset: float = 0.0,
    eps: float | None = None,
    branch: Branch | None = None,
    gelu: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize `x` (…, K) by `scheme`, or GELU(x), or with `eps` LN(x)·(gain_offset + gain) + bias.

    With a branch, x plus the branch is normalized, and its stream is written.
    """
    q, scale = new_quantized(x, scheme)
    if x.numel() == 0:
        return q, scale
    rows_BLC = as_batched_rows(x)
    batch, length, columns = rows_BLC.shape
    gain, bias = broadcast_to_rows(gain, rows_BLC), broadcast_to_rows(bias, rows_BLC)
    statistics = None if eps is None else measure_rows(rows_BLC, eps, branch)
    if branch is not None:
        rows_BLC = as_batched_rows(branch.stream)
    strides = (*row_strides(gain), *row_strides(bias))
    _quantize_tiles[(columns // BLOCK, blocks(batch * length))](
        rows_BLC,
        statistics,
        gain,
        bias,
        q,
        scale,
        batch * length,
        length,
        rows_BLC.stride(0),
        rows_BLC.stride(1),
        *strides,
        COLUMNS=columns,
        SIDE=BLOCK,
        OFFSET=gain_offset,
        PER_ROW=scheme.activation_block[0] == 1,
        SHARED=not any(strides),
        GELU=gelu,
        DIVISOR=scheme.divisor,
        num_warps=8,
    )
    return q, scale


def quantize_norm(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    scheme: str,
    *,
    gain_offset: float,
    branch: Branch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize LN(x)·(gain_offset + gain) + bias, of x (…, C) or of x plus a branch.

    Groups of a row take one pass; blocks of 128 rows have their statistics measured first.
    """
    rules = SCHEMES[scheme]
    if rules.activation_block[0] == 1:
        return quantize_normalized_rows(
            x, gain, bias, eps, rules, gain_offset=gain_offset, branch=branch
        )
    return quantize_tiles(
        x, rules, gain=gain, bias=bias, gain_offset=gain_offset, eps=eps, branch=branch
    )
