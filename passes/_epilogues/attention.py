"""Attention that writes the quantized activation.

quantize(norm_rope_sagesla(q, k, v, …))       →  norm_rope_sagesla_quantize(q, k, v, …)
quantize(heads joined of padded_attention(…)) →  padded_attention_quantize(…)
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
    tensor_of,
)
from turbo_opt.ir.program import Denoiser, Program
from turbo_opt.kernels import SCHEMES
from turbo_opt.kernels.schemes import BLOCK
from turbo_opt.passes._attention import joined_channels, joins_last_two, tokens_first
from turbo_opt.passes._epilogues.comparison import in_float32, observe, widened

aten = torch.ops.aten
ops = torch.ops.turbo_opt


def fuse_attention(program: Program, context: PassContext) -> PassResult:
    """Let sparse attention write what the next layer reads."""
    return rewrite_each(program, context, match_attention, emit_attention, observe, in_float32)


def fuse_padded_attention(program: Program, context: PassContext) -> PassResult:
    """Let attention to a padded prompt write what the next layer reads."""
    return rewrite_each(program, context, match_padded, emit_padded, observe, padded_in_float32)


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
    wide = [widened(x, editor) for x in qkv]
    heads = editor.call(ops.padded_attention.default, *wide, start, scale)
    joined = editor.call(
        aten.flatten.using_ints, editor.call(aten.permute.default, heads, [0, 2, 1, 3]), 2, 3
    )
    before = editor.call(ops.quantize_activation.default, joined, scheme)
    after = editor.call(ops.padded_attention_quantize.default, *wide, start, scale, scheme)
    return [(before, after)]
