"""sagesla from the projections on: RMSNorm and rotation of q and k belong to the operator.

norm_rope_sagesla(q, k, v) = sagesla(norm_rope(q), norm_rope(k), v), (B, L, H·D) → (B, L, H·D)

q and k are quantized as they are normalized; nothing is transposed or rounded to 16 bits between.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .._triton.attention.operands import Rotation
from ..capability import Capability
from ..checks import check_activation, check_channels, check_rotation
from ..operator import Operator
from ..row_calls import like_x
from ..sagesla import check_as as check_sagesla
from ..sagesla import cuda_supports as sagesla_on_cuda
from ..sagesla import sage_providers
from ..sagesla import triton_supports as sagesla_on_triton
from ..sla import SparseArguments
from ..sparse_rules import SparseAttentionCall, as_heads


class RotatedArguments(NamedTuple):
    """The arguments of `norm_rope_sagesla`: those of `sagesla`, before q and k are rotated."""

    attention: SparseArguments
    pv: str
    rotation: Rotation

    @classmethod
    def of(cls, *arguments: Any) -> RotatedArguments:
        """From the order of its schema, q, k and v being viewed as heads."""
        q, k, v, q_weight, k_weight, cos, sin, eps, *attention, pv = arguments
        q, k, v = (as_heads(x, 2 * cos.shape[-1]) for x in (q, k, v))
        rotation = Rotation(q_weight, k_weight, cos, sin, eps)
        return cls(SparseArguments(q, k, v, *attention), pv, rotation)


def check(*arguments: Any) -> None:
    check_as("norm_rope_sagesla", *arguments)


def check_as(operator: str, *arguments: Any) -> None:
    """As `check`, in the name of an operator that takes these arguments among others."""
    q, k, v, q_weight, k_weight, cos, sin, *_ = arguments
    for x, weight in ((q, q_weight), (k, k_weight)):
        check_activation(operator, x, rank=3)
        check_channels(operator, "weight", weight, x)
        check_rotation(operator, cos, sin, x)
    check_activation(operator, v, rank=3)
    given = RotatedArguments.of(*arguments)
    check_sagesla(operator, *given.attention, given.pv)


def describe(*arguments: Any) -> tuple[int, SparseAttentionCall]:
    given = RotatedArguments.of(*arguments)
    return arguments[0].shape[-1], given.attention.describe(given.pv)


def triton_supports(capability: Capability, call: tuple[int, SparseAttentionCall]) -> str | None:
    return sagesla_on_triton(capability, call[1])


def cuda_supports(capability: Capability, call: tuple[int, SparseAttentionCall]) -> str | None:
    return sagesla_on_cuda(capability, call[1])


NORM_ROPE_SAGESLA = Operator(
    name="norm_rope_sagesla",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, Tensor cos, "
        "Tensor sin, float eps, Tensor? proj_weight, Tensor? proj_bias, float topk, int block_q, "
        "int block_k, str feature_map, str pv) -> Tensor"
    ),
    package=__name__,
    fake=like_x,
    check=check,
    describe=describe,
    providers=sage_providers(__name__, cuda_supports, triton_supports),
)


def norm_rope_sagesla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float = 1e-6,
    proj_weight: torch.Tensor | None = None,
    proj_bias: torch.Tensor | None = None,
    topk: float = 0.1,
    block_q: int = 64,
    block_k: int = 128,
    feature_map: str = "softmax",
    pv: str = "fp8",
) -> torch.Tensor:
    """Normalize and rotate q and k, then attend as `sagesla` does.

    Args:
        q, k, v: (B, L, H·D) in bfloat16, float16 or float32, the projections; any strides, so
            that they may be parts of one QKV product.
        q_weight, k_weight, cos, sin, eps: as for `norm_rope`; `cos` and `sin` of angles, within
            −1 … 1, as the CUDA provider rounds them to steps of 1/16383.
        proj_weight, proj_bias, topk, block_q, block_k, feature_map, pv: as for `sagesla`.

    Returns:
        (B, L, H·D) of q's dtype, contiguous.

    Raises:
        OperatorInputError: for another dtype, or arguments that do not fit.
    """
    return torch.ops.turbo_opt.norm_rope_sagesla.default(
        q, k, v, q_weight, k_weight, cos, sin, eps, proj_weight, proj_bias,
        topk, block_q, block_k, feature_map, pv,
    )  # fmt: skip
