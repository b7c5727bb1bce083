"""The first layer of a feed-forward network, whose result the second reads quantized.

    linear_gelu_quantize(q, w) = quantize_activation(gelu_tanh(dequant(q) · dequant(w)ᵀ + bias))

The sums are neither rounded nor stored before GELU, but by the provider `composed`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._cuda.compiler import unavailable
from ..block_linear import (
    BlockLinearCall,
    check_layer,
    cuda_supports,
    describe,
    triton_supports,
)
from ..block_linear import fake as fake_layer
from ..block_quantize import fake as fake_quantization
from ..capability import Capability
from ..operator import Operator, Provider, fastest_first
from ..schemes import check_in_features, scheme_named


def check(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    scheme: str,
    dtype: torch.dtype,
) -> None:
    operands = (q, q_scale, weight, weight_scale, bias, scheme, dtype)
    check_layer("linear_gelu_quantize", *operands)
    check_in_features(weight.shape[0], scheme_named(scheme))  # of the layer that reads it


def fake(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    scheme: str,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = fake_layer(q, q_scale, weight, weight_scale, bias, scheme, dtype)
    return fake_quantization(y, scheme)


def composes(capability: Capability, call: BlockLinearCall) -> str | None:
    """block_linear and gelu_quantize, each by the provider that it chooses."""
    return None


def prefer(capability: Capability, call: BlockLinearCall, names: Sequence[str]) -> Sequence[str]:
    """As declared, but int8 by Triton first on a GPU, and by `composed` on a CPU.

    On an H200 (benchmarks/results/kernels.json) int8 by Triton makes 719 TFLOP/s where `composed`
    makes 707 (32,760 tokens, 1536 to 8960 features), and 933 where that makes 909 (75,600, 5120 to
    13,824); its SQNR is 75 dB and more instead of 43. fp8 by Triton makes 649 and 703, `composed`
    764 and 993. On a CPU `composed` has the library's product, as `block_linear` alone has there:
    the reference's, summed in another order, rounds to other int8 values now and then.
    """
    names = fastest_first(capability, call, names)
    if call.scheme != "int8-block":
        return names
    first = "composed" if capability.is_cpu else "triton"
    return sorted(names, key=lambda name: name != first)


LINEAR_GELU_QUANTIZE = Operator(
    name="linear_gelu_quantize",
    schema=(
        "(Tensor q, Tensor q_scale, Tensor weight, Tensor weight_scale, Tensor? bias, "
        "str scheme, ScalarType dtype) -> (Tensor, Tensor)"
    ),
    package=__name__,
    fake=fake,
    check=check,
    describe=describe,
    providers=[
        Provider("cuda", f"{__name__}.cuda", cuda_supports, unavailable=unavailable),
        Provider("composed", f"{__name__}.composed", composes),
        Provider("triton", f"{__name__}.triton", triton_supports, requires="triton"),
    ],
    prefer=prefer,
)


def linear_gelu_quantize(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    scheme: str = "fp8-block",
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply as `block_linear`, take GELU's tanh form, and quantize the result.

    Args:
        q, q_scale, weight, weight_scale, bias, scheme: as of `block_linear`; N a multiple of 128.
        dtype: bfloat16, float16 or float32, of the sums where a provider stores them.

    Returns:
        (…, N) of q's dtype and its float32 scale, laid out as by `quantize_activation`.

    Raises:
        OperatorInputError: for another dtype or scheme, or shapes that do not fit.
    """
    return torch.ops.turbo_opt.linear_gelu_quantize.default(
        q, q_scale, weight, weight_scale, bias, scheme, dtype
    )
