"""norm_rope at the models' shapes: share of copy bandwidth."""

from __future__ import annotations

import torch
from torch.nn.functional import rms_norm

from benchmarks.kernels._harness import InputSet, Session
from benchmarks.kernels._rows import bench_rows

EPS, HEAD_DIM = 1e-6, 128


def eager(
    x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    """The composition that diffusers runs: writes into the interleaved halves."""
    heads = rms_norm(x, x.shape[-1:], weight, eps).unflatten(-1, (-1, HEAD_DIM))
    first, second = heads.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(heads)
    out[..., 0::2] = first * cos - second * sin
    out[..., 1::2] = first * sin + second * cos
    return out


def bench(session: Session) -> None:
    def make(tokens: int, channels: int) -> InputSet:
        x = torch.randn(1, tokens, channels, device=session.device, dtype=torch.bfloat16)
        weight = torch.randn(channels, device=session.device, dtype=x.dtype)
        angle = torch.randn(1, tokens, 1, HEAD_DIM // 2, device=session.device)
        return x, weight, angle.cos(), angle.sin(), EPS

    bench_rows(session, "norm_rope", make, {"torch_eager": eager})
