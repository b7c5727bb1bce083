"""A branch that is added to the stream, gated, in one step.

cast(cast(x, f32) + cast(y, f32) · gate)  →  gated_residual(x, y, gate)
x + y, where a norm reads the sum         →  gated_residual(x, y)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from turbo_opt.compiler.base import PassResult
from turbo_opt.compiler.context import PassContext
from turbo_opt.compiler.rewrite import (
    Editor,
    Found,
    Miss,
    dtype_of,
    is_call,
    named_args,
    only_user,
    rewrite_each,
    tensor_of,
)
from turbo_opt.ir.program import Denoiser, Program
from turbo_opt.passes._epilogues.norm import AFTER_RESIDUAL

aten = torch.ops.aten
ops = torch.ops.turbo_opt
_NORMS = frozenset({ops.adaln.default, ops.layer_norm.default, *AFTER_RESIDUAL})


def fuse_residual(program: Program, context: PassContext) -> PassResult:
    """Add a branch and its gate to the stream by one operator."""
    return rewrite_each(program, context, match_residual, emit_residual)


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
