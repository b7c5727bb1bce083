"""The recipe tiny-wan/cpu-all: what GPU recipes do to a graph runs on a CPU, by references."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import turbo_opt
from tests.helpers.variants import compiled
from tests.passes.graphs import ops_of
from turbo_opt.artifact.load import load
from turbo_opt.calibration.tiny_wan.clips import parse_caption
from turbo_opt.calibration.tiny_wan.detectors import score
from turbo_opt.compiler.manager import PassManager, Verification
from turbo_opt.compiler.validation import validate_pipeline
from turbo_opt.compiler.verification import sqnr_db
from turbo_opt.config.schema import Recipe
from turbo_opt.ir.program import Program
from turbo_opt.targets import get_target

PROMPT = "a red circle moves left to right on a blue background"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return turbo_opt.load_recipe("tiny-wan/cpu-all", ["verify.mode=sample"])


@pytest.fixture(scope="module")
def built(recipe: Recipe):
    return turbo_opt.build(recipe)


def optimized(captured: Program, recipe: Recipe) -> Program:
    planned = validate_pipeline(
        recipe.specs(), target=get_target(recipe.target), checkpoints=recipe.checkpoints()
    )
    return PassManager(planned, verification=Verification("off")).run(captured)


def test_every_pass_fires(built) -> None:
    assert all(record["matches"] for record in built.optimized.history)
    assert built.optimized.schedule.evaluations == 4


def test_its_clip_shows_what_the_prompt_says(built, recipe, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    turbo_opt.save(built.optimized, out, recipe=recipe.canonical(), target=recipe.target)
    frames = torch.from_numpy(load(out).generate(PROMPT, seed=0)).movedim(-1, 0)
    assert all(score(frames.float() / 127.5 - 1, parse_caption(PROMPT)).values())


def test_the_operators_of_a_gpu_compute_what_the_model_does(built) -> None:
    # fp8-block has scales of single tokens, so what an H200 gets is fused where int8 is not.
    for_h200 = turbo_opt.load_recipe(
        "tiny-wan/cpu-all",
        [
            "target=h200",
            "passes.quantize-linear.scheme=fp8-block",
            "passes.sparse-attention.topk=1.0",  # sparsity has no right value to compare with
        ],
    )
    fast = optimized(built.captured, for_h200)
    expected = optimized(built.captured, for_h200.with_passes(for_h200.specs()[:2]))
    assert {
        "turbo_opt.linear_gelu_quantize",
        "turbo_opt.linear_gated_residual",
        "turbo_opt.norm_rope_sagesla_quantize",
        "turbo_opt.padded_attention_quantize",
        "turbo_opt.sage_attention",
        "turbo_opt.block_linear",
    } <= set(ops_of(fast))
    torch.manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 16, 5, 12, 12),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": torch.randn(1, 64, 128),
    }
    inputs["encoder_hidden_states"][:, 12:] = 0  # padding
    with torch.no_grad():
        outputs = [compiled(program)(**inputs).sample for program in (expected, fast)]
    assert sqnr_db(outputs[0], outputs[1]) > 22
