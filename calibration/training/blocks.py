"""How a network's blocks run in training: what of their forward is kept, and whether compiled.

Both lie within a block's own `forward`: FSDP's hooks stay around it, and a compiler sees what is
computed again. Around a compiled block, it would not: what was to be kept of its inside could be
overwritten by what the compiler puts into the same memory.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from turbo_opt.calibration.training.compiling import compiled
from turbo_opt.calibration.training.kept_attention import compiled_contexts, eager_contexts
from turbo_opt.errors import TurboOptError


def set_up_blocks(network: nn.Module, activations: str = "keep", compile: bool = False) -> None:
    """Have a diffusers network run its blocks as a job says. Call it before it is sharded.

    Args:
        activations: `keep` everything; `selective` keeps the results of attention and computes the
            rest of a block again; `recompute` keeps a block's input only.
        compile: by torch.compile, at the first call. Blocks are alike, so one graph serves all of
            them; parameters keep their names, and sizes are taken as fixed.
    """
    again = _AGAIN.get(activations)
    for block in network.blocks:  # type: ignore[union-attr]
        if again is not None:
            block.forward_as_written = block.forward
            block.forward = types.MethodType(again, block)
        if compile:
            block.forward = compiled(block.forward)


def uncompiled() -> AbstractContextManager[Any]:
    """Within the context blocks run as they are written: held-out losses and clips have sizes of
    their own, which are not worth a graph."""
    return torch.compiler.set_stance("force_eager")


@contextlib.contextmanager
def first_compilation() -> Iterator[None]:
    """Within the context a compiler that is missing or fails is a TurboOptError."""
    try:
        yield
    except RuntimeError as error:
        from torch._dynamo.exc import TorchDynamoException

        if not isinstance(error, TorchDynamoException):
            raise
        reason = str(getattr(error, "inner_exception", error)).strip().partition("\n")[0]
        raise TurboOptError(
            f"training.compile: blocks cannot be compiled here ({reason}); set training.compile to "
            "false"
        ) from error


def _recompute(block: Any, *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return block.forward_as_written(*inputs)
    return checkpoint(block.forward_as_written, *inputs, use_reentrant=False)


def _keep_attention(block: Any, *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return block.forward_as_written(*inputs)
    contexts = compiled_contexts if torch.compiler.is_compiling() else eager_contexts
    return checkpoint(block.forward_as_written, *inputs, use_reentrant=False, context_fn=contexts)


_AGAIN = {"selective": _keep_attention, "recompute": _recompute}
