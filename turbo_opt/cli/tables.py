"""Reports as tables and lines of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from turbo_opt.cli.session import printable

if TYPE_CHECKING:
    from rich.table import Table

NOTHING = "–"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "") -> Table:
    """A table; columns whose name starts with `>` are numbers, set to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, pad_edge=False, title=title or None, title_justify="left")
    for column in columns:
        right = column.startswith(">")
        made.add_column(column.lstrip(">"), justify="right" if right else "left", no_wrap=right)
    for row in rows:
        made.add_row(*(printable(str(cell)) for cell in row))
    return made


def pairs(values: Mapping[str, object]) -> Table:
    """Names and values, one pair a line, without a heading."""
    from rich.table import Table

    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, value in values.items():
        made.add_row(name, printable(str(value)))
    return made


def pass_table(rows: Sequence[Mapping[str, Any]], totals: Mapping[str, Any]) -> Table:
    """Matches, near misses, time, weights and worst agreement of every pass, then the totals."""
    cells = [
        (
            row["name"],
            NOTHING if row["matches"] is None else row["matches"],
            row["near_misses"],
            "cached" if row["cached"] else seconds(row["seconds"]),
            size(row["weight_bytes_after"]),
            agreement(row),
        )
        for row in rows
    ]
    total = (
        "total",
        sum(row["matches"] or 0 for row in rows),
        sum(row["near_misses"] for row in rows),
        seconds(totals["seconds"]),
        size(totals["weight_bytes_after"]),
        "",
    )
    names = ("pass", ">matches", ">near misses", ">time", ">weights", ">worst SQNR")
    made = table(names, cells)
    made.add_section()
    made.add_row(*map(str, total))
    return made


def near_miss_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why passes nearly fired, one line for each reason."""
    return [
        f"near miss, {row['name']}: {miss['count']}× {miss['reason']} "
        f"(first: {miss['denoiser']}, {miss['example']})"
        for row in rows
        for miss in row["near_miss_reasons"]
    ]


def choice_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What passes chose for single layers: how often what is most frequent, and all others with the
    reason."""
    lines = []
    for row in rows:
        counts = Counter(choice["choice"] for choice in row["choices"])
        for choice, count in counts.most_common(1):
            lines.append(f"chosen, {row['name']}: {choice} for {count} of {counts.total()} layers")
            lines += [
                f"chosen, {row['name']}: {item['choice']} for {item['module']} ({item['reason']})"
                for item in row["choices"]
                if item["choice"] != choice
            ]
    return lines


def agreement(row: Mapping[str, Any]) -> str:
    """The worst SQNR of a pass: `bitwise`, decibels, or a dash where nothing was checked."""
    if row["bitwise"]:
        return "bitwise"
    value = row["worst_sqnr_db"]
    return NOTHING if value is None else f"{value:.1f} dB"


def size(count: float | None) -> str:
    """`1536` → `1.50 KiB`."""
    if count is None:
        return NOTHING
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"


def seconds(value: float | None) -> str:
    """`1.234` → `1.23 s`."""
    return NOTHING if value is None else f"{value:.2f} s"


def decibels(value: float | str) -> str:
    """An SQNR as people read it; infinity, or its name in JSON, is `bitwise`."""
    number = float(value)
    return "bitwise" if number == float("inf") else f"{number:.1f} dB"
