"""RMSNorm over the last dimension, in float32.

    rms_norm(x) = x / sqrt(mean(x²) + eps) · weight

As in aten.rms_norm, the product with the weight is formed in float32, also for a float32 weight
and bfloat16 x, and the result is rounded once, to x's dtype.
"""

from __future__ import annotations

import torch

from ..checks import check_activation, check_channels
from ..operator import Operator
from ..row_calls import describe_rows, like_x, row_providers


def check(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> None:
    check_activation("rms_norm", x)
    check_channels("rms_norm", "weight", weight, x)


RMS_NORM = Operator(
    name="rms_norm",
    schema="(Tensor x, Tensor? weight, float eps) -> Tensor",
    package=__name__,
    fake=like_x,
    check=check,
    describe=describe_rows,
    providers=row_providers(__name__),
)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6
) -> torch.Tensor:
    """RMSNorm of `x` over its last dimension, in float32.

    Args:
        x: (…, C) in bfloat16, float16 or float32, any strides. In each row the squares must have a
            sum that float32 holds: ‖x‖ < 1.8e19. Beyond that the row is lost: it becomes 0, as in
            `torch.nn.functional.rms_norm`.
        weight: (C,), float32 or x's dtype, or None for 1.
        eps: added to the mean square.

    Returns:
        (…, C) of x's dtype, contiguous, rounded once.

    Raises:
        OperatorInputError: for another dtype, or shapes that do not fit.
    """
    return torch.ops.turbo_opt.rms_norm.default(x, weight, eps)
