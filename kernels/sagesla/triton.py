"""sagesla by the kernels of _triton/attention."""

from __future__ import annotations

from typing import Any

import torch

from .._triton.attention.launch import sparse_linear_attention
from ..sla import SparseArguments
from ..sparse_rules import empty_heads


def sagesla(*arguments: Any, cuda: bool = False) -> torch.Tensor:
    *shared, pv = arguments
    given = SparseArguments(*shared)
    o = empty_heads(given.q)
    sparse_linear_attention(
        given.q, given.k, given.v, o, given.blocks,
        projection=given.projection, int8=True, fp8=pv == "fp8", cuda=cuda,
    )  # fmt: skip
    return o
