"""The CUDA kernels that prepare q, k and v inside `norm_rope_sagesla`, each alone: share of copy.

As a model calls them: q and k still to be normalized and rotated, and a linear branch. What a
kernel reads is made here by its definition, in float32 by torch's own operators, so that nothing
but the kernel is checked and timed. The bytes are those that it must move, each once: tables and
weights too, and one state of the linear branch a head, though prepare_keys.cu writes one for each
of its programs. Where the kernels do not run, inputs and definitions do, and the bytes are printed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.kernels._harness import ATTENTION, Session, sqnr_db
from benchmarks.kernels._sparse import BLOCK_K, BLOCK_Q, HEAD_DIM
from turbo_opt.kernels.capability import capability_of
from turbo_opt.kernels.sparse_rules import NORMALIZER_EPS, as_heads, block_count

Results = dict[str, Tensor]
EPS = 1e-6
FEATURE_MAP = "softmax"
LEAST_SQNR_DB = 80.0  # of float32 that is measured
# Of what is rounded to 8 or 16 bits, where ties may differ, or multiplied in bfloat16.
LEAST_ROUNDED_SQNR_DB = 40.0
ROUNDED = ("turns", "k_int8", "v_fp8", "q_int8", "state", "key_sum", "branch")
# What lies at each place of a row: channels of an int8 tile (kernels/_cuda/tokens.cuh), tokens of
# v's (prepare_keys.cu).
CHANNEL_ORDER = [
    8 * chunk + 64 * half + i for chunk, half, i in product(range(8), (0, 1), range(8))
]
TOKEN_ORDER = [
    16 * step + 8 * j + 2 * t + i
    for step, t, j, i in product(range(BLOCK_K // 16), range(4), (0, 1), (0, 1))
]


class Operands(NamedTuple):
    """What the kernels read, then what they write to; shapes as in prepare.py and the .cu files."""

    q: Tensor  # (B, H, L, 128) bfloat16, as k and v
    k: Tensor
    v: Tensor
    q_weight: Tensor  # RMSNorm's, (H·128,)
    k_weight: Tensor
    cos: Tensor  # (1, L, 1, 64)
    sin: Tensor
    turns: Tensor  # (L, 64) int32: cos and sin as measure_rms packs them
    q_rstd: Tensor  # (B, L)
    k_rstd: Tensor
    k_mean: Tensor  # (B·H, 128)
    k_scale: Tensor  # (B·H, NK)
    v_scale: Tensor  # (B·H, 128)
    proj_weight: Tensor  # (128, 128)
    bias: Tensor  # (128,)
    matrix: Tensor  # (B·H, 128, 128) bfloat16
    normalizer: Tensor  # (B·H, 128)
    k_int8: Tensor  # (B·H, NK, 128, 128)
    v_fp8: Tensor  # (B·H, NK, 128, 128)
    q_int8: Tensor  # (B·H, NQ, 64, 128)
    q_scale: Tensor  # (B·H, NQ, 64)
    q_means: Tensor  # (B, H, NQ, 128)
    branch: Tensor  # (B, L, H, 128) bfloat16


@dataclass(frozen=True)
class Part:
    """One kernel.

    Attributes:
        name: of the kernel and its file in kernels/_cuda.
        reads: fields of Operands.
        defined: its results as they are meant, tiles without their layout.
        launched: its results, by one launch and nothing else on the device.
    """

    name: str
    reads: tuple[str, ...]
    defined: Callable[[Operands], Results]
    launched: Callable[[Operands], Results]

    def moved_bytes(self, operands: Operands) -> int:
        """What it must read and write, each once; on the meta device too."""
        moved = [getattr(operands, name) for name in self.reads]
        return sum(x.numel() * x.element_size() for x in [*moved, *self.defined(operands).values()])


def operands(heads: int, tokens: int, device: torch.device) -> Operands:
    """Of random heads of one product, as a model has them."""
    channels = heads * HEAD_DIM
    queries, keys = block_count(tokens, BLOCK_Q), block_count(tokens, BLOCK_K)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    qkv = torch.randn(1, tokens, 3 * channels, device=device, dtype=torch.bfloat16)
    q, k, v = (as_heads(x, HEAD_DIM) for x in qkv.split(channels, dim=-1))
    v += 2  # else the linear branch is near zero
    q_weight, k_weight = 1 + torch.randn(2, channels, device=device) / 4
    angle = torch.randn(1, tokens, 1, HEAD_DIM // 2, device=device)
    cos, sin, k_rstd = angle.cos(), angle.sin(), _rstd(k)
    turned = _turned(k, k_weight, k_rstd, cos, sin)
    mean = turned.mean(2, keepdim=True)
    state, key_sum = _state(turned, v)
    proj_weight = torch.randn(HEAD_DIM, HEAD_DIM, device=device) / HEAD_DIM**0.5
    return Operands(
        q, k, v, q_weight, k_weight, cos, sin, _packed(cos, sin), _rstd(q), k_rstd,
        k_mean=mean.flatten(0, 2),
        k_scale=_in_blocks((turned - mean).abs(), BLOCK_K).amax((-2, -1)).clamp_min(1e-8) / 127,
        v_scale=v.float().abs().amax(2).flatten(0, 1).clamp_min(1e-8) / 448,
        proj_weight=proj_weight,
        bias=torch.randn(HEAD_DIM, device=device),
        matrix=(state @ proj_weight.T * (HEAD_DIM / tokens)).bfloat16(),
        normalizer=key_sum * (HEAD_DIM / tokens),
        k_int8=new(heads, keys, BLOCK_K, HEAD_DIM, dtype=torch.int8),
        v_fp8=new(heads, keys, HEAD_DIM, BLOCK_K, dtype=torch.float8_e4m3fn),
        q_int8=new(heads, queries, BLOCK_Q, HEAD_DIM, dtype=torch.int8),
        q_scale=new(heads, queries, BLOCK_Q),
        q_means=new(1, heads, queries, HEAD_DIM),
        branch=new(1, tokens, heads, HEAD_DIM, dtype=q.dtype),
    )  # fmt: skip


def _packed(cos: Tensor, sin: Tensor) -> Tensor:
    """Both in 16 bits, as kernels/_cuda/tokens.cuh reads them."""
    low, high = ((16384 + 16383 * x).round().int() | 1 << 15 for x in (cos, sin))
    return (low | high << 16).view(-1, HEAD_DIM // 2)


def read_back(tiles: Tensor, order: list[int]) -> Tensor:
    """Tiles of 128 bytes a row in plain order.

    Chunk c of 16 bytes of row r, counted in `order`, lies at place c ^ (r % 8).
    """
    rows = torch.arange(tiles.shape[-2], device=tiles.device)[:, None]
    place = torch.arange(len(order), device=tiles.device)
    at = 16 * (place // 16 ^ rows % 8) + place % 16
    columns = torch.tensor(order, device=tiles.device)[at].expand(tiles.shape)
    codes = tiles.view(torch.uint8)
    return torch.empty_like(codes).scatter_(-1, columns, codes).view(tiles.dtype)


def _rstd(x_BHLD: Tensor) -> Tensor:
    return (x_BHLD.float().square().mean((1, 3)) + EPS).rsqrt()


def _turned(x_BHLD: Tensor, weight: Tensor, rstd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Normalized and rotated, float32."""
    x = x_BHLD.float() * weight.view(-1, 1, HEAD_DIM) * rstd[:, None, :, None]
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2)


