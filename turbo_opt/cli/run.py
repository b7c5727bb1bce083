"""`turbo-opt run`: a recipe into an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from turbo_opt.cli.selection import checked_pipeline, select_recipe, selection_options
from turbo_opt.cli.session import Session, common_options, pass_session
from turbo_opt.errors import BadInput


@click.command()
@selection_options
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder of the artifact."
)
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is there.")
@click.option(
    "--resume",
    is_flag=True,
    help="Take over finished passes and shards of a stopped run, and keep those of this one.",
)
@click.option(
    "--verify",
    "verify_mode",
    type=click.Choice(["all", "sample", "off"]),
    help="Check every match, a tenth of them, or none, instead of the recipe's choice.",
)
@click.option("--no-verify", is_flag=True, help="The same as --verify off.")
@click.option(
    "--dump-ir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write the graphs and their operator counts after every pass.",
)
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep results of passes here instead of in the user's cache folder.",
)
@click.option("--no-cache", is_flag=True, help="Keep no results of passes.")
@common_options
@pass_session
def run(
    session: Session,
    out: Path,
    overwrite: bool,
    resume: bool,
    verify_mode: str | None,
    no_verify: bool,
    dump_ir: Path | None,
    cache_dir: Path | None,
    no_cache: bool,
    **selection: Any,
) -> None:
    """Compile RECIPE's model and write an artifact.

    RECIPE is a .yaml file, or a name such as tiny-wan/cpu (see `turbo-opt recipes list`).
    """
    mode = _verify_mode(verify_mode, no_verify)
    if mode is not None:
        selection["overrides"] = (*selection["overrides"], f"verify.mode={mode}")
    recipe = select_recipe(**selection)
    pipeline = checked_pipeline(recipe)

    from turbo_opt.cli.compile import Compilation, compile_recipe
    from turbo_opt.cli.places import check_artifact_place, check_dump_place, plain_place
    from turbo_opt.cli.progress import Board

    out = plain_place(out)
    check_artifact_place(out, overwrite=overwrite)
    if dump_ir is not None:
        check_dump_place(dump_ir)
    cache = _cache_folder(session, cache_dir, no_cache)
    if resume and cache is None:
        session.note("note: without a cache, --resume takes over finished shards only")
    session.when_stopped = (
        f"; run it again with --resume to go on ({out} was not written)"
        if resume
        else f"; {out} was not written"
    )
    work = Compilation(recipe, pipeline, out, resume, overwrite, cache, dump_ir)
    with Board(session) as board:
        compiled = compile_recipe(work, board)
    _show(session, compiled.to_json())


def _verify_mode(mode: str | None, off: bool) -> str | None:
    if off and mode not in (None, "off"):
        raise BadInput(f"--no-verify and --verify {mode} contradict each other")
    return "off" if off else mode


def _cache_folder(session: Session, given: Path | None, none: bool) -> Path | None:
    from turbo_opt.cli.places import check_writable
    from turbo_opt.compiler.cache import default_cache_folder

    if none:
        if given is not None:
            raise BadInput("--no-cache and --cache-dir contradict each other")
        return None
    folder = given.expanduser() if given is not None else default_cache_folder()
    try:
        if folder.exists() and not folder.is_dir():
            raise BadInput(f"{folder}: the pass cache must be a folder")
        check_writable(folder / "entry")
    except BadInput as error:
        if given is not None:
            raise
        session.note(f"note: no results of passes are kept ({error})")
        return None
    return folder


def _show(session: Session, record: dict[str, Any]) -> None:
    from turbo_opt.cli.tables import decibels, near_miss_lines, pass_table, seconds, size

    totals = record["totals"]
    lines = [
        f"weights {size(totals['weight_bytes_before'])} → {size(totals['weight_bytes_after'])}",
        *(
            f"end to end, {name}: {decibels(value)}"
            for name, value in totals["end_to_end_sqnr_db"].items()
        ),
        f"{record['artifact']} in {seconds(totals['seconds'])}",
    ]
    shown = pass_table(record["passes"], {**totals, "seconds": totals["pass_seconds"]})
    session.summary(record, shown, *near_miss_lines(record["passes"]), *lines)
