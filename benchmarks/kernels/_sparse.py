"""The one way in which sparse attention is checked and timed at the models' shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.kernels._harness import (
    InputSet,
    Session,
    Timing,
    dense_attention,
    provider,
    sqnr_db,
)
from benchmarks.results import Ceiling
from turbo_opt.kernels import dequantize_activation
from turbo_opt.kernels.sparse_rules import block_count, kept_blocks

TOPK, HEAD_DIM = 0.1, 128
BLOCK_Q, BLOCK_K = 64, 128
# A relative error of 0.03: what 8-bit P, rounded online, may differ from the reference; 0.056 where
# both results are then rounded to 8 bits. Triton's interpreter truncates to fp8, and multiplies
# float16 only.
LEAST_SQNR_DB = {"rounded": 30.0, "quantized": 25.0}
LEAST_DRY_SQNR_DB = {"rounded": 18.0, "quantized": 15.0}


def heads_of_one_product(session: Session, heads: int, tokens: int) -> tuple[torch.Tensor, ...]:
    """q, k and v, (1, L, H·128) each, parts of one product."""
    channels = heads * HEAD_DIM
    dtype = torch.float16 if session.dry else torch.bfloat16
    qkv = torch.randn(1, tokens, 3 * channels, device=session.device, dtype=dtype)
    return qkv.split(channels, dim=-1)


def projection(session: Session) -> tuple[torch.Tensor, torch.Tensor]:
    """proj_l's weight and bias."""
    weight = torch.randn(HEAD_DIM, HEAD_DIM, device=session.device) / HEAD_DIM**0.5
    return weight, torch.randn(HEAD_DIM, device=session.device)


def operations(heads: int, tokens: int) -> int:
    """Of q·kᵀ and P·v on the blocks kept, padding included."""
    queries = block_count(tokens, BLOCK_Q) * BLOCK_Q
    return 4 * queries * kept_blocks(TOPK, tokens, BLOCK_K) * BLOCK_K * HEAD_DIM * heads


def eight_bit_matmul(session: Session, pv: str = "fp8") -> Ceiling:
    """Half of the operations at the int8 library product's rate, half at that of P·v's.

    Args:
        pv: what P and v are multiplied in, `fp8` or `16bit`.
    """
    int8, fp8 = (session.library_matmul[name].value for name in ("int8-block", "fp8-block"))
    name, other = ("fp8", fp8) if pv == "fp8" else ("bf16", session.bf16_matmul.value)
    what = f"int8 and {name} library matmul 8192³, half each"
    return Ceiling(2 / (1 / int8 + 1 / other), "TOPS", what)


def bench_sparse(
    session: Session,
    name: str,
    label: str,
    make: Callable[[int, int], InputSet],
    rate: Callable[[], Ceiling],
    *,
    scheme: str | None = None,
    baselines: Mapping[str, Callable[..., object]] | None = None,
) -> None:
    """Check each provider of operator `name` against the reference, then time it whole.

    The provider that is chosen by default is recorded as `label/HEADSxTOKENS_ms`, others as
    `label/PROVIDER/…`. `make(heads, tokens)` returns the arguments, q, k and v first; `rate()` the
    rate of the products. The result is quantized by `scheme`, if one is given. `baselines` take the
    same arguments.
    """
    for heads, tokens in session.attention:
        sets = session.input_sets(lambda h=heads, t=tokens: make(h, t))  # type: ignore[misc]
        shape = f"{heads}x{tokens}"
        slower = {"sdpa_dense_bf16": session.time(dense_attention, [_heads(args) for args in sets])}
        for what, call in (baselines or {}).items():
            slower[what] = session.time(call, sets)
        floor = Ceiling(
            operations(heads, tokens) / rate().value / 1e9, "ms", f"its products at {rate().what}"
        )
        least = (LEAST_DRY_SQNR_DB if session.dry else LEAST_SQNR_DB)[
            "quantized" if scheme else "rounded"
        ]
        record_providers(
            session, name, label, shape, sets, slower, floor, least,
            {"topk": TOPK, "blocks": f"{BLOCK_Q}x{BLOCK_K}"}, scheme=scheme,
        )  # fmt: skip
        del sets
        if not session.dry:
            torch.cuda.empty_cache()


def record_providers(
    session: Session,
    name: str,
    label: str,
    shape: str,
    sets: list[InputSet],
    baseline: dict[str, Timing],
    floor: Ceiling,
    least: float,
    config: Mapping[str, Any],
    *,
    scheme: str | None = None,
) -> None:
    """Check each provider's results against the reference's, time it and record it.

    Args:
        least: SQNR in dB of the worst result.
        scheme: by which the result is quantized, if it is.
    """
    with provider(name, "reference") as call:
        expected = _values(call(*sets[0]), scheme)
    _, names = session.usable(name, sets[0])
    for each in names:
        with provider(name, each) as call:
            sqnr = _least_sqnr_db(expected, _values(call(*sets[0]), scheme))
            session.check(f"{name}/{shape}/{each}", sqnr, least)
            timing = session.time(call, sets)
        session.record_time(
            record_name(label, names, each, shape),
            timing,
            baseline,
            floor,
            quality={"sqnr_db": sqnr},
            config={"provider": each, **config},
        )


def record_name(label: str, names: list[str], each: str, shape: str) -> str:
    """The first of the names, the default provider, is not named."""
    return f"{label}/{shape}" if each == names[0] else f"{label}/{each}/{shape}"


def _values(result: Any, scheme: str | None) -> tuple[torch.Tensor, ...]:
    """What the results stand for."""
    if scheme is not None:
        return (dequantize_activation(*result, scheme),)
    return result if isinstance(result, tuple) else (result,)


def _least_sqnr_db(expected: tuple[torch.Tensor, ...], actual: tuple[torch.Tensor, ...]) -> float:
    return min(sqnr_db(*pair) for pair in zip(expected, actual, strict=True))


def _heads(args: tuple[Any, ...]) -> InputSet:
    """q, k and v as (B, H, L, D)."""
    return tuple(
        x if x.ndim == 4 else x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for x in args[:3]
    )
