"""GELU whose result is quantized at once, without rounding to x's dtype in between.

gelu_quantize(x) = quantize_activation(gelu_tanh(x))

gelu_tanh(x) = x/2 · (1 + tanh(√(2/π)·(x + 0.044715·x³)))   (Hendrycks and Gimpel, arXiv 1606.08415)
"""

from __future__ import annotations

import torch

from ..block_quantize import fake
from ..checks import check_activation
from ..operator import Operator
from ..row_calls import describe_quantized_rows, quantize_providers
from ..schemes import check_in_features, scheme_named


def check(x: torch.Tensor, scheme: str) -> None:
    check_activation("gelu_quantize", x)
    check_in_features(x.shape[-1], scheme_named(scheme))


GELU_QUANTIZE = Operator(
    name="gelu_quantize",
    schema="(Tensor x, str scheme) -> (Tensor, Tensor)",
    package=__name__,
    fake=fake,
    check=check,
    describe=describe_quantized_rows,
    providers=quantize_providers(__name__),
)


def gelu_quantize(x: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize `gelu(x, approximate="tanh")` without storing it.

    Args:
        x: (…, K) in bfloat16, float16 or float32, finite, K a multiple of 128; any strides.
        scheme: `"int8-block"` or `"fp8-block"`.

    Returns:
        q of x's shape and its float32 scale, laid out as by `quantize_activation`.

    Raises:
        OperatorInputError: for another dtype or scheme, or a K that 128 does not divide.
    """
    return torch.ops.turbo_opt.gelu_quantize.default(x, scheme)
