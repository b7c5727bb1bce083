"""`turbo-opt passes`: what passes there are, and what each does and takes."""

from __future__ import annotations

import inspect
import json
import sys
from typing import TYPE_CHECKING, Any

import click

from turbo_opt.cli.group import SuggestingGroup
from turbo_opt.cli.session import Session, common_options, pass_session

if TYPE_CHECKING:
    from turbo_opt.compiler.base import Pass


@click.group(cls=SuggestingGroup)
def passes() -> None:
    """List passes, and show what one does."""


@passes.command(name="list")
@common_options
@pass_session
def list_passes(session: Session) -> None:
    """All passes: the shipped ones and those of installed plug-ins."""
    from turbo_opt.cli.tables import table
    from turbo_opt.compiler.base import registered_passes

    records = [
        {"name": name, "numerics": cls.numerics.value, "summary": cls.summary()}
        for name, cls in registered_passes().items()
    ]
    session.report(records, table(("pass", "numerics", ""), [tuple(r.values()) for r in records]))


@passes.command()
@click.argument("name")
@common_options
@pass_session
def show(session: Session, name: str) -> None:
    """What a pass does, what it needs and gives, and its options."""
    from turbo_opt.cli.tables import pairs, table
    from turbo_opt.compiler.base import get_pass

    record = describe_pass(get_pass(name))
    facts = ("requires", "establishes", "invalidates", "conflicts", "needs_weights")
    values = {"numerics": record["numerics"]} | {
        key.replace("_", " "): ", ".join(record[key]) or "nothing" for key in facts
    }
    options = [
        (item["name"], item["type"], item["default"], item["description"])
        for item in record["options"]
    ]
    columns = ("option", "type", "default", "")
    session.report(
        record,
        f"{record['name']}\n\n{record['documentation']}\n",
        pairs(values),
        table(columns, options) if options else "\nno options",
    )


def describe_pass(cls: type[Pass]) -> dict[str, Any]:
    """Everything that can be said about a pass, as JSON values."""
    module = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or cls.__doc__ or "")
    return {
        "name": cls.name,
        "summary": cls.summary(),
        "documentation": module,
        "numerics": cls.numerics.value,
        "requires": sorted(cls.requires),
        "establishes": sorted(cls.establishes),
        "invalidates": sorted(cls.invalidates),
        "conflicts": sorted(cls.conflicts),
        "needs_weights": list(cls.needs_weights),
        "may_match_nothing": cls.may_match_nothing,
        "options": _options(cls.Options.model_json_schema(), {}, ""),
    }


def _options(section: dict[str, Any], outer: dict[str, Any], prefix: str) -> list[dict[str, Any]]:
    """The fields of a JSON schema, those of nested sections by their path."""
    definitions = {**outer, **section.get("$defs", {})}
    rows: list[dict[str, Any]] = []
    for name, field in section.get("properties", {}).items():
        path = f"{prefix}{name}"
        inner = definitions.get(str(field.get("$ref", "")).rpartition("/")[2])
        if inner is not None and "properties" in inner:
            rows += _options(inner, definitions, f"{path}.")
            continue
        required = name in section.get("required", ())
        rows.append(
            {
                "name": path,
                "type": _type(field, definitions),
                "default": "required" if required else json.dumps(field.get("default")),
                "description": " ".join(str(field.get("description", "")).split()),
            }
        )
    return rows


def _type(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in field:
        return _type(definitions[field["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in field:
        return " or ".join(_type(item, definitions) for item in field["anyOf"])
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}), definitions)}"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[key]}" for key, sign in bounds.items() if key in field]
    return " ".join([str(field.get("type", "any")), *limits])
