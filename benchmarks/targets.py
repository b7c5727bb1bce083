"""What one H200 was asked to reach, and what was measured: one record for each target.

    python -m benchmarks.targets        # writes results/targets.json from the other records

Benchmarks record every configuration and every provider under a name of its own. Here each target
gets the name and the unit that it was asked for by, its value from the best provider that can be
chosen, and where that came from. Nothing is measured here. A headline that no record answers has
none; a memory-bound kernel that none answers has one that says so, and counts as missed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, Ceiling, Record, read, write

GPU = "h200"
FILE = "targets.json"
SOURCES = ("forward.json", "idle_share.json", "kernels.json")
_SMALL, _LARGE = f"{GPU}/wan2.1-t2v-1.3b-480p", f"{GPU}/wan2.1-t2v-14b-720p"
NOT_RECORDED = "not recorded"
"""The source and the provider of a target that nothing has measured."""
_CONFIGURATION = "sagesla-fp8"
"""Of the forwards: SageSLA at topk 0.1, linear layers in fp8."""


class Verdict(StrEnum):
    """How a value stands to its target."""

    AIM = "aim reached"
    MUST = "must reached"
    MISSED = "missed"


class Sense(StrEnum):
    """On which side of its limits a value has to be."""

    AT_MOST = "≤"
    BELOW = "<"
    AT_LEAST = "≥"

    def holds(self, value: float, limit: float) -> bool:
        """Is the value on the right side of the limit?"""
        if self is Sense.AT_LEAST:
            return value >= limit
        return value < limit or (self is Sense.AT_MOST and value == limit)


@dataclass(frozen=True)
class Limits:
    """What has to be reached, and what was hoped for if that is more; in the target's unit."""

    sense: Sense
    must: float
    aim: float | None = None

    def verdict(self, value: float) -> Verdict:
        """How the value stands to them; NaN has missed them."""
        if not self.sense.holds(value, self.must):
            return Verdict.MISSED
        if self.aim is not None and self.sense.holds(value, self.aim):
            return Verdict.AIM
        return Verdict.MUST

    def best(self, records: Iterable[Record]) -> Record:
        """The record whose value is farthest on the right side."""
        choose = max if self.sense is Sense.AT_LEAST else min
        return choose(records, key=lambda record: record.value)


def same(record: Record) -> Record:
    """A record that has its target's unit already."""
    return record


Beside = Callable[[Record, Iterable[Record]], Mapping[str, float]]
"""Baselines that stand in other records, from the record that answers a target and all of them."""


