"""sla2 at the models' shapes, in 16 and in 8 bits: milliseconds beside dense bf16 attention."""

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
)
from turbo_opt.kernels.sparse_rules import as_heads


def bench(session: Session) -> None:
    def make(qk: str, pv: str, heads: int, tokens: int) -> InputSet:
        q, k, v = (as_heads(x, HEAD_DIM) for x in heads_of_one_product(session, heads, tokens))
        router = torch.randn(2, HEAD_DIM, HEAD_DIM, device=session.device) / HEAD_DIM**0.5
        weight = torch.randn(heads, HEAD_DIM, device=session.device)
        bias = torch.randn(heads, device=session.device)
        return q, k, v, *router, weight, bias, TOPK, BLOCK_Q, BLOCK_K, "softmax", qk, pv

    in_16_bits = functools.partial(make, "16bit", "16bit")
    bench_sparse(session, "sla2", "sla2", in_16_bits, lambda: session.bf16_matmul)
    in_8_bits = functools.partial(make, "int8", "fp8")
    bench_sparse(session, "sla2", "sla2_8bit", in_8_bits, lambda: eight_bit_matmul(session))
