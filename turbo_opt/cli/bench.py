"""`turbo-opt bench`: measure this machine, and let what was found decide."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from turbo_opt.cli.devices import device_option, resolve_device
from turbo_opt.cli.group import SuggestingGroup
from turbo_opt.cli.selection import (
    change_options,
    checked_pipeline,
    select_recipe,
    tiny_recipe_for,
)
from turbo_opt.cli.session import Session, common_options, pass_session

if TYPE_CHECKING:
    import torch

    from turbo_opt.cli.bench_kernels import Call
    from turbo_opt.cli.progress import Board


@click.group(cls=SuggestingGroup)
def bench() -> None:
    """Measure this machine."""


@bench.command()
@click.argument("recipes", nargs=-1, metavar="[RECIPE]…")
@change_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also add the choices to this table.",
)
@device_option
@common_options
@pass_session
def kernels(
    session: Session, recipes: tuple[str, ...], out: Path | None, device: str, **changes: Any
) -> None:
    """Time the providers of every operator, and record the choice.

    Times them at the shapes that the optimized graphs of each RECIPE have at its clip size; reads
    no weights. The choices go to the user's table, which decides from then on. Without a RECIPE:
    tiny-wan's for this machine.
    """
    device = resolve_device(device)
    names = recipes or (tiny_recipe_for(device),)
    chosen = {name: select_recipe(name, **changes) for name in names}
    pipelines = {name: checked_pipeline(recipe) for name, recipe in chosen.items()}

    from turbo_opt.cli.bench_kernels import Destinations, collect, meant_for_another, table_of
    from turbo_opt.cli.progress import Board
    from turbo_opt.kernels import read_provider_tables
    from turbo_opt.kernels.provider_table import device_name

    place = _current(device)
    here = device_name(place)
    destinations = Destinations(session, out)
    for name, recipe in chosen.items():
        if target := meant_for_another(recipe, place):
            session.note(f"note: {name} is for {target}; its calls are timed on {here}")
    started = time.perf_counter()
    calls: list[Call] = []
    with Board(session) as board:
        for name, recipe in chosen.items():
            with board.step(f"plan {name}"):
                collect(name, recipe, pipelines[name], calls)
        _measure(board, calls, place)
    tables = destinations.write(table_of(calls, place))
    read_provider_tables()
    record = {
        "device": here,
        "recipes": list(chosen),
        "tables": [str(path) for path in tables],
        "calls": [call.to_json() for call in calls],
        "seconds": time.perf_counter() - started,
    }
    _show(session, record)


def _current(device: str) -> torch.device:
    import torch

    if device == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _measure(board: Board, calls: list[Call], device: torch.device) -> None:
    task = board.task("time")
    for index, call in enumerate(calls):
        task.update(index, len(calls), call.operator)
        call.measure(device)
    task.finish(f"{len(calls)} calls")


def _show(session: Session, record: dict[str, Any]) -> None:
    from turbo_opt.cli.tables import NOTHING, table

    rows = [
        (
            row["operator"],
            row["call"],
            sum(row["counts"].values()),
            ", ".join(f"{name} {_ms(item['ms'])}" for name, item in row["times"].items())
            or NOTHING,
            row["choice"]
            if row["choice"] == row["declared"]
            else f"{row['choice']} (declared: {row['declared']})",
        )
        for row in record["calls"]
    ]
    skipped = Counter(item for row in record["calls"] for item in row["skipped"].items())
    lines = [f"not timed, {count}×: {name}, {reason}" for (name, reason), count in skipped.items()]
    recorded = sum(row["recorded"] for row in record["calls"])
    where = " and ".join(record["tables"]) or "nothing"
    session.report(
        record,
        table(("operator", "call", ">calls", "median ms", "choice"), rows),
        *lines,
        f"{recorded} choices for {record['device']} written to {where}",
    )


def _ms(value: float) -> str:
    return f"{value:.3g}"
