"""What operators over rows tell of a call and return, and who serves them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ._cuda import rows as cuda_rows
from ._cuda.compiler import unavailable
from ._triton.support import unsupported_device, unsupported_row, unsupported_scheme
from .capability import Capability
from .operator import Provider


class RowCall(NamedTuple):
    """What the choice of a provider depends on; `scheme` is that of a quantized result."""

    channels: int
    dtype: torch.dtype
    scheme: str | None = None


def describe_rows(x: torch.Tensor, *_: object) -> RowCall:
    """A call whose result has x's dtype."""
    return RowCall(x.shape[-1], x.dtype)


def describe_quantized_rows(x: torch.Tensor, *others: Any) -> RowCall:
    """A call whose last argument is the scheme of its result."""
    return RowCall(x.shape[-1], x.dtype, others[-1])


def like_x(x: torch.Tensor, *_: object) -> torch.Tensor:
    """A fake result of x's shape and dtype, contiguous."""
    return x.new_empty(x.shape)


def triton_supports(capability: Capability, call: RowCall) -> str | None:
    """Kernels that hold a whole row."""
    if call.scheme is None:
        return unsupported_device(capability) or unsupported_row(call.channels)
    return unsupported_scheme(capability, call.scheme) or unsupported_row(call.channels)


def cuda_supports(capability: Capability, call: RowCall) -> str | None:
    """rows.cu, and for int8 blocks.cu."""
    return cuda_rows.unsupported(capability, call.dtype, call.channels)


def triton_quantizes(capability: Capability, call: RowCall) -> str | None:
    """Kernels that hold a tile of 128×128."""
    assert call.scheme is not None
    return unsupported_scheme(capability, call.scheme)


def cuda_quantizes(capability: Capability, call: RowCall) -> str | None:
    """groups.cu, and tiles.cu for int8."""
    return cuda_rows.unsupported_values(capability, call.dtype)


def row_providers(package: str) -> list[Provider]:
    """Providers of an operator that normalizes rows or adds to them."""
    return [
        Provider("cuda", f"{package}.cuda", cuda_supports, unavailable=unavailable),
        Provider("triton", f"{package}.triton", triton_supports, requires="triton"),
    ]


def quantize_providers(package: str) -> list[Provider]:
    """Providers of an operator that quantizes without a norm."""
    return [
        Provider("cuda", f"{package}.cuda", cuda_quantizes, unavailable=unavailable),
        Provider("triton", f"{package}.triton", triton_quantizes, requires="triton"),
    ]
