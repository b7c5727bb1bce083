"""The definition of block quantization, in float32."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from ..schemes import BLOCK, SMALLEST_AMAX, Scheme, scheme_named


def scale_of(values_MK: torch.Tensor, scheme: Scheme, rows_per_block: int) -> torch.Tensor:
    """max(amax, 1e-8) / divisor of each block: (ceil(M / rows_per_block), K / 128)."""
    amax_MG = values_MK.unflatten(-1, (-1, BLOCK)).abs().amax(-1)
    padded = pad(amax_MG, (0, 0, 0, -amax_MG.shape[0] % rows_per_block))
    amax = padded.unflatten(0, (-1, rows_per_block)).amax(1)
    return amax.clamp_min(SMALLEST_AMAX) / scheme.divisor


def to_quantized(
    values_MK: torch.Tensor, scale: torch.Tensor, scheme: Scheme, rows_per_block: int
) -> torch.Tensor:
    """round_half_even(value / scale of its block), limited to the scheme's range: (M, K)."""
    scale_MG = scale.repeat_interleave(rows_per_block, dim=0)[: values_MK.shape[0]]
    scaled_MGK = values_MK.unflatten(-1, (-1, BLOCK)) / scale_MG[..., None]
    if not scheme.dtype.is_floating_point:
        scaled_MGK = scaled_MGK.round()
    return scaled_MGK.clamp(scheme.lowest, scheme.highest).to(scheme.dtype).flatten(-2)


def quantize_activation(x: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor]:
    rules = scheme_named(scheme)
    rows_per_block = rules.activation_block[0]
    values_MK = x.reshape(-1, x.shape[-1]).float()
    if values_MK.shape[0] == 0:
        scale = values_MK.new_empty((0, x.shape[-1] // BLOCK))
        q = values_MK.to(rules.dtype)
    else:
        scale = scale_of(values_MK, rules, rows_per_block)
        q = to_quantized(values_MK, scale, rules, rows_per_block)
    if rows_per_block == 1:
        scale = scale.new_empty(scale.shape[::-1]).t().copy_(scale)  # strides (1, M)
    return q.reshape(x.shape), scale
