"""sage_sparse_attention at the models' shapes: milliseconds beside dense bf16 attention."""

from __future__ import annotations

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
)
from turbo_opt.kernels import block_routing
from turbo_opt.kernels.sparse_rules import as_heads, block_count, kept_blocks


def bench(session: Session) -> None:
    def make(heads: int, tokens: int) -> InputSet:
        q, k, v = (as_heads(x, HEAD_DIM) for x in heads_of_one_product(session, heads, tokens))
        means = (
            torch.randn(1, heads, block_count(tokens, block), HEAD_DIM, device=session.device)
            for block in (BLOCK_Q, BLOCK_K)
        )
        lists = block_routing(*means, kept_blocks(TOPK, tokens, BLOCK_K))
        return q, k, v, lists, BLOCK_Q, BLOCK_K, "fp8"

    name = "sage_sparse_attention"
    bench_sparse(session, name, name, make, lambda: eight_bit_matmul(session))
