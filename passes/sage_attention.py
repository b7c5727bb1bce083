"""Multiply the operands of dense attention in 8 bits, as SageAttention does.

    scaled_dot_product_attention(q, k, v)  →  sage_attention(q, k, v)

For models without weights for sparse attention: every query still attends to every key. q and k
become int8 after k's mean token is subtracted; P and v become e4m3 or stay in 16 bits. `attention`
says whose: `self` where q and k are projections of the same hidden states, `cross` of others (the
prompt, an image), `all` of both. Where a call is too small for 8 bits to pay, its provider
multiplies in 16 bits.

The pass may stand anywhere after `canonicalize`: rotation, quantized and joined projections, and
hoisted keys and values of a prompt stay as they are. `sparse-attention` goes before it and takes
self-attention away from it.
Sources: SageAttention, arXiv 2410.02367; SageAttention2, arXiv 2411.10958.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch.fx import Node

from turbo_opt.compiler.base import Numerics, Pass, PassOptions, PassResult, register_pass
from turbo_opt.compiler.context import PassContext
from turbo_opt.compiler.rewrite import Editor, Found, Miss, named_args, rewrite_each
from turbo_opt.compiler.skip import Skip, Skipper
from turbo_opt.ir.edit import module_path
from turbo_opt.ir.facts import Fact
from turbo_opt.ir.program import Denoiser, Program
from turbo_opt.kernels.sage_attention import HEAD_DIMS
from turbo_opt.passes._attention import (
    PVFormat,
    attention_kind,
    is_dense_attention,
    is_sparse_attention,
    objection_to_pv,
    pv_format,
    unlike_plain_attention,
)
from turbo_opt.targets import Target


@register_pass
class SageAttention(Pass):
    name = "sage-attention"
    requires = frozenset({Fact.CANONICAL})
    numerics = Numerics.QUANTIZES

    class Options(PassOptions):
        attention: Literal["self", "cross", "all"] = Field(
            "self", description="to the tokens themselves, to prompt and images, or both"
        )
        pv: PVFormat = Field(
            "auto", description="operands of P·v; auto: fp8 on GPUs that have it (sm89 on)"
        )
        skip: Skip = Field(Skip(), description="attention layers that stay in 16 bits")

    @classmethod
    def objection_to(cls, options: PassOptions, target: Target) -> str | None:
        assert isinstance(options, cls.Options)
        return objection_to_pv(options.pv, target)

    def run(self, program: Program, options: PassOptions, context: PassContext) -> PassResult:
        assert isinstance(options, self.Options)
        rewrite = _SageAttention(program, options, context.target)
        result = rewrite_each(program, context, rewrite.match, rewrite.replace)
        rewrite.skipper.check()
        return result


class _SageAttention:
    """The match and the rewrite, with what they share within one run of the pass."""

    def __init__(
        self, program: Program, options: SageAttention.Options, target: Target | None
    ) -> None:
        self.skipper = Skipper(
            program,
            options.skip,
            pass_name=SageAttention.name,
            layer="attention layer",
            example="blocks.0.attn1",
        )
        self._wanted = options.attention
        self._pv = pv_format(options.pv, target)

    def match(self, node: Node, denoiser: Denoiser) -> Found | Miss | None:
        """A dense attention without mask, of the kind that is asked for."""
        if is_sparse_attention(node):
            return Miss("it is sparse already, and keeps its own formats")
        if not is_dense_attention(node):
            return None
        objection = unlike_plain_attention(node, HEAD_DIMS) or self._of_another_kind(node)
        if objection is not None:
            return Miss(objection)
        if self.skipper.skips(denoiser, module_path(node)):
            return Miss("skipped by the recipe")
        return Found(node, node, tuple(node.args[:3]))  # type: ignore[arg-type]

    def replace(self, found: Found, editor: Editor) -> Node:
        """The operator on the same heads, with the scale of the graph."""
        scale = named_args(found.anchor)["scale"]
        return editor.call(
            torch.ops.turbo_opt.sage_attention.default, *found.inputs, scale, self._pv
        )

    def _of_another_kind(self, node: Node) -> str | None:
        kind = attention_kind(node)
        if self._wanted in ("all", kind):
            return None
        if kind is None:
            return "q or k is no projection, so that it is neither self- nor cross-attention"
        return f"it is {kind}-attention, the pass takes attention={self._wanted}"
