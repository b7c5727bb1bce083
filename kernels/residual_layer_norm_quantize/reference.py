"""The definition of residual_layer_norm_quantize, in float32."""

from __future__ import annotations

from typing import Any

import torch

from ..gated_residual.reference import gated_residual
from ..layer_norm_quantize.reference import layer_norm_quantize


def residual_layer_norm_quantize(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None, *norm: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = gated_residual(x, y, gate)
    return x, *layer_norm_quantize(x, *norm)
