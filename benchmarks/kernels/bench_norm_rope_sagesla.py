"""norm_rope_sagesla at the models' shapes, whole, and its attention kernels alone."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from benchmarks.kernels._harness import InputSet, Session, Timing
from benchmarks.kernels._sparse import (
    BLOCK_K,
    BLOCK_Q,
    HEAD_DIM,
    TOPK,
    bench_sparse,
    eight_bit_matmul,
    heads_of_one_product,
    operations,
    projection,
    record_name,
)
from turbo_opt.kernels import block_routing
from turbo_opt.kernels.sparse_rules import as_heads, kept_blocks

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
    def alone(shape: str, sets: list[InputSet], dense: dict[str, Timing]) -> None:
        _, names = session.usable("norm_rope_sagesla", sets[0])
        for each in names:
            label = record_name("block_sparse_attention", names, each, shape)
            _bench_alone(session, label, shape, sets, each, dense)

    bench_sparse(
        session,
        "norm_rope_sagesla",
        "sagesla",
        functools.partial(arguments, session),
        lambda: eight_bit_matmul(session),
        alone,
    )


def _bench_alone(
    session: Session,
    label: str,
    shape: str,
    sets: list[InputSet],
    each: str,
    dense: dict[str, Timing],
) -> None:
    """The attention kernel on tiles that are prepared before."""
    heads, tokens = (int(size) for size in shape.split("x"))
    timing = session.time(_attend(each), [_prepared(args, each) for args in sets])
    rates = {what: 4 * tokens**2 * HEAD_DIM * heads / t.ms / 1e9 for what, t in dense.items()}
    session.record_operations(
        label,
        timing,
        operations(heads, tokens),
        eight_bit_matmul(session),
        rates,
        quality={},
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
