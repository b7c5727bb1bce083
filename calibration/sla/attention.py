"""Sparse-linear attention that can be trained: what `turbo_opt::sla` computes, with a derivative.

o = sparse(q, k, v) + proj(linear(q, k, v))

The blocks are chosen as the operator chooses them, and the choice is not differentiated. The
linear branch is plain torch; its memory grows with the number of tokens, not with its square.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import elu, relu

from turbo_opt.kernels import block_routing, block_sparse_attention
from turbo_opt.kernels.sla.reference import block_means
from turbo_opt.kernels.sparse_rules import NORMALIZER_EPS, kept_blocks


@dataclass(frozen=True)
class Sparsity:
    """How sparse, in which blocks, and φ; see `turbo_opt.kernels.sla`."""

    topk: float = 0.1
    block_q: int = 128
    block_k: int = 64
    feature_map: str = "softmax"


@torch.no_grad()
def choose_blocks(q: Tensor, k: Tensor, sparsity: Sparsity) -> Tensor:
    """The key blocks that each query block of (B, H, L, D) keeps, (B, H, query blocks, kept)."""
    q_means, k_means = (
        block_means(x.float(), block) for x, block in ((q, sparsity.block_q), (k, sparsity.block_k))
    )
    keep = kept_blocks(sparsity.topk, k.shape[2], sparsity.block_k)
    # Means are taken of centered keys, as the operators take them: the same order, less rounding.
    centered = k_means - k.float().mean(2, keepdim=True)
    return block_routing(q_means.contiguous(), centered.contiguous(), keep)


def sparse_branch(q: Tensor, k: Tensor, v: Tensor, sparsity: Sparsity) -> Tensor:
    """Softmax attention over the chosen blocks, (B, H, L, D)."""
    lists = choose_blocks(q, k, sparsity)
    return block_sparse_attention(q, k, v, lists, sparsity.block_q, sparsity.block_k)[0]


def linear_branch(q: Tensor, k: Tensor, v: Tensor, feature_map: str) -> Tensor:
    """φ(q)(φ(k)ᵀv) / (1e-5 + φ(q)·Σφ(k)) over all keys, (B, H, L, D) of q's dtype.

    Products are in bfloat16 for bfloat16, else in float32: a sum over all keys leaves float16's
    range.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    dtype = q.dtype if q.dtype is torch.bfloat16 else exact
    with torch.autocast(q.device.type, enabled=False):
        phi_q, phi_k = (_feature(x.to(exact), feature_map) for x in (q, k))
        normalizer = NORMALIZER_EPS + phi_q @ phi_k.sum(2)[..., None]
        state = phi_k.to(dtype).mT @ v.to(dtype)
        return (phi_q.to(dtype) @ state / normalizer).to(q.dtype)


def _feature(x: Tensor, feature_map: str) -> Tensor:
    if feature_map == "softmax":
        return x.softmax(-1)
    return elu(x) + 1 if feature_map == "elu" else relu(x)
