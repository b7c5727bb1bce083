"""Sparse-linear attention in 16 bits: softmax over chosen blocks plus a linear branch over all.

o = sparse(q, k, v) + proj(linear(q, k, v))

Each query block attends exactly to its `int(topk · ceil(L / block_k))` best key blocks, chosen by
the product of block means. The linear branch is φ(q)(φ(k)ᵀv) / (1e-5 + φ(q)·Σφ(k)) over all keys.
Source: SLA, arXiv 2509.24006, in the form of the released TurboWan weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .._triton.attention.operands import Blocks, Projection
from .._triton.support import unsupported_device
from ..capability import Capability
from ..operator import Operator, Provider
from ..sparse_rules import (
    SparseAttentionCall,
    check_heads,
    check_projection,
    check_sparsity,
    empty_heads,
)


class SparseArguments(NamedTuple):
    """The arguments of `sla`, in the order of its schema; other forms of it begin with the same."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    proj_weight: torch.Tensor | None
    proj_bias: torch.Tensor | None
    topk: float
    block_q: int
    block_k: int
    feature_map: str

    @property
    def blocks(self) -> Blocks:
        """How sparse, as the kernels of _triton/attention take it."""
        return Blocks(self.topk, self.block_q, self.block_k)

    @property
    def projection(self) -> Projection | None:
        """The linear branch, as those kernels take it; None where it is left out."""
        if self.proj_weight is None:
            return None
        return Projection(self.proj_weight, self.proj_bias, self.feature_map)

    def check(self, operator: str) -> None:
        """Raise, in that operator's name, for arguments that it does not define."""
        check_heads(operator, self.q, self.k, self.v)
        check_projection(operator, self.proj_weight, self.proj_bias, self.q.shape[-1])
        check_sparsity(operator, self.topk, self.block_q, self.block_k, self.feature_map)

    def describe(self, pv: str | None = None) -> SparseAttentionCall:
        """What the choice of a provider depends on, with P and v in 16 bits or in that format."""
        q, projected = self.q, self.proj_weight is not None
        return SparseAttentionCall(
            q.shape[-1], q.dtype, self.block_q, self.block_k, self.feature_map, projected, pv
        )


def check(*arguments: Any) -> None:
    SparseArguments(*arguments).check("sla")


def describe(*arguments: Any) -> SparseAttentionCall:
    return SparseArguments(*arguments).describe()


def fake(q: torch.Tensor, *_: object) -> torch.Tensor:
    return empty_heads(q)


def triton_supports(capability: Capability, call: SparseAttentionCall) -> str | None:
    if call.head_dim != 128:
        return f"its tiles are 128 channels wide, got a head dimension of {call.head_dim}"
    if call.dtype is torch.float32:
        return "its products take 16-bit operands"
    return unsupported_device(capability)


SLA = Operator(
    name="sla",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? proj_weight, Tensor? proj_bias, float topk, "
        "int block_q, int block_k, str feature_map) -> Tensor"
    ),
    package=__name__,
    fake=fake,
    check=check,
    describe=describe,
    providers=[Provider("triton", f"{__name__}.triton", triton_supports, requires="triton")],
)


def sla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    proj_weight: torch.Tensor | None = None,
    proj_bias: torch.Tensor | None = None,
    topk: float = 0.1,
    block_q: int = 128,
    block_k: int = 64,
    feature_map: str = "softmax",
) -> torch.Tensor:
    """Sparse-linear attention of q, k and v after normalization and rotation.

    Args:
        q, k, v: (B, H, L, D) in bfloat16, float16 or float32; any strides.
        proj_weight: (D, D), the projection of the linear branch, shared by heads; None leaves
            the linear branch out.
        proj_bias: (D,), or None.
        topk: share of the key blocks that each query block keeps, 0 < topk ≤ 1.
        block_q, block_k: tokens per query and per key block, 64 or 128.
        feature_map: φ: `"softmax"` over channels, `"elu"` (elu + 1) or `"relu"`.

    Returns:
        (B, H, L, D) of q's dtype, a view of memory in (B, L, H, D).

    Raises:
        OperatorInputError: for another dtype, or arguments that do not fit.
    """
    return torch.ops.turbo_opt.sla.default(
        q, k, v, proj_weight, proj_bias, topk, block_q, block_k, feature_map
    )
