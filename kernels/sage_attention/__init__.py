"""Dense attention on 8-bit operands, as in SageAttention: to itself or to other tokens.

    sage_attention(q, k, v) ≈ softmax(scale · q·kᵀ)·v

The operands are those of the sparse branch of `sagesla`: k is smoothed (its mean token subtracted,
which softmax does not see), q is int8 per token and k per block of 128 (symmetric, amax / 127), and
with `pv="fp8"` P (times 448) and v (per channel, amax / 448) are e4m3. Sums are float32. What all
providers promise is to be as close to exact attention: they may round other groups of tokens, or
nothing at all where 16 bits are as fast.
Sources: SageAttention, arXiv 2410.02367; SageAttention2, arXiv 2411.10958.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .._triton.support import unsupported_device
from ..capability import Capability
from ..errors import OperatorInputError
from ..operator import Operator, Provider, fastest_first
from ..sparse_rules import check_attention_dtypes, check_pv, empty_heads

HEAD_DIMS = (64, 128)
"""Channels of a head that the kernels are written for; the reference takes any number."""
_SAGEATTN_DEVICES = ("sm80", "sm86", "sm89", "sm90", "sm120")
_FEWEST_KEYS = 8192
"""Of `sageattention`: its release 1 sums a softmax over whole blocks of 64, in which a key beyond
the last has the score 0. From here on these are less than 0.8 % of all. Whole blocks, which a
call's description does not tell, and later releases are refused with the rest.
Source: github.com/thu-ml/SageAttention, attn_qk_int8_per_block.py of 1.0.6."""


class SageAttentionCall(NamedTuple):
    """What the choice of a provider depends on; numbers of tokens down to a power of two."""

    head_dim: int
    dtype: torch.dtype
    queries: int
    keys: int
    pv: str


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, pv: str) -> None:
    name = "sage_attention"
    check_attention_dtypes(name, q, k, v)
    fits = (
        q.ndim == k.ndim == v.ndim == 4
        and all(k.shape[axis] == v.shape[axis] for axis in range(4))
        and all(q.shape[axis] == k.shape[axis] for axis in (0, 1, 3))
    )
    if not fits:
        raise OperatorInputError(
            f"{name}: k and v must be (B, H, Lk, D) alike for q of (B, H, L, D), got q "
            f"{tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
        )
    if isinstance(k.shape[2], int) and k.shape[2] == 0:
        raise OperatorInputError(f"{name}: there must be at least one key, got k {tuple(k.shape)}")
    if scale is not None and not math.isfinite(scale):
        raise OperatorInputError(f"{name}: scale must be finite, or None for 1/√D, got {scale}")
    check_pv(name, pv)


def describe(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, pv: str
) -> SageAttentionCall:
    queries, keys = _power_of_two(q.shape[2]), _power_of_two(k.shape[2])
    return SageAttentionCall(q.shape[-1], q.dtype, queries, keys, pv)


def _power_of_two(count: int) -> int:
    """The largest power of two that is not above `count`; 0 of 0."""
    return 1 << count.bit_length() >> 1


def fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, pv: str
) -> torch.Tensor:
    return empty_heads(q)


def triton_supports(capability: Capability, call: SageAttentionCall) -> str | None:
    if call.head_dim not in HEAD_DIMS:
        return f"its tiles are 64 or 128 channels wide, got a head dimension of {call.head_dim}"
    if call.dtype is torch.float32:
        return "its products take 16-bit operands"
    minimum = (8, 9) if call.pv == "fp8" else (8, 0)
    return unsupported_device(capability, minimum, f"pv={call.pv!r}")


def sageattention_supports(capability: Capability, call: SageAttentionCall) -> str | None:
    if str(capability) not in _SAGEATTN_DEVICES:
        return f"its kernels are for {', '.join(_SAGEATTN_DEVICES)}"
    if call.head_dim not in HEAD_DIMS:
        return f"it is called for heads of 64 or 128 channels, got {call.head_dim}"
    if call.dtype is torch.float32:
        return "it takes 16-bit operands"
    if call.keys < _FEWEST_KEYS:
        return (
            f"its release 1 counts up to 63 keys of zero beyond the last, too many for fewer than "
            f"{_FEWEST_KEYS} keys"
        )
    if call.pv == "16bit" and capability.at_least(8, 9):
        return "from sm89 on it multiplies P and v in e4m3, pv='16bit' asks for 16 bits"
    return None


def sdpa_supports(capability: Capability, call: SageAttentionCall) -> str | None:
    return None


def fewest_tokens(capability: Capability) -> int | None:
    """Queries and keys from which 8-bit products save more time than rounding q and k takes.

    None: there are never enough. On Hopper from times on an H200 (benchmarks/results/kernels.json):
    at 512 keys 8 bits lose (12 heads × 32,760 queries: 0.313 ms against 0.207; 40 × 75,600: 1.71
    against 1.57), at as many keys as queries they win (9.02 against 11.7; 159.6 against 210.0), and
    straight lines between the two meet at 1740 and 720 keys: the power of two above both. Elsewhere
    estimates from the peak rates of the tensor cores. Those of data-centre Blackwell, sm10x, are
    expected to run 16 bits faster than our kernels reach in 8.
    """
    if capability.major == 10:
        return None
    data_centre = (capability.major, capability.minor) in ((8, 0), (9, 0))
    return 2048 if data_centre else 512


def eight_bits_first_where_they_pay(
    capability: Capability, call: SageAttentionCall, names: Sequence[str]
) -> Sequence[str]:
    """The declared order on a GPU, but attention in 16 bits first where tokens are few."""
    order = fastest_first(capability, call, names)
    fewest = fewest_tokens(capability)
    if capability.is_cpu or (fewest is not None and min(call.queries, call.keys) >= fewest):
        return order
    return sorted(order, key=lambda name: name != "sdpa")


SAGE_ATTENTION = Operator(
    name="sage_attention",
    schema="(Tensor q, Tensor k, Tensor v, float? scale, str pv) -> Tensor",
    package=__name__,
    fake=fake,
    check=check,
    describe=describe,
    providers=[
        Provider("triton", f"{__name__}.triton", triton_supports, requires="triton"),
        Provider(
            "sageattention",
            f"{__name__}.third_party",
            sageattention_supports,
            requires="sageattention",
        ),
        Provider("sdpa", f"{__name__}.torch_library", sdpa_supports),
    ],
    prefer=eight_bits_first_where_they_pay,
)


def sage_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    pv: str = "fp8",
) -> torch.Tensor:
    """Softmax attention of q to all of k and v, without mask, in 8 bits.

    Args:
        q: (B, H, L, D) in bfloat16, float16 or float32, after normalization and rotation; any
            strides.
        k, v: (B, H, Lk, D) in q's dtype, Lk ≥ 1; any strides.
        scale: what q·kᵀ is multiplied by; None: 1/√D.
        pv: `"fp8"` multiplies P and v in e4m3, `"16bit"` in the dtype of v.

    Returns:
        (B, H, L, D) of q's dtype, a view of memory in (B, L, H, D).

    Raises:
        OperatorInputError: for another dtype, or arguments that do not fit.
    """
    return torch.ops.turbo_opt.sage_attention.default(q, k, v, scale, pv)