def _in_blocks(x_BHLD: Tensor, block: int) -> Tensor:
    """(B·H, blocks, block, D), tokens that do not exist zero."""
    padded = pad(x_BHLD, (0, 0, 0, -x_BHLD.shape[2] % block))
    return padded.flatten(0, 1).unflatten(1, (-1, block))


def _of_blocks(reduce: Callable[..., Tensor], x_BHLD: Tensor, block: int) -> Tensor:
    """`reduce` over the tokens of each block that exist, (B, H, blocks, D)."""
    whole = x_BHLD.shape[2] // block
    full, rest = x_BHLD[:, :, : whole * block], x_BHLD[:, :, whole * block :]
    blocks = [reduce(full.unflatten(2, (whole, block)), dim=3)]
    if rest.shape[2]:
        blocks.append(reduce(rest, dim=2, keepdim=True))
    return torch.cat(blocks, 2)


def _state(k_BHLD: Tensor, v_BHLD: Tensor) -> tuple[Tensor, Tensor]:
    """φ(k)ᵀv (B·H, D, D) and Σφ(k) (B·H, D)."""
    features = k_BHLD.softmax(-1)
    return (features.mT @ v_BHLD.float()).flatten(0, 1), features.sum(2).flatten(0, 1)


def _defined_rms(o: Operands) -> Results:
    return {"q_rstd": _rstd(o.q), "k_rstd": _rstd(o.k), "turns": _packed(o.cos, o.sin)}


