"""Jobs of `turbo-opt calibrate sla`: training, or the closed form."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from torch import nn

from turbo_opt.calibration.data.batches import Batches, split
from turbo_opt.calibration.flow import Denoiser, NoiseLevels, autocast, settled
from turbo_opt.calibration.given_weights import open_alike
from turbo_opt.calibration.jobs.run import Parts, export, open_parts, shipped_weights, train
from turbo_opt.calibration.jobs.schema import SLAJob
from turbo_opt.calibration.networks import DenoiserFolder, build_network, set_parameter
from turbo_opt.calibration.places import MODEL, Progress, Report, Say, job_folder, unheard
from turbo_opt.calibration.sla.attention import Sparsity
from turbo_opt.calibration.sla.closed_form import (
    Solution,
    attend_densely,
    projection_values,
    solve_projections,
)
from turbo_opt.calibration.sla.companions import Companion
from turbo_opt.calibration.sla.objective import STUDENT, SLAObjective
from turbo_opt.calibration.sla.student import (
    check_dense,
    check_start,
    initial_values,
    make_sparse,
    set_attention,
)
from turbo_opt.calibration.training.blocks import set_up_blocks, uncompiled
from turbo_opt.calibration.training.context import share_tokens
from turbo_opt.calibration.training.loop import Trainer
from turbo_opt.calibration.training.world import World
from turbo_opt.errors import BadInput


def train_sla(
    job: SLAJob,
    out: Path,
    world: World,
    *,
    resume: bool = False,
    progress: Progress,
    say: Say = unheard,
) -> Report:
    """Tune a student and write `out/model`. All processes call.

    Raises:
        BadInput: the job, its data or its models do not fit; nothing was written.
        TurboOptError: the loss or a gradient is not finite.
    """
    parts = _open(job, say)
    return train(
        parts,
        out,
        world,
        lambda: _objective(parts, world),
        resume=resume,
        progress=progress,
        say=say,
    )


def solve_sla(
    job: SLAJob, out: Path, world: World, *, progress: Progress, say: Say = unheard
) -> Report:
    """Solve `proj_l` in closed form and write `out/model`. All processes call.

    Raises:
        BadInput: as `train_sla`, or the attention has no `proj_l`.
    """
    if job.sla.mode != "sla":
        raise BadInput(
            f"--closed-form solves proj_l, which sla.mode {job.sla.mode!r} does not have"
        )
    parts = _open(job, say)
    if world.context_size > 1:
        raise BadInput("--closed-form shares samples among processes, not the tokens of one clip")
    with world.led_by_main(lambda: job_folder(out, parts.job, resume=False, say=say)):
        started = time.monotonic()
        lean = _without_training(parts)
        objective = _objective(lean, world)
        trainer = Trainer(lean.job, out, objective, parts.samples, world)
        before = trainer.evaluate()
        solutions = _solve(lean, objective.teacher, world, progress)
        student = objective.trained[STUDENT]
        for name, value in projection_values(solutions).items():
            set_parameter(student.get_parameter(name), value.to(world.device))
        report = {
            "job": "sla --closed-form",
            "model": str(out / MODEL),
            "seconds": time.monotonic() - started,
            "before": before,
            "after": trainer.evaluate(),
            "layers": {
                name: {"error_before": each.error_before, "error_after": each.error_after}
                for name, each in solutions.items()
            },
            "broken_samples": trainer.broken_samples(),
            "notes": [],
        }
        export(parts, shipped_weights(objective), out, report, world)
    return report


def _without_training(parts: Parts[SLAJob]) -> Parts[SLAJob]:
    """The same without what only training takes memory for: companions, an average, moments of all
    weights but the projections', samples on the device."""
    job = parts.job
    settled_job = job.model_copy(
        update={
            "companions": (),
            "data": job.data.model_copy(update={"resident": False}),
            "sla": job.sla.model_copy(update={"trained": "proj_l"}),
            "training": job.training.model_copy(update={"average": None}),
        }
    )
    return replace(parts, job=settled_job, companions=())


def _solve(
    parts: Parts[SLAJob], teacher: Denoiser, world: World, progress: Progress
) -> dict[str, Solution]:
    """The projections of all layers, on clips that are learned from."""
    job, settings = parts.job, parts.job.closed_form
    trained, _ = split(parts.samples, job.data.held_out)
    batches = Batches(parts.samples, trained, job.training.seed, world.device, unconditional=False)
    with autocast(world.device, parts.compute), uncompiled():
        return solve_projections(
            teacher,
            Sparsity.of(job.sla),
            batches,
            range(min(settings.clips, len(trained))),
            NoiseLevels.of(job.noise, parts.teacher),
            settings.noise_levels,
            settings.ridge,
            world,
            progress=lambda done, total: progress("closed form", done, total, ""),
        )


def _open(job: SLAJob, say: Say = unheard) -> Parts[SLAJob]:
    """Everything that can be wrong, before any weight is read."""
    parts = open_parts(job, job.student.start, say)
    check_start(job.sla, parts.start, say)
    companions = tuple(
        open_alike(f"companions[{index}].source", each.source, parts.teacher, job.folder)
        for index, each in enumerate(job.companions)
    )
    for each in companions:
        check_dense(each)
    # A difference that an expert has learned is added to the same expert.
    settled_job = parts.job.model_copy(
        update={
            "companions": tuple(
                each.model_copy(update={"noise": settled(each.noise, parts.teacher)})
                for each in job.companions
            )
        }
    )
    return replace(parts, job=settled_job, companions=companions)


def _objective(parts: Parts[SLAJob], world: World) -> SLAObjective:
    job = parts.job
    group = world.context_group

    def make_student(network: nn.Module) -> None:
        make_sparse(network, job.sla, group)
        if group is not None:
            share_tokens(network, group)
        set_up_blocks(network, job.training.activations, job.training.compile)

    def make_teacher(network: nn.Module) -> None:
        network.requires_grad_(False)
        if group is not None:
            set_attention(network, attend_densely, group)
            share_tokens(network, group)
        set_up_blocks(network, compile=job.training.compile)

    fill = initial_values(job.sla, parts.teacher.config)

    def sparse() -> Denoiser:
        return Denoiser(build_network(parts.start, world, make_student, fill), parts.teacher)

    def dense(folder: DenoiserFolder) -> Denoiser:
        return Denoiser(build_network(folder, world, make_teacher), parts.teacher)

    companions = [
        Companion(dense(folder), sparse(), NoiseLevels.of(each.noise, parts.teacher))
        for each, folder in zip(job.companions, parts.companions, strict=True)
    ]
    return SLAObjective(
        sparse(),
        dense(parts.teacher),
        NoiseLevels.of(job.noise, parts.teacher),
        job.data.unconditional_share,
        companions,
    )