def nothing(record: Record, records: Iterable[Record]) -> Mapping[str, float]:
    """No baseline but what the record brings along."""
    return {}


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        name: as it was asked for; its record's name.
        unit: as it was asked for.
        limits: must and aim.
        prefix, suffix: a record that answers it is named `PREFIX/SUFFIX` or
            `PREFIX/PROVIDER/SUFFIX`.
        convert: from such a record to one of this unit.
        beside: its baselines in other records.
    """

    name: str
    unit: str
    limits: Limits
    prefix: str
    suffix: str
    convert: Callable[[Record], Record] = same
    beside: Beside = nothing

    def answered_by(self, name: str) -> bool:
        """Is this the name of a record that measures the target, by any provider?"""
        wanted = f"{re.escape(self.prefix)}/([^/]+/)?{re.escape(self.suffix)}"
        return re.fullmatch(wanted, name) is not None

    def derived(self, records: Sequence[Record]) -> Record | None:
        """The target's record; None if nothing has measured it.

        Its configuration holds the limits, the verdict, and the name of the record it is of; the
        rest is that record's: commit, date, environment, quality.
        """
        found = [record for record in records if self.answered_by(record.name)]
        if not found:
            return None
        best = self.limits.best(self.convert(record) for record in found)
        config = self._config(
            self.limits.verdict(best.value), best.name, best.config.get("provider")
        )
        baseline = {**best.baseline, **self.beside(best, records)}
        return replace(best, name=self.name, unit=self.unit, baseline=baseline, config=config)

    def not_recorded(self) -> Record:
        """The record of a target that nothing has measured: missed, of no run."""
        config = self._config(Verdict.MISSED, NOT_RECORDED, NOT_RECORDED)
        return Record(self.name, 0.0, self.unit, spread=0.0, runs=0, config=config)

    def _config(self, verdict: Verdict, source: str, provider: str | None) -> dict[str, Any]:
        return {
            "sense": str(self.limits.sense),
            "must": self.limits.must,
            "aim": self.limits.aim,
            "verdict": str(verdict),
            "source": source,
            "provider": provider,
        }


def scaled(record: Record, factor: float, unit: str) -> Record:
    """The record in another unit: its value, spread, ceiling and baselines."""
    ceiling = record.ceiling
    return replace(
        record,
        value=record.value * factor,
        unit=unit,
        spread=record.spread * factor,
        ceiling=ceiling and Ceiling(ceiling.value * factor, unit, ceiling.what),
        baseline={name: value * factor for name, value in record.baseline.items()},
    )


def in_seconds(record: Record) -> Record:
    """From milliseconds."""
    return scaled(record, 1e-3, "s")


def in_tops(record: Record) -> Record:
    """From TFLOP/s, as rates of products of integers are recorded too."""
    return scaled(record, 1, "TOPS")


def peak_memory(record: Record) -> Record:
    """The peak of device memory while a time was measured: one number, without a spread."""
    return replace(
        record, value=record.config["peak_gib"], unit="GiB", spread=0.0, runs=1,
        ceiling=None, share_of_ceiling=None, baseline={}, quality={},
    )  # fmt: skip


def diffusers_peaks(record: Record, records: Iterable[Record]) -> Mapping[str, float]:
    """The peaks of diffusers' forwards of the same model, in the same run."""
    model, _ = record.name.removesuffix("/four_steps_ms").rsplit("/", 1)
    run = record.commit, record.date
    forwards = {other.name: other for other in records if (other.commit, other.date) == run}
    names = {
        name: f"{model}/{name}/forward_ms" for name in ("diffusers-eager", "diffusers-compiled")
    }
    return {
        name: forwards[source].config["peak_gib"]
        for name, source in names.items()
        if source in forwards
    }


def _named(*parts: Iterable[str]) -> Iterator[str]:
    """Every choice of one of each, as a record's name has them."""
    return map("/".join, product(*parts))


def _at_most(must: float, aim: float) -> Limits:
    return Limits(Sense.AT_MOST, must, aim)


def _at_least(must: float, aim: float) -> Limits:
    return Limits(Sense.AT_LEAST, must, aim)


def _forward(
    model: str, metric: str, unit: str, limits: Limits, source: str,
    convert: Callable[[Record], Record] = same, beside: Beside = nothing,
) -> Target:  # fmt: skip
    prefix = f"{model}/{_CONFIGURATION}"
    return Target(f"{model}/{metric}", unit, limits, prefix, source, convert, beside)


def _kernel(kernel: str, metric: str, unit: str, limits: Limits) -> Target:
    return Target(f"{GPU}/{kernel}/{metric}", unit, limits, f"{GPU}/{kernel}", metric)


def _product(
    name: str, unit: str, limits: Limits, scheme: str, convert: Callable[[Record], Record] = same
) -> Target:
    shape = "75600x13824x5120"
    prefix = f"{GPU}/block_linear/{scheme}/{shape}"
    return Target(f"{GPU}/{name.format(shape)}", unit, limits, prefix, "tflops", convert)


