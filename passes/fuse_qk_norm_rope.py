"""Fuse RMSNorm and rotary embedding of q and k, and both with the 8-bit attention that follows.

    rotate(heads(rms_norm(x, weight)), cos, sin)  →  norm_rope(x, weight, cos, sin)
    channels(sagesla(norm_rope(q), norm_rope(k), v, …))  →  norm_rope_sagesla(q, k, v, …)

The same formulas with a wider intermediate: the 16-bit roundings of the norm, and before sagesla
also of the rotation, go away. sagesla rounds q and k to 8 bits, where the last bit of a 16-bit
value decides now and then; so its two forms are compared on q, k and v cast to float32, where
neither rounds in between, and held to the budget of float32.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

import turbo_opt.kernels  # noqa: F401  (registers turbo_opt::*)
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
from turbo_opt.ir.edit import insert_call
from turbo_opt.ir.facts import Fact
from turbo_opt.ir.program import Denoiser, Program
from turbo_opt.passes._attention import (
    as_channels,
    joined_channels,
    joins_last_two,
    tokens_first,
)

aten = torch.ops.aten
ops = torch.ops.turbo_opt
_TABLE_ARGUMENTS = {ops.norm_rope.default: (2, 3), ops.norm_rope_sagesla.default: (5, 6)}
"""Which arguments are cosines and sines."""


@register_pass
class FuseQKNormRope(Pass):
    name = "fuse-qk-norm-rope"
    requires = frozenset({Fact.NORMS_FUSED})
    numerics = Numerics.REORDERS

    def run(self, program: Program, options: PassOptions, context: PassContext) -> PassResult:
        results = [
            rewrite_each(program, context, match_norm_rope, emit_norm_rope),
            rewrite_each(program, context, match_attention, emit_attention, compare=in_float32),
        ]
        for denoiser in program:
            pack_tables(denoiser)
        return merge_results(program, results)


def match_norm_rope(node: Node, denoiser: Denoiser) -> Found | Miss | None:
    """A rotation of interleaved pairs: two halves stacked and joined again."""
    if not is_call(node, aten.stack.default):
        return None
    call, rotated = named_args(node), only_user(node)
    ndim = tensor_of(node).ndim
    if len(call["tensors"]) != 2 or call["dim"] % ndim != ndim - 1 or not joins_last_two(rotated):
        return None
    assert rotated is not None
    rotation = _rotation(*call["tensors"])
    if rotation is None:
        return Miss("the interleaved halves are not a rotation (a·cos − b·sin, a·sin + b·cos)")
    heads, cos, sin = rotation
    if not is_call(heads, aten.unflatten.int) or named_args(heads)["dim"] not in (2, -1):
        return Miss("what is rotated are not the heads of a (B, L, C) tensor")
    norm = named_args(heads)["self"]
    if not is_call(norm, ops.rms_norm.default) or only_user(norm) is not heads:
        return Miss("what is rotated is not the result of an RMSNorm for that alone")
    if not all(_is_table(table, tensor_of(rotated)) for table in (cos, sin)):
        return Miss("cos and sin are not float32 (1, L, 1, D/2)")
    x, weight, eps = named_args(norm).values()
    if dtype_of(rotated) != dtype_of(x) or tensor_of(x).ndim != 3:
        return Miss("the rotated heads are not of the projection's shape and dtype")
    return Found(node, rotated, (x,), {"arguments": (x, weight, cos, sin, eps)})


def emit_norm_rope(found: Found, editor: Editor) -> Node:
    return editor.call(ops.norm_rope.default, *found.parts["arguments"])


def match_attention(node: Node, denoiser: Denoiser) -> Found | Miss | None:
    """sagesla on heads that `norm_rope` gives, its own result going back to channels."""
    if not is_call(node, ops.sagesla.default):
        return None
    q, k, v, *rest = named_args(node).values()
    q_heads, k_heads = tokens_first(q), tokens_first(k)
    if not all(is_call(heads, ops.norm_rope.default) for heads in (q_heads, k_heads)):
        return Miss("q and k do not come from an RMSNorm and a rotation")
    q_source, q_weight, *q_rotation = named_args(q_heads).values()
    k_source, k_weight, *k_rotation = named_args(k_heads).values()
    if q_rotation != k_rotation:
        return Miss("q and k are not rotated by the same angles, or differ in epsilon")
    v_source = as_channels(v)
    if v_source is None:
        return Miss("v is not the heads of a (B, L, C) tensor")
    output = joined_channels(node)
    if output is None:
        return Miss("the result is not brought back to (B, L, C) at once")
    parts = {"weights": (q_weight, k_weight), "rotation": q_rotation, "attention": rest}
    return Found(node, output, (q_source, k_source, v_source), parts)


def emit_attention(found: Found, editor: Editor) -> Node:
    parts = found.parts
    return editor.call(
        ops.norm_rope_sagesla.default,
        *found.inputs,
        *parts["weights"],
        *parts["rotation"],
        *parts["attention"],
    )


def pack_tables(denoiser: Denoiser) -> None:
    """Copy each table that is a strided slice, so that kernels read whole lines of it.

    One copy serves all layers; where shapes are hoisted it is made once for a clip size.
    """
    exported = denoiser.exported
    readers = [n for n in denoiser.graph.nodes if n.target in _TABLE_ARGUMENTS]
    packed: dict[Node, Node] = {}
    for reader in readers:
        for index in _TABLE_ARGUMENTS[reader.target]:
            table = reader.args[index]
            assert isinstance(table, Node)
            if is_call(table, aten.slice.Tensor) and table not in packed:
                options = {"memory_format": torch.contiguous_format}
                packed[table] = insert_call(
                    exported, table.next, aten.clone.default, (table,), options
                )
            reader.update_arg(index, packed.get(table, table))
    denoiser.graph_module.recompile()


def in_float32(found: Found, new: Node, editor: Editor) -> Sequence[tuple[Node, Node]]:
    """Both forms on projections and weights cast to float32."""

    def wide(x: Node | None) -> Node | None:
        return None if x is None else editor.call(aten.to.dtype, x, torch.float32)

    parts = found.parts
    after = editor.call(new.target, *map(wide, new.args[:5]), *new.args[5:])  # type: ignore[arg-type]
    q, k, v = map(wide, found.inputs)
    q_weight, k_weight = map(wide, parts["weights"])
    q_heads = editor.call(ops.norm_rope.default, q, q_weight, *parts["rotation"])
    k_heads = editor.call(ops.norm_rope.default, k, k_weight, *parts["rotation"])
    v_heads = editor.call(aten.unflatten.int, v, 2, [-1, tensor_of(q_heads).shape[-1]])
    heads = (editor.call(aten.transpose.int, x, 1, 2) for x in (q_heads, k_heads, v_heads))
    attended = editor.call(ops.sagesla.default, *heads, *parts["attention"])
    before = editor.call(
        aten.flatten.using_ints, editor.call(aten.transpose.int, attended, 1, 2), 2
    )
    return [(before, after)]


def _rotation(first: Node, second: Node) -> tuple[Node, Node, Node] | None:
    """(x, cos, sin) where `first` and `second` are x's interleaved halves, turned."""
    first, second = _before_cast(first), _before_cast(second)
    if not is_call(first, aten.sub.Tensor) or not is_call(second, aten.add.Tensor):
        return None
    minus, plus = named_args(first), named_args(second)
    products = [_product(call[side]) for call in (minus, plus) for side in ("self", "other")]
    if None in products or minus["alpha"] != 1 or plus["alpha"] != 1:
        return None
    (a, cos), (b, sin), *others = products  # type: ignore[misc]
    if others != [(a, sin), (b, cos)]:
        return None
    x = _halves_of(a, b)
    return None if x is None else (x, cos, sin)


