"""The training loop: what is resumed is what would have been, and what diverges stops."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from turbo_opt.calibration.data.samples import SampleSet
from turbo_opt.calibration.jobs.load import load_job
from turbo_opt.calibration.jobs.schema import SLAJob
from turbo_opt.calibration.places import CHECKPOINTS
from turbo_opt.calibration.training.loop import Trainer
from turbo_opt.calibration.training.objective import Loss
from turbo_opt.calibration.training.world import World
from turbo_opt.errors import BadInput, TurboOptError

ALONE = World(0, 1, torch.device("cpu"))


class Scaling:
    """Learns to undo noise with one factor a channel; a second network takes every third turn."""

    name, shipped = "scaling", "student"

    def __init__(self, fail_at: int = -1, where: str = "loss") -> None:
        self.trained = {"student": self._network(), "critic": self._network()}
        self._fail_at, self._where, self._step = fail_at, where, 0
        self.turns: list[str] = []

    @staticmethod
    def _network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Conv3d(16, 16, 1)

    def turn(self, step: int) -> str:
        self._step = step
        return "critic" if step % 3 == 2 else "student"

    def loss(self, batch, turn: str) -> Loss:
        self.turns.append(turn)
        noisy = batch.latents + batch.noise("n")
        error = (self.trained[turn](noisy) - batch.latents).square().mean()
        if self._step == self._fail_at:
            if self._where == "loss":
                error = error * float("nan")
            else:  # the derivative of a root at 0
                error = error + (self.trained[turn].weight * 0).square().sum().sqrt()
        return Loss(error, {"scale": self.trained[turn].weight.detach().mean()})

    def evaluate(self, batch):
        return {"loss": self.loss(batch, "student").value}


def trainer(home: Path, out: Path, *overrides: str, objective=None) -> Trainer:
    job = load_job(home / "job.yaml", SLAJob, overrides)
    samples = SampleSet.open(job.path("samples"))
    return Trainer(job, out, objective or Scaling(), samples, ALONE)


def everything(trained: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trained._tensors().items()}


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_six_steps_are_three_and_three_bit_for_bit(home, tmp_path, asynchronous) -> None:
    settings = ("training.average=0.9", f"save.asynchronous={asynchronous}", "training.batch=4")
    straight = trainer(home, tmp_path / "a", *settings, "training.steps=6")
    straight.run()

    stopped = trainer(home, tmp_path / "b", *settings, "training.steps=6")
    real, count = stopped._train_step, iter(range(4))

    def until_killed(rate: float):
        if next(count) == 3:
            raise KeyboardInterrupt
        return real(rate)

    stopped._train_step = until_killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    stopped.checkpoints.finish()

    resumed = trainer(home, tmp_path / "b", *settings, "training.steps=6")
    assert resumed.resume() and resumed.step == 3
    resumed.run()
    expected, found = everything(straight), everything(resumed)
    assert expected.keys() == found.keys() and len(found) > 15
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name

    def losses(folder: str) -> list[tuple[str, str]]:
        with (tmp_path / folder / "log.csv").open() as file:
            return [(row["step"], row["loss"]) for row in csv.DictReader(file)]

    assert losses("a") == losses("b") and len(losses("a")) == 7


def test_micro_batches_change_nothing_but_rounding(home, tmp_path) -> None:
    whole = trainer(home, tmp_path / "a", "training.batch=4")
    parts = trainer(home, tmp_path / "b", "training.batch=4", "training.micro_batch=1")
    whole.run()
    parts.run()
    for name, value in everything(whole).items():
        torch.testing.assert_close(everything(parts)[name], value, rtol=1e-4, atol=1e-6)


def test_each_network_is_updated_on_its_turn_only(home, tmp_path) -> None:
    objective = Scaling()
    start = objective.trained["critic"].weight.detach().clone()
    trained = trainer(home, tmp_path, "training.steps=2", objective=objective)
    trained.run()
    assert torch.equal(objective.trained["critic"].weight, start)
    assert not torch.equal(objective.trained["student"].weight, start)


def test_a_gradient_that_reaches_another_network_does_not_wait_for_its_turn(home, tmp_path) -> None:
    class Reaching(Scaling):
        def loss(self, batch, turn: str) -> Loss:
            through_both = self.trained["critic"](self.trained["student"](batch.latents))
            return Loss(through_both.square().mean())

    objective = Reaching()
    trained = trainer(home, tmp_path, "training.steps=3", objective=objective)
    real = trained._train_step

    def without_leftovers(rate: float):
        assert all(p.grad is None for net in objective.trained.values() for p in net.parameters())
        return real(rate)

    trained._train_step = without_leftovers  # type: ignore[method-assign]
    trained.run()


def test_held_out_loss_falls_and_is_logged(home, tmp_path) -> None:
    trained = trainer(home, tmp_path, "training.steps=40", "training.rate=0.02")
    before, after = trained.run()
    assert after["held_out_loss"] < 0.7 * before["held_out_loss"]
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["held_out_loss"]) == pytest.approx(before["held_out_loss"])
    assert float(rows[-1]["held_out_loss"]) == pytest.approx(after["held_out_loss"])
    assert {"loss", "scale", "gradient_norm", "rate", "broken_samples"} <= set(rows[-1])


@pytest.mark.parametrize(
    ("where", "what"), [("loss", "the loss"), ("gradient", "the gradient of weight")]
)
def test_what_is_not_finite_stops_and_keeps_the_last_checkpoint(
    home, tmp_path, where, what
) -> None:
    failing = trainer(home, tmp_path, "training.steps=9", objective=Scaling(4, where))
    message = rf"{what} is not finite at step 5 of 9, .* samples 0.*last good checkpoint is .*step"
    with pytest.raises(TurboOptError, match=message):
        failing.run()
    again = trainer(home, tmp_path, "training.steps=9")
    assert again.resume() and again.step == 3
    assert all(value.isfinite().all() for value in everything(again).values())


class Blinded(Scaling):
    """Its held-out loss is no number any more after so many losses of steps."""

    def __init__(self, until: int) -> None:
        super().__init__()
        self._until = until

    def evaluate(self, batch):
        said = super().evaluate(batch)["loss"]
        self.turns.pop()
        return {"loss": said if len(self.turns) < self._until else said * float("nan")}


@pytest.mark.parametrize(("until", "steps", "at"), [(3, 9, 4), (5, 5, 5)])
def test_a_held_out_value_that_is_not_finite_stops_at_any_evaluation(
    home, tmp_path, until, steps, at
) -> None:
    failing = trainer(home, tmp_path, f"training.steps={steps}", objective=Blinded(until))
    message = f"held_out_loss: not finite after {at} steps; the last good .*step-000003; --resume"
    with pytest.raises(TurboOptError, match=message):
        failing.run()
    assert not (tmp_path / CHECKPOINTS / f"step-{at:06d}").exists()


def test_what_is_not_finite_before_any_step_blames_no_rate(home, tmp_path) -> None:
    failing = trainer(home, tmp_path, objective=Blinded(0))
    with pytest.raises(TurboOptError, match=r"after 0 steps; no checkpoint was saved before$"):
        failing.run()


@pytest.mark.parametrize("held_out", [0, 2])
def test_weights_that_an_update_destroyed_are_not_saved(home, tmp_path, held_out) -> None:
    settings = ("save.every=1", f"data.held_out={held_out}", "training.rate=1e30")
    message = (
        "the student's weights, or their squares, are not finite after step 1 of 4; no checkpoint "
        "was saved before; try a lower training.rate$"
    )
    with pytest.raises(TurboOptError, match=message):
        trainer(home, tmp_path, *settings).run()
    assert not (tmp_path / CHECKPOINTS).exists()


@pytest.mark.parametrize("where", ["student", "critic", "average"])
def test_the_last_good_checkpoint_is_from_before_the_update_that_destroyed_weights(
    home, tmp_path, where
) -> None:
    settings = ("save.every=1", "data.held_out=0", "training.average=0.9")
    failing = trainer(home, tmp_path, *settings)
    name = "critic" if where == "critic" else "student"
    trainee = failing.trainees[name]
    spoiled = trainee.average["bias"] if where == "average" else trainee.parameters["bias"]
    step = failing._train_step

    def destroy_at_three(rate: float) -> dict[str, float]:
        values = step(rate)
        if failing.step == 2:
            spoiled.data[3] = float("nan")
        return values

    failing._train_step = destroy_at_three  # type: ignore[method-assign]
    message = f"the {name}'s weights, .* after step 3 of 4; the last good checkpoint is .*-000002;"
    with pytest.raises(TurboOptError, match=message):
        failing.run()
    again = trainer(home, tmp_path, *settings)
    assert again.resume() and again.step == 2
    assert all(value.isfinite().all() for value in everything(again).values())
    again.run()


def test_a_checkpoint_whose_next_step_fails_is_not_called_good(home, tmp_path) -> None:
    failing = trainer(home, tmp_path, "training.steps=9", objective=Scaling(6))
    folder = tmp_path / CHECKPOINTS
    message = (
        f"not finite at step 7 of 9, .*; {folder}/step-000006 holds the weights with which this "
        f"happened; if they are why, write step-000003 into {folder}/latest, and --resume"
    )
    with pytest.raises(TurboOptError, match=message):
        failing.run()
    (folder / "latest").write_text("step-000003\n")
    again = trainer(home, tmp_path, "training.steps=9")
    assert again.resume() and again.step == 3


def test_a_save_that_ended_in_the_background_outlives_what_stops_the_training(
    home, tmp_path, monkeypatch
) -> None:
    stopped = trainer(home, tmp_path, "training.steps=9", "save.asynchronous=true")
    step = Trainer._train_step

    def stop_at_four(self: Trainer, rate: float) -> dict[str, float]:
        if self.step == 3:
            self.checkpoints._pending.done.result()
            raise KeyboardInterrupt
        return step(self, rate)

    monkeypatch.setattr(Trainer, "_train_step", stop_at_four)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    again = trainer(home, tmp_path, "training.steps=9")
    assert again.resume() and again.step == 3


def test_only_the_network_that_is_the_result_has_an_average(home, tmp_path) -> None:
    both = trainer(home, tmp_path, "training.average=0.9").trainees
    assert both["student"].average is not None and both["critic"].average is None


def test_a_checkpoint_of_another_job_is_not_taken_over(home, tmp_path) -> None:
    trainer(home, tmp_path).run()
    with pytest.raises(BadInput, match=r"another job \(training.batch: 2 then, 3 now\)"):
        trainer(home, tmp_path, "training.batch=3").resume()
    with pytest.raises(BadInput, match=r"sla.topk: 0.5 then, 0.2 now"):
        trainer(home, tmp_path, "sla.topk=0.2").resume()
    with pytest.raises(BadInput, match=r"\(companions: None then, \[{.*}\] now\)"):
        trainer(home, tmp_path, "companions=[{source: ./teacher}]").resume()
    assert trainer(home, tmp_path, "training.rate=0.1", "training.steps=9").resume()


def test_a_section_that_jobs_did_not_have_yet_stops_no_resume(home, tmp_path) -> None:
    trainer(home, tmp_path).run()
    record = next((tmp_path / CHECKPOINTS).glob("step-*/training.json"))
    said = json.loads(record.read_text())
    del said["identity"]["companions"]
    record.write_text(json.dumps(said))
    assert trainer(home, tmp_path).resume()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["training.batch=5"], "batch: 5 samples cannot be shared by 2 processes"),
        (["training.batch=4", "training.micro_batch=3"], "3 does not divide the 2 samples"),
    ],
)
def test_batches_that_cannot_be_shared(home, settings, message) -> None:
    from turbo_opt.calibration.training.loop import micro_batch

    job = load_job(home / "job.yaml", SLAJob, settings)
    with pytest.raises(BadInput, match=message):
        micro_batch(job, World(0, 2, torch.device("cpu")))


def test_the_average_is_what_is_evaluated(home, tmp_path) -> None:
    trained = trainer(home, tmp_path, "training.average=0.99", "training.rate=0.05")
    trained.run()
    weight = trained.shipped.network.weight.detach().clone()
    with trained.shipped.averaged():
        averaged = trained.shipped.network.weight.detach().clone()
    assert torch.equal(trained.shipped.network.weight, weight)
    assert not torch.equal(averaged, weight)


class Clock:
    """Every look at it is a second later."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        self.seconds += 1.0
        return self.seconds


