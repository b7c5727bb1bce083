"""What a device can do, as far as the choice of a provider is concerned."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import torch

from .errors import OperatorInputError


class Capability(NamedTuple):
    """A kind of device: `cpu`, or `sm` (NVIDIA) with its compute capability.

    Other device types that torch knows keep their own name (`rocm`, `mps`, `xpu`), version 0.0.
    """

    kind: str
    major: int = 0
    minor: int = 0

    @property
    def is_cpu(self) -> bool:
        return self.kind == "cpu"

    def at_least(self, major: int, minor: int = 0) -> bool:
        """Whether this is an NVIDIA GPU of at least that compute capability."""
        return self.kind == "sm" and (self.major, self.minor) >= (major, minor)

    def __str__(self) -> str:
        return f"sm{self.major}{self.minor}" if self.kind == "sm" else self.kind


CPU = Capability("cpu")


def parse_capability(text: str) -> Capability:
    """Read `cpu`, `sm90`, `sm_89` or `sm120`; the last digit is the minor version."""
    if text == "cpu":
        return CPU
    match = re.fullmatch(r"sm_?(\d+)(\d)", text)
    if match is None:
        raise OperatorInputError(f"unknown device {text!r}: write 'cpu' or, say, 'sm90' or 'sm120'")
    return Capability("sm", int(match[1]), int(match[2]))


@functools.cache
def capability_of(device: torch.device) -> Capability:
    """The capability of a device of this machine."""
    if device.type != "cuda":
        return Capability(device.type)
    if torch.version.hip is not None:
        return Capability("rocm")
    return Capability("sm", *torch.cuda.get_device_capability(device))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the GPU has; 4 stands in for a CPU under Triton's interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
