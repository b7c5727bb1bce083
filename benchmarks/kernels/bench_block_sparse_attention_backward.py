"""The derivative of block_sparse_attention at the models' shapes, in bfloat16.

Its floor is five products over the kept blocks at the library's bf16 rate; two kernels that share
no scores make seven.
"""

from __future__ import annotations

import torch

from benchmarks.kernels._harness import InputSet, Session, provider
from benchmarks.kernels._sparse import BLOCK_K, BLOCK_Q, TOPK, operations, record_providers
from benchmarks.kernels.bench_block_sparse_attention import NAME as FORWARD
from benchmarks.kernels.bench_block_sparse_attention import inputs
from benchmarks.results import Ceiling

NAME = "block_sparse_attention_backward"
PRODUCTS = 5
LEAST_SQNR_DB = 30.0  # P and dS are rounded to bfloat16 before they are multiplied


def bench(session: Session) -> None:
    for heads, tokens in session.attention:
        sets = session.input_sets(lambda h=heads, t=tokens: _inputs(session, h, t))  # type: ignore[misc]
        rate = session.bf16_matmul
        products = operations(heads, tokens) // 2 * PRODUCTS
        floor = Ceiling(products / rate.value / 1e9, "ms", f"{PRODUCTS} products at {rate.what}")
        record_providers(
            session, NAME, NAME, f"{heads}x{tokens}", sets, {}, floor, LEAST_SQNR_DB,
            {"topk": TOPK, "blocks": f"{BLOCK_Q}x{BLOCK_K}"},
        )  # fmt: skip
        del sets
        if not session.dry:
            torch.cuda.empty_cache()


def _inputs(session: Session, heads: int, tokens: int) -> InputSet:
    """A gradient, what attention was computed from, and what it gave."""
    q, k, v, *rest = forward = inputs(session, heads, tokens)
    with provider(FORWARD, session.usable(FORWARD, forward)[1][0]) as attend:
        o, log_sum = attend(*forward)
    return torch.randn_like(q), q, k, v, o, log_sum, *rest
