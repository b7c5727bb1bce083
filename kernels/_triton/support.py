"""Which devices and shapes the Triton providers serve. Asking needs no Triton."""

from __future__ import annotations

import os

from ..capability import Capability
from ..schemes import SCHEMES

LARGEST_ROW = 16384  # a whole row is kept in registers


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on any device."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unsupported_device(
    capability: Capability, minimum: tuple[int, int] = (8, 0), purpose: str = ""
) -> str | None:
    """Why Triton kernels that need `minimum` do not run there, or None."""
    if capability.is_cpu:
        return None if interpreting() else "on a CPU Triton needs its interpreter"
    if capability.kind != "sm":
        return "its Triton kernels are written for NVIDIA GPUs"
    if not capability.at_least(*minimum):
        needed = f"sm{minimum[0]}{minimum[1]}"
        return f"{purpose or 'it'} needs {needed} or newer"
    return None


def unsupported_row(channels: int) -> str | None:
    """Why a row of that many channels is not served, or None."""
    if channels > LARGEST_ROW:
        return f"rows are kept in registers, up to {LARGEST_ROW} channels; got {channels}"
    return None


def unsupported_scheme(capability: Capability, scheme: str) -> str | None:
    """Why Triton does not serve that scheme on that device, or None."""
    return unsupported_device(capability, SCHEMES[scheme].minimum_capability, scheme)
