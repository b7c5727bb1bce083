"""The recipes in the package."""

from __future__ import annotations

import importlib.resources

import pytest

from turbo_opt.compiler.pipeline import validate_options
from turbo_opt.config.loader import load_recipe
from turbo_opt.config.lookup import list_recipes
from turbo_opt.targets import get_target

pytestmark = pytest.mark.real_passes
SHIPPED = [info.name for info in list_recipes() if info.kind == "shipped"]
SPARSE = {name for name in SHIPPED if name.endswith("-sparse")}
ATTENTION_PASSES = {"sparse": "sparse-attention", "sage": "sage-attention"}
VARIATIONS = {name for name in SHIPPED if name.rpartition("-")[2] in ATTENTION_PASSES}
TURBO = {name for name in SHIPPED if name.endswith("-turbo")}
MODELS = {name.partition("/")[0] for name in SHIPPED}


def test_every_model_has_a_recipe_for_every_machine():
    assert len(MODELS) == 11
    machines = ("cpu", "h200", "rtx4090", "rtx5090")
    dense = {f"{model}/{machine}" for model in MODELS for machine in machines}
    assert dense == set(SHIPPED) - VARIATIONS - TURBO


def test_a_turbo_recipe_is_the_dense_one_with_a_student_of_few_steps():
    assert {"tiny-wan/cpu-turbo"} == TURBO
    for name in TURBO:
        recipe, dense = load_recipe(name), load_recipe(name.removesuffix("-turbo"))
        (first, *rest), others = recipe.specs(), dense.specs()
        assert first.name == "distill-steps"
        assert rest == list(others)
        assert recipe.target == dense.target


def test_text_and_image_models_have_sparse_recipes_for_gpus():
    models = {name.partition("/")[0] for name in SPARSE}
    assert len(models) == 7
    gpus = {"h200-sparse", "rtx4090-sparse", "rtx5090-sparse"}
    for model in models - {"tiny-wan"}:
        assert {name.partition("/")[2] for name in SPARSE if name.startswith(model)} == gpus


@pytest.mark.parametrize("name", sorted(VARIATIONS))
def test_a_recipe_with_other_attention_is_the_dense_one_with_one_more_pass(name):
    dense_name, _, variation = name.rpartition("-")
    recipe, dense = load_recipe(name), load_recipe(dense_name)
    added = ATTENTION_PASSES[variation]
    assert [spec.name for spec in recipe.specs()].count(added) == 1
    assert tuple(spec for spec in recipe.specs() if spec.name != added) == dense.specs()
    assert recipe.target == dense.target


def test_shipped_recipes_are_package_data():
    root = importlib.resources.files("turbo_opt.recipes")
    assert root.joinpath("tiny-wan", "cpu.yaml").is_file()


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_loads_and_names_known_passes(name):
    for spec in load_recipe(name).specs():
        validate_options(spec)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_is_for_its_machine_and_a_scheme_of_its_hardware(name):
    recipe = load_recipe(name)
    assert recipe.target == name.partition("/")[2].partition("-")[0]
    schemes = [spec.options["scheme"] for spec in recipe.specs() if "scheme" in spec.options]
    assert schemes == [get_target(recipe.target).schemes[0]]
    assert recipe.description


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_makes_clips_that_the_vae_can_hold(name):
    generate = load_recipe(name).generate
    assert generate.num_frames % 4 == 1
    stride = 32 if "ti2v" in name else 16
    assert (generate.height % stride, generate.width % stride) == (0, 0)


@pytest.mark.parametrize("model", sorted(MODELS))
def test_two_experts_have_two_guidance_scales(model):
    generate = load_recipe(f"{model}/h200").generate
    assert (generate.guidance_scale_2 is not None) == ("a14b" in model)


@pytest.mark.parametrize("model", sorted(MODELS - {"tiny-wan"}))
def test_flow_shift_follows_the_resolution_or_the_wan22_checkpoint(model):
    generate = load_recipe(f"{model}/h200").generate
    expected = 3.0 if generate.height == 480 else 5.0
    assert generate.flow_shift == (None if model.startswith("wan2.2") else expected)
