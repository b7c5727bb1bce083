"""What sparse-linear attention (SLA) keeps: block sizes, how many blocks, feature maps.

Source: SLA, arXiv 2509.24006, and the released TurboWan weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .checks import ACTIVATION_DTYPES
from .errors import OperatorInputError, name_the_nearest

FEATURE_MAPS = ("softmax", "elu", "relu")
PV_FORMATS = ("fp8", "16bit")
BLOCK_SIZES = (64, 128)
NORMALIZER_EPS = 1e-5  # of the linear branch


class SparseAttentionCall(NamedTuple):
    """What the choice of a provider depends on."""

    head_dim: int
    dtype: torch.dtype
    block_q: int
    block_k: int
    feature_map: str
    projected: bool
    pv: str | None = None  # None: all in 16 bits


def block_count(length: int, block: int) -> int:
    """How many blocks cover `length` tokens."""
    return (length + block - 1) // block


def kept_blocks(topk: float, length: int, block_k: int) -> int:
    """Key blocks that each query block keeps: int(topk · ceil(L / block_k)), at least one."""
    return max(1, int(topk * block_count(length, block_k)))


def check_sparsity(
    operator: str, topk: float, block_q: int, block_k: int, feature_map: str
) -> None:
    """Raise unless the numbers make sense."""
    if not 0 < topk <= 1:
        raise OperatorInputError(f"{operator}: topk must be above 0 and at most 1, got {topk}")
    for name, value in (("block_q", block_q), ("block_k", block_k)):
        if value not in BLOCK_SIZES:
            raise OperatorInputError(f"{operator}: {name} must be 64 or 128, got {value}")
    if feature_map not in FEATURE_MAPS:
        raise OperatorInputError(
            f"{operator}: unknown feature map {feature_map!r}: "
            f"{name_the_nearest(feature_map, FEATURE_MAPS)}"
        )


def check_pv(operator: str, pv: str) -> None:
    """Raise unless `pv` names a number format of P and v."""
    if pv not in PV_FORMATS:
        raise OperatorInputError(f"{operator}: pv must be 'fp8' or '16bit', got {pv!r}")


def check_attention_dtypes(
    operator: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> None:
    """q, k and v must share one 16-bit or float32 dtype."""
    if q.dtype not in ACTIVATION_DTYPES or k.dtype is not q.dtype or v.dtype is not q.dtype:
        raise OperatorInputError(
            f"{operator}: q, k and v must share bfloat16, float16 or float32, got "
            f"{q.dtype}, {k.dtype} and {v.dtype}"
        )


def check_heads(operator: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """q, k and v must be (B, H, L, D) alike, of one 16-bit or float32 dtype."""
    check_attention_dtypes(operator, q, k, v)
    fits = q.ndim == k.ndim == v.ndim == 4 and all(
        q.shape[axis] == other.shape[axis] for other in (k, v) for axis in range(4)
    )
    if not fits:
        raise OperatorInputError(
            f"{operator}: q, k and v must be (B, H, L, D) alike, got {tuple(q.shape)}, "
            f"{tuple(k.shape)} and {tuple(v.shape)}"
        )


def check_projection(
    operator: str, weight: torch.Tensor | None, bias: torch.Tensor | None, head_dim: int
) -> None:
    """`proj_weight` must be (D, D), `proj_bias` (D,); no bias without a weight."""
    if weight is None and bias is not None:
        raise OperatorInputError(f"{operator}: proj_bias is given without proj_weight")
    if weight is not None and tuple(weight.shape) != (head_dim, head_dim):
        raise OperatorInputError(
            f"{operator}: proj_weight must be ({head_dim}, {head_dim}), got {tuple(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (head_dim,):
        raise OperatorInputError(
            f"{operator}: proj_bias must be ({head_dim},), got {tuple(bias.shape)}"
        )


def as_heads(x_BLC: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(B, L, H·D) viewed as (B, H, L, D)."""
    return x_BLC.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def empty_heads(q: torch.Tensor) -> torch.Tensor:
    """A result of q's shape (B, H, L, D) whose memory is (B, L, H, D): no copy before O."""
    batch, heads, length, head_dim = q.shape
    return q.new_empty((batch, length, heads, head_dim)).transpose(1, 2)


def as_empty_heads(o_BHLD: torch.Tensor) -> torch.Tensor:
    """`o_BHLD` with the strides of `empty_heads`, copied only where its memory is another."""
    batch, heads, length, head_dim = o_BHLD.shape
    flat = o_BHLD.transpose(1, 2).reshape(-1)
    return flat.view(batch, length, heads, head_dim).transpose(1, 2)
