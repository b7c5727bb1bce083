"""padded_attention_quantize, beside attention to every position and quantize_activation."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.kernels._harness import Session, dense_attention, provider, sqnr_db
from benchmarks.kernels._padded import floor, operands, prompts
from benchmarks.kernels._sparse import record_name
from turbo_opt.kernels import dequantize_activation, quantize_activation

SCHEME = "fp8-block"
LEAST_SQNR_DB, LEAST_DRY_SQNR_DB = 30.0, 24.0  # of e4m3; Triton's interpreter truncates


def bench(session: Session) -> None:
    for heads, tokens in session.attention:
        for positions, words in prompts(session):
            _bench(session, heads, tokens, positions, words)


def in_two_steps(q: Tensor, k: Tensor, v: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    """What the operator takes the place of."""
    return quantize_activation(dense_attention(q, k, v).transpose(1, 2).flatten(2), SCHEME)


def _bench(session: Session, heads: int, tokens: int, positions: int, words: int) -> None:
    def make() -> tuple[object, ...]:
        return *operands(session, heads, tokens, positions, words), SCHEME

    sets = session.input_sets(make)
    shape = f"{heads}x{tokens}x{words + 1}-of-{positions}"
    plain = {"sdpa_then_quantize": session.time(in_two_steps, sets)}
    exact = dense_attention(*sets[0][:3]).transpose(1, 2).flatten(2)
    _, names = session.usable("padded_attention_quantize", sets[0])
    for each in names:
        with provider("padded_attention_quantize", each) as call:
            sqnr = sqnr_db(exact, dequantize_activation(*call(*sets[0]), SCHEME))
            least = LEAST_DRY_SQNR_DB if session.dry else LEAST_SQNR_DB
            session.check(f"padded_attention_quantize/{shape}/{each}", sqnr, least)
            timing = session.time(call, sets)
        session.record_time(
            record_name("padded_attention_quantize", names, each, shape),
            timing,
            plain,
            floor(session, heads, tokens, words, written=1),
            quality={"sqnr_db_vs_sdpa": sqnr},
            config={"provider": each},
        )
    del sets, exact
    if not session.dry:
        torch.cuda.empty_cache()
