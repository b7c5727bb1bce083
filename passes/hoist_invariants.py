"""Compute once what depends on the clip's size, the prompt or the noise level alone.

    f(x, prompt, t)  →  step(x, shape(sizes), text(prompt), time(t))

Rotary tables are made once for a clip size; text embedding and the keys and values of every
cross-attention once for a prompt; time embedding and modulation once for a noise level. The graph
stays as it is: the pass records which inputs define which stage, and the runtime splits there. What
depends on both prompt and noise level stays in the step, as does what takes more to keep than to
compute (see `ir.stages`).
"""

from __future__ import annotations

from collections import Counter

from pydantic import Field
from torch import Tensor
from torch.fx import Node

from turbo_opt.compiler.base import (
    Match,
    NearMiss,
    Numerics,
    Pass,
    PassOptions,
    PassResult,
    register_pass,
)
from turbo_opt.compiler.context import PassContext
from turbo_opt.ir.edit import module_path, user_inputs
from turbo_opt.ir.facts import Fact
from turbo_opt.ir.printer import op_name
from turbo_opt.ir.program import Denoiser, Program
from turbo_opt.ir.stages import Split, Stage, is_number, kept_bytes, split, writes_in_place

_INPUTS = {
    Stage.PROMPT: ("encoder_hidden_states", "encoder_hidden_states_image"),
    Stage.TIMESTEP: ("timestep",),
}


@register_pass
class HoistInvariants(Pass):
    name = "hoist-invariants"
    requires = frozenset({Fact.CANONICAL})
    establishes = frozenset({Fact.INVARIANTS_HOISTED})
    numerics = Numerics.EXACT

    class Options(PassOptions):
        prompt: bool = Field(
            True, description="keep keys and values of the prompt (0.4 GB for a 14B model)"
        )
        timestep: bool = Field(True, description="keep the modulation of each noise level")

    def run(self, program: Program, options: PassOptions, context: PassContext) -> PassResult:
        assert isinstance(options, self.Options)
        wanted = {Stage.PROMPT: options.prompt, Stage.TIMESTEP: options.timestep}
        matches: list[Match] = []
        misses: list[NearMiss] = []
        stats: Counter[str] = Counter()
        for denoiser in program:
            write = writes_in_place(denoiser.graph)
            if write is not None:
                misses.append(
                    _miss(denoiser, write, "the graph writes in place, so it stays whole")
                )
                continue
            inputs = user_inputs(denoiser.exported)
            misses += [_miss(denoiser, node, reason) for node, reason in _varying(inputs)]
            denoiser.stages = {
                stage.value: _defining(inputs, stage) if wanted[stage] else () for stage in _INPUTS
            }
            found = split(denoiser.graph, inputs, denoiser.stages)
            for stage in (Stage.SHAPE, Stage.PROMPT, Stage.TIMESTEP):
                tensors = [node for node in found.kept[stage] if not is_number(node)]
                stats[f"{stage}_bytes"] += sum(kept_bytes(node, inputs) for node in tensors)
                matches += [Match(denoiser.name, n.name, module_path(n)) for n in tensors]
            misses += [
                _miss(denoiser, node, "too large to keep, computed at each step")
                for node in found.refused
            ]
            stats.update(_counts(found))
        return PassResult(program, tuple(matches), tuple(misses), dict(stats))


def _defining(inputs: list[Node], stage: Stage) -> tuple[str, ...]:
    varying = {node for node, _ in _varying(inputs)}
    return tuple(
        str(node.target) for node in inputs if node.target in _INPUTS[stage] and node not in varying
    )


def _varying(inputs: list[Node]) -> list[tuple[Node, str]]:
    """Inputs that could define a stage but whose values grow with the clip, and why they do not."""
    return [
        (node, "one timestep per token: modulation has the size of the activations, B×L×6×C")
        for node in inputs
        if node.target in _INPUTS[Stage.TIMESTEP]
        and isinstance(node.meta["val"], Tensor)
        and node.meta["val"].ndim > 1
    ]


def _counts(found: Split) -> Counter[str]:
    """Nodes per stage, and linear layers that no step runs any more."""
    counts = Counter({f"{stage}_nodes": len(nodes) for stage, nodes in found.nodes.items()})
    early = {node for stage, nodes in found.nodes.items() if stage != Stage.STEP for node in nodes}
    early -= set(found.nodes[Stage.STEP])
    counts["linear_layers_hoisted"] = sum("linear" in op_name(node.target) for node in early)
    return counts


def _miss(denoiser: Denoiser, node: Node, reason: str) -> NearMiss:
    return NearMiss(denoiser.name, node.name, module_path(node), reason)
