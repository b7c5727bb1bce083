"""rCM as an objective of the training loop: three networks, two of which are trained.

    student   forward term:  consistent along the guided teacher's path, on noisy data
              reverse term:  its own samples denoised alike by the teacher and the fake score
    fake      the flow of the student's samples
    teacher   frozen, guided

While the tangent warms up only the student is trained, by the forward term. Then it is every
`student_every`-th step that is the student's, by both terms, and the others are the fake score's.
Source: rCM, arXiv 2510.08431; see docs/training.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from turbo_opt.calibration.data.batches import Batch
from turbo_opt.calibration.flow import Denoiser, NoiseLevels
from turbo_opt.calibration.rcm import losses
from turbo_opt.calibration.rcm.schema import Distillation, Reverse
from turbo_opt.calibration.rcm.tangents import (
    earlier,
    tangent_by_difference,
    tangent_by_forward_mode,
    without_gradient,
)
from turbo_opt.calibration.rcm.times import LogNormalAngles
from turbo_opt.calibration.rcm.trigflow import (
    Predictor,
    angle_of,
    clean_of,
    flow_of,
    guided,
    noisy,
    predictor,
    sides,
)
from turbo_opt.calibration.training.objective import Loss

STUDENT, FAKE = "student", "fake"
_EVALUATED_STEP = 0.05
"""Angle over which held-out consistency is measured: small, and above bfloat16's rounding."""


