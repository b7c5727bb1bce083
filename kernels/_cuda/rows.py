"""Launch rows.cu and groups.cu: norms, gated residuals and quantization of bfloat16 rows."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..capability import Capability, capability_of
from ..schemes import BLOCK
from .compiler import Kernel, Long, load_kernel

VALUES_PER_GROUP_PROGRAM = 256 * 4 * 8
CHANNELS_PER_STEP = 256  # of a warp: 16 bytes per lane
LARGEST_ROW = 6144  # a row lies packed in a warp's registers
LARGEST_TEAM = 4


class Shape(NamedTuple):
    """How rows are shared out; see rows.cu. The fields are its macros.

    warps of a program, programs of a multiprocessor, warps of a team, rows of a team
    """

    warps: int
    programs: int
    team: int
    rows: int


def unsupported(capability: Capability, dtype: torch.dtype, channels: int) -> str | None:
    """Why the row kernel does not serve rows of that kind, or None."""
    if dtype is not torch.bfloat16:
        return f"its CUDA kernel reads bfloat16, not {dtype}"
    if channels % CHANNELS_PER_STEP or channels > LARGEST_ROW:
        return (
            f"its CUDA kernel takes multiples of {CHANNELS_PER_STEP} up to {LARGEST_ROW} channels, "
            f"got {channels}"
        )
    return unsupported_device(capability)


def unsupported_values(capability: Capability, dtype: torch.dtype) -> str | None:
    """Why the kernels that quantize without a norm do not serve, or None."""
    if dtype is not torch.bfloat16:
        return f"its CUDA kernel quantizes bfloat16, not {dtype}"
    return unsupported_device(capability)


def unsupported_device(capability: Capability) -> str | None:
    """Why the kernels do not run there, or None."""
    if capability.at_least(9, 0) and not capability.at_least(10, 0):
        return None
    return "its CUDA kernel was measured on sm90 only"


class Branch(NamedTuple):
    """What is added to x before it is normalized, and where the sum goes."""

    y: torch.Tensor  # (B, L, C)
    gate: torch.Tensor | None  # (B or 1, L or 1, C)
    stream: torch.Tensor  # (B, L, C), contiguous


def process_rows(
    x: torch.Tensor,
    *,
    branch: Branch | None = None,
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 0.0,
    centered: bool = False,
    gain_offset: int = 0,
    tables: tuple[torch.Tensor, torch.Tensor] | None = None,
    y: torch.Tensor | None = None,
    y_scale: torch.Tensor | None = None,
) -> None:
    """Add `branch` to x (…, C) and normalize the sum into `y`, quantized if there is a scale.

    Args:
        tables: cos and sin, (1, L, 1, 64) float32, that each head of 128 channels turns by.
        y: as x, contiguous; None: nothing is normalized.
        y_scale: (M, C / 128) float32 with strides (1, M).
    """
    if x.numel() == 0:
        return
    rows_BLC = aligned_rows(x)
    batch, length, channels = rows_BLC.shape
    added = aligned_rows(branch.y) if branch else None
    gate, gain, bias = broadcast_parameters((branch.gate if branch else None, gain, bias), rows_BLC)
    shape = _shape(channels, branch is not None, tables is not None, centered, (gain, bias))
    narrow = any(p is not None and p.dtype is torch.bfloat16 for p in (gate, gain, bias))
    defines = {
        "CHANNELS": channels,
        **{name.upper(): value for name, value in shape._asdict().items()},
        "BRANCH": int(branch is not None),
        "GATE": int(gate is not None),
        "GAIN": int(gain is not None),
        "BIAS": int(bias is not None),
        "OUTPUT": 0 if y is None else 2 if y_scale is not None else 1,
        "ROTATE": int(tables is not None),
        "CENTERED": int(centered),
        "OFFSET": gain_offset,
        "PARAMETER_BF16": int(narrow),
    }
    cos, sin = _tables(tables)
    teams = batch * -(-length // shape.rows)
    load("common.cuh+parameters.cuh+rows.cu", "process_rows", x, defines).launch(
        (-(-teams * shape.team // shape.warps),), 32 * shape.warps,
        rows_BLC, added, gate, gain, bias, cos, sin, branch.stream if branch else None, y, y_scale,
        eps, batch, length,
        *(n for tensor in (rows_BLC, added, gate, gain, bias) for n in strides_of(tensor)),
        Long(cos.stride(0) if cos is not None else 0),
    )  # fmt: skip


def quantize_normalized_rows(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    gain_offset: int,
    branch: Branch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm of x (…, C), or of x plus a branch, as e4m3 and a scale (M, C / 128)."""
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    rows, groups = x.numel() // x.shape[-1], x.shape[-1] // BLOCK
    scale = torch.empty((groups, rows), dtype=torch.float32, device=x.device).t()
    process_rows(
        x, branch=branch, gain=gain, bias=bias, eps=eps, centered=True, gain_offset=gain_offset,
        y=q, y_scale=scale,
    )  # fmt: skip
    return q, scale


