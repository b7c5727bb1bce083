"""The definition of sagesla: its operands are rounded to 8 bits, its sums are float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..schemes import SMALLEST_AMAX
from ..sla import SparseArguments
from ..sla.reference import (
    linear_attention,
    projected,
    route,
    sparse_attention,
    split_blocks,
)
from ..sparse_rules import empty_heads

INT8_MAX = 127.0
FP8_MAX = 448.0


def sagesla(*arguments: Any) -> torch.Tensor:
    *shared, pv = arguments
    q, k, v, proj_weight, proj_bias, topk, block_q, block_k, feature_map = SparseArguments(*shared)
    if q.numel() == 0:
        return empty_heads(q)
    q32, k32, v32 = q.float(), k.float(), v.float()
    smooth = k32 - k32.mean(2, keepdim=True)
    lists = route(q32, smooth, topk, block_q, block_k)
    q_rounded, k_rounded, v_rounded, round_p = round_operands(q32, smooth, v, block_k, pv)
    o = sparse_attention(q_rounded, k_rounded, v_rounded, lists, block_q, block_k, round_p)
    if proj_weight is not None:
        o = o + projected(linear_attention(q32, k32, v32, feature_map), proj_weight, proj_bias)
    return empty_heads(q).copy_(o)


def round_operands(
    q: torch.Tensor, smooth: torch.Tensor, v: torch.Tensor, block_k: int, pv: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """What SageAttention multiplies, in float32: q, smoothed k and v as rounded; P's rounding.

    Args:
        q, smooth: (B, H, L, D) float32, k less its mean token.
        v: (B, H, L, D) in the dtype that P and v have with `pv="16bit"`.
    """
    q_rounded, k_rounded = through_int8(q, 1), through_int8(smooth, block_k)
    if pv == "fp8":
        return q_rounded, k_rounded, v_through_fp8(v.float()), p_through_fp8
    return q_rounded, k_rounded, v.float(), lambda p: p.to(v.dtype).float()


def through_int8(x_BHLD: torch.Tensor, block: int) -> torch.Tensor:
    """x as int8 with a scale per head and `block` tokens, amax / 127, and back to float32."""
    tiles = split_blocks(x_BHLD, block)
    scale = tiles.abs().amax((-1, -2), keepdim=True).clamp_min(SMALLEST_AMAX) / INT8_MAX
    return ((tiles / scale).round() * scale).flatten(2, 3)[:, :, : x_BHLD.shape[2]]


def v_through_fp8(v_BHLD: torch.Tensor) -> torch.Tensor:
    """v as e4m3 with one scale per head and channel, amax / 448, and back to float32."""
    scale = v_BHLD.abs().amax(2, keepdim=True).clamp_min(SMALLEST_AMAX) / FP8_MAX
    return (v_BHLD / scale).to(torch.float8_e4m3fn).float() * scale


def p_through_fp8(p: torch.Tensor) -> torch.Tensor:
    """P in [0, 1] as e4m3 of 448·P, and back to float32."""
    return (p * FP8_MAX).to(torch.float8_e4m3fn).float() / FP8_MAX
