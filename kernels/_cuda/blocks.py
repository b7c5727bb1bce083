"""Quantize by a scheme: launch blocks.cu and tiles.cu for int8, rows.cu and groups.cu for e4m3.

A scale of int8 belongs to 128 rows and 128 channels. Rows are counted through all batch entries.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..schemes import BLOCK, SCHEMES, blocks
from .compiler import PORTABLE_CLUSTER, Kernel
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

WIDE_CLUSTER = 16  # programs; Hopper runs such clusters if a kernel allows them
_MOST_PROGRAMS = 4  # of a multiprocessor
_MOST_THREADS = 1280  # of a multiprocessor, so that each can have 48 registers
_SHARED, _RESERVED = 228 * 1024, 1024  # bytes of a multiprocessor; of them, lost with each program


class Shape(NamedTuple):
    """How a block is shared out; see blocks.cu. The fields are its macros.

    programs of a cluster, programs of a multiprocessor, rows of a branch loaded at once, rows of a
    thread normalized at once
    """

    cluster: int
    programs: int
    step: int
    unroll: int

    def shared_bytes(self, channels: int) -> int:
        """Of a program: `Shared` in blocks.cu."""
        rows = BLOCK // self.cluster
        held = rows * (2 * channels + 16 + 8 * (channels // 256) + 8)
        return held + 2 * 4 * self.cluster * (channels // BLOCK) + 16


class TileShape(NamedTuple):
    """How a block without a norm is taken; see tiles.cu. The fields are its macros.

    threads of a program, programs of a multiprocessor, whether two GELUs share a reciprocal
    """

    threads: int
    programs: int
    paired: int


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
        shape = _tile_shape(gelu)
        defines = {name.upper(): value for name, value in shape._asdict().items()}
        kernel = load(
            "common.cuh+int8.cuh+tiles.cu", "quantize_tiles", x, {**defines, "GELU": int(gelu)}
        )
        rows, groups = x.numel() // x.shape[-1], x.shape[-1] // BLOCK
        x = on_16_bytes(x.contiguous())
        kernel.launch((scale.numel(),), shape.threads, x, q, scale, rows, groups)
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
    rows_BLC, others = _as_one_batch(rows_BLC, (added, gate, gain, bias))
    batch, length, channels = rows_BLC.shape
    parameters = [p for p in others[1:] if p is not None]
    shape = _shape(channels)
    shared_bytes = shape.shared_bytes(channels)
    defines = {
        "CHANNELS": channels,
        **{name.upper(): value for name, value in shape._asdict().items()},
        "SHARED_BYTES": shared_bytes,
        "BRANCH": int(branch is not None),
        "GATE": int(gate is not None),
        "GAIN": int(gain is not None),
        "BIAS": int(bias is not None),
        "OFFSET": gain_offset,
        "BATCHED": int(batch > 1),
        "PER_TOKEN": int(any(_differs_by_row(p) for p in parameters)),
        "PARAMETER_BF16": int(any(p.dtype is torch.bfloat16 for p in parameters)),
    }
    source = "common.cuh+hopper.cuh+cluster.cuh+parameters.cuh+int8.cuh+blocks.cu"
    kernel = load(source, "quantize_blocks", x, defines, shared_bytes)
    threads = channels // 8
    clusters = min(scale.shape[0], _resident_clusters(kernel, threads, shape.cluster))
    kernel.launch(
        (clusters * shape.cluster,), threads,
        rows_BLC, *others, branch.stream if branch else None, q, scale, eps, batch, length,
        *(stride for tensor in (rows_BLC, *others) for stride in strides_of(tensor)),
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


def _shape(channels: int) -> Shape:
    """Two programs of a multiprocessor at least, so that one computes while another loads."""
    for shape in (Shape(PORTABLE_CLUSTER, 1, 8, 4), Shape(WIDE_CLUSTER, 1, 4, 4)):
        room = _SHARED // (shape.shared_bytes(channels) + _RESERVED)
        programs = min(room, _MOST_THREADS // (channels // 8), _MOST_PROGRAMS)
        if programs > 1:
            return shape._replace(programs=programs)
    return Shape(PORTABLE_CLUSTER, 1, 8, 4)


def _tile_shape(gelu: bool) -> TileShape:
    return TileShape(256, 3, int(gelu))


@functools.cache
def _resident_clusters(kernel: Kernel, threads: int, programs: int) -> int:
    return kernel.resident_clusters(threads, programs)
