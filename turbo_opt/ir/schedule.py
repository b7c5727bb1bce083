"""The sampling loop as data: which network runs when, under what guidance, and how x moves on.

A schedule is what a step-reducing pass rewrites: 50 guided UniPC steps become 4 unguided ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

UpdateRule = Literal["scheduler", "euler", "rcm-sde", "rcm-ode"]


@dataclass(frozen=True)
class Step:
    """One step of the loop.

    Attributes:
        time: rectified-flow time t in (0, 1], noise level at which the network is asked.
        next_time: the time after the step; 0 at the end.
        timestep: what the network is given for `time` (1000·t, rounded as its scheduler does).
        denoiser: name of the network to run.
        guidance_scale: classifier-free guidance scale; None runs the network once, unguided.
        rule: how x moves from `time` to `next_time`; `scheduler` leaves it to the multistep
            scheduler named by the schedule.
    """

    time: float
    next_time: float
    timestep: float
    denoiser: str
    guidance_scale: float | None
    rule: UpdateRule = "scheduler"

    @property
    def evaluations(self) -> int:
        """Network evaluations of this step."""
        return 1 if self.guidance_scale is None else 2


@dataclass(frozen=True)
class Schedule:
    """An ordered tuple of steps and the rule by which the first x is drawn.

    Attributes:
        steps: in the order they run.
        scheduler: class name and config of the diffusers scheduler behind the `scheduler` rule.
        initial_noise_scale: x starts as this factor times unit Gaussian noise.
        expand_timesteps: one timestep per token (Wan2.2 TI2V) instead of one per clip.
    """

    steps: tuple[Step, ...]
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    initial_noise_scale: float = 1.0
    expand_timesteps: bool = False

    @property
    def evaluations(self) -> int:
        """Network evaluations of one clip."""
        return sum(step.evaluations for step in self.steps)

    @property
    def dtype(self) -> torch.dtype:
        """What x is kept in between steps: float64 for the rCM rules, else float32."""
        exact = any(step.rule in ("rcm-sde", "rcm-ode") for step in self.steps)
        return torch.float64 if exact else torch.float32

    def to_json(self) -> dict[str, Any]:
        """As JSON values, for the manifest."""
        return {
            "steps": [vars(step) for step in self.steps],
            "scheduler": dict(self.scheduler),
            "initial_noise_scale": self.initial_noise_scale,
            "expand_timesteps": self.expand_timesteps,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Schedule:
        """The inverse of `to_json`."""
        fields = dict(record)
        fields["steps"] = tuple(Step(**step) for step in record["steps"])
        return cls(**fields)
