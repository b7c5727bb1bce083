"""Constant folding: what depends on no input and no weight is computed now and stored."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from turbo_opt.compiler.base import Match, PassResult
from turbo_opt.compiler.context import PassContext
from turbo_opt.compiler.evaluate import PieceEvaluator
from turbo_opt.compiler.rewrite import Editor, clean, replace_node
from turbo_opt.ir.edit import module_path
from turbo_opt.ir.program import Denoiser, Program
from turbo_opt.ir.weights import constant

_MAX_BYTES = 2**20
"""Larger constants stay computed: a folded table must not bloat the artifact."""


def fold_constants(program: Program, context: PassContext) -> PassResult:
    """Replace the outermost constant expressions by stored tables `constants.N`."""
    matches = []
    for denoiser in program:
        for node in _outermost_constants(denoiser):
            matches.append(Match(denoiser.name, node.name, module_path(node)))
            (value,) = PieceEvaluator(denoiser, seed=0).run([node], ())
            editor = Editor(denoiser).before(node)
            table = editor.weight(_free_name(denoiser), constant(value))
            replace_node(denoiser, node, table)
            context.tick()
        clean(denoiser)
    return PassResult(program, tuple(matches))


def _outermost_constants(denoiser: Denoiser) -> list[Node]:
    constants: set[Node] = set()
    for node in denoiser.graph.nodes:
        if node.op == "call_function" and _is_constant(node, constants):
            constants.add(node)
    return [
        node
        for node in denoiser.graph.nodes
        if node in constants
        and node.all_input_nodes
        and any(user not in constants for user in node.users)
    ]


def _is_constant(node: Node, constants: set[Node]) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or any(isinstance(s, torch.SymInt) for s in value.shape):
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.is_mutable or value.numel() * value.itemsize > _MAX_BYTES:
        return False
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return False
    return all(parent in constants for parent in node.all_input_nodes)


def _free_name(denoiser: Denoiser) -> str:
    index = 0
    while f"constants.table_{index}" in denoiser.weights:
        index += 1
    return f"constants.table_{index}"
