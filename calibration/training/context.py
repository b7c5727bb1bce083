"""Several processes share the tokens of a clip; in attention, each has all tokens of some heads.

Between layers a process holds L / P tokens of all heads. Before self-attention one all-to-all gives
it all L tokens of H / P heads, after it another gives its own tokens back (Ulysses,
arXiv 2309.14509). Every process ends with the whole prediction and so with the same loss; each
computes the part of the gradient that goes through its tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def share_tokens(network: nn.Module, group: Any) -> None:
    """Have a diffusers Wan denoiser work on this process's tokens between patching and output.

    Its self-attention must exchange them, see `tokens_to_heads`.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)

    def own(x: Tensor) -> Tensor:
        return x.chunk(size, 1)[rank]

    def own_timesteps(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) > 1 and args[1].ndim == 2:  # one for each token
            args = (args[0], own(args[1]), *args[2:])
        elif "timestep" in kwargs and kwargs["timestep"].ndim == 2:
            kwargs = {**kwargs, "timestep": own(kwargs["timestep"])}
        return args, kwargs

    parts: Any = network
    parts.register_forward_pre_hook(own_timesteps, with_kwargs=True)
    parts.rope.register_forward_hook(lambda module, inputs, tables: tuple(map(own, tables)))
    parts.blocks[0].register_forward_pre_hook(lambda module, args: (own(args[0]), *args[1:]))
    parts.proj_out.register_forward_hook(lambda module, inputs, out: _Gather.apply(out, group))


def tokens_to_heads(x: Tensor, group: Any) -> Tensor:
    """(B, L / P, H, D) of every process → (B, L, H / P, D); as it is without a group."""
    return x if group is None else _exchange(x, 2, 1, group)


def heads_to_tokens(x: Tensor, group: Any) -> Tensor:
    """(B, L, H / P, D) of every process → (B, L / P, H, D); as it is without a group."""
    return x if group is None else _exchange(x, 1, 2, group)


def _exchange(x: Tensor, cut: int, joined: int, group: Any) -> Tensor:
    """Cut `x` along one axis, send a part to each process, join what comes along the other."""
    from torch.distributed._functional_collectives import all_to_all_single_autograd

    parts = torch.stack(x.chunk(dist.get_world_size(group), cut))
    received = all_to_all_single_autograd(parts, None, None, group)
    return torch.cat(received.unbind(0), joined)


class _Gather(torch.autograd.Function):
    """(B, L / P, C) of every process → (B, L, C) on each; backward keeps the own tokens' gradient.

    All processes compute the same loss of the result, so nothing is summed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        size, rank = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)
        return grads[0].chunk(size, 1)[rank].contiguous(), None
