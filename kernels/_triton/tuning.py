"""Choose a kernel's configuration by timing a few, once per problem, and remember it.

Unlike `triton.autotune` it costs a dictionary look-up per launch, no more, and while a CUDA graph
is being captured it takes the first configuration instead of measuring. What was measured is kept
on disk (see `tuning_file`), so later processes do not measure again.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Hashable, Sequence
from statistics import median
from typing import TypeVar

import torch
from triton.runtime.errors import OutOfResources, PTXASError

from .support import interpreting
from .tuning_file import keep_choice, kept_choice

AUTOTUNE_VARIABLE = "TURBO_OPT_AUTOTUNE"  # "0": always take the first configuration
WARMUP_LAUNCHES = 3
TIMED_LAUNCHES = 10

_log = logging.getLogger(__name__)
_NOT_COMPILED = "PassManager::run failed"  # what Triton's compiler says of itself

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
    if len(configs) == 1 or interpreting() or os.environ.get(AUTOTUNE_VARIABLE) == "0":
        return configs[0]
    name = _name_on_any_device(problem)
    kept = kept_choice(name)
    for config in configs:
        if repr(config) == kept:
            _fastest[problem] = config
            return config
    if torch.cuda.is_current_stream_capturing():
        return configs[0]
    best, milliseconds = _measure(configs, launch)
    if math.isfinite(milliseconds):
        keep_choice(name, repr(best))
    _fastest[problem] = best
    return best


def measured_configurations() -> dict[Hashable, object]:
    """The configuration found fastest for each problem so far, in this process or before it."""
    return dict(_fastest)


def _name_on_any_device(problem: object) -> str:
    """A problem as text, without the number of its device: files are of a kind of device."""
    if isinstance(problem, tuple):
        return f"({', '.join(_name_on_any_device(part) for part in problem)})"
    return problem.type if isinstance(problem, torch.device) else repr(problem)


def _measure(configs: Sequence[Config], launch: Callable[[Config], object]) -> tuple[Config, float]:
    """The configuration that takes the least time, and that time in milliseconds."""
    times = [_milliseconds(lambda config=config: launch(config)) for config in configs]  # type: ignore[misc]
    return configs[times.index(min(times))], min(times)


def _milliseconds(launch: Callable[[], object]) -> float:
    """Median time of a launch; infinite if it does not fit the device or does not compile."""
    try:
        for _ in range(WARMUP_LAUNCHES):
            launch()
    except (OutOfResources, PTXASError):
        return math.inf
    except RuntimeError as error:
        if _NOT_COMPILED not in str(error):
            raise
        _log.warning("Triton does not compile a configuration, which is left out: %s", error)
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
