"""Divide channels that make 8-bit blocks uneven by powers of two, and multiply the weights by them.

    linear(adaln(x, scale, shift), W)       →  linear(adaln(x, (1 + scale)/s − 1, shift/s), W·s)
    linear(layer_norm(x, weight, bias), W)  →  linear(layer_norm(x, weight/s, bias/s), W·s)

s holds a power of two for each channel, from a file of `turbo-opt calibrate scales`: only exponents
change. Nothing is divided unless that file's errors on held-out activations fall by `min_gain`. The
modulation is that of a noise level, so its two products cost nothing per token. Goes before
`quantize-linear`. Source: SmoothQuant, arXiv 2211.10438.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.fx import Node

import turbo_opt.kernels  # noqa: F401  (registers turbo_opt::*)
from turbo_opt.compiler.base import (
    LayerChoice,
    Match,
    NearMiss,
    Numerics,
    Pass,
    PassOptions,
    PassResult,
    register_pass,
)
from turbo_opt.compiler.context import PassContext
from turbo_opt.compiler.rewrite import Editor, clean, is_call, tensor_of
from turbo_opt.compiler.scales import BalancedLayers, measured_scales, scales_identity
from turbo_opt.ir.edit import module_path
from turbo_opt.ir.facts import Fact
from turbo_opt.ir.program import Denoiser, Program
from turbo_opt.ir.transforms import columns_times
from turbo_opt.ir.weights import LazyTensor, constant
from turbo_opt.passes._layer_choices import DIVIDED

aten = torch.ops.aten
ops = torch.ops.turbo_opt


@register_pass
class BalanceChannels(Pass):
    name = "balance-channels"
    requires = frozenset({Fact.NORMS_FUSED})
    establishes = frozenset({Fact.CHANNELS_BALANCED})
    conflicts = frozenset({Fact.CHANNELS_BALANCED, Fact.LINEAR_QUANTIZED})
    numerics = Numerics.REORDERS

    class Options(PassOptions):
        scales: str = Field(
            description="file of `turbo-opt calibrate scales`: a name in the recipe's `weights`, "
            "or a path"
        )
        scheme: Literal["int8-block", "fp8-block"] = Field(
            "int8-block", description="the scheme whose errors shall fall"
        )
        min_gain: float = Field(
            0.5, gt=0, allow_inf_nan=False, description="by how many dB they must at least"
        )

    @classmethod
    def files_read(cls, options: PassOptions, checkpoints: Mapping[str, str]) -> Sequence[str]:
        assert isinstance(options, cls.Options)
        return [scales_identity(options.scales, checkpoints)]

    def run(self, program: Program, options: PassOptions, context: PassContext) -> PassResult:
        assert isinstance(options, self.Options)
        measured = measured_scales(options.scales, context.checkpoints, program)
        matches: list[Match] = []
        misses: list[NearMiss] = []
        choices: list[LayerChoice] = []
        for denoiser in program:
            layers = _linear_layers(denoiser)
            for group in measured[denoiser.name].balance:
                gain = group.gain.get(options.scheme, 0.0)
                choice, reason = "as it is", f"{gain:+.2f} dB of {options.scheme} if divided"
                if gain >= options.min_gain and group.exponents:
                    found = _norm_before(group, layers, denoiser)
                    if isinstance(found, str):
                        name = group.layers[0]
                        misses.append(NearMiss(denoiser.name, name, name, found))
                    else:
                        _Division(denoiser, context, group.exponents).apply(found)
                        context.tick()
                        choice = DIVIDED
                        module = module_path(found.norm)
                        matches.append(Match(denoiser.name, found.norm.name, module))
                choices += [
                    LayerChoice(denoiser.name, name, choice, reason) for name in group.layers
                ]
            clean(denoiser)
        return PassResult(program, tuple(matches), tuple(misses), choices=tuple(choices))


@dataclass(frozen=True)
class _Found:
    """A norm, and all that read it."""

    norm: Node
    layers: tuple[Node, ...]


def _linear_layers(denoiser: Denoiser) -> dict[str, Node]:
    """Name → linear layer with a stored weight that nothing else reads."""
    parameters = denoiser.parameters()
    return {
        parameters[weight].removesuffix(".weight"): node
        for node in denoiser.graph.nodes
        if is_call(node, aten.linear.default)
        and (weight := node.args[1]) in parameters
        and len(weight.users) == 1
    }


def _norm_before(
    group: BalancedLayers, layers: Mapping[str, Node], denoiser: Denoiser
) -> _Found | str:
    """The norm whose channels can be divided for a group, or why there is none."""
    nodes = [layers.get(name) for name in group.layers]
    readers = tuple(node for node in nodes if node is not None)
    sources = {node.args[0] for node in readers}
    if len(readers) < len(nodes) or len(sources) > 1:
        return "the layers of the group do not read one tensor, each with a weight of its own"
    (norm,) = sources
    assert isinstance(norm, Node)
    if norm.target not in (ops.adaln.default, ops.layer_norm.default):
        return "what the layers read is no fused norm"
    if set(norm.users) != set(readers):
        return "the norm is read by others too"
    if norm.target is ops.adaln.default:
        if tensor_of(norm.args[1]).shape[-2] != 1:  # type: ignore[arg-type]
            return "it is modulated per token: dividing would cost as much as the norm"
        return _Found(norm, readers)
    parameters = denoiser.parameters()
    weight, bias = norm.args[1:3]
    if not all(node in parameters and len(node.users) == 1 for node in (weight, bias)):  # type: ignore[union-attr, arg-type]
        return "the norm has no weight and bias of its own"
    return _Found(norm, readers)


class _Division:
    """Divides the channels of one norm's result.

    Args:
        exponents: channel j is divided by 2 to this power.
    """

    def __init__(self, denoiser: Denoiser, context: PassContext, exponents: Sequence[int]) -> None:
        self._denoiser, self._context = denoiser, context
        self._editor = Editor(denoiser)
        self._factor = torch.exp2(torch.tensor(exponents, dtype=torch.float32))

    def apply(self, found: _Found) -> None:
        """Verify the division with every layer, then make it."""
        for layer in found.layers:
            editor = self._editor.before(layer)
            with editor.scratch():
                norm = editor.call(found.norm.target, *self._divided(found.norm))  # type: ignore[arg-type]
                weight = self._scratch_weight(layer.args[1], self._factor)
                after = editor.call(aten.linear.default, norm, weight, *layer.args[2:])
                inputs = [n for n in found.norm.all_input_nodes if n.op != "placeholder"]
                self._context.verify(self._denoiser, layer, after, inputs)
        norm = found.norm
        if norm.target is ops.adaln.default:
            self._editor.before(norm)
            norm.args = self._divided(norm)  # type: ignore[assignment]
        else:
            for parameter in norm.args[1:3]:
                self._multiply(parameter, 1 / self._factor)
        for layer in found.layers:
            self._multiply(layer.args[1], self._factor)

    def _divided(self, norm: Node) -> tuple[object, ...]:
        """The norm's arguments with its channels divided, built before the editor's place."""
        x, first, second, eps = norm.args
        inverse = 1 / self._factor
        if norm.target is ops.layer_norm.default:
            return (
                x,
                self._scratch_weight(first, inverse),
                self._scratch_weight(second, inverse),
                eps,
            )
        reader = next(iter(norm.users))
        stem = self._editor.weights[reader.args[1]].removesuffix(".weight")  # type: ignore[index]
        factor = self._editor.weight(f"{stem}.input_factor", constant(inverse))
        scale = self._editor.call(aten.add.Tensor, first, 1)
        scale = self._editor.call(aten.mul.Tensor, scale, factor)
        return (
            x,
            self._editor.call(aten.add.Tensor, scale, -1),
            self._editor.call(aten.mul.Tensor, second, factor),
            eps,
        )

    def _scratch_weight(self, parameter: object, factor: Tensor) -> Node:
        """A weight for verification; `clean` removes it, as nothing reads it afterwards."""
        name, scaled = self._scaled(parameter, factor)
        return self._editor.weight(f"{name}.divided", scaled)

    def _multiply(self, parameter: object, factor: Tensor) -> None:
        name, scaled = self._scaled(parameter, factor)
        self._denoiser.weights[name] = scaled

    def _scaled(self, parameter: object, factor: Tensor) -> tuple[str, LazyTensor]:
        name = self._editor.weights[parameter]  # type: ignore[index]
        return name, columns_times(self._denoiser.weights[name], factor)
