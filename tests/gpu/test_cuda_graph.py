"""Steps replayed as CUDA graphs give every bit of the same steps launched one by one."""

from __future__ import annotations

import pytest
import torch

import turbo_opt
from tests.helpers.tiny_folder import shared_artifact
from tests.helpers.variants import VARIANTS, captured_program, random_inputs
from turbo_opt.compiler.manager import PassManager, Verification
from turbo_opt.compiler.pipeline import parse_pipeline
from turbo_opt.compiler.validation import validate_pipeline
from turbo_opt.runtime.module import CompiledTransformer

pytestmark = pytest.mark.gpu

PIPELINES = {
    "canonical": "canonicalize,hoist-invariants",
    "int8-block": "canonicalize,fuse-norms,quantize-linear{scheme=int8-block},"
    "fuse-norm-quantize,hoist-invariants",
    "fp8-block": "canonicalize,fuse-norms,quantize-linear{scheme=fp8-block},"
    "fuse-norm-quantize,hoist-invariants",
}
T2V = VARIANTS["t2v"]


def pair(variant, pipeline="int8-block"):
    """The same denoiser with CUDA graphs, and launched step by step as a whole graph."""
    if pipeline == "fp8-block" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8 products")
    planned = validate_pipeline(parse_pipeline(PIPELINES[pipeline]))
    program = captured_program(variant, torch.bfloat16)
    (denoiser,) = PassManager(planned, verification=Verification("off")).run(program)
    weights = {name: tensor.load().cuda() for name, tensor in denoiser.weights.items()}

    def build(stages):
        return CompiledTransformer.build(
            denoiser.exported, weights, denoiser.config, "cuda", stages
        )

    return build(denoiser.stages), build({})


def inputs_of(variant, *size):
    inputs = random_inputs(variant, *size, torch.bfloat16)
    return {name: tensor.cuda() for name, tensor in inputs.items()}


def velocity(module, inputs):
    with torch.no_grad():
        return module(**inputs, return_dict=False)[0]


def wait_in_each_step(module):
    """Let each step wait for the GPU, which cannot be recorded."""
    step = module._staged.graphs._step

    def waits(**values):
        values["hidden_states"].sum().item()
        return step(**values)

    module._staged.graphs._step = waits


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("name", VARIANTS)
def test_replays_keep_every_bit_for_prompts_timesteps_seeds_and_sizes_in_turn(name, pipeline):
    variant = VARIANTS[name]
    graphs, eager = pair(variant, pipeline)
    for size in ((1, 2, 8, 8), (2, 3, 8, 12), (1, 2, 8, 8)):
        inputs = inputs_of(variant, *size)
        prompts = [inputs["encoder_hidden_states"], inputs["encoder_hidden_states"].flip(-1)]
        found, expected = [], []
        for seed, timestep in enumerate((999, 500.5, 3, 999)):
            torch.manual_seed(seed)
            inputs["hidden_states"] = torch.randn_like(inputs["hidden_states"])
            inputs["timestep"] = torch.full_like(inputs["timestep"], timestep, dtype=torch.float32)
            for prompt in prompts:
                inputs["encoder_hidden_states"] = prompt
                found.append(velocity(graphs, inputs))
                expected.append(velocity(eager, inputs))
        prompts[1].mul_(0.5)
        found.append(velocity(graphs, inputs))
        expected.append(velocity(eager, inputs))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert graphs.cuda_graph_status == "on, 2 shapes recorded"
    assert eager.cuda_graph_status.startswith("off")


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_timestep_may_lie_on_either_side(where):
    graphs, eager = pair(T2V)
    inputs = inputs_of(T2V, 2, 2, 8, 8)
    for timestep in (999.0, 3.0, 999.0, 3.0):
        inputs["timestep"] = torch.full((2,), timestep, device=where)
        assert torch.equal(velocity(graphs, inputs), velocity(eager, inputs))


