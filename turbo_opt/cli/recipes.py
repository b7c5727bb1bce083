"""`turbo-opt recipes`: what recipes there are, what they say, and whether they are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from turbo_opt.cli.group import SuggestingGroup
from turbo_opt.cli.selection import checked_pipeline, select_recipe
from turbo_opt.cli.session import Session, common_options, pass_session, print_json
from turbo_opt.errors import BadInput


@click.group(cls=SuggestingGroup)
def recipes() -> None:
    """List, show and check recipes, and write their JSON schema."""


@recipes.command(name="list")
@common_options
@pass_session
def list_all(session: Session) -> None:
    """All recipes: the project's own and the shipped ones."""
    from turbo_opt.cli.tables import table
    from turbo_opt.config.lookup import list_recipes

    records = [
        {
            "name": info.name,
            "kind": info.kind,
            "path": str(info.path),
            "description": info.description,
            "error": info.error,
        }
        for info in list_recipes()
    ]
    rows = [(item["name"], item["kind"], item["error"] or item["description"]) for item in records]
    session.report(records, table(("recipe", "from", ""), rows))


@recipes.command()
@click.argument("name")
@click.option("--resolved", is_flag=True, help="With what it extends and all defaults filled in.")
@common_options
@pass_session
def show(session: Session, name: str, resolved: bool) -> None:
    """The text of a recipe, or with --resolved all that it comes to."""
    import yaml  # type: ignore[import-untyped]

    from turbo_opt.config.lookup import find_recipe

    if resolved or session.json:
        recipe = select_recipe(name).canonical()
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)
        session.report(recipe, text.rstrip("\n"))
        return
    path = find_recipe(name)
    try:
        session.show(path.read_text(encoding="utf-8").rstrip("\n"))
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text (byte {error.start})") from None


@recipes.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE…")
@common_options
@pass_session
def validate(session: Session, files: tuple[str, ...]) -> None:
    """Check recipes with their passes' names, options, order and target. Exit code 2 if one is
    wrong."""
    records: list[dict[str, Any]] = []
    for file in files:
        try:
            checked_pipeline(select_recipe(file))
        except BadInput as error:
            records.append({"recipe": file, "valid": False, "errors": str(error).split("\n")})
        else:
            records.append({"recipe": file, "valid": True, "errors": []})
    if session.json:
        print_json(records)
    for record in records:
        if record["valid"] and not session.json:
            session.summary(record, f"{record['recipe']}: valid")
    wrong = [record for record in records if not record["valid"]]
    if wrong:
        raise BadInput("\n".join(line for record in wrong for line in record["errors"]))


@recipes.command()
@click.option(
    "--out", type=click.Path(path_type=Path), help="Write to this file instead of to stdout."
)
@common_options
@pass_session
def schema(session: Session, out: Path | None) -> None:
    """The JSON schema of recipes, for editors."""
    from turbo_opt.config.json_schema import recipe_json_schema, write_schema

    if out is None:
        click.echo(json.dumps(recipe_json_schema(), indent=2, ensure_ascii=False))
        return
    write_schema(out)
    session.summary({"schema": str(out)}, str(out))
