"""RCMScheduler in diffusers' pipeline is the built-in loop, and keeps diffusers' conventions."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanVideoToVideoPipeline
from torch import Tensor

import turbo_opt
from tests.helpers.tiny_folder import reference_pipeline, shared_folder
from turbo_opt.capture.folder import open_pipeline
from turbo_opt.capture.sampling import pipeline_schedule
from turbo_opt.errors import BadInput
from turbo_opt.ir.rcm import rcm_schedule, rcm_times
from turbo_opt.ir.schedule import Schedule
from turbo_opt.runtime.sampler import sample
from turbo_opt.runtime.scheduler import FixedStepScheduler, RCMScheduler, scheduler_for

SHAPE = (1, 16, 2, 8, 12)


def _pipeline(experts: int = 1, **settings: Any) -> Any:
    pipeline = reference_pipeline(shared_folder(experts))
    pipeline.scheduler = RCMScheduler.from_config(pipeline.scheduler.config, **settings)
    return pipeline


def _run(pipeline: Any, embeds: Tensor, latents: Tensor, steps: int) -> Tensor:
    frames: Tensor = pipeline(
        prompt_embeds=embeds, latents=latents, height=32, width=48, num_frames=5,
        num_inference_steps=steps, guidance_scale=1.0, output_type="latent",
    ).frames  # fmt: skip
    return frames


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("rule", ["sde", "ode"])
def test_the_pipeline_with_it_equals_the_built_in_loop_bit_for_bit(rule: Any, experts: int) -> None:
    pipeline = _pipeline(experts, rule=rule, sigma_max=120.0)
    embeds, _ = pipeline.encode_prompt("a red circle", max_sequence_length=64)
    schedule = rcm_schedule(4, 120.0, rule, boundary=0.7 if experts == 2 else None)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    latents = noise * pipeline.scheduler.init_noise_sigma
    networks = {"transformer": pipeline.transformer, "transformer_2": pipeline.transformer_2}
    for _ in range(2):
        pipeline.scheduler.generator = torch.Generator().manual_seed(5)
        found = _run(pipeline, embeds, latents, 4)
        expected = sample(
            networks, schedule, embeds, latents=latents,
            generator=torch.Generator().manual_seed(5),
        )  # fmt: skip
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
    assert len({step.denoiser for step in schedule.steps}) == experts


def test_a_schedule_of_ours_follows_its_steps_through_the_pipeline_too() -> None:
    pipeline = _pipeline()
    embeds, _ = pipeline.encode_prompt("a red circle", max_sequence_length=64)
    schedule = rcm_schedule(3, 80.0, "sde")
    pipeline.scheduler = scheduler_for(schedule)
    assert isinstance(pipeline.scheduler, FixedStepScheduler)
    assert pipeline.scheduler.init_noise_sigma == schedule.initial_noise_scale
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    pipeline.scheduler.generator = torch.Generator().manual_seed(5)
    found = _run(pipeline, embeds, latents, 3)
    expected = sample(
        {"transformer": pipeline.transformer}, schedule, embeds, latents=latents,
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    assert torch.equal(found, expected)


def test_a_pipelines_generator_settles_the_clip() -> None:
    pipeline = _pipeline()
    embeds, _ = pipeline.encode_prompt("a red circle", max_sequence_length=64)

    def clip(seed: int) -> Tensor:
        frames: Tensor = pipeline(
            prompt_embeds=embeds, generator=torch.Generator().manual_seed(seed), height=32,
            width=48, num_frames=5, num_inference_steps=4, guidance_scale=1.0,
            output_type="latent",
        ).frames  # fmt: skip
        return frames

    first, again, other = clip(4), clip(4), clip(5)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.1)


def test_noise_of_the_steps_is_new_at_each_and_follows_from_the_first_sample() -> None:
    def noises(x: Tensor) -> list[Tensor]:
        scheduler, found = RCMScheduler(), []
        for step in range(3):  # no prediction: what is left of x is the times' doing
            moved = scheduler.step(torch.zeros_like(x), scheduler.timesteps[step], x).prev_sample
            time = float(scheduler.sigmas[step + 1])
            found.append((moved - (1 - time) * x) / time)
            x = moved
        return found

    x = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    first, again = noises(x), noises(x.clone())
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    for noise in first:
        assert abs(float(noise.mean())) < 0.1 and 0.9 < float(noise.std()) < 1.1
    assert (
        torch.corrcoef(torch.stack([noise.flatten() for noise in first])).tril(-1).abs().max() < 0.1
    )
    assert not torch.equal(noises(x + 1e-6)[0], first[0])


def test_timesteps_and_noise_level_follow_the_number_of_steps() -> None:
    scheduler = RCMScheduler(sigma_max=200.0)
    assert scheduler.init_noise_sigma == pytest.approx(200 / 201)
    for steps in (1, 2, 3, 4):
        scheduler.set_timesteps(steps, device="cpu")
        times = rcm_times(steps, 200.0)
        assert scheduler.timesteps.dtype == torch.float32
        assert scheduler.timesteps.tolist() == pytest.approx([1000 * t for t in times[:-1]])
        assert scheduler.sigmas.tolist() == list(times)
    with pytest.raises(BadInput, match="takes 1 to 4 steps, not 50"):
        scheduler.set_timesteps(50)


def test_a_changed_sample_is_taken_as_it_is() -> None:
    def clip(change: Any) -> Tensor:
        scheduler = RCMScheduler(rule="ode")
        scheduler.set_timesteps(2)
        x, v = torch.full((1, 1), 1 / 3), torch.full((1, 1), 0.1)
        x = change(scheduler.step(v, scheduler.timesteps[0], x).prev_sample)
        return scheduler.step(v, scheduler.timesteps[1], x).prev_sample

    zeroed, replaced = clip(lambda x: x.zero_()), clip(lambda x: torch.zeros_like(x))
    assert torch.equal(zeroed, replaced)
    assert not torch.equal(zeroed, clip(lambda x: x))


def test_it_runs_in_inference_mode_too() -> None:
    pipeline = _pipeline(rule="ode")
    embeds, _ = pipeline.encode_prompt("a red circle", max_sequence_length=64)
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    expected = _run(pipeline, embeds, latents, 2)
    with torch.inference_mode():
        found = _run(pipeline, embeds, latents, 2)
    torch.testing.assert_close(found, expected)


def test_steps_return_as_diffusers_schedulers_do() -> None:
    scheduler = RCMScheduler()
    scheduler.set_timesteps(4)
    x = torch.randn(1, 2, dtype=torch.bfloat16)
    assert scheduler.scale_model_input(x, scheduler.timesteps[0]) is x
    (first,) = scheduler.step(
        x, scheduler.timesteps[0], x, generator=torch.Generator(), return_dict=False
    )
    assert first.dtype == torch.bfloat16
    assert scheduler.step(x, scheduler.timesteps[1], first).prev_sample.shape == x.shape
    assert len(scheduler) == scheduler.config.num_train_timesteps == 1000


def _moved(scheduler: Any, timestep: Any, x: Tensor) -> Tensor:
    """x after a step in which the network predicts ones."""
    moved: Tensor = scheduler.step(torch.ones_like(x), timestep, x).prev_sample
    return moved


@pytest.mark.parametrize(
    "make", [RCMScheduler, lambda rule: scheduler_for(rcm_schedule(4, 80.0, rule))]
)
def test_the_first_step_is_the_one_at_its_timestep_and_the_others_follow(make: Any) -> None:
    scheduler = make(rule="ode")
    x = torch.randn(2, 3, dtype=torch.float64)
    times = rcm_times(4, 80.0)
    for given in (
        scheduler.timesteps[2],
        scheduler.timesteps[2:][:1],
        scheduler.timesteps[2].double(),
        scheduler.timesteps[2].item(),
        1000 * times[2],  # not rounded to float32
    ):
        scheduler.set_timesteps(4)
        assert (scheduler.step_index, scheduler.begin_index) == (None, None)
        moved = _moved(scheduler, given, x)
        torch.testing.assert_close(moved, x - (times[2] - times[3]))
        assert scheduler.step_index == 3
        torch.testing.assert_close(_moved(scheduler, None, moved), moved - times[3])


def test_a_begin_index_comes_before_the_timestep_and_holds_until_set_timesteps() -> None:
    scheduler, x, times = RCMScheduler(rule="ode"), torch.zeros(1), rcm_times(4, 80.0)
    scheduler.set_begin_index(1)
    assert (scheduler.step_index, scheduler.begin_index) == (None, 1)
    assert float(_moved(scheduler, 12345, x)) == pytest.approx(times[2] - times[1])
    scheduler.set_begin_index(0)  # as in diffusers, no concern of a run under way
    assert float(_moved(scheduler, None, x)) == pytest.approx(times[3] - times[2])
    scheduler.set_timesteps(4)
    assert scheduler.begin_index is None
    assert float(_moved(scheduler, scheduler.timesteps[0], x)) == pytest.approx(times[1] - times[0])


def test_only_the_first_step_without_a_begin_index_reads_its_timestep() -> None:
    scheduler, x = RCMScheduler(rule="ode"), torch.zeros(1)
    unreadable = torch.empty((), device="meta")
    scheduler.set_begin_index(0)
    for _ in range(4):
        _moved(scheduler, unreadable, x)
    scheduler.set_timesteps(4)
    with pytest.raises((RuntimeError, NotImplementedError)):
        _moved(scheduler, unreadable, x)


@pytest.mark.parametrize("given", [987, 0, torch.tensor(1000), float("nan")])
def test_a_timestep_that_is_not_of_the_schedule_is_refused_with_those_that_are(given: Any) -> None:
    scheduler = RCMScheduler(rule="ode")
    known = r"pass one of `timesteps`, which are 987\.654\d*, 933\.7\d+, 852\.8\d+, 608\.9\d+"
    with pytest.raises(ValueError, match=f"no step at timestep {float(given):.9g}: {known}"):
        _moved(scheduler, given, torch.zeros(1))
    assert scheduler.step_index is None
    _moved(scheduler, scheduler.timesteps[0], torch.zeros(1))


def test_a_schedule_of_one_step_has_one_timestep() -> None:
    scheduler, x = RCMScheduler(rule="ode"), torch.zeros(1)
    scheduler.set_timesteps(1)
    moved = _moved(scheduler, scheduler.timesteps[0], x)
    assert float(moved) == pytest.approx(-rcm_times(1, 80.0)[0])


@pytest.mark.parametrize("steps", [1, 4])
def test_a_step_after_the_last_says_how_many_there_are(steps: int) -> None:
    scheduler, x = RCMScheduler(rule="ode"), torch.zeros(1)
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        x = _moved(scheduler, timestep, x)
    message = f"no step of index {steps}: the schedule has {steps} steps; call set_timesteps"
    with pytest.raises(ValueError, match=message):
        _moved(scheduler, scheduler.timesteps[0], x)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(-1)
    with pytest.raises(ValueError, match="no step of index -1"):
        _moved(scheduler, scheduler.timesteps[0], x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_added_noise_is_that_of_the_steps_times(dtype: torch.dtype) -> None:
    scheduler = RCMScheduler(sigma_max=120.0)
    clean, noise = torch.randn(2, 3, 16, 4, 5).to(dtype).unbind(0)
    for timesteps, chosen in (
        (scheduler.timesteps[:1], [0, 0, 0]),
        (scheduler.timesteps[[3, 0, 2]], [3, 0, 2]),
    ):
        t = torch.tensor(rcm_times(4, 120.0), dtype=torch.float64)[chosen].reshape(3, 1, 1, 1)
        expected = ((1 - t) * clean.double() + t * noise.double()).to(dtype)
        found = scheduler.add_noise(clean, noise, timesteps)
        assert found.dtype == dtype and torch.equal(found, expected)
        assert torch.equal(scheduler.scale_noise(clean, timesteps, noise), found)
    assert scheduler.step_index is None
    with pytest.raises(ValueError, match="no step at timestep 250: "):
        scheduler.add_noise(clean, noise, torch.tensor([250.0]))
    with pytest.raises(ValueError, match="has 4 steps, of which the pipeline's strength and num_"):
        scheduler.add_noise(clean, noise, scheduler.timesteps[4:])


def test_noise_is_added_at_a_steps_time_where_its_timestep_is_rounded() -> None:
    steps = rcm_schedule(2, 80.0, "ode").steps
    rounded = tuple(replace(step, timestep=round(step.timestep)) for step in steps)
    scheduler = scheduler_for(Schedule(rounded))
    assert scheduler.timesteps.dtype == torch.float32
    found = scheduler.add_noise(torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([934]))
    assert float(found) == pytest.approx(1 - steps[1].time)


@pytest.mark.parametrize("rule", ["sde", "ode"])
def test_video_to_video_starts_at_the_step_that_its_strength_says(rule: Any) -> None:
    parts = dict(_pipeline(rule=rule).components)
    del parts["transformer_2"]
    pipeline = WanVideoToVideoPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    embeds, _ = pipeline.encode_prompt("a red circle", max_sequence_length=64)
    video = torch.rand(1, 5, 3, 32, 48, generator=torch.Generator().manual_seed(3))
    clean = pipeline.vae.encode(2 * video.movedim(1, 2) - 1).latent_dist.mode()
    assert clean.shape == SHAPE
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    schedule = rcm_schedule(4, 80.0, rule)
    last = replace(schedule, steps=schedule.steps[1:])
    t = last.steps[0].time
    first = ((1 - t) * clean.double() + t * noise.double()).float()
    expected = sample(
        {"transformer": pipeline.transformer}, last, embeds, latents=first,
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    for _ in range(2):
        pipeline.scheduler.generator = torch.Generator().manual_seed(5)
        found = pipeline(
            video=video, prompt_embeds=embeds, height=32, width=48, num_inference_steps=4,
            guidance_scale=1.0, strength=0.75, generator=torch.Generator().manual_seed(4),
            output_type="latent",
        ).frames  # fmt: skip
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_it_is_saved_and_loaded_within_a_pipeline(tmp_path: Path) -> None:
    _pipeline(sigma_max=120.0, rule="ode").save_pretrained(tmp_path)
    loaded = WanPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.scheduler, RCMScheduler)
    assert (loaded.scheduler.config.sigma_max, loaded.scheduler.config.rule) == (120.0, "ode")
    alone = RCMScheduler.from_pretrained(tmp_path / "scheduler")
    assert alone.sigmas.tolist() == loaded.scheduler.sigmas.tolist()

    def captured(steps: int) -> Schedule:
        folder = open_pipeline(str(tmp_path))
        return pipeline_schedule(
            folder.path, folder.components, num_inference_steps=steps, guidance_scale=5.0
        )

    assert captured(4) == rcm_schedule(4, 120.0, "ode")
    with pytest.raises(BadInput, match="takes 1 to 4 steps, not 50"):
        captured(50)


def test_the_package_has_it_without_importing_diffusers_before_it_is_asked_for() -> None:
    assert turbo_opt.RCMScheduler is RCMScheduler
    code = "import sys, turbo_opt; sys.exit('diffusers' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_rule_or_noise_level_is_refused() -> None:
    with pytest.raises(BadInput, match="rule must be 'sde' or 'ode'"):
        RCMScheduler(rule="euler")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="sigma_max is 5"):
        RCMScheduler(sigma_max=5)
