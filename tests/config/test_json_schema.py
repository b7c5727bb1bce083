"""The JSON schema for editors, and the field table of the documentation."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from turbo_opt.config.json_schema import field_table, recipe_json_schema, write_schema

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "recipes").rglob("*.yaml"))
TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}


def faults(value, schema, root, path="$"):
    """Where `value` breaks `schema`: the part of JSON Schema that ours uses, and no other."""
    known = {"$ref", "anyOf", "oneOf", "enum", "const", "type", "pattern", "properties", "required"}
    known |= {"additionalProperties", "items", "minLength"}
    known |= {"minimum", "exclusiveMinimum", "maximum"}
    assert set(schema) <= known | {"title", "description", "default", "$schema", "$defs"}, schema
    if "$ref" in schema:
        target = root["$defs"][schema["$ref"].removeprefix("#/$defs/")]
        yield from faults(value, target, root, path)
    for rule, right in (("anyOf", lambda n: n >= 1), ("oneOf", lambda n: n == 1)):
        if rule in schema:
            fits = sum(not list(faults(value, one, root, path)) for one in schema[rule])
            if not right(fits):
                yield f"{path}: {fits} of {rule}"
    types = schema.get("type", [])
    types = types if isinstance(types, list) else [types]
    is_bool = isinstance(value, bool)
    if types and not any(
        isinstance(value, TYPES[one]) and (not is_bool or one == "boolean") for one in types
    ):
        yield f"{path}: not {types}"
        return
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        yield f"{path}: not among the values"
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        yield f"{path}: pattern"
    if isinstance(value, str) and len(value) < schema.get("minLength", 0):
        yield f"{path}: length"
    if isinstance(value, int | float) and value < schema.get("minimum", value):
        yield f"{path}: minimum"
    if isinstance(value, int | float) and value <= schema.get("exclusiveMinimum", value - 1):
        yield f"{path}: minimum"
    if isinstance(value, int | float) and value > schema.get("maximum", value):
        yield f"{path}: maximum"
    if isinstance(value, dict):
        yield from (f"{path}: no {key}" for key in schema.get("required", ()) if key not in value)
        for key, item in value.items():
            other = schema.get("additionalProperties", {})
            rule = schema.get("properties", {}).get(key, other)
            if rule is False:
                yield f"{path}.{key}: unknown"
            elif rule is not True:
                yield from faults(item, rule, root, f"{path}.{key}")
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from faults(item, schema.get("items", {}), root, f"{path}[{i}]")


def check(value):
    schema = recipe_json_schema()
    return list(faults(value, schema, schema))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
@pytest.mark.real_passes
def test_every_shipped_recipe_fits_the_schema(path):
    assert check(yaml.safe_load(path.read_text())) == []


@pytest.mark.real_passes
def test_every_shipped_recipe_fits_the_schema_of_the_installed_passes():
    for path in SHIPPED:
        assert check(yaml.safe_load(path.read_text())) == []


@pytest.mark.parametrize(
    "change",
    [
        {"target": "h20"},
        {"generate": {"heigth": 1}},
        {"generate": {"fps": 0}},
        {"verify": {"budgets": {"exact": "bitwize"}}},
        {"model": {"dtype": "float8"}},
        {"passes": ["unknown-pass"]},
        {"passes": ["quantize-linear"]},
        {"passes": [{"quantize-linear": {"scheme": "int9-block"}}]},
        {"passes": [{"quantize-linear": {"scheme": "int8-block", "skip": {"frist": 1}}}]},
        {"passes": [{"canonicalize": {}, "fuse-norms": {}}]},
        {"schema_version": 2},
    ],
)
def test_schema_refuses_what_the_loader_refuses(change):
    assert check({"schema_version": 1, **change})


def test_schema_takes_every_form_of_a_pass():
    passes = [
        "canonicalize",
        {"fuse-norms": None},
        {"fuse-norms": {"adaln": False}, "optional": True},
        {"quantize-linear": {"scheme": "int8-block", "skip": {"names": ["*.ffn.*"]}}},
    ]
    assert check({"schema_version": 1, "target": "sm86", "passes": passes}) == []


def test_every_field_has_a_description():
    schema = recipe_json_schema()
    for section in (schema, *schema["$defs"].values()):
        for name, field in section["properties"].items():
            target = schema["$defs"].get(field.get("$ref", "").removeprefix("#/$defs/"), {})
            assert field.get("description") or target.get("description"), name


def test_schema_is_written_as_json(tmp_path):
    write_schema(tmp_path / "recipe.schema.json")
    written = json.loads((tmp_path / "recipe.schema.json").read_text(encoding="utf-8"))
    assert written == recipe_json_schema()


def test_field_table_of_the_documentation_is_current():
    text = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    table = text.partition("field_table -->\n")[2].partition("<!-- end -->")[0]
    assert table == field_table()
