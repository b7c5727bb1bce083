"""Device functions on a head's tile of tokens.

A tile is kept as two halves, (TOKENS, PAIRS) float32 each: channels 0, 2, 4 … and 1, 3, 5 …, the
two coordinates that rotary embedding turns. Products of q and k, block means and the linear
branch's state do not depend on the order of channels, so what is stored keeps this order: the even
channels first, then the odd ones.

Tiles begin at token `first`; what depends on it is added to the pointer once, so that the offsets
inside the tile stay small and do not change from tile to tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..device import ROUNDING

LOG2_E = tl.constexpr(1.4426950408889634)
INT8_MAX = tl.constexpr(127.0)


@triton.jit
def load_halves(x, first, length, x_token, TOKENS: tl.constexpr, PAIRS: tl.constexpr):
    """Even and odd channels of TOKENS rows of a head; rows beyond the end are 0."""
    row = tl.arange(0, TOKENS)[:, None]
    channel = tl.arange(0, 2 * PAIRS)[None, :]
    x += tl.cast(first, tl.int64) * x_token
    tile = tl.load(x + row * x_token + channel, mask=row < length - first, other=0.0)
    even, odd = tl.split(tl.reshape(tile, (TOKENS, PAIRS, 2)))
    return even.to(tl.float32), odd.to(tl.float32)


@triton.jit
def load_weight(weight, head, PAIRS: tl.constexpr):
    """A head's RMSNorm weights in halves, (1, PAIRS) each; 1 where there are none."""
    pair = tl.arange(0, PAIRS)[None, :]
    if weight is not None:
        weight += head * (2 * PAIRS)
        even = tl.load(weight + 2 * pair).to(tl.float32)
        odd = tl.load(weight + 2 * pair + 1).to(tl.float32)
    else:
        even = tl.full((1, PAIRS), 1.0, dtype=tl.float32)
        odd = even
    return even, odd


@triton.jit
def normalize_halves(
    even,
    odd,
    first,
    length,
    rstd,  # of this batch element's tokens
    even_weight,
    odd_weight,
    cos,  # (L, PAIRS) by strides, or None: q or k is used as it is
    sin,
    table_token,
    table_pair,
    TOKENS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """RMSNorm with its weight, then the rotation of each pair by its token's angle."""
    if cos is not None:
        row = tl.arange(0, TOKENS)
        exists = row < length - first
        factor = tl.load(rstd + first + row, mask=exists, other=0.0)[:, None]
        even *= factor * even_weight
        odd *= factor * odd_weight
        at = row[:, None] * table_token + tl.arange(0, PAIRS)[None, :] * table_pair
        start = tl.cast(first, tl.int64) * table_token
        c = tl.load(cos + start + at, mask=exists[:, None], other=0.0)
        s = tl.load(sin + start + at, mask=exists[:, None], other=0.0)
        turned = even * c - odd * s
        odd = even * s + odd * c
        even = turned
    return even, odd


@triton.jit
def row_max(even, odd):
    """The largest entry of each row."""
    return tl.max(tl.maximum(even, odd), axis=1)


@triton.jit
def feature_halves(even, odd, MAP: tl.constexpr):
    """φ of the linear branch over channels, times a factor per row, which is returned too.

    The factor is what softmax would divide by; 1 for elu + 1 and relu.
    """
    if MAP == "softmax":
        largest = (row_max(even, odd) * LOG2_E)[:, None]
        even = tl.math.exp2(even * LOG2_E - largest)
        odd = tl.math.exp2(odd * LOG2_E - largest)
        factor = tl.sum(even + odd, axis=1)
    else:
        if MAP == "elu":
            even = tl.where(even > 0, even + 1.0, tl.exp(tl.minimum(even, 0.0)))
            odd = tl.where(odd > 0, odd + 1.0, tl.exp(tl.minimum(odd, 0.0)))
        else:
            even = tl.maximum(even, 0.0)
            odd = tl.maximum(odd, 0.0)
        factor = tl.full((even.shape[0],), 1.0, dtype=tl.float32)
    return even, odd, factor


@triton.jit
def to_int8(x, reciprocal):
    """round_half_even(x · reciprocal) as int8, which must lie in −128 … 127.

    Adding 1.5·2²³ leaves the integer in the low bits of the float.
    """
    return (x * reciprocal + ROUNDING).to(tl.int32, bitcast=True).to(tl.int8)
