"""How a forward is timed: by events on a GPU, by the clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from benchmarks.forward.bench import Bench
from benchmarks.kernels._harness import DENSE_ATTENTION as ATTENTION
from benchmarks.kernels._harness import Timing

__all__ = ["ATTENTION", "measure", "milliseconds"]


def measure(
    bench: Bench, call: Callable[[], Tensor], warmup: int = 1
) -> tuple[Timing, Tensor, int]:
    """Time a forward; also its output and the peak of device memory while it ran, in bytes.

    Args:
        warmup: calls before the timed ones; CUDA graphs are recorded at the second.
    """
    cuda = bench.device.type == "cuda"
    with torch.no_grad(), sdpa_kernel(ATTENTION, set_priority=True):
        output = call().clone()
        for _ in range(warmup - 1):
            call()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        times = [milliseconds(call, cuda) for _ in range(bench.case.runs)]
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return Timing.of(times), output, peak


def milliseconds(call: Callable[[], Tensor], cuda: bool) -> float:
    """The time of one call."""
    if not cuda:
        begun = time.perf_counter()
        call()
        return (time.perf_counter() - begun) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)
