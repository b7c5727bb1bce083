"""sage_attention by PyTorch's attention, which rounds nothing to 8 bits: cuDNN's, else flash."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..sparse_rules import as_empty_heads

FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def sage_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, pv: str
) -> torch.Tensor:
    with sdpa_kernel(FASTEST_FIRST, set_priority=True):
        return as_empty_heads(scaled_dot_product_attention(q, k, v, scale=scale))
