"""Which clip sizes a compiled model takes, checked before any work."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from turbo_opt.errors import BadInput
from turbo_opt.ir.edit import user_inputs

_ROPE_LENGTH = 1024


@dataclass(frozen=True)
class LatentLimits:
    """Largest latent sides: frames, height, width."""

    frames: int
    height: int
    width: int

    @classmethod
    def smallest(cls, limits: Sequence[LatentLimits]) -> LatentLimits:
        """What all of several networks take."""
        return cls(
            min(limit.frames for limit in limits),
            min(limit.height for limit in limits),
            min(limit.width for limit in limits),
        )


@dataclass(frozen=True)
class Granularity:
    """How pixels map to latents and patches.

    Attributes:
        spatial: pixels per latent side.
        temporal: frames per latent frame, after the first.
        patch: latents per patch: frames, height, width.
    """

    spatial: int
    temporal: int
    patch: tuple[int, int, int]

    @classmethod
    def of(cls, vae_folder: Path, config: Mapping[str, Any]) -> Granularity:
        """From the VAE's `config.json` and the transformer's config."""
        path = vae_folder / "config.json"
        try:
            vae = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadInput(f"{path}: cannot be read ({error})") from None
        frames, height, width = config["patch_size"]
        spatial, temporal = vae.get("scale_factor_spatial", 8), vae.get("scale_factor_temporal", 4)
        return cls(spatial, temporal, (frames, height, width))


def latent_limits(exported: ExportedProgram, config: Mapping[str, Any]) -> LatentLimits:
    """The largest latents that a graph was captured for and its rotary table reaches."""
    nodes = {str(node.target): node.meta["val"] for node in user_inputs(exported)}
    sides = [
        side.node.expr if isinstance(side, torch.SymInt) else side
        for side in nodes["hidden_states"].shape[2:]
    ]
    bounds = {
        str(size): int(bound.upper)
        for size, bound in exported.range_constraints.items()
        if bound.upper.is_Integer
    }
    return limits_of_sides(sides, bounds, config)


def limits_of_sides(
    sides: Sequence[Any], bounds: Mapping[str, int], config: Mapping[str, Any]
) -> LatentLimits:
    """The largest latents.

    Args:
        sides: frames, height and width of the latents of a graph, as numbers or sympy expressions.
        bounds: expression, as text → its largest value, where it has one.
        config: of the transformer.
    """
    rope = config.get("rope_max_seq_len", _ROPE_LENGTH)
    largest = []
    for side, patch in zip(sides, config["patch_size"], strict=True):
        captured = _upper(side, bounds)
        largest.append(min(rope * patch, captured or rope * patch))
    return LatentLimits(*largest)


def check_size(
    height: int, width: int, num_frames: int, grain: Granularity, limits: LatentLimits
) -> None:
    """The clip size is one that the model takes.

    Raises:
        BadInput: it is not; the message names the value and the nearest legal ones.
    """
    for name, value, patch, limit in (
        ("height", height, grain.patch[1], limits.height),
        ("width", width, grain.patch[2], limits.width),
    ):
        step = grain.spatial * patch
        _check(name, value, "a multiple of", 0, step, limit * grain.spatial // step * step)
    frame_patch = grain.patch[0]
    most = (limits.frames // frame_patch * frame_patch - 1) * grain.temporal + 1
    first = (frame_patch - 1) * grain.temporal + 1
    step = grain.temporal * frame_patch
    if num_frames < first or (num_frames - first) % step or num_frames > most:
        raise BadInput(
            f"num_frames = {num_frames}: must be {step}·n + {first} and at most {most}; "
            f"nearest: {_nearest(num_frames, first, step, most)}"
        )


def _check(name: str, value: int, rule: str, first: int, step: int, most: int) -> None:
    if value <= 0 or value % step or value > most:
        raise BadInput(
            f"{name} = {value}: must be {rule} {step} and at most {most}; "
            f"nearest: {_nearest(value, first or step, step, most)}"
        )


def _nearest(value: int, first: int, step: int, most: int) -> str:
    below = min(max(first + (value - first) // step * step, first), most)
    above = min(below + step, most)
    return str(below) if above == below or value < first else f"{below} or {above}"


def _upper(side: Any, bounds: Mapping[str, int]) -> int | None:
    if isinstance(side, int):
        return side
    if str(side) in bounds:
        return bounds[str(side)]
    known = {symbol: bounds[str(symbol)] for symbol in side.free_symbols if str(symbol) in bounds}
    return int(side.subs(known)) if len(known) == len(side.free_symbols) else None
