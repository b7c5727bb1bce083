"""Run the linear layers of the transformer blocks on 8-bit operands, 128×128 weight blocks.

    linear(x, W, b)  →  block_linear(quantize(x), Q(W), scales(W), b)

`int8-block`: int8 weights and activations in 128×128 blocks, as in the released `-quant`
checkpoints. `fp8-block`: e4m3 weights in 128×128 blocks, activations in 1×128. Activations are
quantized on the fly, once for all layers that read them; weights are stored at half their size.

With `scales`, a file of `turbo-opt calibrate scales`, layers that were measured below `min_sqnr`
stay in 16 bits, or take the other scheme. Layers of one attention that read one tensor go with the
worst of them, so that they still share its quantization and `fuse-qkv` applies.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch.fx import Node

import turbo_opt.kernels  # noqa: F401  (registers turbo_opt::*)
from turbo_opt.compiler.base import (
    LayerChoice,
    Numerics,
    Pass,
    PassOptions,
    PassResult,
    register_pass,
)
from turbo_opt.compiler.context import PassContext
from turbo_opt.compiler.rewrite import Editor, Found, Miss, dtype_of, is_call, rewrite_each
from turbo_opt.compiler.scales import measured_scales, scales_identity
from turbo_opt.compiler.skip import Skip, Skipper
from turbo_opt.errors import BadInput
from turbo_opt.ir.facts import Fact
from turbo_opt.ir.program import Denoiser, Program
from turbo_opt.ir.transforms import block_quantized
from turbo_opt.kernels.schemes import SCHEMES
from turbo_opt.passes._layer_choices import (
    IN_16_BITS,
    Threshold,
    choose_schemes,
    divided_layers,
)
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
        scales: str | None = Field(
            None,
            description="file of `turbo-opt calibrate scales`: a name in the recipe's `weights`, "
            "or a path",
        )
        min_sqnr: float | None = Field(
            None,
            allow_inf_nan=False,
            description="least SQNR in dB that `scales` must have of a layer",
        )
        judged_by: Literal["prediction", "output"] = Field(
            "prediction",
            description="SQNR of the network's prediction with that layer alone quantized, or of "
            "the layer's own output at its worst noise level",
        )
        below: Literal["16bit", "other-scheme"] = Field(
            "16bit",
            description="what layers below `min_sqnr` get; other-scheme: 16 bits only where that "
            "is below too",
        )

        @model_validator(mode="after")
        def _measured_with_a_threshold(self) -> QuantizeLinear.Options:
            if (self.scales is None) != (self.min_sqnr is None):
                raise ValueError("scales and min_sqnr are given together: one judges the other")
            if self.scales is None and self.below != "16bit":
                raise ValueError("below is for layers below min_sqnr, which is not given")
            return self

        @property
        def schemes(self) -> list[str]:
            """Those that layers may get, the first first."""
            others = [name for name in SCHEMES if name != self.scheme]
            return [self.scheme, *(others if self.below == "other-scheme" else [])]

    @classmethod
    def objection_to(cls, options: PassOptions, target: Target) -> str | None:
        assert isinstance(options, cls.Options)
        for scheme in options.schemes:
            if not target.supports(scheme):
                return f"{target.name} cannot run {scheme}, only {', '.join(target.schemes)}"
        return None

    @classmethod
    def files_read(cls, options: PassOptions, checkpoints: Mapping[str, str]) -> Sequence[str]:
        assert isinstance(options, cls.Options)
        return [] if options.scales is None else [scales_identity(options.scales, checkpoints)]

    def run(self, program: Program, options: PassOptions, context: PassContext) -> PassResult:
        assert isinstance(options, self.Options)
        before = program.weight_bytes
        rewrite = _QuantizeLinears(program, options, context.checkpoints)
        result = rewrite_each(program, context, rewrite.match, rewrite.replace)
        rewrite.skipper.check()
        stats = {"weight_bytes_before": before, "weight_bytes_after": program.weight_bytes}
        return PassResult(program, result.matches, result.near_misses, stats, rewrite.choices)


class _QuantizeLinears:
    """The match and the rewrite, with what they share within one run of the pass."""

    def __init__(
        self,
        program: Program,
        options: QuantizeLinear.Options,
        checkpoints: Mapping[str, str],
    ) -> None:
        self.skipper = Skipper(
            program,
            options.skip,
            pass_name=QuantizeLinear.name,
            layer="linear layer",
            example="blocks.0.attn1.to_q",
        )
        self._scheme = options.scheme
        self._quantized: dict[tuple[Node, str], tuple[Node, Node]] = {}
        self._chosen: dict[Node, LayerChoice] = {}
        if options.scales is not None and options.min_sqnr is not None:
            measured = measured_scales(options.scales, checkpoints, program)
            divided = divided_layers(program)
            for denoiser in program:
                self._chosen |= choose_schemes(
                    denoiser.name,
                    self._layers(denoiser),
                    measured[denoiser.name],
                    divided[denoiser.name],
                    options.schemes,
                    Threshold(options.judged_by, options.min_sqnr),
                )

    @property
    def choices(self) -> tuple[LayerChoice, ...]:
        """What was chosen for single layers, and why."""
        return tuple(self._chosen.values())

    def match(self, node: Node, denoiser: Denoiser) -> Found | Miss | None:
        """A linear layer inside a transformer block, with a stored weight."""
        if not is_call(node, torch.ops.aten.linear.default):
            return None
        name = _weight_name(node, denoiser)
        if name is None:
            return Miss("the weight is computed in the graph")
        module = name.removesuffix(".weight")
        skipped = self.skipper.skips(denoiser, module)
        if not self.skipper.blocks(denoiser).contains(module):
            return None
        if skipped:
            return Miss("skipped by the recipe")
        scheme = self._chosen[node].choice if node in self._chosen else self._scheme
        if scheme == IN_16_BITS:
            return Miss("measured below min_sqnr")
        source, _, bias = (*node.args, None)[:3]
        self._check_sides(module, denoiser.weights[name].shape, scheme)
        parts = {"name": name, "bias": bias, "scheme": scheme}
        return Found(node, node, (source,), parts)  # type: ignore[arg-type]

    def replace(self, found: Found, editor: Editor) -> Node:
        """Quantize the input once, the weight lazily, and call the block-scaled product."""
        (source,) = found.inputs
        name = found.parts["name"]
        scheme = found.parts["scheme"]
        values, scales = block_quantized(editor.denoiser.weights[name], scheme)
        stem = name.removesuffix(".weight")
        weight = editor.weight(f"{stem}.quantized_weight", values)
        weight_scale = editor.weight(f"{stem}.weight_scale", scales)
        quantized, scale = self._activation(source, scheme, editor)
        return editor.call(
            torch.ops.turbo_opt.block_linear.default,
            quantized,
            scale,
            weight,
            weight_scale,
            found.parts["bias"],
            scheme,
            dtype_of(found.output),
        )

    def _activation(self, source: Node, scheme: str, editor: Editor) -> tuple[Node, Node]:
        if (source, scheme) not in self._quantized:
            pair = editor.call(torch.ops.turbo_opt.quantize_activation.default, source, scheme)
            self._quantized[source, scheme] = (
                editor.call(operator.getitem, pair, 0),
                editor.call(operator.getitem, pair, 1),
            )
        return self._quantized[source, scheme]

    def _layers(self, denoiser: Denoiser) -> dict[Node, str]:
        """The linear layers that are to be quantized where they were measured well enough."""
        blocks = self.skipper.blocks(denoiser)
        return {
            node: module
            for node in denoiser.graph.nodes
            if is_call(node, torch.ops.aten.linear.default)
            and (name := _weight_name(node, denoiser)) is not None
            and (module := name.removesuffix(".weight"))
            and blocks.contains(module)
            and not self.skipper.skips(denoiser, module)
        }

    def _check_sides(self, module: str, shape: tuple[int, ...], name: str) -> None:
        scheme = SCHEMES[name]
        for side, size, unit in (
            ("out_features", shape[0], scheme.out_features_multiple),
            ("in_features", shape[1], scheme.in_features_multiple),
        ):
            if size % unit:
                raise BadInput(
                    f"quantize-linear: {module} has {side} {size}, {name} needs a "
                    f"multiple of {unit}; add {module!r} to skip.names"
                )


def _weight_name(node: Node, denoiser: Denoiser) -> str | None:
    """The name of a linear layer's weight, None where it is no stored one."""
    weight = node.args[1]
    assert isinstance(weight, Node)
    return denoiser.parameters().get(weight) if weight.op == "placeholder" else None
