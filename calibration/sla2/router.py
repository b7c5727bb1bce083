"""The learned parts of SLA2 in a self-attention, and attention with them that can be trained.

<attention>.router.proj_q, .proj_k   W_q and W_k, (D, D), shared by heads, no bias
<attention>.alpha                    w_α (H, D) and b_α (H,): α = σ(w_α·q̄ + b_α)

They begin as the choice by block means, W = 1, with one ratio for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from turbo_opt.calibration.sla.attention import Sparsity, routing_means, sparse_branch
from turbo_opt.kernels import block_routing
from turbo_opt.kernels.sla.reference import feature
from turbo_opt.kernels.sla2.reference import block_ratios, linear_over, not_kept
from turbo_opt.kernels.sparse_rules import block_count, kept_blocks

ROUTER, ALPHA = "router", "alpha"
FIRST_ALPHA_BIAS = 1.0
"""α = 0.73: most of what dense attention sees is kept."""


class Router(nn.Module):
    """Which key blocks a query block keeps, by the products of projected block means."""

    def __init__(self, head_dim: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.proj_q, self.proj_k = (
            nn.Linear(head_dim, head_dim, bias=False, device=device) for _ in range(2)
        )

    def project(self, q_means: Tensor, k_means: Tensor) -> tuple[Tensor, Tensor]:
        """W_q·q̄ and W_k·k̄, (B, H, blocks, D) in the dtype of the means."""
        w_q, w_k = (each.weight.to(q_means.dtype) for each in (self.proj_q, self.proj_k))
        return q_means @ w_q.mT, k_means @ w_k.mT

    def scores(self, q_means: Tensor, k_means: Tensor) -> Tensor:
        """(W_q·q̄)·(W_k·k̄) / √D, (B, H, NQ, NK)."""
        q, k = self.project(q_means, k_means)
        return q @ k.mT * q.shape[-1] ** -0.5


def add_routers(network: nn.Module) -> None:
    """Give every self-attention a router and a ratio, without values if the network has none."""
    for block in network.blocks:  # type: ignore[union-attr]
        add_router(block.attn1, block.attn1.inner_dim, block.attn1.heads)


def add_router(attention: nn.Module, channels: int, heads: int) -> None:
    """`<attention>.router` and `<attention>.alpha`, on the device of its parameters."""
    device = next((parameter.device for parameter in attention.parameters()), None)
    attention.router = Router(channels // heads, device)
    attention.alpha = nn.Linear(channels // heads, heads, device=device)


class Routers(nn.Module):
    """Router and ratio of every self-attention of a model, and nothing else of it.

    Parameters have the names that they have in the model.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        heads, head_dim = int(config["num_attention_heads"]), int(config["attention_head_dim"])
        self.blocks = nn.ModuleList()
        for _ in range(int(config["num_layers"])):
            attention = nn.Module()
            add_router(attention, heads * head_dim, heads)
            self.blocks.append(nn.ModuleDict({"attn1": attention}))

    @torch.no_grad()
    def reset(self) -> Routers:
        """The values that training begins with."""
        for layer in self.layers():
            for projection in (layer.router.proj_q, layer.router.proj_k):
                nn.init.eye_(projection.weight)
            nn.init.zeros_(layer.alpha.weight)
            nn.init.constant_(layer.alpha.bias, FIRST_ALPHA_BIAS)
        return self

    def layers(self) -> Iterator[Any]:
        """What holds `router` and `alpha`, in the order in which attention runs."""
        for block in self.blocks:
            yield block["attn1"]  # type: ignore[index]

    def forward(self, function: Any, inputs: Iterable[Any]) -> list[Any]:
        """`function(layer, input)` of each layer: a call, so that shards are gathered."""
        return [function(layer, each) for layer, each in zip(self.layers(), inputs, strict=True)]


def attend_routed(sparsity: Sparsity, group: Any = None) -> Any:
    """o = α·sparse branch + (1 − α)·linear branch, by the module's own router and ratio.

    Args:
        group: processes that share the tokens, each of which attends with some heads.
    """

    def attend(attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = 0 if group is None else dist.get_rank(group) * q.shape[1]
        own = slice(first, first + q.shape[1])
        with torch.autocast(q.device.type, enabled=False):
            alpha = (attn.alpha.weight[own], attn.alpha.bias[own])
            return routed_attention(attn.router, *alpha, q, k, v, sparsity)

    return attend


def routed_attention(
    router: Router,
    alpha_weight: Tensor,
    alpha_bias: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sparsity: Sparsity,
) -> Tensor:
    """What `turbo_opt::sla2` computes, differentiable in all but the choice of blocks.

    Args:
        alpha_weight, alpha_bias: (H, D) and (H,), of the heads that are there.
        q, k, v: (B, H, L, D).
    """
    length, blocks = k.shape[2], block_count(k.shape[2], sparsity.block_k)
    keep = kept_blocks(sparsity.topk, length, sparsity.block_k)
    q_means, k_means = routing_means(q, k, sparsity)
    with torch.no_grad():
        projected_q, projected_k = router.project(q_means, k_means)
        lists = block_routing(
            projected_q.float().contiguous(), projected_k.float().contiguous(), keep
        )
    o = sparse_branch(q, k, v, sparsity, lists)
    if keep == blocks:
        return o
    phi_q, phi_k = (feature(x.to(q_means.dtype), sparsity.feature_map) for x in (q, k))
    rest = not_kept(lists, blocks).to(q_means.dtype)
    linear = linear_over(rest, phi_q, phi_k, v, sparsity.block_q, sparsity.block_k)
    alpha = block_ratios(q_means, alpha_weight, alpha_bias)
    alpha = alpha.repeat_interleave(sparsity.block_q, 2)[:, :, :length, None]
    return (alpha * o + (1 - alpha) * linear).to(q.dtype)


def router_names(config: Mapping[str, Any]) -> list[str]:
    """The names of all weights that SLA2 adds to a model."""
    with torch.device("meta"):
        return [name for name, _ in Routers(config).named_parameters()]
