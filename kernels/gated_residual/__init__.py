"""Add a branch's result to the residual stream, times a gate, in float32.

gated_residual(x, y, gate) = x + y · gate
"""

from __future__ import annotations

import torch

from ..checks import check_residual
from ..operator import Operator
from ..row_calls import describe_rows, like_x, row_providers


def check(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None) -> None:
    check_residual("gated_residual", x, y, gate)


GATED_RESIDUAL = Operator(
    name="gated_residual",
    schema="(Tensor x, Tensor y, Tensor? gate) -> Tensor",
    package=__name__,
    fake=like_x,
    check=check,
    describe=describe_rows,
    providers=row_providers(__name__),
)


def gated_residual(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None = None
) -> torch.Tensor:
    """x + y · gate in float32, rounded once.

    Args:
        x: (B, L, C) in bfloat16, float16 or float32; any strides.
        y: (B, L, C) of x's dtype; any strides.
        gate: (B or 1, L or 1, C), float32 or x's dtype, or None for 1.

    Returns:
        (B, L, C) of x's dtype, contiguous.

    Raises:
        OperatorInputError: for another dtype, or shapes that do not fit.
    """
    return torch.ops.turbo_opt.gated_residual.default(x, y, gate)
