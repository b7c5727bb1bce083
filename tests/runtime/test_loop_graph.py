"""Clips recorded as a whole have every bit of those made step by step; the device is a fake."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.schedules import euler
from tests.helpers.tiny_folder import tiny_program
from tests.helpers.variants import VARIANTS, compiled
from tests.runtime.test_cuda_graph import FakeBackend
from tests.runtime.test_staged import optimized
from turbo_opt.compiler.manager import PassManager, Verification
from turbo_opt.compiler.pipeline import parse_pipeline
from turbo_opt.compiler.validation import validate_pipeline
from turbo_opt.ir.rcm import rcm_schedule
from turbo_opt.runtime.loop_graph import MOST_EVALUATIONS, StepCall, why_not
from turbo_opt.runtime.module import CompiledTransformer
from turbo_opt.runtime.sampler import initial_latents, sample
from turbo_opt.runtime.staged import StagedGraph

STAGED = "canonicalize,hoist-invariants"
HIGH, LOW = "transformer", "transformer_2"
SIZE = (2, 8, 12)
ONE, OTHER, NEGATIVE = torch.randn(3, 1, 512, 32, generator=torch.Generator().manual_seed(7))


@functools.cache
def program(pipeline=STAGED):
    planned = validate_pipeline(parse_pipeline(pipeline))
    return PassManager(planned, verification=Verification("off")).run(tiny_program(2))


def networks(pipeline=STAGED):
    """Both experts, on a CPU that records nothing."""
    built = {}
    for name, denoiser in program(pipeline).denoisers.items():
        weights = {key: tensor.load() for key, tensor in denoiser.weights.items()}
        built[name] = CompiledTransformer.build(
            denoiser.exported, weights, denoiser.config, "cpu", denoiser.stages
        )
    return built


@dataclass
class Recorded:
    """Both experts with a backend each, and the clips that they make."""

    networks: dict[str, Any] = field(default_factory=networks)
    backends: dict[str, FakeBackend] = field(default_factory=dict)

    def __post_init__(self):
        for name in self.networks:
            self.give_backend(name)

    def give_backend(self, name, failure=None):
        self.backends[name] = FakeBackend(failure)
        network = self.networks[name]
        network._staged = StagedGraph(network.graph, network.stages, self.backends[name])

    @property
    def log(self):
        return self.backends[HIGH].log

    @property
    def status(self):
        return self.networks[HIGH].loop_graph_status


@functools.cache
def plain():
    return networks()


def schedule_of(rule, guided, experts):
    """Three steps; with two experts the second makes the last two."""
    schedule = euler(3) if rule == "euler" else rcm_schedule(3, 80.0, rule.removeprefix("rcm-"))
    scales = (4.0, None, 2.0) if guided else (None,) * 3
    names = (HIGH, *((LOW,) * 2 if experts == 2 else (HIGH,) * 2))
    steps = zip(schedule.steps, scales, names, strict=True)
    changed = [replace(step, guidance_scale=s, denoiser=n) for step, s, n in steps]
    return replace(schedule, steps=tuple(changed))


def clip(transformers, schedule, prompt=ONE, seed=0, size=SIZE, **options) -> tuple[Tensor, Tensor]:
    """The clip, and what the generator draws after it."""
    generator = torch.Generator().manual_seed(seed)
    latents = initial_latents(schedule, (1, 16, *size), generator)
    options = {"loop_graph": True, **options}
    found = sample(
        transformers, schedule, prompt, NEGATIVE, latents=latents, generator=generator, **options
    )
    return found, torch.randn(2, generator=generator)


def assert_same(recorded, schedule, **options):
    found = clip(recorded.networks, schedule, **options)
    expected = clip(plain(), schedule, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return found[0]


@pytest.fixture
def copied(monkeypatch):
    """How many tensors were copied into buffers, each time."""
    counts = []
    copy = torch._foreach_copy_
    monkeypatch.setattr(
        torch, "_foreach_copy_", lambda to, source: (counts.append(len(to)), copy(to, source))
    )
    return counts


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
@pytest.mark.parametrize("rule", ["euler", "rcm-ode", "rcm-sde"])
def test_every_bit_is_kept_for_new_prompts_seeds_and_sizes(rule, guided, experts):
    recorded, schedule = Recorded(), schedule_of(rule, guided, experts)
    small = (1, 8, 8)
    kinds = [(ONE, 0, SIZE), (ONE, 0, SIZE), (OTHER, 5, SIZE), (OTHER, 6, small), (ONE, 7, small)]
    clips = [
        assert_same(recorded, schedule, prompt=prompt, seed=seed, size=size)
        for prompt, seed, size in kinds
    ]
    assert torch.equal(clips[0], clips[1])
    assert not torch.equal(clips[1], clips[2])
    assert recorded.status == "on, 2 loops recorded"
    assert recorded.networks[LOW].loop_graph_status == (
        recorded.status if experts == 2 else "no clip was sampled yet"
    )


def test_the_first_clip_is_made_by_steps_the_second_is_recorded_and_later_ones_are_one_replay():
    recorded, schedule = Recorded(), euler(3)
    clip(recorded.networks, schedule)
    assert recorded.log == ["warm up", "record", "replay", "replay"]
    assert recorded.status == "on, 0 loops recorded"
    clip(recorded.networks, schedule)
    assert recorded.log[4:] == ["record", "replay"]
    assert recorded.status == "on, 1 loop recorded"
    for seed in (1, 2):
        clip(recorded.networks, schedule, seed=seed)
    assert recorded.log[6:] == ["replay", "replay"]


def test_one_step_that_was_never_recorded_by_itself_is_a_loop_too():
    recorded, schedule = Recorded(), rcm_schedule(1, 80.0, "sde")
    for seed in range(3):
        assert_same(recorded, schedule, seed=seed)
    assert recorded.log == ["warm up", "record", "replay", "replay"]


def test_a_prompt_changed_in_place_is_seen():
    recorded, schedule = Recorded(), euler(2, 3.0)
    prompt = ONE.clone()
    before = [assert_same(recorded, schedule, prompt=prompt) for _ in range(3)]
    prompt.mul_(0.5)
    assert not torch.equal(assert_same(recorded, schedule, prompt=prompt), before[-1])
    assert recorded.log[-1] == "replay"


def test_a_negative_prompt_that_is_the_prompt_is_another_kind_of_clip():
    recorded, schedule = Recorded(), euler(2, 3.0)
    for prompt in (NEGATIVE, NEGATIVE, ONE, ONE, NEGATIVE):
        assert_same(recorded, schedule, prompt=prompt)
    assert recorded.status == "on, 2 loops recorded"


def test_schedules_that_differ_in_a_time_are_told_apart_and_two_kinds_are_kept():
    recorded = Recorded()
    kinds = [euler(2), euler(3), rcm_schedule(2, 80.0, "sde"), rcm_schedule(2, 200.0, "sde")]
    for schedule in (*kinds, *kinds):
        assert_same(recorded, schedule)
    assert recorded.status == "on, 0 loops recorded"  # each was forgotten before it came again
    for schedule in (*kinds[2:], *kinds[2:], *kinds[2:]):
        assert_same(recorded, schedule)
    assert recorded.status == "on, 2 loops recorded"


def test_progress_is_told_of_every_step_at_once():
    recorded, schedule = Recorded(), euler(3)
    told = []
    for _ in range(3):
        clip(
            recorded.networks,
            schedule,
            progress=lambda *step: told.append((step, len(recorded.log))),
        )
    assert [step for step, _ in told] == [(1, 3), (2, 3), (3, 3)] * 3
    launched = [count for _, count in told]
    assert len(set(launched[:3])) == 3
    assert len(set(launched[3:6])) == len(set(launched[6:])) == 1


def test_a_clip_is_the_callers_to_keep():
    recorded, schedule = Recorded(), euler(2)
    for _ in range(2):
        clip(recorded.networks, schedule)
    kept, _ = clip(recorded.networks, schedule, seed=1)
    copy = kept.clone()
    clip(recorded.networks, schedule, seed=2)
    assert torch.equal(kept, copy)


@pytest.mark.parametrize(
    ("schedule", "options", "reason"),
    [
        (euler(2), {"loop_graph": False}, "off, loop_graph=False"),
        (
            euler(MOST_EVALUATIONS // 2 + 1, 2.0),
            {},
            "off, a clip takes 10 network evaluations, 1 to 8 are recorded",
        ),
        (None, {}, "off, a scheduler of diffusers makes the schedule's steps"),
    ],
    ids=["not-wanted", "too-long", "scheduler"],
)
def test_what_cannot_be_one_graph_is_made_by_steps_and_says_why(schedule, options, reason):
    recorded, schedule = Recorded(), schedule or program().schedule
    for seed in range(3):
        assert_same(recorded, schedule, seed=seed, **options)
    assert recorded.status == reason
    assert recorded.log.count("record") == 1  # the step


def test_the_most_evaluations_are_recorded():
    recorded, schedule = Recorded(), euler(MOST_EVALUATIONS // 2, 2.0)
    for seed in range(2):
        assert_same(recorded, schedule, seed=seed)
    assert recorded.status == "on, 1 loop recorded"


@pytest.mark.parametrize(
    ("pipeline", "reason"),
    [
        (STAGED, "off, the model is on cpu"),
        ("canonicalize", "off, the artifact was made without the pass hoist-invariants"),
    ],
)
def test_networks_that_record_no_steps_record_no_loop(pipeline, reason):
    transformers = networks(pipeline)
    clip(transformers, euler(1))
    assert transformers[HIGH].loop_graph_status == reason


def test_one_expert_that_cannot_be_recorded_keeps_the_pair_to_steps():
    recorded, schedule = Recorded(), schedule_of("euler", False, experts=2)
    recorded.networks[LOW]._staged = None
    for _ in range(3):
        assert_same(recorded, schedule)
    assert recorded.status == "off, the model is on cpu"


def test_a_network_that_is_not_compiled_keeps_the_other_to_steps():
    recorded, schedule = Recorded(), schedule_of("euler", False, experts=2)
    inner = recorded.networks[LOW]

    class Foreign:
        dtype, config, device = inner.dtype, inner.config, inner.device

        def __call__(self, **inputs):
            return inner(**inputs)

    recorded.networks[LOW] = Foreign()
    for _ in range(3):
        assert_same(recorded, schedule)
    assert recorded.status == "off, Foreign is no compiled network"


def test_latents_elsewhere_are_not_recorded():
    recorded, (step,) = Recorded(), euler(1).steps
    call = StepCall(step, recorded.networks[HIGH], ({},))
    assert why_not([call], torch.empty(1), wanted=True) is None
    assert why_not([call], torch.empty(1, device="meta"), wanted=True) == (
        "off, networks and latents are on cpu and meta"
    )


def test_forward_hooks_see_every_call():
    recorded, schedule = Recorded(), euler(3)
    calls = []
    handle = recorded.networks[HIGH].register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        clip(recorded.networks, schedule)
    assert len(calls) == 9
    assert recorded.status == "off, a network has forward hooks, which want each call"
    handle.remove()
    for _ in range(2):
        clip(recorded.networks, schedule)
    assert recorded.status == "on, 1 loop recorded"


@pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
def test_a_loop_that_cannot_be_recorded_is_made_by_steps_with_the_noise_already_drawn(
    guided, caplog
):
    recorded, schedule = Recorded(), schedule_of("rcm-sde", guided, experts=1)
    assert_same(recorded, schedule)
    recorded.backends[HIGH]._failure = ValueError("no memory for a graph\nmore")
    with caplog.at_level(logging.WARNING, "turbo_opt"):
        for seed in range(3):
            assert_same(recorded, schedule, seed=seed)
    assert recorded.status == (
        "failed, clips are made step by step: ValueError: no memory for a graph"
    )
    logged = [item.name for item in caplog.records]
    assert logged.count("turbo_opt.runtime.cuda_graph") == 1
    assert recorded.log.count("record") == 2
    # Steps are still recorded, also of other sizes.
    assert recorded.networks[HIGH]._staged.graphs.status == "on, 1 shape recorded"
    recorded.backends[HIGH]._failure = None
    for _ in range(2):
        assert_same(recorded, schedule, size=(1, 8, 8))
    assert recorded.networks[HIGH]._staged.graphs.status == "on, 2 shapes recorded"


def test_a_step_that_cannot_be_recorded_is_the_loops_reason_too():
    recorded = Recorded()
    recorded.give_backend(HIGH, failure=ValueError("an operator waits"))
    for _ in range(3):
        assert_same(recorded, euler(2))
    assert recorded.status == "off, a step could not be recorded: ValueError: an operator waits"


def test_a_clip_that_failed_is_not_taken_for_one_that_was_made():
    recorded, schedule = Recorded(), euler(2)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        clip(recorded.networks, schedule, progress=stop)
    assert_same(recorded, schedule)
    assert recorded.status == "on, 0 loops recorded"
    with pytest.raises(ValueError, match="not a multiple of the patch"):
        clip(recorded.networks, schedule, size=(1, 8, 7))
    for _ in range(2):
        assert_same(recorded, schedule)
    assert recorded.status == "on, 1 loop recorded"


def test_an_expert_that_was_moved_is_recorded_anew():
    recorded, schedule = Recorded(), schedule_of("rcm-sde", False, experts=2)
    for _ in range(2):
        assert_same(recorded, schedule)
    assert recorded.status == "on, 1 loop recorded"
    recorded.networks[LOW].to("cpu")
    recorded.give_backend(LOW)
    assert_same(recorded, schedule)
    assert recorded.backends[LOW].log == ["warm up", "record", "replay"]  # by steps
    for seed in range(2):
        assert_same(recorded, schedule, seed=seed)
    assert recorded.log[-3:] == ["record", "replay", "replay"]
    assert len(recorded.backends[LOW].log) == 3


def test_a_first_network_that_was_moved_has_forgotten_its_loops():
    recorded, schedule = Recorded(), euler(2)
    for _ in range(2):
        clip(recorded.networks, schedule)
    recorded.networks[HIGH].to("cpu")
    assert recorded.status == "no clip was sampled yet"
    recorded.give_backend(HIGH)
    assert_same(recorded, schedule)
    assert recorded.status == "on, 0 loops recorded"


def test_a_text_of_another_length_is_another_kind_of_clip():
    recorded, schedule = Recorded(), euler(2)
    shorter = ONE[:, :100].clone()
    for prompt in (ONE, ONE, shorter, shorter, OTHER):
        assert_same(recorded, schedule, prompt=prompt)
    assert recorded.status == "on, 2 loops recorded"


def test_clips_in_inference_mode_are_recorded_and_serve_outside_of_it(copied):
    recorded, schedule = Recorded(), euler(2, 3.0)
    with torch.inference_mode():
        prompt = ONE * 1
        for _ in range(3):
            copied.clear()
            assert_same(recorded, schedule, prompt=prompt)
    assert copied == [1, 2]  # latents; keys and values of the prompt, once for both steps
    assert recorded.status == "on, 1 loop recorded"
    assert_same(recorded, schedule)
    assert recorded.log[-1] == "replay"


@pytest.mark.parametrize(
    ("name", "copies"),
    [
        # Latents; control and its scale, once; keys and values for both prompts.
        ("vace", [1, 2, 8, 8]),
        # Latents; the first step's timesteps; keys and values for both prompts; the second's.
        ("ti2v", [1, 1, 4, 4, 1]),
    ],
)
def test_conditions_and_timesteps_for_every_token_are_copied_once(name, copies, copied):
    variant = VARIANTS[name]
    by_steps, at_once = (compiled(optimized(name, STAGED)) for _ in range(2))
    at_once._staged = StagedGraph(at_once.graph, at_once.stages, FakeBackend())
    schedule = replace(euler(2, 3.0), expand_timesteps=variant.expand_timesteps)
    for seed in range(3):
        copied.clear()
        generator = torch.Generator().manual_seed(seed)
        prompt, negative = torch.randn(2, 1, 21, 64, generator=generator)
        latents = torch.randn(1, variant.config["in_channels"], 2, 8, 8, generator=generator)
        conditions = {}
        if name == "vace":
            conditions["control_hidden_states"] = torch.randn(1, 96, 2, 8, 8, generator=generator)
            conditions["control_hidden_states_scale"] = torch.rand(2, generator=generator)
        given = {"latents": latents, "conditions": conditions, "loop_graph": True}
        found, expected = (
            sample({HIGH: module}, schedule, prompt, negative, **given)
            for module in (at_once, by_steps)
        )
        assert torch.equal(found, expected)
    assert at_once.loop_graph_status == "on, 1 loop recorded"
    assert copied == copies
