"""Schedules for tests of sampling."""

from __future__ import annotations

import itertools

from turbo_opt.ir.schedule import Schedule, Step


def euler(steps: int, guidance_scale: float | None = None) -> Schedule:
    """Even steps from noise to a clip, all of the denoiser `transformer`."""
    times = [1 - i / steps for i in range(steps + 1)]
    return Schedule(
        tuple(
            Step(now, then, 1000 * now, "transformer", guidance_scale, "euler")
            for now, then in itertools.pairwise(times)
        )
    )
