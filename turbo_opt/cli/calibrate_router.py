"""`turbo-opt calibrate router`: train the router and ratio of SLA2."""

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
    help="Change a value of the job, such as router.topk=0.05. May be repeated.",
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
def router(
    session: Session, job: Path, overrides: tuple[str, ...], out: Path, resume: bool, device: str
) -> None:
    """Train the router and the ratio of SLA2 for the model of JOB (a .yaml file).

    The model's own weights stay as they are. Leaves OUT/model, a diffusers folder whose weights
    `sparse-attention{mode=sla2}` reads, and from which `calibrate sla` with `mode: sla2` starts.
    For several GPUs:
    torchrun --nproc-per-node N -m turbo_opt calibrate router JOB --out OUT
    """
    from turbo_opt.cli.places import check_writable, plain_place
    from turbo_opt.cli.progress import Board

    out = plain_place(out)
    check_writable(out)

    from turbo_opt.calibration.jobs.load import load_job
    from turbo_opt.calibration.sla2.run import train_router
    from turbo_opt.calibration.sla2.schema import RouterJob
    from turbo_opt.calibration.training.world import start_world

    settings = load_job(job, RouterJob, overrides)
    session.when_stopped = "; --resume goes on from the last checkpoint"
    with start_world(resolve_device(device), settings.training.context_parallel) as world:
        session.quiet |= not world.is_main
        with Board(session) as board:
            report = train_router(settings, out, world, resume=resume, progress=Steps(board))
        if world.is_main:
            show_report(session, report)
