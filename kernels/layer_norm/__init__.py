"""LayerNorm, affine if given a weight and a bias, in float32."""

from __future__ import annotations

import torch

from ..checks import check_activation, check_channels
from ..operator import Operator
from ..row_calls import describe_rows, like_x, row_providers


def check(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> None:
    check_activation("layer_norm", x)
    check_channels("layer_norm", "weight", weight, x)
    check_channels("layer_norm", "bias", bias, x)


LAYER_NORM = Operator(
    name="layer_norm",
    schema="(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    package=__name__,
    fake=like_x,
    check=check,
    describe=describe_rows,
    providers=row_providers(__name__),
)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """LayerNorm of `x` over its last dimension, in float32.

    Args:
        x: (…, C) in bfloat16, float16 or float32, any strides. In each row the squares must have a
            sum that float32 holds: ‖x‖ < 1.8e19 (‖x − mean‖ by the reference and Triton). Beyond
            that the row is lost, as in `torch.nn.functional.layer_norm`: the bias, or NaN.
        weight: (C,), float32 or x's dtype, or None for 1.
        bias: (C,), float32 or x's dtype, or None for 0.
        eps: added to the variance.

    Returns:
        (…, C) of x's dtype, contiguous, rounded once.

    Raises:
        OperatorInputError: for another dtype, or shapes that do not fit.
    """
    return torch.ops.turbo_opt.layer_norm.default(x, weight, bias, eps)
