"""Every shipped recipe, run on a small model of its own variant: its passes fire and fit."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.variants import VARIANTS, captured_program
from turbo_opt.compiler.manager import PassManager, Verification
from turbo_opt.compiler.validation import validate_pipeline
from turbo_opt.config.loader import load_recipe
from turbo_opt.config.lookup import list_recipes
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
# tiny-wan/cpu-turbo has weights for one model alone: tests/test_turbo_tiny_wan.py.
SHIPPED = sorted(
    info.name for info in list_recipes() if info.error is None and not info.name.endswith("-turbo")
)


def variant_of(recipe_name):
    prefix = max((p for p in _VARIANT_OF if recipe_name.startswith(p)), key=len)
    return VARIANTS[_VARIANT_OF[prefix]]


def add_projections(program):
    """What a checkpoint tuned for sparse-linear attention holds beside the weights."""
    (denoiser,) = program
    for layer in range(denoiser.config["num_layers"]):
        stem = f"blocks.{layer}.attn1.proj_l"
        denoiser.unread[f"{stem}.weight"] = constant(torch.zeros(128, 128))
        denoiser.unread[f"{stem}.bias"] = constant(torch.zeros(128))


@pytest.mark.parametrize("name", SHIPPED)
def test_the_passes_of_a_shipped_recipe_fire_on_its_kind_of_model(name):
    recipe = load_recipe(name)
    planned = validate_pipeline(recipe.specs(), target=get_target(recipe.target))
    program = captured_program(variant_of(name), dtype_from_name(recipe.model.dtype))
    if name.endswith("-sparse"):
        add_projections(program)
    before = program.weight_bytes
    after = PassManager(planned, verification=Verification("off")).run(program)
    assert all(record["matches"] for record in after.history)
    assert after.weight_bytes < before


def test_every_model_of_the_family_has_a_recipe_for_every_machine():
    models = {name.split("/")[0] for name in SHIPPED}
    assert len(models) == 11
    for model in models:
        targets = {name.split("/")[1] for name in SHIPPED if name.startswith(f"{model}/")}
        dense = {name for name in targets if not name.endswith(("-sparse", "-sage"))}
        assert dense == {"cpu", "h200", "rtx4090", "rtx5090"}