def quantize_groups(x: torch.Tensor, *, gelu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """x (…, K), or its GELU, as e4m3 (…, K) and a scale (M, K / 128) with strides (1, M)."""
    x = x.contiguous()
    columns = x.shape[-1]
    rows = x.numel() // columns
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((columns // BLOCK, rows), dtype=torch.float32, device=x.device).t()
    if x.numel():
        programs = -(-x.numel() // VALUES_PER_GROUP_PROGRAM)
        kernel = load("common.cuh+groups.cu", "quantize_groups", x, {"GELU": int(gelu)})
        kernel.launch((programs,), 256, on_16_bytes(x), q, scale, rows, columns // 8)
    return q, scale


def _shape(
    channels: int,
    branch: bool,
    rotated: bool,
    centered: bool,
    parameters: tuple[torch.Tensor | None, ...],
) -> Shape:
    """As measured on an H200 with 1536 and 5120 channels: rows in flight against registers."""
    steps = channels // CHANNELS_PER_STEP
    shared = all(p is None or p.shape[1] == 1 or p.stride(1) == 0 for p in parameters)
    if rotated:
        team = _team(steps, 6)
        return Shape(8, 4 if steps <= 5 * team else 3, team, 1)
    if branch or not shared:
        return Shape(8, 2, _team(steps, 5), 1) if branch else Shape(8, 4, _team(steps, 6), 1)
    team = _team(steps, 5)
    if steps <= 3 * team:
        return Shape(8, 4 if centered else 3, team, 2)
    if steps > 5 * team:
        return Shape(4, 2, team, 2)
    return Shape(8, 3, team, 2) if centered else Shape(4, 5, team, 2)


def _team(steps: int, most: int) -> int:
    """How many warps share a row, so that each takes `most` steps, if it splits so evenly."""
    team = 1
    while steps > most and steps % 2 == 0 and team < LARGEST_TEAM:
        steps, team = steps // 2, 2 * team
    return team


def load(
    source: str, name: str, x: torch.Tensor, defines: dict[str, int], shared_bytes: int = 0
) -> Kernel:
    """A kernel for x's device; see `load_kernel`."""
    major, minor = capability_of(x.device)[1:]
    architecture = f"sm_{major}{minor}{'a' if major == 9 else ''}"
    return load_kernel(
        source, name, architecture, x.device.index, tuple(defines.items()), shared_bytes
    )


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """View x (copying if there is no such view) as (B, L, C), each row on 16 bytes."""
    x = x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])
    if x.stride(2) != 1 or any(x.stride(axis) % 8 for axis in (0, 1) if x.shape[axis] > 1):
        x = x.contiguous()
    return on_16_bytes(x)


def on_16_bytes(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it that begins on 16 bytes."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def broadcast_parameters(
    given: tuple[torch.Tensor | None, ...], x_BLC: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """Gate, gain and bias broadcast to x, of one dtype, each row on 16 bytes."""
    dtypes = {p.dtype for p in given if p is not None}
    common = dtypes.pop() if len(dtypes) == 1 else torch.float32
    ready = []
    for parameter in given:
        if parameter is not None:
            parameter = parameter.to(common)
            strides = [s for s, n in zip(parameter.stride(), parameter.shape, strict=True) if n > 1]
            if parameter.stride(-1) != 1 or any(s % 8 for s in strides[:-1]):
                parameter = parameter.contiguous()
            parameter = on_16_bytes(parameter).expand(x_BLC.shape)
        ready.append(parameter)
    return tuple(ready)


def _tables(
    given: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Both as (L, 64) of the same strides, each token's angles together on 16 bytes."""
    if given is None:
        return None, None
    cos, sin = (table[0, :, 0] for table in given)
    if cos.stride() != sin.stride() or cos.stride(1) != 1 or cos.stride(0) % 4:
        cos, sin = cos.contiguous(), sin.contiguous()
    return on_16_bytes(cos), on_16_bytes(sin)


def strides_of(tensor: torch.Tensor | None) -> tuple[Long, Long]:
    """Strides along batch and rows."""
    if tensor is None:
        return Long(0), Long(0)
    return Long(tensor.stride(0)), Long(tensor.stride(1))
