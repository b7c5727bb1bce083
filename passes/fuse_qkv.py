"""Merge the linear layers of an attention that read one input into one wide product.

    linear(x, W₁, b₁), linear(x, W₂, b₂), …  →  split(linear(x, [W₁; W₂; …], [b₁; b₂; …]))

q, k and v of self-attention; k and v of cross-attention, and of its image tokens. The parts are
views of the wide result. `block_linear` is merged in the same way where every part is whole
128-row blocks, so that values and scales are those of the single layers.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch.fx import Node

import turbo_opt.kernels  # noqa: F401  (registers turbo_opt::*)
from turbo_opt.compiler.base import Numerics, Pass, PassOptions, PassResult, register_pass
from turbo_opt.compiler.blocks import BlockIndex, is_attention
from turbo_opt.compiler.context import PassContext
from turbo_opt.compiler.rewrite import Editor, Found, Miss, dtype_of, rewrite_each, tensor_of
from turbo_opt.ir.facts import Fact
from turbo_opt.ir.program import Denoiser, Program
from turbo_opt.ir.transforms import concatenated
from turbo_opt.passes._attention import hidden_states

aten = torch.ops.aten
_BLOCK_LINEAR = torch.ops.turbo_opt.block_linear.default
_WEIGHTS_OF: dict[Any, slice] = {aten.linear.default: slice(1, 3), _BLOCK_LINEAR: slice(2, 5)}
"""Which arguments are weights: weight and bias, or values, scales and bias."""
_ROWS = 128


@register_pass
class FuseQKV(Pass):
    name = "fuse-qkv"
    requires = frozenset({Fact.CANONICAL})
    numerics = Numerics.REORDERS

    class Options(PassOptions):
        cross_attention: bool = Field(
            True,
            description="merge k and v of cross-attention too; not worth it where "
            "hoist-invariants follows, which computes them once a prompt and keeps what is merged",
        )

    def run(self, program: Program, options: PassOptions, context: PassContext) -> PassResult:
        assert isinstance(options, self.Options)
        rewrite = _FuseQKV(program, options.cross_attention)
        return rewrite_each(program, context, rewrite.match, rewrite.replace, compare=side_by_side)


class _FuseQKV:
    """The match and the rewrite, with the blocks and weight names of every denoiser."""

    def __init__(self, program: Program, cross_attention: bool) -> None:
        self._blocks = {denoiser.name: BlockIndex(denoiser) for denoiser in program}
        self._names = {denoiser.name: denoiser.parameters() for denoiser in program}
        self._cross_attention = cross_attention
        self._queried = {denoiser.name: _queried(denoiser) for denoiser in program}

    def match(self, node: Node, denoiser: Denoiser) -> Found | Miss | None:
        """The first of several layers of one attention that read the same input."""
        names = self._names[denoiser.name]
        module = _parent_module(node, names)
        if module is None or not self._blocks[denoiser.name].contains(module):
            return None
        alike = {
            other
            for other in node.args[0].users  # type: ignore[union-attr]
            if other.target is node.target and _parent_module(other, names) == module
        }
        layers = [other for other in denoiser.graph.nodes if other in alike]
        if len(layers) < 2 or layers[0] is not node:
            return None
        if not self._cross_attention and node.args[0] not in self._queried[denoiser.name]:
            return Miss("k and v of cross-attention, left alone by the recipe")
        objection = _objection(layers, names)
        if objection is not None:
            return Miss(objection)
        inputs = tuple(node.args[: _WEIGHTS_OF[node.target].start])
        return Found(node, node, inputs, {"layers": layers, "names": names})  # type: ignore[arg-type]

    def replace(self, found: Found, editor: Editor) -> Mapping[Node, Node]:
        """One layer with the weights one below the other, and views of its parts."""
        layers, names = found.parts["layers"], found.parts["names"]
        arguments = list(_arguments(layers[0]))
        arguments[_WEIGHTS_OF[layers[0].target]] = [
            None if None in parts else _merged_weight([names[part] for part in parts], editor)
            for parts in zip(*map(_weights, layers), strict=True)
        ]
        wide = editor.call(layers[0].target, *arguments)
        sizes = [tensor_of(layer).shape[-1] for layer in layers]
        split = editor.call(aten.split_with_sizes.default, wide, sizes, -1)
        return {
            layer: editor.call(operator.getitem, split, index) for index, layer in enumerate(layers)
        }


def side_by_side(
    found: Found, new: Mapping[Node, Node], editor: Editor
) -> Sequence[tuple[Node, Node]]:
    """The results of the single layers side by side, and so the parts of the wide one."""
    layers = found.parts["layers"]
    parts = [new[layer] for layer in layers]
    editor.before(layers[-1].next)
    joined = (editor.call(aten.cat.default, items, -1) for items in (layers, parts))
    return [tuple(joined)]  # type: ignore[list-item]


def _queried(denoiser: Denoiser) -> set[Node]:
    """The hidden states that queries are projections of."""
    queries = (node.all_input_nodes[0] for node in denoiser.graph.nodes if is_attention(node))
    return {source for query in queries for source in hidden_states(query)}


def _objection(layers: Sequence[Node], names: Mapping[Node, str]) -> str | None:
    """Why these layers cannot be merged, in one clause."""
    slots = list(zip(*map(_weights, layers), strict=True))
    for parts in slots:
        if any(part is None for part in parts) != all(part is None for part in parts):
            return "some of the layers have a bias and some have none"
    weights = [part for parts in slots for part in parts if part is not None]
    if any(part not in names for part in weights):
        return "a bias is computed in the graph"
    if any(len(part.users) > 1 for part in weights):
        return "a weight is read by another layer too"
    if any(len({dtype_of(part) for part in parts}) > 1 for parts in slots if None not in parts):
        return "the weights are stored in different dtypes"
    settings = _WEIGHTS_OF[layers[0].target].stop
    if any(layer.args[settings:] != layers[0].args[settings:] for layer in layers):
        return "the layers differ in scheme or in the dtype of the result"
    if layers[0].target is _BLOCK_LINEAR:
        for layer in layers:
            rows = tensor_of(layer).shape[-1]
            if rows % _ROWS:
                return f"{rows} output channels are not whole blocks of {_ROWS}"
    return None


def _parent_module(node: Node, names: Mapping[Node, str]) -> str | None:
    """`blocks.0.attn1` for a layer with a stored weight `blocks.0.attn1.to_q.weight`, in use."""
    if node.op != "call_function" or node.target not in _WEIGHTS_OF or not node.users:
        return None
    name = names.get(_weights(node)[0])  # type: ignore[arg-type]
    return None if name is None else name.rpartition(".")[0].rpartition(".")[0]


def _weights(layer: Node) -> tuple[Node | None, ...]:
    return tuple(_arguments(layer)[_WEIGHTS_OF[layer.target]])


def _arguments(layer: Node) -> tuple[Any, ...]:
    """A layer's arguments, a bias that is left out as None."""
    return (*layer.args, None)[:3] if layer.target is aten.linear.default else layer.args


def _merged_weight(names: Sequence[str], editor: Editor) -> Node:
    tensor = concatenated(*(editor.denoiser.weights[name] for name in names))
    return editor.weight(merged_name(names), tensor)


def merged_name(names: Sequence[str]) -> str:
    """`a.to_q.weight`, `a.to_k.weight`, `a.to_v.weight` → `a.to_qkv.weight`."""
    kind = names[0].rpartition(".")[2]
    modules = [name.removesuffix(f".{kind}") for name in names]
    start = _shared(modules)
    rests = [module[start:] for module in modules]
    end = _shared([rest[::-1] for rest in rests])
    middle = "".join(rest[: len(rest) - end] for rest in rests)
    return f"{modules[0][:start]}{middle}{rests[0][len(rests[0]) - end :]}.{kind}"


def _shared(texts: Sequence[str]) -> int:
    """How many characters all `texts` begin with."""
    return next(
        (i for i, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1),
        min(map(len, texts)),
    )
