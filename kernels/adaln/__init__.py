"""Adaptive layer norm: LayerNorm without parameters, then a modulation, in one pass.

adaln(x) = LN(x) · (1 + scale) + shift
"""

from __future__ import annotations

import torch

from ..checks import check_activation, check_modulation
from ..operator import Operator
from ..row_calls import describe_rows, like_x, row_providers


def check(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> None:
    check_activation("adaln", x, rank=3)
    check_modulation("adaln", "scale", scale, x)
    check_modulation("adaln", "shift", shift, x)


ADALN = Operator(
    name="adaln",
    schema="(Tensor x, Tensor scale, Tensor shift, float eps) -> Tensor",
    package=__name__,
    fake=like_x,
    check=check,
    describe=describe_rows,
    providers=row_providers(__name__),
)


def adaln(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    """LayerNorm of `x` over its last dimension, times (1 + scale), plus shift, in float32.

    Args:
        x: (B, L, C) in bfloat16, float16 or float32, any strides.
        scale: (B or 1, L or 1, C), float32 or x's dtype.
        shift: as scale.
        eps: added to the variance.

    Returns:
        (B, L, C) of x's dtype, contiguous, rounded once.

    Raises:
        OperatorInputError: for another dtype, or shapes that do not fit.
    """
    return torch.ops.turbo_opt.adaln.default(x, scale, shift, eps)
