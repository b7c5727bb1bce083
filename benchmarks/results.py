"""Benchmark records: written, read, merged and tabulated.

`benchmarks/results/<script>.json` holds one list of records per benchmark script. A record's
`name` is its identity: writing a record replaces the one of the same name.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from turbo_opt.kernels.whole_file import write_whole

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Ceiling:
    """What bounds a value, measured in the same run."""

    value: float
    unit: str
    what: str


@dataclass(frozen=True)
class Record:
    """One measured value and everything needed to judge it.

    `spread` is half the interquartile range over `runs`; `share_of_ceiling` is above 1 where the
    ceiling is a library's rate and was passed; `baseline` maps names to values of the same unit;
    `quality` holds SQNR or accuracy of the same configuration.
    """

    name: str
    value: float
    unit: str
    spread: float
    runs: int
    ceiling: Ceiling | None = None
    share_of_ceiling: float | None = None
    baseline: Mapping[str, float] = field(default_factory=dict)
    quality: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    commit: str = ""
    date: str = ""


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def current_commit() -> str:
    """The checkout's commit; `$TURBO_OPT_COMMIT` where the checkout's history is not at hand."""
    if os.environ.get("TURBO_OPT_COMMIT"):
        return os.environ["TURBO_OPT_COMMIT"]
    result = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return result.stdout.strip() if result.returncode == 0 else ""


def new_record(
    name: str, value: float, unit: str, spread: float, runs: int, **facts: Any
) -> Record:
    """The record of a value measured now, by this checkout; `facts` are its other fields."""
    return Record(name, value, unit, spread, runs, **facts, commit=current_commit(), date=today())


def read(path: Path) -> list[Record]:
    """The records of one file; none if there is no such file."""
    if not path.exists():
        return []
    return [_from_json(entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def merge(path: Path, records: Iterable[Record]) -> None:
    """Add records to a file, each replacing the one of its name, in one atomic step."""
    merged = {record.name: record for record in read(path)}
    merged.update((record.name, record) for record in records)
    write(path, merged.values())


def write(path: Path, records: Iterable[Record]) -> None:
    """Make a file of these records alone, in order of their names, in one atomic step."""
    entries = [asdict(record) for record in sorted(records, key=lambda record: record.name)]
    write_whole(path, json.dumps(entries, indent=1) + "\n")


def tabulate(records: Sequence[Record]) -> str:
    """The records as a markdown table."""
    lines = [
        "| name | value | spread | share of ceiling | baselines | quality |",
        "| --- | ---: | ---: | ---: | --- | --- |",
    ]
    for record in records:
        share = "" if record.share_of_ceiling is None else f"{record.share_of_ceiling:.2f}"
        value, spread = f"{record.value:.4g} {record.unit}", f"{record.spread:.2g}"
        lines.append(
            f"| {record.name} | {value} | {spread} | {share} | {_pairs(record.baseline)} | "
            f"{_pairs(record.quality)} |"
        )
    return "\n".join(lines)


def _pairs(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def _from_json(entry: dict[str, Any]) -> Record:
    ceiling = entry.pop("ceiling", None)
    return Record(**entry, ceiling=Ceiling(**ceiling) if ceiling else None)
