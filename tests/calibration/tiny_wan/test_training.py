"""Training: budgets end annealed, steps descend, and a resumed training continues exactly."""

from pathlib import Path

import pytest
import torch
from torch import nn

from turbo_opt.calibration.tiny_wan.architecture import TransformerSize, build_transformer
from turbo_opt.calibration.tiny_wan.train_denoiser import shifted_sigmas
from turbo_opt.calibration.tiny_wan.training import (
    Budget,
    TrainingState,
    learning_rate,
    train,
)

CPU = torch.device("cpu")


def test_learning_rate_warms_up_and_ends_low() -> None:
    assert learning_rate(0.0, 1.0) < 0.01
    assert learning_rate(0.03, 1.0) == pytest.approx(1.0)
    assert learning_rate(1.0, 1.0) == pytest.approx(0.01)


def test_budget_counts_minutes_unless_steps_are_given() -> None:
    assert Budget(minutes=10).used(step=999, minutes=5) == 0.5
    assert Budget(minutes=10, steps=100).used(step=25, minutes=5) == 0.25
    assert Budget(minutes=10).used(step=0, minutes=20) == 1.0


def test_sigmas_are_stratified_and_shifted() -> None:
    sigmas = shifted_sigmas(1000, torch.Generator().manual_seed(0), CPU, shift=3.0)
    assert (sigmas.diff() > 0).all()
    assert sigmas[500] == pytest.approx(0.75, abs=0.01)


def _steps(state: TrainingState, count: int) -> None:
    for _ in range(count):
        inputs = torch.randn(8, 4, generator=state.generator)
        loss = (state.model(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()
        state.update(loss, rate=0.01)


def test_resumed_training_continues_exactly(tmp_path: Path) -> None:
    def fresh() -> TrainingState:
        torch.manual_seed(0)
        return TrainingState(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1)), CPU)

    straight = fresh()
    _steps(straight, 6)

    first = fresh()
    _steps(first, 3)
    first.save(tmp_path / "state.safetensors")
    second = fresh()
    second.load(tmp_path / "state.safetensors")
    _steps(second, 3)

    assert second.step == 6
    for name, parameter in straight.parameters.items():
        assert torch.equal(parameter, second.parameters[name])
        assert torch.equal(straight.average[name], second.average[name])
    assert not list(tmp_path.glob("*.partial"))


def test_training_lowers_the_denoisers_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = TransformerSize(num_layers=1, num_attention_heads=1, ffn_dim=128)
    transformer = build_transformer(size)
    clean, noise = torch.ones(4, 16, 2, 4, 4), torch.randn(4, 16, 2, 4, 4)
    sigma, text = torch.tensor([0.2, 0.4, 0.6, 0.8]), torch.zeros(4, 8, 128)
    losses = []

    def loss_function() -> dict[str, torch.Tensor]:
        noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1))
        velocity = transformer(noisy, 1000 * sigma, text, return_dict=False)[0]
        loss = (velocity - (noise - clean)).square().mean()
        losses.append(loss.item())
        return {"loss": loss}

    state = TrainingState(transformer, CPU)
    budget = Budget(steps=12)
    finished = train(state, loss_function, budget, peak_rate=3e-3, folder=tmp_path, name="tiny")
    assert finished
    assert state.step == 12
    assert losses[-1] < 0.8 * losses[0]
    assert (tmp_path / "tiny.state.safetensors").exists()
    assert (tmp_path / "tiny.csv").read_text().startswith("step,minutes,rate,loss")


def test_a_diverged_training_stops_with_its_step(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="the loss is nan at step 1"):
        train(
            TrainingState(model, CPU),
            lambda: {"loss": model(torch.full((1, 1), float("nan"))).sum()},
            Budget(steps=2),
            peak_rate=1e-3,
            folder=tmp_path,
            name="bad",
        )
