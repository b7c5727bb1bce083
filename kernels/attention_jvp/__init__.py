"""Dense attention and its derivative along a direction, in one pass.

    o  = softmax(S)·v                          S = q·kᵀ / √D
    to = d/dε o(q + ε·tq, k + ε·tk, v + ε·tv) at ε = 0
       = (P ∘ tS)·v − rowsum(P ∘ tS) ∘ o + P·tv
    tS = (tq·kᵀ + q·tkᵀ) / √D                  P = softmax(S)

Six products of L·Lk·D, four where the keys do not move (a prompt's); memory is linear in L.
Source: the derivative of softmax; used for consistency distillation by sCM, arXiv 2410.11081, §5.1,
and rCM, arXiv 2510.08431.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..block_sparse_rules import BlockSparseCall
from ..block_sparse_rules import triton_supports as trainable_tiles_support
from ..capability import Capability
from ..checks import ACTIVATION_DTYPES
from ..errors import KernelError, OperatorInputError
from ..operator import Operator, Provider
from ..sparse_rules import empty_heads

NAME = "attention_jvp"


class AttentionJvpCall(NamedTuple):
    """What the choice of a provider depends on."""

    head_dim: int
    dtype: torch.dtype
    keys_move: bool


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tq: torch.Tensor,
    tk: torch.Tensor | None,
    tv: torch.Tensor | None,
) -> None:
    if (tk is None) != (tv is None):
        raise OperatorInputError(f"{NAME}: tk and tv must both be given, or both be None")
    named = {"q": q, "k": k, "v": v, "tq": tq, "tk": tk, "tv": tv}
    given = {name: x for name, x in named.items() if x is not None}
    if q.dtype not in (*ACTIVATION_DTYPES, torch.float64) or any(
        x.dtype is not q.dtype for x in given.values()
    ):
        raise OperatorInputError(
            f"{NAME}: all must share bfloat16, float16, float32 or float64, got "
            f"{_listed(given, lambda x: x.dtype)}"
        )
    fits = q.ndim == k.ndim == 4 and all(q.shape[axis] == k.shape[axis] for axis in (0, 1, 3))
    if not fits or not _alike(q, tq) or not all(_alike(k, x) for x in (v, tk, tv)):
        raise OperatorInputError(
            f"{NAME}: tq must be (B, H, L, D) as q, and v, tk and tv (B, H, Lk, D) as k, got "
            f"{_listed(given, lambda x: tuple(x.shape))}"
        )
    if isinstance(k.shape[2], int) and k.shape[2] == 0:
        raise OperatorInputError(f"{NAME}: there must be at least one key, got k {tuple(k.shape)}")


def _alike(a: torch.Tensor, b: torch.Tensor | None) -> bool:
    return b is None or (
        a.ndim == b.ndim and all(x == y for x, y in zip(a.shape, b.shape, strict=True))
    )


def _listed(given: dict[str, torch.Tensor], fact: Any) -> str:
    return ", ".join(f"{name} {fact(x)}" for name, x in given.items())


def describe(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tq: torch.Tensor,
    tk: torch.Tensor | None,
    tv: torch.Tensor | None,
) -> AttentionJvpCall:
    return AttentionJvpCall(q.shape[-1], q.dtype, tk is not None)


def fake(q: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_heads(q), empty_heads(q)


def triton_supports(capability: Capability, call: AttentionJvpCall) -> str | None:
    return trainable_tiles_support(capability, BlockSparseCall(call.head_dim, call.dtype))


ATTENTION_JVP = Operator(
    name=NAME,
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor tq, Tensor? tk, Tensor? tv) -> (Tensor, Tensor)"
    ),
    package=__name__,
    fake=fake,
    check=check,
    describe=describe,
    providers=[Provider("triton", f"{__name__}.triton", triton_supports, requires="triton")],
)


def _no_gradient(ctx: Any, *grads: torch.Tensor) -> None:
    raise KernelError(f"{NAME}: it has no gradient; tangents are targets, not differentiated")


torch.library.register_autograd(f"turbo_opt::{NAME}", _no_gradient)


def attention_jvp(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tq: torch.Tensor,
    tk: torch.Tensor | None = None,
    tv: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of q to all of k and v, and its directional derivative.

    Args:
        q: (B, H, L, D) in bfloat16, float16 or float32, or float64 by the reference; any strides.
        k, v: (B, H, Lk, D) in q's dtype, Lk ≥ 1.
        tq: the direction in which q moves, as q.
        tk, tv: those of k and v; both None where they stay, as a prompt's do.

    Returns:
        o and to, (B, H, L, D) of q's dtype, views of memory in (B, L, H, D). They have no gradient.

    Raises:
        OperatorInputError: for another dtype, or shapes that do not fit.
    """
    return torch.ops.turbo_opt.attention_jvp.default(q, k, v, tq, tk, tv)
