"""Blocks of a network through torch.compile, while a training takes its steps."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn


def compile_blocks(network: nn.Module) -> None:
    """Have each block's forward, and its derivative, compiled at its first call.

    Blocks are alike, so one graph serves all of them; parameters keep their names. Sizes are
    taken as fixed. Call it before the network is sharded.
    """
    for block in network.blocks:  # type: ignore[union-attr]
        block.compile(dynamic=False)  # type: ignore[operator]


def uncompiled() -> AbstractContextManager[Any]:
    """Within the context blocks run as they are written: held-out losses and clips have sizes of
    their own, which are not worth a graph."""
    return torch.compiler.set_stance("force_eager")
