"""Whole clips replayed as one CUDA graph have every bit of the same clips step by step."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from tests.helpers.schedules import euler
from tests.helpers.tiny_folder import tiny_program
from turbo_opt.capture import capture
from turbo_opt.compiler.manager import PassManager, Verification
from turbo_opt.compiler.pipeline import parse_pipeline
from turbo_opt.compiler.validation import validate_pipeline
from turbo_opt.ir.rcm import rcm_schedule
from turbo_opt.runtime.cuda_graph import CudaBackend
from turbo_opt.runtime.module import CompiledTransformer
from turbo_opt.runtime.sampler import initial_latents, sample

pytestmark = pytest.mark.gpu

HIGH, LOW = "transformer", "transformer_2"
SIZE = (5, 24, 24)  # 17 frames of 96×96
FUSED = (
    "canonicalize,fuse-norms,merge-padding,fuse-qk-norm-rope,quantize-linear{{scheme={scheme}}},"
    "fuse-norm-quantize,fuse-qkv{{cross_attention=false}},"
    "fuse-epilogues{{linear_gelu=true linear_residual={fp8}}},hoist-invariants"
)


def optimized(program, pipeline):
    planned = validate_pipeline(parse_pipeline(pipeline))
    return PassManager(planned, verification=Verification("off")).run(program)


@functools.cache
def tiny_wan():
    """By the passes of the recipe tiny-wan/h200; in int8 where a GPU has no fp8 products."""
    fp8 = torch.cuda.get_device_capability() >= (8, 9)
    scheme, fused = ("fp8-block", "true") if fp8 else ("int8-block", "false")
    return optimized(capture("tiny-wan"), FUSED.format(scheme=scheme, fp8=fused))


@functools.cache
def two_experts():
    return optimized(tiny_program(2, "bfloat16"), "canonicalize,hoist-invariants")


def networks(program):
    built = {}
    for name, denoiser in program.denoisers.items():
        weights = {key: tensor.load().cuda() for key, tensor in denoiser.weights.items()}
        built[name] = CompiledTransformer.build(
            denoiser.exported, weights, denoiser.config, "cuda", denoiser.stages
        )
    return built


def experts_in_turn(schedule):
    """The first step is the first expert's, the others are the second's."""
    names = (HIGH, *(LOW for _ in schedule.steps[1:]))
    steps = zip(schedule.steps, names, strict=True)
    return replace(schedule, steps=tuple(replace(step, denoiser=name) for step, name in steps))


def clip(transformers, schedule, seed, *, size=SIZE, where="cuda", **options):
    """The clip of a seed, which draws its prompts too, and what the generator draws after it."""
    width = transformers[HIGH].config["text_dim"]
    texts = torch.randn(2, 1, 512, width, generator=torch.Generator().manual_seed(seed))
    texts[:, :, 90:] = 0
    prompt, negative = texts.to("cuda", torch.bfloat16)
    generator = torch.Generator(where).manual_seed(seed)
    latents = initial_latents(schedule, (1, 16, *size), generator, "cuda")
    options = {"loop_graph": True, **options}
    found = sample(
        transformers, schedule, prompt, negative, latents=latents, generator=generator, **options
    )
    return found, torch.randn(2, generator=generator, device=where)


def assert_same(transformers, schedule, seed, **options):
    found = clip(transformers, schedule, seed, **options)
    expected = clip(transformers, schedule, seed, loop_graph=False, **options)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert found[0].isfinite().all()


@pytest.fixture
def replays(monkeypatch):
    """How often each recording was replayed, in the order in which they were made."""
    counts = []
    record = CudaBackend.record

    def counted(self, run):
        replay, result = record(self, run)
        place = len(counts)
        counts.append(0)

        def replay_and_count():
            counts[place] += 1
            replay()

        return replay_and_count, result

    monkeypatch.setattr(CudaBackend, "record", counted)
    return counts


SCHEDULES = {
    "four steps of rcm-sde": (tiny_wan, rcm_schedule(4, 80.0, "sde")),
    "four steps of rcm-ode": (tiny_wan, rcm_schedule(4, 80.0, "ode")),
    "eight evaluations, guided": (tiny_wan, euler(4, 3.0)),
    "two experts": (two_experts, experts_in_turn(rcm_schedule(3, 80.0, "sde"))),
    "two experts, guided": (two_experts, experts_in_turn(euler(3, 3.0))),
}


@pytest.mark.parametrize("where", ["cuda", "cpu"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_bit_is_kept_for_new_prompts_seeds_and_sizes(name, where):
    program, schedule = SCHEDULES[name]
    transformers = networks(program())
    sizes = (SIZE, SIZE, SIZE, (2, 8, 12), (2, 8, 12), (2, 8, 12), SIZE)
    for seed, size in enumerate(sizes):
        assert_same(transformers, schedule, seed, size=size, where=where)
        if size == sizes[0]:
            made = clip(transformers, schedule, seed, size=size, where=where)
            again = clip(transformers, schedule, seed, size=size, where=where)
            assert torch.equal(made[0], again[0])
    clip(transformers, schedule, 0)
    assert transformers[HIGH].loop_graph_status == "on, 2 loops recorded"


def test_a_clip_is_one_replay(replays):
    transformers, schedule = networks(tiny_wan()), rcm_schedule(4, 80.0, "sde")
    clip(transformers, schedule, 0)
    assert replays == [3]  # the first step warms up, the second is recorded
    for seed in range(1, 4):
        clip(transformers, schedule, seed)
    assert replays == [3, 3]
    clip(transformers, schedule, 4, loop_graph=False)
    assert replays == [7, 3]


def test_a_known_clip_is_launched_without_waiting_for_the_gpu():
    transformers, schedule = networks(tiny_wan()), rcm_schedule(4, 80.0, "sde")
    prompt = torch.randn(1, 512, transformers[HIGH].config["text_dim"], device="cuda").bfloat16()
    generator = torch.Generator("cuda").manual_seed(0)
    latents = initial_latents(schedule, (1, 16, *SIZE), generator, "cuda")

    def make():
        sample(
            transformers, schedule, prompt, latents=latents, generator=generator, loop_graph=True
        )

    for _ in range(2):
        make()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        make()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert transformers[HIGH].loop_graph_status == "on, 1 loop recorded"


def test_a_loop_that_waits_for_the_gpu_is_made_by_steps_and_steps_are_still_recorded():
    transformers, schedule = networks(tiny_wan()), rcm_schedule(4, 80.0, "sde")
    clip(transformers, schedule, 0)
    network = transformers[HIGH]
    step = network.staged().velocity

    def waits(**values):
        values["hidden_states"].sum().item()
        return step(**values)

    network.staged().velocity = waits  # what a recorded step runs was bound before
    torch.cuda.manual_seed(5)
    torch.randn(3, device="cuda")
    for seed in range(1, 3):
        assert_same(transformers, schedule, seed)
        assert network.loop_graph_status == "off, loop_graph=False"
    drawn = torch.randn(4, device="cuda")
    torch.cuda.manual_seed(5)
    torch.randn(3, device="cuda")
    assert torch.equal(drawn, torch.randn(4, device="cuda"))
    for seed in range(3):
        assert_same(transformers, schedule, seed, size=(2, 8, 12))
    clip(transformers, schedule, 3)
    assert network.loop_graph_status.startswith("failed, clips are made step by step: ")
    assert network.cuda_graph_status == "on, 2 shapes recorded"


def test_networks_that_were_moved_are_recorded_anew():
    transformers, schedule = networks(two_experts()), experts_in_turn(euler(3))
    for seed in range(2):
        assert_same(transformers, schedule, seed)
    transformers[LOW].to("cpu").to("cuda")
    for seed in range(3):
        assert_same(transformers, schedule, seed)
    transformers[HIGH].to("cpu").to("cuda")
    for seed in range(3):
        assert_same(transformers, schedule, seed)
    clip(transformers, schedule, 3)
    assert transformers[HIGH].loop_graph_status == "on, 1 loop recorded"
