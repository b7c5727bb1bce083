"""`--set`, `--disable` and `--until`."""

from __future__ import annotations

import pytest

from turbo_opt.compiler.pipeline import format_pipeline, validate_options
from turbo_opt.config.loader import load_recipe
from turbo_opt.errors import BadInput

RECIPE = """\
schema_version: 1
model: {source: tiny-wan}
target: cpu
passes:
  - canonicalize
  - quantize-linear: {scheme: int8-block}
  - fuse-norms
  - quantize-linear: {scheme: fp8-block}
"""


@pytest.fixture
def load(project):
    """Load the recipe above with changes."""
    name = project("my.yaml", RECIPE)
    return lambda *overrides, **changes: load_recipe(name, overrides, **changes)


@pytest.fixture
def failure(load):
    """The message of loading it with changes."""

    def message(*overrides, **changes) -> str:
        with pytest.raises(BadInput) as caught:
            load(*overrides, **changes)
        return str(caught.value)

    return message


def test_set_changes_plain_keys_and_makes_missing_mappings(load):
    recipe = load("generate.height=64", "verify.budgets.exact=30.5", "weights.a=x", "target=h200")
    assert recipe.generate.height == 64
    assert recipe.verify.budgets.exact == 30.5
    assert recipe.weights == {"a": "x"}
    assert recipe.target == "h200"


def test_set_takes_yaml_values(load):
    recipe = load("passes.fuse-norms.adaln=false", "generate.flow_shift=", 'description="a=b"')
    assert recipe.specs()[2].options == {"adaln": False}
    assert recipe.generate.flow_shift is None
    assert recipe.description == "a=b"
    recipe = load("passes=[fuse-norms, {quantize-linear: {skip: {first: 1}}, optional: true}]")
    assert format_pipeline(recipe.specs()) == "fuse-norms,quantize-linear?{skip={first=1}}"


def test_set_reaches_a_repeated_pass_by_index(load):
    recipe = load("passes.quantize-linear[1].skip={first: 2}", "passes.quantize-linear[0].skip={}")
    assert recipe.specs()[3].options == {"scheme": "fp8-block", "skip": {"first": 2}}
    assert recipe.specs()[1].options == {"scheme": "int8-block", "skip": {}}


def test_set_optional_on_a_bare_pass(load):
    recipe = load("passes.fuse-norms.optional=true")
    assert format_pipeline(recipe.specs()[2:3]) == "fuse-norms?"


def test_set_of_an_unknown_key_names_the_flag_and_the_nearest_key(failure):
    assert failure("generate.heigth=64").startswith(
        "--set generate.heigth=64: generate.heigth: unknown key 'heigth', did you mean 'height'?"
    )
    assert failure("generat.height=64").startswith("--set generat.height=64: generat: unknown key")


def test_set_of_an_unknown_option_is_told_by_validation_with_the_flag(load):
    spec = load("passes.fuse-norms.adalm=true").specs()[2]
    with pytest.raises(BadInput) as caught:
        validate_options(spec)
    assert str(caught.value) == (
        "--set passes.fuse-norms.adalm=true: passes.fuse-norms.adalm: unknown option 'adalm', "
        "did you mean 'adaln'? Known: adaln."
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "passes.fuse-norm.x=1",
            "the recipe has no pass 'fuse-norm', did you mean 'fuse-norms'? "
            "It has: canonicalize, quantize-linear, fuse-norms.",
        ),
        (
            "passes.quantize-linear.scheme=x",
            "'quantize-linear' runs more than once; say which: "
            "quantize-linear[0], quantize-linear[1]",
        ),
        (
            "passes.quantize-linear[2].scheme=x",
            "'quantize-linear' runs 2 times; there is no quantize-linear[2]",
        ),
        ("passes[0].x=1", "name the pass, like passes.canonicalize"),
        ("generate.height.x=1", "generate.height has no keys, it is 64"),
        ("generate.height", "must be KEY=VALUE, like generate.height=480"),
        ("generate..height=1", "must be KEY=VALUE, like generate.height=480"),
        ("generate.height=[", "not YAML: expected the node content, but found '<stream end>'"),
        ("generate[0]=1", "generate has no item 0"),
    ],
)
def test_set_that_cannot_be_applied_says_why(failure, override, message):
    assert failure("generate.height=64", override) == f"--set {override}: {message}"


def test_disable_removes_every_pass_of_that_name(load):
    recipe = load(disable=["quantize-linear"])
    assert format_pipeline(recipe.specs()) == "canonicalize,fuse-norms"


def test_disable_of_an_absent_pass_is_an_error(failure):
    assert failure(disable=["quantise-linear"]) == (
        "--disable quantise-linear: the recipe has no pass 'quantise-linear', did you mean "
        "'quantize-linear'? It has: canonicalize, quantize-linear, fuse-norms."
    )


def test_until_cuts_after_that_pass(load):
    assert [spec.name for spec in load(until="fuse-norms").specs()] == [
        "canonicalize",
        "quantize-linear",
        "fuse-norms",
    ]
    assert len(load(until="quantize-linear[1]").specs()) == 4
    assert len(load(until="quantize-linear[0]").specs()) == 2


def test_until_an_absent_or_repeated_pass_is_an_error(failure):
    assert failure(until="fuse").startswith("--until fuse: the recipe has no pass 'fuse'")
    assert failure(until="quantize-linear").startswith(
        "--until quantize-linear: 'quantize-linear' runs more than once; say which:"
    )
