"""The recipes in the package."""

from __future__ import annotations

import importlib.resources

import pytest

from turbo_opt.compiler.pipeline import validate_options
from turbo_opt.config.loader import load_recipe
from turbo_opt.config.lookup import list_recipes
from turbo_opt.targets import get_target

SHIPPED = [info.name for info in list_recipes() if info.kind == "shipped"]
MODELS = {name.partition("/")[0] for name in SHIPPED}


def test_every_model_has_a_recipe_for_every_machine():
    assert len(MODELS) == 11
    machines = ("cpu", "h200", "rtx4090", "rtx5090")
    assert {f"{model}/{machine}" for model in MODELS for machine in machines} == set(SHIPPED)


def test_shipped_recipes_are_package_data():
    root = importlib.resources.files("turbo_opt.recipes")
    assert root.joinpath("tiny-wan", "cpu.yaml").is_file()


@pytest.mark.real_passes
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_loads_and_names_known_passes(name):
    for spec in load_recipe(name).specs():
        validate_options(spec)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_is_for_its_machine_and_a_scheme_of_its_hardware(name):
    recipe = load_recipe(name)
    assert recipe.target == name.partition("/")[2]
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
