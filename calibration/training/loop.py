"""The training loop: batches, gradients, logs, held-out losses, samples and checkpoints."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turbo_opt.calibration.data.batches import Batch, Batches, split
from turbo_opt.calibration.data.samples import SampleSet
from turbo_opt.calibration.flow import autocast, distance_to_noise
from turbo_opt.calibration.jobs.schema import Job
from turbo_opt.calibration.places import CHECKPOINTS
from turbo_opt.calibration.training.blocks import first_compilation, uncompiled
from turbo_opt.calibration.training.checkpoints import Checkpoints, step_of
from turbo_opt.calibration.training.identity import check_same_job, identity_of
from turbo_opt.calibration.training.logs import Log
from turbo_opt.calibration.training.objective import Objective
from turbo_opt.calibration.training.rates import learning_rate
from turbo_opt.calibration.training.trainee import Trainee, norm_of
from turbo_opt.calibration.training.world import World
from turbo_opt.errors import BadInput, TurboOptError

Progress = Callable[[int, int, str], None]
"""Told (steps done, steps in all, the last loss as text)."""
Draw = Callable[[int, torch.nn.Module], Mapping[str, float]]
"""Makes clips with a network after a step; what is measured of them goes to the log."""
_EVALUATION_SEED = 1_000_003
MOST_APART = 0.5
"""Of one gradient, rounded differently, in lengths."""


class Trainer:
    """Trains an objective on a set of samples.

    Every random choice follows from the job's seed and a sample's position, so a training that was
    stopped and resumed gives the same weights as one that was not.

    Args:
        job: what to do.
        out: folder of checkpoints and logs.
        objective: what is trained.
        samples: what it is trained on.
        draw: makes the clips of the job's `samples`; None makes none.
        imitated: folders of the networks that are learned from, by what the job calls them; a
            checkpoint of others is not taken over.
    """

    def __init__(
        self,
        job: Job,
        out: Path,
        objective: Objective,
        samples: SampleSet,
        world: World,
        draw: Draw | None = None,
        imitated: Mapping[str, Path] | None = None,
    ) -> None:
        self.job, self.out, self.objective, self.world = job, out, objective, world
        self.trainees = {
            name: Trainee(network, job.training, averaged=name == objective.shipped)
            for name, network in objective.trained.items()
        }
        self.checkpoints = Checkpoints(out / CHECKPOINTS, job.save, world)
        self.step = 0
        self._minutes, self._began = 0.0, time.monotonic()
        self._draw = draw
        self._micro = micro_batch(job, world)
        trained, self._held_out = split(samples, job.data.held_out)
        unconditional = job.data.unconditional_share > 0
        self._batches = Batches(
            samples,
            trained,
            job.training.seed,
            world.device,
            unconditional,
            resident=job.data.resident,
            together=job.training.draws == "batch",
        )
        self._evaluated = Batches(
            samples, self._held_out, _EVALUATION_SEED, world.device, unconditional
        )
        self._samples = samples
        self._identity = identity_of(job, len(samples), imitated or {})

    @property
    def shipped(self) -> Trainee:
        """The network that is the result."""
        return self.trainees[self.objective.shipped]

    def resume(self) -> bool:
        """Take over the newest checkpoint; False if there is none. All processes call.

        Raises:
            BadInput: it is of another job, or cannot be read.
        """
        path = self.checkpoints.latest()
        if path is None:
            return False
        record = self.checkpoints.record(path)
        check_same_job(path, record.get("identity"), self._identity)
        self.checkpoints.load(path, self._tensors())
        for trainee in self.trainees.values():
            trainee.loaded()
        self.step, self._minutes = record["step"], float(record.get("minutes", 0.0))
        return True

    def run(
        self, progress: Progress = lambda done, total, note: None
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Train to the last step; returns the held-out scalars of its start and of its end.

        Raises:
            TurboOptError: the loss, a gradient, a held-out value or what would be saved is not
                finite.
        """
        settings = self.job.training
        log = Log(self.out, self.step, self.job.log.tensorboard) if self.world.is_main else None
        started, first = time.monotonic(), self.step
        before = scores = self.evaluate()
        try:
            if self.step == 0:
                self._log(log, before)
            if settings.compile:
                self._check_compiled()
            self._began = time.monotonic()  # what came before is of no budget
            used = self._used()
            while used < 1:
                rate = learning_rate(used, settings.rate, settings.warm_up)
                values = self._train_step(rate)
                self.step += 1
                used = self._used()
                progress(self.step, round(self.step / used), f"loss {values['loss']:.4g}")
                values |= {"rate": rate}
                values["seconds_per_step"] = (time.monotonic() - started) / (self.step - first)
                if self.world.device.type == "cuda":
                    peak = torch.cuda.max_memory_allocated(self.world.device)
                    values["peak_gib"] = peak / 2**30
                scores = self._after_step(log, values, last=used == 1)
            self.checkpoints.finish()
        except BaseException:
            # A save that ended since the last step is the last checkpoint.
            with contextlib.suppress(Exception):
                self.checkpoints.poll()
            raise
        finally:
            if log is not None:
                log.close()
        return before, scores

    def _used(self) -> float:
        """Which share of the training is done, up to 1: of its steps, or of its time if that is
        more. All processes call, and agree."""
        settings = self.job.training
        used = self.step / settings.steps
        if settings.minutes is not None:
            share = torch.tensor(self._elapsed() / settings.minutes, device=self.world.device)
            used = max(used, float(self.world.mean(share)))
        return min(used, 1.0)

    def _elapsed(self) -> float:
        """Minutes of this training, those of earlier runs included."""
        return self._minutes + (time.monotonic() - self._began) / 60

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Means over the held-out samples, at noise that is the same every time.

        Raises:
            TurboOptError: one is not finite; in every process.
        """
        if not self._held_out:
            return {}
        sums: dict[str, Tensor] = {}
        count = len(self._held_out)
        average = self.job.export.average
        with self.shipped.averaged(average), self._autocast(), uncompiled():
            # All processes run alike: one without a sample of its own takes another's, at weight 0.
            for first in range(0, count, self.world.data_size):
                position = first + self.world.data_rank
                weight = float(position < count)
                batch = self._evaluated.at([position % count], shuffled=False)
                for name, value in self.objective.evaluate(batch).items():
                    sums[name] = sums.get(name, torch.zeros_like(value)) + weight * value
        times = count * self.world.context_size
        scores = {f"held_out_{n}": float(self.world.sum(v)) / times for n, v in sums.items()}
        wrong = [name for name, value in scores.items() if not math.isfinite(value)]
        if wrong:
            raise TurboOptError(
                f"{', '.join(wrong)}: not finite after {self.step} steps; {self._way_on()}"
            )
        return scores

    def _train_step(self, rate: float) -> dict[str, float]:
        turn = self.objective.turn(self.step)
        trainee = self.trainees[turn]
        totals: dict[str, Tensor] = {}
        seen = []
        micro_batches = list(self._micro_batches())
        for batch in micro_batches:
            with self._autocast():
                loss = self.objective.loss(batch, turn)
            # Processes that share a clip hold a part of its gradient each, and FSDP takes the mean.
            (loss.value * (self.world.context_size / len(micro_batches))).backward()
            seen.append((batch, float(loss.value.detach())))
            for name, value in {"loss": loss.value.detach(), **loss.metrics}.items():
                part = value.detach().float() / len(micro_batches)
                totals[name] = totals.get(name, torch.zeros_like(part)) + part
        values = {name: float(self.world.mean(total)) for name, total in totals.items()}
        if not math.isfinite(values["loss"]):
            raise TurboOptError(self._where_not_finite("the loss", seen))
        values["gradient_norm"] = trainee.clip_gradient()
        if not math.isfinite(values["gradient_norm"]):
            names = trainee.gradients_not_finite()
            what = f"the gradient of {', '.join(names[:3]) or 'a weight'}"
            raise TurboOptError(self._where_not_finite(what, seen))
        trainee.update(rate)
        for each in self.trainees.values():  # a loss may reach networks whose turn it is not
            each.forget_gradient()
        return values

    def _check_compiled(self) -> None:
        """Raise TurboOptError unless blocks can be compiled and give each network the gradient that
        they give as written; all that a step runs is compiled then. All processes call."""
        for turn, trainee in self.trainees.items():
            steps = range(self.step, self.job.training.steps)
            if not any(self.objective.turn(step) == turn for step in steps):
                continue
            batch = next(self._micro_batches())
            self._compare_gradients(turn, trainee, batch)
            with first_compilation(), self._autocast():
                self.objective.loss(batch, turn).value.backward()
            for each in self.trainees.values():
                each.forget_gradient()

    def _compare_gradients(self, turn: str, trainee: Trainee, batch: Batch) -> None:
        """Raise TurboOptError if rounding alone cannot be why gradients by compiled blocks differ.

        They are those of the network's distance to noise. A loss would not do: that of a student
        which is close to its teacher is a small difference, whose gradient is rounding's. One that
        is not finite as written says nothing of the compiler; the step itself names the samples.
        """
        gradients = []
        for run in (uncompiled, first_compilation):
            with run():
                with self._autocast():
                    value = distance_to_noise(self.objective.denoisers[turn], batch)
                value.backward()
                gradients.append(trainee.gradient())
            trainee.forget_gradient()
        written, compiled = gradients
        length = norm_of(written)
        if not math.isfinite(length):
            return
        apart = norm_of({name: compiled[name] - value for name, value in written.items()})
        if not apart <= MOST_APART * length:
            raise TurboOptError(
                f"training.compile: the {turn}'s gradient by compiled blocks is {apart:.2g} away "
                f"from that of the blocks as written, whose length is {length:.2g}; set "
                "training.compile to false"
            )

    def broken_samples(self) -> int:
        """How many of the samples that any process drew cannot be used. All processes call.

        Raises:
            BadInput: those of all processes together are too many; in every process.
        """
        samples = self._samples
        if self.world.size > 1:
            found = torch.zeros(len(samples), device=self.world.device)
            found[torch.tensor(list(samples.broken), dtype=torch.long)] = 1
            samples.skip_others(self.world.sum(found).nonzero().flatten().tolist())
        return len(samples.broken)

    def _micro_batches(self) -> Iterator[Batch]:
        """This process's samples of the step."""
        share = self.job.training.batch // self.world.data_size
        first = self.step * self.job.training.batch + self.world.data_rank * share
        for start in range(first, first + share, self._micro):
            yield self._batches.at(range(start, start + self._micro))

    def _after_step(
        self, log: Log | None, values: dict[str, float], last: bool
    ) -> dict[str, float]:
        """Log, evaluate, draw and save what is due; returns held-out scalars, if they are."""
        job = self.job
        saving = last or self.step % job.save.every == 0
        if saving:
            self._check_weights()
        due = {
            name: last or self.step % every == 0
            for name, every in (("log", job.log.every), ("evaluate", job.log.evaluate_every))
        }
        scores = self.evaluate() if due["evaluate"] else {}
        row = {**values, **scores} if due["log"] or scores else {}
        if self._draw is not None and job.samples and (last or self.step % job.samples.every == 0):
            with self.shipped.averaged(job.export.average), uncompiled():
                row |= self._draw(self.step, self.shipped.network)
        if row:
            row["broken_samples"] = self.broken_samples()
            self._log(log, row)
        self.checkpoints.poll()
        if saving:
            record = {"identity": self._identity, "minutes": self._elapsed()}
            self.checkpoints.save(self.step, self._tensors(), record)
        return scores

    def _log(self, log: Log | None, row: Mapping[str, float]) -> None:
        if log is not None and row:
            log.add(self.step, row)

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": tensor
            for name, trainee in self.trainees.items()
            for key, tensor in trainee.tensors().items()
        }

    def _check_weights(self) -> None:
        """Raise TurboOptError unless what would be saved is finite. All processes call."""
        for name, trainee in self.trainees.items():
            if not trainee.is_finite():
                raise TurboOptError(
                    f"the {name}'s weights, or their squares, are not finite after step "
                    f"{self.step} of {self.job.training.steps}; {self._way_on()}"
                )

    def _where_not_finite(self, what: str, seen: list[tuple[Batch, float]]) -> str:
        """The message; all processes call, as all stop."""
        parts = [f"{', '.join(batch.names)} (loss {value:.4g})" for batch, value in seen]
        return (
            f"{what} is not finite at step {self.step + 1} of {self.job.training.steps}, on "
            f"process {self.world.rank}'s samples {'; '.join(parts)}; {self._way_on()}"
        )

    def _way_on(self) -> str:
        """What there is to go on from. All processes call, as all stop."""
        self.checkpoints.finish()
        last = self.checkpoints.latest()
        if last is None:
            lower = "; try a lower training.rate" if self.step else ""
            return f"no checkpoint was saved before{lower}"
        if step_of(last) < self.step:
            return (
                f"the last good checkpoint is {last}; --resume with a lower training.rate or other "
                "settings may go on from there"
            )
        # No step has been made from it, so its weights may be why.
        return (
            f"{last} holds the weights with which this happened; if they are why, "
            f"{self.checkpoints.way_around(last)}"
        )

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self.world.device, getattr(torch, self.job.training.compute_dtype))


def micro_batch(job: Job, world: World) -> int:
    """Samples per forward of one process.

    Raises:
        BadInput: the batch cannot be shared evenly.
    """
    batch, wanted = job.training.batch, job.training.micro_batch
    if batch % world.data_size:
        raise BadInput(
            f"training.batch: {batch} samples cannot be shared by {world.data_size} processes; use "
            "a multiple"
        )
    share = batch // world.data_size
    if wanted is not None and share % wanted:
        raise BadInput(
            f"training.micro_batch: {wanted} does not divide the {share} samples of a process"
        )
    return wanted or share
