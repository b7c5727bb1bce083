"""What goes into the preparation of sparse-linear attention, and what comes out of it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Rotation(NamedTuple):
    """RMSNorm's weights and the rotary tables, for q and k that are still to be normalized."""

    q_weight: torch.Tensor | None
    k_weight: torch.Tensor | None
    cos: torch.Tensor  # (1, L, 1, D / 2)
    sin: torch.Tensor
    eps: float


class Projection(NamedTuple):
    """The linear branch's feature map and projection."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    feature_map: str


class Blocks(NamedTuple):
    """How sparse, and in which blocks."""

    topk: float
    q: int
    k: int


class Prepared(NamedTuple):
    """What the attention kernel reads besides raw q, k and v; None where it is not used."""

    q_int8: torch.Tensor | None
    q_scale: torch.Tensor | None
    k_int8: torch.Tensor | None
    k_scale: torch.Tensor | None
    v_fp8: torch.Tensor | None
    v_scale: torch.Tensor | None
    q_means: torch.Tensor
    k_means: torch.Tensor
    branch: torch.Tensor | None


def check_heads_together(*tensors_BHLD: torch.Tensor) -> None:
    """RMSNorm spans all heads of a token, so they must lie together in memory."""
    if any(x.shape[1] > 1 and x.stride(1) != x.shape[3] for x in tensors_BHLD):
        raise ValueError("the heads of a token must lie together")
