"""Quantize weights in 128×128 blocks, a band of rows at a time: plain functions, no operators."""

from __future__ import annotations

import torch

from ..errors import OperatorInputError
from ..schemes import BLOCK, blocks, check_in_features, scheme_named
from .reference import scale_of, to_quantized

BAND = BLOCK  # rows quantized at once: a band in float32 stays in the cache


def quantize_weight(weight: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a linear layer's weight in 128×128 blocks.

    Needs memory for the result and a few bands of 128 rows in float32, whatever the size.

    Args:
        weight: (N, K) of any floating dtype, K a multiple of 128. N may be anything.
        scheme: `"int8-block"` or `"fp8-block"`.

    Returns:
        q (N, K), contiguous, of the scheme's dtype, and scale (ceil(N / 128), K / 128) float32.

    Raises:
        OperatorInputError: for another shape, dtype or scheme.
    """
    rules = scheme_named(scheme)
    if weight.ndim != 2 or not weight.is_floating_point():
        raise OperatorInputError(
            f"quantize_weight: weight must be a floating (N, K) matrix, got {weight.dtype} of "
            f"shape {tuple(weight.shape)}"
        )
    rows, columns = weight.shape
    check_in_features(columns, rules)
    q = torch.empty((rows, columns), dtype=rules.dtype, device=weight.device)
    scale = torch.empty((blocks(rows), columns // BLOCK), device=weight.device)
    for start in range(0, rows, BAND):
        band = weight[start : start + BAND].float()
        block_rows = slice(start // BLOCK, start // BLOCK + blocks(band.shape[0]))
        scale[block_rows] = scale_of(band, rules, BLOCK)
        q[start : start + BAND] = to_quantized(band, scale[block_rows], rules, BLOCK)
    return q, scale


def dequantize_weight(
    q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The (N, K) values, in `dtype`, that quantize_weight's result (q, scale) stands for."""
    rows, columns = q.shape
    if scale.shape != (blocks(rows), columns // BLOCK):
        raise OperatorInputError(
            f"dequantize_weight: scale must have shape {(blocks(rows), columns // BLOCK)} for q of "
            f"shape {(rows, columns)}, got {tuple(scale.shape)}"
        )
    weight = torch.empty((rows, columns), dtype=dtype, device=q.device)
    for start in range(0, rows, BAND):
        band = q[start : start + BAND].float()
        first = start // BLOCK
        scale_NG = scale[first : first + blocks(band.shape[0])].repeat_interleave(BLOCK, dim=0)
        values_NGK = band.unflatten(-1, (-1, BLOCK)) * scale_NG[: band.shape[0], :, None]
        weight[start : start + BAND] = values_NGK.flatten(-2)
    return weight
