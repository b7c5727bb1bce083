"""quantize_activation at the models' shapes: share of copy bandwidth."""

from __future__ import annotations

import torch

from benchmarks.kernels._harness import InputSet, Session, provider
from benchmarks.kernels._rows import bench_rows
from turbo_opt.kernels import SCHEMES

FFN_ROWS = [(32760, 8960), (75600, 13824)]


def eager(x: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, as torch's own operators."""
    with provider("quantize_activation", "reference") as quantize:
        return quantize(x, scheme)


def bench(session: Session) -> None:
    shapes = session.rows if session.dry or session.quick else [*session.rows, *FFN_ROWS]
    for scheme in SCHEMES:

        def make(tokens: int, channels: int, scheme: str = scheme) -> InputSet:
            x = torch.randn(1, tokens, channels, device=session.device, dtype=torch.bfloat16)
            return x, scheme

        baselines = {"torch_eager": eager}
        bench_rows(session, "quantize_activation", make, baselines, shapes, scheme)
