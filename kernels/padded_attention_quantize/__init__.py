"""padded_attention whose result is quantized at once, without rounding to q's dtype in between.

padded_attention_quantize(q, k, v, start) = quantize_activation(heads joined of padded_attention)

A head of 128 channels is one group of 1×128: a scale of `fp8-block` depends on one token of one
head, which attention holds when it is done.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .._cuda.compiler import unavailable
from .._triton.support import unsupported_scheme
from ..block_quantize import fake as fake_quantized
from ..capability import Capability
from ..errors import OperatorInputError
from ..operator import Operator, Provider
from ..padded_attention import PaddedCall, typical_inputs
from ..padded_attention import check_as as check_attention
from ..padded_attention import cuda_supports as attention_by_cuda
from ..padded_attention import describe as describe_attention
from ..padded_attention import triton_supports as attention_on_triton
from ..schemes import BLOCK, SCHEMES, scheme_named

QuantizedCall = tuple[PaddedCall, str]
"""What the choice of a provider depends on: the attention, the scheme."""


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    scale: float | None,
    scheme: str,
) -> None:
    name = "padded_attention_quantize"
    check_attention(name, q, k, v, start, scale)
    scheme_named(scheme)
    if SCHEMES[scheme].activation_block[0] > 1:
        raise OperatorInputError(
            f"{name}: a scale of {scheme} spans more tokens than attention holds at once; "
            "fp8-block has one for each token"
        )
    if q.shape[-1] != BLOCK:
        raise OperatorInputError(
            f"{name}: a head must be one group of {BLOCK} channels, got {q.shape[-1]}"
        )


def describe(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    scale: float | None,
    scheme: str,
) -> QuantizedCall:
    return describe_attention(q, k, v, start, scale), scheme


def fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    scale: float | None,
    scheme: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, head_dim = q.shape
    return fake_quantized(q.new_empty((batch, length, heads * head_dim)), scheme)


def triton_supports(capability: Capability, call: QuantizedCall) -> str | None:
    attention, scheme = call
    return attention_on_triton(capability, attention) or unsupported_scheme(capability, scheme)


def cuda_supports(capability: Capability, call: QuantizedCall) -> str | None:
    attention, _ = call
    return attention_by_cuda(capability, attention)


def quantized_by(
    attend: Callable[..., None],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    scale: float | None,
    scheme: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator by `attend(q, k, v, start, scale, o, o_scale)`, which writes into the last."""
    quantized, o_scale = fake(q, k, v, start, scale, scheme)
    heads = quantized.unflatten(-1, (q.shape[1], q.shape[3])).transpose(1, 2)
    attend(q, k, v, start, scale, heads, o_scale)
    return quantized, o_scale


PADDED_ATTENTION_QUANTIZE = Operator(
    name="padded_attention_quantize",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor start, float? scale, str scheme) -> (Tensor, Tensor)"
    ),
    package=__name__,
    fake=fake,
    check=check,
    describe=describe,
    providers=[
        Provider("cuda", f"{__name__}.cuda", cuda_supports, unavailable=unavailable),
        Provider("triton", f"{__name__}.triton", triton_supports, requires="triton"),
    ],
    typical_inputs=typical_inputs,
)


def padded_attention_quantize(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    scale: float | None = None,
    scheme: str = "fp8-block",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize `padded_attention(q, k, v, start, scale)`, its heads joined, without storing it.

    Args:
        q: (B, H, L, 128); all but the scheme as for `padded_attention`.
        scheme: `"fp8-block"`.

    Returns:
        q (B, L, H·128) e4m3 and its float32 scale (B·L, H) with strides (1, B·L).

    Raises:
        OperatorInputError: for another dtype or scheme, or arguments that do not fit.
    """
    return torch.ops.turbo_opt.padded_attention_quantize.default(q, k, v, start, scale, scheme)
