"""Attention to a padded prompt: the padding's keys are all alike, so one is computed for all.

    padded_attention(q, k, v, start) = softmax(scale · q·kᵀ)·v
    where k[t] = k[start] and v[t] = v[start] for every t ≥ start

n equal keys add n·exp(s) to the sum of a softmax, as one key of score s + ln n does. Text encoders
pad with one embedding, and 512 positions of which 100 are words cost no more than 101. The last key
stands for all: where 128 tokens share an 8-bit scale, it shares one with padding alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .._cuda import padded_attention as padded_by_cuda
from .._cuda.compiler import unavailable
from .._triton.support import unsupported_device
from ..capability import Capability
from ..errors import OperatorInputError
from ..operator import Operator, Provider
from ..sparse_rules import check_attention_dtypes, empty_heads

HEAD_DIMS = (64, 128)
"""Channels of a head that the kernels are written for; the reference takes any number."""
PROMPT_TOKENS = 160
"""Of an extended prompt of some 120 words, for which providers are timed."""
PaddedCall = tuple[int, torch.dtype]
"""What the choice of a provider depends on: channels of a head, dtype."""


def check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor, scale: float | None
) -> None:
    check_as("padded_attention", q, k, v, start, scale)


def check_as(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    scale: float | None,
) -> None:
    """`check`, for an operator of another name."""
    check_attention_dtypes(name, q, k, v)
    fits = (
        q.ndim == k.ndim == v.ndim == 4
        and all(k.shape[axis] == v.shape[axis] for axis in range(4))
        and all(q.shape[axis] == k.shape[axis] for axis in (0, 1, 3))
    )
    if not fits:
        raise OperatorInputError(
            f"{name}: k and v must be (B, H, T, D) alike for q of (B, H, L, D), got q "
            f"{tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
        )
    if isinstance(k.shape[2], int) and k.shape[2] == 0:
        raise OperatorInputError(f"{name}: there must be at least one key, got k {tuple(k.shape)}")
    if start.dtype is not torch.int32 or start.ndim != 1 or start.shape[0] != q.shape[0]:
        raise OperatorInputError(
            f"{name}: start must be (B,) int32, B being {q.shape[0]}, got {tuple(start.shape)} "
            f"{start.dtype}"
        )
    if scale is not None and not math.isfinite(scale):
        raise OperatorInputError(f"{name}: scale must be finite, or None for 1/√D, got {scale}")


def describe(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor, scale: float | None
) -> PaddedCall:
    return q.shape[-1], q.dtype


def fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor, scale: float | None
) -> torch.Tensor:
    return empty_heads(q)


def typical_inputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor, *others: Any
) -> tuple[Any, ...]:
    """The arguments with a prompt of 160 tokens, or one that fills all positions but the last."""
    return (q, k, v, torch.full_like(start, min(PROMPT_TOKENS, k.shape[2] - 1)), *others)


def triton_supports(capability: Capability, call: PaddedCall) -> str | None:
    head_dim, dtype = call
    if head_dim not in HEAD_DIMS:
        return f"its tiles are 64 or 128 channels wide, got a head dimension of {head_dim}"
    if dtype is torch.float32:
        return "its products take 16-bit operands"
    return unsupported_device(capability)


def cuda_supports(capability: Capability, call: PaddedCall) -> str | None:
    """padded_attention.cu."""
    return padded_by_cuda.unsupported(capability, *call)


PADDED_ATTENTION = Operator(
    name="padded_attention",
    schema="(Tensor q, Tensor k, Tensor v, Tensor start, float? scale) -> Tensor",
    package=__name__,
    fake=fake,
    check=check,
    describe=describe,
    providers=[
        Provider("cuda", f"{__name__}.cuda", cuda_supports, unavailable=unavailable),
        Provider("triton", f"{__name__}.triton", triton_supports, requires="triton"),
    ],
    typical_inputs=typical_inputs,
)


def padded_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention of q to k and v, whose tokens from `start` on are taken to be alike.

    Args:
        q: (B, H, L, D) in bfloat16, float16 or float32; any strides.
        k, v: (B, H, T, D) in q's dtype, T ≥ 1; any strides. Of the tokens from `start` on only the
            last is read.
        start: (B,) int32 on the same device, 0 … T − 1: the first token that all later ones equal.
            T − 1 where none are padded: then this is attention as usual.
        scale: what q·kᵀ is multiplied by; None: 1/√D.

    Returns:
        (B, H, L, D) of q's dtype, a view of memory in (B, L, H, D).

    Raises:
        OperatorInputError: for another dtype, or arguments that do not fit.
    """
    return torch.ops.turbo_opt.padded_attention.default(q, k, v, start, scale)
