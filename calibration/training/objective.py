"""What a training is for: the seam between the loop and what it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from turbo_opt.calibration.data.batches import Batch
from turbo_opt.calibration.flow import Denoiser


@dataclass(frozen=True)
class Loss:
    """Of one batch.

    Attributes:
        value: a scalar, the mean over the batch; minimised.
        metrics: further scalars for the log, means over the batch, detached.
    """

    value: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """Builds its networks when it is made; the loop calls the rest.

    Attributes:
        name: of the job, such as `sla`; a checkpoint of another is not taken over.
        trained: the networks that are trained, by name, in float32 and, with several processes,
            sharded by FSDP2; each has an optimizer of its own. Parameters that need no gradient
            stay as they are.
        denoisers: those of them whose blocks may be compiled, as functions, by the same names.
        shipped: which of them is the result, and draws the samples.
    """

    name: str
    trained: Mapping[str, nn.Module]
    denoisers: Mapping[str, Denoiser]
    shipped: str

    def turn(self, step: int) -> str:
        """Which trained network step `step`, counted from 0, updates."""

    def loss(self, batch: Batch, turn: str) -> Loss:
        """The loss of a batch for that network; called under autocast, with gradients."""

    def evaluate(self, batch: Batch) -> Mapping[str, Tensor]:
        """Scalars of held-out samples, means over the batch; under autocast, no gradients."""
