"""gated_residual at the models' shapes: share of copy bandwidth."""

from __future__ import annotations

import torch

from benchmarks.kernels._harness import InputSet, Session
from benchmarks.kernels._rows import bench_rows


def eager(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """The composition that diffusers runs."""
    return (x.float() + y * gate).to(x.dtype)


def bench(session: Session) -> None:
    def make(tokens: int, channels: int) -> InputSet:
        x, y = torch.randn(2, 1, tokens, channels, device=session.device, dtype=torch.bfloat16)
        return x, y, torch.randn(1, 1, channels, device=session.device)

    bench_rows(session, "gated_residual", make, {"torch_eager": eager})
