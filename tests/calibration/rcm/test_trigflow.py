"""TrigFlow and rectified flow are one path at two scales."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.calibration.rcm.gaussian import Gaussian
from turbo_opt.calibration.rcm import trigflow
from turbo_opt.ir.rcm import rcm_times

seeds = st.integers(0, 2**31)
angles = st.lists(st.floats(0, math.pi / 2), min_size=1, max_size=4)


def drawn(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, count, 3, 2, generator=generator, dtype=torch.float64))  # type: ignore[return-value]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=seeds, angles=angles)
def test_both_describe_the_same_clip(seed: int, angles: list[float]) -> None:
    clean, noise = drawn(seed, len(angles))
    angle = torch.tensor(angles, dtype=torch.float64)
    t = trigflow.flow_time(angle)
    x, flow = trigflow.noisy(clean, noise, angle), trigflow.flow_of(clean, noise, angle)
    torch.testing.assert_close(trigflow.angle_of(t), angle)
    torch.testing.assert_close(trigflow.clean_of(x, angle, flow), clean)
    torch.testing.assert_close(trigflow.flow_of_velocity(x, angle, noise - clean), flow)
    torch.testing.assert_close(trigflow.velocity_of_flow(x, angle, flow), noise - clean)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=seeds, angle=st.floats(0, math.pi / 2), by=st.floats(-1, 1))
def test_a_straight_path_is_turned_exactly(seed: int, angle: float, by: float) -> None:
    clean, noise = drawn(seed, 1)
    here, step = torch.tensor([[angle], [by]], dtype=torch.float64)
    x, flow = trigflow.noisy(clean, noise, here), trigflow.flow_of(clean, noise, here)
    expected = trigflow.noisy(clean, noise, here + step)
    torch.testing.assert_close(trigflow.turned(x, flow, step), expected)


def test_times_are_those_that_students_are_sampled_at() -> None:
    angle = torch.tensor([math.atan(80), 1.5, 1.4, 1.0], dtype=torch.float64)
    expected = torch.tensor(rcm_times(4, 80.0)[:-1], dtype=torch.float64)
    torch.testing.assert_close(trigflow.flow_time(angle), expected)


def test_a_network_of_rectified_flow_predicts_the_flow_of_trigflow() -> None:
    data = Gaussian(0.3, 0.5)
    x, _ = drawn(0, 3)
    angle = torch.tensor([0.01, 0.7, 1.55], dtype=torch.float64)
    predict = trigflow.predictor(data.velocity, torch.empty(0))
    torch.testing.assert_close(predict(x, angle), data.flow(x, angle), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_guidance_goes_beyond_the_conditional_prediction(scale: float) -> None:
    seen = []

    def velocity(y: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        seen.append(embeds)
        return embeds.mean((1, 2)).view(-1, 1).expand_as(y)

    prompts, empty = torch.full((2, 4, 3), 7.0), torch.full((4, 3), 2.0)
    evaluate = trigflow.guided(velocity, empty, scale)
    v = evaluate(torch.zeros(2, 5), torch.zeros(2), prompts)
    assert torch.equal(v, torch.full((2, 5), 2 + scale * 5))
    assert len(seen) == (1 if scale == 1 else 2)
