"""norm_rope_sagesla whose result is quantized at once, without rounding to q's dtype in between.

norm_rope_sagesla_quantize(q, k, v) = quantize_activation(norm_rope_sagesla(q, k, v))

A head of 128 channels is one group of 1×128: a scale of `fp8-block` depends on one token of one
head, which attention holds when it is done.
"""

from __future__ import annotations

from typing import Any

import torch

from .._triton.support import unsupported_scheme
from ..block_quantize import fake as fake_quantized
from ..capability import Capability
from ..norm_rope_sagesla import check_as as check_attention
from ..norm_rope_sagesla import cuda_supports as attention_on_cuda
from ..norm_rope_sagesla import describe as describe_attention
from ..norm_rope_sagesla import triton_supports as attention_on_triton
from ..operator import Operator
from ..sagesla import sage_providers
from ..schemes import check_in_features, scheme_named
from ..sparse_rules import SparseAttentionCall

QuantizedCall = tuple[int, SparseAttentionCall, str]
"""What the choice of a provider depends on: channels, the attention, the scheme."""


def check(*arguments: Any) -> None:
    *attention, scheme = arguments
    check_attention("norm_rope_sagesla_quantize", *attention)
    check_in_features(attention[0].shape[-1], scheme_named(scheme))


def describe(*arguments: Any) -> QuantizedCall:
    *attention, scheme = arguments
    return *describe_attention(*attention), scheme


def triton_supports(capability: Capability, call: QuantizedCall) -> str | None:
    channels, attention, scheme = call
    return attention_on_triton(capability, (channels, attention)) or unsupported_scheme(
        capability, scheme
    )


def cuda_supports(capability: Capability, call: QuantizedCall) -> str | None:
    channels, attention, scheme = call
    if scheme != "fp8-block":
        return f"it writes groups of one token, {scheme!r} has blocks of 128"
    return attention_on_cuda(capability, (channels, attention))


NORM_ROPE_SAGESLA_QUANTIZE = Operator(
    name="norm_rope_sagesla_quantize",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, Tensor cos, "
        "Tensor sin, float eps, Tensor? proj_weight, Tensor? proj_bias, float topk, int block_q, "
        "int block_k, str feature_map, str pv, str scheme) -> (Tensor, Tensor)"
    ),
    package=__name__,
    fake=fake_quantized,
    check=check,
    describe=describe,
    providers=sage_providers(__name__, cuda_supports, triton_supports),
)


def norm_rope_sagesla_quantize(
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
    scheme: str = "fp8-block",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize `norm_rope_sagesla(q, k, v, …)` without storing it.

    Args:
        q, k, v: (B, L, H·D), H·D a multiple of 128; all but the scheme as for `norm_rope_sagesla`.
        scheme: `"int8-block"` or `"fp8-block"`.

    Returns:
        q (B, L, H·D) and its float32 scale, laid out as by `quantize_activation`, M being B·L.

    Raises:
        OperatorInputError: for another dtype or scheme, or arguments that do not fit.
    """
    return torch.ops.turbo_opt.norm_rope_sagesla_quantize.default(
        q, k, v, q_weight, k_weight, cos, sin, eps, proj_weight, proj_bias,
        topk, block_q, block_k, feature_map, pv, scheme,
    )  # fmt: skip
