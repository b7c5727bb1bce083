"""`turbo-opt calibrate sla`: tune a model for sparse-linear attention."""

from __future__ import annotations

from pathlib import Path

import click

from turbo_opt.cli.calibrate_job import RESUMABLE, job_folder, job_options, run_job
from turbo_opt.cli.devices import device_option
from turbo_opt.cli.session import Session, common_options, pass_session
from turbo_opt.errors import BadInput


@click.command()
@job_options("training.steps=100")
@click.option(
    "--closed-form", is_flag=True, help="Solve proj_l by ridge regression, without training."
)
@device_option
@common_options
@pass_session
def sla(
    session: Session,
    job: Path,
    overrides: tuple[str, ...],
    out: Path,
    resume: bool,
    closed_form: bool,
    device: str,
) -> None:
    """Tune the model of JOB (a .yaml file) for sparse-linear attention.

    Leaves OUT/model, a diffusers folder whose weights `sparse-attention` reads. For several GPUs:
    torchrun --nproc-per-node N -m turbo_opt calibrate sla JOB --out OUT
    """
    if closed_form and resume:
        raise BadInput("--closed-form takes minutes and keeps nothing to --resume")
    out = job_folder(out)

    from turbo_opt.calibration.jobs.load import load_job
    from turbo_opt.calibration.jobs.schema import SLAJob
    from turbo_opt.calibration.sla.run import solve_sla, train_sla

    settings = load_job(job, SLAJob, overrides)
    if closed_form:
        run_job(
            session,
            device,
            1,
            lambda world, steps: solve_sla(settings, out, world, progress=steps, say=steps.say),
        )
        return
    session.when_stopped = RESUMABLE
    run_job(
        session,
        device,
        settings.training.context_parallel,
        lambda world, steps: train_sla(
            settings, out, world, resume=resume, progress=steps, say=steps.say
        ),
    )
