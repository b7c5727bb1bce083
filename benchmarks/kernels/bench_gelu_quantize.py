"""gelu_quantize at the models' feed-forward shapes: share of copy bandwidth."""

from __future__ import annotations

import torch
from torch.nn.functional import gelu

from benchmarks.kernels._harness import InputSet, Session
from benchmarks.kernels._rows import bench_rows
from turbo_opt.kernels import SCHEMES, quantize_activation

FFN_ROWS = [(32760, 8960), (75600, 13824)]


def two_passes(x: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's GELU, then our own quantization."""
    return quantize_activation(gelu(x, approximate="tanh"), scheme)


def bench(session: Session) -> None:
    shapes = session.rows if session.dry else FFN_ROWS
    for scheme in SCHEMES:

        def make(tokens: int, channels: int, scheme: str = scheme) -> InputSet:
            x = torch.randn(1, tokens, channels, device=session.device, dtype=torch.bfloat16)
            return x, scheme

        bench_rows(session, "gelu_quantize", make, {"two_passes": two_passes}, shapes, scheme)