def _before_cast(node: Node) -> Node:
    return named_args(node)["self"] if is_call(node, aten.to.dtype) else node


def _product(node: Any) -> tuple[Node, Node] | None:
    """(half, table) of a float32 product."""
    if not is_call(node, aten.mul.Tensor) or dtype_of(node) != torch.float32:
        return None
    half, table = named_args(node).values()
    return (half, table) if isinstance(half, Node) and isinstance(table, Node) else None


def _halves_of(a: Node, b: Node) -> Node | None:
    """x where a and b are its even and odd channels: unbind(unflatten(x, −1, [−1, 2]), −1)."""
    if not is_call(a, operator.getitem) or not is_call(b, operator.getitem):
        return None
    (pairs, even), (other, odd) = a.args, b.args
    if pairs is not other or (even, odd) != (0, 1) or not is_call(pairs, aten.unbind.int):
        return None
    split, dim = named_args(pairs).values()
    shape = tensor_of(split).shape
    if not is_call(split, aten.unflatten.int) or shape[-1] != 2 or dim % len(shape) != 4:
        return None
    x: Node = named_args(split)["self"]
    return x if tensor_of(x).ndim == 4 else None


def _is_table(table: Node, rotated: torch.Tensor) -> bool:
    value = tensor_of(table)
    if value.dtype != torch.float32 or value.ndim != 4:
        return False
    wanted = (1, rotated.shape[1], 1, rotated.shape[3] // 2)
    return all(bool(side == size) for side, size in zip(value.shape, wanted, strict=True))
