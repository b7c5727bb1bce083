"""The few steps of an rCM student, as a schedule.

    τ = [atan σ_max, 1.5, 1.4, 1.0][:n] + [0]        TrigFlow
    t = sin τ / (cos τ + sin τ)                      rectified flow

x starts as t₀ times unit noise; the network is asked for v at 1000·t, once a step and unguided. A
pair of experts switches where t < boundary. Source: rCM, arXiv 2510.08431, and the released
TurboWan checkpoints.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal, get_args

from turbo_opt.errors import BadInput
from turbo_opt.ir.schedule import Schedule, Step, UpdateRule

RCM_SCHEDULER = "RCMScheduler"
"""Class name of the diffusers scheduler that makes the same steps (`runtime.scheduler`)."""
MOST_STEPS = 4
SIGMA_MAX = 80.0
"""σ_max of the released text-to-video students."""
TRAIN_TIMESTEPS = 1000
_MIDDLE = (1.5, 1.4, 1.0)

RcmRule = Literal["sde", "ode"]
"""sde: predict the clip, add fresh noise of the next level. ode: follow the velocity."""


def rcm_times(steps: int, sigma_max: float) -> tuple[float, ...]:
    """Rectified-flow times t₀ > … > tₙ = 0 of `steps` steps.

    Raises:
        BadInput: the number of steps is not 1 to 4, or σ_max is not above the second time.
    """
    if not 1 <= steps <= MOST_STEPS:
        raise BadInput(f"an rCM student takes 1 to {MOST_STEPS} steps, not {steps}")
    least = math.tan(_MIDDLE[0])
    if not isinstance(sigma_max, int | float) or not least < sigma_max < math.inf:
        raise BadInput(
            f"sigma_max is {sigma_max}; it must be above {least:.1f}, where the second step starts"
        )
    angles = (math.atan(sigma_max), *_MIDDLE[: steps - 1], 0.0)
    return tuple(math.sin(angle) / (math.cos(angle) + math.sin(angle)) for angle in angles)


def rcm_steps(
    times: tuple[float, ...],
    rule: RcmRule,
    train_timesteps: int = TRAIN_TIMESTEPS,
    boundary: float | None = None,
) -> tuple[Step, ...]:
    """The steps between `times`.

    Args:
        boundary: times below it run `transformer_2`; None for a single network.

    Raises:
        BadInput: no such rule.
    """
    if rule not in get_args(RcmRule):
        raise BadInput(f"rule must be 'sde' or 'ode', got {rule!r}")
    update: UpdateRule = "rcm-sde" if rule == "sde" else "rcm-ode"
    return tuple(
        Step(
            time=time,
            next_time=next_time,
            timestep=train_timesteps * time,
            denoiser="transformer" if boundary is None or time >= boundary else "transformer_2",
            guidance_scale=None,
            rule=update,
        )
        for time, next_time in itertools.pairwise(times)
    )


def rcm_schedule(
    steps: int,
    sigma_max: float,
    rule: RcmRule,
    *,
    boundary: float | None = None,
    expand_timesteps: bool = False,
) -> Schedule:
    """The whole loop, with the diffusers scheduler that makes the same steps.

    Raises:
        BadInput: see `rcm_times` and `rcm_steps`.
    """
    times = rcm_times(steps, sigma_max)
    config = {"num_train_timesteps": TRAIN_TIMESTEPS, "sigma_max": sigma_max, "rule": rule}
    return Schedule(
        steps=rcm_steps(times, rule, boundary=boundary),
        scheduler={"class": RCM_SCHEDULER, "config": config, "num_inference_steps": steps},
        initial_noise_scale=times[0],
        expand_timesteps=expand_timesteps,
    )
