"""Remove what does nothing: asserts, casts to the same dtype, inactive dropout, products with 1."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from turbo_opt.compiler.base import Match, PassResult
from turbo_opt.compiler.context import PassContext
from turbo_opt.compiler.rewrite import Editor, Found, clean, dtype_of, rewrite_each
from turbo_opt.ir.edit import module_path
from turbo_opt.ir.program import Denoiser, Program

aten = torch.ops.aten

_ASSERTS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_scalar.default,
        aten._assert_async.msg,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
    }
)
_COPIES = frozenset({aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default})


def remove_asserts(program: Program, context: PassContext) -> PassResult:
    """Drop metadata and range asserts: shapes and dtypes are checked when a graph is loaded."""
    matches = []
    for denoiser in program:
        for node in list(denoiser.graph.nodes):
            if node.op == "call_function" and node.target in _ASSERTS:
                matches.append(Match(denoiser.name, node.name, module_path(node)))
                denoiser.graph.erase_node(node)
        clean(denoiser)
    return PassResult(program, tuple(matches))


def remove_identities(program: Program, context: PassContext) -> PassResult:
    """`f(x) → x` for every f that returns its argument, and `type_as` as a plain cast."""
    return rewrite_each(program, context, _match_identity, _replace_identity)


def _match_identity(node: Node, denoiser: Denoiser) -> Found | None:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return None
    source = node.args[0]
    if not isinstance(source.meta.get("val"), Tensor) or not isinstance(
        node.meta.get("val"), Tensor
    ):
        return None
    inputs = tuple(node.all_input_nodes)
    if node.target is aten.type_as.default and dtype_of(source) != dtype_of(node):
        return Found(node, node, inputs, {"source": source, "cast_to": dtype_of(node)})
    if _returns_its_argument(node, source):
        return Found(node, node, inputs, {"source": source})
    return None


def _replace_identity(found: Found, editor: Editor) -> Node:
    source = found.parts["source"]
    assert isinstance(source, Node)
    if "cast_to" in found.parts:
        return editor.call(aten.to.dtype, source, found.parts["cast_to"])
    return source


def _returns_its_argument(node: Node, source: Node) -> bool:
    target, args = node.target, node.args
    if target in (aten.to.dtype, aten.type_as.default, aten._to_copy.default):
        return dtype_of(source) == dtype_of(node)
    if target is aten.dropout.default:
        return bool(args[1] == 0 or args[2] is False)
    if target in _COPIES:
        return True
    if target is aten.contiguous.default:
        return bool(source.meta["val"].is_contiguous())
    if target in (aten.mul.Tensor, aten.div.Tensor):
        return _is_number(args[1], 1) and dtype_of(source) == dtype_of(node)
    if target in (aten.reshape.default, aten.view.default, aten.expand.default):
        return tuple(source.meta["val"].shape) == tuple(node.meta["val"].shape)
    return False


def _is_number(value: object, number: int) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == number
