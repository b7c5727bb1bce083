"""What every training job does around its objective: check, begin, train, report, export."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor

from turbo_opt.calibration.components import Preview, check_draws
from turbo_opt.calibration.data.batches import split
from turbo_opt.calibration.data.samples import SampleSet
from turbo_opt.calibration.export import export_model
from turbo_opt.calibration.fits import check_fits, check_shares
from turbo_opt.calibration.flow import BOUNDARY, boundary_of, settled
from turbo_opt.calibration.given_weights import open_alike
from turbo_opt.calibration.jobs.load import AnyJob
from turbo_opt.calibration.networks import DenoiserFolder, open_denoiser
from turbo_opt.calibration.places import (
    MODEL,
    REPORT,
    SAMPLES,
    Progress,
    Report,
    Say,
    job_folder,
    unheard,
    write_job,
)
from turbo_opt.calibration.training.logs import check_tensorboard
from turbo_opt.calibration.training.loop import Trainer, micro_batch
from turbo_opt.calibration.training.objective import Objective
from turbo_opt.calibration.training.trainee import norm_of
from turbo_opt.calibration.training.world import World
from turbo_opt.errors import TurboOptError
from turbo_opt.ir.schedule import Schedule
from turbo_opt.kernels.whole_file import write_whole


@dataclass(frozen=True)
class Parts(Generic[AnyJob]):
    """A job with what it names, found and fitting; no weight is read.

    Attributes:
        start: where the student's weights begin: with the teacher's, or those of another place.
        companions: other models that are learned from.
    """

    job: AnyJob
    samples: SampleSet
    teacher: DenoiserFolder
    start: DenoiserFolder
    companions: tuple[DenoiserFolder, ...] = ()

    @property
    def imitated(self) -> dict[str, Path]:
        """Where the weights that are learned from lie, by what the job calls them."""
        others = {f"companions[{i}]": each.path for i, each in enumerate(self.companions)}
        return {"teacher": self.teacher.path, **others}

    @property
    def compute(self) -> torch.dtype:
        """The dtype of products."""
        dtype: torch.dtype = getattr(torch, self.job.training.compute_dtype)
        return dtype


def open_parts(job: AnyJob, start: str | None = None, say: Say = unheard) -> Parts[AnyJob]:
    """Find teacher, student and samples. The job then says which noise levels are trained.

    Args:
        start: the job's `student.start`.

    Raises:
        BadInput: one is missing, or they do not fit each other.
    """
    teacher = student = open_denoiser(job.teacher.source, job.teacher.denoiser, job.folder)
    if start is not None:
        student = open_alike("student.start", start, teacher, job.folder)
    samples = SampleSet.open(job.path(job.data.folder), job.data.broken_share)
    split(samples, job.data.held_out)
    check_fits(samples, teacher)
    noise = settled(job.noise, teacher)
    if len(teacher.pipeline.denoisers) > 1 and noise != job.noise:
        boundary = boundary_of(teacher)
        say(
            f"{teacher.name} is trained at noise levels from {noise.low:g} to {noise.high:g} (its "
            f"model has {'no' if boundary is None else f'{boundary:g} as'} {BOUNDARY}; `noise` in "
            "the job says otherwise)"
        )
    return Parts(job.model_copy(update={"noise": noise}), samples, teacher, student)


def train(
    parts: Parts[Any],
    out: Path,
    world: World,
    build: Callable[[], Objective],
    *,
    resume: bool,
    progress: Progress,
    say: Say = unheard,
    schedule: Schedule | None = None,
    adjust: Callable[[Trainer], None] = lambda trainer: None,
    weights: Callable[[Objective], Mapping[str, Tensor]] | None = None,
    declared: Mapping[str, str] | None = None,
    remarks: Callable[[int], Sequence[str]] = lambda steps: (),
) -> Report:
    """Train what `build` makes and write `out/model`. All processes call.

    Args:
        build: makes the objective, once everything else is checked.
        schedule: the steps of the clips that are drawn; None for those of the teacher's sampler.
        adjust: told of the trainer before it starts or resumes.
        weights: the parameters of the model that is written; None: those of the shipped network.
        declared: what the model's files say besides, for passes that ask.
        remarks: what the report says to the user of a training that ended after so many steps.

    Raises:
        BadInput: the job does not fit the processes, or may not have the folder; nothing was
            written.
        TurboOptError: a loss, a gradient or a weight is not finite; no model was written.
    """
    job = parts.job
    micro_batch(job, world)
    check_shares(parts.samples, parts.teacher, world)
    check_tensorboard(job.log.tensorboard)
    if job.samples is not None:
        check_draws(parts.teacher)
    with world.led_by_main(lambda: job_folder(out, job, resume=resume, say=say)):
        started = time.monotonic()
        objective = build()
        draw = preview(parts, out, world, schedule, say)
        trainer = Trainer(job, out, objective, parts.samples, world, draw, parts.imitated)
        adjust(trainer)
        if resume:
            trainer.resume()
            if world.is_main:
                write_job(out, job)
        first = trainer.step
        before, after = trainer.run(lambda done, total, note: progress("train", done, total, note))
        with trainer.shipped.averaged(job.export.average):
            report = {
                "job": job.job,
                "model": str(out / MODEL),
                "steps": trainer.step,
                "first_step": first,
                "seconds": time.monotonic() - started,
                "before": before,
                "after": after,
                "broken_samples": trainer.broken_samples(),
                "notes": list(remarks(trainer.step)),
            }
            values = (weights or shipped_weights)(objective)
            export(parts, values, out, report, world, declared)
    return report


def shipped_weights(objective: Objective) -> dict[str, Tensor]:
    """The parameters of the network that is the result."""
    network = objective.trained[objective.shipped]
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def preview(
    parts: Parts[Any], out: Path, world: World, schedule: Schedule | None, say: Say
) -> Preview | None:
    """What draws the clips of a job that asks for them."""
    job, index = parts.job, parts.samples.index
    if job.samples is None:
        return None
    return Preview(
        parts.teacher,
        job.samples,
        out / SAMPLES,
        index.latents,
        index.text_length,
        parts.compute,
        world,
        schedule,
        say,
    )


def export(
    parts: Parts[Any],
    values: Mapping[str, Tensor],
    out: Path,
    report: Report,
    world: World,
    declared: Mapping[str, str] | None = None,
) -> None:
    """Write the model and the report. All processes call.

    Raises:
        TurboOptError: a weight or a number of the report is not finite; nothing was written.
    """
    if not math.isfinite(norm_of(values)):
        raise TurboOptError(
            f"{out / MODEL}: not written, as its weights, or their squares, are not finite"
        )
    try:
        text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    except ValueError:
        raise TurboOptError(
            f"{out / MODEL}: not written, as a number of its {REPORT} is not finite: {report}"
        ) from None
    dtype = getattr(torch, parts.job.export.dtype)
    record = {"job": parts.job.canonical(), "report": report}
    export_model(parts.teacher, values, out / MODEL, dtype, record, world, declared=declared)
    if world.is_main:
        write_whole(out / REPORT, text)
