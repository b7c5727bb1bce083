"""The definition of residual_adaln_quantize, in float32."""

from __future__ import annotations

from typing import Any

import torch

from ..adaln_quantize.reference import adaln_quantize
from ..gated_residual.reference import gated_residual


def residual_adaln_quantize(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None, *norm: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = gated_residual(x, y, gate)
    return x, *adaln_quantize(x, *norm)
