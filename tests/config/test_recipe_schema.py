"""The recipe model: canonical form, digest, budgets."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from turbo_opt.compiler.base import Numerics
from turbo_opt.compiler.pipeline import PassSpec
from turbo_opt.config.schema import Recipe

SMALL = {
    "schema_version": 1,
    "model": {"source": "tiny-wan"},
    "target": "cpu",
    "passes": ["canonicalize"],
}

budgets = st.none() | st.just("bitwise") | st.floats(0, 100)
options = st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), st.integers(), max_size=2)
items = st.sampled_from(["a", {"a": None}, {"a": {}, "optional": True}]) | options.map(
    lambda given_options: {"quantize-linear": given_options}
)
recipes = st.fixed_dictionaries(
    {
        "schema_version": st.just(1),
        "model": st.fixed_dictionaries(
            {"source": st.text(min_size=1)},
            optional={"dtype": st.sampled_from(["float32", "float16"])},
        ),
        "target": st.sampled_from(["cpu", "h200", "sm86"]),
        "passes": st.lists(items, max_size=4),
    },
    optional={
        "weights": st.dictionaries(st.text(), st.text(), max_size=2),
        "verify": st.fixed_dictionaries(
            {},
            optional={
                "mode": st.sampled_from(["all", "sample", "off"]),
                "budgets": st.fixed_dictionaries({"exact": budgets, "reorders": budgets}),
            },
        ),
        "generate": st.fixed_dictionaries(
            {}, optional={"height": st.integers(16, 4096), "guidance_scale": st.integers(0, 9)}
        ),
    },
)


@given(recipes)
def test_canonical_form_is_json_and_reads_back_as_the_same_recipe(data):
    recipe = Recipe.model_validate(data)
    again = Recipe.model_validate(json.loads(json.dumps(recipe.canonical())))
    assert again == recipe
    assert again.canonical() == recipe.canonical()
    assert again.digest() == recipe.digest()


def test_digest_does_not_depend_on_the_order_of_keys_or_the_spelling_of_numbers():
    one = {**SMALL, "generate": {"fps": 8, "height": 64}}
    other = dict(reversed({**SMALL, "generate": {"height": 64, "fps": 8.0}}.items()))
    assert Recipe.model_validate(one).digest() == Recipe.model_validate(other).digest()


def test_digest_ignores_what_cannot_change_the_result_and_sees_the_rest():
    digest = Recipe.model_validate(SMALL).digest()
    spelled = {**SMALL, "extends": "x", "description": "y", "passes": [{"canonicalize": {}}]}
    assert Recipe.model_validate(spelled).digest() == digest
    for change in ({"target": "h200"}, {"passes": []}, {"generate": {"height": 64}}):
        assert Recipe.model_validate({**SMALL, **change}).digest() != digest


def test_budget_of_a_pass_comes_before_that_of_its_tier():
    verify = {"budgets": {"quantizes": 20, "passes": {"quantize-linear": 33, "other": None}}}
    recipe = Recipe.model_validate({**SMALL, "verify": verify})
    assert recipe.verify.budget("quantize-linear", Numerics.QUANTIZES) == 33
    assert recipe.verify.budget("fuse-norm-quantize", Numerics.QUANTIZES) == 20
    assert recipe.verify.budget("other", Numerics.QUANTIZES) == -math.inf
    assert recipe.verify.budget("canonicalize", Numerics.EXACT) == math.inf


def test_every_tier_has_a_budget():
    verify = Recipe.model_validate(SMALL).verify
    expected = [math.inf, None, 25.0, -math.inf]  # None: what the dtype explains
    assert [verify.budget("p", tier) for tier in Numerics] == expected


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("generate", {"height": True}),
        ("generate", {"height": "64"}),
        ("generate", {"fps": 0}),
        ("verify", {"budgets": {"exact": "bitwize"}}),
        ("verify", {"budgets": {"exact": True}}),
        ("model", {"source": ""}),
        ("schema_version", 2),
    ],
)
def test_values_of_another_kind_are_refused_not_converted(section, value):
    with pytest.raises(ValidationError):
        Recipe.model_validate({**SMALL, section: value})


def test_recipe_with_other_passes_keeps_the_rest():
    recipe = Recipe.model_validate(SMALL).with_passes([PassSpec("fuse-norms")])
    assert recipe.canonical()["passes"] == ["fuse-norms"]
    assert recipe.target == "cpu"
