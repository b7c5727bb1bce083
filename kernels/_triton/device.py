"""Device functions shared by the Triton kernels.

Tiles of rows are three-dimensional, (ROWS, GROUPS, GROUP): a row's channels are split into groups,
the groups of 128 that quantization needs or else one group of the whole row. Groups and channels
beyond the row's end are masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Adding and subtracting 1.5·2²³ rounds a float32 below 2²² to the nearest even integer.
ROUNDING = tl.constexpr(12582912.0)


@triton.jit
def load_float(pointer, offsets, mask):
    """Load as float32, with 0 where masked."""
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def sum_of_row(tile):
    """(ROWS, GROUPS, GROUP) → (ROWS, 1, 1)."""
    return tl.sum(tl.sum(tile, axis=2), axis=1)[:, None, None]


@triton.jit
def block_scale(amax, DIVISOR: tl.constexpr):
    """The scale of a block whose largest magnitude is `amax`; SMALLEST_AMAX of schemes.py."""
    return tl.maximum(amax, 1e-8) / DIVISOR


@triton.jit
def to_quantized(x, scale, DTYPE: tl.constexpr):
    """round_half_even(x / scale), limited to the range of DTYPE (int8 or float8e4nv)."""
    scaled = x * (1.0 / scale)
    if tl.int8 == DTYPE:
        rounded = (scaled + ROUNDING) - ROUNDING
        return tl.minimum(tl.maximum(rounded, -128.0), 127.0).to(tl.int8)
    return tl.minimum(tl.maximum(scaled, -448.0), 448.0).to(DTYPE)


@triton.jit
def gelu_tanh(x):
    """x · sigmoid(√(8/π)·(x + 0.044715·x³)), which is GELU's tanh form.

    1 / (1 + e) is taken as the square of a reciprocal square root, one instruction on a GPU.
    """
    power = x * (-2.302208198 - 0.1029432397 * x * x)  # −√(8/π)·log2(e)·(1, 0.044715)
    root = tl.rsqrt(1.0 + tl.math.exp2(power))
    return x * (root * root)