def _defined_measures(o: Operands) -> Results:
    k = _turned(o.k, o.k_weight, o.k_rstd, o.cos, o.sin)
    bounds = [_of_blocks(reduce, k, BLOCK_K).flatten(0, 1) for reduce in (torch.amin, torch.amax)]
    return {
        "k_means": _of_blocks(torch.mean, k, BLOCK_K),
        "k_bounds": torch.stack(bounds),
        "v_amax": _of_blocks(torch.amax, o.v.float().abs(), BLOCK_K),
    }


def _defined_keys(o: Operands) -> Results:
    k = _turned(o.k, o.k_weight, o.k_rstd, o.cos, o.sin)
    batch_heads = o.k.shape[:2]
    smooth = _in_blocks(k - o.k_mean.view(*batch_heads, 1, HEAD_DIM), BLOCK_K)
    v = _in_blocks(o.v / o.v_scale.view(*batch_heads, 1, HEAD_DIM), BLOCK_K)
    state, key_sum = _state(k, o.v)
    return {
        "k_int8": (smooth / o.k_scale[..., None, None]).round().to(torch.int8),
        "v_fp8": v.mT.to(torch.float8_e4m3fn),
        "state": state,
        "key_sum": key_sum,
    }


def _defined_queries(o: Operands) -> Results:
    q = _turned(o.q, o.q_weight, o.q_rstd, o.cos, o.sin)
    blocks = _in_blocks(q, BLOCK_Q)
    scale = blocks.abs().amax(-1).clamp_min(1e-8) / 127
    features = q.softmax(-1).flatten(0, 1)
    eps = NORMALIZER_EPS * HEAD_DIM / q.shape[2]
    branch = features @ o.matrix.float() / (features @ o.normalizer[..., None] + eps) + o.bias
    return {
        "q_int8": (blocks / scale[..., None]).round().to(torch.int8),
        "q_scale": scale,
        "q_means": _of_blocks(torch.mean, q, BLOCK_Q),
        "branch": branch.unflatten(0, q.shape[:2]).transpose(1, 2).to(o.q.dtype),
    }


def _launched_rms(o: Operands) -> Results:
    from turbo_opt.kernels._cuda import prepare

    results = prepare.measure_rms(o.q, o.k, o.cos, o.sin, EPS)
    return dict(zip(("q_rstd", "k_rstd", "turns"), results, strict=True))


def _launched_measures(o: Operands) -> Results:
    from turbo_opt.kernels._cuda import prepare

    tables = prepare._Tables(o.k_rstd, o.k_weight, o.turns)
    results = prepare.measure_keys(o.k, o.v, tables)
    return dict(zip(("k_means", "k_bounds", "v_amax"), results, strict=True))


def _launched_keys(o: Operands) -> Results:
    from turbo_opt.kernels._cuda import prepare
    from turbo_opt.kernels._triton.attention.operands import Projection

    tables = prepare._Tables(o.k_rstd, o.k_weight, o.turns)
    # The kernel alone, without Triton's that sums the states of its programs.
    with patch.object(prepare, "finish_linear", lambda state, key_sum, *_: (state, key_sum)):
        parts = prepare.prepare_keys(
            o.k, o.v, tables, o.k_mean, o.k_scale, o.v_scale, o.k_int8, o.v_fp8,
            Projection(o.proj_weight, o.bias, FEATURE_MAP),
        )  # fmt: skip
    assert parts is not None
    return {"k_int8": o.k_int8, "v_fp8": o.v_fp8, "state": parts[0], "key_sum": parts[1]}


def _launched_queries(o: Operands) -> Results:
    from turbo_opt.kernels._cuda import prepare
    from turbo_opt.kernels._triton.attention.operands import Projection

    tables = prepare._Tables(o.q_rstd, o.q_weight, o.turns)
    prepare.prepare_queries(
        o.q, tables, prepare._Linear(o.matrix, o.normalizer),
        Projection(o.proj_weight, o.bias, FEATURE_MAP), o.q_int8, o.q_scale, o.q_means, o.branch,
    )  # fmt: skip
    return {"q_int8": o.q_int8, "q_scale": o.q_scale, "q_means": o.q_means, "branch": o.branch}