HEADLINES = (
    _forward(_SMALL, "forward_ms", "ms", _at_most(135, 115), "forward_ms"),
    _forward(_SMALL, "four_steps_s", "s", _at_most(0.55, 0.46), "four_steps_ms", in_seconds),
    _forward(_LARGE, "forward_ms", "ms", _at_most(2700, 2350), "forward_ms"),
    _forward(_LARGE, "four_steps_s", "s", _at_most(10.8, 9.4), "four_steps_ms", in_seconds),
    _forward(
        _LARGE, "peak_gib", "GiB", _at_most(22, 19), "four_steps_ms", peak_memory, diffusers_peaks
    ),
    _kernel("sagesla", "12x32760_ms", "ms", _at_most(1.5, 1.15)),
    _kernel("sagesla", "40x75600_ms", "ms", _at_most(19, 15.5)),
    _kernel("block_sparse_attention", "40x75600_tops", "TOPS", _at_least(780, 950)),
    _product("gemm_int8_block/{}_tops", "TOPS", _at_least(780, 950), "int8-block", in_tops),
    _product("gemm_fp8_block/{}_tflops", "TFLOP/s", _at_least(1000, 1150), "fp8-block"),
    Target(f"{_SMALL}/gpu_idle_share", "", Limits(Sense.BELOW, 0.02), _SMALL, "gpu_idle_share"),
)
"""The targets of one model or one shape, in the order they were asked for."""
SHARE_OF_COPY = _at_least(0.80, 0.92)
"""Of every memory-bound kernel, at the shapes of both models and at any other that is recorded."""
_ROWS, _FFN_ROWS = ("32760x1536", "75600x5120"), ("32760x8960", "75600x13824")
"""tokens x channels of the models' streams, and inside their feed-forward layers."""
_SCHEMES = ("fp8-block", "int8-block")
MEMORY_BOUND = (
    *_named(("adaln", "layer_norm", "rms_norm", "norm_rope", "gated_residual"), _ROWS),
    *_named(("adaln_quantize", "layer_norm_quantize"), _SCHEMES, _ROWS),
    *_named(("residual_adaln_quantize", "residual_layer_norm_quantize"), _SCHEMES, _ROWS),
    *_named(("quantize_activation",), _SCHEMES, (*_ROWS, *_FFN_ROWS)),
    *_named(("gelu_quantize",), _SCHEMES, _FFN_ROWS),
    # What prepares q, k and v inside `sagesla`, on Hopper.
    *_named(("measure_rms", "measure_keys", "prepare_keys", "prepare_queries"), _ROWS),
)
"""Every memory-bound kernel with its scheme, if it has one, and its shapes, recorded or not."""


def shares_of_copy(records: Iterable[Record]) -> list[Target]:
    """A target for each memory-bound kernel, scheme and shape, wanted or recorded."""
    recorded = {
        match[1]
        for record in records
        if (match := re.fullmatch(rf"{GPU}/(.+/\d+x\d+)(/[^/]+)?/share_of_copy", record.name))
    }
    return [
        Target(
            f"{GPU}/{kernel}/share_of_copy", "", SHARE_OF_COPY, f"{GPU}/{kernel}", "share_of_copy"
        )
        for kernel in sorted(recorded.union(MEMORY_BOUND))
    ]


def derived(records: Sequence[Record]) -> list[Record]:
    """The records of all targets that `records` answer, in order of their names."""
    targets = (*HEADLINES, *shares_of_copy(records))
    answers = (target.derived(records) for target in targets)
    return _in_order(answer for answer in answers if answer)


def complete(records: Sequence[Record]) -> list[Record]:
    """`derived`, and what says of each memory-bound kernel without a record that it has none."""
    answered = derived(records)
    names = {record.name for record in answered}
    missing = (share for share in shares_of_copy(records) if share.name not in names)
    return _in_order([*answered, *(share.not_recorded() for share in missing)])


def _in_order(records: Iterable[Record]) -> list[Record]:
    return sorted(records, key=lambda record: record.name)


def measured(folder: Path = RESULTS) -> list[Record]:
    """The records that targets are derived from."""
    return [record for name in SOURCES for record in read(folder / name)]


def main() -> None:
    """Write targets.json: only what is derived now, so that nothing outlives its source."""
    records = complete(measured())
    write(RESULTS / FILE, records)
    for record in records:
        value = f"{record.value:.4g} {record.unit}" if record.runs else NOT_RECORDED
        print(f"{record.name}: {value}, {record.config['verdict']}")


if __name__ == "__main__":
    main()
