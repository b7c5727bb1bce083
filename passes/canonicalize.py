"""Bring a captured graph into the one normal form that other passes match on.

x.to(x.dtype), dropout(x, training=False), x·1, asserts   →  x, nothing
x.type_as(y)                                              →  x.to(y.dtype)
out = empty_like(x); out[0::2] = a; out[1::2] = b         →  flatten(stack([a, b], −1))
f(constants)                                              →  a stored table
f(x), f(x)                                                →  f(x), once
"""

from __future__ import annotations

from turbo_opt.compiler.base import Numerics, Pass, PassOptions, PassResult, register_pass
from turbo_opt.compiler.context import PassContext
from turbo_opt.compiler.rewrite import merge_results
from turbo_opt.ir.facts import Fact
from turbo_opt.ir.program import Program
from turbo_opt.passes._canonical.folding import fold_constants
from turbo_opt.passes._canonical.identities import remove_asserts, remove_identities
from turbo_opt.passes._canonical.rotary import make_rotary_functional
from turbo_opt.passes._canonical.subexpressions import share_subexpressions


@register_pass
class Canonicalize(Pass):
    name = "canonicalize"
    establishes = frozenset({Fact.CANONICAL})
    numerics = Numerics.EXACT
    may_match_nothing = True

    def run(self, program: Program, options: PassOptions, context: PassContext) -> PassResult:
        steps = (
            remove_asserts,
            make_rotary_functional,
            remove_identities,
            fold_constants,
            share_subexpressions,
        )
        return merge_results(program, [step(program, context) for step in steps])
