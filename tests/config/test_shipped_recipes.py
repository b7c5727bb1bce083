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
MERGING = {name for name in SHIPPED if name.endswith("-turbo-merge")}
MODELS = {name.partition("/")[0] for name in SHIPPED}
GPUS = ("h200", "rtx4090", "rtx5090")
BRING_WEIGHTS = ("distill-steps", "merge-weights")


def test_every_model_has_a_recipe_for_every_machine():
    assert len(MODELS) == 11
    dense = {f"{model}/{machine}" for model in MODELS for machine in ("cpu", *GPUS)}
    assert dense == set(SHIPPED) - VARIATIONS - TURBO - MERGING - {"tiny-wan/cpu-all"}


def on_gpus(models, variation):
    return {f"{model}/{gpu}-{variation}" for model in models for gpu in GPUS}


def test_models_with_students_have_recipes_of_few_steps():
    text = {"wan2.1-t2v-1.3b", "wan2.1-t2v-14b"}
    models = {*text, "wan2.2-i2v-a14b", "tiny-wan"}
    assert on_gpus(models, "turbo") | {"tiny-wan/cpu-turbo"} == TURBO
    assert on_gpus(text, "turbo-merge") == MERGING


@pytest.mark.parametrize("name", sorted(TURBO | MERGING))
def test_a_turbo_recipe_is_the_dense_one_with_a_student_of_few_steps(name):
    recipe, dense = load_recipe(name), load_recipe(name.partition("-turbo")[0])
    names = [spec.name for spec in recipe.specs()]
    assert names[0] == "distill-steps"
    added = {*BRING_WEIGHTS, "sparse-attention"}
    assert tuple(spec for spec in recipe.specs() if spec.name not in added) == dense.specs()
    assert recipe.target == dense.target
    assert not recipe.verify.end_to_end  # another model's predictions are no measure


@pytest.mark.parametrize(
    "name", sorted(name for name in TURBO | MERGING if not name.startswith("tiny-wan/"))
)
def test_a_turbo_recipe_for_a_gpu_is_the_sparse_one_with_weights_before_it(name):
    recipe = load_recipe(name)
    sparse = load_recipe(f"{name.partition('-turbo')[0]}-sparse").specs()
    weights = BRING_WEIGHTS if name in MERGING else BRING_WEIGHTS[:1]
    assert tuple(spec.name for spec in recipe.specs()[: len(weights)]) == weights
    assert recipe.specs()[len(weights) :] == sparse


@pytest.mark.parametrize("gpu", GPUS)
def test_tiny_wan_has_the_same_students_and_sparsity_on_a_gpu_as_on_a_cpu(gpu):
    def brought(recipe):
        added = {*BRING_WEIGHTS, "sparse-attention"}
        return [spec for spec in recipe.specs() if spec.name in added]

    recipe, on_cpu = load_recipe(f"tiny-wan/{gpu}-turbo"), load_recipe("tiny-wan/cpu-turbo")
    assert recipe.weights == on_cpu.weights
    assert brought(recipe) == brought(on_cpu)
    assert tuple(spec.name for spec in recipe.specs()[:2]) == BRING_WEIGHTS


@pytest.mark.parametrize("name", sorted(MERGING))
def test_merging_differs_in_the_second_checkpoint_alone(name):
    recipe, turbo = load_recipe(name), load_recipe(name.removesuffix("-merge"))
    assert tuple(spec for spec in recipe.specs() if spec.name != "merge-weights") == turbo.specs()
    assert recipe.weights == {"base": recipe.model.source}


def test_tiny_wan_has_on_a_cpu_all_that_gpu_recipes_do_to_a_graph():
    def passes(names):
        return {spec.name for name in names for spec in load_recipe(name).specs()}

    gpu = {name for name in SHIPPED if not name.partition("/")[2].startswith("cpu")}
    assert passes(gpu) == passes(["tiny-wan/cpu-all", "tiny-wan/cpu-turbo"])


def test_in_every_gpu_recipe_the_layer_before_gelu_writes_its_quantized_result():
    asking = {
        name
        for name in SHIPPED
        for spec in load_recipe(name).specs()
        if spec.name == "fuse-epilogues" and spec.options.get("linear_gelu")
    }
    gpu = {name for name in SHIPPED if name.partition("/")[2].startswith(GPUS)}
    assert asking == gpu | {"tiny-wan/cpu-all"}


def test_text_and_image_models_have_sparse_recipes_for_gpus():
    models = {name.partition("/")[0] for name in SPARSE}
    assert len(models) == 7
    assert on_gpus(models - {"tiny-wan"}, "sparse") | {"tiny-wan/cpu-sparse"} == SPARSE


def test_every_large_model_has_recipes_with_attention_in_8_bits():
    sage = {name for name in SHIPPED if name.endswith("-sage")}
    assert on_gpus(MODELS - {"tiny-wan"}, "sage") | {"tiny-wan/cpu-sage"} == sage


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
