"""How tiny-wan's students learned, as a figure, from the logs that their training left.

python -m benchmarks.student_curves --logs work/students/logs.tar --out docs/tiny-wan/students.png
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
import tarfile
from pathlib import Path

_PANELS = {
    "tuning for sparse attention": (
        "held_out_relative_error",
        "relative error to the teacher, held out",
        {"sla": "from proj_l = 0", "sla-closed-form": "from the closed form"},
    ),
    "distillation": (
        "held_out_relative_change",
        "change of the clip along the path, held out",
        {"consistency": "forward term", "rcm": "both terms, from there", "rcm-sla": "sparse"},
    ),
}
"""Title → column, what it is, and the jobs that are drawn."""


def curve(logs: tarfile.TarFile, job: str, column: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a column of a job's log, where it has one.

    Raises:
        KeyError: the archive has no log of that job.
    """
    file = logs.extractfile(f"{job}/log.csv")
    assert file is not None
    rows = [row for row in csv.DictReader(io.TextIOWrapper(file, "utf-8")) if row.get(column)]
    return [int(row["step"]) for row in rows], [float(row[column]) for row in rows]


def draw(logs: Path, out: Path) -> None:
    """One panel of tuning, one of distillation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(_PANELS), figsize=(10, 3.6), layout="constrained")
    with tarfile.open(logs) as archive:
        for axis, (title, (column, what, jobs)) in zip(axes, _PANELS.items(), strict=True):
            for job, label in jobs.items():
                axis.plot(*curve(archive, job, column), marker=".", label=label)
            axis.set(title=title, xlabel="step", ylabel=what, yscale="log")
            axis.grid(alpha=0.3)
            axis.legend()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Draw the figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.student_curves")
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    draw(options.logs, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
