"""norm_rope as one read and one write of x."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._triton.device import load_float
from .._triton.rows import as_batched_rows

HEADS_AT_ONCE = 4


@triton.jit
def _normalize_and_rotate(
    x,  # (B, L, H·D), strides (x_batch, x_row, 1)
    weight,  # (H·D,), or None
    cos,  # (L, PAIRS), strides (table_row, table_pair)
    sin,
    y,  # (B, L, H, D), contiguous
    eps,
    length,
    x_batch,
    x_row,
    table_row,
    table_pair,
    HEADS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Each program takes ROWS tokens: their mean squares first, then AT_ONCE heads at a time."""
    CHANNELS: tl.constexpr = HEADS * 2 * PAIRS
    WIDTH: tl.constexpr = AT_ONCE * 2 * PAIRS
    batch = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    exists = row < length
    x += batch * x_batch + row * x_row
    y += (batch * length + row) * CHANNELS
    squares = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for first in tl.static_range(0, CHANNELS, WIDTH):
        channel = first + tl.arange(0, WIDTH)[None, :]
        values = load_float(x, channel, exists & (channel < CHANNELS))
        squares += values * values
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / CHANNELS + eps)[:, None]
    pair = tl.arange(0, AT_ONCE * PAIRS)[None, :] % PAIRS
    at = row * table_row + pair * table_pair
    c = tl.load(cos + at, mask=exists, other=0.0)
    s = tl.load(sin + at, mask=exists, other=0.0)
    for first in tl.static_range(0, CHANNELS, WIDTH):
        channel = first + tl.arange(0, WIDTH)[None, :]
        inside = exists & (channel < CHANNELS)
        values = load_float(x, channel, inside) * rstd
        if weight is not None:
            values *= load_float(weight, channel, channel < CHANNELS)
        even, odd = tl.split(tl.reshape(values, (ROWS, AT_ONCE * PAIRS, 2)))
        turned = tl.join(even * c - odd * s, even * s + odd * c)
        result = tl.reshape(turned, (ROWS, WIDTH)).to(y.dtype.element_ty)
        tl.store(y + channel, result, mask=inside)


def norm_rope(
    x: torch.Tensor, weight: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    x = as_batched_rows(x)
    batch, length, channels = x.shape
    pairs = cos.shape[-1]
    heads = channels // (2 * pairs)
    y = torch.empty((batch, length, heads, 2 * pairs), dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    if sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    rows = 4
    _normalize_and_rotate[(triton.cdiv(length, rows), batch)](
        x, weight, cos, sin, y, eps, length, x.stride(0), x.stride(1), cos.stride(1),
        cos.stride(3),
        HEADS=heads, AT_ONCE=HEADS_AT_ONCE, PAIRS=pairs, ROWS=rows, num_warps=4,
    )  # fmt: skip
    return y
