"""The definition of padded_attention, in float32: ln n is added to the score of n equal keys."""

from __future__ import annotations

import math

import torch

from ..sparse_rules import empty_heads

QUERIES_AT_ONCE = 512  # bounds the memory of the scores


def padded_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor, scale: float | None
) -> torch.Tensor:
    return padded_attention_into(empty_heads(q), q, k, v, start, scale)


def padded_attention_into(
    o: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    scale: float | None,
) -> torch.Tensor:
    """As the operator, into `o` of any dtype."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys = k.shape[2]
    first_B1 = start.to(torch.int64)[:, None]
    token_T = torch.arange(keys, device=q.device)
    copies_B1 = (keys - first_B1).float()
    # The last token stands for all from `start` on.
    last = token_T == keys - 1
    added_BT = torch.where(last, copies_B1.log(), 0.0)
    added_BT = torch.where((token_T >= first_B1) & ~last, -math.inf, added_BT)[:, None, None]
    k32, v32 = k.float(), v.float()
    for first in range(0, q.shape[2], QUERIES_AT_ONCE):
        some = slice(first, first + QUERIES_AT_ONCE)
        scores = scale * (q[:, :, some].float() @ k32.mT) + added_BT
        o[:, :, some] = scores.softmax(-1) @ v32
    return o
