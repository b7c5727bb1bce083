"""The machines that a recipe can be compiled for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from turbo_opt.errors import BadInput, unknown

Scheme = Literal["int8-block", "fp8-block"]
"""Names of the quantization schemes, as in the options of `quantize-linear`."""


@dataclass(frozen=True)
class Target:
    """One kind of machine.

    Attributes:
        name: as in a recipe's `target`.
        device_type: `cpu` or `cuda`.
        compute_capability: (major, minor) of a CUDA device; None for a CPU.
        memory_gib: device memory as PyTorch reports it, rounded down; None if it depends on the
            machine.
        schemes: quantization schemes whose products run in hardware, the one to try first first.
    """

    name: str
    device_type: Literal["cpu", "cuda"]
    compute_capability: tuple[int, int] | None = None
    memory_gib: float | None = None
    schemes: tuple[Scheme, ...] = ()

    def supports(self, scheme: str) -> bool:
        """Products of `scheme` run in this machine's hardware."""
        return scheme in self.schemes


def _schemes(capability: tuple[int, int]) -> tuple[Scheme, ...]:
    """What the tensor cores of a compute capability multiply: int8 since 7.5, fp8 since 8.9.

    int8 runs at twice the rate of fp8 with float32 accumulation on consumer Ada and Blackwell;
    on Hopper and data-centre Blackwell fp8 comes first.
    """
    if capability < (7, 5):
        return ()
    if capability < (8, 9):
        return ("int8-block",)
    if capability[0] in (9, 10):
        return ("fp8-block", "int8-block")
    return ("int8-block", "fp8-block")


def _gpu(name: str, capability: tuple[int, int], memory_gib: float | None) -> Target:
    return Target(name, "cuda", capability, memory_gib, _schemes(capability))


_TARGETS = {
    target.name: target
    for target in (
        Target("cpu", "cpu", schemes=("int8-block",)),
        _gpu("a100", (8, 0), 79),
        _gpu("l40s", (8, 9), 44),
        _gpu("rtx4090", (8, 9), 23),
        _gpu("h100", (9, 0), 79),
        _gpu("h200", (9, 0), 139),
        _gpu("b200", (10, 0), 178),
        _gpu("rtx5090", (12, 0), 31),
    )
}
_GENERIC = re.compile(r"sm_?([1-9][0-9]?)([0-9])")
_MEMORY_TOLERANCE = 0.08


def known_targets() -> tuple[str, ...]:
    """The names of all targets, in alphabetical order."""
    return tuple(sorted(_TARGETS))


def get_target(name: str) -> Target:
    """The target called `name`, or a generic GPU for a name like `sm86`.

    Raises:
        BadInput: no such target; the message names the nearest one.
    """
    if name in _TARGETS:
        return _TARGETS[name]
    if generic := _GENERIC.fullmatch(name):
        capability = (int(generic[1]), int(generic[2]))
        return _gpu(f"sm{capability[0]}{capability[1]}", capability, None)
    message = unknown("target", name, _TARGETS)
    raise BadInput(f"{message} Any other NVIDIA GPU: its compute capability, like 'sm86'.")


def detect_target() -> Target:
    """The target that this machine is: its first visible CUDA device, else `cpu`.

    A GPU that is not in the list, or has another memory size than the listed one, becomes a
    generic target (`sm86`) with its own memory.
    """
    import torch

    if not torch.cuda.is_available():
        return _TARGETS["cpu"]
    properties = torch.cuda.get_device_properties(0)
    return classify_gpu(
        properties.name,
        (properties.major, properties.minor),
        properties.total_memory / 2**30,
    )


def classify_gpu(device_name: str, capability: tuple[int, int], memory_gib: float) -> Target:
    """The target of a GPU with the name, compute capability and memory that its driver reports."""
    words = re.sub(r"\bRTX (?=\d)", "RTX", device_name.upper()).split()
    for target in _TARGETS.values():
        if (
            target.name.upper() in re.split(r"[\s-]", " ".join(words))
            and target.compute_capability == capability
            and target.memory_gib is not None
            and abs(memory_gib / target.memory_gib - 1) < _MEMORY_TOLERANCE
        ):
            return target
    major, minor = capability
    return _gpu(f"sm{major}{minor}", capability, float(int(memory_gib)))
