"""adaln whose result is quantized at once, without rounding to x's dtype in between.

adaln_quantize(x) = quantize_activation(LN(x) · (1 + scale) + shift)
"""

from __future__ import annotations

import torch

from ..block_quantize import fake as fake_quantized
from ..checks import check_activation, check_modulation
from ..operator import Operator
from ..row_calls import describe_quantized_rows, row_providers
from ..schemes import check_in_features, scheme_named


def check(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, scheme: str
) -> None:
    check_activation("adaln_quantize", x, rank=3)
    check_modulation("adaln_quantize", "scale", scale, x)
    check_modulation("adaln_quantize", "shift", shift, x)
    check_in_features(x.shape[-1], scheme_named(scheme))


ADALN_QUANTIZE = Operator(
    name="adaln_quantize",
    schema="(Tensor x, Tensor scale, Tensor shift, float eps, str scheme) -> (Tensor, Tensor)",
    package=__name__,
    fake=fake_quantized,
    check=check,
    describe=describe_quantized_rows,
    providers=row_providers(__name__),
)


def adaln_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float = 1e-6,
    scheme: str = "fp8-block",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize `adaln(x, scale, shift, eps)` without storing it.

    Args:
        x: (B, L, C) in bfloat16, float16 or float32, C a multiple of 128; any strides.
        scale: (B or 1, L or 1, C), float32 or x's dtype.
        shift: as scale.
        eps: added to the variance.
        scheme: `"int8-block"` or `"fp8-block"`.

    Returns:
        q (B, L, C) and its float32 scale, laid out as by `quantize_activation`, M being B·L.

    Raises:
        OperatorInputError: for another dtype or scheme, or shapes that do not fit.
    """
    return torch.ops.turbo_opt.adaln_quantize.default(x, scale, shift, eps, scheme)
