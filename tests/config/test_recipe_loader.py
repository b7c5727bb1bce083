"""Loading recipes: look-up, `extends`, and every error with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from turbo_opt.compiler.build import capture_recipe
from turbo_opt.compiler.pipeline import PassSpec, validate_options
from turbo_opt.config.loader import load_recipe
from turbo_opt.config.lookup import list_recipes
from turbo_opt.errors import BadInput

RECIPE = """\
schema_version: 1
model:
  source: tiny-wan
target: cpu
passes:
  - canonicalize
  - quantize-linear:
      scheme: int8-block
      skip: {first: 1}
    optional: true
"""


def failure(function, *args, **kwargs) -> str:
    with pytest.raises(BadInput) as caught:
        function(*args, **kwargs)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_recipe_file_loads_with_its_passes_in_order(project):
    recipe = load_recipe(project("my.yaml", RECIPE))
    assert recipe.specs() == (
        PassSpec("canonicalize"),
        PassSpec("quantize-linear", {"scheme": "int8-block", "skip": {"first": 1}}, True),
    )
    assert recipe.generate.num_frames == 81


def test_name_is_looked_for_in_the_project_before_the_shipped_recipes(project):
    assert load_recipe("tiny-wan/cpu").model.dtype == "float32"
    project("recipes/tiny-wan/cpu.yaml", RECIPE)
    assert load_recipe("tiny-wan/cpu").model.dtype == "bfloat16"


def test_project_recipe_may_extend_the_shipped_one_of_its_name(project):
    text = "schema_version: 1\nextends: tiny-wan/cpu\ngenerate: {height: 64}\n"
    project("recipes/tiny-wan/cpu.yaml", text)
    recipe = load_recipe("tiny-wan/cpu")
    assert (recipe.generate.height, recipe.generate.width) == (64, 96)
    assert recipe.model.dtype == "float32"


def test_extends_merges_mappings_and_replaces_passes(project):
    project("base/r.yaml", RECIPE + "weights: {a: x}\ngenerate: {height: 64, fps: 8}\n")
    text = "schema_version: 1\nextends: base/r.yaml\nweights: {b: y}\npasses: [fuse-norms]\n"
    recipe = load_recipe(project("child.yaml", text + "generate: {height: 32}\n"))
    assert recipe.weights == {"a": "x", "b": "y"}
    assert recipe.specs() == (PassSpec("fuse-norms"),)
    assert (recipe.generate.height, recipe.generate.fps) == (32, 8)


def test_recipes_that_extend_each_other_are_an_error_that_shows_the_loop(project):
    project("a.yaml", "schema_version: 1\nextends: b.yaml\n")
    project("b.yaml", "schema_version: 1\nextends: a.yaml\n")
    assert failure(load_recipe, "a.yaml") == (
        "b.yaml:2:10: extends: recipes extend each other: a.yaml → b.yaml → a.yaml"
    )
    project("c.yaml", "schema_version: 1\nextends: c.yaml\n")
    assert failure(load_recipe, "c.yaml").endswith("c.yaml → c.yaml")


def test_unknown_recipe_names_the_nearest_one(project):
    assert failure(load_recipe, "tiny-wan/cup") == (
        "unknown recipe 'tiny-wan/cup', did you mean 'tiny-wan/cpu'? Known: tiny-wan/base, "
        "tiny-wan/cpu-all, tiny-wan/cpu-sage, tiny-wan/cpu-sparse, tiny-wan/cpu-turbo, "
        "tiny-wan/cpu, tiny-wan/h200-turbo, tiny-wan/h200, tiny-wan/rtx4090-turbo, "
        "tiny-wan/rtx4090, tiny-wan/rtx5090-turbo, tiny-wan/rtx5090."
    )
    message = failure(load_recipe, "stable-cascade")
    assert message.startswith("unknown recipe 'stable-cascade'. Known models: tiny-wan, wan2.1-")
    assert failure(load_recipe, "no/such.yaml") == "no recipe file no/such.yaml"
    assert failure(load_recipe, "../tiny-wan/cpu").startswith("unknown recipe '../tiny-wan/cpu'")
    project("x.yaml", "schema_version: 1\nextends: tiny-wan/h20\n")
    message = failure(load_recipe, "x.yaml")
    assert message.startswith("x.yaml:2:10: extends: unknown recipe 'tiny-wan/h20', did you mean")


def test_error_names_file_line_column_key_nearest_name_and_allowed_values(project):
    text = RECIPE.replace("tiny-wan\n", "tiny-wan\n  dtype: float61\n")
    project("my.yaml", text + "generate:\n  heigth: 64\nverfy: {}\n")
    assert failure(load_recipe, "my.yaml").splitlines() == [
        "my.yaml:4:10: model.dtype: 'float61' is not allowed, did you mean 'float16'? "
        "Allowed: 'float32', 'bfloat16' or 'float16'.",
        "my.yaml:13:3: generate.heigth: unknown key 'heigth', did you mean 'height'? Known: "
        "flow_shift, fps, guidance_scale, guidance_scale_2, height, max_sequence_length, "
        "negative_prompt, num_frames, num_inference_steps, width.",
        "my.yaml:14:1: verfy: unknown key 'verfy', did you mean 'verify'? Known: description, "
        "extends, generate, model, passes, schema_version, target, verify, weights.",
    ]


def test_a_key_that_nothing_reads_is_unknown(project):
    project("my.yaml", RECIPE + "calibration: {steps: 100}\n")
    assert "calibration: unknown key 'calibration'" in failure(load_recipe, "my.yaml")


def test_error_in_an_extended_file_names_that_file(project):
    project("base.yaml", RECIPE + "generate: {height: tall}\n")
    project("child.yaml", "schema_version: 1\nextends: base.yaml\ngenerate: {width: 64}\n")
    assert failure(load_recipe, "child.yaml") == (
        "base.yaml:11:20: generate.height: must be a valid integer, got 'tall'"
    )


def test_missing_key_is_named(project):
    project("my.yaml", "schema_version: 1\nmodel: {}\n")
    assert failure(load_recipe, "my.yaml").splitlines() == [
        "my.yaml:2:8: model.source: required key is missing",
        "my.yaml:1:1: target: required key is missing",
        "my.yaml:1:1: passes: required key is missing",
    ]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            "{a: {}, b: {}}",
            "must be a pass name, or a name with its options, like 'quantize-linear: {…}', "
            "got 'a' and 'b'",
        ),
        (
            "{optional: true}",
            "must be a pass name, or a name with its options, like 'quantize-linear: {…}', "
            "got no name",
        ),
        (
            "3",
            "must be a pass name, or a name with its options, like 'quantize-linear: {…}', got 3",
        ),
        ("{a: 3}", "options of 'a' must be a mapping, got 3"),
        ("{a: {}, optional: 1}", "'optional' must be true or false, got 1"),
        ("two words", "'two words' cannot be a pass name: write it like 'fuse-norms'"),
    ],
)
def test_item_of_passes_that_is_no_pass_is_an_error(project, item, message):
    head = RECIPE.partition("passes:")[0]
    project("my.yaml", f"{head}passes:\n  - fuse-norms\n  - {item}\n")
    assert failure(load_recipe, "my.yaml") == f"my.yaml:7:5: passes[1]: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "my.yaml:1:1: a recipe is a mapping of keys to values"),
        ("- a", "my.yaml:1:1: a recipe is a mapping of keys to values"),
        (
            "target: cpu",
            "my.yaml:1:1: required key schema_version is missing: add 'schema_version: 1'",
        ),
        (
            "schema_version: 2\nnew: 1",
            "my.yaml:1:17: schema_version: 2 is not a format that this turbo_opt reads: 1",
        ),
        ("schema_version: 1\nextends: 3", "my.yaml:2:10: extends: must be text, got 3"),
    ],
)
def test_file_that_is_no_recipe_of_this_format_is_an_error(project, text, message):
    project("my.yaml", text)
    assert failure(load_recipe, "my.yaml") == message


def test_unknown_target_is_an_error_at_its_place(project):
    project("my.yaml", RECIPE.replace("target: cpu", "target: h20"))
    message = failure(load_recipe, "my.yaml")
    assert message.startswith("my.yaml:4:9: target: unknown target 'h20', did you mean 'h200'?")


def test_budget_of_a_pass_that_does_not_exist_is_an_error(project):
    budgets = "verify: {budgets: {passes: {quantise-linear: 30}}}\n"
    project("my.yaml", RECIPE + budgets)
    assert failure(load_recipe, "my.yaml").startswith(
        "my.yaml:11:29: verify.budgets.passes.quantise-linear: unknown pass 'quantise-linear', "
        "did you mean 'quantize-linear'?"
    )


def test_option_error_found_later_still_names_file_and_line(project):
    project("my.yaml", RECIPE.replace("first: 1", "frist: 1").replace("int8", "int9"))
    spec = load_recipe("my.yaml").specs()[1]
    assert failure(validate_options, spec).splitlines() == [
        "my.yaml:8:15: passes.quantize-linear.scheme: 'int9-block' is not allowed, did you mean "
        "'int8-block'? Allowed: 'int8-block' or 'fp8-block'.",
        "my.yaml:9:14: passes.quantize-linear.skip.frist: unknown option 'frist', did you mean "
        "'first'? Known: first, last, names.",
    ]


def test_unknown_pass_is_named_with_its_place_and_its_index_when_repeated(project):
    head = RECIPE.partition("passes:")[0]
    project("my.yaml", head + "passes: [fuse-norm, canonicalize, fuse-norm]\n")
    spec = load_recipe("my.yaml").specs()[2]
    assert failure(validate_options, spec) == (
        "my.yaml:5:35: passes.fuse-norm[1]: unknown pass 'fuse-norm', did you mean 'fuse-norms'? "
        "Known: canonicalize, fuse-norm-quantize, fuse-norms, hoist-invariants, quantize-linear."
    )


def test_source_that_is_a_path_starts_at_the_file_that_says_so(project, tmp_path):
    project("deep/base.yaml", RECIPE.replace("source: tiny-wan", "source: ./wan"))
    child = project("child.yaml", "schema_version: 1\nextends: deep/base.yaml\n")
    assert load_recipe(child).model_folder().resolve() == tmp_path / "deep/wan"
    recipe = load_recipe(child, overrides=["model.source=./wan"])
    assert recipe.model_folder().resolve() == tmp_path / "wan"
    assert load_recipe("tiny-wan/cpu").model_folder() is None


def test_a_path_that_starts_here_is_never_a_hub_id(project):
    recipe = load_recipe(project("my.yaml", RECIPE), overrides=["model.source=./org/wan"])
    with pytest.raises(BadInput, match=r"/org/wan: no such folder"):
        capture_recipe(recipe)


def test_source_of_two_words_is_a_folder_if_there_is_one_else_a_hub_id(project, tmp_path):
    name = project("my.yaml", RECIPE.replace("source: tiny-wan", "source: org/wan"))
    assert load_recipe(name).model_folder() is None
    (tmp_path / "org/wan").mkdir(parents=True)
    assert load_recipe(name).model_folder() == Path("org/wan")


def test_weights_know_the_folder_they_are_relative_to(project, tmp_path):
    project("deep/base.yaml", RECIPE + "weights: {student: s.safetensors}\n")
    project("child.yaml", "schema_version: 1\nextends: deep/base.yaml\n")
    folder = load_recipe("child.yaml").folder_of("weights.student")
    assert folder.resolve() == tmp_path / "deep"


@pytest.mark.real_passes
def test_example_of_the_documentation_loads(project):
    text = (Path(__file__).parents[2] / "docs/recipes.md").read_text(encoding="utf-8")
    example = text.partition("```yaml\n")[2].partition("```")[0]
    recipe = load_recipe(project("my.yaml", example))
    for spec in recipe.specs():
        validate_options(spec)
    assert recipe.specs()[-1].optional
    assert (recipe.generate.num_frames, recipe.generate.flow_shift) == (49, 3.0)


def test_list_shows_project_before_shipped_and_no_bases(project):
    project("recipes/mine.yaml", "schema_version: 1\nextends: tiny-wan/cpu\n")
    project("recipes/tiny-wan/cpu.yaml", RECIPE + "description: my own\n")
    project("recipes/soup.yaml", "- [water")
    listed = {info.name: info for info in list_recipes()}
    assert listed["tiny-wan/cpu"].kind == "project"
    assert listed["tiny-wan/cpu"].description == "my own"
    assert listed["mine"].description == "my own"
    assert listed["soup"].error.startswith("recipes/soup.yaml:1:")
    assert listed["wan2.2-ti2v-5b/h200"].kind == "shipped"
    assert not [name for name in listed if name.endswith("base")]
