"""padded_attention at the models' shapes, beside PyTorch's attention to every position."""

from __future__ import annotations

import torch

from benchmarks.kernels._harness import Session, dense_attention, provider, sqnr_db
from benchmarks.kernels._padded import floor, operands, prompts
from benchmarks.kernels._sparse import record_name

LEAST_SQNR_DB = 40.0  # both round P and the result to bfloat16


def bench(session: Session) -> None:
    for heads, tokens in session.attention:
        for positions, words in prompts(session):
            _bench(session, heads, tokens, positions, words)


def _bench(session: Session, heads: int, tokens: int, positions: int, words: int) -> None:
    sets = session.input_sets(lambda: operands(session, heads, tokens, positions, words))
    shape = f"{heads}x{tokens}x{words + 1}-of-{positions}"
    dense = {"sdpa_all_positions": session.time(dense_attention, [args[:3] for args in sets])}
    exact = dense_attention(*sets[0][:3])
    _, names = session.usable("padded_attention", sets[0])
    for each in names:
        with provider("padded_attention", each) as call:
            sqnr = sqnr_db(exact, call(*sets[0]))
            session.check(f"padded_attention/{shape}/{each}", sqnr, LEAST_SQNR_DB)
            timing = session.time(call, sets)
        session.record_time(
            record_name("padded_attention", names, each, shape),
            timing,
            dense,
            floor(session, heads, tokens, words, written=2),
            quality={"sqnr_db_vs_sdpa": sqnr},
            config={"provider": each},
        )
    del sets, exact
    if not session.dry:
        torch.cuda.empty_cache()
