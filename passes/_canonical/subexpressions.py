"""Common subexpressions: two calls of one pure operator on equal arguments become one."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from turbo_opt.compiler.base import Match, PassResult
from turbo_opt.compiler.context import PassContext
from turbo_opt.compiler.rewrite import clean, replace_node
from turbo_opt.ir.edit import module_path
from turbo_opt.ir.program import Program


def share_subexpressions(program: Program, context: PassContext) -> PassResult:
    """Lead every repeated call to its first occurrence."""
    matches = []
    for denoiser in program:
        known: dict[Any, Node] = {}
        for node in denoiser.graph.nodes:
            if not _is_pure(node):
                continue
            key = (node.target, _frozen(node.args), _frozen(node.kwargs))
            first = known.setdefault(key, node)
            if first is not node:
                matches.append(Match(denoiser.name, node.name, module_path(node)))
                replace_node(denoiser, node, first)
                context.tick()
        clean(denoiser)
    return PassResult(program, tuple(matches))


def _is_pure(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        tags = node.target.tags
        random = (
            torch.Tag.nondeterministic_seeded in tags or torch.Tag.nondeterministic_bitwise in tags
        )
        return not node.target._schema.is_mutable and not random
    return node.target is operator.getitem or getattr(node.target, "__module__", "") == "_operator"


def _frozen(item: Any) -> Any:
    """A hashable stand-in: equal exactly when the arguments are equal, types included."""
    if isinstance(item, (list, tuple)):
        return tuple(_frozen(part) for part in item)
    if isinstance(item, dict):
        return tuple(sorted((key, _frozen(part)) for key, part in item.items()))
    if isinstance(item, Node):
        return item
    return (type(item), item if not isinstance(item, (torch.SymInt, slice)) else str(item))
