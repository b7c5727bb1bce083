"""Schedules of ours as diffusers schedulers, so that they work in any diffusers pipeline."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from turbo_opt.ir.schedule import Schedule, Step
from turbo_opt.runtime.sampler import advance


def scheduler_for(schedule: Schedule) -> Any:
    """A diffusers scheduler that makes the steps of `schedule`.

    Where the schedule is a diffusers scheduler's own, that one; else a `FixedStepScheduler`.
    """
    from turbo_opt.capture.sampling import make_scheduler

    if all(step.rule == "scheduler" for step in schedule.steps):
        scheduler = make_scheduler(schedule.scheduler)
        scheduler.set_timesteps(schedule.scheduler["num_inference_steps"])
        return scheduler
    train_steps = schedule.scheduler.get("config", {}).get("num_train_timesteps", 1000)
    return FixedStepScheduler([vars(step) for step in schedule.steps], train_steps)


class FixedStepScheduler(SchedulerMixin, ConfigMixin):
    """Takes the steps it was made with, whatever number a pipeline asks for.

    Pipelines of Wan draw unit noise; pass `latents=initial_latents(...)` where the schedule's
    `initial_noise_scale` is not 1. x is kept in the pipeline's float32 between steps.
    """

    order = 1

    @register_to_config
    def __init__(self, steps: list[dict[str, Any]], num_train_timesteps: int = 1000) -> None:
        self.init_noise_sigma = 1.0
        self.set_timesteps(len(steps))

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Go back to the first step, with the timesteps on `device`."""
        self._steps = [Step(**step) for step in self.config["steps"]]
        self.timesteps = torch.tensor([step.timestep for step in self._steps], device=device)
        times = [step.time for step in self._steps] + [self._steps[-1].next_time]
        self.sigmas = torch.tensor(times, dtype=torch.float64)
        self.num_inference_steps = len(self._steps)
        self._index = 0

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Continue from a later step."""
        self._index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        """x after the next step; `timestep` is that of the step and is not looked at."""
        step = self._steps[self._index]
        self._index += 1
        moved = advance(step, model_output, sample, generator).to(sample.dtype)
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)
