"""A linear layer that adds its result to the residual stream, times a gate.

    linear_gated_residual(q, w, x, gate) = x + (dequant(q) · dequant(w)ᵀ + bias) · gate

The layer's own result is neither rounded nor stored, but by the provider `composed`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._cuda.compiler import unavailable
from ..block_linear import BlockLinearCall, check_layer, cuda_supports, triton_supports
from ..block_linear import describe as describe_layer
from ..capability import Capability
from ..checks import check_activation, check_modulation
from ..errors import OperatorInputError
from ..operator import Operator, Provider, fastest_first


def check(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor,
    gate: torch.Tensor | None,
    scheme: str,
) -> None:
    name = "linear_gated_residual"
    check_activation(name, x, rank=3)
    check_layer(name, q, q_scale, weight, weight_scale, bias, scheme, x.dtype)
    shape = (*q.shape[:-1], weight.shape[0])
    if q.ndim != 3 or any(a != b for a, b in zip(x.shape, shape, strict=True)):
        raise OperatorInputError(
            f"{name}: x must have the shape of the layer's result, (B, L, N), got "
            f"{tuple(x.shape)} where that is {tuple(shape)}"
        )
    if gate is not None:
        check_modulation(name, "gate", gate, x)


def describe(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor,
    gate: torch.Tensor | None,
    scheme: str,
) -> BlockLinearCall:
    return describe_layer(q, q_scale, weight, weight_scale, bias, scheme, x.dtype)


def fake(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor,
    gate: torch.Tensor | None,
    scheme: str,
) -> torch.Tensor:
    return x.new_empty(x.shape)


def composes(capability: Capability, call: BlockLinearCall) -> str | None:
    """block_linear and gated_residual, each by the provider that it chooses."""
    return None


def prefer(capability: Capability, call: BlockLinearCall, names: Sequence[str]) -> Sequence[str]:
    """On a CPU int8 by the library product that block_linear has there, before the reference."""
    names = fastest_first(capability, call, names)
    if capability.is_cpu and call.scheme == "int8-block":
        return ["composed", *(name for name in names if name != "composed")]
    return names


LINEAR_GATED_RESIDUAL = Operator(
    name="linear_gated_residual",
    schema=(
        "(Tensor q, Tensor q_scale, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor x, "
        "Tensor? gate, str scheme) -> Tensor"
    ),
    package=__name__,
    fake=fake,
    check=check,
    describe=describe,
    providers=[
        Provider("cuda", f"{__name__}.cuda", cuda_supports, unavailable=unavailable),
        Provider("triton", f"{__name__}.triton", triton_supports, requires="triton"),
        Provider("composed", f"{__name__}.composed", composes),
    ],
    prefer=prefer,
)


def linear_gated_residual(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor,
    gate: torch.Tensor | None = None,
    scheme: str = "fp8-block",
) -> torch.Tensor:
    """Multiply as `block_linear`, and add the result times `gate` to x in float32.

    Args:
        q: (B, L, K), int8 or float8_e4m3fn as the scheme has it; K a multiple of 128.
        q_scale, weight, weight_scale, scheme: as of `block_linear`.
        bias: (N,), float32 or x's dtype, or None.
        x: (B, L, N) in bfloat16, float16 or float32; any strides.
        gate: (B or 1, L or 1, N), float32 or x's dtype, or None for 1.

    Returns:
        (B, L, N) of x's dtype, contiguous, rounded once, but by `composed`, which rounds the
        layer's result too.

    Raises:
        OperatorInputError: for another dtype or scheme, or shapes that do not fit.
    """
    return torch.ops.turbo_opt.linear_gated_residual.default(
        q, q_scale, weight, weight_scale, bias, x, gate, scheme
    )
