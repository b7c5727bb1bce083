"""residual_adaln_quantize at the models' shapes: share of copy bandwidth."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.kernels._harness import InputSet, Session
from benchmarks.kernels._rows import bench_rows
from turbo_opt.kernels import SCHEMES, adaln_quantize, gated_residual

EPS = 1e-6


def two_passes(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, *norm: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Our own sum, then our own norm and quantization."""
    stream = gated_residual(x, y, gate)
    return stream, *adaln_quantize(stream, *norm)


def bench(session: Session) -> None:
    for scheme in SCHEMES:

        def make(tokens: int, channels: int, scheme: str = scheme) -> InputSet:
            x, y = torch.randn(2, 1, tokens, channels, device=session.device, dtype=torch.bfloat16)
            gate, scale, shift = torch.randn(3, 1, 1, channels, device=session.device)
            return x, y, gate, scale, shift, EPS, scheme

        bench_rows(
            session, "residual_adaln_quantize", make, {"two_passes": two_passes}, scheme=scheme
        )
