"""How much memory a network needs, from its graph alone.

Activations live from the node that makes them to their last reader; views share their source's
memory. Kernels' own scratch space is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from turbo_opt.ir.edit import parameter_names, user_inputs
from turbo_opt.ir.program import Denoiser
from turbo_opt.ir.schedule import Schedule
from turbo_opt.ir.sizes import TEXT_TOKENS, clip_sizes, nbytes
from turbo_opt.ir.stages import Stage, split
from turbo_opt.runtime.staged import MOST_TIMESTEPS


def kept_bytes(
    denoiser: Denoiser,
    schedule: Schedule,
    latents: tuple[int, int, int],
    text_tokens: int = TEXT_TOKENS,
) -> dict[str, int]:
    """Bytes of what a network in stages keeps between steps; nothing for one that stays whole.

    `shape`, `prompt` and `timestep` are for one clip size, prompt and noise level; `clip` is for a
    whole clip, with two prompts where its steps are guided.

    Args:
        latents: latent frames, height and width.
    """
    if not denoiser.stages:
        return {}
    found = split(denoiser.graph, user_inputs(denoiser.exported), denoiser.stages)
    sizes = _sizes(denoiser, latents, text_tokens)
    kept = {
        stage.value: sum(nbytes(node.meta["val"], sizes) for node in found.kept[stage])
        for stage in (Stage.SHAPE, Stage.PROMPT, Stage.TIMESTEP)
    }
    steps = [step for step in schedule.steps if step.denoiser == denoiser.name]
    prompts = max((step.evaluations for step in steps), default=0)
    levels = min(len(steps), MOST_TIMESTEPS)
    clip = kept[Stage.SHAPE] + prompts * kept[Stage.PROMPT] + levels * kept[Stage.TIMESTEP]
    return {**kept, "clip": clip}


def peak_activation_bytes(
    denoiser: Denoiser, latents: tuple[int, int, int], text_tokens: int = TEXT_TOKENS
) -> int:
    """The most bytes of activations alive at once in one evaluation of one clip.

    Args:
        latents: latent frames, height and width.
    """
    sizes = _sizes(denoiser, latents, text_tokens)
    weights = parameter_names(denoiser.exported)
    nodes = [node for node in denoiser.graph.nodes if node not in weights]
    source: dict[Node, Node] = {}
    last: dict[Node, int] = {}
    for position, node in enumerate(nodes):
        base = _viewed(node)
        source[node] = source.get(base, base) if base is not None else node
        for used in (node, *node.all_input_nodes):
            if used in source:
                last[source[used]] = position
    ends: dict[int, list[Node]] = {}
    for node, position in last.items():
        ends.setdefault(position, []).append(node)
    alive = peak = 0
    for position, node in enumerate(nodes):
        if source[node] is node:
            alive += nbytes(node.meta.get("val"), sizes)
        peak = max(peak, alive)
        alive -= sum(nbytes(done.meta.get("val"), sizes) for done in ends.get(position, ()))
    return peak


def _sizes(denoiser: Denoiser, latents: tuple[int, int, int], text_tokens: int) -> dict[Any, int]:
    patch = denoiser.config["patch_size"]
    frames, rows, columns = (side // size for side, size in zip(latents, patch, strict=True))
    return clip_sizes(user_inputs(denoiser.exported), (frames, rows, columns), text_tokens)


def _viewed(node: Node) -> Node | None:
    """The node whose memory this one shares, None where it has its own."""
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.all_input_nodes[0]  # an item of a tuple, or arithmetic on sizes
    schema = node.target._schema
    shares = bool(schema.returns) and schema.returns[0].alias_info is not None
    if not shares or schema.name == "aten::contiguous":
        return None
    viewed = node.all_input_nodes[0]
    return viewed if schema.name != "aten::to" or _same(node, viewed) else None


def _same(one: Node, other: Node) -> bool:
    left, right = one.meta.get("val"), other.meta.get("val")
    return isinstance(left, Tensor) and isinstance(right, Tensor) and left.dtype == right.dtype
