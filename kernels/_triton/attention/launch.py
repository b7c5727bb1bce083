"""Launch sparse-linear attention: prepare q, k and v, choose blocks, attend. Dense: all blocks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from ...capability import capability_of, multiprocessors
from ...sparse_rules import block_count, kept_blocks
from ..support import interpreting
from ..tuning import fastest
from .measure import finish_measures, measure_keys, measure_rms, scale_keys
from .operands import Blocks, Prepared, Projection, Rotation, check_heads_together
from .prepare import finish_state, prepare_keys, prepare_queries
from .sparse import attend

PARTS_PER_PROCESSOR = 8  # how finely a head's blocks are shared among programs


class Tile(NamedTuple):
    """How a preparing kernel runs: tokens held in registers at once, warps, pipeline stages."""

    tokens: int
    warps: int
    stages: int


MEASURE_TILE = Tile(tokens=16, warps=2, stages=1)
KEYS_TILE = Tile(tokens=16, warps=4, stages=2)
QUERIES_TILE = Tile(tokens=16, warps=4, stages=2)


class AttentionConfig(NamedTuple):
    """One way to launch the attention kernel."""

    warps: int  # for each 64 queries
    stages: int
    tma: bool
    registers: int | None = None
    queries: int | None = None  # a program's, a divisor of the query block; None: the block


CONFIGS = (
    AttentionConfig(warps=4, stages=2, tma=False),
    AttentionConfig(warps=4, stages=2, tma=True),
    AttentionConfig(warps=4, stages=2, tma=True, registers=168),  # for three programs to fit
)
# More queries read keys less often, fewer leave registers for more programs at a time.
DENSE_CONFIGS = (
    *(config._replace(queries=64) for config in CONFIGS),
    AttentionConfig(warps=4, stages=2, tma=False, queries=128),
    AttentionConfig(warps=4, stages=2, tma=True, queries=128),
    AttentionConfig(warps=4, stages=3, tma=True, queries=128),
)


def prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: Blocks,
    *,
    rotation: Rotation | None,
    projection: Projection | None,
    int8: bool,
    fp8: bool,
) -> Prepared:
    """Everything that has to be known of q, k and v (B, H, L, D) before attending.

    Without rotation and projection, k and v may have another number of tokens than q.
    """
    batch, heads, length, head_dim = q.shape
    key_length = k.shape[2]
    all_heads, device, pairs = batch * heads, q.device, head_dim // 2
    queries, keys = block_count(length, blocks.q), block_count(key_length, blocks.k)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    q_rstd, k_rstd = _measure_rms(q, k, rotation) if rotation else (None, None)
    cos, sin, table, q_weight, k_weight = _tables(rotation)
    feature_map = projection.feature_map if projection else "softmax"
    k_means = new(batch, heads, keys, head_dim)
    k_bounds = new(2, all_heads, keys, head_dim) if int8 else None
    v_amax = torch.empty_like(k_means) if fp8 else None
    measure_keys[(keys, all_heads)](
        k, v, k_rstd, k_weight, cos, sin, k_means, k_bounds, v_amax, key_length, heads,
        *_strides(k), *_strides(v), *table,
        PAIRS=pairs, BLOCK=blocks.k, TOKENS=MEASURE_TILE.tokens,
        num_warps=MEASURE_TILE.warps, num_stages=MEASURE_TILE.stages,
    )  # fmt: skip
    k_mean = k_scale = v_scale = None
    if int8 or fp8:
        k_mean, v_scale = finish_means(k_means, v_amax, key_length, blocks.k)
        k_scale = None if k_bounds is None else finish_scales(k_mean, k_bounds)
    k_int8 = new(all_heads, keys, blocks.k, head_dim, dtype=torch.int8) if int8 else None
    v_fp8 = new(all_heads, keys, head_dim, blocks.k, dtype=torch.float8_e4m3fn) if fp8 else None
    matrix = normalizer = branch = None
    if int8 or fp8 or projection:
        per_part, parts = _parts(keys, all_heads, device)
        state = new(all_heads, parts, head_dim, head_dim) if projection else None
        key_sum = new(all_heads, parts, head_dim) if projection else None
        prepare_keys[(parts, all_heads)](
            k, v, k_rstd, k_weight, cos, sin, k_mean, k_scale, v_scale, k_int8, v_fp8,
            state, key_sum, key_length, heads, keys, per_part, *_strides(k), *_strides(v), *table,
            PAIRS=pairs, BLOCK=blocks.k, TOKENS=KEYS_TILE.tokens, MAP=feature_map,
            num_warps=KEYS_TILE.warps, num_stages=KEYS_TILE.stages,
        )  # fmt: skip
        if projection:
            assert state is not None and key_sum is not None
            matrix, normalizer = finish_linear(state, key_sum, projection, length, q.dtype)
            branch = new(batch, length, heads, head_dim, dtype=q.dtype)
    q_means = new(batch, heads, queries, head_dim)
    q_int8 = new(all_heads, queries, blocks.q, head_dim, dtype=torch.int8) if int8 else None
    q_scale = new(all_heads, queries, blocks.q) if int8 else None
    per_part, parts = _parts(queries, all_heads, device)
    prepare_queries[(parts, all_heads)](
        q, q_rstd, q_weight, cos, sin, q_int8, q_scale, q_means, matrix, normalizer,
        projection.bias if projection else None, branch, length, heads, queries, per_part,
        *_strides(q), *table,
        PAIRS=pairs, BLOCK=blocks.q, TOKENS=QUERIES_TILE.tokens, MAP=feature_map,
        num_warps=QUERIES_TILE.warps, num_stages=QUERIES_TILE.stages,
    )  # fmt: skip
    return Prepared(q_int8, q_scale, k_int8, k_scale, v_fp8, v_scale, q_means, k_means, branch)


def finish_means(
    k_means: torch.Tensor, v_amax: torch.Tensor | None, length: int, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean key and v's scale, (B·H, D) each, of what is known of blocks (B, H, NK, D)."""
    batch, heads, blocks, head_dim = k_means.shape
    k_mean = torch.empty((batch * heads, head_dim), dtype=torch.float32, device=k_means.device)
    v_scale = torch.empty_like(k_mean)
    finish_measures[(batch * heads, 4)](
        k_means, v_amax, k_mean, v_scale, blocks, length,
        HEAD_DIM=head_dim, BLOCK=block, CHANNELS=head_dim // 4, ROWS=64, num_warps=4,
    )  # fmt: skip
    return k_mean, v_scale


