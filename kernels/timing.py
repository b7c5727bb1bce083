"""How long a launch takes: many in one CUDA graph on a GPU, one by one elsewhere.

Python launches a kernel in about 100 µs, longer than a small one runs: so several launches are
recorded in one CUDA graph, and a replay's time is divided by their number. Calls that cannot be
recorded are timed one by one, between device events. Launches rotate among input sets that together
exceed the cache, so that every launch reads device memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

from .errors import KernelError

SETS_BYTES = 256 * 2**20  # rotate over at least this much: several times the largest L2
GRAPH_MS, MOST_LAUNCHES = 5.0, 256  # how long a graph should take, and what it holds at most
LONGEST_MS, FEWEST_RUNS = 4000.0, 5  # of all runs together, unless that makes them too few

InputSet = tuple[Any, ...]


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median, and half the interquartile range."""

    ms: float
    spread_ms: float
    runs: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Timing:
        """From the milliseconds of each run."""
        low, _, high = quantiles(times, n=4) if len(times) > 1 else (0.0, 0.0, 0.0)
        return cls(median(times), (high - low) / 2, len(times))


def input_sets(make: Callable[[], InputSet], fewest: int = 2) -> list[InputSet]:
    """As many fresh input sets as exceed the cache."""
    first = make()
    size = sum(x.numel() * x.element_size() for x in first if isinstance(x, torch.Tensor))
    count = max(fewest, min(16, -(-SETS_BYTES // max(size, 1))))
    return [first, *(make() for _ in range(count - 1))]


def gpu_times(call: Callable[..., object], sets: Sequence[InputSet], runs: int) -> list[float]:
    """Milliseconds of a launch of `call(*inputs)`, one mean for each replay or one for each launch.

    Kernels must have been compiled and tuned by an earlier call.
    """
    return _by_graph(call, sets, runs) or between_events(
        [lambda index=index: call(*sets[index % len(sets)]) for index in range(runs)]  # type: ignore[misc]
    )


def wall_times(call: Callable[..., object], sets: Sequence[InputSet], runs: int) -> list[float]:
    """Milliseconds of `call(*inputs)` by the clock, for a device that works when it is told."""
    times = []
    for index in range(runs):
        start = time.perf_counter()
        call(*sets[index % len(sets)])
        times.append((time.perf_counter() - start) * 1e3)
    return times


def between_events(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Milliseconds of each call on the device; the host does not wait between them."""
    events = []
    for call in calls:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _by_graph(call: Callable[..., object], sets: Sequence[InputSet], runs: int) -> list[float]:
    """A mean over each replay of a graph; nothing if the call cannot be recorded."""
    once = min(between_events([lambda inputs=inputs: call(*inputs) for inputs in sets]))  # type: ignore[misc]
    rounds = max(1, min(round(GRAPH_MS / (once * len(sets))), MOST_LAUNCHES // len(sets)))
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for inputs in sets:
                    call(*inputs)
    except (RuntimeError, KernelError):
        torch.cuda.synchronize()
        return []
    launches = rounds * len(sets)
    graph.replay()
    runs = min(runs, max(FEWEST_RUNS, int(LONGEST_MS / (once * launches))))
    return [each / launches for each in between_events([graph.replay] * runs)]
