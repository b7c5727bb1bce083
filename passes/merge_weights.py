"""Add to the weights what another training has changed: a fine-tuning's difference, or LoRA.

    W ← W + weight·(W_target − W_reference) + Σ scaleᵢ·(alphaᵢ / rankᵢ)·BᵢAᵢ

Computed in float32 when the weights are saved, and rounded once to the graph's dtype. Weights that
only the target has (`proj_l` of sparse-linear attention) are kept for the passes that read them.
Files may have any layout of `turbo_opt.checkpoints`; a name of a LoRA that fits no weight of the
model is an error. Source of the difference: SLA, arXiv 2509.24006; of LoRA: arXiv 2106.09685.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field, model_validator

from turbo_opt.checkpoints.lora import read_lora
from turbo_opt.checkpoints.names import is_kept_aside
from turbo_opt.checkpoints.places import WeightsRef, locate, places_of
from turbo_opt.checkpoints.reader import NetworkWeights, identities, listed, read_network
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
from turbo_opt.errors import BadInput
from turbo_opt.ir.facts import Fact
from turbo_opt.ir.program import Denoiser, Program
from turbo_opt.ir.transforms import plus_difference, unrounded
from turbo_opt.ir.weights import LazyTensor, cast
from turbo_opt.passes._weights import fit_to_graph, learned_shapes, matches_of, put

_ONLY_IN_BASE = "neither target nor reference has it: it stays as it is"
_ONLY_IN_REFERENCE = "only the reference has it: it is left out"
_COMPUTED = "the model computes it itself: it is left out"
_WHAT_SIDES_ARE = (
    "target and reference are one network after and before a tuning, with the same of its weights: "
    "`turbo-opt calibrate sla` writes the target as `model` in its --out, the reference is the "
    "job's teacher.source, or student.start; a LoRA is given as `loras`"
)
_KEPT = "only the target has it: it is kept for passes, and saved only where one reads it"


class Lora(PassOptions):
    """One LoRA and how strongly it counts."""

    weights: WeightsRef = Field(description="as `target`")
    scale: float = Field(1.0, allow_inf_nan=False, description="factor of its own scale")


@register_pass
class MergeWeights(Pass):
    name = "merge-weights"
    conflicts = frozenset({Fact.CHANNELS_BALANCED, Fact.LINEAR_QUANTIZED})
    numerics = Numerics.RETRAINED
    missing_weights_hint = (
        "they come from another training, such as `turbo-opt calibrate sla` for sparse-linear "
        "attention; without one, leave this pass out: `--disable merge-weights`"
    )
    brings_weights = True

    class Options(PassOptions):
        target: WeightsRef | None = Field(
            None,
            description="the tuned weights: a name in the recipe's `weights`, a folder, file or "
            "hub id; for a pair of experts {transformer=… transformer_2=…}, or a folder with both",
        )
        reference: WeightsRef | None = Field(
            None, description="the weights that the tuning of `target` began with"
        )
        weight: float = Field(
            1.0, allow_inf_nan=False, description="factor of the difference target − reference"
        )
        loras: tuple[Lora, ...] = Field(
            (), description="LoRA to add: {weights=… scale=1.0} each; all of them count"
        )

        @model_validator(mode="after")
        def _says_what_to_merge(self) -> MergeWeights.Options:
            if (self.target is None) != (self.reference is None):
                raise ValueError("target and reference are given together: their difference counts")
            if self.target is None and not self.loras:
                raise ValueError("nothing to merge: give target and reference, or loras")
            if self.target is None and self.weight != 1:
                raise ValueError("weight is the factor of target − reference, which are not given")
            return self

    @classmethod
    def files_read(cls, options: PassOptions, checkpoints: Mapping[str, str]) -> Sequence[str]:
        assert isinstance(options, cls.Options)
        refs = [options.target, options.reference, *(lora.weights for lora in options.loras)]
        return [
            digest
            for ref in refs
            if ref is not None
            for digest in identities(places_of(ref, checkpoints))
        ]

    def run(self, program: Program, options: PassOptions, context: PassContext) -> PassResult:
        assert isinstance(options, self.Options)
        names = list(program.denoisers)
        sums = {denoiser.name: _Sums(denoiser) for denoiser in program}
        misses: list[NearMiss] = []
        if options.target is not None and options.reference is not None:
            targets = locate(options.target, names, context.checkpoints)
            references = locate(options.reference, names, context.checkpoints)
            for name in names:
                misses += sums[name].add_difference(
                    read_network(targets[name]), read_network(references[name]), options.weight
                )
        for lora in options.loras:
            places = locate(lora.weights, names, context.checkpoints, every_network=False)
            for name, place in places.items():
                shared = list(places.values()).count(place) > 1
                sums[name].add_lora(place, lora.scale, alone=not shared)
        matches = tuple(match for name in names for match in sums[name].put_back())
        stats = Counter[str]()
        for item in sums.values():
            stats.update(merged=len(item.merged), kept_aside=len(item.kept), lora=len(item.lora))
        stats["only_in_the_base"] = sum(miss.reason == _ONLY_IN_BASE for miss in misses)
        return PassResult(program, matches, tuple(misses), dict(stats))


class _Sums:
    """The weights of one denoiser, in float32 while things are added to them.

    Attributes:
        merged: names that the difference of two checkpoints was added to.
        kept: names that only the target has.
        lora: names that LoRA was added to.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.merged: set[str] = set()
        self.kept: dict[str, LazyTensor] = {}
        self.lora: set[str] = set()
        self._denoiser = denoiser
        self._sums: dict[str, LazyTensor] = {}

    def add_difference(
        self, target: NetworkWeights, reference: NetworkWeights, weight: float
    ) -> list[NearMiss]:
        """Add weight·(target − reference) wherever all three have a weight; what was left out.

        Raises:
            BadInput: shapes differ, or target or reference alone lack a weight of the model.
        """
        denoiser = self._denoiser
        shapes = learned_shapes(denoiser)
        shapes |= {name: tensor.shape for name, tensor in denoiser.unread.items()}
        self._check_sides(shapes, target, reference)
        ours = fit_to_graph(f"{target.place}, for {denoiser.name}", target.tensors, shapes)
        theirs = fit_to_graph(f"{reference.place}, for {denoiser.name}", reference.tensors, shapes)
        for name in ours:
            self._sums[name] = plus_difference(self._sum(name), ours[name], theirs[name], weight)
        self.merged |= ours.keys()
        others = target.tensors.keys() - shapes.keys()
        computed = others & denoiser.weights.keys()
        self.kept |= {name: target.tensors[name] for name in sorted(others - computed)}
        reasons = dict.fromkeys(shapes.keys() - ours.keys(), _ONLY_IN_BASE)
        reasons |= dict.fromkeys(computed, _COMPUTED)
        reasons |= dict.fromkeys(
            reference.tensors.keys() - target.tensors.keys(), _ONLY_IN_REFERENCE
        )
        reasons |= {name: _KEPT for name in self.kept if not is_kept_aside(name)}
        return [
            NearMiss(denoiser.name, name, name.rpartition(".")[0], reason)
            for name, reason in sorted(reasons.items())
        ]

    def add_lora(self, place: Path, strength: float, alone: bool) -> None:
        """Add what the LoRA in `place` says, `strength` times."""
        denoiser = self._denoiser
        changes = read_lora(place, denoiser.name, learned_shapes(denoiser), alone)
        for name, found in changes.items():
            for change in found:
                self._sums[name] = change.added_to(self._sum(name), strength)
        self.lora |= changes.keys()

    def put_back(self) -> Sequence[Match]:
        """Give the program the sums, rounded, and what is kept; one match for each."""
        for name, tensor in self._sums.items():
            put(self._denoiser, name, cast(tensor, self._base(name).dtype))
        for name, tensor in self.kept.items():
            put(self._denoiser, name, tensor)
        return matches_of(self._denoiser, [*self._sums, *self.kept])

    def _sum(self, name: str) -> LazyTensor:
        return self._sums[name] if name in self._sums else unrounded(self._base(name))

    def _base(self, name: str) -> LazyTensor:
        denoiser = self._denoiser
        return denoiser.weights[name] if name in denoiser.weights else denoiser.unread[name]

    def _check_sides(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        target: NetworkWeights,
        reference: NetworkWeights,
    ) -> None:
        for one, other in ((target, reference), (reference, target)):
            alone = shapes.keys() & (one.tensors.keys() - other.tensors.keys())
            if alone:
                raise BadInput(
                    f"{other.place} lacks {len(alone)} weights that {self._denoiser.name} and "
                    f"{one.place} have: {listed(alone)}; {_WHAT_SIDES_ARE}"
                )
        if not shapes.keys() & target.tensors.keys():
            raise BadInput(
                f"{target.place} has no weight of {self._denoiser.name}, only the likes of "
                f"{listed(target.tensors)}; {_WHAT_SIDES_ARE}"
            )
