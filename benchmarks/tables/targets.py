"""What was asked for beside what was measured."""

from __future__ import annotations

from benchmarks.results import Record
from benchmarks.tables.cells import by_name, number, short
from benchmarks.targets import FILE, HEADLINES, NOT_RECORDED, SHARE_OF_COPY, Limits, Verdict


def targets() -> str:
    """What was asked for, what was measured, and what is missed."""
    records = by_name(FILE)
    lines = [
        "| target | must | aim | measured | | beside it, in the same run | from |",
        "| --- | ---: | ---: | ---: | --- | --- | --- |",
    ]
    for target in HEADLINES:
        record = records.get(target.name)
        measured = "not recorded | **missed** | |" if record is None else _measured(record)
        lines.append(f"| `{short(target.name)}` | {_limits(target.limits)} | {measured} |")
    lines.append(_all_shares(_shares()))
    return "\n".join(lines)


def _limits(limits: Limits) -> str:
    aim = "" if limits.aim is None else f"{limits.sense} {limits.aim:g}"
    return f"{limits.sense} {limits.must:g} | {aim}"


def _measured(record: Record) -> str:
    """Four cells: value, verdict, what stands beside it, where it comes from."""
    value = f"{number(record.value)} {record.unit}".strip()
    source = record.config["source"]
    name = "" if source == record.name else f"`{short(source)}`, "
    return f"{value} | {_verdict(record)} | {_beside(record)} | {name}{record.commit[:7]}"


def _verdict(record: Record) -> str:
    verdict = record.config["verdict"]
    return f"**{verdict}**" if verdict == Verdict.MISSED else verdict


def _beside(record: Record) -> str:
    """What the library's rate or a copy would give, and what it replaces, in its unit."""
    kind = "floor" if record.unit in ("ms", "s") else "library"
    others = {kind: record.ceiling.value} if record.ceiling else {}
    others |= {name.replace("_", " "): value for name, value in record.baseline.items()}
    return ", ".join(f"{name} {number(value)}" for name, value in others.items())


def _all_shares(records: list[Record]) -> str:
    """One row for the shares of copy, each of which must reach the same."""
    reached = [record for record in records if record.config["verdict"] != Verdict.MISSED]
    verdict = "must reached" if records and reached == records else "**missed**"
    value = f"{len(reached)} of {len(records)} reach it"
    missing = sum(_is_missing(record) for record in records)
    value += f", {missing} not recorded" if missing else ""
    limits = _limits(SHARE_OF_COPY)
    return f"| `<memory-bound kernel>/share_of_copy` | {limits} | {value} | {verdict} | | below |"


def _is_missing(record: Record) -> bool:
    return record.config["source"] == NOT_RECORDED


def _shares() -> list[Record]:
    records = by_name(FILE).values()
    return [record for record in records if record.name.endswith("/share_of_copy")]


def shares() -> str:
    """Memory-bound kernels, each at both models' shapes, by the fastest provider."""
    lines = [
        "| kernel | scheme | tokens × channels | provider | share of copy | |",
        "| --- | --- | --- | --- | ---: | --- |",
    ]
    for record in _shares():
        kernel, *scheme, shape, _ = short(record.name).split("/")
        measured = f"{record.config['provider']} | {record.value:.3f} | {_verdict(record)}"
        if _is_missing(record):
            measured = f" | {NOT_RECORDED} | "
        sides = shape.replace("x", " × ")
        lines.append(f"| `{kernel}` | {''.join(scheme)} | {sides} | {measured} |")
    return "\n".join(lines)
