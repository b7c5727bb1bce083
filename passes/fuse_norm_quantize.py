"""Let a norm write the quantized activation directly, where only quantized layers read it.

    quantize(adaln(x, scale, shift))     →  adaln_quantize(x, scale, shift)
    quantize(layer_norm(x, weight, bias)) →  layer_norm_quantize(x, weight, bias)

The 16-bit result is neither written nor rounded to: a third of the bytes remain.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from turbo_opt.compiler.base import Numerics, Pass, PassOptions, PassResult, register_pass
from turbo_opt.compiler.context import PassContext
from turbo_opt.compiler.rewrite import Editor, Found, Miss, is_call, merge_results, rewrite_each
from turbo_opt.ir.facts import Fact
from turbo_opt.ir.program import Denoiser, Program
from turbo_opt.kernels import SCHEMES, dequantize_activation

ops = torch.ops.turbo_opt
_FUSED = {
    ops.adaln.default: ops.adaln_quantize.default,
    ops.layer_norm.default: ops.layer_norm_quantize.default,
}


@register_pass
class FuseNormQuantize(Pass):
    name = "fuse-norm-quantize"
    requires = frozenset({Fact.NORMS_FUSED, Fact.LINEAR_QUANTIZED})
    numerics = Numerics.QUANTIZES

    def run(self, program: Program, options: PassOptions, context: PassContext) -> PassResult:
        results = [
            rewrite_each(program, context, _matcher(scheme), emit, observe=_dequantizer(scheme))
            for scheme in SCHEMES
        ]
        return merge_results(program, results)


def _matcher(scheme: str):  # type: ignore[no-untyped-def]
    def match(node: Node, denoiser: Denoiser) -> Found | Miss | None:
        """A quantization by `scheme` whose input is a fused norm."""
        if not is_call(node, ops.quantize_activation.default) or node.args[1] != scheme:
            return None
        norm = node.args[0]
        if not isinstance(norm, Node) or norm.target not in _FUSED:
            return None
        if len(norm.users) > 1:
            return Miss("the norm's 16-bit result is read by a layer that is not quantized")
        inputs = tuple(a for a in norm.all_input_nodes if a.op != "placeholder")
        return Found(node, node, inputs, {"norm": norm, "scheme": scheme})

    return match


def emit(found: Found, editor: Editor) -> Node:
    """The fused operator on the norm's own arguments."""
    norm = found.parts["norm"]
    return editor.call(_FUSED[norm.target], *norm.args, found.parts["scheme"])


def _dequantizer(scheme: str):  # type: ignore[no-untyped-def]
    def observe(pair: tuple[Tensor, Tensor]) -> Tensor:
        """Compare what the next layer sees: values times scales."""
        return dequantize_activation(*pair, scheme)

    return observe
