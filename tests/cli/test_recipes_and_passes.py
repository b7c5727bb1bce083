"""Questions about recipes and passes."""

from __future__ import annotations

import json

import yaml

from tests.cli.conftest import invoke
from turbo_opt.compiler.base import registered_passes


def test_every_pass_is_listed_with_its_summary():
    result = invoke("passes", "list", "--json")
    assert result.exit_code == 0
    listed = {item["name"]: item for item in json.loads(result.stdout)}
    assert listed.keys() == registered_passes().keys()
    text = invoke("passes", "list").stdout
    for name, item in listed.items():
        assert name in text
        assert item["summary"] in text


def test_a_pass_shows_its_algebra_its_facts_and_its_options_with_defaults():
    result = invoke("passes", "show", "quantize-linear")
    assert result.exit_code == 0
    assert "linear(x, W, b)  →  block_linear" in result.stdout
    record = json.loads(invoke("passes", "show", "quantize-linear", "--json").stdout)
    options = {item["name"]: item for item in record["options"]}
    assert options["scheme"]["type"] == "int8-block | fp8-block"
    assert options["skip.first"] == {
        "name": "skip.first",
        "type": "integer ≥ 0",
        "default": "0",
        "description": "blocks to skip at the start",
    }
    assert record["numerics"] == "quantizes"
    assert record["requires"] == ["canonical"]


def test_every_pass_can_be_shown():
    for name in registered_passes():
        assert invoke("passes", "show", name).exit_code == 0


def test_recipes_are_listed_with_where_they_come_from(work):
    (work / "recipes").mkdir()
    (work / "recipes" / "mine.yaml").write_text("schema_version: 1\ndescription: my own\n")
    listed = {item["name"]: item for item in json.loads(invoke("recipes", "list", "--json").stdout)}
    assert listed["mine"]["kind"] == "project"
    assert listed["tiny-wan/cpu"]["kind"] == "shipped"
    assert "my own" in invoke("recipes", "list").stdout


def test_a_recipe_is_shown_as_written_or_resolved():
    written = invoke("recipes", "show", "tiny-wan/cpu")
    assert "extends: base.yaml" in written.stdout
    resolved = invoke("recipes", "show", "tiny-wan/cpu", "--resolved")
    record = yaml.safe_load(resolved.stdout)
    assert record["generate"]["num_frames"] == 17
    assert "extends" not in record
    assert json.loads(invoke("recipes", "show", "tiny-wan/cpu", "--json").stdout) == record


def test_validation_passes_good_recipes_and_collects_the_faults_of_bad_ones(work):
    good = invoke("recipes", "validate", "tiny-wan/cpu", "wan2.2-t2v-a14b/h200")
    assert good.exit_code == 0
    assert "tiny-wan/cpu: valid" in good.stdout
    (work / "a.yaml").write_text("schema_version: 1\nextends: tiny-wan/cpu\ntagret: cpu\n")
    (work / "b.yaml").write_text("schema_version: 1\nextends: tiny-wan/cpu\npasses: [fuse-norms]\n")
    result = invoke("recipes", "validate", "a.yaml", "tiny-wan/cpu", "b.yaml", "--json")
    assert result.exit_code == 2
    assert [item["valid"] for item in json.loads(result.stdout)] == [False, True, False]
    assert "a.yaml:3:1: tagret: unknown key 'tagret', did you mean 'target'?" in result.stderr
    assert "b.yaml:3:10: passes.fuse-norms: fuse-norms requires" in result.stderr


def test_schema_goes_to_stdout_or_to_a_file(work):
    printed = json.loads(invoke("recipes", "schema").stdout)
    assert invoke("recipes", "schema", "--out", "schema.json").exit_code == 0
    assert json.loads((work / "schema.json").read_text()) == printed
    missing = invoke("recipes", "schema", "--out", "no/folder/schema.json")
    assert missing.exit_code == 2
    assert "no such file or directory" in missing.stderr


def test_env_names_versions_target_and_why_kernels_are_passed_over():
    result = invoke("env", "--json")
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    assert record["versions"]["turbo_opt"]
    assert record["target"]["name"]
    linear = [row for row in record["kernels"] if row["operator"] == "block_linear"]
    assert {row["scheme"] for row in linear} == {"int8-block", "fp8-block"}
    assert all(row["provider"] and row["passed_over"] for row in linear)
    assert "onnx" in record["extras"]
    assert "block_linear" in invoke("env").stdout
