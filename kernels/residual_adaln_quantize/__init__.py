"""gated_residual, and the adaln of its result, quantized: the stream is read once.

    x' = x + y · gate
    residual_adaln_quantize(x, y, gate, …) = x', adaln_quantize(x', …)

The norm reads x' as it is stored, rounded to x's dtype.
"""

from __future__ import annotations

from typing import Any

import torch

from ..adaln_quantize import check as check_norm
from ..block_quantize import fake as fake_quantized
from ..checks import check_residual
from ..operator import Operator
from ..row_calls import describe_quantized_rows, like_x, row_providers


def check(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None, *norm: Any) -> None:
    check_residual("residual_adaln_quantize", x, y, gate)
    check_norm(x, *norm)


def fake(x: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return like_x(x), *fake_quantized(x, *others)


RESIDUAL_ADALN_QUANTIZE = Operator(
    name="residual_adaln_quantize",
    schema=(
        "(Tensor x, Tensor y, Tensor? gate, Tensor scale, Tensor shift, float eps, str scheme)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    package=__name__,
    fake=fake,
    check=check,
    describe=describe_quantized_rows,
    providers=row_providers(__name__),
)


def residual_adaln_quantize(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float = 1e-6,
    scheme: str = "fp8-block",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add a gated branch to the stream, and quantize the adaln of the sum.

    Args:
        x, y, gate: as for `gated_residual`, C a multiple of 128.
        scale, shift, eps: as for `adaln_quantize`.
        scheme: `"int8-block"` or `"fp8-block"`.

    Returns:
        x' (B, L, C) of x's dtype; q (B, L, C) and its float32 scale, laid out as by
        `quantize_activation`, M being B·L.

    Raises:
        OperatorInputError: for another dtype or scheme, or shapes that do not fit.
    """
    return torch.ops.turbo_opt.residual_adaln_quantize.default(
        x, y, gate, scale, shift, eps, scheme
    )