def test_a_known_timestep_on_the_cpu_is_replayed_without_waiting_for_the_gpu():
    graphs, _ = pair(T2V)
    inputs = inputs_of(T2V, 1, 2, 8, 8)
    inputs["timestep"] = torch.full((1,), 500.0)
    for _ in range(2):
        velocity(graphs, inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        velocity(graphs, inputs)
        inputs["timestep"] = inputs["timestep"].clone()
        velocity(graphs, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_moving_away_and_back_records_anew():
    graphs, eager = pair(T2V)
    inputs = inputs_of(T2V, 1, 2, 8, 8)
    for _ in range(3):
        velocity(graphs, inputs)
    graphs.to("cpu").to("cuda")
    assert graphs.cuda_graph_status == "on, not called yet"
    for _ in range(3):
        assert torch.equal(velocity(graphs, inputs), velocity(eager, inputs))
    assert graphs.cuda_graph_status == "on, 1 shape recorded"


def test_a_step_that_waits_for_the_gpu_falls_back_and_says_why():
    graphs, eager = pair(T2V)
    inputs = inputs_of(T2V, 1, 2, 8, 8)
    velocity(graphs, inputs)
    wait_in_each_step(graphs)
    for _ in range(3):
        assert torch.equal(velocity(graphs, inputs), velocity(eager, inputs))
    assert graphs.cuda_graph_status.startswith("failed, each step is launched anew: ")


def test_random_numbers_go_on_as_before_after_a_recording_failed():
    graphs, _ = pair(T2V)
    inputs = inputs_of(T2V, 1, 2, 8, 8)
    velocity(graphs, inputs)
    wait_in_each_step(graphs)
    torch.manual_seed(5)
    torch.randn(3, device="cuda")
    velocity(graphs, inputs)
    assert graphs.cuda_graph_status.startswith("failed")
    drawn = torch.randn(4, device="cuda")
    torch.manual_seed(5)
    torch.randn(3, device="cuda")
    assert torch.equal(drawn, torch.randn(4, device="cuda"))


def test_a_callers_own_cuda_graph_takes_the_whole_network_in():
    graphs, eager = pair(T2V)
    inputs = inputs_of(T2V, 1, 2, 8, 8)
    for _ in range(3):
        velocity(graphs, inputs)
    own = torch.cuda.CUDAGraph()
    with torch.cuda.graph(own):
        result = velocity(graphs, inputs)
    inputs["encoder_hidden_states"].mul_(0.5)
    own.replay()
    assert torch.equal(result, velocity(eager, inputs))


@pytest.mark.parametrize("experts", [1, 2])
def test_clips_are_the_same_with_and_without(experts, monkeypatch, tmp_path):
    """Guidance, and two experts with graphs of their own, through `generate`."""
    from tests.helpers.tiny_folder import TINY_RECIPE, tiny_program
    from turbo_opt.artifact.save import save

    planned = validate_pipeline(parse_pipeline("canonicalize,hoist-invariants"))
    program = PassManager(planned, verification=Verification("off")).run(tiny_program(experts))
    out = save(program, tmp_path / "artifact", recipe=TINY_RECIPE, replay=False)
    loaded = {on: turbo_opt.load(out, device="cuda", cuda_graph=on) for on in (True, False)}
    for seed in (1, 2):
        clips = {
            on: artifact.generate("a red circle", seed=seed) for on, artifact in loaded.items()
        }
        assert (clips[True] == clips[False]).all()
    networks = loaded[True].transformers.values()
    assert len(networks) == experts
    assert all(item.cuda_graph_status == "on, 1 shape recorded" for item in networks)
    assert loaded[False].transformer.cuda_graph_status == "off, cuda_graph=False"


def test_an_artifact_without_stages_runs_as_before():
    artifact = turbo_opt.load(shared_artifact(), device="cuda")
    assert artifact.generate("a red circle", seed=1).shape == (5, 32, 48, 3)
    assert artifact.transformer.cuda_graph_status.startswith("off, ")
