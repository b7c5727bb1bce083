"""Numbers for the symbolic sizes of a graph, and how many bytes its values then have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

TEXT_TOKENS = 512
"""As much text as Wan is given."""


def clip_sizes(
    inputs: Sequence[Node], cells: tuple[int, int, int], text_tokens: int = TEXT_TOKENS
) -> dict[Any, int]:
    """A number for every symbol in the shapes of a denoiser's inputs, for one clip.

    Args:
        inputs: placeholders of the tensors that a caller passes.
        cells: latent frames, rows and columns, each divided by the patch size.
    """
    video = dict(enumerate((1, 0, *cells)))
    wanted = {
        "hidden_states": video,
        "control_hidden_states": video,
        "timestep": {0: 1, 1: math.prod(cells)},
    }
    found: dict[Any, int] = {}
    for node in inputs:
        value = node.meta.get("val")
        for axis, side in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if isinstance(side, torch.SymInt):
                for symbol in side.node.expr.free_symbols:
                    number = wanted.get(str(node.target), {}).get(axis, text_tokens)
                    found.setdefault(symbol, number)
    return found


def nbytes(value: Any, sizes: Mapping[Any, int]) -> int:
    """Bytes of a tensor or a tuple of tensors, as described by a node; 0 for anything else."""
    if isinstance(value, tuple | list):
        return sum(nbytes(item, sizes) for item in value)
    if not isinstance(value, Tensor):
        return 0
    return math.prod(known(side, sizes) for side in value.shape) * value.dtype.itemsize


def known(side: Any, sizes: Mapping[Any, int]) -> int:
    """A side, or another number of a graph, once the symbols in it are known."""
    return int(side.node.expr.subs(sizes)) if isinstance(side, torch.SymInt) else side
