"""`turbo-opt calibrate sla`: tune a model for sparse-linear attention."""

from __future__ import annotations

from pathlib import Path

import click

from turbo_opt.cli.calibrate_report import Steps, show_report
from turbo_opt.cli.devices import device_option, resolve_device
from turbo_opt.cli.session import Session, common_options, pass_session
from turbo_opt.errors import BadInput


@click.command()
@click.argument("job", type=click.Path(path_type=Path))
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a value of the job, such as training.steps=100. May be repeated.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of checkpoints, logs and the model.",
)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --out.")
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
    from turbo_opt.cli.places import check_writable, plain_place
    from turbo_opt.cli.progress import Board

    if closed_form and resume:
        raise BadInput("--closed-form takes minutes and keeps nothing to --resume")
    out = plain_place(out)
    check_writable(out)

    from turbo_opt.calibration.jobs.load import load_job
    from turbo_opt.calibration.jobs.schema import SLAJob
    from turbo_opt.calibration.sla.run import solve_sla, train_sla
    from turbo_opt.calibration.training.world import start_world

    settings = load_job(job, SLAJob, overrides)
    context = 1 if closed_form else settings.training.context_parallel
    session.when_stopped = "" if closed_form else "; --resume goes on from the last checkpoint"
    with start_world(resolve_device(device), context) as world:
        session.quiet |= not world.is_main
        with Board(session) as board:
            progress = Steps(board)
            if closed_form:
                report = solve_sla(settings, out, world, progress=progress)
            else:
                report = train_sla(settings, out, world, resume=resume, progress=progress)
        if world.is_main:
            show_report(session, report)
