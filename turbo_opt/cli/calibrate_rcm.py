"""`turbo-opt calibrate rcm`: distil a model into one to four steps."""

from __future__ import annotations

from pathlib import Path

import click

from turbo_opt.cli.calibrate_report import Steps, show_report
from turbo_opt.cli.devices import device_option, resolve_device
from turbo_opt.cli.session import Session, common_options, pass_session


@click.command()
@click.argument("job", type=click.Path(path_type=Path))
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a value of the job, such as rcm.warm_up=100. May be repeated.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of checkpoints, logs and the model.",
)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --out.")
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
    from turbo_opt.cli.places import check_writable, plain_place
    from turbo_opt.cli.progress import Board

    out = plain_place(out)
    check_writable(out)

    from turbo_opt.calibration.jobs.load import load_job
    from turbo_opt.calibration.rcm.run import train_rcm
    from turbo_opt.calibration.rcm.schema import RCMJob
    from turbo_opt.calibration.training.world import start_world

    settings = load_job(job, RCMJob, overrides)
    session.when_stopped = "; --resume goes on from the last checkpoint"
    with start_world(resolve_device(device), settings.training.context_parallel) as world:
        session.quiet |= not world.is_main
        with Board(session) as board:
            report = train_rcm(settings, out, world, resume=resume, progress=Steps(board))
        if world.is_main:
            show_report(session, report)