def rates(home: Path, out: Path, *overrides: str) -> tuple[Trainer, list[float]]:
    trained = trainer(home, out, "save.asynchronous=false", "log.every=1", *overrides)
    trained.resume()
    trained.run()
    with (out / "log.csv").open(newline="") as file:
        return trained, [float(row["rate"]) for row in csv.DictReader(file) if row.get("rate")]


def test_a_budget_of_time_ends_annealed_wherever_it_ends(home, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("turbo_opt.calibration.training.loop.time", Clock())
    settings = ("training.rate=1.0", "training.steps=1000", "training.warm_up=0.0")
    short, few = rates(home, tmp_path / "a", *settings, "training.minutes=0.5")
    long, many = rates(home, tmp_path / "b", *settings, "training.minutes=1.0")
    assert 5 < short.step < long.step < 40
    assert few[0] > 0.9 and few[-1] < 0.1 and many[-1] < 0.05
    assert (tmp_path / "a" / "checkpoints" / f"step-{short.step:06d}").is_dir()


def test_steps_bound_a_budget_of_time(home, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("turbo_opt.calibration.training.loop.time", Clock())
    trained, _ = rates(home, tmp_path, "training.steps=3", "training.minutes=60.0")
    assert trained.step == 3


def test_a_resumed_training_remembers_the_minutes_it_has_used(home, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("turbo_opt.calibration.training.loop.time", Clock())
    settings = ("training.steps=1000", "training.minutes=0.5")
    first, _ = rates(home, tmp_path, *settings)
    again, _ = rates(home, tmp_path, *settings)
    assert again.step == first.step


def test_a_training_stopped_halfway_uses_the_other_half_of_its_minutes(
    home, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("turbo_opt.calibration.training.loop.time", Clock())
    settings = ("training.steps=1000", "training.minutes=1.0", "save.every=1", "log.every=1")
    settings = (*settings, "save.asynchronous=false", "log.evaluate_every=1000")
    straight = trainer(home, tmp_path / "a", *settings)
    straight.run()

    stopped = trainer(home, tmp_path / "b", *settings)
    real, half = stopped._train_step, straight.step // 2

    def until_half(rate: float):
        if stopped.step == half:
            raise KeyboardInterrupt
        return real(rate)

    stopped._train_step = until_half  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.run()

    resumed = trainer(home, tmp_path / "b", *settings)
    assert resumed.resume() and resumed.step == half > 5
    resumed.run()
    assert abs(resumed.step - straight.step) <= 1
    with (tmp_path / "b" / "log.csv").open(newline="") as file:
        rates = [float(row["rate"]) for row in csv.DictReader(file) if row.get("rate")]
    falling = rates[half // 2 :]
    assert falling == sorted(falling, reverse=True) and falling[-1] < 0.1 * falling[0]