class RCMObjective:
    """See `turbo_opt.calibration.training.objective.Objective`.

    Args:
        student: trained; for the tangent `jvp`, one that carries tangents.
        teacher: frozen.
        fake: trained on the student's samples; None without a reverse term.
        levels: noise levels at which samples are judged, and between steps of a rollout.
        empty_prompt: (T, C_text) for guidance; None where the scale is 1.
        unconditional_share: share of prompts replaced by the empty one.
    """

    name = "rcm"
    shipped = STUDENT

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        fake: Denoiser | None,
        settings: Distillation,
        levels: NoiseLevels,
        empty_prompt: Tensor | None,
        unconditional_share: float,
    ) -> None:
        self.denoisers: Mapping[str, Denoiser] = {STUDENT: student}
        if fake is not None:
            self.denoisers = {**self.denoisers, FAKE: fake}
        self.trained: Mapping[str, nn.Module] = {
            name: each.network for name, each in self.denoisers.items()
        }
        self._student, self._fake = student, fake
        self._teacher = (
            teacher
            if empty_prompt is None
            else guided(teacher, empty_prompt, settings.guidance_scale)
        )
        self._settings, self._levels, self._share = settings, levels, unconditional_share
        forward = settings.forward
        self._angles = LogNormalAngles(forward.log_sigma_mean, forward.log_sigma_std)
        self._step = 0
        self._fake_loss: Tensor | None = None

    def turn(self, step: int) -> str:
        """See the module."""
        self._step = step
        reverse = self._reverse
        if reverse is None:
            return STUDENT
        # The fake score begins, as it knows nothing of the student's samples yet.
        place = (step - self._settings.warm_up) % reverse.student_every
        return STUDENT if place == reverse.student_every - 1 else FAKE

    @property
    def _reverse(self) -> Reverse | None:
        """The reverse term, once the warm-up is over."""
        return self._settings.reverse if self._step >= self._settings.warm_up else None

    def loss(self, batch: Batch, turn: str) -> Loss:
        """The terms of that network; `loss` of a step is of the network whose turn it is."""
        embeds = batch.with_empty_prompts(self._share)
        return self._of_fake(batch, embeds) if turn == FAKE else self._of_student(batch, embeds)

    def evaluate(self, batch: Batch) -> Mapping[str, Tensor]:
        """How far f is from consistent.

        `loss`: the mean square of df/dτ along the teacher's path, as a difference;
        `relative_change`: its root as a share of f's.
        """
        embeds = batch.prompt_embeds
        x, angle = self._noisy_data(batch)
        predict = predictor(self._student, embeds)
        teacher = predictor(self._teacher, embeds)(x, angle)
        near = earlier(predict, x, angle, teacher, _EVALUATED_STEP)
        clean = clean_of(x, angle, predict(x, angle))
        change = ((clean - near.clean) / sides(near.step, x)[1]).square().mean()
        return {"loss": change, "relative_change": (change / clean.square().mean()).sqrt()}

    def _of_student(self, batch: Batch, embeds: Tensor) -> Loss:
        settings, predict = self._settings, predictor(self._student, embeds)
        forward, metrics = self._forward_term(batch, embeds, predict)
        value = settings.forward.weight * forward
        metrics["forward"] = forward.detach()
        reverse = self._reverse
        if reverse is not None:
            term = self._reverse_term(batch, embeds, predict, reverse)
            value = value + reverse.weight * term
            metrics["reverse"] = term.detach()
            if self._fake_loss is not None:
                metrics["fake"] = self._fake_loss
        return Loss(value, metrics)

    def _forward_term(
        self, batch: Batch, embeds: Tensor, predict: Predictor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        settings = self._settings.forward
        x, angle = self._noisy_data(batch)
        with without_gradient():
            teacher = predictor(self._teacher, embeds)(x, angle)
        # All that needs no gradient runs first: what backward needs is kept as briefly as can be.
        if settings.needs_jvp:
            tangent = tangent_by_forward_mode(predict, x, angle, teacher)
            flow = predict(x, angle)
        else:
            near = earlier(predict, x, angle, teacher, settings.angle_apart)
            flow = predict(x, angle)
            if settings.form == "discrete":
                clean = clean_of(x, angle, flow)
                return losses.discrete_consistency(clean, near.clean).mean(), {}
            tangent = tangent_by_difference(x, angle, flow.detach(), near)
        direction = losses.consistency_tangent(
            x, angle, flow.detach(), teacher, tangent, self._warmed_up()
        )
        size = direction.flatten(1).square().mean(1).sqrt().mean()
        return losses.continuous_consistency(flow, direction).mean(), {"tangent": size}

    def _reverse_term(
        self, batch: Batch, embeds: Tensor, predict: Predictor, reverse: Reverse
    ) -> Tensor:
        assert self._fake is not None
        x, angle = self._rollout(batch, predict, self._steps_before(reverse, STUDENT))
        clean = clean_of(x, angle, predict(x, angle))
        level = self._angle_between(batch, "judged level")
        with without_gradient():
            again = noisy(clean.detach(), batch.noise("judged noise"), level)
            fake, teacher = (
                clean_of(again, level, predictor(network, embeds)(again, level))
                for network in (self._fake, self._teacher)
            )
        return losses.distribution_matching(clean, fake, teacher).mean()

    def _of_fake(self, batch: Batch, embeds: Tensor) -> Loss:
        reverse = self._reverse
        assert self._fake is not None and reverse is not None
        predict = predictor(self._student, embeds)
        with without_gradient():
            x, angle = self._rollout(batch, predict, self._steps_before(reverse, FAKE))
            clean = clean_of(x, angle, predict(x, angle))
        level, noise = self._angle_between(batch, "judged level"), batch.noise("judged noise")
        flow = predictor(self._fake, embeds)(noisy(clean, noise, level), level)
        value = losses.flow_matching(flow, flow_of(clean, noise, level)).mean()
        self._fake_loss = value.detach()
        return Loss(value, {"fake": self._fake_loss})

    def _steps_before(self, reverse: Reverse, turn: str) -> int:
        """Steps of a rollout before its last: in turn 0, 1, … at each network's updates.

        All processes take as many, as sharded networks need.
        """
        done = self._step - self._settings.warm_up
        students = done // reverse.student_every
        return (students if turn == STUDENT else done - students) % reverse.rollout_steps

    def _rollout(self, batch: Batch, predict: Predictor, steps: int) -> tuple[Tensor, Tensor]:
        """x and τ of the last step of a sample, after `steps` steps without gradient.

        It begins where sampling does, with pure noise at atan σ_max; the times between are random.
        """
        first = math.atan(self._settings.sigma_max)
        x = math.sin(first) * batch.noise("rollout noise").double()
        angle = x.new_full(x.shape[:1], first)
        with without_gradient():
            for step in range(steps):
                clean = clean_of(x, angle, predict(x, angle))
                angle = torch.minimum(angle, self._angle_between(batch, f"rollout level {step}"))
                x = noisy(clean, batch.noise(f"rollout noise {step}"), angle)
        return x, angle

    def _noisy_data(self, batch: Batch) -> tuple[Tensor, Tensor]:
        angle = self._angles.at(batch.uniform("angle"))
        return noisy(batch.latents, batch.noise("noise"), angle), angle

    def _angle_between(self, batch: Batch, name: str) -> Tensor:
        return angle_of(self._levels.at(batch.uniform(name)))

    def _warmed_up(self) -> float:
        warm_up = self._settings.warm_up
        return min(1.0, self._step / warm_up) if warm_up else 1.0
