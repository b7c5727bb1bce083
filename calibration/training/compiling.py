"""torch.compile for what is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_SAFE: dict[str, Any] = {"triton.mix_order_reduction": False}
"""Of torch 2.10 to 2.13: sums along rows and along columns in one kernel. Gradients of modulations
that are parts of one tensor, as in every Wan block, are then left unwritten from some 16,000 tokens
on (pytorch/pytorch#193061)."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled at its first call for sizes that are fixed."""
    from torch._inductor import list_options

    known = list_options()
    options = {name: value for name, value in _SAFE.items() if name in known}
    return torch.compile(function, dynamic=False, options=options)
