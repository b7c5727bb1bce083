"""The three networks on normal data: who is trained when, on what, and to what end."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.calibration.rcm.gaussian import Gaussian
from turbo_opt.calibration.data.batches import Batch
from turbo_opt.calibration.flow import NoiseLevels
from turbo_opt.calibration.rcm.objective import FAKE, STUDENT, RCMObjective
from turbo_opt.calibration.rcm.schema import Distillation
from turbo_opt.calibration.rcm.trigflow import clean_of, predictor
from turbo_opt.ir.rcm import rcm_schedule
from turbo_opt.runtime.sampler import sample

DATA = Gaussian(0.4, 0.5)
LEVELS = NoiseLevels(3.0, 0.0, 1.0)
SHAPE = (1, 1, 2, 2)


class Teacher:
    """The exact velocity; guidance pushes by what the prompt says."""

    def __call__(self, y: Tensor, t: Tensor, prompt_embeds: Tensor) -> Tensor:
        return DATA.velocity(y, t) + prompt_embeds.mean((1, 2)).view(-1, 1, 1, 1, 1)


class Learner:
    """The exact velocity, and a network's correction of it, zero at the start."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 1))
        nn.init.zeros_(self.network[-1].weight)
        nn.init.zeros_(self.network[-1].bias)

    def __call__(self, y: Tensor, t: Tensor, prompt_embeds: Tensor) -> Tensor:
        at = t.view(-1, 1, 1, 1, 1).expand_as(y)
        features = torch.stack([y, at, (20 * (1 - at)).clamp_max(3)], -1)
        return DATA.velocity(y, t) + self.network(features).squeeze(-1)


def batch(first: int = 0, count: int = 64) -> Batch:
    generator = torch.Generator().manual_seed(first)
    latents = DATA.mean + DATA.std * torch.randn(count, *SHAPE, generator=generator)
    positions = tuple(range(first, first + count))
    return Batch(latents, torch.zeros(count, 2, 3), torch.ones(2, 3), positions, (), 0)


def objective(reverse: Any = "default", scale: float = 1.0, **settings: Any) -> RCMObjective:
    said = {"warm_up": 4, "guidance_scale": scale, **settings}
    if reverse != "default":
        said["reverse"] = reverse
    empty = None if scale == 1 else torch.ones(2, 3)
    fake = None if reverse is None else Learner()
    chosen = Distillation.model_validate(said)
    return RCMObjective(Learner(), Teacher(), fake, chosen, LEVELS, empty, 0.0)  # type: ignore[arg-type]


def test_the_student_alone_warms_up_and_then_comes_every_so_often() -> None:
    often = objective(reverse={"student_every": 3})
    assert [often.turn(step) for step in range(10)] == [STUDENT] * 4 + [FAKE, FAKE, STUDENT] * 2
    one = objective()
    assert [one.turn(step) for step in range(4, 14)] == ([FAKE] * 4 + [STUDENT]) * 2
    alone = objective(reverse=None)
    assert {alone.turn(step) for step in range(20)} == {STUDENT}
    assert set(alone.trained) == {STUDENT} and set(one.trained) == {STUDENT, FAKE}


