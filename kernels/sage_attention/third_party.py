"""sage_attention by the package `sageattention`, which chooses its kernel by the GPU.

It rounds q in groups of 16 to 128 tokens and k of 64 or 128; P·v is float16 in release 1, from
sm89 on e4m3 in release 2. Release 1.0.6 subtracts k's mean in place, so it is given a copy.
Source: github.com/thu-ml/SageAttention, sageattention/core.py.
"""

from __future__ import annotations

import torch
from sageattention import sageattn

from ..sparse_rules import as_empty_heads, empty_heads


def sage_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, pv: str
) -> torch.Tensor:
    if q.numel() == 0:
        return empty_heads(q)
    q_BLHD, v_BLHD = (_with_unit_stride(x).transpose(1, 2) for x in (q, v))
    k_BLHD = k.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    o_BLHD = sageattn(q_BLHD, k_BLHD, v_BLHD, tensor_layout="NHD", is_causal=False, sm_scale=scale)
    return as_empty_heads(o_BLHD.transpose(1, 2))


def _with_unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
