"""block_sparse_attention and its derivative at the models' shapes, in bfloat16.

The derivative's floor is five products over the kept blocks at the library's bf16 rate; two
kernels that share no scores make seven.
"""

from __future__ import annotations

import torch

from benchmarks.kernels._harness import InputSet, Session, Timing, dense_attention, provider
from benchmarks.kernels._sparse import (
    BLOCK_K,
    BLOCK_Q,
    HEAD_DIM,
    TOPK,
    heads_of_one_product,
    operations,
    record_providers,
)
from benchmarks.results import Ceiling
from turbo_opt.kernels import block_routing
from turbo_opt.kernels.sparse_rules import as_heads, block_count, kept_blocks

FORWARD, BACKWARD = "block_sparse_attention", "block_sparse_attention_backward"
PRODUCTS = {FORWARD: 2, BACKWARD: 5}
LEAST_SQNR_DB = 30.0  # P and dS are rounded to bfloat16 before they are multiplied


def bench(session: Session) -> None:
    for heads, tokens in session.attention:
        sets = session.input_sets(lambda h=heads, t=tokens: _forward_inputs(session, h, t))  # type: ignore[misc]
        _bench(session, FORWARD, heads, tokens, sets)
        for index, (q, k, v, *rest) in enumerate(sets):
            with provider(FORWARD, session.usable(FORWARD, sets[index])[1][0]) as attend:
                o, log_sum = attend(q, k, v, *rest)
            sets[index] = (torch.randn_like(q), q, k, v, o, log_sum, *rest)
        _bench(session, BACKWARD, heads, tokens, sets)
        del sets
        if not session.dry:
            torch.cuda.empty_cache()


def _forward_inputs(session: Session, heads: int, tokens: int) -> InputSet:
    q, k, v = (as_heads(x, HEAD_DIM) for x in heads_of_one_product(session, heads, tokens))
    means = [
        torch.randn(1, heads, block_count(tokens, block), HEAD_DIM, device=session.device)
        for block in (BLOCK_Q, BLOCK_K)
    ]
    lists = block_routing(*means, kept_blocks(TOPK, tokens, BLOCK_K))
    return q, k, v, lists, BLOCK_Q, BLOCK_K


def _bench(session: Session, name: str, heads: int, tokens: int, sets: list[InputSet]) -> None:
    shape = f"{heads}x{tokens}"
    products = operations(heads, tokens) // 2 * PRODUCTS[name]
    rate = session.bf16_matmul
    floor = Ceiling(products / rate.value / 1e9, "ms", f"{PRODUCTS[name]} products at {rate.what}")
    dense = {} if name == BACKWARD else {"sdpa_dense_bf16": _dense_time(session, sets)}
    record_providers(
        session, name, name, shape, sets, dense, floor, LEAST_SQNR_DB,
        {"topk": TOPK, "blocks": f"{BLOCK_Q}x{BLOCK_K}"},
    )  # fmt: skip


def _dense_time(session: Session, sets: list[InputSet]) -> Timing:
    return session.time(dense_attention, [inputs[:3] for inputs in sets])
