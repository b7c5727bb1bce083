"""adaln at the models' shapes: share of copy bandwidth."""

from __future__ import annotations

import torch
from torch.nn.functional import layer_norm

from benchmarks.kernels._harness import InputSet, Session
from benchmarks.kernels._rows import bench_rows

EPS = 1e-6


def eager(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    """The composition that diffusers runs."""
    return (layer_norm(x.float(), x.shape[-1:], eps=eps) * (1 + scale) + shift).to(x.dtype)


def bench(session: Session) -> None:
    def make(tokens: int, channels: int) -> InputSet:
        x = torch.randn(1, tokens, channels, device=session.device, dtype=torch.bfloat16)
        scale, shift = torch.randn(2, 1, 1, channels, device=session.device)
        return x, scale, shift, EPS

    bench_rows(session, "adaln", make, {"torch_eager": eager})
