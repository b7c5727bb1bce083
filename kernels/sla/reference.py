"""The definition of sla, in float32, and the pieces that its quantized forms share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import elu, pad, relu

from ..block_routing.reference import block_routing
from ..sparse_rules import NORMALIZER_EPS, empty_heads, kept_blocks

QUERY_BLOCKS_AT_ONCE = 16  # bounds the memory of the gathered keys

_FEATURE_MAPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "elu": lambda x: elu(x) + 1,
    "relu": relu,
}


def sla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    proj_weight: torch.Tensor | None,
    proj_bias: torch.Tensor | None,
    topk: float,
    block_q: int,
    block_k: int,
    feature_map: str,
) -> torch.Tensor:
    if q.numel() == 0:
        return empty_heads(q)
    q32, k32, v32 = q.float(), k.float(), v.float()
    lists = route(q32, k32, topk, block_q, block_k)
    o = sparse_attention(q32, k32, v32, lists, block_q, block_k)
    if proj_weight is not None:
        o = o + projected(linear_attention(q32, k32, v32, feature_map), proj_weight, proj_bias)
    return empty_heads(q).copy_(o)


def split_blocks(x_BHLD: torch.Tensor, block: int) -> torch.Tensor:
    """(B, H, L, D) → (B, H, blocks, block, D), the last block filled with zeros."""
    missing = -x_BHLD.shape[2] % block
    return pad(x_BHLD, (0, 0, 0, missing)).unflatten(2, (-1, block))


def block_means(x_BHLD: torch.Tensor, block: int) -> torch.Tensor:
    """The mean token of every block, (B, H, blocks, D); the last over the tokens it has."""
    length = x_BHLD.shape[2]
    starts = torch.arange(0, length, block, device=x_BHLD.device)
    sizes = (length - starts).clamp_max(block)
    return split_blocks(x_BHLD, block).sum(3) / sizes[:, None]


def route(
    q: torch.Tensor, k: torch.Tensor, topk: float, block_q: int, block_k: int
) -> torch.Tensor:
    """Indices of the key blocks that each query block keeps: (B, H, query blocks, kept)."""
    keep = kept_blocks(topk, k.shape[2], block_k)
    centered = k - k.mean(2, keepdim=True)
    return block_routing(block_means(q, block_q), block_means(centered, block_k), keep)


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: torch.Tensor,
    block_q: int,
    block_k: int,
    round_p: Callable[[torch.Tensor], torch.Tensor] = lambda p: p,
) -> torch.Tensor:
    """Softmax attention of each query block over the key blocks of its list, in float32.

    Args:
        q, k, v: (B, H, L, D) float32.
        lists: (B, H, query blocks, kept) key block indices.
        round_p: rounding of exp(s − max) before it multiplies v; the normalizer is not rounded.
    """
    length, head_dim = q.shape[2:]
    k_blocks, v_blocks = split_blocks(k, block_k), split_blocks(v, block_k)
    q_blocks = split_blocks(q, block_q)
    o_blocks = torch.empty_like(q_blocks)
    for first in range(0, q_blocks.shape[2], QUERY_BLOCKS_AT_ONCE):
        some = slice(first, first + QUERY_BLOCKS_AT_ONCE)
        chosen = lists[:, :, some].long()
        k_kept, v_kept = gather_blocks(k_blocks, chosen), gather_blocks(v_blocks, chosen)
        token = chosen[..., None] * block_k + torch.arange(block_k, device=q.device)
        hidden = (token >= length).flatten(-2)[..., None, :]
        o_blocks[:, :, some] = softmax_attention(
            q_blocks[:, :, some], k_kept, v_kept, head_dim**-0.5, round_p, hidden
        )
    return o_blocks.flatten(2, 3)[:, :, :length]


def softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    round_p: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale · q·kᵀ)·v of (…, L, D), in float32.

    Args:
        round_p: as for `sparse_attention`.
        hidden: True for each key that is not attended to.
    """
    s = q @ k.transpose(-1, -2) * scale
    if hidden is not None:
        s = s.masked_fill(hidden, -torch.inf)
    p = (s - s.amax(-1, keepdim=True)).exp()
    return round_p(p) @ v / p.sum(-1, keepdim=True)


def linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feature_map: str
) -> torch.Tensor:
    """φ(q)(φ(k)ᵀv) / (1e-5 + φ(q)·Σφ(k)) over all keys, (B, H, L, D) float32."""
    phi_q, phi_k = feature(q, feature_map), feature(k, feature_map)
    state = phi_k.transpose(-1, -2) @ v
    normalizer = phi_q @ phi_k.sum(2)[..., None]
    return phi_q @ state / (NORMALIZER_EPS + normalizer)


def feature(x: torch.Tensor, feature_map: str) -> torch.Tensor:
    """φ of the linear branch over channels, in x's dtype."""
    return _FEATURE_MAPS[feature_map](x)


def projected(
    o_BHLD: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The linear branch's projection, shared by heads."""
    bias = None if bias is None else bias.float()
    return torch.nn.functional.linear(o_BHLD, weight.float(), bias)


def gather_blocks(blocks_BHNSD: torch.Tensor, chosen_BHQJ: torch.Tensor) -> torch.Tensor:
    """The chosen blocks of each query block, joined: (B, H, Q, J·block, D)."""
    batch, heads, queries, kept = chosen_BHQJ.shape
    *_, block, head_dim = blocks_BHNSD.shape
    index = chosen_BHQJ.reshape(batch, heads, -1, 1, 1).expand(-1, -1, -1, block, head_dim)
    picked = blocks_BHNSD.gather(2, index)
    return picked.reshape(batch, heads, queries, kept * block, head_dim)
