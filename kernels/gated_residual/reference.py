"""The definition of gated_residual, in float32."""

from __future__ import annotations

import torch


def gated_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    branch = y.float() if gate is None else y.float() * gate.float()
    return (x.float() + branch).to(x.dtype).contiguous()
