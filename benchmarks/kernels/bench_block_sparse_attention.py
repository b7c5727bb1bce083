"""block_sparse_attention at the models' shapes, in 16 bits; and the 8-bit kernels that attend.

In 16 bits: milliseconds of the operator, beside dense attention and two products over the kept
blocks at the library's bf16 rate. In 8 bits: TOPS on the blocks kept, of the kernel inside
`norm_rope_sagesla` alone, on lists and operands that are prepared before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.kernels._harness import (
    InputSet,
    Session,
    Timing,
    dense_attention,
    provider,
    sqnr_db,
)
from benchmarks.kernels._sparse import (
    BLOCK_K,
    BLOCK_Q,
    HEAD_DIM,
    TOPK,
    eight_bit_matmul,
    heads_of_one_product,
    operations,
    record_name,
    record_providers,
)
from benchmarks.kernels.bench_norm_rope_sagesla import arguments
from benchmarks.results import Ceiling
from turbo_opt.kernels import block_routing
from turbo_opt.kernels.sparse_rules import as_heads, block_count, kept_blocks

NAME = "block_sparse_attention"
WHOLE = "norm_rope_sagesla"
LEAST_SQNR_DB = 30.0  # P is rounded to bfloat16 before it is multiplied
# Of a kernel alone against the operator that it is part of, by the same provider.
LEAST_AGREEMENT_DB = 40.0


def bench(session: Session) -> None:
    for heads, tokens in session.attention:
        sets = session.input_sets(lambda h=heads, t=tokens: inputs(session, h, t))  # type: ignore[misc]
        dense = session.time(dense_attention, [each[:3] for each in sets])
        _bench_in_16_bits(session, heads, tokens, sets, dense)
        del sets
        _bench_in_8_bits(session, heads, tokens, dense)
        if not session.dry:
            torch.cuda.empty_cache()


def inputs(session: Session, heads: int, tokens: int) -> InputSet:
    """Arguments of block_sparse_attention: heads of one product, and random lists."""
    q, k, v = (as_heads(x, HEAD_DIM) for x in heads_of_one_product(session, heads, tokens))
    means = [
        torch.randn(1, heads, block_count(tokens, block), HEAD_DIM, device=session.device)
        for block in (BLOCK_Q, BLOCK_K)
    ]
    lists = block_routing(*means, kept_blocks(TOPK, tokens, BLOCK_K))
    return q, k, v, lists, BLOCK_Q, BLOCK_K


def _bench_in_16_bits(
    session: Session, heads: int, tokens: int, sets: list[InputSet], dense: Timing
) -> None:
    rate = session.bf16_matmul
    floor = Ceiling(
        operations(heads, tokens) / rate.value / 1e9, "ms", f"2 products at {rate.what}"
    )
    record_providers(
        session, NAME, NAME, f"{heads}x{tokens}", sets, {"sdpa_dense_bf16": dense}, floor,
        LEAST_SQNR_DB, {"topk": TOPK, "blocks": f"{BLOCK_Q}x{BLOCK_K}"},
    )  # fmt: skip


def _bench_in_8_bits(session: Session, heads: int, tokens: int, dense: Timing) -> None:
    sets = session.input_sets(lambda: arguments(session, heads, tokens))
    dense_rate = 4 * tokens**2 * HEAD_DIM * heads / dense.ms / 1e9
    _, names = session.usable(WHOLE, sets[0])
    for each in names:
        label = record_name(NAME, names, each, f"{heads}x{tokens}")
        prepared, attend = [_prepared(args, each) for args in sets], _attend(each)
        agreement = _agreement(attend, prepared[0], sets[0], each)
        session.check(f"{label} alone/{each}", agreement, LEAST_AGREEMENT_DB)
        timing = session.time(attend, prepared)
        session.record_operations(
            label,
            timing,
            operations(heads, tokens),
            eight_bit_matmul(session),
            {"sdpa_dense_bf16": dense_rate},
            quality={f"sqnr_db_vs_{WHOLE}": agreement},
            config={"provider": each, "topk": TOPK, "ms": timing.ms},
        )


def _prepared(args: InputSet, each: str) -> InputSet:
    """q, k, v, o (B, H, L, D), the lists, and the tiles as this provider's kernel reads them."""
    from turbo_opt.kernels._triton.attention.launch import (
        Blocks,
        Projection,
        Rotation,
        prepare,
        prepare_on_hopper,
    )

    q, k, v, q_weight, k_weight, cos, sin, eps, weight, bias, *_ = args
    q, k, v, o = (
        as_heads(x, HEAD_DIM)
        for x in (q, k, v, torch.empty(q.shape, dtype=q.dtype, device=q.device))
    )
    turned, branch = (
        Rotation(q_weight, k_weight, cos, sin, eps),
        Projection(weight, bias, "softmax"),
    )
    if each == "cuda":
        ready = prepare_on_hopper(q, k, v, turned, branch)
    else:
        ready = prepare(
            q, k, v, Blocks(TOPK, BLOCK_Q, BLOCK_K),
            rotation=turned, projection=branch, int8=True, fp8=True,
        )  # fmt: skip
    lists = block_routing(ready.q_means, ready.k_means, kept_blocks(TOPK, q.shape[2], BLOCK_K))
    return q, k, v, o, lists, ready


def _attend(each: str) -> Callable[..., None]:
    from turbo_opt.kernels._triton.attention.launch import (
        Blocks,
        Prepared,
        attend_on_hopper,
        attend_prepared,
    )

    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        o: torch.Tensor,
        lists: torch.Tensor,
        ready: Prepared,
    ) -> None:
        if each == "cuda":
            attend_on_hopper(o, lists, ready)
        else:
            attend_prepared(q, k, v, o, lists, ready, Blocks(TOPK, BLOCK_Q, BLOCK_K))

    return attend


def _agreement(attend: Callable[..., None], prepared: InputSet, args: InputSet, each: str) -> float:
    """SQNR in dB of what the kernel alone writes against the whole operator's result."""
    attend(*prepared)
    with provider(WHOLE, each) as call:
        return sqnr_db(as_heads(call(*args), HEAD_DIM), prepared[3])
