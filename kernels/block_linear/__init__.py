"""Linear layer on block-quantized activations and weights.

    block_linear(q, w) = dequant(q) · dequant(w)ᵀ + bias

Products are summed within a block of 128 along K (exactly, for int8), then scaled and accumulated
in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .._cuda import linear as cuda_linear
from .._cuda.compiler import unavailable
from .._triton.support import unsupported_scheme
from ..capability import Capability
from ..checks import ACTIVATION_DTYPES
from ..errors import OperatorInputError
from ..operator import REFERENCE, Operator, Provider
from ..schemes import BLOCK, blocks, check_in_features, scheme_named


class BlockLinearCall(NamedTuple):
    """What the choice of a provider depends on."""

    scheme: str
    dtype: torch.dtype
    in_features: int
    out_features: int
    whole_quads: bool  # the number of tokens M is a multiple of 4


def check(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    scheme: str,
    dtype: torch.dtype,
) -> None:
    check_layer("block_linear", q, q_scale, weight, weight_scale, bias, scheme, dtype)


def check_layer(
    operator: str,
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    scheme: str,
    dtype: torch.dtype,
) -> None:
    """Raise OperatorInputError, in the name of `operator`, unless they make a linear layer."""
    rules = scheme_named(scheme)
    if q.dtype is not rules.dtype or weight.dtype is not rules.dtype:
        raise OperatorInputError(
            f"{operator}: {scheme} takes q and weight in {rules.dtype}, got {q.dtype} and "
            f"{weight.dtype}"
        )
    if dtype not in ACTIVATION_DTYPES:
        raise OperatorInputError(
            f"{operator}: dtype must be bfloat16, float16 or float32, got {dtype}"
        )
    if weight.ndim != 2 or q.ndim == 0 or q.shape[-1] != weight.shape[1]:
        raise OperatorInputError(
            f"{operator}: q must be (…, K) and weight (N, K), got {tuple(q.shape)} and "
            f"{tuple(weight.shape)}"
        )
    out_features, in_features = weight.shape
    check_in_features(in_features, rules)
    _check_scale(
        operator, "weight_scale", weight_scale, (blocks(out_features), in_features // BLOCK)
    )
    rows_per_block = rules.activation_block[0]
    tokens = q.numel() // in_features
    _check_scale(
        operator,
        "q_scale",
        q_scale,
        ((tokens + rows_per_block - 1) // rows_per_block, in_features // BLOCK),
    )
    if bias is not None:
        if bias.dtype is not torch.float32 and bias.dtype is not dtype:
            raise OperatorInputError(
                f"{operator}: bias must be float32 or {dtype} as the output is, got {bias.dtype}"
            )
        if bias.ndim != 1 or bias.shape[0] != out_features:
            raise OperatorInputError(
                f"{operator}: bias must have shape ({out_features},), got {tuple(bias.shape)}"
            )


def _check_scale(operator: str, name: str, scale: torch.Tensor, shape: tuple[int, int]) -> None:
    """A symbolic number of tokens is left to be checked when the program runs."""
    known = all(isinstance(size, int) for size in (*scale.shape, *shape))
    if scale.dtype is not torch.float32 or scale.ndim != 2 or (known and scale.shape != shape):
        raise OperatorInputError(
            f"{operator}: {name} must be float32 of shape {tuple(shape)}, got {scale.dtype} of "
            f"shape {tuple(scale.shape)}"
        )


def describe(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    scheme: str,
    dtype: torch.dtype,
) -> BlockLinearCall:
    out_features, in_features = weight.shape
    whole_quads = q.numel() // in_features % 4 == 0
    return BlockLinearCall(scheme, dtype, in_features, out_features, whole_quads)


def fake(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    scheme: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    return q.new_empty((*q.shape[:-1], weight.shape[0]), dtype=dtype)


def triton_supports(capability: Capability, call: BlockLinearCall) -> str | None:
    return unsupported_scheme(capability, call.scheme)


def torch_supports(capability: Capability, call: BlockLinearCall) -> str | None:
    """fp8 by cuBLASLt's block-scaled product on Hopper; int8 by torch._int_mm on a CPU."""
    if capability.is_cpu:
        return None if call.scheme == "int8-block" else "on a CPU torch multiplies int8 only"
    if call.scheme != "fp8-block":
        return "torch has no block-scaled int8 product on a GPU"
    if not (capability.at_least(9, 0) and not capability.at_least(10, 0)):
        return "cuBLASLt scales fp8 by 1×128 and 128×128 blocks on sm90 only"
    if call.dtype is not torch.bfloat16:
        return f"the block-scaled product returns bfloat16, not {call.dtype}"
    if call.out_features % BLOCK:
        return f"out_features must be a multiple of {BLOCK}, got {call.out_features}"
    if not call.whole_quads:
        return "the number of tokens must be a multiple of 4, for aligned scales"
    return None


def cuda_supports(capability: Capability, call: BlockLinearCall) -> str | None:
    """linear.cu."""
    return cuda_linear.unsupported(capability, call.scheme, call.dtype, call.out_features)


def prefer(capability: Capability, call: BlockLinearCall, names: Sequence[str]) -> Sequence[str]:
    """torch's library calls, then CUDA, Triton, the reference, which on a CPU comes before both.

    On an H200 CUDA takes less time than Triton for every product of the models' shapes
    (benchmarks/results/kernels.json).
    """
    last = (REFERENCE, "triton", "cuda") if capability.is_cpu else ("cuda", "triton", REFERENCE)
    return [*(name for name in names if name not in last), *last]


BLOCK_LINEAR = Operator(
    name="block_linear",
    schema=(
        "(Tensor q, Tensor q_scale, Tensor weight, Tensor weight_scale, Tensor? bias, "
        "str scheme, ScalarType dtype) -> Tensor"
    ),
    package=__name__,
    fake=fake,
    check=check,
    describe=describe,
    providers=[
        Provider("torch", f"{__name__}.torch_library", torch_supports),
        Provider("triton", f"{__name__}.triton", triton_supports, requires="triton"),
        Provider("cuda", f"{__name__}.cuda", cuda_supports, unavailable=unavailable),
    ],
    prefer=prefer,
)


def block_linear(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    scheme: str = "fp8-block",
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Multiply quantized activations by a quantized weight, transposed, and add the bias.

    Args:
        q: (…, K), int8 or float8_e4m3fn as the scheme has it; K a multiple of 128.
        q_scale: as `quantize_activation` returns it, M being all dimensions of q but the last.
        weight: (N, K), of q's dtype.
        weight_scale: (ceil(N / 128), K / 128) float32, as `quantize_weight` returns it.
        bias: (N,), float32 or `dtype`, or None.
        scheme: `"int8-block"` or `"fp8-block"`.
        dtype: of the result: bfloat16, float16 or float32.

    Returns:
        (…, N) of `dtype`, contiguous. Before it is rounded to `dtype` it is finite where Σ |x|·|w|
        along K is below 3.4e38. Beyond that partial sums may be infinite, and NaN where infinities
        of both signs meet.

    Raises:
        OperatorInputError: for another dtype or scheme, or shapes that do not fit.
    """
    return torch.ops.turbo_opt.block_linear.default(
        q, q_scale, weight, weight_scale, bias, scheme, dtype
    )
