"""norm_rope_sagesla_quantize at the models' shapes, beside attention, then quantization."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.kernels._harness import InputSet, Session
from benchmarks.kernels._sparse import bench_sparse, eight_bit_matmul
from benchmarks.kernels.bench_norm_rope_sagesla import arguments
from turbo_opt.kernels import norm_rope_sagesla, quantize_activation

SCHEME = "fp8-block"


def two_passes(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The operators that are fused, each by the provider that is chosen for it."""
    *attention, scheme = args
    return quantize_activation(norm_rope_sagesla(*attention), scheme)


def bench(session: Session) -> None:
    def make(heads: int, tokens: int) -> InputSet:
        return *arguments(session, heads, tokens), SCHEME

    bench_sparse(
        session,
        "norm_rope_sagesla_quantize",
        f"norm_rope_sagesla_quantize/{SCHEME}",
        make,
        lambda: eight_bit_matmul(session),
        scheme=SCHEME,
        baselines={"two_passes": two_passes},
    )
