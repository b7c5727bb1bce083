"""The derivative of block_sparse_attention: five products over the kept blocks.

p = exp(s − log_sum)    s = q·kᵀ / √D    δ = Σ_D o ∘ do
dv = pᵀ·do    ds = p ∘ (do·vᵀ − δ)    dq = ds·k / √D    dk = dsᵀ·q / √D

Source: FlashAttention-2, arXiv 2307.08691, §3.1.2, restricted to the blocks of the lists.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..block_sparse_rules import (
    BlockSparseCall,
    check_block_lists,
    check_trainable_heads,
    triton_supports,
)
from ..errors import KernelError, OperatorInputError
from ..operator import Operator, Provider
from ..sparse_rules import empty_heads

NAME = "block_sparse_attention_backward"


class BackwardArguments(NamedTuple):
    """The arguments, in the order of the schema."""

    grad_o: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    log_sum: torch.Tensor
    lists: torch.Tensor
    block_q: int
    block_k: int


def check(*arguments: Any) -> None:
    grad_o, q, k, v, o, log_sum, lists, block_q, block_k = BackwardArguments(*arguments)
    check_trainable_heads(NAME, q, k, v, o, grad_o)
    check_block_lists(NAME, q, lists, block_q, block_k)
    if log_sum.ndim != 3 or any(a != b for a, b in zip(log_sum.shape, q.shape, strict=False)):
        raise OperatorInputError(
            f"{NAME}: log_sum must be {tuple(q.shape[:3])}, got {tuple(log_sum.shape)}"
        )


def describe(grad_o: torch.Tensor, q: torch.Tensor, *_: object) -> BlockSparseCall:
    return BlockSparseCall(q.shape[-1], q.dtype)


def fake(
    grad_o: torch.Tensor, q: torch.Tensor, *_: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return empty_heads(q), empty_heads(q), empty_heads(q)


BLOCK_SPARSE_ATTENTION_BACKWARD = Operator(
    name=NAME,
    schema=(
        "(Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor log_sum, Tensor lists, "
        "int block_q, int block_k) -> (Tensor, Tensor, Tensor)"
    ),
    package=__name__,
    fake=fake,
    check=check,
    describe=describe,
    providers=[Provider("triton", f"{__name__}.triton", triton_supports, requires="triton")],
)


def _no_second_derivative(ctx: Any, *grads: torch.Tensor) -> None:
    raise KernelError(f"{NAME}: it has no derivative; block_sparse_attention can be derived once")


torch.library.register_autograd(f"turbo_opt::{NAME}", _no_second_derivative)


def block_sparse_attention_backward(
    grad_o: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    log_sum: torch.Tensor,
    lists: torch.Tensor,
    block_q: int = 128,
    block_k: int = 64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v from the gradient of o.

    Args:
        grad_o, q, k, v, o: (B, H, L, D) of one dtype, see `block_sparse_attention`; any strides.
        log_sum: (B, H, L), the second result of `block_sparse_attention`.
        lists: (B, H, query blocks, kept) int32, as it was given to it.
        block_q, block_k: tokens per query and per key block, 64 or 128.

    Returns:
        dq, dk, dv: (B, H, L, D) of q's dtype, views of memory in (B, L, H, D). A key block that
        no query block keeps has zero gradients. The result does not depend on scheduling: nothing
        is summed by atomic operations.

    Raises:
        OperatorInputError: for another dtype, or shapes that do not fit.
    """
    return torch.ops.turbo_opt.block_sparse_attention_backward.default(
        grad_o, q, k, v, o, log_sum, lists, block_q, block_k
    )
