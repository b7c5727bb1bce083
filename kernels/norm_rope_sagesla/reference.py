"""The definition of norm_rope_sagesla, in float32 up to the 8-bit rounding of sagesla."""

from __future__ import annotations

from typing import Any

import torch

from ..norm_rope.reference import norm_rope_in_float
from ..sagesla.reference import sagesla
from ..sparse_rules import as_heads


def norm_rope_sagesla(q: torch.Tensor, *others: Any) -> torch.Tensor:
    return norm_rope_sagesla_in_float(q, *others).to(q.dtype)


def norm_rope_sagesla_in_float(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    *attention: Any,
) -> torch.Tensor:
    """(B, L, H·D) float32, not rounded; `attention` is what sagesla takes besides q, k and v."""
    q_BHLD = norm_rope_in_float(q, q_weight, cos, sin, eps).transpose(1, 2)
    k_BHLD = norm_rope_in_float(k, k_weight, cos, sin, eps).transpose(1, 2)
    v_BHLD = as_heads(v, q_BHLD.shape[-1])
    o_BHLD = sagesla(q_BHLD, k_BHLD, v_BHLD, *attention)
    return o_BHLD.transpose(1, 2).flatten(2)
