"""The definition of attention_jvp, in float32 (float64 for float64)."""

from __future__ import annotations

import torch

from ..sparse_rules import empty_heads

QUERIES_AT_ONCE = 512  # bounds the memory of the scores


def attention_jvp(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tq: torch.Tensor,
    tk: torch.Tensor | None,
    tv: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    o, to = empty_heads(q), empty_heads(q)
    exact = torch.promote_types(q.dtype, torch.float32)
    k, v = k.to(exact), v.to(exact)
    scale = q.shape[-1] ** -0.5
    for first in range(0, q.shape[2], QUERIES_AT_ONCE):
        some = slice(first, first + QUERIES_AT_ONCE)
        q_some = q[:, :, some].to(exact)
        p = (q_some @ k.mT * scale).softmax(-1)
        ts = tq[:, :, some].to(exact) @ k.mT
        if tk is not None:
            ts += q_some @ tk.to(exact).mT
        p_ts = p * (ts * scale)
        part = p @ v
        moved = p_ts @ v - p_ts.sum(-1, keepdim=True) * part
        if tv is not None:
            moved += p @ tv.to(exact)
        o[:, :, some], to[:, :, some] = part.to(o.dtype), moved.to(o.dtype)
    return o, to
