"""The few steps of an rCM student: times, rules, experts."""

from __future__ import annotations

import json
import math

import pytest
import torch

from turbo_opt.errors import BadInput
from turbo_opt.ir.rcm import rcm_schedule, rcm_times
from turbo_opt.ir.schedule import Schedule


@pytest.mark.parametrize("sigma_max", [80.0, 120.0, 200.0, 1600.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_times_are_trigflow_angles_as_rectified_flow(steps, sigma_max):
    angles = torch.tensor([math.atan(sigma_max), 1.5, 1.4, 1.0][:steps] + [0], dtype=torch.float64)
    expected = angles.sin() / (angles.cos() + angles.sin())
    found = torch.tensor(rcm_times(steps, sigma_max), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=3e-16, atol=0)
    assert found[0] == pytest.approx(sigma_max / (1 + sigma_max), rel=1e-15)
    assert found[-1] == 0 and bool((found.diff() < 0).all())


def test_the_schedule_is_unguided_and_starts_at_its_first_time():
    schedule = rcm_schedule(4, 80.0, "sde", expand_timesteps=True)
    assert (len(schedule.steps), schedule.evaluations) == (4, 4)
    assert {step.rule for step in schedule.steps} == {"rcm-sde"}
    assert schedule.initial_noise_scale == schedule.steps[0].time
    assert [step.timestep for step in schedule.steps] == [1000 * s.time for s in schedule.steps]
    assert schedule.expand_timesteps and schedule.dtype == torch.float64
    assert Schedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


@pytest.mark.parametrize(
    ("steps", "boundary", "low"), [(4, 0.875, 2), (4, 0.9, 2), (2, 0.9, 0), (4, 0.5, 0)]
)
def test_experts_switch_below_the_boundary(steps, boundary, low):
    schedule = rcm_schedule(steps, 200.0, "ode", boundary=boundary)
    names = [step.denoiser for step in schedule.steps]
    assert names == ["transformer"] * (steps - low) + ["transformer_2"] * low
    for step in schedule.steps:
        assert (step.denoiser == "transformer_2") == (step.time < boundary)


@pytest.mark.parametrize(
    ("steps", "sigma_max", "rule", "message"),
    [
        (0, 80.0, "sde", "takes 1 to 4 steps, not 0"),
        (5, 80.0, "sde", "takes 1 to 4 steps, not 5"),
        (4, 14.0, "sde", "sigma_max is 14.0; it must be above 14.1"),
        (4, math.inf, "sde", "sigma_max is inf"),
        (4, math.nan, "sde", "sigma_max is nan"),
        (4, "80", "sde", "sigma_max is 80"),
        (4, 80.0, "pde", "rule must be 'sde' or 'ode', got 'pde'"),
    ],
)
def test_what_no_student_can_follow_is_refused(steps, sigma_max, rule, message):
    with pytest.raises(BadInput, match=message):
        rcm_schedule(steps, sigma_max, rule)
