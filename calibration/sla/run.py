"""Jobs of `turbo-opt calibrate sla`: training, or the closed form."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from turbo_opt.calibration.components import Preview, check_draws
from turbo_opt.calibration.data.batches import Batches, split
from turbo_opt.calibration.data.samples import SampleSet
from turbo_opt.calibration.export import export_model
from turbo_opt.calibration.fits import check_fits, check_shares
from turbo_opt.calibration.flow import Denoiser, NoiseLevels, autocast
from turbo_opt.calibration.jobs.schema import SLAJob
from turbo_opt.calibration.networks import (
    DenoiserFolder,
    build_network,
    check_same_architecture,
    open_denoiser,
    set_parameter,
)
from turbo_opt.calibration.places import (
    MODEL,
    REPORT,
    SAMPLES,
    Progress,
    Report,
    begin_job,
)
from turbo_opt.calibration.sla.attention import Sparsity
from turbo_opt.calibration.sla.closed_form import (
    attend_densely,
    projection_values,
    solve_projections,
)
from turbo_opt.calibration.sla.objective import STUDENT, SLAObjective
from turbo_opt.calibration.sla.student import (
    PROJECTION,
    add_projections,
    attend_sparsely,
    set_attention,
    zero_projections,
)
from turbo_opt.calibration.training.context import share_tokens
from turbo_opt.calibration.training.logs import check_tensorboard
from turbo_opt.calibration.training.loop import Trainer, micro_batch
from turbo_opt.calibration.training.memory import save_activations
from turbo_opt.calibration.training.world import World
from turbo_opt.errors import BadInput


@dataclass(frozen=True)
class _Parts:
    """What both ways need."""

    job: SLAJob
    samples: SampleSet
    teacher: DenoiserFolder
    start: DenoiserFolder
    levels: NoiseLevels
    sparsity: Sparsity


def train_sla(
    job: SLAJob, out: Path, world: World, *, resume: bool = False, progress: Progress
) -> Report:
    """Tune a student and write `out/model`. All processes call.

    Raises:
        BadInput: the job, its data or its models do not fit; nothing was written.
        TurboOptError: the loss or a gradient is not finite.
    """
    parts = _open(job)
    micro_batch(job, world)
    check_shares(parts.samples, parts.teacher, world)
    check_tensorboard(job.log.tensorboard)
    if job.samples is not None:
        check_draws(parts.teacher)
    if world.is_main:
        begin_job(out, job, resume)
    world.wait()
    started = time.monotonic()
    objective = _objective(parts, world)
    trainer = Trainer(job, out, objective, parts.samples, world, _preview(parts, out, world))
    if resume:
        trainer.resume()
    first = trainer.step
    before, after = trainer.run(lambda done, total, note: progress("train", done, total, note))
    with trainer.shipped.averaged(job.export.average):
        report = {
            "job": "sla",
            "model": str(out / MODEL),
            "steps": trainer.step,
            "first_step": first,
            "seconds": time.monotonic() - started,
            "before": before,
            "after": after,
            "broken_samples": len(parts.samples.broken),
        }
        _export(parts, objective.trained[STUDENT], out, report, world)
    return report


def solve_sla(job: SLAJob, out: Path, world: World, *, progress: Progress) -> Report:
    """Solve `proj_l` in closed form and write `out/model`. All processes call.

    Raises:
        BadInput: as `train_sla`.
    """
    parts = _open(job)
    if world.context_size > 1:
        raise BadInput("--closed-form shares samples among processes, not the tokens of one clip")
    if world.is_main:
        begin_job(out, job, resume=False)
    world.wait()
    started = time.monotonic()
    settings, compute = job.closed_form, getattr(torch, job.training.compute_dtype)
    objective = _objective(parts, world)
    trainer = Trainer(job, out, objective, parts.samples, world)
    before = trainer.evaluate()
    trained, _ = split(parts.samples, job.data.held_out)
    batches = Batches(parts.samples, trained, job.training.seed, world.device, unconditional=False)
    teacher = Denoiser(build_network(parts.teacher, world, _prepare_teacher), parts.teacher)
    with autocast(world.device, compute):
        solutions = solve_projections(
            teacher,
            parts.sparsity,
            batches,
            range(min(settings.clips, len(trained))),
            parts.levels,
            settings.noise_levels,
            settings.ridge,
            world,
            progress=lambda done, total: progress("closed form", done, total, ""),
        )
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
        "broken_samples": len(parts.samples.broken),
    }
    _export(parts, student, out, report, world)
    return report


def _open(job: SLAJob) -> _Parts:
    """Everything that can be wrong, before any weight is read."""
    teacher = open_denoiser(job.teacher.source, job.teacher.denoiser, job.folder)
    start = teacher
    if job.student.start is not None:
        start = open_denoiser(str(job.path(job.student.start)), teacher.name)
        check_same_architecture(teacher, start)
    samples = SampleSet.open(job.path(job.data.folder), job.data.broken_share)
    split(samples, job.data.held_out)
    check_fits(samples, teacher)
    sla = job.sla
    sparsity = Sparsity(sla.topk, sla.block_q, sla.block_k, sla.feature_map)
    return _Parts(job, samples, teacher, start, NoiseLevels.of(job.noise, teacher), sparsity)


def _objective(parts: _Parts, world: World) -> SLAObjective:
    job = parts.job
    group = world.context_group

    def make_student(network: nn.Module) -> None:
        add_projections(network)
        set_attention(network, attend_sparsely(parts.sparsity), group)
        if group is not None:
            share_tokens(network, group)
        save_activations(network, job.training.activations)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(job.sla.trained == "all" or f".{PROJECTION}." in name)

    zeros = zero_projections(parts.teacher.config)
    student = build_network(parts.start, world, make_student, zeros)
    teacher = build_network(parts.teacher, world, lambda network: _prepare_teacher(network, group))
    return SLAObjective(
        Denoiser(student, parts.teacher),
        Denoiser(teacher, parts.teacher),
        parts.levels,
        job.data.unconditional_share,
    )


def _prepare_teacher(network: nn.Module, group: Any = None) -> None:
    network.requires_grad_(False)
    if group is not None:
        set_attention(network, attend_densely, group)
        share_tokens(network, group)


def _preview(parts: _Parts, out: Path, world: World) -> Preview | None:
    job, index = parts.job, parts.samples.index
    if job.samples is None:
        return None
    compute = getattr(torch, job.training.compute_dtype)
    return Preview(
        parts.teacher,
        job.samples,
        out / SAMPLES,
        index.latents,
        index.text_length,
        compute,
        world,
    )


def _export(parts: _Parts, student: nn.Module, out: Path, report: Report, world: World) -> None:
    values = {name: parameter.detach() for name, parameter in student.named_parameters()}
    dtype = getattr(torch, parts.job.export.dtype)
    record = {"job": parts.job.canonical(), "report": report}
    export_model(parts.teacher, values, out / MODEL, dtype, record, world)
    if world.is_main:
        (out / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
