"""adaln_quantize at the models' shapes: share of copy bandwidth."""

from __future__ import annotations

import torch

from benchmarks.kernels._harness import InputSet, Session
from benchmarks.kernels._rows import bench_rows
from turbo_opt.kernels import SCHEMES, adaln, quantize_activation

EPS = 1e-6


def two_passes(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, scheme: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Our own norm, then our own quantization."""
    return quantize_activation(adaln(x, scale, shift, eps), scheme)


def bench(session: Session) -> None:
    for scheme in SCHEMES:

        def make(tokens: int, channels: int, scheme: str = scheme) -> InputSet:
            x = torch.randn(1, tokens, channels, device=session.device, dtype=torch.bfloat16)
            scale, shift = torch.randn(2, 1, 1, channels, device=session.device)
            return x, scale, shift, EPS, scheme

        bench_rows(session, "adaln_quantize", make, {"two_passes": two_passes}, scheme=scheme)
