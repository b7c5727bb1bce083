"""sagesla at the models' shapes, on q, k and v that are normalized and rotated already."""

from __future__ import annotations

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
from turbo_opt.kernels.sparse_rules import as_heads


def bench(session: Session) -> None:
    def make(heads: int, tokens: int) -> InputSet:
        q, k, v = (as_heads(x, HEAD_DIM) for x in heads_of_one_product(session, heads, tokens))
        return q, k, v, *projection(session), TOPK, BLOCK_Q, BLOCK_K, "softmax", "fp8"

    bench_sparse(
        session, "sagesla", "sagesla_after_norm_rope", make, lambda: eight_bit_matmul(session)
    )
