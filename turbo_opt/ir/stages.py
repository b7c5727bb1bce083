"""What a denoiser computes from shapes, prompt or timestep alone, and what it must at each step.

A denoiser says which inputs define a stage (`Denoiser.stages`); the rest follows from its graph,
so a split holds whatever passes run before or after it:

    shape      sizes and weights, no input's values     once for a clip size
    prompt     inputs of the stage `prompt`             once for a prompt
    timestep   inputs of the stage `timestep`           once for a noise level
    step       everything else                          at each evaluation

A value that another stage reads is *kept*. Views are not kept but their bases: a stage that reads a
view makes it again, with the same strides. Nor is kept what is too large: it is computed where it
is read.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from turbo_opt.ir.sizes import clip_sizes, nbytes

aten = torch.ops.aten


class Stage(StrEnum):
    """How often a part of a denoiser runs; see the module's docstring."""

    SHAPE = "shape"
    PROMPT = "prompt"
    TIMESTEP = "timestep"
    STEP = "step"


StageInputs = Mapping[str, tuple[str, ...]]
"""`prompt` and `timestep` → names of the inputs that define them."""

CELLS = (21, 45, 80)
"""Latent frames, rows and columns in patches that sizes are judged by: 81 frames at 720p."""
MAX_KEPT_BYTES = 64 * 2**20
"""Largest value to keep there: a rotary table takes 37 MiB, one activation of a 14B model 740."""
MAX_CONSTANT_BYTES = 2**20
"""Largest value to keep that depends on weights alone: those are in memory already."""

_SIZES = "sizes"
_ANYTHING = "anything"
_SIZE_OPS = frozenset({aten.sym_size.int, aten.sym_numel.default})
_CASTS = frozenset({aten.to.dtype, aten.to.dtype_layout})
_VIEWS = frozenset(
    {
        aten.alias.default,
        aten.chunk.default,
        aten.detach.default,
        aten.expand.default,
        aten.permute.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.squeeze.dim,
        aten.transpose.int,
        aten.unbind.int,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.view.default,
    }
)


@dataclass(frozen=True)
class Split:
    """A graph in stages.

    Attributes:
        nodes: stage → the nodes it runs, in graph order; inputs are in none, a view or a weight
            may be in several.
        kept: stage → the values it hands to others.
        refused: values that could be kept but are too large.
    """

    nodes: Mapping[Stage, tuple[Node, ...]]
    kept: Mapping[Stage, tuple[Node, ...]]
    refused: tuple[Node, ...]


def split(graph: Graph, inputs: Sequence[Node], stages: StageInputs) -> Split:
    """Give each node of `graph` that its outputs need to the stages that run it.

    Args:
        graph: without writes in place, see `writes_in_place`.
        inputs: placeholders of what a caller passes; other placeholders are weights.
        stages: which of them define a stage; an input in none is new at each step.
    """
    depends = _dependencies(graph, inputs)
    sizes = clip_sizes(inputs, CELLS)
    readers: dict[Node, set[Stage]] = defaultdict(set)
    nodes: dict[Stage, list[Node]] = {stage: [] for stage in Stage}
    kept: dict[Stage, list[Node]] = {stage: [] for stage in Stage}
    refused = []
    for node in reversed(graph.nodes):
        if node.op == "placeholder":
            continue
        where = {Stage.STEP} if node.op == "output" else readers[node]
        home = _home(depends[node], stages)
        if where - {home} and home != Stage.STEP and _can_be_kept(node):
            if _is_small(node, depends[node], sizes):
                kept[home].append(node)
                where = {home}
            else:
                refused.append(node)
        for stage in where:
            if node.op != "output":
                nodes[stage].append(node)
            for source in node.all_input_nodes:
                readers[source].add(stage)
    return Split(
        {stage: tuple(reversed(found)) for stage, found in nodes.items()},
        {stage: tuple(reversed(found)) for stage, found in kept.items()},
        tuple(reversed(refused)),
    )


def writes_in_place(graph: Graph) -> Node | None:
    """The first node that changes one of its arguments; such a graph cannot be split."""
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            return node
    return None


def kept_bytes(node: Node, inputs: Sequence[Node]) -> int:
    """Bytes of a kept value for one clip of 81 frames at 720p with 512 text tokens."""
    return nbytes(node.meta["val"], clip_sizes(inputs, CELLS))


def _dependencies(graph: Graph, inputs: Sequence[Node]) -> dict[Node, frozenset[str]]:
    """Node → names of the inputs whose values it depends on, and whether on any sizes."""
    depends = {node: frozenset({str(node.target)}) for node in inputs}
    given = set(inputs)
    for node in graph.nodes:
        if node in depends:
            continue
        if node.target in _SIZE_OPS and node.args[0] in given:
            depends[node] = frozenset({_SIZES})
        elif torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            depends[node] = frozenset({_ANYTHING})
        else:
            depends[node] = frozenset().union(*(depends[n] for n in node.all_input_nodes))
    return depends


def _home(depends: frozenset[str], stages: StageInputs) -> Stage:
    names = depends - {_SIZES}
    if not names:
        return Stage.SHAPE
    for stage in (Stage.PROMPT, Stage.TIMESTEP):
        if names <= set(stages.get(stage, ())):
            return stage
    return Stage.STEP


def _can_be_kept(node: Node) -> bool:
    """A number, or a tensor with memory of its own."""
    return node.op == "call_function" and not isinstance(_value(node), tuple) and not _is_view(node)


def _is_view(node: Node) -> bool:
    """Whether a call gives its first argument's memory."""
    if node.target is operator.getitem:
        return _is_view(node.args[0])  # type: ignore[arg-type]
    if node.target in _CASTS:
        source = node.args[0].meta.get("val")  # type: ignore[union-attr]
        return isinstance(source, Tensor) and source.dtype == node.meta["val"].dtype
    return node.target in _VIEWS


def _is_small(node: Node, depends: frozenset[str], sizes: Mapping[Any, int]) -> bool:
    return nbytes(_value(node), sizes) <= (MAX_KEPT_BYTES if depends else MAX_CONSTANT_BYTES)


def _value(node: Node) -> Any:
    value = node.meta.get("val")
    return tuple(value) if isinstance(value, list | tuple) else value


def is_number(node: Node) -> bool:
    """Whether a node's value is a size rather than a tensor."""
    return not isinstance(_value(node), Tensor | tuple)
