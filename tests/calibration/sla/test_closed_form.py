"""The closed form finds a projection that is there, and the best one where none is exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kernels.kernel_checks import relative_error
from turbo_opt.calibration.data.batches import Batches
from turbo_opt.calibration.data.samples import SampleSet
from turbo_opt.calibration.flow import Denoiser, NoiseLevels
from turbo_opt.calibration.networks import build_network, open_denoiser
from turbo_opt.calibration.sla.attention import Sparsity
from turbo_opt.calibration.sla.closed_form import (
    Regression,
    projection_values,
    solve_projections,
)
from turbo_opt.calibration.sla.student import attend_sparsely, self_attentions
from turbo_opt.calibration.training.world import World

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


def rows(count: int, width: int = 6) -> torch.Tensor:
    return torch.randn(2, 1, count, width, generator=torch.Generator().manual_seed(count))


def test_an_exact_projection_is_found_from_parts() -> None:
    weight, bias = torch.randn(6, 6), torch.randn(6)
    regression = Regression(6, CPU)
    for count in (5, 50, 20):
        x = rows(count)
        regression.add(x, x @ weight.T + bias, torch.ones_like(x))
    found = regression.solve(0.0)
    torch.testing.assert_close(found.weight, weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.bias, bias, rtol=1e-5, atol=1e-5)
    assert found.error_after < 1e-5 < found.error_before


def test_a_noisy_one_is_that_of_least_squares_with_its_error() -> None:
    x, y = rows(200), torch.randn(2, 1, 200, 6)
    regression = Regression(6, CPU)
    regression.add(x, y, 2 * torch.ones_like(y))
    found = regression.solve(0.0)
    ones = torch.cat([x.reshape(-1, 6), torch.ones(400, 1)], 1).double()
    best = torch.linalg.lstsq(ones, y.reshape(-1, 6).double()).solution
    torch.testing.assert_close(found.weight.double(), best[:-1].T, rtol=1e-4, atol=1e-6)
    rest = (ones @ best - y.reshape(-1, 6)).norm() / (2 * torch.ones_like(y)).norm()
    assert found.error_after == pytest.approx(float(rest), rel=1e-4)


def test_a_ridge_shrinks_the_weight_and_not_the_bias() -> None:
    x = rows(100)
    regression = Regression(6, CPU)
    regression.add(x, x + 5, torch.ones_like(x))
    free, held = regression.solve(0.0), regression.solve(10.0)
    assert held.weight.norm() < 0.2 * free.weight.norm()
    torch.testing.assert_close(held.bias, torch.full((6,), 5.0), rtol=0.1, atol=0)


def test_channels_that_are_always_zero_leave_the_rest_determined() -> None:
    x = rows(100).clone()
    x[..., 2] = 0
    regression = Regression(6, CPU)
    regression.add(x, 3 * x, torch.ones_like(x))
    found = regression.solve(0.0)
    assert found.weight.isfinite().all() and found.error_after < 1e-5


def test_a_projection_planted_in_the_model_is_recovered(home: Path) -> None:
    folder = open_denoiser(str(home / "teacher"), "transformer")
    network = build_network(folder, ALONE)
    torch.manual_seed(0)
    for _, attention in self_attentions(network):
        attention.proj_l = torch.nn.Linear(128, 128)
    planted = {
        name: value.detach() for name, value in network.named_parameters() if "proj_l" in name
    }
    sparsity = Sparsity(0.5, 64, 64)
    found = solve_projections(
        Denoiser(network, folder),
        sparsity,
        Batches(SampleSet.open(home / "samples"), range(6), 0, CPU, unconditional=False),
        range(6),
        NoiseLevels(3.0, 0.0, 1.0),
        noise_levels=2,
        ridge=1e-12,
        world=ALONE,
        target=attend_sparsely(sparsity),
    )
    assert set(projection_values(found)) == set(planted)
    for name, value in projection_values(found).items():
        assert relative_error(planted[name], value) < 0.02, name
    assert all(each.error_after < 1e-4 < each.error_before for each in found.values())
