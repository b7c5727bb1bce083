"""Which provider will serve each of our operators on the target, at the recipe's clip size."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_arg

from turbo_opt.ir.edit import user_inputs
from turbo_opt.ir.program import Denoiser, Program
from turbo_opt.targets import Target


def chosen_providers(
    program: Program, target: Target, latent: tuple[int, int, int]
) -> dict[str, dict[str, int]]:
    """Operator → provider → number of calls in one evaluation of every denoiser.

    The choice is asked for on meta tensors of the real sizes, so no GPU is needed; a described
    target is taken to have every provider's package.

    Args:
        latent: latent frames, height and width of the clip.
    """
    from turbo_opt.kernels import operator

    device = _described(target)
    counts: dict[str, Counter[str]] = {}
    for denoiser in program:
        sizes = _sizes(denoiser, latent)
        for node in denoiser.graph.nodes:
            if not str(node.target).startswith("turbo_opt."):
                continue
            values = {n: _meta(n.meta["val"], sizes) for n in node.all_input_nodes}
            args = map_arg(node.args, values.__getitem__)
            name = str(node.target).split(".")[1]
            choice = operator(name).choose(device, *args)
            counts.setdefault(name, Counter())[choice.provider] += 1
    return {name: dict(counter) for name, counter in sorted(counts.items())}


def _described(target: Target) -> str:
    if target.device_type == "cpu" or target.compute_capability is None:
        return "cpu"
    major, minor = target.compute_capability
    return f"sm{major}{minor}"


def _sizes(denoiser: Denoiser, latent: tuple[int, int, int]) -> dict[Any, int]:
    """Values of the symbolic sizes: one clip of that latent size and 512 text tokens."""
    inputs = {str(node.target): node.meta["val"] for node in user_inputs(denoiser.exported)}
    sizes: dict[Any, int] = {}
    for side, value in zip(inputs["hidden_states"].shape[2:], latent, strict=True):
        if isinstance(side, torch.SymInt):
            (symbol,) = side.node.expr.free_symbols
            factor = int(side.node.expr.subs({symbol: 1}))
            sizes[symbol] = value // factor
    for tensor in inputs.values():
        for axis, side in enumerate(tensor.shape if isinstance(tensor, Tensor) else ()):
            if isinstance(side, torch.SymInt):
                for symbol in side.node.expr.free_symbols:
                    sizes.setdefault(symbol, 1 if axis == 0 else 512)
    return sizes


def _meta(value: Any, sizes: dict[Any, int]) -> Any:
    if isinstance(value, Tensor):
        shape = [
            side if isinstance(side, int) else int(side.node.expr.subs(sizes))
            for side in value.shape
        ]
        return torch.empty(shape, dtype=value.dtype, device="meta")
    return value
