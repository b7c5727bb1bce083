"""Pull the sparse student's prediction to the dense teacher's: mean ‖student(x_t) − teacher(x_t)‖².

x_t is noisy data, not a sample of the student, so that one forward of each network is a step.
Source: SLA's tuning as the released weights were made (see docs/training.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from turbo_opt.calibration.data.batches import Batch
from turbo_opt.calibration.flow import Denoiser, NoiseLevels, noisy
from turbo_opt.calibration.sla.companions import Companion
from turbo_opt.calibration.training.objective import Loss

STUDENT = "student"


class SLAObjective:
    """See `turbo_opt.calibration.training.objective.Objective`.

    Args:
        student: trained; sparse-linear attention.
        teacher: frozen; the dense model.
        levels: which noise levels are trained.
        unconditional_share: share of prompts replaced by the empty one.
        companions: models that take turns with the teacher.
    """

    name = "sla"
    shipped = STUDENT

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        levels: NoiseLevels,
        unconditional_share: float,
        companions: Sequence[Companion] = (),
    ) -> None:
        self.trained: Mapping[str, nn.Module] = {STUDENT: student.network}
        self.denoisers: Mapping[str, Denoiser] = {STUDENT: student}
        self.teacher = teacher
        self._student = student
        self._levels, self._share = levels, unconditional_share
        self._companions = companions
        self._turn: Companion | None = None
        for each in companions:
            each.lead(student.network)

    def turn(self, step: int) -> str:
        """There is one network to train; the teacher and its companions take turns."""
        self._turn = [None, *self._companions][step % (1 + len(self._companions))]
        if self._turn is not None:
            self._turn.follow(self._student.network, self.teacher.network)
        return STUDENT

    def loss(self, batch: Batch, turn: str) -> Loss:
        """Mean squared difference of the two predictions."""
        student, teacher = self._predictions(batch, self._share, self._turn)
        return Loss((student - teacher).square().mean())

    def evaluate(self, batch: Batch) -> Mapping[str, Tensor]:
        """`loss`, and `relative_error`: the difference's norm as a share of the teacher's; of
        companions `companion_1_loss` and so on."""
        scores = {}
        for number, each in enumerate([None, *self._companions]):
            if each is not None:
                each.follow(self._student.network, self.teacher.network)
            student, teacher = self._predictions(batch, 0.0, each)
            error = (student - teacher).square().mean()
            of = f"companion_{number}_" if number else ""
            scores[f"{of}loss"] = error
            scores[f"{of}relative_error"] = (error / teacher.square().mean()).sqrt()
        return scores

    def _predictions(
        self, batch: Batch, empty_share: float, companion: Companion | None
    ) -> tuple[Tensor, Tensor]:
        """Of the student and what it imitates, or of a companion and what that was."""
        teacher, student, levels = self.teacher, self._student, self._levels
        if companion is not None:
            teacher, student, levels = companion.dense, companion.sparse, companion.levels
        t = levels.at(batch.uniform("noise level"))
        x = noisy(batch.latents, batch.noise("noise"), t)
        embeds = batch.with_empty_prompts(empty_share)
        with torch.no_grad():
            target = teacher(x, t, embeds)
        return student(x, t, embeds), target
