"""Routed attention beside dense attention, for some query blocks of a layer.

The choice of blocks is a matrix M of query and key blocks, 0 or 1 or between:

    o_sparse = Σ_j M_ij exp(s_ij)·v_j / Σ_j M_ij exp(s_ij)      over the keys of every block j
    o_linear                                                    with weights 1 − M_ij

so that a soft choice has a derivative, and as it hardens becomes what the operator computes.
Scores of all keys are needed for dense attention anyway; that is why only some queries are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from turbo_opt.calibration.sla.attention import Sparsity, routing_means
from turbo_opt.calibration.sla2.soft import soft_topk
from turbo_opt.kernels.sla.reference import feature, split_blocks
from turbo_opt.kernels.sla2.reference import block_ratios, linear_over
from turbo_opt.kernels.sparse_rules import block_count, kept_blocks

Choose = Callable[[Tensor, int], Tensor]
"""(scores (…, NK), how many) → M (…, NK)."""


@dataclass(frozen=True)
class Seen:
    """What is compared of a layer.

    Attributes:
        q, k, v: (B, H, L, D).
        chosen: (n,) int64, the query blocks that are looked at.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    chosen: Tensor


class Compared(NamedTuple):
    """Of the query blocks looked at, (B, H, n, block_q, D) each; 0 beyond the last token."""

    routed: Tensor
    sparse: Tensor
    dense: Tensor


def keep_highest(scores: Tensor, keep: int) -> Tensor:
    """1 for the `keep` highest of each row, else 0."""
    return torch.zeros_like(scores).scatter(-1, scores.topk(keep, -1).indices, 1.0)


def straight_through(scores: Tensor, keep: int, temperature: float) -> Tensor:
    """`keep_highest` with the derivative of `soft_topk`."""
    soft = soft_topk(scores, keep, temperature)
    return keep_highest(scores.detach(), keep) + (soft - soft.detach())


def compare(layer: Any, seen: Seen, sparsity: Sparsity, choose: Choose) -> Compared:
    """The results of routed attention, of its sparse branch alone, and of dense attention.

    Args:
        layer: has `router` and `alpha`.
    """
    dtype = torch.promote_types(seen.q.dtype, torch.float32)
    with torch.autocast(seen.q.device.type, enabled=False):
        return _compare(layer, seen.q.to(dtype), seen.k.to(dtype), seen.v.to(dtype), seen.chosen,
                        sparsity, choose)  # fmt: skip


def _compare(
    layer: Any, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, sparsity: Sparsity, choose: Choose
) -> Compared:
    length, block_q, block_k = q.shape[2], sparsity.block_q, sparsity.block_k
    keep, blocks = kept_blocks(sparsity.topk, length, block_k), block_count(length, block_k)
    q_means, k_means = routing_means(q, k, sparsity)
    q_means = q_means[:, :, chosen]
    mask = choose(layer.router.scores(q_means, k_means), keep)  # (B, H, n, NK)
    queries = split_blocks(q, block_q)[:, :, chosen].flatten(2, 3)
    scores = queries @ k.mT * q.shape[-1] ** -0.5
    p = (scores - scores.amax(-1, keepdim=True)).exp().unflatten(2, (-1, block_q))
    weights = p * mask.repeat_interleave(block_k, -1)[..., None, :length]
    values = v[:, :, None]
    dense = p @ values / p.sum(-1, keepdim=True)
    # Where all that is kept is far below a row's largest score, sums vanish beside it.
    sparse = weights @ values / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    routed = sparse
    if keep < blocks:
        phi_q, phi_k = (feature(x, sparsity.feature_map) for x in (queries, k))
        linear = linear_over(1 - mask, phi_q, phi_k, v, block_q, block_k)
        alpha = block_ratios(q_means, layer.alpha.weight, layer.alpha.bias)[..., None, None]
        routed = alpha * sparse + (1 - alpha) * linear.unflatten(2, (-1, block_q))
    token = chosen[:, None] * block_q + torch.arange(block_q, device=q.device)
    exists = (token < length)[..., None]
    return Compared(*(x.where(exists, 0.0) for x in (routed, sparse, dense)))