@pytest.mark.parametrize("student_every", [2, 4, 5])
def test_each_network_sees_rollouts_of_every_length(
    student_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = objective(reverse={"student_every": student_every, "rollout_steps": 4})
    seen: dict[str, list[int]] = {STUDENT: [], FAKE: []}
    real = RCMObjective._rollout

    def noted(self: RCMObjective, batch: Batch, predict: Any, steps: int) -> Any:
        seen[turn].append(steps)
        return real(self, batch, predict, steps)

    monkeypatch.setattr(RCMObjective, "_rollout", noted)
    for step in range(4, 4 + 8 * student_every):
        turn = trained.turn(step)
        trained.loss(batch(count=2), turn)
    assert seen[STUDENT] == [0, 1, 2, 3] * 2
    assert seen[FAKE] == [0, 1, 2, 3] * 2 * (student_every - 1)


@pytest.mark.parametrize("turn", [STUDENT, FAKE])
def test_only_the_network_whose_turn_it_is_gets_a_gradient(turn: str) -> None:
    trained = objective()
    step = next(step for step in range(4, 20) if trained.turn(step) == turn)
    trained.turn(step)
    trained.loss(batch(), turn).value.backward()
    for name, network in trained.trained.items():
        grads = [p.grad for p in network.parameters()]
        assert any(g is not None and g.any() for g in grads) == (name == turn)


def test_the_tangent_comes_in_with_the_warm_up() -> None:
    """At first the student is its teacher, and there is nothing to learn."""
    trained = objective()
    sizes = []
    for step in range(4):
        trained.turn(step)
        sizes.append(float(trained.loss(batch(), STUDENT).metrics["tangent"]))
    assert sizes[0] < 1e-5 and sizes == sorted(sizes) and sizes[3] > 10 * sizes[0]


def test_the_teacher_is_guided_as_far_as_asked() -> None:
    """Prompts say 0 and the empty one 1: guidance of 3 pushes v by −2, and the student there."""
    trained = objective(scale=3.0, reverse=None, forward={"log_sigma_std": 1e-9})
    trained.turn(0)
    size = float(trained.loss(batch(), STUDENT).metrics["tangent"])
    angle = math.atan(math.exp(-0.8))
    # g = −cos τ·(F − F_teacher), and F is v over cos τ + sin τ.
    assert size == pytest.approx(
        2 * math.cos(angle) / (math.cos(angle) + math.sin(angle)), rel=1e-4
    )


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_rollouts_begin_as_samples_do(steps: int) -> None:
    trained = objective()
    some = batch(count=3)
    learner = trained._student
    predict = predictor(learner, some.prompt_embeds)
    x, angle = trained._rollout(some, predict, steps)
    assert (angle <= math.atan(80)).all() and not x.requires_grad
    if steps:
        assert (angle < 1.5).any()
        return
    mine = clean_of(x, angle, predict(x, angle))

    class Network:
        dtype = torch.float32

        def __call__(self, hidden_states, timestep, encoder_hidden_states, return_dict):
            return (learner(hidden_states, timestep / 1000, encoder_hidden_states),)

    schedule = rcm_schedule(1, 80.0, "sde")
    noise = some.noise("rollout noise").double() * schedule.initial_noise_scale
    found = sample({"transformer": Network()}, schedule, some.prompt_embeds, latents=noise)
    torch.testing.assert_close(found, mine.float(), rtol=1e-5, atol=1e-5)


def one_step(trained: RCMObjective) -> Tensor:
    some = batch(10**6, 1000)
    predict = predictor(trained._student, some.prompt_embeds)
    with torch.no_grad():
        x, angle = trained._rollout(some, predict, 0)
        return clean_of(x, angle, predict(x, angle))


def distance(samples: Tensor) -> float:
    """Wasserstein-2 distance of the normal distributions with these moments."""
    return math.hypot(float(samples.mean()) - DATA.mean, float(samples.std()) - DATA.std)


def train(trained: RCMObjective, steps: int = 240, count: int = 32) -> None:
    optimizers = {
        name: torch.optim.Adam(network.parameters(), 5e-3)
        for name, network in trained.trained.items()
    }
    for step in range(steps):
        turn = trained.turn(step)
        trained.loss(batch(count * step, count), turn).value.backward()
        optimizers[turn].step()
        optimizers[turn].zero_grad()


@pytest.mark.parametrize(
    ("settings", "largest"),
    [
        ({"tangent": "jvp"}, 0.15),
        ({"tangent": "difference"}, 0.15),
        ({"form": "discrete", "step": 0.3}, 0.25),
    ],
    ids=["jvp", "difference", "discrete"],
)
def test_both_terms_bring_samples_of_one_step_to_the_data(settings: dict, largest: float) -> None:
    trained = objective(forward={"log_sigma_mean": 0.5, **settings}, warm_up=20)

    def held_out() -> float:
        with torch.no_grad():
            return float(trained.evaluate(batch(10**6, 256))["loss"])

    before = held_out()
    assert distance(one_step(trained)) > 0.4
    train(trained)
    assert distance(one_step(trained)) < largest
    assert held_out() < 0.6 * before


def test_the_reverse_term_alone_widens_samples() -> None:
    """A forward term of no weight: what is left is distribution matching with its fake score."""
    trained = objective(forward={"weight": 1e-9}, warm_up=0)
    before = float(one_step(trained).std())
    train(trained)
    assert before < 0.05 < 0.15 < float(one_step(trained).std())
