"""Pull the sparse student's prediction to the dense teacher's: mean ‖student(x_t) − teacher(x_t)‖².

x_t is noisy data, not a sample of the student, so that one forward of each network is a step.
Source: SLA's tuning as the released weights were made (see docs/training.md).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from turbo_opt.calibration.data.batches import Batch
from turbo_opt.calibration.flow import Denoiser, NoiseLevels, noisy
from turbo_opt.calibration.training.objective import Loss

STUDENT = "student"


class SLAObjective:
    """See `turbo_opt.calibration.training.objective.Objective`.

    Args:
        student: trained; sparse-linear attention.
        teacher: frozen; the dense model.
        levels: which noise levels are trained.
        unconditional_share: share of prompts replaced by the empty one.
    """

    name = "sla"
    shipped = STUDENT

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        levels: NoiseLevels,
        unconditional_share: float,
    ) -> None:
        self.trained: Mapping[str, nn.Module] = {STUDENT: student.network}
        self._student, self._teacher = student, teacher
        self._levels, self._share = levels, unconditional_share

    def turn(self, step: int) -> str:
        """There is one network to train."""
        return STUDENT

    def loss(self, batch: Batch, turn: str) -> Loss:
        """Mean squared difference of the two predictions."""
        student, teacher = self._predictions(batch, self._share)
        return Loss((student - teacher).square().mean())

    def evaluate(self, batch: Batch) -> Mapping[str, Tensor]:
        """`loss`, and `relative_error`: the difference's norm as a share of the teacher's."""
        student, teacher = self._predictions(batch, 0.0)
        error = (student - teacher).square().mean()
        return {"loss": error, "relative_error": (error / teacher.square().mean()).sqrt()}

    def _predictions(self, batch: Batch, empty_share: float) -> tuple[Tensor, Tensor]:
        t = self._levels.at(batch.uniform("noise level"))
        x = noisy(batch.latents, batch.noise("noise"), t)
        embeds = batch.with_empty_prompts(empty_share)
        with torch.no_grad():
            target = self._teacher(x, t, embeds)
        return self._student(x, t, embeds), target
