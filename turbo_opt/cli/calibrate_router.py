"""`turbo-opt calibrate router`: train the router and ratio of SLA2."""

from __future__ import annotations

from pathlib import Path

import click

from turbo_opt.cli.calibrate_job import RESUMABLE, job_folder, job_options, run_job
from turbo_opt.cli.devices import device_option
from turbo_opt.cli.session import Session, common_options, pass_session


@click.command()
@job_options("router.topk=0.05")
@device_option
@common_options
@pass_session
def router(
    session: Session, job: Path, overrides: tuple[str, ...], out: Path, resume: bool, device: str
) -> None:
    """Train the router and the ratio of SLA2 for the model of JOB (a .yaml file).

    The model's own weights stay as they are. Leaves OUT/model, a diffusers folder whose weights
    `sparse-attention{mode=sla2}` reads, and from which `calibrate sla` with `mode: sla2` starts.
    For several GPUs:
    torchrun --nproc-per-node N -m turbo_opt calibrate router JOB --out OUT
    """
    out = job_folder(out)

    from turbo_opt.calibration.jobs.load import load_job
    from turbo_opt.calibration.sla2.run import train_router
    from turbo_opt.calibration.sla2.schema import RouterJob

    settings = load_job(job, RouterJob, overrides)
    session.when_stopped = RESUMABLE
    run_job(
        session,
        device,
        settings.training.context_parallel,
        lambda world, steps: train_router(
            settings, out, world, resume=resume, progress=steps, say=steps.say
        ),
    )
