"""LayerNorm whose result is quantized at once, without rounding to x's dtype in between.

layer_norm_quantize(x) = quantize_activation(LN(x) · weight + bias)
"""

from __future__ import annotations

import torch

from ..block_quantize import fake as fake_quantized
from ..checks import check_activation, check_channels
from ..operator import Operator
from ..row_calls import describe_quantized_rows, row_providers
from ..schemes import check_in_features, scheme_named


def check(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    scheme: str,
) -> None:
    check_activation("layer_norm_quantize", x)
    check_channels("layer_norm_quantize", "weight", weight, x)
    check_channels("layer_norm_quantize", "bias", bias, x)
    check_in_features(x.shape[-1], scheme_named(scheme))


LAYER_NORM_QUANTIZE = Operator(
    name="layer_norm_quantize",
    schema="(Tensor x, Tensor? weight, Tensor? bias, float eps, str scheme) -> (Tensor, Tensor)",
    package=__name__,
    fake=fake_quantized,
    check=check,
    describe=describe_quantized_rows,
    providers=row_providers(__name__),
)


def layer_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    scheme: str = "fp8-block",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize `layer_norm(x, weight, bias, eps)` without storing it.

    Args:
        x: (…, C) in bfloat16, float16 or float32, C a multiple of 128; any strides.
        weight: (C,), float32 or x's dtype, or None for 1.
        bias: (C,), float32 or x's dtype, or None for 0.
        eps: added to the variance.
        scheme: `"int8-block"` or `"fp8-block"`.

    Returns:
        q of x's shape and its float32 scale, laid out as by `quantize_activation`.

    Raises:
        OperatorInputError: for another dtype or scheme, or shapes that do not fit.
    """
    return torch.ops.turbo_opt.layer_norm_quantize.default(x, weight, bias, eps, scheme)
