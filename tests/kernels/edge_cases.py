"""Inputs at the edge: zeros, constant rows, huge outliers, one token, a last block of one token."""

from __future__ import annotations

from collections.abc import Callable

import torch

# By dtype: q·kᵀ of an outlier fits float32, and float16 holds it.
HUGE = {torch.float32: 1e15, torch.bfloat16: 1e15, torch.float16: 6e4}
OUTLYING_TOKEN, OUTLYING_CHANNEL = 3, 5


def with_an_outlier(x: torch.Tensor) -> torch.Tensor:
    """x (…, L, C) with one value, of the first batch element or head, that dwarfs all others."""
    x = x.clone()
    x[(0,) * (x.ndim - 2)][OUTLYING_TOKEN, OUTLYING_CHANNEL] = HUGE[x.dtype]
    return x


def _with_zero_blocks(x: torch.Tensor) -> torch.Tensor:
    """A block of channels in all tokens but the last, and a whole token."""
    x = x.clone()
    x[:, :-1, :128] = 0
    x[:, 2] = 0
    return x


EDGE_ROWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zeros": torch.zeros_like,
    "zero blocks": _with_zero_blocks,
    "constant rows": lambda x: x[..., :1].abs().expand_as(x).contiguous(),
    "an outlier": with_an_outlier,
    "one token": lambda x: x[:, :1].contiguous(),
    "a last block of one token": lambda x: x[:, :129].contiguous(),
}
"""Name → (1, L ≥ 130, C ≥ 128) of any values → an edge case of that width."""
