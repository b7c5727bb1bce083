"""What block-sparse attention and its derivative take: heads, lists of key blocks, dtypes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._triton.support import unsupported_device
from .capability import Capability
from .checks import ACTIVATION_DTYPES
from .errors import OperatorInputError
from .sparse_rules import BLOCK_SIZES, block_count


class BlockSparseCall(NamedTuple):
    """What the choice of a provider depends on."""

    head_dim: int
    dtype: torch.dtype


def check_trainable_heads(operator: str, *heads: torch.Tensor) -> None:
    """All must be (B, H, L, D) alike, of one 16-bit or float32 dtype, or float64."""
    first = heads[0]
    if first.dtype not in (*ACTIVATION_DTYPES, torch.float64) or any(
        x.dtype is not first.dtype for x in heads
    ):
        raise OperatorInputError(
            f"{operator}: q, k and v must share bfloat16, float16, float32 or float64, got "
            f"{', '.join(str(x.dtype) for x in heads)}"
        )
    fits = all(
        x.ndim == 4 and all(a == b for a, b in zip(x.shape, first.shape, strict=True))
        for x in heads
    )
    if not fits:
        raise OperatorInputError(
            f"{operator}: q, k and v must be (B, H, L, D) alike, got "
            f"{', '.join(str(tuple(x.shape)) for x in heads)}"
        )


def check_block_lists(
    operator: str, q: torch.Tensor, lists: torch.Tensor, block_q: int, block_k: int
) -> None:
    """`lists` must be (B, H, ceil(L / block_q), 1 … ceil(L / block_k)) int32."""
    for name, value in (("block_q", block_q), ("block_k", block_k)):
        if value not in BLOCK_SIZES:
            raise OperatorInputError(f"{operator}: {name} must be 64 or 128, got {value}")
    batch, heads, length, _ = q.shape
    queries, keys = block_count(length, block_q), block_count(length, block_k)
    fits = (
        lists.ndim == 4
        and lists.dtype is torch.int32
        and all(a == b for a, b in zip(lists.shape, (batch, heads, queries), strict=False))
        and (keys == 0 or 1 <= lists.shape[3] <= keys)
    )
    if not fits:
        raise OperatorInputError(
            f"{operator}: lists must be int32 of shape ({batch}, {heads}, {queries}, 1 … {keys}), "
            f"got {lists.dtype} of shape {tuple(lists.shape)}"
        )


def triton_supports(capability: Capability, call: BlockSparseCall) -> str | None:
    """Why the Triton kernels do not serve that call there, or None."""
    if call.head_dim not in (16, 32, 64, 128):
        return f"its tiles are 16, 32, 64 or 128 channels wide, got {call.head_dim}"
    if call.dtype is torch.float64:
        return "its sums are kept in float32"
    return unsupported_device(capability)
