"""Time every provider of a call on a device of this machine, and choose one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ._triton.support import interpreting
from .capability import capability_of
from .operator import Operator, force_provider
from .provider_table import Entry
from .timing import InputSet, Timing, between_events, gpu_times, input_sets, wall_times

WARMUP = 3
LONGEST_CALL_MS = 1000.0  # a slower provider is timed once
CPU_MS, CPU_RUNS, GPU_RUNS = 300.0, 15, 15  # on a CPU: of all runs together, and at most
LARGEST_ON_CPU = 32 * 2**20  # bytes of inputs
LEAST_GAIN = 0.03  # of time, for which the declared choice is left


@dataclass(frozen=True)
class Measurement:
    """What was found for one call.

    Attributes:
        declared: the provider that is chosen where nothing is measured.
        times: provider → its time.
        skipped: provider → why it was not timed.
    """

    declared: str
    times: Mapping[str, Timing]
    skipped: Mapping[str, str]

    def entry(self) -> Entry | None:
        """What a table should hold; None where there was nothing to choose from.

        The declared provider stays the choice unless another takes 3 % less time.
        """
        if len(self.times) < 2:
            return None
        ms = {name: timing.ms for name, timing in self.times.items()}
        best = min(ms, key=ms.__getitem__)
        if self.declared in ms and ms[best] > (1 - LEAST_GAIN) * ms[self.declared]:
            best = self.declared
        return Entry(best, ms, self.skipped)


def measure(operator: Operator, args: Sequence[Any], device: torch.device) -> Measurement:
    """Time every provider that serves `operator(*args)` on `device`.

    On a GPU by CUDA graphs, as `timing` has it. What cannot be had is skipped with the reason: on a
    CPU, inputs of more than 32 MiB and Triton's interpreter; a provider that fails, or that is for
    this device but not installed.

    Args:
        args: tensors may be on meta; those of `timed_inputs` take their place.
    """
    serving = operator.choose(device, *args).serving
    times: dict[str, Timing] = {}
    skipped = _missing(operator, args, device)
    for name in serving:
        reason = _not_worth_it(name, args, device)
        if reason is None:
            try:
                with force_provider({operator.name: name}):
                    times[name] = _time(operator, args, device)
            except torch.OutOfMemoryError:
                reason = "out of memory"
            except Exception as error:  # of whatever code serves it
                reason = f"it failed: {(str(error) or type(error).__name__).splitlines()[0]}"
        if reason is not None:
            skipped[name] = reason
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return Measurement(serving[0], times, skipped)


def _missing(operator: Operator, args: Sequence[Any], device: torch.device) -> dict[str, str]:
    """Providers that would serve the call if this machine had what they need."""
    capability, description = capability_of(device), operator.describe(*args)
    reasons = {
        provider.name: provider.missing()
        for provider in operator.providers
        if provider.supports(capability, description) is None
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


def timed_inputs(operator: Operator, args: Sequence[Any], device: torch.device) -> InputSet:
    """Random arguments on `device`, with what the operator says is typical of them."""
    inputs = random_inputs(args, device)
    return inputs if operator.typical_inputs is None else operator.typical_inputs(*inputs)


def random_inputs(args: Sequence[Any], device: torch.device, seed: int = 0) -> InputSet:
    """Arguments with tensors of their shapes, strides and dtypes on `device`.

    Floating-point values are normal, 8-bit integers uniform; wider integers are 0, so that they are
    valid as indices.
    """
    generator = torch.Generator(device).manual_seed(seed)
    return tuple(
        _random(item, device, generator) if isinstance(item, torch.Tensor) else item
        for item in args
    )


def _random(like: torch.Tensor, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    # One flat piece of memory: sides of stride 0 share it, as they do in the graph.
    span = sum((side - 1) * stride for side, stride in zip(like.shape, like.stride(), strict=True))
    size = span + 1 if like.numel() else 0
    if like.dtype.is_floating_point:
        flat = torch.randn(size, device=device, generator=generator).to(like.dtype)
    else:
        flat = torch.zeros(size, dtype=like.dtype, device=device)
        if like.dtype is torch.int8:
            flat.random_(-127, 128, generator=generator)
    return flat.as_strided(like.shape, like.stride())


def _not_worth_it(provider: str, args: Sequence[Any], device: torch.device) -> str | None:
    if device.type == "cuda":
        return None
    if interpreting() and provider == "triton":
        return "Triton's interpreter is no way to run"
    size = sum(x.numel() * x.element_size() for x in args if isinstance(x, torch.Tensor))
    if size > LARGEST_ON_CPU:
        return f"inputs above {LARGEST_ON_CPU // 2**20} MiB are not timed on a CPU"
    return None


def _time(operator: Operator, args: Sequence[Any], device: torch.device) -> Timing:
    call = getattr(torch.ops.turbo_opt, operator.name).default
    if device.type != "cuda":
        inputs = [timed_inputs(operator, args, device)]
        (first,) = wall_times(call, inputs, 1)
        if first > LONGEST_CALL_MS:
            return Timing.of([first])
        (once,) = wall_times(call, inputs, 1)
        return Timing.of(wall_times(call, inputs, max(3, min(CPU_RUNS, int(CPU_MS / once)))))
    with torch.cuda.device(device):
        sets = input_sets(lambda: timed_inputs(operator, args, device))
        call(*sets[0])  # compiles and tunes
        (once,) = between_events([lambda: call(*sets[-1])])
        if once > LONGEST_CALL_MS:
            return Timing.of([once])
        for index in range(WARMUP):
            call(*sets[index % len(sets)])
        return Timing.of(gpu_times(call, sets, GPU_RUNS))
