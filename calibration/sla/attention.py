"""Sparse-linear attention that can be trained: what `turbo_opt::sla` computes, with a derivative.

o = sparse(q, k, v) + proj(linear(q, k, v))

The blocks are chosen as the operator chooses them, and the choice is not differentiated. The
linear branch is plain torch; its memory grows with the number of tokens, not with its square.
The sparse branch may have the values of `sagesla`, on 8-bit operands, and the gradient of 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from turbo_opt.calibration.jobs.schema import SparseLinear
from turbo_opt.kernels import block_routing, block_sparse_attention, sage_sparse_attention
from turbo_opt.kernels.sla.reference import block_means, feature
from turbo_opt.kernels.sparse_rules import NORMALIZER_EPS, kept_blocks

_PV = "fp8"
"""How P and v are rounded where the sparse branch is quantized."""


@dataclass(frozen=True)
class Sparsity:
    """How sparse, in which blocks, and φ; see `turbo_opt.kernels.sla`.

    `quantized`: the sparse branch's values are those of 8-bit operands.
    """

    topk: float = 0.1
    block_q: int = 128
    block_k: int = 64
    feature_map: str = "softmax"
    quantized: bool = False

    @classmethod
    def of(cls, settings: SparseLinear) -> Sparsity:
        """As a job says."""
        return cls(
            settings.topk,
            settings.block_q,
            settings.block_k,
            settings.feature_map,
            settings.quantized,
        )


@torch.no_grad()
def choose_blocks(q: Tensor, k: Tensor, sparsity: Sparsity) -> Tensor:
    """The key blocks that each query block of (B, H, L, D) keeps, (B, H, query blocks, kept)."""
    q_means, k_means = routing_means(q, k, sparsity)
    keep = kept_blocks(sparsity.topk, k.shape[2], sparsity.block_k)
    return block_routing(q_means.contiguous(), k_means.contiguous(), keep)


def routing_means(q: Tensor, k: Tensor, sparsity: Sparsity) -> tuple[Tensor, Tensor]:
    """Block means of q and of centered k, (B, H, blocks, D) in float32 or wider.

    Means are taken of centered keys, as the operators take them: the same order, less rounding.
    """
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    k_means = block_means(k, sparsity.block_k) - k.mean(2, keepdim=True)
    return block_means(q, sparsity.block_q), k_means


def sparse_branch(
    q: Tensor, k: Tensor, v: Tensor, sparsity: Sparsity, lists: Tensor | None = None
) -> Tensor:
    """Softmax attention over the listed blocks, or those of `choose_blocks`: (B, H, L, D)."""
    lists = choose_blocks(q, k, sparsity) if lists is None else lists
    blocks = (sparsity.block_q, sparsity.block_k)
    o, _ = block_sparse_attention(q, k, v, lists, *blocks)
    if sparsity.quantized:
        with torch.no_grad():
            error = sage_sparse_attention(q, k, v, lists, *blocks, _PV) - o
        o = o + error
    return o


def linear_branch(q: Tensor, k: Tensor, v: Tensor, feature_map: str) -> Tensor:
    """φ(q)(φ(k)ᵀv) / (1e-5 + φ(q)·Σφ(k)) over all keys, (B, H, L, D) of q's dtype.

    Products are in bfloat16 for bfloat16, else in float32: a sum over all keys leaves float16's
    range.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    dtype = q.dtype if q.dtype is torch.bfloat16 else exact
    with torch.autocast(q.device.type, enabled=False):
        phi_q, phi_k = (feature(x.to(exact), feature_map) for x in (q, k))
        normalizer = NORMALIZER_EPS + phi_q @ phi_k.sum(2)[..., None]
        state = phi_k.to(dtype).mT @ v.to(dtype)
        return (phi_q.to(dtype) @ state / normalizer).to(q.dtype)