def finish_scales(k_mean: torch.Tensor, k_bounds: torch.Tensor) -> torch.Tensor:
    """The int8 scale of each block of keys (B·H, NK), from (2, B·H, NK, D) least and largest."""
    _, all_heads, blocks, head_dim = k_bounds.shape
    k_scale = torch.empty((all_heads, blocks), dtype=torch.float32, device=k_mean.device)
    scale_keys[(triton.cdiv(blocks, 16), all_heads)](
        k_mean, k_bounds, k_scale, blocks, HEAD_DIM=head_dim, ROWS=16, num_warps=4
    )
    return k_scale


def finish_linear(
    state: torch.Tensor,
    key_sum: torch.Tensor,
    projection: Projection,
    length: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The linear branch's matrix (B·H, D, D) of `dtype` and normalizer (B·H, D) from its parts."""
    all_heads, parts, head_dim, _ = state.shape
    matrix = torch.empty((all_heads, head_dim, head_dim), dtype=dtype, device=state.device)
    normalizer = torch.empty((all_heads, head_dim), dtype=torch.float32, device=state.device)
    finish_state[(all_heads, head_dim // 16)](
        state, key_sum, projection.weight.contiguous(), matrix, normalizer, parts, length,
        HEAD_DIM=head_dim, ROWS=16, PRECISION="ieee" if interpreting() else "tf32x3", num_warps=4,
    )  # fmt: skip
    return matrix, normalizer


def _parts(blocks: int, heads: int, device: torch.device) -> tuple[int, int]:
    """How many consecutive blocks of a head a program takes, and how many programs that makes."""
    per_part = triton.cdiv(blocks * heads, PARTS_PER_PROCESSOR * multiprocessors(device))
    return per_part, triton.cdiv(blocks, per_part)


def _measure_rms(
    q: torch.Tensor, k: torch.Tensor, rotation: Rotation
) -> tuple[torch.Tensor, torch.Tensor]:
    """1 / root mean square of each token's q and k, (B, L) float32 each."""
    batch, heads, length, head_dim = q.shape
    channels = heads * head_dim
    check_heads_together(q, k)
    rstd = torch.empty((2, batch, length), dtype=torch.float32, device=q.device)
    rows = 4
    measure_rms[(triton.cdiv(length, rows), batch)](
        q, k, rstd, rotation.eps, length, q.stride(0), q.stride(2), k.stride(0), k.stride(2),
        CHANNELS=channels, WIDTH=512, ROWS=rows, num_warps=4,
    )  # fmt: skip
    return rstd[0], rstd[1]


def sparse_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    blocks: Blocks,
    *,
    rotation: Rotation | None = None,
    projection: Projection | None = None,
    int8: bool = False,
    fp8: bool = False,
    cuda: bool = False,
    o_scale: torch.Tensor | None = None,
) -> None:
    """Attend and write `o` (B, H, L, D), which may have any strides but a unit last one.

    Args:
        q, k, v: (B, H, L, 128), 16 bits, unit stride along D; before normalization and rotation if
            `rotation` is given.
        int8: multiply q and k in int8; fp8: P and v in e4m3.
        cuda: prepare and attend by the CUDA kernels; they take bfloat16 in blocks of 64 queries and
            128 keys, multiply 8-bit operands and write to memory in (B, L, H, D).
        o_scale: (B·L, H) float32 with strides (1, B·L); `o` is e4m3 then. With `cuda` only.
    """
    if q.numel() == 0:
        return
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if cuda:
        ready = prepare_on_hopper(q, k, v, rotation, projection)
    else:
        ready = prepare(
            q, k, v, blocks, rotation=rotation, projection=projection, int8=int8, fp8=fp8
        )
    keep = kept_blocks(blocks.topk, q.shape[2], blocks.k)
    lists = torch.ops.turbo_opt.block_routing.default(ready.q_means, ready.k_means, keep)
    if cuda:
        attend_on_hopper(o, lists, ready, o_scale)
    else:
        attend_prepared(q, k, v, o, lists, ready, blocks)


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    scale: float | None = None,
    *,
    fp8: bool,
) -> None:
    """Attend to all keys, q and k in int8, and write `o` as `sparse_linear_attention` does.

    Args:
        q: (B, H, L, 64 or 128), 16 bits; k, v: as q, of any number of tokens.
        scale: of q·kᵀ; None: 1/√D.
        fp8: multiply P and v in e4m3.
    """
    if q.numel() == 0:
        return
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    blocks = Blocks(1.0, 128, _dense_key_block(q.device))
    ready = prepare(q, k, v, blocks, rotation=None, projection=None, int8=True, fp8=fp8)
    attend_prepared(q, k, v, o, None, ready, blocks, scale)


