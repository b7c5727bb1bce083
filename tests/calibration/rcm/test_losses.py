"""On normal data every loss has a known minimum, and leads there."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from tests.calibration.rcm.gaussian import Gaussian
from turbo_opt.calibration.rcm import losses, trigflow
from turbo_opt.calibration.rcm.tangents import (
    earlier,
    tangent_by_difference,
    tangent_by_forward_mode,
)
from turbo_opt.calibration.rcm.times import LogNormalAngles
from turbo_opt.calibration.rcm.trigflow import Predictor, sides

DATA = Gaussian(0.4, 0.5)


def points(count: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    angle = torch.linspace(0.05, 1.56, count, dtype=torch.float64)
    clean, noise = torch.randn(2, count, 4, 3, dtype=torch.float64)
    return trigflow.noisy(DATA.mean + DATA.std * clean, noise, angle), angle


def direction(student: Predictor, x: Tensor, angle: Tensor, warm_up: float = 1.0) -> Tensor:
    teacher = DATA.flow(x, angle)
    tangent = tangent_by_forward_mode(student, x, angle, teacher)
    return losses.consistency_tangent(x, angle, student(x, angle), teacher, tangent, warm_up)


def by_difference(student: Predictor, x: Tensor, angle: Tensor, step: float) -> Tensor:
    near = earlier(student, x, angle, DATA.flow(x, angle), step)
    return tangent_by_difference(x, angle, student(x, angle).detach(), near)


def test_forward_mode_is_the_analytic_derivative() -> None:
    x, angle = points()
    teacher = DATA.flow(x, angle)
    tangent = tangent_by_forward_mode(DATA.consistent, x, angle, teacher)
    flow = DATA.consistent(x, angle)
    # f is constant on the path, so d/dτ (cos τ·x − sin τ·F) = 0 gives dF/dτ.
    cos, sin = sides(angle, x)
    derivative = (cos * teacher - sin * x - cos * flow) / sin
    torch.testing.assert_close(tangent, cos * sin * derivative)


def test_the_difference_comes_to_it_with_its_step() -> None:
    x, angle = points()
    exact = tangent_by_forward_mode(DATA.flow, x, angle, DATA.flow(x, angle))
    errors = [
        (by_difference(DATA.flow, x, angle, step) - exact).norm() for step in (0.008, 0.004, 0.002)
    ]
    assert errors[0] < 0.05 * exact.norm()
    for larger, smaller in itertools.pairwise(errors):
        assert 1.9 < larger / smaller < 2.1


def test_the_difference_is_exact_on_straight_paths() -> None:
    """Data that is one point: every path is an arc, and F its velocity."""
    data = Gaussian(0.7, 0.0)
    x, angle = points()
    x = trigflow.noisy(torch.full_like(x, 0.7), x, angle)
    flow = data.flow(x, angle)
    exact = tangent_by_forward_mode(data.flow, x, angle, flow)
    near = earlier(data.flow, x, angle, flow, 0.3)
    found = tangent_by_difference(x, angle, flow, near)
    torch.testing.assert_close(found, exact)


def test_the_gradient_vanishes_at_the_consistency_function_only() -> None:
    x, angle = points()
    exact = direction(DATA.consistent, x, angle)
    assert exact.abs().max() < 1e-12
    assert direction(DATA.flow, x, angle).norm() > 0.05 * x.norm()
    wrong = direction(lambda x, angle: 1.01 * DATA.consistent(x, angle), x, angle)
    assert wrong.norm() > 1e-3 * x.norm()


def test_at_full_warm_up_it_is_the_derivative_of_the_consistency_function() -> None:
    x, angle = points()
    teacher = DATA.flow(x, angle)

    def student(x: Tensor, angle: Tensor) -> Tensor:
        return torch.sin(x) * sides(angle, x)[0] + 0.3

    def clean(x: Tensor, angle: Tensor) -> Tensor:
        return trigflow.clean_of(x, angle, student(x, angle))

    ones = torch.ones_like(angle)
    _, change = torch.func.jvp(clean, (x, angle), (teacher, ones))
    expected = sides(angle, x)[0] * change
    torch.testing.assert_close(direction(student, x, angle), expected)


def test_without_warm_up_the_student_is_pulled_to_its_teacher() -> None:
    x, angle = points()
    assert not direction(DATA.flow, x, angle, warm_up=0.0).any()
    away = direction(lambda x, angle: DATA.flow(x, angle) + 1, x, angle, warm_up=0.0)
    torch.testing.assert_close(away, -sides(angle, x)[0].expand_as(x))


def test_its_gradient_has_the_length_of_its_normalized_direction() -> None:
    flow = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 4, 2, dtype=torch.float64) * torch.tensor([0.0, 1e-3, 1e3]).view(3, 1, 1)
    losses.continuous_consistency(flow, g).sum().backward()
    lengths = flow.grad.flatten(1).norm(dim=1)
    norms = g.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, 2 * norms / (norms + 0.1))
    torch.testing.assert_close(flow.grad[2], -2 * g[2] / (norms[2] + 0.1))


def test_neighbours_agree_at_the_consistency_function_to_the_order_of_their_step() -> None:
    x, angle = points()

    def error(student: Predictor, step: float) -> Tensor:
        near = earlier(student, x, angle, DATA.flow(x, angle), step)
        clean = trigflow.clean_of(x, angle, student(x, angle))
        return losses.discrete_consistency(clean, near.clean).sum() / step**2

    assert 3.8 < error(DATA.consistent, 0.02) / error(DATA.consistent, 0.01) < 4.2
    assert error(DATA.flow, 0.01) > 1000 * error(DATA.consistent, 0.01)


def test_distribution_matching_pulls_samples_to_the_data() -> None:
    """A student whose samples are too narrow and off by their mean is moved and widened."""
    torch.manual_seed(0)
    samples = Gaussian(0.0, 0.2)
    clean = 0.2 * torch.randn(4000, 3, dtype=torch.float64)
    clean.requires_grad_()
    angle = torch.full((4000,), 0.8, dtype=torch.float64)
    x = trigflow.noisy(clean.detach(), torch.randn_like(clean), angle)
    fake, teacher = samples.denoised(x, angle), DATA.denoised(x, angle)
    losses.distribution_matching(clean, fake, teacher).sum().backward()
    step = -clean.grad
    assert step.mean() > 0.5
    centered = clean.detach() - clean.detach().mean()
    assert (centered * (step - step.mean())).mean() > 0.01
    apart = (clean.detach() - teacher).abs().mean(1, keepdim=True)
    torch.testing.assert_close(step, 2 * (teacher - fake) / apart)


def test_distribution_matching_leaves_what_matches() -> None:
    clean = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    same = torch.zeros(3, 4, dtype=torch.float64)
    losses.distribution_matching(clean, same, same).sum().backward()
    assert not clean.grad.any()
    losses.distribution_matching(clean, same + 1, clean.detach()).sum().backward()
    assert clean.grad.isfinite().all()


def test_flow_matching_is_the_denoising_error_over_the_noise() -> None:
    x, angle = points()
    clean, noise = torch.randn(2, *x.shape, dtype=torch.float64)
    x = trigflow.noisy(clean, noise, angle)
    flow = torch.randn_like(x)
    error = (trigflow.clean_of(x, angle, flow) - clean) / sides(angle, x)[1]
    found = losses.flow_matching(flow, trigflow.flow_of(clean, noise, angle))
    torch.testing.assert_close(found, error.square().flatten(1).sum(1))


def test_log_normal_angles() -> None:
    u = torch.linspace(0, 1, 1001)
    angle = LogNormalAngles(-0.8, 1.6).at(u)
    assert angle.min() > 0 and angle.max() < math.pi / 2 and (angle.diff() >= 0).all()
    assert angle[500].tan().log() == pytest.approx(-0.8)
    assert angle.tan().log()[100:900].std() == pytest.approx(1.6 * 0.687, rel=0.05)


class Corrected(nn.Module):
    """The teacher's F and a small network's correction, zero at the start."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(3, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 1)
        ).double()
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        cos, sin = (side.expand_as(x) for side in sides(angle, x))
        return DATA.flow(x, angle) + self.layers(torch.cat([x, cos, sin], 1))


def one_step(student: Predictor) -> Tensor:
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    angle = torch.full((4000,), math.atan(80), dtype=torch.float64)
    with torch.no_grad():
        return trigflow.clean_of(noise, angle, student(noise, angle))


def distance(samples: Tensor) -> float:
    """Wasserstein-2 distance of the normal distributions with these moments."""
    return math.hypot(float(samples.mean()) - DATA.mean, float(samples.std()) - DATA.std)


def test_training_brings_samples_of_one_step_to_the_data() -> None:
    student = Corrected()
    assert distance(one_step(student)) > 0.45  # one step of the teacher gives the mean
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)
    for step in range(300):
        clean, noise = torch.randn(2, 128, 1, generator=generator, dtype=torch.float64)
        angle = LogNormalAngles(0.0, 1.6).at(torch.rand(128, generator=generator))
        x = trigflow.noisy(DATA.mean + DATA.std * clean, noise, angle)
        g = direction(student, x, angle, min(1.0, step / 100))
        optimizer.zero_grad()
        losses.continuous_consistency(student(x, angle), g.detach()).mean().backward()
        optimizer.step()
    assert distance(one_step(student)) < 0.1
