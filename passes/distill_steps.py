"""Exchange the weights for those of a distilled student, and its few steps for the schedule.

    50 guided steps of W  →  1 to 4 unguided steps of W_student        100 → 4 network evaluations

Steps and update rules are rCM's: see `turbo_opt.ir.rcm`. The weights may be a diffusers folder, a
safetensors file, or a `.pth` of TurboDiffusion or rCM. They must say that they are a student's, in
the file's metadata or a JSON beside it, unless the recipe takes them for one. A pair of experts
needs a student each. What the student has beyond the graph (`proj_l` of sparse-linear attention) is
kept for the passes that read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from turbo_opt.checkpoints.names import is_kept_aside
from turbo_opt.checkpoints.places import WeightsRef, locate, places_of
from turbo_opt.checkpoints.reader import NetworkWeights, identities, listed, read_network
from turbo_opt.checkpoints.student import Student, declared_student
from turbo_opt.compiler.base import (
    Match,
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
from turbo_opt.ir.rcm import MOST_STEPS, SIGMA_MAX, RcmRule, rcm_schedule
from turbo_opt.passes._weights import fit_to_graph, learned_shapes, matches_of, put

_SIGMA_MAX_OF_IMAGES = 200.0


@register_pass
class DistillSteps(Pass):
    name = "distill-steps"
    establishes = frozenset({Fact.DISTILLED})
    conflicts = frozenset({Fact.CHANNELS_BALANCED, Fact.DISTILLED, Fact.LINEAR_QUANTIZED})
    numerics = Numerics.RETRAINED
    missing_weights_hint = (
        "`turbo-opt calibrate rcm` trains a student; released ones are on the hub, for 1.3B "
        "TurboDiffusion/TurboWan2.1-T2V-1.3B-480P/TurboWan2.1-T2V-1.3B-480P.pth"
    )
    brings_weights = True

    class Options(PassOptions):
        weights: WeightsRef = Field(
            description="the student: a name in the recipe's `weights`, a folder, file or hub id; "
            "for a pair of experts {transformer=… transformer_2=…}, or a folder with both"
        )
        student: Literal["declared", "assume"] = Field(
            "declared",
            description="declared: the weights must say that they are distilled; assume: take "
            "them for a student",
        )
        steps: int = Field(4, ge=1, le=MOST_STEPS, description="steps of a clip")
        rule: RcmRule = Field(
            "sde", description="sde adds fresh noise after each step, ode follows the velocity"
        )
        sigma_max: float | None = Field(
            None,
            gt=0,
            description="noise level of the first step; null: what the student says, else 80 for "
            "text to video, 200 where images condition the model",
        )
        boundary: float | None = Field(
            None, gt=0, lt=1, description="time below which the low-noise expert runs; null: the "
            "model's own",
        )  # fmt: skip

    @classmethod
    def files_read(cls, options: PassOptions, checkpoints: Mapping[str, str]) -> Sequence[str]:
        assert isinstance(options, cls.Options)
        return identities(places_of(options.weights, checkpoints))

    def run(self, program: Program, options: PassOptions, context: PassContext) -> PassResult:
        assert isinstance(options, self.Options)
        places = locate(options.weights, list(program.denoisers), context.checkpoints)
        before = program.schedule.evaluations
        matches: list[Match] = []
        students = []
        kept = 0
        for denoiser in program:
            weights = read_network(places[denoiser.name])
            students.append(_student(weights, options.student))
            names = _exchange(denoiser, weights)
            kept += sum(name in denoiser.unread for name in names)
            matches += matches_of(denoiser, names)
        sigma_max = options.sigma_max or _sigma_max(program, students)
        program.schedule = rcm_schedule(
            options.steps,
            sigma_max,
            options.rule,
            boundary=_boundary(program, options.boundary),
            expand_timesteps=program.schedule.expand_timesteps,
        )
        stats = {
            "evaluations_before": before,
            "evaluations_after": program.schedule.evaluations,
            "sigma_max": sigma_max,
            "kept_aside": kept,
        }
        return PassResult(program, tuple(matches), stats=stats)


def _student(weights: NetworkWeights, rule: str) -> Student | None:
    found = declared_student(weights)
    if found is None and rule == "declared":
        raise BadInput(
            f"{weights.place}: does not say that it is a distilled student, by `distillation: rcm` "
            "in its metadata or in a JSON beside it; if it is one, `student: assume` takes it; "
            "`turbo-opt calibrate rcm` makes one that says so"
        )
    return found


def _exchange(denoiser: Denoiser, weights: NetworkWeights) -> list[str]:
    """Put the student's weights in the place of all that the graph has; their names.

    Raises:
        BadInput: weights are missing, unknown, or of other shapes.
    """
    shapes = learned_shapes(denoiser)
    what = f"{weights.place}, for {denoiser.name}"
    missing = shapes.keys() - weights.tensors.keys()
    unknown = {name for name in weights.tensors if name not in shapes and not is_kept_aside(name)}
    if missing or unknown:
        lines = [f"{len(missing)} weights are missing: {listed(missing)}"] if missing else []
        lines += [f"{len(unknown)} are not the model's: {listed(unknown)}"] if unknown else []
        raise BadInput(
            f"{what}: {'; '.join(lines)}; a student has all weights of its model, as "
            "`turbo-opt calibrate rcm` makes it"
        )
    found = fit_to_graph(what, weights.tensors, shapes)
    found |= {name: tensor for name, tensor in weights.tensors.items() if name not in shapes}
    for name, tensor in found.items():
        put(denoiser, name, tensor)
    return list(found)


def _sigma_max(program: Program, students: Sequence[Student | None]) -> float:
    """What the students say, else the released ones' by the kind of model."""
    stated = {student.sigma_max for student in students if student and student.sigma_max}
    if len(stated) > 1:
        raise BadInput(f"the students say different sigma_max, {sorted(stated)}; set `sigma_max`")
    if stated:
        return stated.pop()
    conditioned = any(
        denoiser.config.get("image_dim")
        or denoiser.config.get("in_channels") != denoiser.config.get("out_channels")
        for denoiser in program
    )
    return _SIGMA_MAX_OF_IMAGES if conditioned else SIGMA_MAX


def _boundary(program: Program, given: float | None) -> float | None:
    if len(program.denoisers) == 1:
        if given is not None:
            raise BadInput("boundary is for a pair of experts, the model has one network")
        return None
    boundary = given or program.components.pipeline_config.get("boundary_ratio")
    if boundary is None:
        raise BadInput("the model has two experts and no boundary_ratio; set `boundary`")
    return float(boundary)
