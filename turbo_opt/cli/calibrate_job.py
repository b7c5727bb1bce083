"""What the commands share that run a training job: their options, and the run itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from turbo_opt.cli.calibrate_report import Steps, show_report
from turbo_opt.cli.devices import resolve_device
from turbo_opt.cli.session import Session

if TYPE_CHECKING:
    from turbo_opt.calibration.training.world import World

Command = TypeVar("Command", bound=Callable[..., Any])
RESUMABLE = "; --resume goes on from the last checkpoint"
"""What a stopped run says of itself."""


def job_options(example: str) -> Callable[[Command], Command]:
    """JOB, --set, --out and --resume.

    Args:
        example: of a key and its value.
    """
    options = [
        click.argument("job", type=click.Path(path_type=Path)),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help=f"Change a value of the job, such as {example}. May be repeated.",
        ),
        click.option(
            "--out",
            required=True,
            type=click.Path(path_type=Path),
            help="Folder of checkpoints, logs and the model.",
        ),
        click.option(
            "--resume",
            is_flag=True,
            help="Go on from the last checkpoint in --out, where a job must be.",
        ),
    ]

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def job_folder(out: Path) -> Path:
    """The place of --out, which can be written to.

    Raises:
        BadInput: it cannot.
    """
    from turbo_opt.cli.places import check_writable, plain_place

    out = plain_place(out)
    check_writable(out)
    return out


def run_job(
    session: Session,
    device: str,
    context_size: int,
    run: Callable[[World, Steps], Mapping[str, Any]],
) -> None:
    """Run a job in torchrun's processes or this one alone, and show its report.

    Args:
        context_size: processes that share a clip.
        run: the job; all processes call it.
    """
    from turbo_opt.calibration.training.world import start_world
    from turbo_opt.cli.progress import Board

    with start_world(resolve_device(device), context_size) as world:
        session.quiet |= not world.is_main
        with Board(session) as board:
            report = run(world, Steps(board))
        if world.is_main:
            show_report(session, report)
