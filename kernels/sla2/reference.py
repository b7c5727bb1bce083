"""The definition of sla2, in float32."""

from __future__ import annotations

import torch

from ..block_routing.reference import block_routing
from ..sage_sparse_attention.reference import sage_sparse_attention
from ..sla.reference import block_means, feature, sparse_attention, split_blocks
from ..sparse_rules import NORMALIZER_EPS, block_count, empty_heads, kept_blocks


def sla2(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    proj_q: torch.Tensor,
    proj_k: torch.Tensor,
    alpha_weight: torch.Tensor,
    alpha_bias: torch.Tensor,
    topk: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    qk: str,
    pv: str,
) -> torch.Tensor:
    if q.numel() == 0:
        return empty_heads(q)
    length = q.shape[2]
    q32, k32, v32 = q.float(), k.float(), v.float()
    q_means = block_means(q32, block_q)
    k_means = block_means(k32 - k32.mean(2, keepdim=True), block_k)
    keep = kept_blocks(topk, length, block_k)
    lists = block_routing(q_means @ proj_q.float().mT, k_means @ proj_k.float().mT, keep)
    if qk == "int8":
        o = sage_sparse_attention(q, k, v, lists, block_q, block_k, pv).float()
    else:
        o = sparse_attention(q32, k32, v32, lists, block_q, block_k)
    if keep < block_count(length, block_k):
        alpha = block_ratios(q_means, alpha_weight, alpha_bias)
        alpha = alpha.repeat_interleave(block_q, 2)[:, :, :length, None]
        rest = not_kept(lists, block_count(length, block_k))
        phi_q, phi_k = feature(q32, feature_map), feature(k32, feature_map)
        linear = linear_over(rest, phi_q, phi_k, v32, block_q, block_k)
        o = alpha * o + (1 - alpha) * linear
    return empty_heads(q).copy_(o)


def block_ratios(q_means: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """α of each query block, (B, H, NQ) float32, from its mean query (B, H, NQ, D)."""
    weight, bias = weight.to(q_means.dtype), bias.to(q_means.dtype)
    logits = torch.einsum("bhqd,hd->bhq", q_means, weight) + bias[:, None]
    return logits.sigmoid()


def not_kept(lists: torch.Tensor, blocks: int) -> torch.Tensor:
    """1 for each key block that is not in a query block's list, else 0: (B, H, NQ, NK) float32."""
    rest = torch.ones((*lists.shape[:3], blocks), device=lists.device)
    return rest.scatter_(-1, lists.long(), 0.0)


def linear_over(
    weights: torch.Tensor,
    phi_q: torch.Tensor,
    phi_k: torch.Tensor,
    v: torch.Tensor,
    block_q: int,
    block_k: int,
) -> torch.Tensor:
    """Linear attention in which a query block sees each key block with a weight of its own.

    Each key block has a state φ(k)ᵀv, and a query block adds up those that it sees: one product of
    (NQ, NK) with (NK, D·D). Taking the kept blocks off the sum over all would leave the rounding
    errors of what is taken off, and those are the largest states.

    Args:
        weights: (B, H, NQ, NK), not negative.
        phi_q, phi_k: φ of q and k, (B, H, L, D) float32 (float64), not negative.
        v: (B, H, L, D); products are in its dtype, the normalizer in that of phi_q.

    Returns:
        (B, H, L, D) in the dtype of phi_q.
    """
    q_blocks, k_blocks = split_blocks(phi_q, block_q), split_blocks(phi_k, block_k)
    states = k_blocks.to(v.dtype).mT @ split_blocks(v, block_k)
    state = (weights.to(v.dtype) @ states.flatten(3)).unflatten(3, states.shape[3:])
    normalizer = q_blocks @ (weights @ k_blocks.sum(3))[..., None]
    o = q_blocks.to(v.dtype) @ state / (NORMALIZER_EPS + normalizer)
    return o.flatten(2, 3)[:, :, : phi_q.shape[2]]