def _dense_key_block(device: torch.device) -> int:
    """Keys of a tile: 128 where two in flight fit into shared memory, which is small on sm8x."""
    capability = capability_of(device)
    return 64 if capability.kind == "sm" and capability.major in (8, 12) else 128


def prepare_on_hopper(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rotation: Rotation | None,
    projection: Projection | None,
) -> Prepared:
    """As `prepare`, by the CUDA kernels, in the tiles that sparse_attention.cu reads."""
    from ..._cuda import prepare as on_hopper

    return on_hopper.prepare(q, k, v, rotation, projection)


def attend_on_hopper(
    o: torch.Tensor,
    lists: torch.Tensor,
    ready: Prepared,
    o_scale: torch.Tensor | None = None,
) -> None:
    """The CUDA attention kernel alone, on swizzled tiles."""
    from ..._cuda import sparse_attention

    tensors = (
        ready.q_int8, ready.q_scale, ready.k_int8, ready.k_scale, ready.v_fp8, ready.v_scale
    )  # fmt: skip
    sparse_attention.attend(*tensors, lists, ready.branch, o.transpose(1, 2), o_scale)  # type: ignore[arg-type]


def attend_prepared(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lists: torch.Tensor | None,
    ready: Prepared,
    blocks: Blocks,
    scale: float | None = None,
) -> None:
    """The attention kernel alone, on what `prepare` and `block_routing` gave.

    Args:
        lists: (B, H, query blocks, kept); None: every key block is kept.
        scale: of q·kᵀ; None: 1/√D.
    """
    batch, heads, length, head_dim = q.shape
    key_length = k.shape[2]
    queries, keys = block_count(length, blocks.q), block_count(key_length, blocks.k)
    keep = keys if lists is None else lists.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    int8, fp8 = ready.q_int8 is not None, ready.v_fp8 is not None
    tma_serves = int8 and fp8 and _has_tma(q.device)

    def launch(config: AttentionConfig) -> None:
        tma = config.tma and tma_serves
        block_q = config.queries or blocks.q
        attend[(queries * (blocks.q // block_q), batch * heads)](
            q, ready.q_int8, ready.q_scale,
            _tiles(ready.k_int8, tma) if int8 else k, ready.k_scale,
            _tiles(ready.v_fp8, tma) if fp8 else v, ready.v_scale,
            lists, o, ready.branch,
            length, key_length, heads, keep, math.log2(math.e) * scale,
            *_strides(q), *_strides(k), *_strides(v), *_strides(o),
            HEAD_DIM=head_dim, BLOCK_Q=block_q, BLOCK_K=blocks.k,
            FP8=fp8, TMA=tma, num_warps=config.warps * block_q // 64,
            num_stages=config.stages, maxnreg=config.registers,
        )  # fmt: skip

    name, known = ("dense", DENSE_CONFIGS) if lists is None else ("sparse", CONFIGS)
    configs = [config for config in known if tma_serves or not config.tma]
    problem = (
        f"{name} attention", q.device, q.dtype, head_dim, blocks.q, blocks.k,
        length.bit_length(), keep.bit_length(), int8, fp8, ready.branch is None,
    )  # fmt: skip
    launch(fastest(problem, configs, launch))


def _tiles(tensor: torch.Tensor | None, tma: bool) -> torch.Tensor | TensorDescriptor:
    """A tensor of contiguous tiles, as it is or behind a TMA descriptor that loads one tile."""
    assert tensor is not None
    if not tma:
        return tensor
    rows, columns = tensor.shape[-2:]
    flat = tensor.view(-1, columns)
    return TensorDescriptor.from_tensor(flat, [rows, columns])


def _has_tma(device: torch.device) -> bool:
    return interpreting() or (device.type == "cuda" and capability_of(device).at_least(9, 0))


def _strides(x_BHLD: torch.Tensor) -> tuple[int, int, int]:
    """Strides along batch, token and head."""
    return x_BHLD.stride(0), x_BHLD.stride(2), x_BHLD.stride(1)


def _tables(
    rotation: Rotation | None,
) -> tuple[
    torch.Tensor | None, torch.Tensor | None, tuple[int, int],
    torch.Tensor | None, torch.Tensor | None,
]:  # fmt: skip
    """cos, sin, their strides along tokens and pairs, the weights of q and k."""
    if rotation is None:
        return None, None, (0, 0), None, None
    cos, sin = rotation.cos, rotation.sin
    if sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, (cos.stride(1), cos.stride(3)), rotation.q_weight, rotation.k_weight