PARTS = (
    Part("measure_rms", ("q", "k", "cos", "sin"), _defined_rms, _launched_rms),
    Part(
        "measure_keys", ("k", "v", "k_rstd", "k_weight", "turns"),
        _defined_measures, _launched_measures,
    ),
    Part(
        "prepare_keys",
        ("k", "v", "k_rstd", "k_weight", "turns", "k_mean", "k_scale", "v_scale"),
        _defined_keys, _launched_keys,
    ),
    Part(
        "prepare_queries",
        ("q", "q_rstd", "q_weight", "turns", "matrix", "normalizer", "bias"),
        _defined_queries, _launched_queries,
    ),
)  # fmt: skip
"""In the order in which they run."""


def bench(session: Session) -> None:
    if capability_of(session.device)[:2] != ("sm", 9):
        _without_kernels(session)
        return
    for heads, tokens in session.attention:
        made = session.input_sets(lambda h=heads, t=tokens: operands(h, t, session.device))  # type: ignore[misc]
        sets = [Operands(*each) for each in made]
        for part in PARTS:
            _bench_part(session, part, sets, f"{part.name}/{tokens}x{heads * HEAD_DIM}")
        del made, sets
        torch.cuda.empty_cache()


def _without_kernels(session: Session) -> None:
    """What is possible where they do not run: their inputs, definitions and bytes."""
    names = ", ".join(part.name for part in PARTS)
    print(f"left out, as they are written for sm90 and this is {session.device}: {names}")
    for heads, tokens in session.attention:
        made = operands(heads, tokens, session.device)
        for part in PARTS:
            part.defined(made)
    for heads, tokens in ATTENTION:
        made = operands(heads, tokens, torch.device("meta"))
        for part in PARTS:
            megabytes = part.moved_bytes(made) / 1e6
            print(f"{part.name}/{tokens}x{heads * HEAD_DIM} would move {megabytes:,.1f} MB")


def _bench_part(session: Session, part: Part, sets: list[Operands], label: str) -> None:
    quality = compared(part.defined(sets[0]), part.launched(sets[0]), sets[0].bias)
    for name, sqnr in quality.items():
        least = LEAST_ROUNDED_SQNR_DB if name in ROUNDED else LEAST_SQNR_DB
        session.check(f"{label}/{name}", sqnr, least)
    _, _, tokens, _ = sets[0].q.shape
    timing = session.time(lambda *each: part.launched(Operands(*each)), sets)
    eager = session.time(lambda *each: part.defined(Operands(*each)), sets)
    moved = part.moved_bytes(sets[0])
    session.record_bandwidth(
        label,
        timing,
        moved,
        {"torch_eager": eager},
        quality={f"sqnr_db_{name}": sqnr for name, sqnr in quality.items()},
        config={
            "provider": "cuda",
            "tokens": tokens,
            "channels": sets[0].q_weight.numel(),
            "ms": timing.ms,
            "moved_bytes": moved,
        },
    )


def compared(defined: Results, launched: Results, bias: Tensor) -> dict[str, float]:
    """SQNR in dB of each result of a kernel."""
    return {
        name: sqnr_db(_plain(name, defined[name], bias), _plain(name, _read(name, result), bias))
        for name, result in launched.items()
    }


def _read(name: str, result: Tensor) -> Tensor:
    """A kernel's result without its layout: tiles in plain order, what programs wrote summed."""
    if name in ("q_int8", "k_int8"):
        return read_back(result, CHANNEL_ORDER)
    if name == "v_fp8":
        return read_back(result, TOKEN_ORDER)
    return result.sum(1) if name in ("state", "key_sum") else result


def _plain(name: str, result: Tensor, bias: Tensor) -> Tensor:
    """Without the bias, beside which an error would look small; cosines and sines as numbers."""
    if name == "turns":
        halves = torch.stack((result & 0xFFFF, result >> 16 & 0xFFFF)) - (1 << 15)
        return (halves - 16384) / 16383
    return result.float() - bias if name == "branch" else result
