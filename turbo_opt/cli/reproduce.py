"""`turbo-opt reproduce`: run a failed pass again, from what it left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from turbo_opt.cli.session import Session, common_options, pass_session
from turbo_opt.errors import BadInput

if TYPE_CHECKING:
    from turbo_opt.compiler.manager import Verification
    from turbo_opt.compiler.validation import PlannedPass
    from turbo_opt.config.schema import Recipe


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@common_options
@pass_session
def reproduce(session: Session, folder: Path) -> None:
    """Run a failed pass again, from what it left behind.

    The outcome and the exit code are the pass's own. The weights are read from where they were.
    """
    from turbo_opt.artifact.manifest import jsonable
    from turbo_opt.cli.compile import PassProgress
    from turbo_opt.cli.progress import Board
    from turbo_opt.compiler.manager import PassManager
    from turbo_opt.compiler.reproducer import read_reproducer
    from turbo_opt.compiler.validation import validate_pipeline
    from turbo_opt.targets import get_target

    program, specs = read_reproducer(folder)
    recipe = _recipe(folder)
    target = get_target(recipe.target) if recipe is not None else None
    pipeline = validate_pipeline(
        specs,
        target=target,
        facts=program.facts,
        checkpoints=recipe.checkpoints() if recipe is not None else None,
    )
    verification = _verification(recipe, pipeline)
    with Board(session) as board:
        watching = PassProgress(board, len(pipeline))
        manager = PassManager(pipeline, verification=verification, instruments=[watching])
        manager.run(program)
    _show(session, folder, jsonable(watching.records))


def _recipe(folder: Path) -> Recipe | None:
    """The recipe of the failed run, where it was kept."""
    from turbo_opt.config.schema import Recipe

    path = folder / "recipe.json"
    if not path.is_file():
        return None
    try:
        return Recipe.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise BadInput(f"{path}: not a recipe ({error})") from None


def _verification(recipe: Recipe | None, pipeline: list[PlannedPass]) -> Verification:
    """The checks of the failed run; every match, against the tiers' budgets, if it is not known."""
    from turbo_opt.compiler.manager import Verification

    if recipe is None:
        return Verification()
    budgets = {
        item.spec.name: recipe.verify.budget(item.spec.name, item.pass_class.numerics)
        for item in pipeline
    }
    return Verification(recipe.verify.mode, recipe.verify.seed, budgets)


def _show(session: Session, folder: Path, records: list[dict[str, Any]]) -> None:
    from turbo_opt.cli.tables import pass_table
    from turbo_opt.compiler.records import pass_row

    rows = [pass_row(record) for record in records]
    totals = {
        "seconds": sum(row["seconds"] for row in rows),
        "weight_bytes_after": rows[-1]["weight_bytes_after"],
    }
    report = {"reproducer": str(folder), "failed": False, "passes": rows}
    names = " and ".join(row["name"] for row in rows)
    session.report(report, pass_table(rows, totals), f"{names} succeeds now")
