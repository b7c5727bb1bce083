"""What a plan says of memory is what a network then takes."""

from __future__ import annotations

import json

import pytest
import torch

from tests.cli.conftest import invoke
from tests.helpers.variants import VARIANTS, captured_program, compiled, random_inputs
from turbo_opt.cli.memory import kept_bytes
from turbo_opt.compiler.manager import PassManager, Verification
from turbo_opt.compiler.pipeline import parse_pipeline
from turbo_opt.compiler.validation import validate_pipeline
from turbo_opt.ir.schedule import Schedule, Step


def program(name, passes):
    planned = validate_pipeline(parse_pipeline(passes))
    captured = captured_program(VARIANTS[name])
    return PassManager(planned, verification=Verification("off")).run(captured)


def steps(count, guidance):
    step = Step(0.5, 0.4, 500, "transformer", guidance)
    elsewhere = Step(0.5, 0.4, 500, "transformer_2", 5.0)
    return Schedule((step,) * count + (elsewhere,))


def held(stage, module):
    """Bytes of the tensors that a stage of a running network keeps, weights apart."""
    ((_, values),) = stage._kept
    weights = {weight.data_ptr() for weight in module.buffers()}
    return sum(v.nbytes for v in values.tensors.values() if v.data_ptr() not in weights)


@pytest.mark.parametrize(("name", "size"), [("t2v", (2, 8, 12)), ("i2v", (3, 8, 8))])
def test_predicted_bytes_are_those_that_the_runtime_keeps(name, size):
    optimized = program(name, "canonicalize,fuse-norms,fuse-qk-norm-rope,hoist-invariants")
    inputs = random_inputs(VARIANTS[name], 1, *size)
    text_tokens = inputs["encoder_hidden_states"].shape[1]
    (denoiser,) = optimized
    predicted = kept_bytes(denoiser, steps(1, None), size, text_tokens)
    module = compiled(optimized)
    with torch.no_grad():
        module(**inputs, return_dict=False)
    running = module._staged
    assert predicted["shape"] == held(running._shape, module) > 0
    assert predicted["prompt"] == held(running._prompt, module) > 0
    assert predicted["timestep"] == held(running._timestep, module) > 0


def test_a_clip_keeps_both_prompts_of_guidance_and_some_noise_levels():
    (denoiser,) = program("t2v", "canonicalize,hoist-invariants")
    one = kept_bytes(denoiser, steps(1, None), (2, 8, 8))
    assert one["clip"] == one["shape"] + one["prompt"] + one["timestep"]
    many = kept_bytes(denoiser, steps(50, 5.0), (2, 8, 8))
    assert many["clip"] == many["shape"] + 2 * many["prompt"] + 16 * many["timestep"]


def test_a_network_that_stays_whole_keeps_nothing():
    (denoiser,) = program("t2v", "canonicalize")
    assert kept_bytes(denoiser, steps(1, None), (2, 8, 8)) == {}


def test_plan_counts_what_is_kept_at_the_recipes_size(recipe):
    passes = ("--passes", "canonicalize,fuse-norms,hoist-invariants")
    result = invoke("plan", recipe, *passes, "--json")
    assert result.exit_code == 0, result.stderr
    memory = json.loads(result.stdout)["memory"]
    kept = memory["kept_bytes"]
    assert kept["clip"] == kept["shape"] + 2 * kept["prompt"] + 2 * kept["timestep"]
    assert memory["run_bytes"] == sum(
        (memory["weights_on_device_bytes"], memory["activations_bytes"], kept["clip"])
    )
    longer = ("--set", "generate.max_sequence_length=32")
    more = json.loads(invoke("plan", recipe, *passes, *longer, "--json").stdout)["memory"]
    assert more["kept_bytes"] == {
        **kept, "prompt": 2 * kept["prompt"], "clip": kept["clip"] + 2 * kept["prompt"],
    }  # fmt: skip
    assert "a prompt, " in invoke("plan", recipe, *passes).stdout
    without = json.loads(invoke("plan", recipe, "--json").stdout)["memory"]
    assert without["kept_bytes"] is None
    assert "kept between steps  nothing" in invoke("plan", recipe).stdout
