"""How much of a four-step denoising run the GPU waits: the share of time in which no kernel runs.

    python -m benchmarks.idle_share --model 1.3b --out results/
    python -m benchmarks.idle_share --model tiny-wan --configuration fused-fp8 --loop-graph

The optimized graph of `benchmarks.forward` (random weights) denoises a clip in rCM's four steps,
after runs that compile, tune and record. PyTorch's profiler gives the start and end of every kernel
and copy on the device; idle is what their union leaves between the first start and the last end.
Diffusers' model as it comes, with the same weights, takes the same steps before it: the baseline.
With `--loop-graph` the run is timed instead, without a profiler, in turn as one CUDA graph and as
one for each step. Without a GPU, `--dry-run` takes the outermost CPU operators of a tiny model
instead: it proves that the script runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import cast

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.attention import sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks import results
from benchmarks.forward import ATTENTION, CASES, PIPELINES, STEPS, Bench, Case, measure
from benchmarks.forward.run import EAGER
from benchmarks.forward.timing import milliseconds
from benchmarks.kernels._harness import Session, Timing
from benchmarks.results import Record
from turbo_opt.runtime.module import CompiledTransformer

Interval = tuple[float, float]
"""Start and end, in microseconds."""
_RUNS = 5
_TINY_WAN = Case(
    "tiny-wan",
    {**CASES["tiny"].config, "num_layers": 4, "ffn_dim": 768, "text_dim": 128},
    (5, 24, 24),
    runs=30,
)
"""The size of the embedded model and its clips, with random weights."""
_CASES = {**CASES, "tiny-wan": _TINY_WAN}


def idle_share(intervals: Iterable[Interval]) -> float:
    """The share of the time between the first start and the last end that none of them covers.

    Raises:
        ValueError: there is no time between them.
    """
    ordered = sorted(intervals)
    if not ordered or max(end for _, end in ordered) <= ordered[0][0]:
        raise ValueError("no interval of any length was recorded")
    busy, covered = 0.0, ordered[0][0]
    for start, end in ordered:
        busy += max(0.0, end - max(start, covered))
        covered = max(covered, end)
    return 1 - busy / (covered - ordered[0][0])


def work_intervals(call: Callable[[], Tensor], device: torch.device) -> list[Interval]:
    """When the device worked during a call: kernels and copies, or the operators of a CPU."""
    cuda = device.type == "cuda"
    # Only what is asked for: recording operators as well would keep a GPU waiting for the host.
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        call()
        if cuda:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    return [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == wanted and event.time_range.end > event.time_range.start
    ]


@dataclass(frozen=True)
class Idle:
    """What a profiler saw of a few clips: median and spread of the share, and how many kernels."""

    share: float
    spread: float
    kernels_and_copies: float

    @classmethod
    def of(cls, runs: Sequence[Sequence[Interval]]) -> Idle:
        """From the intervals of each run."""
        shares = [idle_share(intervals) for intervals in runs]
        low, _, high = quantiles(shares, n=4)
        return cls(median(shares), (high - low) / 2, median(len(each) for each in runs))


def profiled(bench: Bench, clip: Callable[[], Tensor]) -> Idle:
    """Profile a few clips; nothing is compiled, tuned or recorded any more."""
    with torch.no_grad(), sdpa_kernel(ATTENTION, set_priority=True):
        return Idle.of([work_intervals(clip, bench.device) for _ in range(_RUNS)])


def eager_clip(bench: Bench) -> Callable[[], Tensor]:
    """The four steps by diffusers' model as it comes."""
    return bench.clip(cast("CompiledTransformer", bench.model))  # any network with diffusers' call


def run(case: Case, session: Session, configuration: str) -> Record:
    """Profile diffusers' model, then one configuration of it."""
    bench = Bench(case, session)
    original = eager_clip(bench)
    eager_timing, _, _ = measure(bench, original)
    eager = profiled(bench, original)
    module, _ = bench.optimized(PIPELINES[configuration])
    clip = bench.clip(module)
    unprofiled, _, _ = measure(bench, clip, warmup=3)
    ours = profiled(bench, clip)
    return session.add(
        f"{case.name}/gpu_idle_share",
        ours.share,
        "",
        ours.spread,
        _RUNS,
        baseline={EAGER: eager.share},
        config={
            "configuration": configuration,
            "pipeline": PIPELINES[configuration],
            "latent": list(case.latent),
            "steps": STEPS,
            "four_steps_ms_without_profiler": unprofiled.ms,
            "kernels_and_copies": ours.kernels_and_copies,
            EAGER: {
                "spread": eager.spread,
                "four_steps_ms_without_profiler": eager_timing.ms,
                "kernels_and_copies": eager.kernels_and_copies,
            },
        },
    )


def run_loop_graph(case: Case, session: Session, configuration: str) -> Record:
    """Time four steps as one CUDA graph, and beside it as one graph for each step."""
    bench = Bench(case, session)
    module, _ = bench.optimized(PIPELINES[configuration])
    clips = {loop: bench.clip(module, loop_graph=loop) for loop in (False, True)}
    for clip in clips.values():
        measure(bench, clip, warmup=3)
    times: dict[bool, list[float]] = {loop: [] for loop in clips}
    with torch.no_grad(), sdpa_kernel(ATTENTION, set_priority=True):
        for _ in range(case.runs):  # in turn, as a GPU slows down while it gets warm
            for loop, clip in clips.items():
                times[loop].append(milliseconds(clip, bench.device.type == "cuda"))
    status = module.loop_graph_status
    found = {loop: Timing.of(each) for loop, each in times.items()}
    return session.add(
        f"{case.name}/loop_graph",
        found[True].ms,
        "ms",
        found[True].spread_ms,
        found[True].runs,
        baseline={"step_graphs": found[False].ms},
        config={
            "configuration": configuration,
            "pipeline": PIPELINES[configuration],
            "latent": list(case.latent),
            "steps": STEPS,
            "loop_graph_status": status,
            "step_graphs_spread_ms": found[False].spread_ms,
        },
    )


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(_CASES), default="1.3b")
    parser.add_argument("--configuration", choices=sorted(PIPELINES), default="sagesla-fp8")
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    parser.add_argument(
        "--loop-graph", action="store_true", help="time four steps as one CUDA graph and as four"
    )
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with --model tiny")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA device; --dry-run --model tiny runs on the CPU", file=sys.stderr)
        return 2
    session = Session(dry=options.dry_run)
    measured = run_loop_graph if options.loop_graph else run
    record = measured(_CASES[options.model], session, options.configuration)
    results.merge(options.out / "idle_share.json", [record])
    print(results.tabulate([record]))
    print(json.dumps(record.config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
