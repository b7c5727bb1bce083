"""A pass of your own: fold `silu(x)` into `x · sigmoid(x)`, and see it verified.

python examples/own_pass.py
"""

from __future__ import annotations

import torch
from torch.fx import Node

from turbo_opt.capture import capture
from turbo_opt.compiler.base import Numerics, Pass, PassOptions, PassResult, register_pass
from turbo_opt.compiler.context import PassContext
from turbo_opt.compiler.manager import PassManager
from turbo_opt.compiler.pipeline import parse_pipeline
from turbo_opt.compiler.rewrite import Editor, Found, is_call, rewrite_each
from turbo_opt.compiler.validation import validate_pipeline
from turbo_opt.ir.facts import Fact
from turbo_opt.ir.program import Denoiser, Program

aten = torch.ops.aten


@register_pass
class SpellOutSilu(Pass):
    """silu(x) → x · sigmoid(x)"""

    name = "spell-out-silu"
    requires = frozenset({Fact.CANONICAL})
    numerics = Numerics.REORDERS

    def run(self, program: Program, options: PassOptions, context: PassContext) -> PassResult:
        return rewrite_each(program, context, match_silu, emit_product)


def match_silu(node: Node, denoiser: Denoiser) -> Found | None:
    if not is_call(node, aten.silu.default):
        return None
    return Found(node, node, tuple(node.all_input_nodes))


def emit_product(found: Found, editor: Editor) -> Node:
    (x,) = found.inputs
    return editor.call(aten.mul.Tensor, x, editor.call(aten.sigmoid.default, x))


program = capture("tiny-wan", dtype="float32")
pipeline = validate_pipeline(parse_pipeline("canonicalize,spell-out-silu"))
optimized = PassManager(pipeline).run(program)
for record in optimized.history:
    print(record["name"], record["matches"], "matches,", record["verification"])
