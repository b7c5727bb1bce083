"""Sparse attention over routed blocks, linear attention over the others, and a ratio between them.

    o = α ∘ o_sparse + (1 − α) ∘ o_linear

    kept      the int(topk · ceil(L / block_k)) highest of (W_q·q̄)·(W_k·k̄) for each query block
    o_sparse  softmax attention over the kept blocks, in 16 or in 8 bits
    o_linear  φ(q)·H / (1e-5 + φ(q)·z), H = Σ φ(k)ᵀv and z = Σ φ(k) over the blocks *not* kept
    α         σ(w_α·q̄ + b_α), one for each query block and head

q̄ and k̄ are block means, of k less its mean token; W_q and W_k are shared by heads. Where every
block is kept, nothing is left for the linear branch and o = o_sparse.

The paper's α is a free number for each query block, which fixes the size of the clip. Here it is a
function of the block's mean query, so one set of weights serves every size: w_α = 0 gives one
value for each head. q, k and v go to the linear branch as they are given.
Source: SLA2, arXiv 2602.12675, equations 13–16 and algorithm 2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .._triton.support import unsupported_device
from ..capability import Capability
from ..errors import OperatorInputError
from ..operator import Operator, Provider
from ..sagesla import triton_supports as triton_supports_8_bits
from ..sparse_rules import (
    SparseAttentionCall,
    check_heads,
    check_pv,
    check_sparsity,
    empty_heads,
)

QK_FORMATS = ("int8", "16bit")


class RoutedArguments(NamedTuple):
    """The arguments of `sla2`, in the order of its schema."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    proj_q: torch.Tensor
    proj_k: torch.Tensor
    alpha_weight: torch.Tensor
    alpha_bias: torch.Tensor
    topk: float
    block_q: int
    block_k: int
    feature_map: str
    qk: str
    pv: str


def check(*arguments: Any) -> None:
    given = RoutedArguments(*arguments)
    check_heads("sla2", given.q, given.k, given.v)
    check_sparsity("sla2", given.topk, given.block_q, given.block_k, given.feature_map)
    heads, head_dim = given.q.shape[1], given.q.shape[3]
    shapes = {
        "proj_q": (head_dim, head_dim),
        "proj_k": (head_dim, head_dim),
        "alpha_weight": (heads, head_dim),
        "alpha_bias": (heads,),
    }
    for name, shape in shapes.items():
        tensor = getattr(given, name)
        if tuple(tensor.shape) != shape:
            raise OperatorInputError(f"sla2: {name} must be {shape}, got {tuple(tensor.shape)}")
    if given.qk not in QK_FORMATS:
        raise OperatorInputError(f"sla2: qk must be 'int8' or '16bit', got {given.qk!r}")
    check_pv("sla2", given.pv)
    if given.qk == "16bit" and given.pv == "fp8":
        raise OperatorInputError("sla2: pv 'fp8' goes with qk 'int8', got '16bit'")


def describe(*arguments: Any) -> SparseAttentionCall:
    """Its `pv` is None where q and k are multiplied in 16 bits."""
    given = RoutedArguments(*arguments)
    return SparseAttentionCall(
        given.q.shape[-1],
        given.q.dtype,
        given.block_q,
        given.block_k,
        given.feature_map,
        projected=False,
        pv=given.pv if given.qk == "int8" else None,
    )


def fake(q: torch.Tensor, *_: object) -> torch.Tensor:
    return empty_heads(q)


def triton_supports(capability: Capability, call: SparseAttentionCall) -> str | None:
    if call.pv is not None:
        return triton_supports_8_bits(capability, call)
    if call.head_dim not in (16, 32, 64, 128):
        return f"its tiles are 16, 32, 64 or 128 channels wide, got {call.head_dim}"
    return unsupported_device(capability)


SLA2 = Operator(
    name="sla2",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor proj_q, Tensor proj_k, Tensor alpha_weight, "
        "Tensor alpha_bias, float topk, int block_q, int block_k, str feature_map, str qk, "
        "str pv) -> Tensor"
    ),
    package=__name__,
    fake=fake,
    check=check,
    describe=describe,
    providers=[Provider("triton", f"{__name__}.triton", triton_supports, requires="triton")],
)


def sla2(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    proj_q: torch.Tensor,
    proj_k: torch.Tensor,
    alpha_weight: torch.Tensor,
    alpha_bias: torch.Tensor,
    topk: float = 0.1,
    block_q: int = 128,
    block_k: int = 64,
    feature_map: str = "softmax",
    qk: str = "16bit",
    pv: str = "16bit",
) -> torch.Tensor:
    """Sparse-linear attention with a learned router and a learned ratio.

    Args:
        q, k, v: (B, H, L, D) in bfloat16, float16 or float32, after normalization and rotation;
            any strides.
        proj_q, proj_k: (D, D), the router's projections W_q and W_k of mean queries and mean keys.
        alpha_weight, alpha_bias: (H, D) and (H,), w_α and b_α.
        topk: share of the key blocks that each query block keeps, 0 < topk ≤ 1.
        block_q, block_k: tokens per query and per key block, 64 or 128.
        feature_map: φ: `"softmax"` over channels, `"elu"` (elu + 1) or `"relu"`.
        qk: `"int8"` rounds q and k of the sparse branch as `sage_sparse_attention` does, `"16bit"`
            multiplies them as they are.
        pv: with `qk="int8"`, `"fp8"` multiplies P and v in e4m3; else `"16bit"`.

    Returns:
        (B, H, L, D) of q's dtype, a view of memory in (B, L, H, D).

    Raises:
        OperatorInputError: for another dtype, or arguments that do not fit.
    """
    return torch.ops.turbo_opt.sla2.default(
        q, k, v, proj_q, proj_k, alpha_weight, alpha_bias, topk, block_q, block_k, feature_map,
        qk, pv,
    )  # fmt: skip
