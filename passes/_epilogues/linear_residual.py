"""The layer at a branch's end that adds to the stream itself.

gated_residual(x, block_linear(q, w, …), g)  →  linear_gated_residual(q, w, …, x, g)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from turbo_opt.compiler.base import PassResult
from turbo_opt.compiler.context import PassContext
from turbo_opt.compiler.rewrite import (
    Editor,
    Found,
    Miss,
    is_call,
    named_args,
    only_user,
    rewrite_each,
)
from turbo_opt.ir.program import Denoiser, Program
from turbo_opt.passes._epilogues.comparison import observe, widened

ops = torch.ops.turbo_opt


def fuse_linear_residual(program: Program, context: PassContext) -> PassResult:
    """Let the layer before a residual sum make the sum."""
    return rewrite_each(
        program, context, match_linear_residual, emit_linear_residual, observe, sum_in_float32
    )


def match_linear_residual(node: Node, denoiser: Denoiser) -> Found | Miss | None:
    """A sum one of whose terms, times the gate if there is one, is a quantized layer's result."""
    if not is_call(node, ops.gated_residual.default):
        return None
    x, layer, gate = named_args(node).values()
    if gate is None and not is_call(layer, ops.block_linear.default):
        x, layer = layer, x
    if not is_call(layer, ops.block_linear.default):
        return Miss("what is added to the stream is not the result of a quantized layer")
    if only_user(layer) is not node or layer in (x, gate):
        return Miss("the layer's 16-bit result has another use too")
    arguments = named_args(layer)
    operands = (arguments["q"], arguments["q_scale"], x, gate)
    inputs = tuple(operand for operand in operands if operand is not None)
    return Found(node, node, inputs, {"arguments": arguments, "x": x, "gate": gate})


def emit_linear_residual(found: Found, editor: Editor) -> Node:
    *layer, scheme, _ = found.parts["arguments"].values()  # the sum has the dtype of the stream
    x, gate = found.parts["x"], found.parts["gate"]
    return editor.call(ops.linear_gated_residual.default, *layer, x, gate, scheme)


def sum_in_float32(found: Found, new: Node, editor: Editor) -> Sequence[tuple[Node, Node]]:
    """Both forms with bias, stream and gate in float32."""
    arguments = {**found.parts["arguments"], "dtype": torch.float32}
    arguments["bias"] = widened(arguments["bias"], editor)
    y = editor.call(ops.block_linear.default, *arguments.values())
    x, gate = (widened(found.parts[name], editor) for name in ("x", "gate"))
    before = editor.call(ops.gated_residual.default, x, y, gate)
    fused = named_args(new)
    fused.update({name: widened(fused[name], editor) for name in ("bias", "x", "gate")})
    return [(before, editor.call(ops.linear_gated_residual.default, *fused.values()))]
