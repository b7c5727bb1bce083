"""residual_layer_norm_quantize by rows.cu in groups of 1×128, by blocks.cu in 128×128."""

from __future__ import annotations

import torch

from .._cuda.blocks import quantize_norm
from .._cuda.rows import Branch


def residual_layer_norm_quantize(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    scheme: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    stream = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    branch = Branch(y, gate, stream)
    return stream, *quantize_norm(x, weight, bias, eps, scheme, gain_offset=0, branch=branch)
