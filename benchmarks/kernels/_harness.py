"""Measure kernels: ceilings, timing, correctness, and the records they make.

Times are those of `turbo_opt.kernels.timing`. Without a GPU, `dry` runs the same code on tiny
shapes by the wall clock: it proves that the scripts run, and its numbers mean nothing.
"""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.results import Ceiling, Record, new_record
from turbo_opt.kernels import Choice, force_provider, operator
from turbo_opt.kernels._triton.tuning_file import CACHE_VARIABLE
from turbo_opt.kernels.timing import InputSet, Timing, gpu_times, input_sets, wall_times

ROWS = [
    (32760, 1536),
    (75600, 5120),
]  # Wan2.1 1.3B 480p and 14B 720p, 81 frames: (tokens, channels)
LINEARS = [  # (tokens, in_features, out_features)
    (32760, 1536, 1536),
    (32760, 1536, 8960),
    (32760, 8960, 1536),
    (75600, 5120, 5120),
    (75600, 5120, 13824),
    (75600, 13824, 5120),
]
ATTENTION = [(12, 32760), (40, 75600)]  # (heads, tokens) of the same models
WARMUP = 5
os.environ.setdefault(CACHE_VARIABLE, "0")  # what an earlier process chose is no part of a record

DENSE_ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


@dataclass
class Session:
    """One run: its device, its effort, its ceilings and the records it has made."""

    dry: bool = False
    quick: bool = False
    records: list[Record] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.dry else torch.device("cuda", 0)

    @property
    def runs(self) -> int:
        return 3 if self.dry else 15 if self.quick else 40

    @property
    def rows(self) -> list[tuple[int, int]]:
        return [(130, 256)] if self.dry else ROWS

    @property
    def linears(self) -> list[tuple[int, int, int]]:
        return [(132, 256, 128)] if self.dry else LINEARS

    @property
    def attention(self) -> list[tuple[int, int]]:
        return [(2, 200)] if self.dry else ATTENTION

    @cached_property
    def environment(self) -> dict[str, Any]:
        environment: dict[str, Any] = {"torch": torch.__version__, "gpu": "none (dry run)"}
        try:
            import triton

            environment["triton"] = triton.__version__
        except ImportError:
            environment["triton"] = None
        if not self.dry:
            environment["gpu"] = torch.cuda.get_device_name(self.device)
            environment.update(_driver_and_power_limit())
        return environment

    @cached_property
    def gpu(self) -> str:
        """The GPU's short name, as records' names begin: `h200`."""
        if self.dry:
            return "dry"
        return self.environment["gpu"].replace("NVIDIA", "").split()[0].lower()

    @cached_property
    def copy(self) -> Ceiling:
        """Device copy, bytes read and written: the fastest of a few sizes.

        No power of two is among them: a gibibyte, its copy a gibibyte behind it, ran at two thirds
        of the speed of an activation of a model.
        """
        sizes = [2**12] if self.dry else [75600 * 5120, 75600 * 7168]
        rates = {}
        for size in sizes:
            source = torch.empty(size, dtype=torch.bfloat16, device=self.device).normal_()
            target = torch.empty_like(source)
            timing = self.time(lambda to, x: to.copy_(x), [(target, source)])
            rates[4 * size / timing.ms / 1e6] = 2 * size
        best = max(rates)
        return Ceiling(best, "GB/s", f"device copy of {rates[best] / 1e6:.0f} MB")

    @cached_property
    def bf16_matmul(self) -> Ceiling:
        return self._matmul("bf16", torch.bfloat16)

    @cached_property
    def library_matmul(self) -> dict[str, Ceiling]:
        """The library's unscaled (int8) or per-tensor-scaled (fp8) product, by scheme."""
        return {
            "int8-block": self._matmul("int8", torch.int8),
            "fp8-block": self._matmul("fp8", torch.float8_e4m3fn),
        }

    def _matmul(self, name: str, dtype: torch.dtype) -> Ceiling:
        side = 128 if self.dry else 8192
        if dtype is torch.int8:
            a, b = torch.randint(-128, 128, (2, side, side), dtype=dtype, device=self.device)
            call = lambda: torch._int_mm(a, b.t())  # noqa: E731
        else:
            a, b = torch.randn(2, side, side, device=self.device).to(dtype)
            one = torch.ones((), device=self.device)
            call = (
                (lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16))
                if dtype is torch.float8_e4m3fn
                else lambda: a @ b.t()
            )
        timing = self.time(call, [()])
        what = f"{name} library matmul {side}³"
        return Ceiling(2 * side**3 / timing.ms / 1e9, "TFLOP/s", what)

    def input_sets(self, make: Callable[[], InputSet]) -> list[InputSet]:
        """As many fresh input sets as exceed the cache, at least two."""
        return [make(), make()] if self.dry else input_sets(make)

    def time(self, call: Callable[..., object], sets: Sequence[InputSet]) -> Timing:
        """Time `call(*inputs)`, rotating over the input sets."""
        for index in range(1 if self.dry else WARMUP):
            call(*sets[index % len(sets)])
        times = wall_times if self.dry else gpu_times
        return Timing.of(times(call, sets, self.runs))

    def usable(self, name: str, args: InputSet) -> tuple[Choice, list[str]]:
        """The default choice for this call, and every provider but the reference that works."""
        choice = operator(name).choose(self.device, *args)
        others = [other for other, why in choice.passed_over.items() if why.startswith("works")]
        names = [choice.provider, *others]
        return choice, [each for each in names if each != "reference"]

    def check(self, label: str, sqnr: float, least: float) -> None:
        """Note a result that is too far from the reference; NaN is too far."""
        if not sqnr >= least:
            self.failures.append(f"{label}: SQNR {sqnr:.1f} dB, at least {least:.1f} wanted")

    def record_bandwidth(
        self,
        name: str,
        timing: Timing,
        moved_bytes: int,
        baseline: dict[str, Timing],
        **facts: Any,
    ) -> None:
        """A memory-bound kernel: the bytes it must move per second, as a share of a copy's."""

        def share_of(its: Timing) -> float:
            return moved_bytes / its.ms / 1e6 / self.copy.value

        share = share_of(timing)
        self.add(
            f"{name}/share_of_copy",
            share,
            "",
            share * timing.spread_ms / timing.ms,
            timing.runs,
            ceiling=self.copy,
            share_of_ceiling=share,
            baseline={other: share_of(its) for other, its in baseline.items()},
            **facts,
        )

    def record_rate(
        self,
        name: str,
        timing: Timing,
        operations: int,
        ceiling: Ceiling,
        baseline: dict[str, Timing],
        **facts: Any,
    ) -> None:
        """A matrix product: operations per second, as a share of the library's 8192³."""
        rates = {other: operations / its.ms / 1e9 for other, its in baseline.items()}
        self._add_rate(f"{name}/tflops", timing, operations, "TFLOP/s", ceiling, rates, facts)

    def record_operations(
        self,
        name: str,
        timing: Timing,
        operations: int,
        ceiling: Ceiling,
        baseline: dict[str, float],
        **facts: Any,
    ) -> None:
        """An 8-bit product: operations per second, in TOPS, as a share of the library's."""
        self._add_rate(f"{name}_tops", timing, operations, "TOPS", ceiling, baseline, facts)

    def _add_rate(
        self,
        name: str,
        timing: Timing,
        operations: int,
        unit: str,
        ceiling: Ceiling,
        baseline: dict[str, float],
        facts: dict[str, Any],
    ) -> None:
        rate = operations / timing.ms / 1e9
        self.add(
            name,
            rate,
            unit,
            rate * timing.spread_ms / timing.ms,
            timing.runs,
            ceiling=ceiling,
            share_of_ceiling=rate / ceiling.value,
            baseline=baseline,
            **facts,
        )

    def record_time(
        self,
        name: str,
        timing: Timing,
        baseline: dict[str, Timing],
        ceiling: Ceiling | None = None,
        **facts: Any,
    ) -> None:
        """A whole operator: milliseconds, beside the least that it could take, if that is known."""
        self.add(
            f"{name}_ms",
            timing.ms,
            "ms",
            timing.spread_ms,
            timing.runs,
            ceiling=ceiling,
            share_of_ceiling=ceiling.value / timing.ms if ceiling else None,
            baseline={other: its.ms for other, its in baseline.items()},
            **facts,
        )

    def add(
        self, name: str, value: float, unit: str, spread: float, runs: int, **facts: Any
    ) -> Record:
        """Keep the record of a value of this run; `facts` are the record's other fields."""
        record = new_record(
            f"{self.gpu}/{name}", value, unit, spread, runs, **facts, environment=self.environment
        )
        self.records.append(record)
        return record


@contextmanager
def provider(name: str, chosen: str) -> Iterator[Callable[..., Any]]:
    """The operator of that name, served by the chosen provider."""
    with force_provider({name: chosen}):
        yield getattr(torch.ops.turbo_opt, name).default


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """PyTorch's attention over all keys: cuDNN's, else flash, else (on a CPU) plain products."""
    with sdpa_kernel(DENSE_ATTENTION, set_priority=True):
        return scaled_dot_product_attention(q, k, v)


def sqnr_db(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Signal to noise ratio in dB, at most 200; in slices, as the tensors may fill the device."""
    signal = noise = 0.0
    width = expected.shape[-1]
    pairs = zip(
        expected.reshape(-1, width).split(4096), actual.reshape(-1, width).split(4096), strict=True
    )
    for a, b in pairs:
        signal += a.double().square().sum().item()
        noise += (a.double() - b.double()).square().sum().item()
    return 10 * math.log10(max(signal, 1e-300) / max(noise, signal * 1e-20, 1e-300))


def _driver_and_power_limit() -> dict[str, str]:
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True, check=False)
    if result.returncode:
        return {}
    driver, power = result.stdout.splitlines()[0].split(",")
    return {"driver": driver.strip(), "power_limit": power.strip()}
