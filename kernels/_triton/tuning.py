"""Choose a kernel's configuration by timing a few, once per problem, and remember it.

Unlike `triton.autotune` it costs a dictionary look-up per launch, no more, and while a CUDA graph
is being captured it takes the first configuration instead of measuring.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Sequence
from statistics import median
from typing import TypeVar

import torch
from triton.runtime.errors import OutOfResources, PTXASError

from .support import interpreting

AUTOTUNE_VARIABLE = "TURBO_OPT_AUTOTUNE"  # "0": always take the first configuration
WARMUP_LAUNCHES = 3
TIMED_LAUNCHES = 10

Config = TypeVar("Config")
_fastest: dict[Hashable, object] = {}


def fastest(
    problem: Hashable, configs: Sequence[Config], launch: Callable[[Config], object]
) -> Config:
    """The configuration whose launch takes the least time; `problem` includes the device.

    `launch` must be safe to repeat: it computes the same outputs from the same inputs.
    """
    known = _fastest.get(problem)
    if known is not None:
        return known  # type: ignore[return-value]
    if not _may_measure():
        return configs[0]
    times = [_milliseconds(lambda config=config: launch(config)) for config in configs]  # type: ignore[misc]
    best = configs[times.index(min(times))]
    _fastest[problem] = best
    return best


def measured_configurations() -> dict[Hashable, object]:
    """The configuration found fastest for each problem so far."""
    return dict(_fastest)


def _may_measure() -> bool:
    if interpreting() or os.environ.get(AUTOTUNE_VARIABLE) == "0":
        return False
    return not torch.cuda.is_current_stream_capturing()


def _milliseconds(launch: Callable[[], object]) -> float:
    """Median time of a launch; infinite if the configuration does not fit the device."""
    try:
        for _ in range(WARMUP_LAUNCHES):
            launch()
    except (OutOfResources, PTXASError):
        return math.inf
    times = []
    for _ in range(TIMED_LAUNCHES):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        launch()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)
