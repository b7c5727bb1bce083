"""Gelu that writes the quantized activation, and the layer before it that does.

quantize(gelu_tanh(x))                →  gelu_quantize(x)
gelu_quantize(block_linear(q, w, …))  →  linear_gelu_quantize(q, w, …)
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
from turbo_opt.passes._epilogues.comparison import in_float32, observe, widened

aten = torch.ops.aten
ops = torch.ops.turbo_opt


def fuse_gelu(program: Program, context: PassContext) -> PassResult:
    """Let gelu write what the next layer reads."""
    return rewrite_each(program, context, match_gelu, emit_gelu, observe, in_float32)


def fuse_linear_gelu(program: Program, context: PassContext) -> PassResult:
    """Let the layer before gelu write what the next layer reads."""
    return rewrite_each(
        program, context, match_linear_gelu, emit_linear_gelu, observe, layer_in_float32
    )


def match_gelu(node: Node, denoiser: Denoiser) -> Found | Miss | None:
    """A quantization whose input is a gelu for that alone."""
    if not is_call(node, ops.quantize_activation.default):
        return None
    gelu, scheme = named_args(node).values()
    if not is_call(gelu, aten.gelu.default):
        return None
    x, approximate = named_args(gelu).values()
    if approximate != "tanh":
        return Miss("the gelu is not the tanh form")
    if only_user(gelu) is not node:
        return Miss("the gelu's 16-bit result is read by a layer that is not quantized")
    return Found(node, node, (x,), {"scheme": scheme})


def emit_gelu(found: Found, editor: Editor) -> Node:
    return editor.call(ops.gelu_quantize.default, found.inputs[0], found.parts["scheme"])


def match_linear_gelu(node: Node, denoiser: Denoiser) -> Found | Miss | None:
    """A quantized gelu of a layer of the same scheme that is read by it alone."""
    if not is_call(node, ops.gelu_quantize.default):
        return None
    layer, scheme = named_args(node).values()
    if not is_call(layer, ops.block_linear.default):
        return None
    arguments = named_args(layer)
    if arguments["scheme"] != scheme:
        return Miss(f"the layer is {arguments['scheme']} and its result {scheme}")
    if only_user(layer) is not node:
        return Miss("the layer's 16-bit result is read by another operator too")
    inputs = (arguments["q"], arguments["q_scale"])
    return Found(node, node, inputs, {"arguments": arguments})


def emit_linear_gelu(found: Found, editor: Editor) -> Node:
    return editor.call(ops.linear_gelu_quantize.default, *found.parts["arguments"].values())


def layer_in_float32(found: Found, new: Node, editor: Editor) -> Sequence[tuple[Node, Node]]:
    """Both forms with sums and bias in float32."""
    arguments = {**found.parts["arguments"], "dtype": torch.float32}
    arguments["bias"] = widened(arguments["bias"], editor)
    layer = editor.call(ops.block_linear.default, *arguments.values())
    before = editor.call(ops.gelu_quantize.default, layer, arguments["scheme"])
    return [(before, editor.call(new.target, *arguments.values()))]  # type: ignore[arg-type]
