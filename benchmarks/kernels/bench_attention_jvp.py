"""attention_jvp at the models' shapes, in bfloat16: self-attention, and attention to a prompt.

Its floor is six products of L·Lk·D at the library's bf16 rate, four where the keys stay. The
baseline is attention alone, two products: what a finite difference pays once more instead.
"""

from __future__ import annotations

import torch

from benchmarks.kernels._harness import InputSet, Session, dense_attention
from benchmarks.kernels._sparse import HEAD_DIM, heads_of_one_product, record_providers
from benchmarks.results import Ceiling
from turbo_opt.kernels.sparse_rules import as_heads

NAME = "attention_jvp"
PROMPT_TOKENS = 512
LEAST_SQNR_DB = 30.0  # P and P ∘ tS are rounded to bfloat16 before they are multiplied


def bench(session: Session) -> None:
    for heads, tokens in session.attention:
        for keys_move in (True, False):
            keys = tokens if keys_move else PROMPT_TOKENS
            sets = session.input_sets(
                lambda h=heads, t=tokens, k=keys, m=keys_move: _inputs(session, h, t, k, m)  # type: ignore[misc]
            )
            _bench(session, heads, tokens, keys, sets)
            del sets
            if not session.dry:
                torch.cuda.empty_cache()


def _inputs(session: Session, heads: int, tokens: int, keys: int, keys_move: bool) -> InputSet:
    """q, k, v and their directions, views of products as a model has them."""
    q, tq, _ = (as_heads(x, HEAD_DIM) for x in heads_of_one_product(session, heads, tokens))
    k, v, tk = (as_heads(x, HEAD_DIM) for x in heads_of_one_product(session, heads, keys))
    return (q, k, v, tq, tk, torch.randn_like(tk)) if keys_move else (q, k, v, tq, None, None)


def _bench(session: Session, heads: int, tokens: int, keys: int, sets: list[InputSet]) -> None:
    products = 4 if sets[0][4] is None else 6
    rate = session.bf16_matmul
    operations = 2 * products * heads * tokens * keys * HEAD_DIM
    floor = Ceiling(operations / rate.value / 1e9, "ms", f"{products} products at {rate.what}")
    attention = session.time(dense_attention, [inputs[:3] for inputs in sets])
    record_providers(
        session, NAME, NAME, f"{heads}x{tokens}x{keys}", sets,
        {"sdpa_bf16_without_derivative": attention}, floor, LEAST_SQNR_DB, {"products": products},
    )  # fmt: skip
