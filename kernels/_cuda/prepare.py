"""Launch measure_*.cu and prepare_*.cu: what sparse-linear attention needs of q, k, v, on Hopper.

The small kernels between them, which sum over blocks or parts, are Triton's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._triton.attention.launch import finish_linear, finish_means, finish_scales
from .._triton.attention.operands import Prepared, Projection, Rotation, check_heads_together
from ..capability import multiprocessors
from ..sparse_rules import FEATURE_MAPS, NORMALIZER_EPS, block_count
from .compiler import Kernel, Long, load_kernel
from .sparse_attention import BLOCK_K, BLOCK_Q, HEAD_DIM

_ALIGNMENT = 1024  # of tiles in shared memory
_MEASURING_WARPS = 4  # of a program of measure_keys, a head each
_RMS_WARPS = 8  # of a program of measure_rms, a row each
# Of prepare_keys and prepare_queries: warpgroups that prepare tokens, beside the one that
# multiplies; how many tokens of a lane are on their way; registers of a thread.
_PRODUCERS, _ROWS_AHEAD = 3, 2
_PIPELINE = {
    "PRODUCERS": _PRODUCERS,
    "ROWS_AHEAD": _ROWS_AHEAD,
    "PRODUCER_REGISTERS": 112,
    "CONSUMER_REGISTERS": 168,
}
_THREADS = 128 * (_PRODUCERS + 1)
_KEY_SLOTS = 4  # what they exchange through: φ of 64 tokens, with k's also v
_QUERY_SLOTS = 6


def prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rotation: Rotation | None,
    projection: Projection | None,
) -> Prepared:
    """Everything that sparse_attention.cu has to know of q, k and v (B, H, L, 128) bfloat16.

    Block means have channels in their own order, int8 tiles in that of tokens.cuh.

    Raises:
        ValueError: with `rotation`, the heads of a token do not lie together.
    """
    batch, heads, length, _ = q.shape
    queries, keys = block_count(length, BLOCK_Q), block_count(length, BLOCK_K)
    all_heads = batch * heads

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    q, k, v = (_aligned(x) for x in (q, k, v))
    q_tables = k_tables = _Tables(None, None, None)
    if rotation is not None:
        cos, sin = (_on_16_bytes(table.contiguous()) for table in (rotation.cos, rotation.sin))
        q_rstd, k_rstd, turns = measure_rms(q, k, cos, sin, rotation.eps)
        q_tables = _Tables(q_rstd, rotation.q_weight, turns)
        k_tables = _Tables(k_rstd, rotation.k_weight, turns)
    k_means, k_bounds, v_amax = measure_keys(k, v, k_tables)
    k_mean, v_scale = finish_means(k_means, v_amax, length, BLOCK_K)
    k_scale = finish_scales(k_mean, k_bounds)
    k_int8 = new(all_heads, keys, BLOCK_K, HEAD_DIM, dtype=torch.int8)
    v_fp8 = new(all_heads, keys, HEAD_DIM, BLOCK_K, dtype=torch.float8_e4m3fn)
    linear = prepare_keys(k, v, k_tables, k_mean, k_scale, v_scale, k_int8, v_fp8, projection)
    q_int8 = new(all_heads, queries, BLOCK_Q, HEAD_DIM, dtype=torch.int8)
    q_scale = new(all_heads, queries, BLOCK_Q)
    q_means = new(batch, heads, queries, HEAD_DIM)
    branch = new(batch, length, heads, HEAD_DIM, dtype=q.dtype) if projection else None
    prepare_queries(q, q_tables, linear, projection, q_int8, q_scale, q_means, branch)
    return Prepared(q_int8, q_scale, k_int8, k_scale, v_fp8, v_scale, q_means, k_means, branch)


class _Tables(NamedTuple):
    """What normalizes and rotates q or k; all None if that has been done."""

    rstd: torch.Tensor | None  # (B, L)
    weight: torch.Tensor | None  # (H·128,)
    turns: torch.Tensor | None  # (L, 64) int32, as measure_rms packs cos and sin

    def defines(self) -> dict[str, int]:
        codes = {torch.float32: 1, torch.bfloat16: 2}
        weight = 0 if self.weight is None else codes[self.weight.dtype]
        return {"ROTATION": int(self.turns is not None), "WEIGHT": weight}

    def arguments(self) -> tuple[torch.Tensor | None, ...]:
        weight = None if self.weight is None else _on_16_bytes(self.weight.contiguous())
        return self.rstd, weight, self.turns

    def ring_bytes(self) -> int:
        """Shared memory for what is on its way to prepare_keys or prepare_queries (tokens.cuh)."""
        turns = 0 if self.turns is None else 2 * 512
        norms, alignment = 2 * 64, 128
        return alignment + 4 * _PRODUCERS * (_ROWS_AHEAD * (2 * 512 + turns) + norms)


def measure_rms(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What normalizes and rotates q and k.

    Returns:
        1 / root mean square over all heads of each token of q and of k, (B, L) float32 each, and
        `cos` and `sin` (1, L, 1, 64), within −1 … 1, in steps of 1/16383 as tokens.cuh reads them,
        (L, 64) int32: half of the bytes, as every head reads them again.

    Raises:
        ValueError: the heads of a token do not lie together.
    """
    check_heads_together(q, k)
    batch, heads, length, _ = q.shape
    rstd = torch.empty((2, batch, length), dtype=torch.float32, device=q.device)
    turns = torch.empty((length, HEAD_DIM // 2), dtype=torch.int32, device=q.device)
    kernel = load_kernel(
        "common.cuh+measure_rms.cu", "measure_rms", "sm_90a", q.device.index,
        (("CHANNELS", heads * HEAD_DIM),),
    )  # fmt: skip
    kernel.launch(
        (-(-2 * batch * length // _RMS_WARPS),), 32 * _RMS_WARPS,
        q, k, cos, sin, rstd, turns, eps, batch, length,
        Long(q.stride(0)), Long(q.stride(2)), Long(k.stride(0)), Long(k.stride(2)),
    )  # fmt: skip
    return rstd[0], rstd[1], turns


def measure_keys(
    k: torch.Tensor, v: torch.Tensor, tables: _Tables
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each block: the mean key (B, H, NK, D), its bounds (2, B·H, NK, D), v's amax."""
    batch, heads, length, _ = k.shape
    blocks, all_heads = block_count(length, BLOCK_K), batch * heads
    k_means = torch.empty((batch, heads, blocks, HEAD_DIM), dtype=torch.float32, device=k.device)
    k_bounds = torch.empty((2, all_heads, *k_means.shape[2:]), dtype=torch.float32, device=k.device)
    v_amax = torch.empty_like(k_means)
    _load("measure_keys", k, {**tables.defines(), "MAP": 0}).launch(
        (-(-all_heads // _MEASURING_WARPS), blocks), 32 * _MEASURING_WARPS,
        k, v, *tables.arguments(), k_means, k_bounds, v_amax,
        length, heads, all_heads, *_strides(k), *_strides(v),
    )  # fmt: skip
    return k_means, k_bounds, v_amax


class _Linear(NamedTuple):
    """The linear branch's state after the projection."""

    matrix: torch.Tensor  # (B·H, 128, 128) bfloat16
    normalizer: torch.Tensor  # (B·H, 128)


def prepare_keys(
    k: torch.Tensor,
    v: torch.Tensor,
    tables: _Tables,
    k_mean: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    k_int8: torch.Tensor,
    v_fp8: torch.Tensor,
    projection: Projection | None,
) -> _Linear | None:
    """Write `k_int8` and `v_fp8`; return the linear branch's state if there is a projection."""
    all_heads, blocks = k_scale.shape
    heads, length = k.shape[1:3]
    per_part, parts = _parts(blocks, all_heads, multiprocessors(k.device))
    state = key_sum = None
    if projection:
        state = k_mean.new_empty((all_heads, parts, HEAD_DIM, HEAD_DIM))
        key_sum = k_mean.new_empty((all_heads, parts, HEAD_DIM))
    defines = {**_PIPELINE, "SLOTS": _KEY_SLOTS}
    tiles = _KEY_SLOTS * 2 * 64 * 2 * HEAD_DIM + 2 * BLOCK_K * HEAD_DIM
    small = 512 + 4 * HEAD_DIM + 16 * _KEY_SLOTS + 4 * _PRODUCERS * 8
    shared_bytes = _ALIGNMENT + tiles + small + tables.ring_bytes()
    _load(
        "prepare_keys", k, {**tables.defines(), **_branch(projection), **defines}, shared_bytes
    ).launch(
        (all_heads, parts), _THREADS,
        k, v, *tables.arguments(), k_mean, k_scale, v_scale, k_int8, v_fp8, state, key_sum,
        length, heads, blocks, per_part, *_strides(k), *_strides(v),
    )  # fmt: skip
    if projection is None:
        return None
    assert state is not None and key_sum is not None
    return _Linear(*finish_linear(state, key_sum, projection, length, k.dtype))


def prepare_queries(
    q: torch.Tensor,
    tables: _Tables,
    linear: _Linear | None,
    projection: Projection | None,
    q_int8: torch.Tensor,
    q_scale: torch.Tensor,
    q_means: torch.Tensor,
    branch: torch.Tensor | None,
) -> None:
    """Write the tiles, their scales, the block means and, with a projection, `branch`."""
    heads, length = q.shape[1:3]
    all_heads, blocks = q_scale.shape[:2]
    programs = multiprocessors(q.device)
    per_part, parts = _parts(blocks, all_heads, programs, between=0.25)
    tasks = all_heads * parts
    defines = {**_PIPELINE, "SLOTS": _QUERY_SLOTS}
    matrix = 2 * (HEAD_DIM + 8) * 128 if linear else 0
    features = _QUERY_SLOTS * BLOCK_Q * HEAD_DIM * 2 if linear else 0
    small = _QUERY_SLOTS * (4 * HEAD_DIM * 4 + 16)
    shared_bytes = _ALIGNMENT + matrix + features + small + tables.ring_bytes()
    bias = None
    if projection is not None and projection.bias is not None:
        bias = _on_16_bytes(projection.bias.float().contiguous())
    _load(
        "prepare_queries", q, {**tables.defines(), **_branch(projection), **defines}, shared_bytes
    ).launch(
        (min(tasks, programs),), _THREADS,
        q, *tables.arguments(), *(linear or (None, None)), bias, q_int8, q_scale, q_means, branch,
        NORMALIZER_EPS * HEAD_DIM / length, length, heads, all_heads, blocks, per_part, tasks,
        *_strides(q),
    )  # fmt: skip


def _branch(projection: Projection | None) -> dict[str, int]:
    """Macros of the linear branch."""
    feature_map = FEATURE_MAPS.index(projection.feature_map) if projection else 0
    return {"LINEAR": int(projection is not None), "MAP": feature_map}


def _load(name: str, x: torch.Tensor, defines: dict[str, int], shared_bytes: int = 0) -> Kernel:
    return load_kernel(
        f"common.cuh+hopper.cuh+tokens.cuh+{name}.cu", name, "sm_90a", x.device.index,
        tuple(defines.items()), shared_bytes,
    )  # fmt: skip


def _parts(blocks: int, heads: int, programs: int, between: float = 3.0) -> tuple[int, int]:
    """How many consecutive blocks of a head are taken together, and how many parts that makes.

    `programs` run at a time; from one part to the next takes about as long as `between` blocks:
    three to end a program and to start another, little for one that goes on.
    """

    def cost(parts: int) -> float:
        return -(-heads * parts // programs) * (-(-blocks // parts) + between)

    best = min(range(1, min(blocks, 4 * programs) + 1), key=cost)
    per_part = -(-blocks // best)
    return per_part, -(-blocks // per_part)


def _aligned(x_BHLD: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it in (B, L, H, D), with channels together and each head on 16 bytes."""
    strides = zip(x_BHLD.stride()[:2], x_BHLD.shape[:2], strict=True)
    # Copies of tokens behind the last one have an address, though no bytes.
    stepped = [x_BHLD.stride(2), *(stride for stride, size in strides if size > 1)]
    fits = x_BHLD.stride(3) == 1 and not any(stride % 8 for stride in stepped)
    if fits and x_BHLD.data_ptr() % 16 == 0:
        return x_BHLD
    x_BLHD = x_BHLD.transpose(1, 2)
    return x_BLHD.clone(memory_format=torch.contiguous_format).transpose(1, 2)


def _on_16_bytes(x: torch.Tensor) -> torch.Tensor:
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _strides(x_BHLD: torch.Tensor) -> tuple[Long, Long, Long]:
    """Strides along batch, token and head."""
    return Long(x_BHLD.stride(0)), Long(x_BHLD.stride(2)), Long(x_BHLD.stride(1))
