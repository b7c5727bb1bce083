"""Schedules of ours as diffusers schedulers, so that they work in any diffusers pipeline.

Between steps they keep x in the dtype of the update rule: given back unchanged, as pipelines do,
the sample of a step goes on from there instead of from its rounding to the pipeline's float32 (not
in torch's inference mode, where nobody knows whether it is unchanged).
Pipelines of Wan draw unit noise and leave it so: pass `latents=noise * scheduler.init_noise_sigma`.
Those that start from a clip add the noise by `add_noise` instead, and take the last steps only.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from turbo_opt.ir.rcm import (
    MOST_STEPS,
    SIGMA_MAX,
    TRAIN_TIMESTEPS,
    RcmRule,
    rcm_steps,
    rcm_times,
)
from turbo_opt.ir.schedule import Schedule, Step
from turbo_opt.runtime.rules import advance, drawn_noise


def scheduler_for(schedule: Schedule) -> Any:
    """A diffusers scheduler that makes the steps of `schedule`.

    Where the schedule is a diffusers scheduler's own, that one; else a `FixedStepScheduler`.
    """
    from turbo_opt.capture.sampling import make_scheduler

    if all(step.rule == "scheduler" for step in schedule.steps):
        scheduler = make_scheduler(schedule.scheduler)
        scheduler.set_timesteps(schedule.scheduler["num_inference_steps"])
        return scheduler
    train_steps = schedule.scheduler.get("config", {}).get("num_train_timesteps", TRAIN_TIMESTEPS)
    steps = [vars(step) for step in schedule.steps]
    return FixedStepScheduler(steps, train_steps, schedule.initial_noise_scale)


class _StepScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Takes given steps one after the other.

    After `set_timesteps`, the first call of `step` finds its step by the timestep it is given, or
    by the begin index where one is set; from there on steps follow each other.

    Attributes:
        init_noise_sigma: standard deviation of the first x.
        timesteps: what the network is given at each step, float32.
        sigmas: the times of the steps and the last next time, float64.
        generator: source of the noise that steps add where `step` is given none; None: one whose
            seed follows from the first sample, so that a pipeline's own generator settles the clip.
    """

    order = 1
    generator: torch.Generator | None = None

    def _start(self, steps: Sequence[Step], device: Any) -> None:
        times = [step.time for step in steps] + [steps[-1].next_time]
        timesteps = torch.tensor(
            [step.timestep for step in steps], dtype=torch.float32, device="cpu"
        )
        self._steps = steps
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._given: tuple[Tensor, int | None] | None = None
        self._exact: Tensor | None = None
        self._seeded: torch.Generator | None = None
        self.num_inference_steps = len(steps)
        self.timesteps = timesteps.to(device=device)
        self._host_timesteps = timesteps.tolist()
        self.sigmas = torch.tensor(times, dtype=torch.float64)

    @property
    def step_index(self) -> int | None:
        """Index of the step to be taken next; None before the first one."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step to be taken; None leaves it to that step's timestep."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say which step is taken first, until the next `set_timesteps`."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: Any) -> int:
        """Index of the step at a timestep, the first if several share it.

        Args:
            timestep: a number, or a tensor that holds one, on any device; it is compared in
                float32, as `timesteps` are.

        Raises:
            ValueError: there is no step at that timestep.
        """
        wanted = torch.as_tensor(timestep, dtype=torch.float32, device="cpu").item()
        if wanted not in self._host_timesteps:
            known = ", ".join(f"{value:.9g}" for value in self._host_timesteps)
            raise ValueError(
                f"no step at timestep {wanted:.9g}: pass one of `timesteps`, which are {known}"
            )
        return self._host_timesteps.index(wanted)

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
        """x after the next step, in the dtype of `sample`.

        Args:
            model_output: the network's velocity.
            timestep: that of the step. Only the first call after `set_timesteps` looks at it, and
                only where no begin index is set: reading a tensor waits for the device.
            sample: x before the step.
            generator: source of the noise that the SDE rule adds; by default the scheduler's own.

        Raises:
            ValueError: there is no step at that timestep, or none is left.
        """
        step = self._next_step(timestep)
        generator = generator or self.generator
        if generator is None and step.rule == "rcm-sde":
            self._seeded = generator = self._seeded or _seeded_by(sample)
        x = self._unrounded(sample)
        exact = advance(step, model_output, x, drawn_noise(step, x, generator))
        moved = exact.to(sample.dtype)
        self._given, self._exact = (moved, _version(moved)), exact
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x of the steps at `timesteps`: (1 − t)·x₀ + t·ε at their times t.

        That is x under every rule (`runtime.rules`). For an rCM student it is TrigFlow's
        cos τ·x₀ + sin τ·ε divided by cos τ + sin τ (`ir.rcm`).

        Args:
            original_samples: x₀, of shape (B, …).
            noise: ε of the same shape, unit noise: `init_noise_sigma` is for x without x₀.
            timesteps: of shape (B,), or (1,) for all samples; of the schedule's own.

        Returns:
            Of the shape and dtype of `original_samples`, computed in float64.

        Raises:
            ValueError: there is no step at a timestep, or no timestep.
        """
        indices = [self.index_for_timestep(value) for value in timesteps.flatten().tolist()]
        if not indices:
            raise ValueError(
                f"no timestep to add noise at: the schedule has {len(self._steps)} steps, of which "
                "the pipeline's strength and num_inference_steps leave none"
            )
        times = [self._steps[index].time for index in indices]
        t = torch.tensor(times, dtype=torch.float64, device=original_samples.device)
        t = t.reshape(-1, *(1,) * (original_samples.ndim - 1))
        return ((1 - t) * original_samples + t * noise).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise`, as diffusers' schedulers of flow matching call it."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])

    def _next_step(self, timestep: Any) -> Step:
        index = self._step_index
        if index is None:
            index = self._begin_index
        if index is None:
            index = self.index_for_timestep(timestep)
        if not 0 <= index < len(self._steps):
            raise ValueError(
                f"no step of index {index}: the schedule has {len(self._steps)} steps; "
                "call set_timesteps to start again"
            )
        self._step_index = index + 1
        return self._steps[index]

    def _unrounded(self, sample: Tensor) -> Tensor:
        if self._given is None or self._exact is None:
            return sample
        given, version = self._given
        unchanged = sample is given and version is not None and _version(sample) == version
        return self._exact if unchanged else sample


def _seeded_by(sample: Tensor) -> torch.Generator:
    """A generator on the sample's device whose seed is a sum over its values."""
    values = sample.detach().float().cpu().numpy()
    return torch.Generator(sample.device).manual_seed(zlib.crc32(values.tobytes()))


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None where torch does not count."""
    return None if tensor.is_inference() else tensor._version


class FixedStepScheduler(_StepScheduler):
    """Takes the steps it was made with, whatever number a pipeline asks for."""

    @register_to_config
    def __init__(
        self,
        steps: list[dict[str, Any]],
        num_train_timesteps: int = TRAIN_TIMESTEPS,
        initial_noise_scale: float = 1.0,
    ) -> None:
        self.init_noise_sigma = initial_noise_scale
        self.set_timesteps(len(steps))

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Go back to the first step, with the timesteps on `device`."""
        self._start([Step(**step) for step in self.config["steps"]], device)


class RCMScheduler(_StepScheduler):
    """The 1 to 4 unguided steps of a student that rCM has distilled; see `ir.rcm`.

    pipe.scheduler = RCMScheduler.from_config(pipe.scheduler.config, sigma_max=80.0)
    pipe(prompt, num_inference_steps=4, guidance_scale=1.0,
         latents=torch.randn(shape) * pipe.scheduler.init_noise_sigma)

    Args:
        sigma_max: noise level of the first step: 80 for text to video, also where it is None, as in
            configs of other schedulers; 200 for image to video.
        rule: `sde` adds fresh noise after each step but the last, `ode` follows the velocity.

    Raises:
        BadInput: no such rule, or σ_max is not above 14.1, where the second step starts.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = TRAIN_TIMESTEPS,
        sigma_max: float | None = SIGMA_MAX,
        rule: RcmRule = "sde",
    ) -> None:
        self.set_timesteps(MOST_STEPS)
        self.init_noise_sigma = float(self.sigmas[0])

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Go back to the first of `num_inference_steps` steps, with the timesteps on `device`.

        Raises:
            BadInput: it is not 1 to 4.
        """
        sigma_max = self.config["sigma_max"]
        times = rcm_times(num_inference_steps, SIGMA_MAX if sigma_max is None else sigma_max)
        steps = rcm_steps(times, self.config["rule"], self.config["num_train_timesteps"])
        self._start(steps, device)
