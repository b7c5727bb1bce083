"""The calls of our operators at the recipe's clip size, and which provider will serve each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_arg

from turbo_opt.ir.edit import user_inputs
from turbo_opt.ir.program import Denoiser, Program
from turbo_opt.ir.sizes import TEXT_TOKENS, clip_sizes, known
from turbo_opt.targets import Target


def chosen_providers(
    program: Program, target: Target, latent: tuple[int, int, int], text_tokens: int = TEXT_TOKENS
) -> dict[str, dict[str, int]]:
    """Operator → provider → number of calls in one evaluation of every denoiser.

    No GPU is needed; a described target is taken to have every provider's package.

    Args:
        latent: latent frames, height and width of the clip.
    """
    from turbo_opt.kernels import operator

    device = described(target)
    counts: dict[str, Counter[str]] = {}
    for denoiser in program:
        for name, args in operator_calls(denoiser, latent, text_tokens):
            choice = operator(name).choose(device, *args)
            counts.setdefault(name, Counter())[choice.provider] += 1
    return {name: dict(counter) for name, counter in sorted(counts.items())}


def operator_calls(
    denoiser: Denoiser, latent: tuple[int, int, int], text_tokens: int = TEXT_TOKENS
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(operator, arguments) of each call in one evaluation, tensors on meta in their real layout.

    Args:
        latent: latent frames, height and width of the clip.
    """
    frames, rows, columns = (
        side // size for side, size in zip(latent, denoiser.config["patch_size"], strict=True)
    )
    sizes = clip_sizes(user_inputs(denoiser.exported), (frames, rows, columns), text_tokens)
    for node in denoiser.graph.nodes:
        if str(node.target).startswith("turbo_opt."):
            values = {n: _value(n.meta["val"], sizes) for n in node.all_input_nodes}
            yield str(node.target).split(".")[1], map_arg(node.args, values.__getitem__)


def described(target: Target) -> str:
    """A target as the kernels describe devices: `cpu` or, say, `sm90`."""
    if target.device_type == "cpu" or target.compute_capability is None:
        return "cpu"
    major, minor = target.compute_capability
    return f"sm{major}{minor}"


def _value(value: Any, sizes: Mapping[Any, int]) -> Any:
    if isinstance(value, torch.SymInt):
        return known(value, sizes)
    if not isinstance(value, Tensor):
        return value
    shape = [known(side, sizes) for side in value.shape]
    strides = [known(stride, sizes) for stride in value.stride()]
    return torch.empty_strided(shape, strides, dtype=value.dtype, device="meta")
