"""Quantize by a scheme.

For int8 blocks.cu and tiles.cu are launched, for e4m3 rows.cu and groups.cu.

A scale of int8 belongs to 128 rows and 128 channels. Rows are counted through all batch entries.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..schemes import BLOCK, SCHEMES, blocks
from .compiler import Kernel
from .rows import (
    Branch,
    aligned_rows,
    broadcast_parameters,
    load,
    on_16_bytes,
    quantize_groups,
    quantize_normalized_rows,
    strides_of,
)

_CLUSTER = 8  # programs that take a block; what every device with clusters can run
_HELD = BLOCK // _CLUSTER  # rows of a program
_SHARED, _RESERVED = 228 * 1024, 1024  # bytes of a multiprocessor; of them, lost with each program
_REGISTERS, _LEAST_REGISTERS = 64 * 1024, 80  # of a multiprocessor; that a thread lives on
_ROOMY = 96  # registers of a thread that hold its 8 channels of all rows, and what else it needs
_MOST_PROGRAMS = 4  # of a multiprocessor
_TILE = {"THREADS": 512, "PROGRAMS": 2}  # of tiles.cu
_HEADERS = "common.cuh+hopper.cuh+cluster.cuh+parameters.cuh+int8.cuh+halves.cuh+blocks.cuh"


class Shape(NamedTuple):
    """How blocks.cu shares out a block. The fields are its macros.

    programs of a multiprocessor; rows normalized while others arrive; rows whose result is kept in
    registers; rows of a branch that are on their way at once; cycles from the start of the first
    cluster to that of the last
    """

    programs: int
    part: int
    keep: int
    ahead: int
    stagger: int


def quantize_norm(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    scheme: str,
    *,
    gain_offset: int,
    branch: Branch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize LN(x)·(gain_offset + gain) + bias, of x (…, C) or of x plus a branch."""
    if SCHEMES[scheme].activation_block[0] == 1:
        return quantize_normalized_rows(x, gain, bias, eps, gain_offset=gain_offset, branch=branch)
    q, scale = _new_blocks(x)
    if x.numel():
        _quantize_normalized_blocks(x, gain, bias, eps, gain_offset, branch, q, scale)
    return q, scale


def quantize(x: torch.Tensor, scheme: str, *, gelu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x (…, K), or its GELU."""
    if SCHEMES[scheme].activation_block[0] == 1:
        return quantize_groups(x, gelu=gelu)
    q, scale = _new_blocks(x)
    if x.numel():
        defines = {**_TILE, "GELU": int(gelu)}
        kernel = load("common.cuh+int8.cuh+tiles.cu", "quantize_tiles", x, defines)
        rows, groups = x.numel() // x.shape[-1], x.shape[-1] // BLOCK
        x = on_16_bytes(x.contiguous())
        kernel.launch((scale.numel(),), _TILE["THREADS"], x, q, scale, rows, groups)
    return q, scale


def _quantize_normalized_blocks(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    gain_offset: int,
    branch: Branch | None,
    q: torch.Tensor,
    scale: torch.Tensor,
) -> None:
    rows_BLC = aligned_rows(x)
    added = aligned_rows(branch.y) if branch else None
    gate, gain, bias = broadcast_parameters((branch.gate if branch else None, gain, bias), rows_BLC)
    rows_BLC, (added, gate, gain, bias) = _as_one_batch(rows_BLC, (added, gate, gain, bias))
    batch, length, channels = rows_BLC.shape
    parameters = [p for p in (gate, gain, bias) if p is not None]
    defines = {
        "CHANNELS": channels,
        "GAIN": int(gain is not None),
        "BIAS": int(bias is not None),
        "OFFSET": gain_offset,
        "BATCHED": int(batch > 1),
        "PARAMETER_BF16": int(any(p.dtype is torch.bfloat16 for p in parameters)),
    }
    inputs = (rows_BLC, added, gate, gain, bias)
    shape, shared_bytes = _shape(channels, branch is not None), _shared_bytes(channels)
    defines |= {
        "BRANCH": int(branch is not None),
        "GATE": int(gate is not None),
        "PER_TOKEN": int(any(_differs_by_row(p) for p in parameters)),
        "SHARED_BYTES": shared_bytes,
        **{name.upper(): value for name, value in shape._asdict().items()},
    }
    kernel = load(f"{_HEADERS}+blocks.cu", "quantize_blocks", x, defines, shared_bytes)
    threads = _threads(channels)
    clusters = min(scale.shape[0], _resident_clusters(kernel, threads))
    kernel.launch(
        (clusters * _CLUSTER,), threads,
        *inputs, branch.stream if branch else None, q, scale, eps, batch, length,
        *(stride for tensor in inputs for stride in strides_of(tensor)),
    )  # fmt: skip


def _new_blocks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialized int8 of x's shape and its scale (ceil(M / 128), K / 128)."""
    rows = math.prod(x.shape[:-1])
    scale = torch.empty((blocks(rows), x.shape[-1] // BLOCK), dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=torch.int8, device=x.device), scale


def _as_one_batch(
    x_BLC: torch.Tensor, others: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """All of them as (1, B·L, C), if each is one sequence of equally distant rows."""
    batch, length, channels = x_BLC.shape
    there = [x_BLC, *(t for t in others if t is not None)]
    if batch == 1 or any(t.stride(0) != length * t.stride(1) for t in there):
        return x_BLC, list(others)

    def joined(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.as_strided((1, batch * length, channels), (0, tensor.stride(1), 1))

    return joined(x_BLC), [None if t is None else joined(t) for t in others]


def _differs_by_row(parameter_BLC: torch.Tensor) -> bool:
    """Does a broadcast gate, gain or bias differ from one row to another?"""
    return any(parameter_BLC.stride(axis) for axis in (0, 1) if parameter_BLC.shape[axis] > 1)


def _shape(channels: int, branch: bool) -> Shape:
    """As measured on an H200 with 1536 and 5120 channels."""
    programs = min(
        _MOST_PROGRAMS,
        _SHARED // (_shared_bytes(channels) + _RESERVED),
        _REGISTERS // (_LEAST_REGISTERS * _threads(channels)),
    )
    if branch:
        registers = _REGISTERS // (programs * _threads(channels))
        ahead = 10 if registers < _ROOMY else _HELD
        stagger = 9600 if programs > 1 else 22500
        return Shape(programs, part=_HELD, keep=0, ahead=ahead, stagger=stagger)
    return Shape(programs, part=_HELD if programs > 1 else 8, keep=4, ahead=_HELD, stagger=4800)


def _threads(channels: int) -> int:
    """Of a program: each has 8 channels."""
    return channels // 8


def _shared_bytes(channels: int) -> int:
    """Of a program, `Shared` in blocks.cu: rows, their sums and norms, maxima of the cluster."""
    held = _HELD * (2 * channels + 16 + 8 * (channels // 256) + 8)
    return held + 2 * 4 * _CLUSTER * (channels // BLOCK) + 16


@functools.cache
def _resident_clusters(kernel: Kernel, threads: int) -> int:
    return kernel.resident_clusters(threads, _CLUSTER)
