"""Checkpointing of a block that keeps the results of its attention: which they are, and how.

PyTorch's selective checkpointing asks a policy of every operator, in Python, in both runs of a
block. In a compiled block that happens while it is traced; in a block as written it is most of the
time that the host takes for it. There, operators are watched only within calls of attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import turbo_opt.kernels  # noqa: F401  (registers turbo_opt::*)

_ATEN, _OURS = torch.ops.aten, torch.ops.turbo_opt
_CHOSEN = {
    _OURS.block_routing.default,  # or rounding might choose other blocks backward
    _OURS.block_sparse_attention.default,
    _OURS.sage_sparse_attention.default,
}
_CALLS = {torch.nn.functional.scaled_dot_product_attention, *_CHOSEN}
"""Calls within which the operators below run."""
_KEPT = _CHOSEN | {
    getattr(_ATEN, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
}
"""Attention, and its choice of blocks: most of a block's operations, little of its memory."""


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


compiled_contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
"""`context_fn` of `torch.utils.checkpoint.checkpoint` for a block that is being compiled."""


def eager_contexts() -> tuple[TorchFunctionMode, TorchFunctionMode]:
    """`context_fn` for a block that runs as written: its forward's context, its second run's.

    Nothing may write over what attention gave.
    """
    results: list[Any] = []
    first, second = (functools.partial(mode, results) for mode in (_Keep, _GiveBack))
    return _AroundAttention(first), _AroundAttention(second)


class _AroundAttention(TorchFunctionMode):
    """Has a dispatch mode, made anew with every entry, see the operators of attention alone."""

    def __init__(self, make_mode: Callable[[], TorchDispatchMode]) -> None:
        super().__init__()
        self._make_mode = make_mode

    def __enter__(self) -> Any:
        self._mode = self._make_mode()
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _CALLS:
            return func(*args, **(kwargs or {}))
        with self._mode:
            return func(*args, **(kwargs or {}))


class _Keep(TorchDispatchMode):
    """Notes the results of operators to keep, in order. They are aliases, which autograd's record
    of the results does not hold."""

    def __init__(self, results: list[Any]) -> None:
        super().__init__()
        self._results = results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _KEPT:
            self._results.append(tree_map_only(Tensor, Tensor.detach, result))
        return result


class _GiveBack(TorchDispatchMode):
    """Gives the noted results in place of computing them, to every second run from the first."""

    def __init__(self, results: list[Any]) -> None:
        super().__init__()
        self._noted = iter(results)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _KEPT:
            return tree_map_only(Tensor, Tensor.detach, next(self._noted))
        return func(*args, **(kwargs or {}))
