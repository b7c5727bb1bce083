"""Softmax attention of each query block over the key blocks of its list; it can be trained through.

o = softmax(q·kᵀ / √D over the kept blocks)·v        log_sum = log Σ exp(q·kᵀ / √D)

The lists are given, and not differentiated: this is the sparse branch of SLA (arXiv 2509.24006)
with the routing left to the caller. Its derivative is `block_sparse_attention_backward`.
"""

from __future__ import annotations

from typing import Any

import torch

from ..block_sparse_attention_backward import block_sparse_attention_backward
from ..block_sparse_rules import (
    BlockSparseCall,
    check_block_lists,
    check_trainable_heads,
    triton_supports,
)
from ..operator import Operator, Provider
from ..sparse_rules import empty_heads


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: torch.Tensor,
    block_q: int,
    block_k: int,
) -> None:
    check_trainable_heads("block_sparse_attention", q, k, v)
    check_block_lists("block_sparse_attention", q, lists, block_q, block_k)


def describe(q: torch.Tensor, *_: object) -> BlockSparseCall:
    return BlockSparseCall(q.shape[-1], q.dtype)


def fake(q: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_heads(q), empty_log_sum(q)


def empty_log_sum(q: torch.Tensor) -> torch.Tensor:
    """(B, H, L) float32; float64 for float64."""
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    return q.new_empty(q.shape[:3], dtype=dtype)


BLOCK_SPARSE_ATTENTION = Operator(
    name="block_sparse_attention",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor lists, int block_q, int block_k) -> (Tensor, Tensor)"
    ),
    package=__name__,
    fake=fake,
    check=check,
    describe=describe,
    providers=[Provider("triton", f"{__name__}.triton", triton_supports, requires="triton")],
)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, lists, ctx.block_q, ctx.block_k = inputs
    o, log_sum = output
    ctx.mark_non_differentiable(log_sum)
    ctx.save_for_backward(q, k, v, o, log_sum, lists)


def _backward(ctx: Any, grad_o: torch.Tensor, grad_log_sum: torch.Tensor) -> tuple[Any, ...]:
    q, k, v, o, log_sum, lists = ctx.saved_tensors
    grads = block_sparse_attention_backward(
        grad_o, q, k, v, o, log_sum, lists, ctx.block_q, ctx.block_k
    )
    return *grads, None, None, None


torch.library.register_autograd(
    "turbo_opt::block_sparse_attention", _backward, setup_context=_remember
)


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: torch.Tensor,
    block_q: int = 128,
    block_k: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over chosen key blocks, differentiable once in q, k and v.

    Args:
        q, k, v: (B, H, L, D) in bfloat16, float16 or float32, or float64 by the reference; any
            strides.
        lists: (B, H, query blocks, kept) int32, the key blocks that each query block attends to,
            each at most once; `block_routing` makes such lists.
        block_q, block_k: tokens per query and per key block, 64 or 128.

    Returns:
        o, (B, H, L, D) of q's dtype, a view of memory in (B, L, H, D); and log_sum, (B, H, L)
        float32, the natural logarithm of each query's normalizer, which has no derivative.

    Raises:
        OperatorInputError: for another dtype, or shapes that do not fit.
    """
    return torch.ops.turbo_opt.block_sparse_attention.default(q, k, v, lists, block_q, block_k)
