"""sla by the kernels of _triton/attention, in 16 bits."""

from __future__ import annotations

from typing import Any

import torch

from .._triton.attention.launch import sparse_linear_attention
from ..sparse_rules import empty_heads
from . import SparseArguments


def sla(*arguments: Any) -> torch.Tensor:
    given = SparseArguments(*arguments)
    o = empty_heads(given.q)
    sparse_linear_attention(given.q, given.k, given.v, o, given.blocks, projection=given.projection)
    return o
