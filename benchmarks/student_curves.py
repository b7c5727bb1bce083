"""How tiny-wan's students learned, as a figure and a table, from the logs of their training.

    python -m benchmarks.student_curves --logs work/students/logs.tar --out students.png

The table, every point of the figure with the commit that trained it, is
benchmarks/results/student_curves.csv.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.results import RESULTS, current_commit
from turbo_opt.kernels.whole_file import write_whole


class Series(NamedTuple):
    """A line of the figure: a column of a job's log, and what it is called."""

    job: str
    column: str
    label: str


_ERROR = "held_out_relative_error"
_CHANGE = "held_out_relative_change"
_PANELS = {
    ("tuning for sparse attention", "relative error to the teacher, held out"): (
        Series("sla", _ERROR, "from proj_l = 0"),
        Series("sla-closed-form", _ERROR, "from the closed form"),
    ),
    ("tuning with the student as companion", "relative error, held out"): (
        Series("sla", _ERROR, "to the teacher"),
        Series("sla", "held_out_companion_1_relative_error", "merged, to the student"),
    ),
    ("distillation", "change of the clip along the path, held out"): (
        Series("consistency", _CHANGE, "forward term"),
        Series("rcm", _CHANGE, "both terms, from there"),
        Series("rcm-sla", _CHANGE, "sparse"),
    ),
}
"""(title, what is measured) → lines."""
_COMPANION = 1
"""Which panel may come from logs of its own."""


def curve(logs: tarfile.TarFile, job: str, column: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a column of a job's log, where it has one.

    Raises:
        KeyError: the archive has no log of that job.
    """
    file = logs.extractfile(f"{job}/log.csv")
    assert file is not None
    rows = [row for row in csv.DictReader(io.TextIOWrapper(file, "utf-8")) if row.get(column)]
    return [int(row["step"]) for row in rows], [float(row[column]) for row in rows]


def draw(logs: Path, companion_logs: Path, out: Path, table: Path, commit: str) -> None:
    """The figure, and its points as CSV.

    Args:
        companion_logs: of the tuning with a companion; may be the same file.
        commit: that trained them.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(_PANELS), figsize=(14, 3.6), layout="constrained")
    points = io.StringIO()
    writer = csv.writer(points, lineterminator="\n")
    writer.writerow(["figure", "line", "step", "value", "commit"])
    with tarfile.open(logs) as archive, tarfile.open(companion_logs) as with_companion:
        for number, ((title, what), lines) in enumerate(_PANELS.items()):
            axis = axes[number]
            for line in lines:
                source = with_companion if number == _COMPANION else archive
                steps, values = curve(source, line.job, line.column)
                axis.plot(steps, values, marker=".", label=line.label)
                writer.writerows(
                    [title, line.label, *point, commit] for point in zip(steps, values, strict=True)
                )
            axis.set(title=title, xlabel="step", ylabel=what, yscale="log")
            axis.grid(alpha=0.3)
            axis.legend()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
    write_whole(table, points.getvalue())


def main(arguments: list[str] | None = None) -> int:
    """Draw the figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.student_curves")
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--companion-logs", type=Path, help="default: --logs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path, default=RESULTS / "student_curves.csv")
    parser.add_argument("--commit", help="that trained them; default: the checkout's")
    options = parser.parse_args(arguments)
    companion_logs, commit = options.companion_logs, options.commit
    draw(
        options.logs,
        companion_logs or options.logs,
        options.out,
        options.table,
        current_commit() if commit is None else commit,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
