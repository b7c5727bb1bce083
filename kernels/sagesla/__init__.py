"""Sparse-linear attention whose sparse branch runs on 8-bit operands, as in SageAttention.

As `sla`, but for the sparse branch k is smoothed (its mean token subtracted, which softmax does not
see), q is int8 per token and k per block (symmetric, amax / 127), and with `pv="fp8"` P (times
448) and v (per channel, amax / 448) are e4m3. Sums are float32. The linear branch reads q, k and v
as given.
Sources: SLA, arXiv 2509.24006; SageAttention2, arXiv 2411.10958.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._cuda.compiler import unavailable
from .._cuda.sparse_attention import unsupported as unsupported_on_cuda
from .._triton.support import unsupported_device
from ..capability import Capability
from ..operator import Operator, Provider
from ..sla import SparseArguments
from ..sparse_rules import SparseAttentionCall, check_pv, empty_heads


def check(*arguments: Any) -> None:
    check_as("sagesla", *arguments)


def check_as(operator: str, *arguments: Any) -> None:
    """As `check`, in the name of an operator that makes these arguments of its own."""
    *shared, pv = arguments
    SparseArguments(*shared).check(operator)
    check_pv(operator, pv)


def describe(*arguments: Any) -> SparseAttentionCall:
    *shared, pv = arguments
    return SparseArguments(*shared).describe(pv)


def fake(q: torch.Tensor, *_: object) -> torch.Tensor:
    return empty_heads(q)


def triton_supports(capability: Capability, call: SparseAttentionCall) -> str | None:
    if call.head_dim != 128:
        return f"its tiles are 128 channels wide, got a head dimension of {call.head_dim}"
    if call.dtype is torch.float32:
        return "its products take 16-bit operands"
    minimum = (8, 9) if call.pv == "fp8" else (8, 0)
    return unsupported_device(capability, minimum, f"pv={call.pv!r}")


def cuda_supports(capability: Capability, call: SparseAttentionCall) -> str | None:
    if (call.head_dim, call.block_q, call.block_k) != (128, 64, 128):
        return "its tiles are 64 queries by 128 keys of 128 channels"
    if call.dtype is not torch.bfloat16 or call.pv != "fp8":
        return "it takes bfloat16 and multiplies P and v in e4m3"
    return unsupported_on_cuda(capability)


def sage_providers(
    package: str,
    on_cuda: Callable[[Capability, Any], str | None],
    on_triton: Callable[[Capability, Any], str | None],
) -> list[Provider]:
    """Kernels for Hopper, then Triton's; the former leave some of the preparation to Triton."""
    cuda, triton = f"{package}.cuda", f"{package}.triton"
    return [
        Provider("cuda", cuda, on_cuda, requires="triton", unavailable=unavailable),
        Provider("triton", triton, on_triton, requires="triton"),
    ]


SAGESLA = Operator(
    name="sagesla",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? proj_weight, Tensor? proj_bias, float topk, "
        "int block_q, int block_k, str feature_map, str pv) -> Tensor"
    ),
    package=__name__,
    fake=fake,
    check=check,
    describe=describe,
    providers=sage_providers(__name__, cuda_supports, triton_supports),
)


def sagesla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    proj_weight: torch.Tensor | None = None,
    proj_bias: torch.Tensor | None = None,
    topk: float = 0.1,
    block_q: int = 64,
    block_k: int = 128,
    feature_map: str = "softmax",
    pv: str = "fp8",
) -> torch.Tensor:
    """Sparse-linear attention, its sparse branch in 8 bits.

    Args:
        q, k, v: (B, H, L, D) in bfloat16, float16 or float32, after normalization and rotation;
            any strides.
        proj_weight, proj_bias, topk, block_q, block_k, feature_map: as for `sla`.
        pv: `"fp8"` multiplies P and v in e4m3, `"16bit"` in the dtype of v.

    Returns:
        (B, H, L, D) of q's dtype, a view of memory in (B, L, H, D).

    Raises:
        OperatorInputError: for another dtype, or arguments that do not fit.
    """
    return torch.ops.turbo_opt.sagesla.default(
        q, k, v, proj_weight, proj_bias, topk, block_q, block_k, feature_map, pv
    )
