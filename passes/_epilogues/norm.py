"""The norm of the stream that is quantized as the branch is added.

s = gated_residual(…); norm_quantize(s, …)  →  s, q, scale = residual_norm_quantize(…)
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from turbo_opt.compiler.base import PassResult
from turbo_opt.compiler.context import PassContext
from turbo_opt.compiler.rewrite import Editor, Found, Miss, is_call, rewrite_each
from turbo_opt.ir.edit import dependents
from turbo_opt.ir.program import Denoiser, Program
from turbo_opt.passes._epilogues.comparison import observe

ops = torch.ops.turbo_opt
AFTER_RESIDUAL: dict[Any, Any] = {
    ops.adaln_quantize.default: ops.residual_adaln_quantize.default,
    ops.layer_norm_quantize.default: ops.residual_layer_norm_quantize.default,
}
"""A norm → the operator that makes the sum and its norm."""


def fuse_residual_norm(program: Program, context: PassContext) -> PassResult:
    """Add the branch, and quantize the norm of the sum, by one operator."""
    return rewrite_each(program, context, match_norm, emit_norm, observe, stream_and_norm)


def match_norm(node: Node, denoiser: Denoiser) -> Found | Miss | None:
    """A quantized norm of the residual stream, right after a branch was added to it."""
    if node.op != "call_function" or node.target not in AFTER_RESIDUAL:
        return None
    stream: Any = node.args[0]
    if is_call(stream, ops.linear_gated_residual.default):
        return None
    if not is_call(stream, ops.gated_residual.default):
        return Miss("what the norm reads is not a sum that this pass has fused")
    between = dependents(stream, until=node)
    if any(operand in between for operand in node.all_input_nodes):
        return Miss("scale and shift of the norm depend on the stream")
    operands = (*stream.all_input_nodes, *node.all_input_nodes)
    inputs = tuple(n for n in operands if n.op != "placeholder" and n is not stream)
    return Found(node, node, inputs, {"stream": stream, "between": between})


def emit_norm(found: Found, editor: Editor) -> Mapping[Node, Node]:
    """The fused operator at the norm; what reads the stream before that moves behind it."""
    norm, stream = found.output, found.parts["stream"]
    fused = editor.call(AFTER_RESIDUAL[norm.target], *stream.args, *norm.args[1:])
    parts = [editor.call(operator.getitem, fused, index) for index in range(3)]
    position = parts[-1]
    for node in found.parts["between"]:
        position.append(node)
        position = node
    items = {node: parts[1 + _index(node)] for node in norm.users}
    return {stream: parts[0], **items}


def stream_and_norm(
    found: Found, new: Mapping[Node, Node], editor: Editor
) -> Sequence[tuple[Node, Node]]:
    """The stream, and values times scales of its norm."""
    stream = found.parts["stream"]
    (fused,) = new[stream].all_input_nodes
    return [(stream, new[stream]), (found.output, fused)]


def _index(item: Node) -> int:
    index = item.args[1]
    assert isinstance(index, int)
    return index
