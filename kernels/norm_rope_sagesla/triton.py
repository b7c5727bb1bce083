"""norm_rope_sagesla by the kernels of _triton/attention."""

from __future__ import annotations

from typing import Any

import torch

from .._triton.attention.launch import sparse_linear_attention
from ..sparse_rules import as_heads
from . import RotatedArguments


def norm_rope_sagesla(q: torch.Tensor, *others: Any, cuda: bool = False) -> torch.Tensor:
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    attend_into(o, q, *others, cuda=cuda)
    return o


def attend_into(
    o: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *others: Any,
    cuda: bool,
    o_scale: torch.Tensor | None = None,
) -> None:
    """Write norm_rope_sagesla(q, k, v, *others) to `o` (B, L, H·D), contiguous.

    Args:
        cuda, o_scale: as for `sparse_linear_attention`.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    attention, pv, rotation = RotatedArguments.of(q, k, v, *others)
    sparse_linear_attention(
        attention.q, attention.k, attention.v, as_heads(o, attention.q.shape[-1]),
        attention.blocks, rotation=rotation, projection=attention.projection,
        int8=True, fp8=pv == "fp8", cuda=cuda, o_scale=o_scale,
    )  # fmt: skip
