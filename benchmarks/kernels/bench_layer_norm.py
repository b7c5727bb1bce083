"""layer_norm at the models' shapes: share of copy bandwidth."""

from __future__ import annotations

import torch
from torch.nn.functional import layer_norm

from benchmarks.kernels._harness import InputSet, Session
from benchmarks.kernels._rows import bench_rows

EPS = 1e-6


def eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """The composition that diffusers runs."""
    return layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)


def bench(session: Session) -> None:
    def make(tokens: int, channels: int) -> InputSet:
        x = torch.randn(1, tokens, channels, device=session.device, dtype=torch.bfloat16)
        weight, bias = torch.randn(2, channels, device=session.device)
        return x, weight, bias, EPS

    bench_rows(session, "layer_norm", make, {"torch_eager": eager})
