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


def _of_equal_channels(x: torch.Tensor) -> torch.Tensor:
    return x[:, :, :65].mean(-1, keepdim=True).expand(-1, -1, -1, x.shape[-1]).contiguous()


def _of_equal_tokens(x: torch.Tensor) -> torch.Tensor:
    return x[:, :, :1].expand(-1, -1, 65, -1).contiguous()


Heads = tuple[torch.Tensor, ...]
EDGE_HEADS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Heads]] = {
    "zeros": lambda *qkv: tuple(torch.zeros_like(x[:, :, :65]) for x in qkv),
    "queries and keys of zero": lambda q, k, v: (torch.zeros_like(q), torch.zeros_like(k), v),
    "constant rows": lambda *qkv: tuple(_of_equal_channels(x) for x in qkv),
    # Nothing is left of such keys when their mean is subtracted.
    "equal tokens": lambda *qkv: tuple(_of_equal_tokens(x) for x in qkv),
    "one token": lambda *qkv: tuple(x[:, :, :1] for x in qkv),
    "a last block of one token": lambda *qkv: tuple(x[:, :, :129] for x in qkv),
}
"""Name → q, k and v (1, H, L ≥ 129, D) of any values → an edge case of attention."""
