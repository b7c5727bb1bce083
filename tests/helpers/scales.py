"""Files of scales with made-up numbers, for a captured program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turbo_opt.compiler.blocks import BlockIndex
from turbo_opt.compiler.scales import Scales, architecture_of, write_scales
from turbo_opt.ir.program import Denoiser, Program

TOPK = (0.25, 0.5, 1.0)
GOOD = 50.0
"""dB of every layer that a test says nothing else of."""


def scales_data(
    program: Program,
    prediction: Mapping[str, Mapping[str, float]] | None = None,
    output: Mapping[str, Mapping[str, float]] | None = None,
    attention: Mapping[str, tuple[float, ...]] | None = None,
    balance: tuple[Mapping[str, Any], ...] = (),
    blocks: tuple[int, int] = (128, 64),
    together: tuple[Mapping[str, Any], ...] = (),
) -> dict[str, Any]:
    """The content of a file.

    Args:
        prediction, output: layer → scheme → dB, where it is not `GOOD`.
        attention: self-attention → error of the prediction at each of `TOPK`.
    """
    return {
        "format": 1,
        "source": "random",
        "clips": 1,
        "held_out": 1,
        "denoisers": {
            denoiser.name: {
                **_network(denoiser, prediction or {}, output or {}, attention or {}),
                "block_q": blocks[0],
                "block_k": blocks[1],
                "together": [dict(tried) for tried in together],
                "balance": [dict(group) for group in balance],
            }
            for denoiser in program
        },
    }


def write_scales_of(program: Program, path: Path, **numbers: Any) -> Path:
    """A file of them."""
    write_scales(Scales.model_validate(scales_data(program, **numbers)), path)
    return path


def _network(
    denoiser: Denoiser,
    prediction: Mapping[str, Mapping[str, float]],
    output: Mapping[str, Mapping[str, float]],
    attention: Mapping[str, tuple[float, ...]],
) -> dict[str, Any]:
    inside = BlockIndex(denoiser)
    layers = {
        name.removesuffix(".weight"): list(tensor.shape)
        for name, tensor in denoiser.weights.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and inside.contains(name)
    }
    good = {"int8-block": GOOD, "fp8-block": GOOD}
    ones = {"amax": [1.0], "rms": [1.0], "outliers": [0.0], "kurtosis": [3.0]}
    return {
        "architecture": architecture_of(denoiser.model_class, denoiser.config),
        "noise_levels": [0.5],
        "topk": list(TOPK),
        "linear": {
            name: {
                "shape": shape,
                "input": ones,
                "sqnr": {key: [db] for key, db in {**good, **output.get(name, {})}.items()},
                "prediction_sqnr": {**good, **prediction.get(name, {})},
            }
            for name, shape in layers.items()
        },
        "attention": {
            name: {"errors": [[error] for error in errors], "prediction_errors": list(errors)}
            for name, errors in attention.items()
        },
    }
