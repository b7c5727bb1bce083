"""The sampling loop is diffusers' where a scheduler of diffusers drives it, and rCM's formulas
where those do."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.tiny_folder import reference_pipeline, shared_folder, tiny_program
from turbo_opt.errors import BadInput
from turbo_opt.ir.rcm import rcm_schedule
from turbo_opt.ir.schedule import Schedule, Step
from turbo_opt.runtime.rules import advance, drawn_noise
from turbo_opt.runtime.sampler import initial_latents, sample
from turbo_opt.runtime.scheduler import FixedStepScheduler, scheduler_for

SHAPE = (1, 16, 2, 8, 12)


class Linear:
    """A network v = x·a + mean(text) + t/1000, and a record of its calls."""

    dtype = torch.float32
    config = {"patch_size": (1, 2, 2), "in_channels": 16}

    def __init__(self) -> None:
        self.calls: list[dict[str, Tensor]] = []

    def __call__(self, *, return_dict: bool, **inputs: Tensor) -> tuple[Tensor]:
        self.calls.append(inputs)
        time = inputs["timestep"].reshape(inputs["timestep"].shape[0], -1)[:, :1]
        shift = inputs["encoder_hidden_states"].mean() + time.reshape(-1, 1, 1, 1, 1) / 1000
        return (inputs["hidden_states"] * 0.5 + shift,)


def _steps(rule: Any, times: list[float], guidance: float | None = None) -> tuple[Step, ...]:
    return tuple(
        Step(now, then, 1000 * now, "transformer", guidance, rule)
        for now, then in itertools.pairwise(times)
    )


@pytest.mark.parametrize("experts", [1, 2])
def test_the_loop_equals_diffusers_bit_for_bit(experts: int) -> None:
    pipeline = reference_pipeline(shared_folder(experts))
    embeds, negative = pipeline.encode_prompt("a red circle", "blue", max_sequence_length=512)
    expected = pipeline(
        prompt_embeds=embeds, negative_prompt_embeds=negative, height=32, width=48, num_frames=5,
        num_inference_steps=3, guidance_scale=5.0, output_type="latent",
        generator=torch.Generator().manual_seed(4),
    ).frames  # fmt: skip
    schedule = tiny_program(experts).schedule
    generator = torch.Generator().manual_seed(4)
    networks = {"transformer": pipeline.transformer, "transformer_2": pipeline.transformer_2}
    found = sample(
        networks, schedule, embeds, negative, latents=initial_latents(schedule, SHAPE, generator)
    )
    assert len({step.denoiser for step in schedule.steps}) == experts
    assert torch.equal(found, expected)


def test_an_unguided_schedule_runs_the_network_once_a_step() -> None:
    network = Linear()
    schedule = Schedule(_steps("euler", [1.0, 0.5, 0.0]))
    sample({"transformer": network}, schedule, torch.zeros(1, 4, 8), latents=torch.zeros(SHAPE))
    assert [call["timestep"].item() for call in network.calls] == [1000.0, 500.0]


def test_guidance_mixes_both_predictions() -> None:
    schedule = Schedule(_steps("euler", [1.0, 0.0], guidance=3.0))
    prompt, negative = torch.full((1, 4, 8), 2.0), torch.full((1, 4, 8), 1.0)
    latents = torch.zeros(SHAPE)
    found = sample({"transformer": Linear()}, schedule, prompt, negative, latents=latents)
    # v = uncond + 3·(cond − uncond) = 2 + 3·1; x = 0 − 1·v
    assert torch.equal(found, torch.full(SHAPE, -5.0))


def test_euler_follows_the_velocity() -> None:
    times = [1.0, 0.75, 0.25, 0.0]
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    found = sample(
        {"transformer": Linear()}, Schedule(_steps("euler", times)), torch.zeros(1, 4, 8), latents=x
    )
    for now, then in itertools.pairwise(times):
        x = x + (then - now) * (x * 0.5 + now)
    torch.testing.assert_close(found, x)


class Recorded:
    """An analytic velocity field, in the network's dtype, and the x that it was asked at."""

    config = {"patch_size": (1, 2, 2), "in_channels": 16}

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def velocity(self, x: Tensor, timestep: float) -> Tensor:
        """sin(3x) + 0.7·x·t, t in float32 as networks have it."""
        time = torch.tensor(timestep, dtype=torch.float32) / 1000
        return torch.sin(3 * x) + (0.7 * time).to(x.dtype) * x

    def __call__(self, *, return_dict: bool, **inputs: Tensor) -> tuple[Tensor]:
        assert inputs["hidden_states"].dtype == self.dtype
        (timestep,) = set(inputs["timestep"].tolist())
        return (self.velocity(inputs["hidden_states"], timestep),)


