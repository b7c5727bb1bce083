"""residual_adaln_quantize: one pass for 1×128 groups; for 128×128 blocks, the sum first."""

from __future__ import annotations

import torch

from .._triton.blocks import quantize_norm
from .._triton.rows import Branch


def residual_adaln_quantize(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    scheme: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    branch = Branch(y, gate, torch.empty(x.shape, dtype=x.dtype, device=x.device))
    quantized = quantize_norm(x, scale, shift, eps, scheme, gain_offset=1.0, branch=branch)
    return branch.stream, *quantized
