"""`turbo-opt verify`, `inspect` and `diff`: questions to artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from turbo_opt.cli.devices import device_option, resolve_device
from turbo_opt.cli.session import Session, common_options, pass_session


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@device_option
@common_options
@pass_session
def verify(session: Session, artifact: Path, device: str) -> None:
    """Check an artifact's files and replay its stored inputs.

    Exit code 1 if a replay gives another output than was stored, 2 if a file is damaged.
    """
    from turbo_opt.artifact.manifest import read_manifest
    from turbo_opt.artifact.verify import verify as check
    from turbo_opt.cli.progress import Board
    from turbo_opt.cli.tables import decibels, size, table

    read_manifest(artifact.expanduser())
    with Board(session) as board, board.step(f"verify {artifact}"):
        found = check(artifact, resolve_device(device)).to_json()
    rows = [
        (
            item["denoiser"],
            decibels(item["sqnr_db"]),
            "bitwise" if item["same_environment"] else f"{item['min_sqnr_db']:.0f} dB",
            "ok" if item["passed"] else "DIFFERS",
        )
        for item in found["replays"]
    ]
    session.report(
        found,
        f"{found['files']} files, {size(found['bytes'])}: intact",
        table(("replay", ">SQNR", ">wanted", ""), rows) if rows else "no replay is stored",
        *(f"{name}: not replayed, {reason}" for name, reason in found["skipped"].items()),
        *(f"{name}: saved with {old}, here {new}" for name, (old, new) in found["changed"].items()),
    )
    if not found["passed"]:
        session.print_error(f"error: {artifact}: a replay gives another output than was stored")
        raise click.exceptions.Exit(1)


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@common_options
@pass_session
def inspect(session: Session, artifact: Path) -> None:
    """Show what is in an artifact.

    Its networks with their operators and dtypes, passes, schedule, and what it was made with.
    """
    from turbo_opt.artifact.inspect import inspect_artifact
    from turbo_opt.artifact.manifest import jsonable, read_manifest
    from turbo_opt.cli.tables import pairs, pass_table, size, table
    from turbo_opt.compiler.records import pass_row

    found = inspect_artifact(artifact)
    history = read_manifest(artifact.expanduser()).history
    found["passes"] = [pass_row(item) for item in history]
    found = jsonable(found)
    schedule, networks = found["schedule"], found["denoisers"]
    totals = {
        "seconds": sum(row["seconds"] or 0 for row in found["passes"]),
        "weight_bytes_after": sum(item["weight_bytes"] for item in networks.values()),
    }
    head = {
        "artifact": f"{found['path']}, format {found['format_version']}",
        "size": f"{size(found['bytes'])} in {found['files']} files",
        "target": found["target"],
        "model": f"{found['components']['source']} ({found['components']['pipeline_class']})",
        "schedule": f"{schedule['steps']} steps, {schedule['evaluations']} evaluations "
        f"({', '.join(schedule['rules'])})",
        "facts": ", ".join(found["facts"]) or "none",
        "made with": ", ".join(f"{name} {value}" for name, value in found["environment"].items()),
    }
    rows = [
        (
            name,
            item["model_class"],
            item["dtype"],
            item["weights"],
            ", ".join(f"{dtype} {size(count)}" for dtype, count in item["bytes_by_dtype"].items()),
        )
        for name, item in networks.items()
    ]
    operators = [
        table(("operator", f">{name}"), item["operators"].items())
        for name, item in networks.items()
    ]
    session.report(
        found,
        pairs(head),
        table(("network", "class", "computes in", ">weights", "stored as"), rows),
        pass_table(found["passes"], totals) if history else "no pass was run",
        *operators,
    )


@click.command()
@click.argument("first", type=click.Path(path_type=Path), metavar="A")
@click.argument("second", type=click.Path(path_type=Path), metavar="B")
@click.option("--exit-code", is_flag=True, help="Exit with 1 if the artifacts differ.")
@common_options
@pass_session
def diff(session: Session, first: Path, second: Path, exit_code: bool) -> None:
    """Show how two artifacts differ.

    In recipe, passes, operators, weights, schedule and size; weights are compared by content.
    """
    from turbo_opt.artifact.diff import diff_artifacts
    from turbo_opt.artifact.manifest import jsonable

    found = jsonable(diff_artifacts(first, second))
    session.report(found, *_difference(found))
    if exit_code and not found["same"]:
        raise click.exceptions.Exit(1)


def _difference(found: dict[str, Any]) -> list[Any]:
    from turbo_opt.cli.tables import NOTHING, size, table

    parts: list[Any] = []
    verdict = "the same networks and schedule" if found["same"] else "different"
    parts.append(f"{verdict}; {size(found['bytes'][0])} and {size(found['bytes'][1])}")
    for key in ("recipe", "passes", "schedule"):
        rows = [
            (name, *(NOTHING if value is None else value for value in both))
            for name, both in found[key].items()
        ]
        if rows:
            parts.append(table((key, "A", "B"), rows))
    for change in ("removed", "added"):
        parts += [f"network {name}: {change}" for name in found[f"denoisers_{change}"]]
    for name, item in found["denoisers"].items():
        rows = [(operator, f"{count:+d}") for operator, count in item["operators"].items()]
        if rows:
            parts.append(table((f"{name}, operator", ">change"), rows))
        for kind, weights in item["weights"].items():
            if weights:
                parts.append(f"{name}: {len(weights)} weights {kind}, such as {weights[0]}")
    return parts
