"""Fuse each normalization, with its casts and its modulation, into one operator.

    cast(LN(cast(x, f32)) · (1 + scale) + shift, x.dtype)  →  adaln(x, scale, shift, eps)
    cast(LN(cast(x, f32)) · weight + bias, x.dtype)        →  layer_norm(x, weight, bias, eps)
    RMSNorm(x) · weight                                    →  rms_norm(x, weight, eps)

Statistics and modulation stay in float32, as in the model; one read and one write of x remain.
"""

from __future__ import annotations

import torch
from pydantic import Field
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
    only_user,
    other_operand,
    rewrite_each,
    tensor_of,
)
from turbo_opt.ir.facts import Fact
from turbo_opt.ir.program import Denoiser, Program

aten = torch.ops.aten


@register_pass
class FuseNorms(Pass):
    name = "fuse-norms"
    requires = frozenset({Fact.CANONICAL})
    establishes = frozenset({Fact.NORMS_FUSED})
    numerics = Numerics.REORDERS

    class Options(PassOptions):
        adaln: bool = Field(True, description="fuse LayerNorm with its scale and shift")
        layer_norm: bool = Field(True, description="fuse LayerNorm with its casts")
        rms_norm: bool = Field(True, description="fuse RMSNorm over all heads")

    def run(self, program: Program, options: PassOptions, context: PassContext) -> PassResult:
        assert isinstance(options, self.Options)
        results = []
        if options.adaln:
            results.append(rewrite_each(program, context, match_adaln, emit_adaln))
        if options.layer_norm:
            results.append(rewrite_each(program, context, match_layer_norm, emit_layer_norm))
        if options.rms_norm:
            results.append(rewrite_each(program, context, match_rms_norm, emit_rms_norm))
        return merge_results(program, results)


def match_adaln(node: Node, denoiser: Denoiser) -> Found | Miss | None:
    """A LayerNorm without weights whose only use is `· (1 + scale) + shift`."""
    if not is_call(node, aten.layer_norm.default) or _affine(node) != (None, None):
        return None
    scaled = only_user(node)
    if scaled is None or not is_call(scaled, aten.mul.Tensor):
        return Miss("the LayerNorm is not followed by one product with (1 + scale)")
    one_plus_scale = other_operand(scaled, node)
    scale = _minus_one(one_plus_scale)
    if scale is None:
        return Miss("the factor of the LayerNorm is not 1 + scale")
    shifted = only_user(scaled)
    if shifted is None or not is_call(shifted, aten.add.Tensor):
        return Miss("the scaled LayerNorm is not followed by one added shift")
    shift = other_operand(shifted, scaled)
    source, output = _through_casts(node, shifted)
    if dtype_of(source) != dtype_of(output):
        return Miss(f"the result stays in {dtype_of(output)} while x is {dtype_of(source)}")
    if not isinstance(shift, Node) or _normalized_dims(node) != 1:
        return Miss("the shift is not a tensor, or more than the last axis is normalized")
    parts = {"scale": scale, "shift": shift, "eps": _eps(node)}
    return Found(node, output, (source, scale, shift), parts)


def emit_adaln(found: Found, editor: Editor) -> Node:
    parts = found.parts
    return editor.call(
        torch.ops.turbo_opt.adaln.default,
        found.inputs[0],
        parts["scale"],
        parts["shift"],
        parts["eps"],
    )


def match_layer_norm(node: Node, denoiser: Denoiser) -> Found | Miss | None:
    """A LayerNorm with weight and bias, in float32 between casts or in the dtype of x."""
    if not is_call(node, aten.layer_norm.default) or _affine(node) == (None, None):
        return None
    source, output = _through_casts(node, node)
    if dtype_of(source) != dtype_of(output):
        return Miss(f"the result stays in {dtype_of(output)} while x is {dtype_of(source)}")
    if _normalized_dims(node) != 1:
        return Miss("more than the last axis is normalized")
    return Found(node, output, (source,), {"eps": _eps(node), "affine": _affine(node)})


def emit_layer_norm(found: Found, editor: Editor) -> Node:
    weight, bias = found.parts["affine"]
    return editor.call(
        torch.ops.turbo_opt.layer_norm.default, found.inputs[0], weight, bias, found.parts["eps"]
    )


def match_rms_norm(node: Node, denoiser: Denoiser) -> Found | Miss | None:
    """An RMSNorm over the last axis with a stated epsilon."""
    if not is_call(node, aten.rms_norm.default):
        return None
    source, shape, weight, eps = (*node.args, None, None)[:4]
    if len(shape) != 1:  # type: ignore[arg-type]
        return Miss("more than the last axis is normalized")
    if eps is None:
        return Miss("epsilon is left to the dtype")
    if dtype_of(source) != dtype_of(node):  # type: ignore[arg-type]
        return Miss("the weight's dtype widens the result")
    return Found(node, node, (source,), {"weight": weight, "eps": eps})  # type: ignore[arg-type]


def emit_rms_norm(found: Found, editor: Editor) -> Node:
    parts = found.parts
    return editor.call(
        torch.ops.turbo_opt.rms_norm.default, found.inputs[0], parts["weight"], parts["eps"]
    )


def _affine(node: Node) -> tuple[Node | None, Node | None]:
    _, _, weight, bias = (*node.args, None, None)[:4]
    return weight, bias  # type: ignore[return-value]


def _eps(node: Node) -> float:
    return node.args[4] if len(node.args) > 4 else 1e-5  # type: ignore[return-value]


def _normalized_dims(node: Node) -> int:
    return len(node.args[1])  # type: ignore[arg-type]


def _minus_one(node: object) -> Node | None:
    """`scale` when `node` is `scale + 1`."""
    if isinstance(node, Node) and is_call(node, aten.add.Tensor):
        left, right = node.args[:2]
        if isinstance(left, Node) and right == 1 and not node.kwargs:
            return left
    return None


def _through_casts(norm: Node, result: Node) -> tuple[Node, Node]:
    """The tensor before the cast to float32, and the node after the cast back."""
    source = norm.args[0]
    assert isinstance(source, Node)
    if is_call(source, aten.to.dtype) and dtype_of(source) == torch.float32:
        narrow = source.args[0]
        if isinstance(narrow, Node) and tensor_of(narrow).dtype in (torch.bfloat16, torch.float16):
            source = narrow
    cast = only_user(result)
    if cast is not None and is_call(cast, aten.to.dtype) and dtype_of(cast) == dtype_of(source):
        return source, cast
    return source, result
