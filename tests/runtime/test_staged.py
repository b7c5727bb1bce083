"""A denoiser in stages gives every bit of the whole one, and computes each part when it must."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.variants import (
    IN_EVERY_DTYPE,
    VARIANTS,
    captured_program,
    compiled,
    random_inputs,
)
from turbo_opt.compiler.manager import PassManager, Verification
from turbo_opt.compiler.pipeline import parse_pipeline
from turbo_opt.compiler.validation import validate_pipeline
from turbo_opt.runtime.module import CompiledTransformer

QUANTIZED = "canonicalize,fuse-norms,quantize-linear,fuse-norm-quantize"
T2V = VARIANTS["t2v"]


def optimized(name, pipeline, dtype=torch.float32):
    planned = validate_pipeline(parse_pipeline(pipeline))
    program = captured_program(VARIANTS[name], dtype)
    return PassManager(planned, verification=Verification("off")).run(program)


@functools.cache
def whole(name, pipeline="canonicalize", dtype=torch.float32):
    return compiled(optimized(name, pipeline, dtype))


def staged(name="t2v", pipeline="canonicalize", dtype=torch.float32) -> CompiledTransformer:
    module = compiled(optimized(name, f"{pipeline},hoist-invariants", dtype))
    assert module.stages
    return module


def velocity(module, inputs):
    with torch.no_grad():
        return module(**inputs, return_dict=False)[0]


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operators(module, inputs):
    with Operators() as counter:
        velocity(module, inputs)
    return counter.count


@pytest.mark.parametrize(("name", "dtype"), IN_EVERY_DTYPE)
@pytest.mark.parametrize("pipeline", ["canonicalize", QUANTIZED], ids=["canonical", "quantized"])
def test_every_variant_keeps_every_bit(name, dtype, pipeline):
    """Two prompts in turn, as guidance does, at several noise levels and clip sizes; then a prompt
    changed in place."""
    variant, module = VARIANTS[name], staged(name, pipeline, dtype)
    for size in ((1, 2, 8, 8), (2, 1, 12, 8), (1, 2, 8, 8)):
        inputs = random_inputs(variant, *size, dtype)
        prompts = [inputs["encoder_hidden_states"], inputs["encoder_hidden_states"].flip(-1)]
        for timestep in (999, 500, 500.5, 3):
            inputs["timestep"] = torch.full_like(inputs["timestep"], timestep, dtype=torch.float32)
            for prompt in prompts:
                inputs["encoder_hidden_states"] = prompt
                expected = velocity(whole(name, pipeline, dtype), inputs)
                assert torch.equal(velocity(module, inputs), expected)
        before = velocity(module, inputs)
        prompts[-1].mul_(0.5)
        after = velocity(module, inputs)
        assert not torch.equal(after, before)
        assert torch.equal(after, velocity(whole(name, pipeline, dtype), inputs))


@pytest.mark.parametrize("name", ["i2v", "vace"])
def test_every_condition_is_seen_when_it_changes(name):
    module = staged(name)
    inputs = random_inputs(VARIANTS[name], 1, 2, 8, 8)
    before = velocity(module, inputs)
    for condition in set(inputs) - {"timestep"}:
        inputs[condition].add_(0.5)
        after = velocity(module, inputs)
        assert not torch.equal(after, before), condition
        assert torch.equal(after, velocity(whole(name), inputs))
        before = after


def test_a_timestep_may_be_changed_in_place():
    module = staged()
    inputs = random_inputs(T2V, 1, 2, 8, 8)
    inputs["timestep"] = inputs["timestep"].float()
    for timestep in (999, 3, 999, 3):
        inputs["timestep"].fill_(timestep)
        assert torch.equal(velocity(module, inputs), velocity(whole("t2v"), inputs))


def test_a_prompt_a_timestep_and_a_size_seen_before_cost_nothing_again():
    module = staged()
    inputs = random_inputs(T2V, 1, 2, 8, 8)
    other = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].clone()}
    later = {**inputs, "timestep": inputs["timestep"] + 1}
    first, second = operators(module, inputs), operators(module, inputs)
    prompt, timestep = operators(module, other), operators(module, later)
    assert second < min(prompt, timestep) < max(prompt, timestep) < first
    same_value = {**inputs, "timestep": inputs["timestep"].float().clone()}
    for again in (inputs, other, later, same_value):
        assert operators(module, again) == second
    assert operators(whole("t2v"), inputs) > second


def test_four_prompts_stay_and_a_fifth_takes_the_place_of_the_oldest():
    module = staged()
    inputs = random_inputs(T2V, 1, 2, 8, 8)
    prompts = [inputs["encoder_hidden_states"] + n for n in range(5)]

    def cost(prompt):
        return operators(module, {**inputs, "encoder_hidden_states": prompt})

    cost(prompts[0])
    known = cost(prompts[0])
    assert [cost(prompt) > known for prompt in prompts] == [False, True, True, True, True]
    assert cost(prompts[4]) == cost(prompts[1]) == known
    assert cost(prompts[0]) > known


def test_what_was_kept_for_a_prompt_that_is_gone_goes_too():
    module = staged()
    inputs = random_inputs(T2V, 1, 2, 8, 8)
    velocity(module, inputs)
    (_, values), = module._staged._prompt._kept  # fmt: skip
    kept = weakref.ref(values)
    del values
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].clone()
    velocity(module, inputs)
    gc.collect()
    assert kept() is None


def test_nothing_is_kept_for_tensors_that_tell_no_versions():
    module = staged()
    with torch.inference_mode():
        inputs = random_inputs(T2V, 1, 2, 8, 8)
        before = velocity(module, inputs)
        assert torch.equal(before, velocity(whole("t2v"), inputs))
        inputs["encoder_hidden_states"].mul_(0.5)
        after = velocity(module, inputs)
        assert torch.equal(after, velocity(whole("t2v"), inputs))
    assert not torch.equal(before, after)


def test_moving_the_module_forgets_everything_and_shares_the_weights():
    module = staged()
    inputs = random_inputs(T2V, 1, 2, 8, 8)
    expected = velocity(module, inputs)
    weight = module.graph.get_buffer("blocks.0.attn1.to_q.weight")
    assert module._staged._step.get_buffer("blocks.0.attn1.to_q.weight") is weight
    module.to("cpu")
    assert module._staged is None
    assert torch.equal(velocity(module, inputs), expected)


def test_gradients_flow_through_the_whole_graph():
    module = staged()
    inputs = random_inputs(T2V, 1, 2, 8, 8)
    inputs["encoder_hidden_states"].requires_grad_()
    for _ in range(2):
        module(**inputs).sample.sum().backward()
    assert inputs["encoder_hidden_states"].grad.abs().sum() > 0


def test_without_the_pass_the_graph_runs_as_a_whole_and_says_so():
    module = compiled(captured_program(T2V))
    velocity(module, random_inputs(T2V, 1, 2, 8, 8))
    assert module._staged is None
    assert "without the pass hoist-invariants" in module.cuda_graph_status
    assert staged().cuda_graph_status == "off, the model is on cpu"
