"""RMSNorm over all heads, then rotary embedding of each head, in float32 throughout.

norm_rope(x) = rotate(RMSNorm(x) · weight), (B, L, H·D) → (B, L, H, D)

Channels 2i and 2i+1 of a head turn together: (a, b) → (a·cos − b·sin, a·sin + b·cos).
Source: RoFormer, arXiv 2104.09864; the pairing is that of Wan.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._cuda.rows import unsupported
from .._triton.support import unsupported_device, unsupported_row
from ..capability import Capability
from ..checks import check_activation, check_channels, check_rotation
from ..operator import Operator, Provider


class NormRopeCall(NamedTuple):
    """What the choice of a provider depends on."""

    channels: int
    head_dim: int
    dtype: torch.dtype


def check(
    x: torch.Tensor, weight: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> None:
    check_activation("norm_rope", x, rank=3)
    check_channels("norm_rope", "weight", weight, x)
    check_rotation("norm_rope", cos, sin, x)


def describe(
    x: torch.Tensor, weight: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> NormRopeCall:
    return NormRopeCall(x.shape[-1], 2 * cos.shape[-1], x.dtype)


def fake(
    x: torch.Tensor, weight: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    batch, length, channels = x.shape
    head_dim = 2 * cos.shape[-1]
    return x.new_empty((batch, length, channels // head_dim, head_dim))


def triton_supports(capability: Capability, call: NormRopeCall) -> str | None:
    if call.head_dim != 128:
        return f"its tiles are heads of 128 channels, got {call.head_dim}"
    return unsupported_device(capability) or unsupported_row(call.channels)


def cuda_supports(capability: Capability, call: NormRopeCall) -> str | None:
    if call.head_dim != 128:
        return f"its lanes turn heads of 128 channels, got {call.head_dim}"
    return unsupported(capability, call.dtype, call.channels)


NORM_ROPE = Operator(
    name="norm_rope",
    schema="(Tensor x, Tensor? weight, Tensor cos, Tensor sin, float eps) -> Tensor",
    package=__name__,
    fake=fake,
    check=check,
    describe=describe,
    providers=[
        Provider("cuda", f"{__name__}.cuda", cuda_supports),
        Provider("triton", f"{__name__}.triton", triton_supports, requires="triton"),
    ],
)


def norm_rope(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float = 1e-6,
) -> torch.Tensor:
    """RMSNorm `x` over all its channels and rotate each head by its token's angles.

    Args:
        x: (B, L, H·D) in bfloat16, float16 or float32; any strides.
        weight: (H·D,), float32 or x's dtype, or None for 1.
        cos, sin: (1, L, 1, D / 2) float32, of each pair's angle; any strides.
        eps: added to the mean square.

    Returns:
        (B, L, H, D) of x's dtype, contiguous, rounded once.

    Raises:
        OperatorInputError: for another dtype, or shapes that do not fit.
    """
    return torch.ops.turbo_opt.norm_rope.default(x, weight, cos, sin, eps)
