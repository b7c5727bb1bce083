"""Every shipped recipe, run on a small model of its own variant: its passes fire and fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoints import projections, write_layout
from tests.helpers.variants import VARIANTS
from tests.passes.exchanges import program_of, random_weights
from turbo_opt.compiler.manager import PassManager, Verification
from turbo_opt.compiler.pipeline import format_pipeline
from turbo_opt.compiler.validation import check_files, validate_pipeline
from turbo_opt.config.loader import load_recipe
from turbo_opt.config.lookup import list_recipes
from turbo_opt.config.schema import Recipe
from turbo_opt.errors import BadInput
from turbo_opt.ir.program import Program
from turbo_opt.ir.weights import constant, dtype_from_name
from turbo_opt.targets import get_target

_VARIANT_OF = {
    "tiny-wan": "t2v",
    "wan2.1-t2v": "t2v",
    "wan2.1-i2v": "i2v",
    "wan2.1-flf2v": "flf2v",
    "wan2.1-vace": "vace",
    "wan2.2-t2v": "t2v",
    "wan2.2-i2v": "i2v-without-image-tokens",
    "wan2.2-ti2v": "ti2v",
}
SHIPPED = sorted(info.name for info in list_recipes() if info.error is None)


def variant_of(recipe_name: str) -> str:
    prefix = max((p for p in _VARIANT_OF if recipe_name.startswith(p)), key=len)
    return _VARIANT_OF[prefix]


def unlike_each_other(names: list[str]) -> list[str]:
    """The first of the recipes that do the same to the same kind of model."""
    found: dict[tuple[str, ...], str] = {}
    for name in names:
        recipe = load_recipe(name)
        passes = format_pipeline(recipe.specs())
        found.setdefault((variant_of(name), recipe.target, recipe.model.dtype, passes), name)
    return list(found.values())


UNLIKE = unlike_each_other(SHIPPED)


def weights_named(recipe: Recipe) -> dict[str, str]:
    """Name → role of the weights that the recipe's passes name: student, target or reference."""
    named = {}
    for spec in recipe.specs():
        if spec.name == "distill-steps":
            ref = spec.options["weights"]
            named |= dict.fromkeys([ref] if isinstance(ref, str) else ref.values(), "student")
        if spec.name == "merge-weights":
            named |= {spec.options[role]: role for role in ("target", "reference")}
    return named


def with_weights(name: str, program: Program, folder: Path, tuned: bool = True) -> Recipe:
    """The recipe with random weights for all that its passes name.

    Args:
        tuned: what should bring the projections of sparse-linear attention has them.
    """
    named = weights_named(load_recipe(name))
    bringer = "target" if "target" in named.values() else "student"
    overrides = []
    for seed, (key, role) in enumerate(named.items()):
        weights = random_weights(program, seed)
        if role == bringer and tuned:
            weights |= projections(VARIANTS[variant_of(name)].config["num_layers"])
        place = write_layout("turbodiffusion", folder / key, weights)
        overrides += [f"weights.{key}={place}", "passes.distill-steps.student=assume"]
    return load_recipe(name, overrides)


def model_for(name: str) -> Program:
    """A small model as the recipe's checkpoint is: with what it must hold itself."""
    recipe = load_recipe(name)
    experts = 1 + any(isinstance(spec.options.get("weights"), dict) for spec in recipe.specs())
    program = program_of(variant_of(name), dtype_from_name(recipe.model.dtype), experts)
    if name.endswith("-sparse"):
        (denoiser,) = program
        found = projections(denoiser.config["num_layers"])
        denoiser.unread.update({key: constant(tensor) for key, tensor in found.items()})
    return program


def optimized(recipe: Recipe, program: Program) -> Program:
    planned = validate_pipeline(
        recipe.specs(), target=get_target(recipe.target), checkpoints=recipe.checkpoints()
    )
    check_files(planned)
    return PassManager(planned, verification=Verification("off")).run(program)


@pytest.mark.parametrize("name", UNLIKE)
def test_the_passes_of_a_shipped_recipe_fire_on_its_kind_of_model(name, tmp_path):
    program = model_for(name)
    before = program.weight_bytes
    after = optimized(with_weights(name, program, tmp_path), program)
    assert all(record["matches"] for record in after.history)
    assert after.weight_bytes < before
    if any(record["name"] == "distill-steps" for record in after.history):
        assert after.schedule.evaluations == 4


def test_every_model_of_the_family_has_a_recipe_for_every_machine():
    models = {name.split("/")[0] for name in SHIPPED}
    assert len(models) == 11
    for model in models:
        targets = {name.split("/")[1] for name in SHIPPED if name.startswith(f"{model}/")}
        dense = {name for name in targets if "-" not in name}
        assert dense == {"cpu", "h200", "rtx4090", "rtx5090"}


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b/h200-turbo", "wan2.1-t2v-14b/h200-turbo-merge"])
def test_weights_that_are_not_tuned_for_sparse_attention_are_refused_with_the_remedy(
    name, tmp_path
):
    program = model_for(name)
    recipe = with_weights(name, program, tmp_path, tuned=False)
    remedy = "`merge-weights` before this pass takes the tuning of another checkpoint"
    with pytest.raises(BadInput, match=f"needs weights named blocks.0.attn1.proj_l.*{remedy}"):
        optimized(recipe, program)


@pytest.mark.parametrize(
    ("name", "given", "missing", "remedy"),
    [
        ("wan2.1-t2v-1.3b/h200-turbo", {}, "student", "calibrate rcm` trains a student"),
        ("wan2.1-t2v-14b/rtx5090-turbo", {}, "student", "released ones are on the hub"),
        ("wan2.1-t2v-14b/h200-turbo-merge", {"student"}, "sla", "such as `turbo-opt calibrate sla"),
        ("wan2.2-i2v-a14b/h200-turbo", {"high"}, "low", "calibrate rcm` trains a student"),
    ],
)
def test_weights_that_are_not_given_are_asked_for_with_what_makes_them(
    tmp_path, name, given, missing, remedy
):
    place = write_layout("diffusers", tmp_path / "given", {"proj_out.bias": torch.ones(2)})
    recipe = load_recipe(name, [f"weights.{key}={place}" for key in given])
    planned = validate_pipeline(recipe.specs(), checkpoints=recipe.checkpoints())
    ask = rf"yaml:\d+:5: .*no weights '{missing}': .* `--set weights.{missing}=…` gives them: "
    with pytest.raises(BadInput, match=f"{ask}.*{remedy}"):
        check_files(planned)
