"""Quantize activations and weights in blocks, as the schemes of `turbo_opt.kernels.SCHEMES` say.

quantize(v) = round_half_even(v / scale), scale = max(amax of the block, 1e-8) / divisor
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..checks import check_activation
from ..operator import Operator
from ..row_calls import describe_quantized_rows, quantize_providers
from ..schemes import BLOCK, blocks, check_in_features, scheme_named
from .weight import dequantize_weight, quantize_weight

__all__ = [
    "QUANTIZE_ACTIVATION",
    "dequantize_activation",
    "dequantize_weight",
    "quantize_activation",
    "quantize_weight",
]


def check(x: torch.Tensor, scheme: str) -> None:
    check_activation("quantize_activation", x)
    check_in_features(x.shape[-1], scheme_named(scheme))


def fake(x: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """x quantized by the scheme that is the last argument, as other operators have it too."""
    rules = scheme_named(others[-1])
    rows, groups = math.prod(x.shape[:-1]), x.shape[-1] // BLOCK
    q = x.new_empty(x.shape, dtype=rules.dtype)
    if rules.activation_block[0] == 1:
        return q, x.new_empty((groups, rows), dtype=torch.float32).t()
    return q, x.new_empty((blocks(rows), groups), dtype=torch.float32)


QUANTIZE_ACTIVATION = Operator(
    name="quantize_activation",
    schema="(Tensor x, str scheme) -> (Tensor, Tensor)",
    package=__name__,
    fake=fake,
    check=check,
    describe=describe_quantized_rows,
    providers=quantize_providers(__name__),
)


def quantize_activation(x: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize `x` in blocks of its (M, K) form, M being all dimensions but the last.

    Args:
        x: (…, K) in bfloat16, float16 or float32, finite, K a multiple of 128; any strides.
        scheme: `"int8-block"` or `"fp8-block"`.

    Returns:
        q of x's shape, contiguous, int8 or float8_e4m3fn; and its float32 scale:
        int8-block (ceil(M / 128), K / 128), contiguous, the last block of rows may be partial;
        fp8-block (M, K / 128) with strides (1, M).

    Raises:
        OperatorInputError: for another dtype or scheme, or a K that 128 does not divide.
    """
    return torch.ops.turbo_opt.quantize_activation.default(x, scheme)


def dequantize_activation(q: torch.Tensor, scale: torch.Tensor, scheme: str) -> torch.Tensor:
    """The float32 values that quantize_activation's result (q, scale) stands for, of q's shape."""
    rows_per_block = scheme_named(scheme).activation_block[0]
    flat_MK = q.reshape(-1, q.shape[-1])
    scale_MG = scale.repeat_interleave(rows_per_block, dim=0)[: flat_MK.shape[0]]
    values_MGK = flat_MK.float().unflatten(-1, (-1, BLOCK)) * scale_MG[..., None]
    return values_MGK.reshape(q.shape)
