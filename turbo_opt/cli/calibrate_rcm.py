"""`turbo-opt calibrate rcm`: distil a model into one to four steps."""

from __future__ import annotations

from pathlib import Path

import click

from turbo_opt.cli.calibrate_job import RESUMABLE, job_folder, job_options, run_job
from turbo_opt.cli.devices import device_option
from turbo_opt.cli.session import Session, common_options, pass_session


@click.command()
@job_options("rcm.warm_up=100")
@device_option
@common_options
@pass_session
def rcm(
    session: Session, job: Path, overrides: tuple[str, ...], out: Path, resume: bool, device: str
) -> None:
    """Distil the guided model of JOB (a .yaml file) into an unguided one of 1 to 4 steps.

    Leaves OUT/model, a diffusers folder whose weights `distill-steps` takes. For several GPUs:
    torchrun --nproc-per-node N -m turbo_opt calibrate rcm JOB --out OUT
    """
    out = job_folder(out)

    from turbo_opt.calibration.jobs.load import load_job
    from turbo_opt.calibration.rcm.run import train_rcm
    from turbo_opt.calibration.rcm.schema import RCMJob

    settings = load_job(job, RCMJob, overrides)
    session.when_stopped = RESUMABLE
    run_job(
        session,
        device,
        settings.training.context_parallel,
        lambda world, steps: train_rcm(
            settings, out, world, resume=resume, progress=steps, say=steps.say
        ),
    )
