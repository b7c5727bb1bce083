"""residual_layer_norm_quantize at the models' shapes: share of copy bandwidth."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.kernels._harness import InputSet, Session
from benchmarks.kernels._rows import bench_rows
from turbo_opt.kernels import SCHEMES, gated_residual, layer_norm_quantize

EPS = 1e-6


def two_passes(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, *norm: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Our own sum, then our own norm and quantization."""
    stream = gated_residual(x, y, gate)
    return stream, *layer_norm_quantize(stream, *norm)


def bench(session: Session) -> None:
    for scheme in SCHEMES:

        def make(tokens: int, channels: int, scheme: str = scheme) -> InputSet:
            x, y = torch.randn(2, 1, tokens, channels, device=session.device, dtype=torch.bfloat16)
            gate, weight, bias = torch.randn(3, channels, device=session.device)
            return x, y, gate.view(1, 1, -1), weight, bias, EPS, scheme

        bench_rows(
            session, "residual_layer_norm_quantize", make, {"two_passes": two_passes}, scheme=scheme
        )
