"""What of a block's forward is kept for backward."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import turbo_opt.kernels  # noqa: F401  (registers turbo_opt::*)

_ATEN = torch.ops.aten
_KEPT = {
    torch.ops.turbo_opt.block_sparse_attention.default,
    torch.ops.turbo_opt.sage_sparse_attention.default,
    *(
        getattr(_ATEN, name).default
        for name in (
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
        )
    ),
}
"""Attention: most of a block's operations, little of its memory."""


def save_activations(network: nn.Module, what: str) -> None:
    """Have a diffusers network keep what `training.activations` says.

    Args:
        what: `keep` everything; `selective` keeps the results of attention and computes the rest
            of a block again; `recompute` keeps a block's input only.
    """
    if what == "keep":
        return
    again: dict[str, Any] = {"use_reentrant": False}
    if what == "selective":
        again["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    network.enable_gradient_checkpointing(  # type: ignore[operator]
        lambda block, *inputs: checkpoint(block, *inputs, **again)
    )


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
