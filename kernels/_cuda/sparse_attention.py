"""Launch sparse_attention.cu: int8 q·kᵀ and e4m3 P·v on Hopper, 64 queries to 128 keys."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..capability import Capability
from .compiler import load_kernel

BLOCK_Q, BLOCK_K, HEAD_DIM, THREADS = 64, 128, 128, 128
_Q_BYTES, _TILE_BYTES, _ALIGNMENT = BLOCK_Q * HEAD_DIM, BLOCK_K * HEAD_DIM, 1024


class Variant(NamedTuple):
    """How many programs share a multiprocessor, and how many tiles each has in flight."""

    per_processor: int
    stages: int


VARIANT = Variant(per_processor=3, stages=2)


def unsupported(capability: Capability) -> str | None:
    """Why the kernel does not run there, or None."""
    if capability.at_least(9, 0) and not capability.at_least(10, 0):
        return None
    return "its CUDA kernel is written for sm90's tensor cores"


def attend(
    q_int8: torch.Tensor,
    q_scale: torch.Tensor,
    k_int8: torch.Tensor,
    k_scale: torch.Tensor,
    v_fp8: torch.Tensor,
    v_scale: torch.Tensor,
    lists: torch.Tensor,
    branch: torch.Tensor | None,
    o_BLHD: torch.Tensor,
    o_scale: torch.Tensor | None = None,
    variant: Variant | None = None,
) -> None:
    """Attend to the listed blocks and write `o_BLHD`, (B, L, H, 128), contiguous.

    Tiles of q, k and v are laid out as sparse_attention.cu says.

    Args:
        o_BLHD: bfloat16, or e4m3 if there is `o_scale`.
        o_scale: (B·L, H) float32 with strides (1, B·L).
    """
    chosen = variant or VARIANT
    batch, length, heads, head_dim = o_BLHD.shape
    kernel = load_kernel(
        "common.cuh+hopper.cuh+sparse_attention.cu",
        "sparse_attention",
        "sm_90a",
        o_BLHD.device.index,
        (
            ("PER_PROCESSOR", chosen.per_processor),
            ("STAGES", chosen.stages),
            ("QUANTIZED", int(o_scale is not None)),
        ),
        _ALIGNMENT + _Q_BYTES + 2 * chosen.stages * _TILE_BYTES,
    )
    queries, blocks, keep = q_int8.shape[1], k_int8.shape[1], lists.shape[-1]
    kernel.launch(
        (queries, batch * heads), THREADS,
        q_int8, q_scale, k_int8, k_scale, v_fp8, v_scale, lists, branch, o_BLHD, o_scale,
        length, heads, queries, blocks, keep, math.log2(math.e) * head_dim**-0.5,
    )  # fmt: skip