@pytest.mark.parametrize("network_dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sigma_max", [80.0, 200.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("rule", ["sde", "ode"])
def test_rcm_sampling_is_the_published_one_to_the_last_bit_of_float64(
    rule: Any, steps: int, sigma_max: float, network_dtype: torch.dtype
) -> None:
    schedule = rcm_schedule(steps, sigma_max, rule)
    network = Recorded(network_dtype)
    generator = torch.Generator().manual_seed(0)
    latents = initial_latents(schedule, SHAPE, generator)
    states: list[Tensor] = [latents]
    for step in schedule.steps:
        v = network.velocity(states[-1].to(network_dtype), float(torch.tensor(step.timestep)))
        noise = drawn_noise(step, latents, generator)
        states.append(advance(step, v, states[-1], noise))
    found = sample(
        {"transformer": network}, schedule, torch.zeros(1, 4, 8), latents=latents,
        generator=_generator_after_the_first_draw(),
    )  # fmt: skip

    tau = [math.atan(sigma_max), 1.5, 1.4, 1.0][:steps] + [0.0]
    times = [math.sin(t) / (math.cos(t) + math.sin(t)) for t in tau]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPE, generator=generator).to(torch.float64) * times[0]
    assert torch.equal(states[0], x)
    for index, (t, s) in enumerate(itertools.pairwise(times)):
        timestep = float(torch.tensor(1000 * t, dtype=torch.float32))
        v = network.velocity(x.to(network_dtype), timestep).to(torch.float64)
        if rule == "ode":
            x = x - (t - s) * v
        else:
            noise = torch.zeros(SHAPE) if s == 0 else torch.randn(SHAPE, generator=generator)
            x = (1 - s) * (x - t * v) + s * noise.to(torch.float64)
        assert states[index + 1].dtype == torch.float64
        assert torch.equal(states[index + 1], x)
    assert found.dtype == torch.float32
    assert torch.equal(found, x.float())


def _generator_after_the_first_draw() -> torch.Generator:
    generator = torch.Generator().manual_seed(0)
    torch.randn(SHAPE, generator=generator)
    return generator


def test_a_timestep_for_every_token_where_the_model_takes_them() -> None:
    network = Linear()
    schedule = replace(Schedule(_steps("euler", [1.0, 0.0])), expand_timesteps=True)
    sample(
        {"transformer": network},
        schedule,
        torch.zeros(2, 4, 8),
        latents=torch.zeros(2, 16, 3, 8, 12),
    )
    assert network.calls[0]["timestep"].shape == (2, 3 * 4 * 6)


def test_progress_is_told_after_every_step() -> None:
    seen: list[tuple[int, int]] = []
    sample(
        {"transformer": Linear()},
        Schedule(_steps("euler", [1.0, 0.5, 0.0])),
        torch.zeros(1, 4, 8),
        latents=torch.zeros(SHAPE),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 2), (2, 2)]


def test_what_the_schedule_needs_and_is_not_there_is_named() -> None:
    embeds, latents = torch.zeros(1, 4, 8), torch.zeros(SHAPE)
    guided = Schedule(_steps("euler", [1.0, 0.0], guidance=5.0))
    with pytest.raises(BadInput, match="negative_prompt_embeds"):
        sample({"transformer": Linear()}, guided, embeds, latents=latents)
    with pytest.raises(BadInput, match="runs 'transformer'"):
        sample({"other": Linear()}, Schedule(_steps("euler", [1.0, 0.0])), embeds, latents=latents)


def test_a_schedule_that_its_scheduler_cannot_follow_is_refused() -> None:
    schedule = tiny_program().schedule
    embeds = torch.zeros(1, 4, 8)
    cut = replace(schedule, steps=schedule.steps[1:])
    mixed = replace(schedule, steps=(*schedule.steps[:2], replace(schedule.steps[2], rule="euler")))
    for wrong, message in ((cut, "are not the 3"), (mixed, "cannot mix")):
        with pytest.raises(BadInput, match=message):
            sample({"transformer": Linear()}, wrong, embeds, embeds, latents=torch.zeros(SHAPE))


def test_the_same_seed_gives_the_same_noise_as_diffusers() -> None:
    from diffusers.utils.torch_utils import randn_tensor

    schedule = Schedule(_steps("euler", [1.0, 0.0]))
    ours = initial_latents(schedule, SHAPE, torch.Generator().manual_seed(5))
    theirs = randn_tensor(SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float32)
    assert torch.equal(ours, theirs)


def test_fixed_steps_work_in_a_diffusers_pipeline() -> None:
    pipeline = reference_pipeline(shared_folder())
    schedule = Schedule(_steps("rcm-ode", [1.0, 0.6, 0.0]))
    pipeline.scheduler = scheduler_for(schedule)
    assert isinstance(pipeline.scheduler, FixedStepScheduler)
    embeds, _ = pipeline.encode_prompt("a red circle", max_sequence_length=64)
    for _ in range(2):
        generator = torch.Generator().manual_seed(4)
        found = pipeline(
            prompt_embeds=embeds, height=32, width=48, num_frames=5, num_inference_steps=2,
            guidance_scale=1.0, output_type="latent", generator=generator,
        ).frames  # fmt: skip
        expected = sample(
            {"transformer": pipeline.transformer},
            schedule,
            embeds,
            latents=initial_latents(schedule, SHAPE, torch.Generator().manual_seed(4)),
        )
        assert torch.equal(found, expected)
