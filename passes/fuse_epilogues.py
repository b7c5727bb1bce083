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
does. Attention is fused where a scale belongs to one token: a block of 128 tokens (`int8-block`) is
more than a program of attention holds.
"""

from __future__ import annotations

from pydantic import Field

from turbo_opt.compiler.base import Numerics, Pass, PassOptions, PassResult, register_pass
from turbo_opt.compiler.context import PassContext
from turbo_opt.compiler.rewrite import merge_results
from turbo_opt.ir.facts import Fact
from turbo_opt.ir.program import Program
from turbo_opt.passes._epilogues.attention import fuse_attention, fuse_padded_attention
from turbo_opt.passes._epilogues.gelu import fuse_gelu, fuse_linear_gelu
from turbo_opt.passes._epilogues.linear_residual import fuse_linear_residual
from turbo_opt.passes._epilogues.norm import fuse_residual_norm
from turbo_opt.passes._epilogues.residual import fuse_residual


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
        steps = [
            (options.gelu, fuse_gelu),
            (options.linear_gelu, fuse_linear_gelu),
            (options.attention, fuse_attention),
            (options.attention, fuse_padded_attention),
            (options.residual, fuse_residual),
            (options.linear_residual, fuse_linear_residual),
            (options.residual_norm, fuse_residual_norm),
        ]
        return merge_results(program, [fuse(program, context) for wanted, fuse in steps if wanted])
