"""The one way in which every memory-bound operator is checked and timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.kernels._harness import InputSet, Session, provider, sqnr_db
from turbo_opt.kernels import dequantize_activation

# After bfloat16 rounding of both sides; after quantization of both, which differ at ties only.
LEAST_SQNR_DB = {"rounded": 44.0, "quantized": 40.0}


def bench_rows(
    session: Session,
    name: str,
    make: Callable[[int, int], InputSet],
    baselines: Mapping[str, Callable[..., object]],
    shapes: list[tuple[int, int]] | None = None,
    scheme: str | None = None,
) -> None:
    """Check each provider of operator `name` against the reference, then time it.

    `make(tokens, channels)` returns the operator's arguments, x first. `baselines` take the same.
    """
    for tokens, channels in shapes or session.rows:
        sets = session.input_sets(lambda t=tokens, c=channels: make(t, c))  # type: ignore[misc]
        label = "/".join([name, *([scheme] if scheme else []), f"{tokens}x{channels}"])
        _, names = session.usable(name, sets[0])
        quality = {each: _quality(name, each, sets[0], scheme) for each in names}
        least = LEAST_SQNR_DB["quantized" if scheme else "rounded"]
        for each, sqnr in quality.items():
            # Triton's interpreter does not round to fp8 as a GPU does.
            session.check(f"{label}/{each}", sqnr, 10.0 if session.dry and scheme else least)
        slower = {what: session.time(call, sets) for what, call in baselines.items()}
        for each in names:
            with provider(name, each) as call:
                timing = session.time(call, sets)
                moved = _bytes(sets[0]) + _bytes(call(*sets[0]))
            session.record_bandwidth(
                f"{label}/{each}",
                timing,
                moved,
                slower,
                quality={"sqnr_db": quality[each]},
                config={"provider": each, "tokens": tokens, "channels": channels, "ms": timing.ms},
            )
        del sets
        if not session.dry:
            torch.cuda.empty_cache()


def _quality(name: str, each: str, args: InputSet, scheme: str | None) -> float:
    with provider(name, "reference") as call:
        expected = call(*args)
    with provider(name, each) as call:
        actual = call(*args)
    if scheme is None:
        return sqnr_db(expected, actual)
    (*streams, q, scale), (*expected_streams, expected_q, expected_scale) = actual, expected
    qualities = [sqnr_db(*pair) for pair in zip(expected_streams, streams, strict=True)]
    quantized = sqnr_db(
        dequantize_activation(expected_q, expected_scale, scheme),
        dequantize_activation(q, scale, scheme),
    )
    return min(*qualities, quantized) if qualities else quantized


def _bytes(tensors: Any) -> int:
    """Bytes of a tensor, or of all tensors in a tuple: each is moved once."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(each) for each in tensors if isinstance(each, torch.Tensor))
