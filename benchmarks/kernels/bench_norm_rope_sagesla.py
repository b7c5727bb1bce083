"""norm_rope_sagesla at the models' shapes: the whole of SageSLA, from projections to O's input."""

from __future__ import annotations

import functools

import torch

from benchmarks.kernels._harness import InputSet, Session
from benchmarks.kernels._sparse import (
    BLOCK_K,
    BLOCK_Q,
    HEAD_DIM,
    TOPK,
    bench_sparse,
    eight_bit_matmul,
    heads_of_one_product,
    projection,
)

EPS = 1e-6


def arguments(session: Session, heads: int, tokens: int) -> InputSet:
    """Those of norm_rope_sagesla, on random projections."""
    q, k, v = heads_of_one_product(session, heads, tokens)
    weights = 1 + torch.randn(2, heads * HEAD_DIM, device=session.device) / 4
    angle = torch.randn(1, tokens, 1, HEAD_DIM // 2, device=session.device)
    norms = (*weights, angle.cos(), angle.sin(), EPS)
    sparsity = (TOPK, BLOCK_Q, BLOCK_K, "softmax", "fp8")
    return q, k, v, *norms, *projection(session), *sparsity


def bench(session: Session) -> None:
    bench_sparse(
        session,
        "norm_rope_sagesla",
        "sagesla",
        functools.partial(arguments, session),
        lambda: eight_bit_matmul(session),
    )
