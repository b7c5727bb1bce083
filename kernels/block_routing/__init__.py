"""Which key blocks each query block attends to: the highest products of block means.

lists = indices of the `keep` largest entries in each row of q_means · k_meansᵀ
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._triton.support import unsupported_device
from ..capability import Capability
from ..errors import OperatorInputError
from ..operator import Operator, Provider


class BlockRoutingCall(NamedTuple):
    """What the choice of a provider depends on."""

    key_blocks: int
    head_dim: int


def check(q_means: torch.Tensor, k_means: torch.Tensor, keep: int) -> None:
    fits = q_means.ndim == k_means.ndim == 4 and all(
        q_means.shape[axis] == k_means.shape[axis] for axis in (0, 1, 3)
    )
    if not fits:
        raise OperatorInputError(
            "block_routing: q_means must be (B, H, NQ, D) and k_means (B, H, NK, D), got "
            f"{tuple(q_means.shape)} and {tuple(k_means.shape)}"
        )
    if q_means.dtype is not torch.float32 or k_means.dtype is not torch.float32:
        raise OperatorInputError(
            f"block_routing: means must be float32, got {q_means.dtype} and {k_means.dtype}"
        )
    keys = k_means.shape[2]
    known = isinstance(keep, int) and isinstance(keys, int)
    if known and not 1 <= keep <= keys:
        raise OperatorInputError(f"block_routing: keep must be from 1 to {keys}, got {keep}")


def describe(q_means: torch.Tensor, k_means: torch.Tensor, keep: int) -> BlockRoutingCall:
    return BlockRoutingCall(k_means.shape[2], k_means.shape[3])


def fake(q_means: torch.Tensor, k_means: torch.Tensor, keep: int) -> torch.Tensor:
    return q_means.new_empty((*q_means.shape[:3], keep), dtype=torch.int32)


def triton_supports(capability: Capability, call: BlockRoutingCall) -> str | None:
    if call.key_blocks > 4096:
        return f"a row of scores is kept in registers, up to 4096 blocks; got {call.key_blocks}"
    if call.head_dim != 128:
        return f"its tiles are 128 channels wide, got {call.head_dim}"
    return unsupported_device(capability)


BLOCK_ROUTING = Operator(
    name="block_routing",
    schema="(Tensor q_means, Tensor k_means, SymInt keep) -> Tensor",
    package=__name__,
    fake=fake,
    check=check,
    describe=describe,
    providers=[Provider("triton", f"{__name__}.triton", triton_supports, requires="triton")],
)


def block_routing(q_means: torch.Tensor, k_means: torch.Tensor, keep: int) -> torch.Tensor:
    """The `keep` key blocks of highest score for each query block.

    Args:
        q_means: (B, H, NQ, D) float32, mean token of each query block.
        k_means: (B, H, NK, D) float32, mean token of each key block. Subtracting the mean of all
            keys first changes no list: it moves every score of a row alike.
        keep: how many, 1 … NK.

    Returns:
        (B, H, NQ, keep) int32 indices in ascending order. Among equal scores any may be kept.

    Raises:
        OperatorInputError: for another dtype, or shapes that do not fit.
    """
    return torch.ops.turbo_opt.block_routing.default(q_means, k_means, keep)
