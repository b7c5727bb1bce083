"""Softmax attention of each query block over the key blocks of its list, on 8-bit operands.

As `block_sparse_attention`, but rounded as in SageAttention: k is smoothed (its mean token
subtracted, which softmax does not see), q is int8 per token and k per block (symmetric,
amax / 127), and with `pv="fp8"` P (times 448) and v (per channel, amax / 448) are e4m3. Sums are
float32. It is the sparse branch of `sagesla` with the routing left to the caller.
Source: SageAttention2, arXiv 2411.10958.
"""

from __future__ import annotations

import torch

from .._cuda.compiler import unavailable
from ..block_sparse_rules import check_block_lists
from ..operator import Operator, Provider
from ..sagesla import cuda_supports, triton_supports
from ..sparse_rules import SparseAttentionCall, check_heads, check_pv, empty_heads

NAME = "sage_sparse_attention"


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: torch.Tensor,
    block_q: int,
    block_k: int,
    pv: str,
) -> None:
    check_heads(NAME, q, k, v)
    check_block_lists(NAME, q, lists, block_q, block_k)
    check_pv(NAME, pv)


def describe(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: torch.Tensor,
    block_q: int,
    block_k: int,
    pv: str,
) -> SparseAttentionCall:
    """As a call of `sagesla` without a linear branch."""
    return SparseAttentionCall(q.shape[-1], q.dtype, block_q, block_k, "softmax", False, pv)


def fake(q: torch.Tensor, *_: object) -> torch.Tensor:
    return empty_heads(q)


SAGE_SPARSE_ATTENTION = Operator(
    name=NAME,
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor lists, int block_q, int block_k, str pv) -> Tensor"
    ),
    package=__name__,
    fake=fake,
    check=check,
    describe=describe,
    providers=[
        Provider(
            "cuda", f"{__name__}.cuda", cuda_supports, requires="triton", unavailable=unavailable
        ),
        Provider("triton", f"{__name__}.triton", triton_supports, requires="triton"),
    ],
)


def sage_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: torch.Tensor,
    block_q: int = 64,
    block_k: int = 128,
    pv: str = "fp8",
) -> torch.Tensor:
    """Attention over chosen key blocks, q and k in int8. It has no derivative.

    Args:
        q, k, v: (B, H, L, D) in bfloat16, float16 or float32; any strides.
        lists: (B, H, query blocks, kept) int32, the key blocks that each query block attends to,
            ascending, each at most once; `block_routing` makes such lists.
        block_q, block_k: tokens per query and per key block, 64 or 128.
        pv: `"fp8"` multiplies P and v in e4m3, `"16bit"` in the dtype of v.

    Returns:
        (B, H, L, D) of q's dtype, a view of memory in (B, L, H, D).

    Raises:
        OperatorInputError: for another dtype, or arguments that do not fit.
    """
    return torch.ops.turbo_opt.sage_sparse_attention.default(q, k, v, lists, block_q, block_k, pv)
