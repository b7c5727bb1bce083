"""Run the linear layers of the transformer blocks on 8-bit operands, 128×128 weight blocks.

    linear(x, W, b)  →  block_linear(quantize(x), Q(W), scales(W), b)

`int8-block`: int8 weights and activations in 128×128 blocks, as in the released `-quant`
checkpoints. `fp8-block`: e4m3 weights in 128×128 blocks, activations in 1×128. Activations are
quantized on the fly, once for all layers that read them; weights are stored at half their size.
"""

from __future__ import annotations

import operator
from typing import Literal

import torch
from pydantic import Field
from torch.fx import Node

import turbo_opt.kernels  # noqa: F401  (registers turbo_opt::*)
from turbo_opt.compiler.base import Numerics, Pass, PassOptions, PassResult, register_pass
from turbo_opt.compiler.context import PassContext
from turbo_opt.compiler.rewrite import Editor, Found, Miss, dtype_of, is_call, rewrite_each
from turbo_opt.compiler.skip import Skip, Skipper
from turbo_opt.errors import BadInput
from turbo_opt.ir.facts import Fact
from turbo_opt.ir.program import Denoiser, Program
from turbo_opt.ir.transforms import block_quantized
from turbo_opt.kernels.schemes import SCHEMES
from turbo_opt.targets import Target


@register_pass
class QuantizeLinear(Pass):
    name = "quantize-linear"
    requires = frozenset({Fact.CANONICAL})
    establishes = frozenset({Fact.LINEAR_QUANTIZED})
    numerics = Numerics.QUANTIZES

    class Options(PassOptions):
        scheme: Literal["int8-block", "fp8-block"] = Field(
            "fp8-block", description="number format and block shape of weights and activations"
        )
        skip: Skip = Field(Skip(), description="layers that stay in 16 bits")

    @classmethod
    def objection_to(cls, options: PassOptions, target: Target) -> str | None:
        assert isinstance(options, cls.Options)
        if target.supports(options.scheme):
            return None
        return f"{target.name} cannot run {options.scheme}, only {', '.join(target.schemes)}"

    def run(self, program: Program, options: PassOptions, context: PassContext) -> PassResult:
        assert isinstance(options, self.Options)
        before = program.weight_bytes
        rewrite = _QuantizeLinears(program, options.scheme, options.skip)
        result = rewrite_each(program, context, rewrite.match, rewrite.replace)
        rewrite.skipper.check()
        stats = {"weight_bytes_before": before, "weight_bytes_after": program.weight_bytes}
        return PassResult(program, result.matches, result.near_misses, stats)


class _QuantizeLinears:
    """The match and the rewrite, with what they share within one run of the pass."""

    def __init__(self, program: Program, scheme: str, skip: Skip) -> None:
        self.skipper = Skipper(
            program,
            skip,
            pass_name=QuantizeLinear.name,
            layer="linear layer",
            example="blocks.0.attn1.to_q",
        )
        self._scheme = scheme
        self._quantized: dict[Node, tuple[Node, Node]] = {}

    def match(self, node: Node, denoiser: Denoiser) -> Found | Miss | None:
        """A linear layer inside a transformer block, with a stored weight."""
        if not is_call(node, torch.ops.aten.linear.default):
            return None
        source, weight, bias = (*node.args, None)[:3]
        assert isinstance(source, Node) and isinstance(weight, Node)
        name = denoiser.parameters().get(weight) if weight.op == "placeholder" else None
        if name is None:
            return Miss("the weight is computed in the graph")
        module = name.removesuffix(".weight")
        skipped = self.skipper.skips(denoiser, module)
        if not self.skipper.blocks(denoiser).contains(module):
            return None
        if skipped:
            return Miss("skipped by the recipe")
        self._check_sides(module, denoiser.weights[name].shape)
        parts = {"name": name, "bias": bias}
        return Found(node, node, (source,), parts)

    def replace(self, found: Found, editor: Editor) -> Node:
        """Quantize the input once, the weight lazily, and call the block-scaled product."""
        (source,) = found.inputs
        name = found.parts["name"]
        values, scales = block_quantized(editor.denoiser.weights[name], self._scheme)
        stem = name.removesuffix(".weight")
        weight = editor.weight(f"{stem}.quantized_weight", values)
        weight_scale = editor.weight(f"{stem}.weight_scale", scales)
        quantized, scale = self._activation(source, editor)
        return editor.call(
            torch.ops.turbo_opt.block_linear.default,
            quantized,
            scale,
            weight,
            weight_scale,
            found.parts["bias"],
            self._scheme,
            dtype_of(found.output),
        )

    def _activation(self, source: Node, editor: Editor) -> tuple[Node, Node]:
        if source not in self._quantized:
            pair = editor.call(
                torch.ops.turbo_opt.quantize_activation.default, source, self._scheme
            )
            self._quantized[source] = (
                editor.call(operator.getitem, pair, 0),
                editor.call(operator.getitem, pair, 1),
            )
        return self._quantized[source]

    def _check_sides(self, module: str, shape: tuple[int, ...]) -> None:
        scheme = SCHEMES[self._scheme]
        for side, size, unit in (
            ("out_features", shape[0], scheme.out_features_multiple),
            ("in_features", shape[1], scheme.in_features_multiple),
        ):
            if size % unit:
                raise BadInput(
                    f"quantize-linear: {module} has {side} {size}, {self._scheme} needs a "
                    f"multiple of {unit}; add {module!r} to skip.names"
                )
