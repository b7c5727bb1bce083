"""rms_norm at the models' shapes: share of copy bandwidth."""

from __future__ import annotations

import torch

from benchmarks.kernels._harness import InputSet, Session
from benchmarks.kernels._rows import bench_rows

EPS = 1e-6


def eager(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


def bench(session: Session) -> None:
    def make(tokens: int, channels: int) -> InputSet:
        x = torch.randn(1, tokens, channels, device=session.device, dtype=torch.bfloat16)
        return x, torch.randn(channels, device=session.device, dtype=x.dtype), EPS

    bench_rows(session, "rms_norm", make, {"torch_eager": eager})
