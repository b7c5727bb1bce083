"""The JSON schema of recipes, with the passes that are installed, for editors and for the docs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from turbo_opt.compiler.base import Pass, registered_passes
from turbo_opt.config.schema import Recipe
from turbo_opt.targets import known_targets

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_json_schema() -> dict[str, Any]:
    """The schema of a recipe *file*: only `schema_version` is required, the rest may be inherited.

    Items of `passes` are the names of the registered passes, or those with their options.
    """
    schema = Recipe.model_json_schema()
    definitions: dict[str, Any] = schema["$defs"]
    for section in (*definitions.values(), schema):
        section.pop("required", None)
    schema["required"] = ["schema_version"]
    properties = schema["properties"]
    properties["target"]["anyOf"] = [
        {"enum": list(known_targets())},
        {"pattern": "^sm_?[1-9][0-9]{1,2}$"},
    ]
    items = []
    for name, cls in registered_passes().items():
        options = cls.Options.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
        for inner, definition in options.pop("$defs", {}).items():
            definitions[f"{name}.{inner}"] = definition
        definitions[name] = options
        items += _pass_items(name, cls, bool(options.get("required")))
    properties["passes"]["items"] = {"oneOf": items} if items else False
    return {"$schema": _DIALECT, **schema}


def _pass_items(name: str, cls: type[Pass], needs_options: bool) -> list[dict[str, Any]]:
    summary = cls.summary()
    options: dict[str, Any] = {"$ref": f"#/$defs/{name}"}
    mapping = {
        "type": "object",
        "description": summary,
        "properties": {
            name: options if needs_options else {"anyOf": [options, {"type": "null"}]},
            "optional": {"type": "boolean", "description": "The pass may match nothing."},
        },
        "required": [name],
        "additionalProperties": False,
    }
    return [mapping] if needs_options else [{"const": name, "description": summary}, mapping]


def write_schema(path: str | Path) -> None:
    """Write `recipe_json_schema()` to a file, for `# yaml-language-server: $schema=…`."""
    text = json.dumps(recipe_json_schema(), indent=2, ensure_ascii=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


def field_table() -> str:
    """All keys of a recipe with their defaults and descriptions, as a Markdown table."""
    schema = Recipe.model_json_schema()
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    rows += _rows(schema, schema["$defs"], "")
    return "\n".join(rows) + "\n"


def _rows(section: dict[str, Any], definitions: dict[str, Any], prefix: str) -> list[str]:
    rows = []
    for name, field in section["properties"].items():
        required = name in section.get("required", ())
        default = "required" if required else f"`{json.dumps(field.get('default'))}`"
        inner = definitions.get(field.get("$ref", "").rpartition("/")[2])
        if inner or ("default" not in field and not required):
            default = ""
        description = _cell(field["description"])
        if "enum" in field:
            description += " One of " + ", ".join(f"`{value}`" for value in field["enum"]) + "."
        rows.append(f"| `{prefix}{name}` | {default} | {description} |")
        if inner:
            rows += _rows(inner, definitions, f"{prefix}{name}.")
    return rows


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
