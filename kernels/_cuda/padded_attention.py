"""Launch padded_attention.cu: many queries to the few keys of a padded prompt, on Hopper."""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import torch

from ..capability import Capability, multiprocessors
from .compiler import load_kernel

HEAD_DIM, KEYS, ROWS = 128, 64, 64
"""Channels of a head; keys of a tile; queries of a warpgroup."""
TILE_BYTES = 2 * KEYS * HEAD_DIM * 2
_ALIGNMENT, _CHUNK = 1024, 8
_ARRANGING_THREADS = 256
_SOURCE = "common.cuh+hopper.cuh+padded_attention.cu"


class Variant(NamedTuple):
    """Warpgroups that multiply, and tiles that a program holds; see padded_attention.cu."""

    consumers: int
    stages: int

    @property
    def shared_bytes(self) -> int:
        return _ALIGNMENT + self.stages * TILE_BYTES

    @property
    def threads(self) -> int:
        return 128 * (self.consumers + 1)


VARIANT = Variant(consumers=3, stages=7)


class Strides(ctypes.Structure):
    """In elements, of (B, H, L, D) whose channels are contiguous."""

    _fields_ = (
        ("batch", ctypes.c_longlong),
        ("head", ctypes.c_longlong),
        ("token", ctypes.c_longlong),
    )


def unsupported(capability: Capability, head_dim: int, dtype: torch.dtype) -> str | None:
    """Why the kernel does not run there, or None."""
    if head_dim != HEAD_DIM:
        return f"its CUDA kernel has heads of {HEAD_DIM} channels, not {head_dim}"
    if dtype is not torch.bfloat16:
        return f"its CUDA kernel takes bfloat16, not {dtype}"
    if capability.at_least(9, 0) and not capability.at_least(10, 0):
        return None
    return "its CUDA kernel is written for sm90's tensor cores"


def attend_to_padded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    scale: float | None,
    o: torch.Tensor,
    o_scale: torch.Tensor | None = None,
    variant: Variant = VARIANT,
) -> None:
    """Write `padded_attention` into `o`.

    Args:
        q, k, v, start, scale: as `turbo_opt.kernels.padded_attention` takes them, in bfloat16.
        o: (B, H, L, 128) bfloat16, or e4m3 where `o_scale` is given; rows begin on 16 bytes.
        o_scale: (B·L, H) float32 with strides (1, B·L).
    """
    if q.numel() == 0:
        return
    q, k, v, start = on_whole_chunks(q), on_whole_chunks(k), on_whole_chunks(v), start.contiguous()
    batch, heads, length, head_dim = q.shape
    keys = k.shape[2]
    tiles = -(-keys // KEYS)
    arranged = torch.empty((batch * heads, tiles, TILE_BYTES), dtype=torch.uint8, device=q.device)
    defines = {
        "QUANTIZED": int(o_scale is not None),
        **{name.upper(): value for name, value in variant._asdict().items()},
    }
    arrange, attend = (
        load_kernel(_SOURCE, name, "sm_90a", q.device.index, tuple(defines.items()), shared_bytes)
        for name, shared_bytes in (("arrange_tiles", 0), ("attend_padded", variant.shared_bytes))
    )
    arrange.launch(
        (tiles, batch * heads), _ARRANGING_THREADS,
        k, strides_of(k), v, strides_of(v), start, arranged, keys, heads,
    )  # fmt: skip
    groups = batch * heads * -(-length // (variant.consumers * ROWS))
    scale = head_dim**-0.5 if scale is None else scale
    attend.launch(
        (min(groups, multiprocessors(q.device)),), variant.threads,
        q, strides_of(q), arranged, start, o, strides_of(o), o_scale,
        length, keys, tiles, heads, batch, math.log2(math.e) * scale,
    )  # fmt: skip


def strides_of(x: torch.Tensor) -> Strides:
    """Of a tensor (B, H, L, D)."""
    return Strides(*x.stride()[:3])


def on_whole_chunks(x: torch.Tensor) -> torch.Tensor:
    """`x` (B, H, L, D) of 16 bits where each of its rows begins on 16 bytes, else a copy of it."""
    strides = [s for s, n in zip(x.stride()[:3], x.shape, strict=False) if n > 1]
    whole = x.data_ptr() % 16 == 0 and not any(stride % _CHUNK for stride in strides)
    return x if whole and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)
