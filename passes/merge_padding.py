"""Compute a prompt's padding once: attention to equal keys counts them instead.

    scaled_dot_product_attention(q, k, v)  →  padded_attention(q, k, v, start)
    start = the first row of the embeddings from which on all rows are equal

A prompt of 100 tokens comes padded to 512, and what pads is one embedding: its keys and values are
all alike, in every layer. `start` is found in the embeddings themselves, once for each prompt, so
nothing is assumed about what pads, and embeddings without padding give attention as before.

k and v must each follow from one sequence of embeddings row by row, and that from an input that a
step does not change. Where a GPU has e4m3, `fuse-epilogues` lets the operator write the quantized
activation of the next layer. The pass stands before `quantize-linear`, which hides the layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from turbo_opt.compiler.base import Numerics, Pass, PassOptions, PassResult, register_pass
from turbo_opt.compiler.context import PassContext
from turbo_opt.compiler.rewrite import (
    Editor,
    Found,
    Miss,
    is_call,
    named_args,
    rewrite_each,
    tensor_of,
)
from turbo_opt.ir.edit import user_inputs
from turbo_opt.ir.facts import Fact
from turbo_opt.ir.program import Denoiser, Program
from turbo_opt.kernels.padded_attention import HEAD_DIMS
from turbo_opt.passes._attention import (
    attention_kind,
    is_dense_attention,
    tokens_first,
    unlike_plain_attention,
)

aten = torch.ops.aten
ops = torch.ops.turbo_opt
_ROW_BY_ROW = frozenset(
    {
        aten.gelu.default,
        aten.layer_norm.default,
        aten.linear.default,
        aten.rms_norm.default,
        aten.silu.default,
        aten.to.dtype,
        ops.layer_norm.default,
        ops.rms_norm.default,
    }
)
"""Equal rows of their first operand stay equal, if a norm is of the last axis alone."""
_OF_A_STEP = ("hidden_states", "timestep")


@register_pass
class MergePadding(Pass):
    name = "merge-padding"
    requires = frozenset({Fact.CANONICAL})
    numerics = Numerics.REORDERS

    class Options(PassOptions):
        pass

    def run(self, program: Program, options: PassOptions, context: PassContext) -> PassResult:
        rewrite = _MergePadding()
        return rewrite_each(program, context, rewrite.match, rewrite.replace)


class _MergePadding:
    """The match and the rewrite, and where each sequence's padding begins."""

    def __init__(self) -> None:
        self._starts: dict[Node, Node] = {}

    def match(self, node: Node, denoiser: Denoiser) -> Found | Miss | None:
        """Dense cross-attention to embeddings that are the same at every step."""
        if not is_dense_attention(node) or attention_kind(node) == "self":
            return None
        objection = unlike_plain_attention(node, HEAD_DIMS)
        if objection is not None:
            return Miss(objection)
        call = named_args(node)
        embeddings = _embeddings(call["key"])
        if embeddings is None or embeddings is not _embeddings(call["value"]):
            return Miss("k and v do not follow row by row from one sequence of embeddings")
        if _changes_at_a_step(embeddings, denoiser):
            return Miss("what it attends to is new at every step")
        inputs = (*node.args[:3], embeddings)
        return Found(node, node, inputs, {"embeddings": embeddings})  # type: ignore[arg-type]

    def replace(self, found: Found, editor: Editor) -> Node:
        """The operator on the same heads, with the scale of the graph."""
        q, k, v, embeddings = found.inputs
        if embeddings not in self._starts:
            self._starts[embeddings] = _start_of_padding(embeddings, editor)
        start, scale = self._starts[embeddings], named_args(found.anchor)["scale"]
        return editor.call(ops.padded_attention.default, q, k, v, start, scale)


def _embeddings(heads: Node) -> Node | None:
    """The (B, T, C) tensor of which heads (B, H, T, D) are a function row by row; else None."""
    split = tokens_first(heads)
    if split is None or not is_call(split, aten.unflatten.int) or tensor_of(split).ndim != 4:
        return None
    if named_args(split)["dim"] not in (2, -1):
        return None
    node: Any = split
    while node is split or _is_row_by_row(node):
        node = node.args[0]
    return node if tensor_of(node).ndim == 3 else None


def _is_row_by_row(node: Node) -> bool:
    """Whether rows of the first operand stay apart, and equal ones equal."""
    if node.op != "call_function" or node.target not in _ROW_BY_ROW:
        return False
    return len(named_args(node).get("normalized_shape", [-1])) == 1  # a norm may take more axes


def _changes_at_a_step(node: Node, denoiser: Denoiser) -> bool:
    """Whether `node` depends on the noisy clip or on the noise level."""
    changing = {n for n in user_inputs(denoiser.exported) if str(n.target) in _OF_A_STEP}
    stack, seen = [node], set[Node]()
    while stack:
        current = stack.pop()
        if current in changing:
            return True
        if current not in seen:
            seen.add(current)
            sized = isinstance(current.meta.get("val"), torch.SymInt)  # not by its values
            stack.extend([] if sized else current.all_input_nodes)
    return False


def _start_of_padding(embeddings_BTC: Node, editor: Editor) -> Node:
    """(B,) int32: one more than the last row that differs from the last of all; else 0."""
    last = editor.call(aten.slice.Tensor, embeddings_BTC, 1, -1)
    differs = editor.call(aten.ne.Tensor, embeddings_BTC, last)
    differs = editor.call(aten.any.dim, differs, 2)
    ones = editor.call(aten.ones_like.default, differs, dtype=torch.int32)
    count = editor.call(aten.cumsum.default, ones, 1, dtype=torch.int32)
    return editor.call(aten.amax.default, editor.call(aten.mul.Tensor, count, differs), [1])
