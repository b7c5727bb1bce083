"""residual_adaln_quantize by rows.cu in groups of 1×128, by blocks.cu in 128×128."""

from __future__ import annotations

import torch

from .._cuda.blocks import quantize_norm
from .._cuda.rows import Branch


def residual_adaln_quantize(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    scheme: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    stream = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    branch = Branch(y, gate, stream)
    return stream, *quantize_norm(x, scale, shift, eps, scheme, gain_offset=1, branch=branch)
