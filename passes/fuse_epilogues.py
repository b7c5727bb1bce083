"""Fuse what follows a linear layer or attention: activation, gate, residual, with quantization.

    quantize(gelu_tanh(x))                        →  gelu_quantize(x)
    gelu_quantize(block_linear(q, w, …))          →  linear_gelu_quantize(q, w, …)
    quantize(norm_rope_sagesla(q, k, v, …))       →  norm_rope_sagesla_quantize(q, k, v, …)
    quantize(heads joined of padded_attention(…)) →  padded_attention_quantize(…)
    cast(cast(x, f32) + cast(y, f32) · gate)      →  gated_residual(x, y, gate)
    x + y, where a norm reads the sum             →  gated_residual(x, y)
    gated_residual(x, block_linear(q, w, …), g)   →  linear_gated_residual(q, w, …, x, g)
    s = gated_residual(…); norm_quantize(s, …)    →  s, q, scale = residual_norm_quantize(…)

The same formulas with a wider intermediate: what gelu and attention give, and what gelu is given by
a layer, is no longer rounded to 16 bits before its 8-bit rounding, in which one bit of that decides
now and then, so the two forms are compared on operands cast to float32; so is what a layer adds to
the stream. The norms read the residual stream as it is stored, and all else that reads it still
does. Attention and a layer with its gelu are fused where a scale belongs to one token: a block of
128 tokens (`int8-block`) is more than a program of attention, or a warp of the product, holds.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.fx import Node

from turbo_opt.compiler.base import Numerics, Pass, PassOptions, PassResult, register_pass
from turbo_opt.compiler.context import PassContext
from turbo_opt.compiler.rewrite import (
    Editor,
    Found,
    Miss,
    dtype_of,
    is_call,
    merge_results,
    named_args,
    only_user,
    rewrite_each,
    tensor_of,
)
from turbo_opt.ir.edit import dependents
from turbo_opt.ir.facts import Fact
from turbo_opt.ir.program import Denoiser, Program
from turbo_opt.kernels import SCHEMES, dequantize_activation
from turbo_opt.kernels.schemes import BLOCK
from turbo_opt.passes._attention import joined_channels, joins_last_two, tokens_first

aten = torch.ops.aten
ops = torch.ops.turbo_opt
_AFTER_RESIDUAL: dict[Any, Any] = {
    ops.adaln_quantize.default: ops.residual_adaln_quantize.default,
    ops.layer_norm_quantize.default: ops.residual_layer_norm_quantize.default,
}
_NORMS = frozenset({ops.adaln.default, ops.layer_norm.default, *_AFTER_RESIDUAL})


@register_pass
class FuseEpilogues(Pass):
    name = "fuse-epilogues"
    requires = frozenset({Fact.NORMS_FUSED})
    numerics = Numerics.REORDERS

    class Options(PassOptions):
        gelu: bool = Field(True, description="let gelu write the quantized activation")
        linear_gelu: bool = Field(
            False, description="let the layer before gelu write its quantized result itself"
        )
        attention: bool = Field(True, description="let attention write the quantized activation")
        residual: bool = Field(True, description="add a branch to the stream, gated, in one step")
        linear_residual: bool = Field(
            False, description="let the layer before a residual sum add to the stream itself"
        )
        residual_norm: bool = Field(
            True, description="quantize the norm of the stream as the branch is added"
        )

    def run(self, program: Program, options: PassOptions, context: PassContext) -> PassResult:
        assert isinstance(options, self.Options)
        results = []
        if options.gelu:
            results.append(
                rewrite_each(program, context, match_gelu, emit_gelu, observe, in_float32)
            )
        if options.linear_gelu:
            results.append(
                rewrite_each(
                    program, context, match_linear_gelu, emit_linear_gelu, observe, layer_in_float32
                )
            )
        if options.attention:
            results.append(
                rewrite_each(program, context, match_attention, emit_attention, observe, in_float32)
            )
            results.append(
                rewrite_each(
                    program, context, match_padded, emit_padded, observe, padded_in_float32
                )
            )
        if options.residual:
            results.append(rewrite_each(program, context, match_residual, emit_residual))
        if options.linear_residual:
            results.append(
                rewrite_each(
                    program, context, match_linear_residual, emit_linear_residual, observe,
                    sum_in_float32,
                )
            )  # fmt: skip
        if options.residual_norm:
            results.append(
                rewrite_each(program, context, match_norm, emit_norm, observe, stream_and_norm)
            )
        return merge_results(program, results)


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
    """A quantized gelu of a layer that is read by it alone, scales belonging to one token."""
    if not is_call(node, ops.gelu_quantize.default):
        return None
    layer, scheme = named_args(node).values()
    if not is_call(layer, ops.block_linear.default):
        return None
    arguments = named_args(layer)
    if arguments["scheme"] != scheme:
        return Miss(f"the layer is {arguments['scheme']} and its result {scheme}")
    if SCHEMES[scheme].activation_block[0] > 1:
        return Miss(f"a scale of {scheme} spans more tokens than a warp of the product holds")
    if only_user(layer) is not node:
        return Miss("the layer's 16-bit result is read by another operator too")
    inputs = (arguments["q"], arguments["q_scale"])
    return Found(node, node, inputs, {"arguments": arguments})


def emit_linear_gelu(found: Found, editor: Editor) -> Node:
    return editor.call(ops.linear_gelu_quantize.default, *found.parts["arguments"].values())


def layer_in_float32(found: Found, new: Node, editor: Editor) -> Sequence[tuple[Node, Node]]:
    """Both forms with sums and bias in float32."""
    arguments = {**found.parts["arguments"], "dtype": torch.float32}
    arguments["bias"] = _widened(arguments["bias"], editor)
    layer = editor.call(ops.block_linear.default, *arguments.values())
    before = editor.call(ops.gelu_quantize.default, layer, arguments["scheme"])
    return [(before, editor.call(new.target, *arguments.values()))]  # type: ignore[arg-type]


def match_attention(node: Node, denoiser: Denoiser) -> Found | Miss | None:
    """A quantization by token whose input is 8-bit attention for that alone."""
    if not is_call(node, ops.quantize_activation.default):
        return None
    attention, scheme = named_args(node).values()
    if not is_call(attention, ops.norm_rope_sagesla.default):
        return None
    if SCHEMES[scheme].activation_block[0] > 1:
        return Miss(f"a scale of {scheme} spans more tokens than attention holds at once")
    if only_user(attention) is not node:
        return Miss("the attention's 16-bit result is read by a layer that is not quantized")
    arguments = tuple(named_args(attention).values())
    return Found(node, node, arguments[:3], {"arguments": (*arguments, scheme)})


def emit_attention(found: Found, editor: Editor) -> Node:
    return editor.call(ops.norm_rope_sagesla_quantize.default, *found.parts["arguments"])


def match_padded(node: Node, denoiser: Denoiser) -> Found | Miss | None:
    """A quantization by token of the joined heads of attention to a padded prompt."""
    if not is_call(node, ops.quantize_activation.default):
        return None
    joined: Node = named_args(node)["x"]
    scheme: str = named_args(node)["scheme"]
    attention = tokens_first(joined.args[0]) if joins_last_two(joined) else None
    if attention is None or not is_call(attention, ops.padded_attention.default):
        return None
    if SCHEMES[scheme].activation_block[0] > 1:
        return Miss(f"a scale of {scheme} spans more tokens than attention holds at once")
    if tensor_of(attention).shape[-1] != BLOCK:
        return Miss(f"its heads are not groups of {BLOCK} channels, which share a scale")
    if joined_channels(attention) is not joined or only_user(joined) is not node:
        return Miss("the attention's 16-bit result is read by a layer that is not quantized")
    q, k, v, start, scale = named_args(attention).values()
    parts = {"arguments": (q, k, v, start, scale, scheme), "joined": joined}
    return Found(node, node, (q, k, v, start), parts)


def emit_padded(found: Found, editor: Editor) -> Node:
    return editor.call(ops.padded_attention_quantize.default, *found.parts["arguments"])


def padded_in_float32(found: Found, new: Node, editor: Editor) -> Sequence[tuple[Node, Node]]:
    """Both forms on q, k and v cast to float32."""
    *qkv, start, scale, scheme = found.parts["arguments"]
    wide = [_widened(x, editor) for x in qkv]
    heads = editor.call(ops.padded_attention.default, *wide, start, scale)
    joined = editor.call(
        aten.flatten.using_ints, editor.call(aten.permute.default, heads, [0, 2, 1, 3]), 2, 3
    )
    before = editor.call(ops.quantize_activation.default, joined, scheme)
    after = editor.call(ops.padded_attention_quantize.default, *wide, start, scale, scheme)
    return [(before, after)]


def in_float32(found: Found, new: Node, editor: Editor) -> Sequence[tuple[Node, Node]]:
    """Both forms on operands cast to float32."""

    def wide(operands: Sequence[Any]) -> Iterator[Any]:
        for x in operands:
            yield _widened(x, editor) if isinstance(x, Node) else x

    source, scheme = named_args(found.output).values()
    unquantized = editor.call(source.target, *wide(source.args), **source.kwargs)
    before = editor.call(ops.quantize_activation.default, unquantized, scheme)
    return [(before, editor.call(new.target, *wide(new.args)))]  # type: ignore[arg-type]


def match_residual(node: Node, denoiser: Denoiser) -> Found | Miss | None:
    """A sum of two (B, L, C) tensors: one is a product with a gate, or a norm reads the sum."""
    if not is_call(node, aten.add.Tensor):
        return None
    left, right, alpha = named_args(node).values()
    if alpha != 1 or not _is_like(left, node) or not _is_like(right, node):
        return None
    output = _cast_back(node)
    terms = _gated(left, right) or _gated(right, left)
    if terms is None:
        if not any(user.target in _NORMS for user in output.users):
            return None
        terms = (_before_widening(left), _before_widening(right), None)
    x, y, gate = terms
    if dtype_of(x) != dtype_of(output):
        return Miss(f"the sum is read in {dtype_of(output)} while x is {dtype_of(x)}")
    if dtype_of(y) != dtype_of(x):
        return Miss(f"the branch is {dtype_of(y)} while x is {dtype_of(x)}")
    inputs = (x, y) if gate is None else (x, y, gate)
    return Found(node, output, inputs, {"gate": gate})


def emit_residual(found: Found, editor: Editor) -> Node:
    x, y = found.inputs[:2]
    return editor.call(ops.gated_residual.default, x, y, found.parts["gate"])


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
    arguments["bias"] = _widened(arguments["bias"], editor)
    y = editor.call(ops.block_linear.default, *arguments.values())
    x, gate = (_widened(found.parts[name], editor) for name in ("x", "gate"))
    before = editor.call(ops.gated_residual.default, x, y, gate)
    fused = named_args(new)
    fused.update({name: _widened(fused[name], editor) for name in ("bias", "x", "gate")})
    return [(before, editor.call(ops.linear_gated_residual.default, *fused.values()))]


def match_norm(node: Node, denoiser: Denoiser) -> Found | Miss | None:
    """A quantized norm of the residual stream, right after a branch was added to it."""
    if node.op != "call_function" or node.target not in _AFTER_RESIDUAL:
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
    fused = editor.call(_AFTER_RESIDUAL[norm.target], *stream.args, *norm.args[1:])
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


def observe(value: Any) -> Tensor:
    """A tensor as it is; of (…, values, scales) what the next layer sees."""
    if isinstance(value, Tensor):
        return value
    values, scales = value[-2:]
    (scheme,) = (name for name, scheme in SCHEMES.items() if scheme.dtype == values.dtype)
    return dequantize_activation(values, scales, scheme)


def _widened(operand: Node | None, editor: Editor) -> Node | None:
    """The operand in float32, None as it is."""
    return None if operand is None else editor.call(aten.to.dtype, operand, torch.float32)


def _gated(x: Node, branch: Node) -> tuple[Node, Node, Node | None] | None:
    """(x, y, gate) where `branch` is y · gate, for this sum alone."""
    if not is_call(branch, aten.mul.Tensor) or only_user(branch) is None:
        return None
    x = _before_widening(x)
    left, right = named_args(branch).values()
    for y, gate in ((left, right), (right, left)):
        if isinstance(gate, Node) and _is_like(y, branch) and _modulates(gate, branch):
            y = _before_widening(y)
            if dtype_of(y) == dtype_of(x) and dtype_of(gate) in (torch.float32, dtype_of(x)):
                return x, y, gate
    return None


def _index(item: Node) -> int:
    index = item.args[1]
    assert isinstance(index, int)
    return index


def _modulates(gate: Node, branch: Node) -> bool:
    """Whether `gate` is (B or 1, L or 1, C) for `branch` (B, L, C)."""
    sides, full = _sizes(gate), _sizes(branch)
    return (
        len(sides) == 3
        and sides[2] == full[2]
        and all(side in (1, whole) for side, whole in zip(sides, full, strict=True))
    )


def _cast_back(total: Node) -> Node:
    """The cast of a float32 sum to 16 bits, where that is its only use; else the sum."""
    cast = only_user(total)
    if dtype_of(total) == torch.float32 and cast is not None and is_call(cast, aten.to.dtype):
        return cast
    return total


def _before_widening(node: Node) -> Node:
    """x where `node` is x cast from 16 bits to float32."""
    if is_call(node, aten.to.dtype) and dtype_of(node) == torch.float32:
        narrow = node.args[0]
        if isinstance(narrow, Node) and dtype_of(narrow).itemsize == 2:
            return narrow
    return node


def _is_like(operand: Any, node: Node) -> bool:
    """Whether `operand` is a computed (B, L, C) tensor of the size of `node`."""
    if not isinstance(operand, Node) or not isinstance(operand.meta.get("val"), Tensor):
        return False
    if not isinstance(node.meta.get("val"), Tensor):
        return False
    return len(_sizes(operand)) == 3 and _sizes(operand) == _sizes(node)


def _sizes(node: Node) -> tuple[Any, ...]:
    """Sides as numbers: symbolic ones by the example that the graph was captured with."""
    return tuple(
        side.node.hint if isinstance(side, torch.SymInt) else side for side in tensor_of(node).shape
    )
