"""Quantize weights in 128×128 blocks, a band of rows at a time: plain functions, no operators."""

from __future__ import annotations

import torch

from ..errors import OperatorInputError
from ..schemes import BLOCK, SMALLEST_AMAX, Scheme, blocks, check_in_features, scheme_named

_E4M3_BITS = -0x78100000  # sign, exponent and mantissa of an e4m3 code, moved up by 20 bits
BAND = BLOCK  # rows quantized at once …
TILE = 16 * BLOCK  # … and columns: two such tiles in float32 stay in the cache of a core


def quantize_weight(weight: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a linear layer's weight in 128×128 blocks.

    The numbers are those of `reference.scale_of` and `reference.to_quantized`. Needs memory for the
    result and two tiles of 128×2048 in float32, whatever the size.

    Args:
        weight: (N, K) of any floating dtype, K a multiple of 128. N may be anything.
        scheme: `"int8-block"` or `"fp8-block"`.

    Returns:
        q (N, K), contiguous, of the scheme's dtype, and scale (ceil(N / 128), K / 128) float32.

    Raises:
        OperatorInputError: for another shape, dtype or scheme.
    """
    rules = scheme_named(scheme)
    if weight.ndim != 2 or not weight.is_floating_point():
        raise OperatorInputError(
            f"quantize_weight: weight must be a floating (N, K) matrix, got {weight.dtype} of "
            f"shape {tuple(weight.shape)}"
        )
    rows, columns = weight.shape
    check_in_features(columns, rules)
    q = torch.empty((rows, columns), dtype=rules.dtype, device=weight.device)
    scale = torch.empty((blocks(rows), columns // BLOCK), device=weight.device)
    # Two buffers for all tiles: fresh ones would cost more in page faults than the arithmetic.
    buffers = torch.empty((2, min(rows, BAND) * min(columns, TILE)), device=weight.device)
    for start in range(0, rows, BAND):
        band = slice(start, start + BAND)
        for left in range(0, columns, TILE):
            tile = band, slice(left, left + TILE)
            scale_G = scale[start // BLOCK, left // BLOCK : (left + TILE) // BLOCK]
            _quantize_tile(weight[tile], q[tile], scale_G, buffers, rules)
    return q, scale


def _quantize_tile(
    weight_MK: torch.Tensor,
    q_MK: torch.Tensor,
    scale_G: torch.Tensor,
    buffers: torch.Tensor,
    rules: Scheme,
) -> None:
    """One row of blocks: fills q_MK and scale_G."""
    values, magnitudes = buffers[:, : weight_MK.numel()].view(2, *weight_MK.shape)
    values.copy_(weight_MK)
    torch.abs(values, out=magnitudes)
    torch.amax(magnitudes.unflatten(-1, (-1, BLOCK)), (0, 2), out=scale_G)
    scale_G.clamp_min_(SMALLEST_AMAX).div_(rules.divisor)
    values.unflatten(-1, (-1, BLOCK)).div_(scale_G[:, None])
    if not rules.dtype.is_floating_point:
        values.round_()
    if rules.divisor != rules.highest:  # else what exceeds it by a float32 rounding becomes it
        values.clamp_(rules.lowest, rules.highest)
    q_MK.copy_(values)


def dequantize_weight(
    q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The (N, K) values, in `dtype`, that quantize_weight's result (q, scale) stands for."""
    rows, columns = q.shape
    if scale.shape != (blocks(rows), columns // BLOCK):
        raise OperatorInputError(
            f"dequantize_weight: scale must have shape {(blocks(rows), columns // BLOCK)} for q of "
            f"shape {(rows, columns)}, got {tuple(scale.shape)}"
        )
    weight = torch.empty((rows, columns), dtype=dtype, device=q.device)
    values = torch.empty((min(rows, BAND), columns), device=q.device)
    for start in range(0, rows, BAND):
        band = q[start : start + BAND]
        values_NK = _to_float32(band, values[: band.shape[0]])
        values_NK.unflatten(-1, (-1, BLOCK)).mul_(scale[start // BLOCK][:, None])
        weight[start : start + BAND] = values_NK
    return weight


def _to_float32(q: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`out` (float32), set to the values of `q`, int8 or e4m3, of the same shape.

    On CPUs torch converts e4m3 one value at a time. Its bits, put where float32 has them, are the
    value times 2^-120, subnormal ones included; only NaN has no such form.
    """
    if q.dtype is not torch.float8_e4m3fn or q.device.type != "cpu":
        return out.copy_(q)
    codes = q.view(torch.int8)
    if codes.bitwise_and(0x7F).eq(0x7F).any():
        return out.copy_(q)
    bits = out.view(torch.int32).copy_(codes)
    bits.bitwise_left_shift_(20).bitwise_and_(_E4M3_BITS)
    return out.mul_(2.0**120)
